"""`vitq bench` on a finished run folder: what it prints and saves, its gate and its faults."""

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
from cli_session import vitq

from vitq.allocation import allocate
from vitq.artifacts import WIDTHS, Profile, load_plan, load_profile
from vitq.bench import Row
from vitq.cli.bench import bench_tables
from vitq.latency import LatencyTable, Timing

ROW = {"name", "batch", "threads", "median_ms", "p90_ms", "images_per_second", "speedup"}


def test_files_and_baselines_in_one_document(session: Path):
    shutil.copy(session / "vitq-run" / "model.onnx", session / "again.onnx")
    command = ("bench", "vitq-run/model.onnx", "again.onnx", "--baselines", "--batch", 1, "--batch", 3, "--threads", 1, "--rounds", 2)
    done = vitq(*command, "--json", folder=session)
    assert done.code == 0, done.err
    rows = done.document["results"]
    names = ["vitq-run/model.onnx", "again.onnx", "float32", "quantize_dynamic", "quantize_static"]
    assert [(row["name"], row["batch"], row["threads"]) for row in rows] == [(name, batch, 1) for batch in (1, 3) for name in names]
    assert all(set(row) == ROW for row in rows)
    assert [row["speedup"] for row in rows] == [
        pytest.approx(rows[5 * (at // 5)]["median_ms"] / row["median_ms"]) for at, row in enumerate(rows)
    ]
    files = {found["name"]: found for found in done.document["files"]}
    assert list(files) == names
    assert files["again.onnx"]["file_bytes"] == (session / "again.onnx").stat().st_size < files["float32"]["file_bytes"]
    digest = hashlib.sha256((session / "again.onnx").read_bytes()).hexdigest()
    assert files["again.onnx"]["digest"] == files["vitq-run/model.onnx"]["digest"] == digest != files["float32"]["digest"]
    assert all(found["load_ms"] > 0 and found["peak_memory_bytes"] != 0 for found in files.values())
    assert json.loads((session / "vitq-run" / "bench.json").read_text()) == done.document
    assert sorted(path.name for path in session.iterdir()) == ["again.onnx", "images", "model", "vitq-run"]


def test_speedups_are_over_float32_where_it_is_measured():
    rows = [
        Row(name, batch, 1, ms * batch, ms, 1.0, 2.0 / ms) for batch in (1, 3) for name, ms in (("a", 2.0), ("float32", 4.0), ("b", 1.0))
    ]

    def shown(rows: list[Row]) -> tuple[str, list[str]]:
        table = bench_tables(rows, [])[0]
        return str(table.columns[-1].header), [str(cell) for cell in table.columns[-1].cells]

    assert shown(rows) == ("speedup\nvs float32", ["2.00", "1.00", "4.00"] * 2)
    assert shown([row for row in rows if row.name != "float32"]) == ("speedup\nvs first", ["1.00", "2.00"] * 2)
    assert shown(rows[:1]) == ("speedup", ["1.00"])


def test_bare_it_takes_the_run_folders_file_and_replaces_its_own_result(session: Path):
    for rounds in (1, 2):
        done = vitq("bench", "--rounds", rounds, folder=session)
        assert done.code == 0, done.err
    assert [row["name"] for row in json.loads((session / "vitq-run" / "bench.json").read_text())["results"]] == ["vitq-run/model.onnx"]
    assert "median ms" in done.out and "peak memory" in done.out and "wrote vitq-run/bench.json" in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_away_from_a_run_folder_nothing_is_saved_unless_asked_for(session: Path):
    shutil.move(session / "vitq-run" / "model.onnx", session / "alone.onnx")
    assert vitq("bench", "alone.onnx", "--rounds", 1, folder=session).code == 0
    assert not list(session.rglob("bench.json"))
    assert vitq("bench", "alone.onnx", "--rounds", 1, "-o", "here.json", folder=session).code == 0
    assert json.loads((session / "here.json").read_text())["results"][0]["name"] == "alone.onnx"
    again = vitq("bench", "alone.onnx", "--rounds", 1, "-o", "here.json", folder=session)
    assert again.code == 2 and "here.json exists already; give --force" in again.err


@pytest.mark.parametrize(("limit", "code"), [(1e-6, 6), (1e9, 0)])
def test_the_gate_is_on_the_files_that_are_given(session: Path, limit: float, code: int):
    done = vitq("bench", "vitq-run/model.onnx", "--batch", 2, "--rounds", 1, "--max-ms", limit, "--json", folder=session)
    assert done.code == code
    assert len(done.document["results"]) == 1  # printed and saved first
    assert (session / "vitq-run" / "bench.json").exists()
    if code:
        assert "vitq-run/model.onnx takes " in done.err and "ms at batch 2, above --max-ms 1e-06; " in done.err


def made_up_table(profile: Profile, slower: float) -> LatencyTable:
    """Every layer takes 0.01 ms at 8 bits, and `slower` times as much below."""
    forms = [((8,), 0.01), ((2, 3, 4, 5, 6, 7), 0.01 * slower)]
    timings = [
        Timing(layers=(layer.name,), weight_bits=WIDTHS if layer.has_weight else None, activation_bits=bits, ms=ms)
        for layer in profile.layers
        for bits, ms in forms
    ]
    made_from = {"whole_ms": {"8": 1.0, "below": 2.0, "mixed": {"measured": 1.5, "predicted": 1.5}}}
    model = profile.model
    of = {"architecture": model.architecture, "graph_digest": model.graph_digest, "batch": 1, "threads": 1, "made_from": made_from}
    return LatencyTable(**of, rest_ms=0.1, timings=tuple(timings))


@pytest.mark.parametrize(("slower", "option"), [(2.0, ()), (2.0, ("-o", "other.json")), (1.0, ())])
def test_a_latency_that_is_proposed_binds(session: Path, slower: float, option: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    shutil.move(session / "vitq-run", session / "r 2")
    profile = load_profile(session / "r 2" / "profile.json")
    table = made_up_table(profile, slower)
    monkeypatch.setattr("vitq.bench.layers.latency_table", lambda *_: table)
    said = vitq("bench", "--layers", "--run-dir", "r 2", *option, folder=session)
    assert said.code == 0, said.err
    command = shlex.split(said.err.rpartition("next: ")[2])
    assert "--force" in command and ("other.json" in command) == bool(option)  # there is a plan
    done = vitq(*command[1:], folder=session)
    assert done.code == 0, done.err
    taken, free = load_plan(session / "r 2" / "plan.json").summary, allocate(profile, ["4.0"], latencies=table).report
    bound = [float(word.removeprefix("latency=").removesuffix("ms")) for word in command if word.startswith("latency=")]
    assert len(bound) == (slower > 1) and all(taken["latency_ms"] <= limit < free["latency_ms"] for limit in bound)
    shown = vitq("show", "r 2/latency.json", folder=session)
    assert option or shlex.split(shown.err.rpartition("next: ")[2]) == command


def test_faults(session: Path):
    shutil.copy(session / "vitq-run" / "model.onnx", session / "alone.onnx")
    shutil.rmtree(session / "model")
    (session / "damaged.onnx").write_bytes(b"no model")
    for arguments, code, message in (
        (("gone.onnx",), 3, "gone.onnx does not exist; `vitq export -o gone.onnx` writes it"),
        (("damaged.onnx",), 3, "damaged.onnx cannot be loaded by onnxruntime"),
        (("alone.onnx", "--baselines"), 3, "give it with --reference, or run `vitq profile MODEL --images PATH --force` again"),
        (("alone.onnx", "--baselines", "--reference", "gone"), 3, "'gone' is no file, folder or timm model"),
        (("alone.onnx", "--batch", 0), 2, "--batch"),
    ):
        done = vitq("bench", *arguments, "--rounds", 1, "--json", folder=session)
        assert (done.code, done.out) == (code, ""), done.err
        assert message in done.err and "Traceback" not in done.err
