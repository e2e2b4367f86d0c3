"""`vitq show` of saved results, latency tables and images, at any width, and the small maps that allocate and profile end with."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from allocation_problems import deit, make_latencies, make_profile, make_table
from cli_session import environment, vitq
from safetensors.torch import save_file

from vitq.allocation import allocate
from vitq.artifacts import WIDTHS, Profile, save
from vitq.cli.layer_table import layer_rows, layer_table
from vitq.cli.run_folder import _results

LAYERS = [layer.model_copy(update={"block": re.sub(r"\.(attn|mlp)$", "", layer.block)}) for layer in deit(blocks=3)]


@pytest.fixture
def found() -> Profile:
    return make_profile(LAYERS, make_table(LAYERS, WIDTHS, random.Random(0), crossed=False))


@pytest.fixture
def run(tmp_path: Path, found: Profile) -> Path:
    """A run folder whose files were written by hand."""
    folder = tmp_path / "run"
    save(found, folder / "profile.json")
    save(allocate(found, ["4.0"]).plan, folder / "plan.json")
    save(make_latencies(LAYERS, random.Random(0)), folder / "latency.json")
    evaluated = {"num_images": 50, "top1": 71.25, "top1_margin": 1.5, "top5": 100.0, "top5_margin": 0.0, "agreement": 90.5, "kl": 0.01234}
    results = {"model.onnx": evaluated, "a name that is long enough for its line " * 3: {"num_images": 7}}
    (folder / "evaluate.json").write_text(json.dumps(results))
    row = {"name": "model.onnx", "batch": 8, "threads": 2, "median_ms": 4.25, "p90_ms": 5.5, "images_per_second": 1882.4, "speedup": 1.0}
    (folder / "bench.json").write_text(json.dumps({"results": [row], "files": []}))
    save_file({"images": torch.zeros(3, 3, 8, 8, dtype=torch.uint8)}, folder / "images.safetensors")
    return folder


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("evaluate.json", ["model.onnx", "50", "71.25", "57.5 to 81.9", "90.50", "100.00", "92.9 to 100.0", "0.0123"]),
        ("bench.json", ["model.onnx", "8", "4.25", "5.50", "1882.4", "1.00"]),
        ("latency.json", ["8", "2 to 7"]),
        ("images.safetensors", ["3 of 3 x 8 x 8, without labels"]),
        ("profile.json", ["blocks.2.mlp.fc2", "random"]),
        ("plan.json", ["blocks.2.mlp.fc2", "average bits"]),
        ("", ["images.safetensors", "3 images", "evaluate.json", "accuracy of model.onnx", "bench.json", "latency.json", "batch"]),
    ],
)
def test_show_fits_and_is_plain_in_a_pipe(run: Path, monkeypatch: pytest.MonkeyPatch, width: int, name: str, words: list[str]):
    monkeypatch.setenv("COLUMNS", str(width))
    done = vitq("show", str(run / name).rstrip("/"))
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= width and "\x1b" not in done.out
    assert all(word in done.out for word in words), done.out
    assert done.err.startswith("next: vitq ")
    document = vitq("show", run / name, "--json")
    assert document.document["kind"] and document.err == ""


def test_a_damaged_result_is_refused(run: Path):
    for name, command in (("evaluate.json", "vitq evaluate"), ("bench.json", "vitq bench")):
        (run / name).write_text('{"results": [{"name": 3}], "x": 1}')
        for place in (run / name, run):
            refused = vitq("show", place)
            assert refused.code == 3 and f"{name} is damaged" in refused.err and command in refused.err
        (run / name).unlink()


def test_a_wide_terminal_shows_sizes_and_errors(monkeypatch: pytest.MonkeyPatch):
    rows = [row | {"kl": 0.5, "sqnr": 20.0} for row in layer_rows(LAYERS)]
    titles = {}
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        titles[width] = [str(column.header) for column in layer_table(rows).columns]
    assert set(titles[120]) - set(titles[80]) == {"weights", "MACs", "reads"} and {"KL", "SQNR dB"} <= set(titles[80])


def cells(said: str, title: str) -> dict[str, dict[str, str]]:
    """A map's cells, by block and type."""
    lines = said.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith(title))
    columns = lines[first].removeprefix(title).split()
    rows = {line.split()[0]: line.split()[1:] for line in lines[first + 1 :] if line.startswith("blocks.")}
    return {block: dict(zip(columns, values, strict=True)) for block, values in rows.items()}


def test_small_costs_are_in_figures_in_the_table_of_layers_too():
    rows = [row | {"kl": kl, "sqnr": 20.0} for row, kl in zip(layer_rows(LAYERS), (0.0123456, 0.00000123, 0.0), strict=False)]
    (kl,) = (column for column in layer_table(rows).columns if column.header == "KL")
    assert [cell for cell in kl.cells if cell][: len(rows)] == ["0.0123", "1.2e-06", "0.0000"][: len(rows)]


def test_allocate_ends_with_a_map_of_the_bits(run: Path, found: Profile):
    for option, chosen in (("--budget", allocate(found, ["4.0"])), ("--uniform", allocate(found, uniform="4"))):
        done = vitq("allocate", run / "profile.json", option, "4.0" if option == "--budget" else "4", "--force")
        assert done.code == 0 and "\x1b" not in done.out
        laid = cells(done.out, "bits")
        bits = chosen.plan.bits
        for layer in (layer for layer in LAYERS if layer.block.startswith("blocks.")):
            assert laid[layer.block][layer.type] == str(bits[layer.name].activation_bits)
    apart = vitq("allocate", run / "profile.json", "--uniform", "3/5", "--force").out
    assert cells(apart, "bits")["blocks.1"]["fc1"] == "3/5"
    assert "head 8" in apart


def test_nothing_is_drawn_for_machines_and_the_quiet(run: Path, found: Profile):
    assert "blocks.1" not in vitq("allocate", run / "profile.json", "--uniform", "4", "--force", "-q").out
    assert "objective" in vitq("allocate", run / "profile.json", "--uniform", "4", "--force", "--json").document


def test_a_map_of_costs_shows_each_layers_part(found: Profile, capsys: pytest.CaptureFixture[str]):
    from rich.console import Console

    from vitq.cli.bit_map import cost_map

    Console().print(*cost_map(found, "random"))
    laid = cells(capsys.readouterr().out, "% of the cost at 4 bits")
    costs = {name: row[WIDTHS.index(4)] for name, row in found.costs["random"].tied.items()}
    for layer in (layer for layer in LAYERS if layer.block.startswith("blocks.")):
        percent = 100 * costs[layer.name] / sum(costs.values())
        assert laid[layer.block][layer.type] == ("." if percent < 0.5 else f"{percent:.0f}")


def test_files_that_need_no_model_are_shown_without_torch(run: Path):
    """Loading it takes seconds. One process shows them all."""
    names = ["evaluate.json", "bench.json", "latency.json", "images.safetensors", "profile.json", "plan.json", "gone.onnx"]
    code = f"""
import sys
from vitq.cli.app import main
for name in {names}:
    try:
        main(["show", name])
    except SystemExit as ended:
        print(name, ended.code, "torch" in sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=run, env=environment(), capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if line.endswith(("True", "False"))]
    assert said == [f"{name} 0 False" for name in names[:-1]] + ["gone.onnx 3 False"], done.stderr


def test_a_result_is_stale_where_the_file_beside_it_is_another(run: Path):
    """By the sha256 of what was measured, whatever the files' times; of results without one, by their times."""
    file, bench = run / "model.onnx", json.loads((run / "bench.json").read_text())

    def results(digest: str | None) -> None:
        known = {} if digest is None else {"digest": digest}
        (run / "evaluate.json").write_text(json.dumps({"model.onnx": {"num_images": 50} | known, "gone.onnx": {"num_images": 7} | known}))
        loaded = {"name": "run/model.onnx", "file_bytes": 1, "load_ms": 1.0} | known
        (run / "bench.json").write_text(json.dumps(bench | {"files": [loaded, loaded | {"name": "float32"}]}))

    def stale() -> dict[str, str | None]:
        return {name: what for name, _, what in _results(run) if name in ("evaluate.json", "bench.json")}

    results(hashlib.sha256(b"one").hexdigest())
    assert set(stale().values()) == {None}  # nothing beside them
    file.write_bytes(b"one")
    os.utime(file, (2e9, 2e9))
    assert set(stale().values()) == {None}
    file.write_bytes(b"another")
    os.utime(file, (1e9, 1e9))
    again = {"evaluate.json": f"`vitq evaluate {file} --images PATH`", "bench.json": f"`vitq bench {file}`"}
    assert stale() == {name: f"measured on another model.onnx than the one beside it; run {how} again" for name, how in again.items()}
    results(None)
    assert set(stale().values()) == {None}
    os.utime(file, (2e9, 2e9))
    assert stale() == {name: f"written before model.onnx, and may be of an earlier one; run {how} again" for name, how in again.items()}
