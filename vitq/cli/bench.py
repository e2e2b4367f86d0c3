"""`vitq bench`: latency, load time and memory of ONNX files on this machine."""

import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitq.cli import completion, options
from vitq.cli.chain import Memory, Reading, file_digest, next_with_latencies, output_path, refuse_missing_sources, run_folder
from vitq.cli.layer_table import plain_table
from vitq.cli.terminal import Terminal, json_text
from vitq.commands import BENCH, LATENCY, ONNX, PROFILE, REPORT, in_folder
from vitq.errors import GateError, InputError, UsageError
from vitq.units import counted, in_units

if TYPE_CHECKING:
    from rich.table import Table

    from vitq.artifacts.results import Timed
    from vitq.bench import Row
    from vitq.latency import LatencyTable

CALIBRATION_IMAGES = 8
"""Images that onnxruntime's quantize_static looks at; its speed does not depend on them."""


def bench(
    files: Annotated[list[Path] | None, typer.Argument(metavar="[ONNX]...", help="(default: model.onnx in the run folder)")] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, max=options.MOST_IMAGES, help="Images a run; repeatable. (default: 1)")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, max=options.MOST_WORKERS, help="Threads of each run. (default: one a core)")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Timed runs of each file. (default: some 10 s of them, 20 to 200)")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also float32, and what onnxruntime's quantize_dynamic and quantize_static make of it.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option("--reference", autocompletion=completion.models, help="The float MODEL of --baselines. (default: the first file's)"),
    ] = None,
    images: options.RememberedImages = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="In place of files: every layer of the run folder's profile, into latency.json.")
    ] = False,
    max_ms: Annotated[float | None, typer.Option("--max-ms", min=0, help="The files' medians; above it: exit 6.")] = None,
    seed: options.UnusedSeed = None,
    device: options.UnusedDevice = "cpu",
    run_dir: options.RunDir = None,
    output: options.Output = None,
    force: options.Force = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure latency, load time and memory of ONNX files, or of a model's layers."""
    terminal = Terminal(quiet, verbose, as_json)
    refuse_missing_sources(reference, images)
    if output is not None:
        output_path(output, Path(), "", force)
    batches, threads = list(dict.fromkeys(batch or [1])), threads or usable_cores()
    folder = run_folder(run_dir, files[0] if files else None)
    if layers:
        if len(files or ()) > 1 or len(batches) > 1 or baselines or max_ms is not None:
            raise UsageError("--layers measures one model at one --batch, no files: leave --baselines, --max-ms and further files out")
        profile = files[0] if files and (files[0].suffix == ".json" or files[0].is_dir()) else folder / PROFILE
        _bench_layers(profile, batches[0], threads, rounds, output or folder / LATENCY, terminal)
        return
    files = files or [folder / ONNX]
    named = {str(file): file for file in files}
    from vitq.bench import compare, footprint
    from vitq.bench.latency import input_shape
    from vitq.runtime import open_session
    from vitq.whole import write_whole

    with ExitStack() as stack:
        measured = dict(named)
        for file in files:  # what cannot be run is said before the baselines are made
            if file.is_file() and file.suffix != ".onnx":
                raise InputError(f"{file} is no ONNX file; give one that `vitq export` wrote")
            input_shape(open_session(file, threads), str(file), batches[0])
        if baselines:
            made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitq-")))
            terminal.note("baselines: float32, quantize_dynamic, quantize_static")
            measured |= _baselines(files[0], folder, reference, images, made)
        with terminal.working(
            "latency", f"{counted(len(measured), 'file')} in turn, {counted(threads, 'thread')}, batch {', '.join(map(str, batches))}"
        ) as progress:
            rows = compare(measured, batches, threads, rounds, progress)
        shapes = {name: input_shape(open_session(file, threads), name, batches[0]) for name, file in measured.items()}
        footprints = {}
        with terminal.working("load time and memory", "each file in a process of its own") as progress:
            for done, (name, file) in enumerate(measured.items()):
                progress(done, len(measured), name)
                footprints[name] = footprint(file, shapes[name], threads)
        known = {name: {"digest": file_digest(file), "file_bytes": file.stat().st_size} for name, file in measured.items()}
    loaded = [{"name": name, "batch": batches[0], **known[name], **asdict(found)} for name, found in footprints.items()]
    document = {"results": [asdict(row) for row in rows], "files": loaded}
    path = output or (folder / BENCH if (folder / PROFILE).is_file() else None)
    if path is not None:
        write_whole(path, lambda temporary: temporary.write_text(json_text(document), encoding="utf-8"))
    terminal.result(document, *bench_tables(rows, loaded), *([f"wrote {path}"] if path else []))
    _check(rows, named, max_ms)
    in_run_folder = path == folder / BENCH
    terminal.next(
        in_folder("vitq report", folder / REPORT, REPORT)
        if in_run_folder
        else shlex.join(["vitq", "evaluate", str(files[0]), "--images", "PATH"])
    )


def _bench_layers(profile: Path, batch: int, threads: int, rounds: int | None, path: Path, terminal: Terminal) -> None:
    """Writes the table that `vitq allocate --budget latency=4.0ms` reads."""
    from vitq.artifacts import load_profile, save

    found = load_profile(profile)
    from vitq.bench.layers import latency_table

    what = f"of {found.model.architecture}, alone and together: {counted(threads, 'thread')}, batch {batch}"
    with terminal.working("layers", what) as progress:
        table = latency_table(found.model, batch, threads, rounds, progress)
    table.check(found.layers, found.model.graph_digest)
    save(table, path, force=True)
    whole = table.made_from["whole_ms"]
    sums = [f"{whole['8']:.4g} ms at 8 bits, of which layers {whole['8'] - table.rest_ms:.4g} ms"]
    sums.append(f"{whole['below']:.4g} ms with activations below 8 bits")
    sums.append(
        f"{whole['mixed']['measured']:.4g} ms with those of every other block below, predicted {whole['mixed']['predicted']:.4g} ms"
    )
    terminal.result(table.model_dump(mode="json"), timing_table(table), *sums, f"wrote {path}")
    terminal.next(next_with_latencies(found, profile, table, path))


def timing_table(table: "LatencyTable") -> "Table":
    """A line a kind of layer and form: what one such layer takes."""
    rows = [
        (
            timing.layers[0] + (f" and {len(timing.layers) - 1} like it" if len(timing.layers) > 1 else ""),
            "8" if 8 in timing.activation_bits else "2 to 7",
            f"{timing.ms:.4f}",
        )
        for timing in table.timings
    ]
    return plain_table(("layer", "activation bits", "ms"), rows)


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _baselines(file: Path, folder: Path, reference: str | None, images: str | None, into: Path) -> dict[str, Path]:
    """The baselines of the model that a file was made from, or of the one that is given."""
    from vitq.bench import write_baselines
    from vitq.runtime import onnx_metadata

    made_from = onnx_metadata(file).get("vitq.made_from")
    made_from = made_from if isinstance(made_from, dict) else {}
    memory = Memory(made_from | made_from.get("calibration", {}), folder / file.name)
    model = memory.model(reference, "--reference")
    opened, _ = memory.images(Reading(images, None, None, CALIBRATION_IMAGES, 0), model.data_config, model.label_names)
    return write_baselines(model, next(iter(opened))[0], into)


def bench_tables(rows: "Sequence[Row | Timed]", loaded: Sequence[Mapping[str, Any]]) -> "list[Table]":
    """What was timed, speedups over float32 where it was, else over the first file; then what was loaded."""
    memories = [None if found["peak_memory_bytes"] is None else in_units(found["peak_memory_bytes"], "B") for found in loaded]
    base = "float32" if any(row.name == "float32" for row in rows) else rows[0].name if rows else ""
    medians = {row.batch: row.median_ms for row in rows if row.name == base}
    over = "speedup\nvs float32" if base == "float32" else "speedup\nvs first" if len({row.name for row in rows}) > 1 else "speedup"

    def speedup(row: "Row | Timed") -> str:
        return f"{medians[row.batch] / row.median_ms:.2f}" if row.batch in medians else "-"

    timed = [
        (row.name, str(row.batch), f"{row.median_ms:.2f}", f"{row.p90_ms:.2f}", f"{row.images_per_second:.1f}", speedup(row))
        for row in rows
    ]
    files = [
        (found["name"], in_units(found["file_bytes"], "B"), f"{found['load_ms']:.0f}", memory or "-")
        for found, memory in zip(loaded, memories, strict=True)
    ]
    tables = [plain_table(("latency", "batch", "median ms", "p90 ms", "images/s", over), timed)]
    return tables + ([plain_table(("loading", "file", "ms", "peak memory"), files)] if files else [])


def _check(rows: Sequence["Row"], gated: Mapping[str, Any], max_ms: float | None) -> None:
    """Raises GateError where a file that was given takes longer than allowed; baselines may."""
    if max_ms is None:
        return
    missed = [
        f"{row.name} takes {row.median_ms:.6g} ms at batch {row.batch}" for row in rows if row.name in gated and not row.median_ms <= max_ms
    ]
    if missed:
        raise GateError(f"{'; '.join(missed)}, above --max-ms {max_ms:g}; give more --threads or a smaller model, or raise the gate")
