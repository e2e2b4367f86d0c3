"""`vitq report`: what is on the page, against the artifacts it was read from; what is missing, hostile, stale or damaged; how it looks."""

import html
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_session import make_chain, make_model, vitq
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest

from vitq import checkpoint
from vitq.artifacts import load_plan, load_profile
from vitq.images import open_images
from vitq.intervals import wilson
from vitq.models import load
from vitq.ranges import BINS
from vitq.report import close_ups
from vitq.report.findings import Bars
from vitq.report.pictures import Axis, outline
from vitq.report.places import shown
from vitq.rewrites import prepare

VOID = {"meta", "br"}
TITLES = {
    "model": "The model",
    "bit_map": "Where the bits went",
    "staircase": "What a bit buys",
    "sensitivity": "What each layer's bits are worth",
    "errors": "What quantization does to each layer",
    "close_up": "The layers that hurt, close up",
    "accuracy": "Accuracy",
    "size": "Size against plan",
    "latency": "Latency",
    "commands": "How to make it again",
    "provenance": "Where everything came from",
}


class Page(HTMLParser):
    """The report, parsed: every start tag with its attributes and its section, the text of each section, and whether tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str], str]] = []
        self.texts: dict[str, str] = {}
        self.open: list[str] = []
        self.section = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "section":
            self.section = given["id"]
        self.tags.append((tag, given, self.section))
        if tag in ("p", "td", "th", "h2", "h3", "summary", "span", "div"):
            self.handle_data(" ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}, self.section))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()
        self.section = "" if tag == "section" else self.section

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts[self.section] = self.texts.get(self.section, "") + data

    def named(self, tag: str, section: str | None = None) -> Iterator[dict[str, str]]:
        return (given for name, given, where in self.tags if name == tag and section in (None, where))

    @property
    def sections(self) -> list[str]:
        return [given["id"] for given in self.named("section")]

    def text(self, section: str) -> str:
        return " ".join(self.texts[section].split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished chain, and what a first report said was missing, brought by the commands that it named."""
    folder = tmp_path_factory.mktemp("finished")
    chain = make_chain(folder)
    assert all(done.code == 0 for done in chain), [done.err for done in chain]
    first = vitq("report", "--json", folder=folder)
    assert [part["title"] for part in first.document["left_out"]] == [TITLES[name] for name in ("staircase", "accuracy", "latency")]
    for part in first.document["left_out"]:
        words = shlex.split(part["command"].replace("--images PATH", "--images images"))
        done = vitq(*words[1:], *(("--rounds", 2, "--threads", 1) if "bench" in words else ()), folder=folder)
        assert done.code == 0 and (
            "allocate" in words or done.err.endswith(("next: vitq bench --baselines\n", "next: vitq report --force\n"))
        ), done.err
    assert vitq("evaluate", "model", "--images", "images", "--run-dir", "vitq-run", folder=folder).code == 0
    reported = vitq("report", "--json", "--force", folder=folder)
    assert reported.code == 0, reported.err
    (folder / "said.json").write_text(reported.out)
    return folder


@pytest.fixture
def session(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "session")


@pytest.fixture(scope="module")
def text(finished: Path) -> str:
    return (finished / "vitq-run" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def reported(session: Path, *arguments: object) -> Page:
    done = vitq("report", "--force", *arguments, folder=session)
    assert done.code == 0, done.err
    return Page((session / "vitq-run" / "report.html").read_text(encoding="utf-8"))


def only(session: Path, *names: str) -> None:
    """Leaves these files in the run folder and no others."""
    for path in (session / "vitq-run").iterdir():
        if path.name not in names:
            path.unlink()


def test_a_whole_folder_has_every_part(finished: Path, page: Page):
    said = json.loads((finished / "said.json").read_text())
    assert page.sections == list(TITLES) == said["sections"]
    assert said["left_out"] == [] == said["remarks"]
    assert said["output"] == "vitq-run/report.html" and said["file_bytes"] == (finished / "vitq-run" / "report.html").stat().st_size
    assert said["seconds"] > 0
    again = vitq("report", "vitq-run", "--force", folder=finished)
    assert again.out.startswith("wrote vitq-run/report.html (") and again.err.endswith("next: vitq show vitq-run\n")


def test_the_page_needs_nothing_beside_itself(text: str, page: Page):
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _, _ in page.tags}
    for tag, given, _ in page.tags:
        assert not [name for name in given if name.startswith("on") or name in ("style", "srcset", "xlink:href")], tag
        assert all(given[name].startswith("#") for name in ("href", "src", "action", "data") if name in given), given
    assert not re.search(r"url\(|@import|http:|https:|//\w", text.replace("</", ""))
    assert text.lower().index("<!doctype html>") == 0
    (policy,) = (given["content"] for given in page.named("meta") if "http-equiv" in given)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_links_lead_to_parts(page: Page):
    ids = [given["id"] for _, given, _ in page.tags if "id" in given]
    assert len(set(ids)) == len(ids)
    assert [given["href"] for given in page.named("a")] == [f"#{name}" for name in page.sections]


def test_every_layer_is_in_the_bit_map_with_its_bits(finished: Path, text: str, page: Page):
    plan = load_plan(finished / "vitq-run" / "plan.json")
    shown = {}
    for title, rest in re.findall(r'<div title="([^"]*bits[^"]*)">(.*?)</div>', text, re.DOTALL):
        name, words = html.unescape(title).split(": ")
        shown[name] = (words, re.findall(r'<span class="(\w+)">(.)</span>', rest), "kept" in rest)
    assert set(shown) == {layer.name for layer in plan.layers}
    for layer in plan.layers:
        words, cells, fixed = shown[layer.name]
        weight, activation = layer.weight_bits, layer.activation_bits
        assert cells == [("none", "·") if weight is None else (f"b{weight}", str(weight)), (f"b{activation}", str(activation))]
        assert words.startswith(f"both inputs {activation} bits" if weight is None else f"weights {weight} bits, input {activation} bits")
        assert fixed == words.endswith("fixed") == (layer.name in plan.fixed)
    summary = plan.summary
    assert f"On average {summary['average_weight_bits']:.3f} bits for weights" in page.text("bit_map")
    assert all(block in page.text("bit_map") for block in ("stem", "blocks.0", "blocks.1", "end", "qkv", "fc2", "head", "patch_embed"))


def test_the_chosen_point_is_the_plans_own(finished: Path, page: Page):
    summary = load_plan(finished / "vitq-run" / "plan.json").summary
    average = max(summary["average_weight_bits"], summary["average_activation_bits"])
    assert f"this folder: {average:.2f} bits, {summary['objective']:.4g} predicted" in page.text("staircase")
    plans = json.loads((finished / "vitq-run" / "staircase.json").read_text())["plans"]
    rows = re.findall(r"(\S+) (\S+) (\S+) ([\d.]+ \wB) \S+ \S (\S+)", page.text("staircase"))
    assert [row[0] for row in rows] == [f"{step['budget']:g}" for step in plans]
    assert [row[4] for row in rows] == [f"{step['objective']:.4g}" for step in plans]
    (line,) = (given["d"] for given in page.named("path", "staircase") if given["class"] == "line")
    heights = [float(y) for y in re.findall(r"(?:V|M\S+ )([\d.]+)", line)]
    assert len(heights) == len(plans) and heights == sorted(heights)  # costs fall: the line goes down, to larger y


def test_sensitivities_are_the_profiles(finished: Path, text: str, page: Page):
    profile = load_profile(finished / "vitq-run" / "profile.json")
    (table,) = profile.costs.values()
    (width,) = re.findall(r"has (\d) bits", page.text("sensitivity"))
    (exponent,) = re.findall(r"in 10(\S+) nats", page.text("sensitivity"))
    power = 10.0 ** int(exponent.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
    section = text[text.index('id="sensitivity"') : text.index('id="errors"')]
    shown = dict(re.findall(r'<div title="([^"]*)"><div class="one c\d">([^<]*)</div>', section))
    assert set(shown) == set(table.tied)
    for name, costs in table.tied.items():
        assert float(shown[name]) == pytest.approx(costs[list(table.bits).index(int(width))] / power, rel=0.005, abs=0.005)


def test_errors_are_those_that_calibration_found(finished: Path, page: Page):
    found = checkpoint.read_errors(finished / "vitq-run" / "model.safetensors")
    whole = sum(error["kl"] or 0 for error in found.values())
    worst = sorted(found, key=lambda name: -(found[name]["kl"] or 0))
    text = page.text("errors")
    assert f"come to {whole:.4g}." in text
    assert "are " + ", ".join(f"{name} ({100 * found[name]['kl'] / whole:.0f} %)" for name in worst[:2]) in text  # type: ignore[operator]
    assert f" and {worst[2]} (" in text
    for name in worst:
        assert f"{found[name]['kl']:.3g} {100 * found[name]['kl'] / whole:.1f} %" in text, name  # type: ignore[operator]
    assert len([given for given in page.named("div", "errors") if "marked" in given.get("class", "")]) == 3
    assert [given["aria-label"].split(",")[0] for given in page.named("svg", "close_up")][::4][:1] == worst[:1]


def test_accuracy_and_size_and_latency_are_the_saved_ones(finished: Path, page: Page):
    run = finished / "vitq-run"
    for name, saved in json.loads((run / "evaluate.json").read_text()).items():
        interval = binomtest(round(saved["top1"] * saved["num_images"] / 100), saved["num_images"]).proportion_ci(method="wilson")
        shown = f"{name} {saved['num_images']} {saved['top1']:.2f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
        assert shown in page.text("accuracy")
        assert "kl" not in saved or f"{saved['kl']:.3g} ± {saved['kl_margin']:.2g}" in page.text("accuracy")
    assert f"{(run / 'model.onnx').stat().st_size:,} bytes" in page.text("size")
    assert f"{load_plan(run / 'plan.json').summary['size_bytes']:,} bytes" in page.text("size")
    for row in json.loads((run / "bench.json").read_text())["results"]:
        assert f"{row['name']} 1 1 {row['median_ms']:.2f} {row['p90_ms']:.2f} {row['images_per_second']:.1f}" in page.text("latency")


def test_the_commands_make_the_artifacts_again(session: Path, text: str):
    (shown,) = re.findall(r"<pre><code>(.*?)</code></pre>", text, re.DOTALL)
    commands = [shlex.split(line) for line in html.unescape(shown).splitlines()]
    assert [command[:2] for command in commands] == [["vitq", name] for name in ("profile", "allocate", "calibrate", "export")]
    for command in commands:  # what no artifact remembers is given again
        more = ("--batch-size", 8) if command[1] == "profile" else ()
        done = vitq(*command[1:], *more, "--run-dir", "again", folder=session)
        assert done.code == 0, done.err
    for name, kind in (("profile.json", load_profile), ("plan.json", load_plan)):
        first, again = (kind(session / folder / name).model_dump() for folder in ("vitq-run", "again"))
        assert {**first, "made_from": 0} == {**again, "made_from": 0}
    first, again = (checkpoint.load(session / folder / "model.safetensors") for folder in ("vitq-run", "again"))
    assert all(torch.equal(weight.codes, again.weights[name].codes) for name, weight in first.weights.items())


def test_provenance_has_every_file_and_digest(finished: Path, page: Page):
    text = page.text("provenance")
    for path in (finished / "vitq-run").iterdir():
        if path.suffix in (".json", ".safetensors", ".onnx"):
            digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
            assert f"{path.name} size {path.stat().st_size:,} bytes digest {digest}" in text
    profile = load_profile(finished / "vitq-run" / "profile.json")
    assert text.count(profile.made_from["model"]["digest"]) == 1  # the files after it say the same
    assert f"versions.torch {profile.made_from['versions']['torch']}" in text


@pytest.mark.parametrize(
    ("names", "sections"),
    [
        (["profile.json"], ["model", "sensitivity", "commands", "provenance"]),
        (["plan.json"], ["model", "bit_map", "commands", "provenance"]),
        (["profile.json", "plan.json"], ["model", "bit_map", "sensitivity", "size", "commands", "provenance"]),
        (["staircase.json"], ["staircase", "provenance"]),
        (["model.safetensors"], ["model", "bit_map", "errors", "close_up", "commands", "provenance"]),
        (["model.onnx"], ["model", "provenance"]),
        (["evaluate.json"], ["accuracy", "provenance"]),
        (["bench.json"], ["latency", "provenance"]),
    ],
)
def test_what_a_folder_lacks_is_said_in_a_line_with_its_command(session: Path, names: list[str], sections: list[str]):
    only(session, *names)
    done = vitq("report", "--json", folder=session)
    assert done.code == 0, done.err
    page = Page((session / "vitq-run" / "report.html").read_text(encoding="utf-8"))
    assert [name for name in page.sections if name != "lacking"] == sections == done.document["sections"]
    left_out = done.document["left_out"]
    assert [part["title"] for part in left_out] == [title for name, title in TITLES.items() if name not in sections]
    for part in left_out:
        why = f" ({part['why']})" if part["why"] else ""
        assert f"{part['title']}{why} {part['command']}" in page.text("lacking") and part["command"].startswith("vitq ")
    first = "once `vitq export` has written model.onnx"
    assert [part["why"] for part in left_out if part["title"] == "Latency"] in ([], ["" if "model.onnx" in names else first])
    assert [given["href"] for given in page.named("a")] == [f"#{name}" for name in page.sections]


def test_an_edited_preprocessing_is_shown_as_it_is(session: Path):
    only(session, "plan.json")
    plan = json.loads((session / "vitq-run" / "plan.json").read_text())
    plan["model"]["data_config"] = {"input_size": 5, "crop": {"mode": "none"}}
    (session / "vitq-run" / "plan.json").write_text(json.dumps(plan))
    assert "reads input_size 5, crop.mode none" in reported(session).text("model")


def test_a_model_without_classes_has_other_measures(session: Path):
    only(session, "evaluate.json")
    found = {"model.onnx": {"num_images": 40, "cosine": 0.98765, "cosine_margin": 0.001, "relative_error": 0.1234, "added_later": []}}
    (session / "vitq-run" / "evaluate.json").write_text(json.dumps(found))
    text = reported(session).text("accuracy")
    assert "cosine relative error model.onnx 40 – – – – – 0.9877 0.1234" in text


def test_a_folder_of_another_name_is_in_every_command(session: Path):
    shutil.move(session / "vitq-run", session / "my run")
    only_plan = session / "my run"
    for path in only_plan.iterdir():
        if path.name != "plan.json":
            path.unlink()
    done = vitq("report", "my run", "--json", folder=session)
    assert done.code == 0, done.err
    words = [shlex.split(part["command"]) for part in done.document["left_out"]]
    assert all("my run" in command or any(word.startswith("my run/") for word in command) for command in words)
    assert vitq("report", "my run/plan.json", "--force", folder=session).code == 0
    assert vitq("report", "--run-dir", "my run", "--force", folder=session).code == 0
    assert vitq("report", "my run", "--run-dir", "other", folder=session).code == 2


def test_whole_paths_stay_on_the_machine(session: Path, tmp_path: Path):
    """Model, images, run folder and files given by whole paths: below the run folder's parent shown from there, else by two parts."""
    run = session / "vitq-run"
    only(session, "profile.json", "plan.json", "evaluate.json")
    for name in ("profile.json", "plan.json"):
        document = json.loads((run / name).read_text())
        document["made_from"] |= {
            "model": document["made_from"]["model"] | {"source": str(session / "model")},
            "images": document["made_from"]["images"] | {"source": "/home/secret/set/it's train"},
        }
        (run / name).write_text(json.dumps(document))
    measured = json.loads((run / "evaluate.json").read_text())
    (run / "evaluate.json").write_text(json.dumps({str(run / name): found for name, found in measured.items()}))
    done = vitq("report", run, "--force", "--json", folder=session)
    assert done.code == 0, done.err
    text = html.unescape((run / "report.html").read_text(encoding="utf-8"))
    assert str(tmp_path) not in text and "secret" not in text
    assert "vitq profile model --images '…/set/it" in text and "…/set/it's train" in text
    assert all(str(run) in part["command"] for part in done.document["left_out"])  # the terminal's commands run here


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/home/me/work/model", "model"),
        ("/home/me/work/vitq-run/model.onnx", "vitq-run/model.onnx"),
        ("/data/cifar10/train.tar", "…/cifar10/train.tar"),
    ],
)
def test_a_path_is_shown_from_the_run_folders_parent_or_by_two_parts(path: str, said: str):
    assert shown(path, Path("/home/me/work/vitq-run")) == said


def test_nothing_to_report(tmp_path: Path):
    missing = vitq("report", folder=tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.json").write_text("{}")
    empty = vitq("report", "empty", folder=tmp_path)
    assert (missing.code, empty.code) == (3, 3)
    assert "there is no folder vitq-run; `vitq profile MODEL --images PATH` begins a run folder" in missing.err
    assert "empty holds nothing that vitq wrote" in empty.err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "notes.json"]


HOSTILE = "</title></style><script>alert(1)</script><img src=x onerror=alert(1)>\" onload='x' {{ 7 * 7 }} {% raw %} &amp;"


def test_hostile_names_stay_text(session: Path):
    run = session / "vitq-run"
    only(session, "profile.json", "plan.json", "evaluate.json", "bench.json", "staircase.json")
    profile, plan, staircase = (json.loads((run / name).read_text()) for name in ("profile.json", "plan.json", "staircase.json"))
    for artifact in (profile, plan):
        artifact["model"] |= {"architecture": HOSTILE, "label_names": [HOSTILE] * 5, "arguments": {HOSTILE: HOSTILE}}
        artifact["made_from"] |= {HOSTILE: {HOSTILE: HOSTILE}, "unfused_attention": [HOSTILE]}
        artifact["made_from"]["model"]["source"] = HOSTILE
    old, layer = "blocks.0.attn.qkv", HOSTILE
    for entry in (*profile["layers"], *plan["layers"]):
        entry["name"] = layer if entry["name"] == old else entry["name"]
        entry["type"] = HOSTILE if entry["type"] == "fc1" else entry["type"]
    for entry in profile["layers"]:
        entry["block"] = HOSTILE if entry["block"] == "blocks.1" else entry["block"]
    (costs,) = profile["costs"].values()
    for table in (costs, *costs["halves"]):
        for kind in ("tied", "weight", "activation", "cross"):
            table[kind] = {layer if name == old else name: value for name, value in table[kind].items()}
    profile["costs"] = {HOSTILE: costs}
    staircase["metric"] = HOSTILE
    for step in (*staircase["plans"], *staircase["uniform"]):
        step["layers"][layer] = step["layers"].pop(old)
    results = json.loads((run / "bench.json").read_text())
    for row in (*results["results"], *results["files"]):
        row["name"] = HOSTILE
    evaluated = {HOSTILE: next(iter(json.loads((run / "evaluate.json").read_text()).values()))}
    for name, document in (("profile", profile), ("plan", plan), ("staircase", staircase), ("bench", results), ("evaluate", evaluated)):
        (run / f"{name}.json").write_text(json.dumps(document))
    shutil.move(run, session / "<script>alert(2)<")
    done = vitq("report", "<script>alert(2)<", folder=session)
    assert done.code == 0, done.err
    page = Page((session / "<script>alert(2)<" / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "img"} & {tag for tag, _, _ in page.tags}
    assert not [name for _, given, _ in page.tags for name in given if name.startswith("on")]
    wanted = " ".join(HOSTILE.split())
    present = ("", "model", "bit_map", "staircase", "sensitivity", "accuracy", "latency", "provenance")
    assert all(wanted in page.text(section) for section in present)
    assert any(wanted in " ".join(given.get("title", "").split()) for given in page.named("div", "bit_map"))


def test_paths_that_are_no_text(session: Path):
    only(session, "plan.json")
    try:
        shutil.move(session / "vitq-run", session / b"\xff\xfe".decode("utf-8", "surrogateescape"))
    except OSError:
        pytest.skip("this file system takes no such name")
    assert vitq("report", b"\xff\xfe".decode("utf-8", "surrogateescape"), "--quiet", "--json", folder=session).code == 0


def test_an_existing_report_is_refused(session: Path):
    before = (session / "vitq-run" / "report.html").read_bytes()
    done = vitq("report", folder=session)
    assert done.code == 2 and "vitq-run/report.html exists already; give --force to replace it or -o to write elsewhere" in done.err
    assert vitq("report", "-o", "elsewhere.html", "--quiet", folder=session).code == 0
    assert (session / "elsewhere.html").is_file() and (session / "vitq-run" / "report.html").read_bytes() == before


@pytest.mark.parametrize("name", ["profile", "plan", "model.safetensors", "model.onnx", "staircase", "evaluate", "bench"])
def test_a_damaged_file_leaves_the_old_report(session: Path, name: str):
    path = session / "vitq-run" / (name if "." in name else f"{name}.json")
    damaged = {"staircase": b'{"format": "vitq-pareto/1"}', "evaluate": b'{"model.onnx": {"num_images": 10, "top1": 200}}'}
    path.write_bytes(damaged[name] if name in damaged else path.read_bytes()[:100])
    before = {file.name: file.read_bytes() for file in (session / "vitq-run").iterdir()}
    done = vitq("report", "--force", folder=session)
    assert done.code == 3 and path.name in done.err and "Traceback" not in done.err, done.err
    assert {file.name: file.read_bytes() for file in (session / "vitq-run").iterdir()} == before


def test_a_report_that_cannot_be_written_leaves_nothing(session: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, *_: object, **__: object) -> None:
        self.write_bytes(b"<!DOCTYPE")
        raise OSError(28, "No space left on device")

    (session / "vitq-run" / "report.html").unlink()
    before = sorted((session / "vitq-run").iterdir())
    monkeypatch.setattr(Path, "write_text", full)
    done = vitq("report", folder=session)
    assert done.code == 3 and "No space left" in done.err
    assert sorted((session / "vitq-run").iterdir()) == before


def test_what_does_not_fit_together_is_said(session: Path):
    run = session / "vitq-run"
    plan = json.loads((run / "plan.json").read_text())
    for entry in plan["layers"]:
        entry["weight_bits"] = entry["weight_bits"] and 8
    (run / "plan.json").write_text(json.dumps(plan))
    results = run / "evaluate.json"
    evaluated = json.loads(results.read_text())
    for entry in evaluated.values():  # as earlier versions wrote it
        entry.pop("digest", None)
    results.write_text(json.dumps(evaluated))
    earlier = (run / "model.onnx").stat().st_mtime - 10
    os.utime(results, (earlier, earlier))
    page = reported(session)
    assert "model.safetensors was calibrated to another plan.json than the one beside it" in page.text("")
    assert "evaluate.json was written before model.onnx, and may be of an earlier one" in page.text("")
    assert "plan.json was edited after that." in page.text("commands")
    calibrated, _ = checkpoint.read_plan(run / "model.safetensors")  # what was calibrated is what is shown
    assert f"On average {calibrated.summary['average_weight_bits']:.3f} bits" in page.text("bit_map")


def test_another_models_profile_is_left_aside(session: Path):
    make_model(session / "other", seed=1)
    arguments = json.loads((session / "other" / "config.json").read_text())
    arguments["model_args"]["depth"] = 1
    weights = session / "other" / "model.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if "blocks.1" not in name}, weights)
    (session / "other" / "config.json").write_text(json.dumps(arguments))
    assert vitq("profile", "other", "--images", "images", "--num-images", 8, "--force", folder=session).code == 0
    done = vitq("report", "--force", "--model", "other", folder=session)
    html = (session / "vitq-run" / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "profile.json has other layers than the plan, and was left aside" in page.text("")
    assert "bit_map" in page.sections and "size" not in page.sections
    unlike = "other has another graph than model.safetensors; give the model that it was made from with --model"
    assert done.code == 0 and unlike in done.err and unlike in html


def test_a_model_with_other_weights_is_said_to_be(session: Path):
    make_model(session / "twin", seed=3)
    done = vitq("report", "--force", "--model", "twin", folder=session)
    other = "drawn with the weights of twin, which are not those of the model that was calibrated"
    assert other in done.err and other in (session / "vitq-run" / "report.html").read_text(encoding="utf-8")
    shutil.copytree(session / "model", session / "same")
    assert "not those" not in vitq("report", "--force", "--model", "same", folder=session).err


def test_options_for_the_close_up_are_refused_where_nothing_is_calibrated(session: Path):
    only(session, "profile.json", "plan.json")
    for option in ("--model", "--images"):
        found = vitq("report", option, session / "model" if option == "--model" else session / "images", "--force", folder=session)
        assert found.code == 2, found.err
        assert f"{option} would change nothing" in found.err and f"run `vitq calibrate` first, or leave {option} out" in found.err


def test_without_images_or_model_the_close_up_says_so(session: Path):
    shutil.move(session / "images", session / "moved")
    page = reported(session)
    assert "What these layers read is not shown: the images that" in page.text("close_up") and "--images" in page.text("close_up")
    kinds = {given["aria-label"].split(", ")[1] for given in page.named("svg", "close_up")}
    assert kinds <= {"weight"}
    page = reported(session, "--images", "moved")
    assert "not shown" not in page.text("close_up") and "Inputs are those of 32 images." in page.text("close_up")
    shutil.move(session / "model", session / "elsewhere")
    done = vitq("report", "--force", "--json", "--images", "moved", folder=session)
    (part,) = done.document["left_out"]
    assert part["why"] == "the float model model is not a file here; give it with --model"
    assert part["command"] == "vitq report --model MODEL --images PATH --force"
    assert "close_up" in reported(session, "--images", "moved", "--model", "elsewhere").sections
    missing = vitq("report", "--force", "--images", "nowhere", folder=session)
    assert missing.code == 3 and "nowhere" in missing.err


def test_close_ups_hold_the_values_that_there_are(finished: Path):
    model = load(str(finished / "model"))
    graph, _ = prepare(model)
    calibrated = checkpoint.load(finished / "vitq-run" / "model.safetensors")
    batches = list(open_images(finished / "images", model.data_config, 16))
    names = ("blocks.0.attn.qkv", "blocks.1.attn.av")
    linear, product = close_ups(graph, calibrated, names, batches)
    assert [panel.title for panel in linear.panels] == ["weight", "input"]
    assert [panel.title for panel in product.panels] == ["left input", "right input"]
    weight = graph.module.state_dict()[next(layer for layer in graph.layers if layer.name == names[0]).operands[1].tensor].detach()
    stored = calibrated.weights[names[0]].dequantize()
    for bars, values in ((linear.panels[0].before, weight), (linear.panels[0].after, stored)):
        width = (float(values.max()) - float(values.min())) / BINS * 2
        assert bars.low == pytest.approx(float(values.min()), abs=width) and bars.high == pytest.approx(float(values.max()), abs=width)
        assert sum(bars.counts) == pytest.approx(values.numel())
        counts, _ = np.histogram(values, len(bars.counts), (bars.low, bars.high))
        assert np.abs(np.cumsum(counts) - np.cumsum(bars.counts)).max() < 0.02 * values.numel()
    quantizer = calibrated.activations[next(layer for layer in calibrated.graph.layers if layer.name == names[0]).operands[0].tensor]
    dense = quantizer.quantize_dequantize(torch.linspace(-1e3, 1e3, 2_000_001))
    assert set(linear.panels[1].levels) >= set(dense.tolist()) and len(linear.panels[1].levels) == 2**quantizer.bits
    assert close_ups(graph, calibrated, names, None)[1].panels == ()


@pytest.mark.parametrize("num_images", [1, 7, 100, 1000])
def test_wilson_is_scipys(num_images: int):
    for count in sorted({0, 1, num_images // 3, num_images - 1, num_images}):
        expected = binomtest(count, num_images).proportion_ci(method="wilson")
        assert wilson(100 * count / num_images, num_images) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def test_axes_put_values_where_they_belong():
    axis = Axis(2, 8, 0, 600)
    assert [axis.at(value) for value in (2, 5, 8)] == [0, 300, 600]
    assert axis.ticks() == [(100 * count, str(count + 2)) for count in range(7)]
    axis = Axis(1e-4, 1, 400, 0, logarithmic=True)
    assert axis.at(1e-2) == 200 and [text for _, text in axis.ticks()] == ["0.0001", "0.001", "0.01", "0.1", "1"]
    assert [text for _, text in Axis(0.03, 0.4, 0, 1, logarithmic=True).ticks()] == ["0.05", "0.1", "0.2"]
    assert Axis(3, 3, 0, 1).ticks() == [(0, "3")]  # one value is an axis too


def test_an_outline_covers_bars_and_levels():
    drawn = outline(Bars(0.0, 4.0, (0.0, 10.0, 0.0, 100.0)), (-1.0, 0.0, 1.0))
    assert (drawn.low, drawn.high) == ("-1", "4") and len(drawn.levels) == 3
    heights = [float(y) for y in re.findall(r"V([\d.]+)", drawn.path)]
    assert heights[0] == heights[2] == drawn.base and heights[3] == 4 < heights[1] < drawn.base
    assert outline(Bars(0.0, 0.0, (0.0,))).path.endswith("Z")


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scale", ["b", "c"])
def test_colours_order_by_lightness_and_carry_their_text(text: str, scale: str):
    """Whoever sees no hue still sees the order; numbers stay readable (WCAG: 4.5)."""
    found = sorted(re.findall(rf"\.{scale}(\d) {{ background: (#\w{{6}}); color: (#\w{{6}}); }}", text))
    assert len(found) == (7 if scale == "b" else 6)
    backgrounds = [luminance(background) for _, background, _ in found]
    assert all(lighter > 1.15 * darker for lighter, darker in pairwise(backgrounds))
    for _, background, ink in found:
        lighter, darker = sorted((luminance(background), luminance(ink)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, background


def test_printed_the_commands_stay_together(text: str):
    """A block to copy from; only what is longer than a page may go on at the next."""
    printed = text[text.index("@media print {") : text.index("</style>")]
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", printed[len("@media print {") :])
    kept = {part.strip() for selectors, body in rules if "break-inside: avoid" in body for part in selectors.split(",")}
    assert "#commands" in kept and '<section id="commands">' in text


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_or_scrolls_sideways_in_a_browser(tmp_path: Path, text: str, width: int):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium here to lay the report out with")
    frame = f'<iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(text)}"></iframe>'
    script = """<script>
        const frame = document.getElementById("f");
        frame.onload = () => {
            const page = frame.contentDocument, root = page.documentElement;
            page.querySelectorAll("details").forEach(part => { part.open = true; });
            const scrolled = [...page.querySelectorAll(".scroll")].filter(part => part.scrollWidth > part.clientWidth);
            const where = scrolled.map(part => part.closest("section").id);
            document.body.dataset.found = JSON.stringify([root.scrollWidth, root.clientWidth, root.scrollHeight, where]);
        };
    </script>"""
    (tmp_path / "frame.html").write_text(frame + script, encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    if found is None:
        pytest.skip(f"Chromium did not run here: {done.stderr[-200:]}")
    content, visible, height, scrolled = json.loads(html.unescape(found.group(1)))
    assert content <= visible and width - 20 <= visible <= width and height > 3000
    assert scrolled == []
