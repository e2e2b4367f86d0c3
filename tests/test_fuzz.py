"""Files that are malicious or damaged: never a traceback, a hang, or more than 1 GB.

Of every kind of file that vitq reads, a valid one is changed: one or two of its values are replaced, removed or doubled, or its bytes
are cut or overwritten. Commands then read it in this process (fuzz_targets.py). With atheris and by coverage: fuzz_bytes.py.
"""

import copy
import json
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_targets import TARGETS, content_with, document_of, make_session, reader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SECONDS = 60
"""The longest that one input may take, on a machine that does other things too."""
BYTES = 10**9

COUNTS = {"quick": 8, "thorough": 50}
"""Inputs of each kind, values and bytes; raise `thorough` to look closer."""

NESTED: Any = 1
for _ in range(300):
    NESTED = [NESTED]

STRANGE = st.sampled_from(
    [None, True, -1, 0, 1, 2**31, 2**53, 2**63, 10**40, -(10**40), 0.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf"),
     "", " ", "\0", "\ud800", "é", "٤", "../../x", "/etc/passwd", "<script>", "{{ 7 * 7 }}", "%s", "a" * 10_000, "nan", "pickle",
     [], {}, [[]], {"": {}}, NESTED, [0] * 1000, {"name": "x"}, "vitq-plan/1", "vitq-profile/1"]
)  # fmt: skip
CHANGE = st.tuples(
    st.floats(0, 1, exclude_max=True), st.sampled_from(["replace", "replace", "replace", "remove", "rename", "twice"]), STRANGE
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def changed(document: Any, changes: list[tuple[float, str, Any]]) -> Any:
    document = copy.deepcopy(document)
    for fraction, action, value in [(fraction, action, copy.deepcopy(value)) for fraction, action, value in changes]:
        found = list(places(document))
        if not found:
            return value
        container, key = found[int(fraction * len(found))]
        if action == "remove":
            del container[key]
        elif action == "twice" and isinstance(container, list):
            container.append(container[key])
        elif action in ("rename", "twice") and isinstance(container, dict):
            container[value if isinstance(value, str) else f"{key}x"] = container[key] if action == "twice" else container.pop(key)
        else:
            container[key] = value
    return document


def damaged(content: bytes, cuts: list[tuple[str, float, bytes]]) -> bytes:
    for action, fraction, given_ in cuts:
        at = int(fraction * len(content))
        if action == "cut":
            content = content[:at]
        elif action == "insert":
            content = content[:at] + given_ + content[at:]
        else:
            content = content[:at] + given_ + content[at + len(given_) :]
    return content


CUTS = st.lists(
    st.tuples(st.sampled_from(["cut", "insert", "overwrite", "overwrite"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_session(tmp_path_factory.mktemp("session") / "made")


def fuzzed(strategy: Any, count: int, check: Callable[[Any], None]) -> None:
    """Checks so many inputs, each within the time, all within the memory."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"an input took more than {SECONDS} s")

    most = [0]

    def timed(value: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            check(value)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        most[0] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before, handler = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, too_long)
    try:
        quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        settings(max_examples=count, suppress_health_check=quiet, database=None)(given(strategy)(timed))()
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert (most[0] - before) * 1024 < BYTES


AMOUNTS = [pytest.param(COUNTS["quick"], id="quick"), pytest.param(COUNTS["thorough"], id="thorough", marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", AMOUNTS)
@pytest.mark.parametrize("name", [name for name in TARGETS if name != "pth"])
def test_changed_values(name: str, count: int, session: Path):
    content = (session / TARGETS[name].file).read_bytes()
    document, read = document_of(name, content), reader(name, session)
    assert json.loads(json.dumps(document)) == document
    read(content_with(name, content, document))  # unchanged, it is read
    fuzzed(st.lists(CHANGE, min_size=1, max_size=2), count, lambda changes: read(content_with(name, content, changed(document, changes))))


@pytest.mark.parametrize("count", AMOUNTS)
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_bytes(name: str, count: int, session: Path):
    content, read = (session / TARGETS[name].file).read_bytes(), reader(name, session)
    fuzzed(CUTS, count, lambda cuts: read(damaged(content, cuts)))
