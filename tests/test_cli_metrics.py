"""Metrics, presets, audit, update and heat map from the command line, on a tiny model."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from cli_session import make_images, make_model, vitq
from PIL import Image

from vitq.artifacts import load_plan, load_profile


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, images, and a profile by three metrics."""
    folder = tmp_path_factory.mktemp("metrics")
    make_model(folder / "model")
    make_images(folder / "images")
    metrics = ("--metric", "output-fisher", "--metric", "weight-mse", "--metric", "lrp", "--lrp-rules", "epsilon")
    done = vitq("profile", "model", "--images", "images", "--num-images", 16, "--batch-size", 8, *metrics, folder=folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def session(profiled: Path, tmp_path: Path) -> Path:
    return shutil.copytree(profiled, tmp_path / "session")


def test_every_metric_is_stored_and_the_first_is_the_default(session: Path):
    profile = load_profile(session / "vitq-run" / "profile.json")
    assert list(profile.costs) == ["output-fisher", "weight-mse", "lrp"]
    assert sum(profile.costs["lrp"].importance.values()) == pytest.approx(1)
    plans = []
    for metric in (("--metric", "output-fisher"), (), ("--metric", "weight-mse")):
        assert vitq("allocate", "--budget", "3.0", "--force", *metric, folder=session).code == 0
        plans.append(load_plan(session / "vitq-run" / "plan.json").layers)
    assert plans[0] == plans[1] != plans[2]


def test_a_sensitivity_leaves_no_journal_behind_and_goes_on_from_one(session: Path):
    command = ("profile", "model", "--images", "images", "--num-images", 8, "--batch-size", 4, "--bits", "2,4", "--metric", "sensitivity")
    assert vitq(*command, "-o", "once.json", folder=session).code == 0
    assert not list(session.glob(".once*"))
    journal = session / ".twice.journal.jsonl"
    journal.write_text("no journal at all\n")
    refused = vitq(*command, "-o", "twice.json", folder=session)
    assert refused.code == 3 and not (session / "twice.json").exists()
    done = vitq(*command, "-o", "twice.json", "--no-resume", folder=session)
    assert done.code == 0, done.err
    assert (session / "twice.json").read_bytes() == (session / "once.json").read_bytes() and not journal.exists()


def test_a_plan_is_refined_and_audited(session: Path):
    done = vitq("allocate", "--budget", "3.0", "--refine", "--audit", 2, "--json", folder=session)
    assert done.code == 0, done.err
    found = done.document
    assert found["average_weight_bits"] <= 3 and found["average_activation_bits"] <= 3
    assert found["refinement"]["loss"] <= found["refinement"]["start"]
    assert found["audit"]["names"] == ["chosen", "random 1", "random 2", "uniform"]
    assert found["audit"]["measured"][0] == found["refinement"]["loss"]
    assert found["objective"] >= found["bound"]
    plan = load_plan(session / "vitq-run" / "plan.json")
    assert plan.summary["average_weight_bits"] == found["average_weight_bits"]


def test_an_audit_says_how_many_plans_its_correlation_is_over(session: Path):
    done = vitq("allocate", "--budget", "3.0", "--audit", 2, folder=session)
    assert "over 3 plans of this budget" in " ".join(done.out.split())


@pytest.mark.parametrize("without_budget", [("--uniform", "4"), ("--pareto", "stairs.json")], ids=" ".join)
@pytest.mark.parametrize("measuring", [("--refine",), ("--audit", "2")], ids=" ".join)
def test_without_a_budget_nothing_is_measured_nor_loaded(
    session: Path, without_budget: tuple[str, str], measuring: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    def unreached(*_: object, **__: object) -> None:
        raise AssertionError("something expensive was begun")

    monkeypatch.setattr("vitq.models.load", unreached)
    monkeypatch.setattr("vitq.allocation.pareto", unreached)
    done = vitq("allocate", *without_budget, *measuring, folder=session)
    assert done.code == 2, done.err
    assert "--refine and --audit measure plans of one budget, and none was given; give --budget 4.0, or leave them out" in done.err
    assert not (session / "vitq-run" / "plan.json").exists() and not (session / "stairs.json").exists()


def test_a_staircase_has_the_papers_layers_and_the_gap_that_was_asked_for(session: Path):
    options = ("--bits", "3,4", "--force", "--json")
    plain = vitq("allocate", "--pareto", "stairs.json", *options, folder=session).document
    papers = vitq("allocate", "--pareto", "stairs.json", "--paper-parity", "--gap", "0", *options, folder=session).document
    for plan in papers["plans"] + papers["uniform"]:
        level = int(plan["budget"])
        assert (plan["layers"]["head"], plan["layers"]["patch_embed.proj"]) == ([level, level], [level, 8])
    assert all(plan["layers"]["head"] == [8, 8] for plan in plain["plans"])
    assert all(plan["gap"] == 0 for plan in papers["plans"])
    single = vitq("allocate", "--budget", "3.5", "--paper-parity", *options, folder=session).document
    (step,) = (plan for plan in papers["plans"] if plan["budget"] == 3.5)
    assert (step["objective"], step["size_bytes"]) == (single["objective"], single["size_bytes"])


def test_the_name_of_a_plan_has_no_meaning_for_a_staircase_alone(session: Path):
    done = vitq("allocate", "--pareto", "stairs.json", "-o", "plan.json", folder=session)
    assert done.code == 2 and "-o plan.json is for the plan" in done.err and not (session / "stairs.json").exists()


@pytest.mark.parametrize(
    ("budget", "patch", "head"), [(("--uniform", "4/6"), (4, 8), (4, 6)), (("--budget", "like=3"), (3, 8), (3, 3))], ids=["uniform", "like"]
)
def test_parity_with_the_papers(session: Path, budget: tuple[str, str], patch: tuple[int, int], head: tuple[int, int]):
    assert vitq("allocate", *budget, "--paper-parity", folder=session).code == 0
    bits = load_plan(session / "vitq-run" / "plan.json").bits
    assert (bits["patch_embed.proj"].weight_bits, bits["patch_embed.proj"].activation_bits) == patch
    assert (bits["head"].weight_bits, bits["head"].activation_bits) == head


def test_parity_needs_to_know_the_bits(session: Path):
    done = vitq("allocate", "--budget", "size=1MB", "--paper-parity", folder=session)
    assert done.code == 2 and "like=4" in done.err


def test_a_heat_map_is_written(session: Path):
    picture = next((session / "images").rglob("*.png"))
    done = vitq("profile", "model", "--explain", picture, "-o", "relevance.png", "--json", folder=session)
    assert done.code == 0, done.err
    assert 0 <= done.document["label"] < 5
    with Image.open(session / "relevance.png") as image:
        assert image.size == (224, 224)


def test_a_profile_needs_images(session: Path):
    done = vitq("profile", "model", "--force", folder=session)
    assert done.code == 2 and "--images" in done.err


def test_a_staircase_is_written_where_no_plot_can_be_drawn(session: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = vitq("allocate", "--pareto", "staircase.json", folder=session)
    assert done.code == 0 and "matplotlib" in done.out + done.err
    assert json.loads((session / "staircase.json").read_text())["plans"] and not (session / "staircase.svg").exists()
