"""The JSON Schemas in docs/schemas are those of the artifacts; `python tests/test_schemas.py` writes them anew."""

import json
from pathlib import Path

import pytest

from vitq.artifacts import BitPlan, Profile, Staircase
from vitq.latency import LatencyTable

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"
SCHEMAS = {"profile": Profile, "plan": BitPlan, "pareto": Staircase, "latency": LatencyTable}


def schema(name: str) -> str:
    return json.dumps(SCHEMAS[name].model_json_schema(), indent=1) + "\n"


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_that_of_the_artifact(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == schema(name)


if __name__ == "__main__":
    for chosen in SCHEMAS:
        (FOLDER / f"{chosen}.json").write_text(schema(chosen))
