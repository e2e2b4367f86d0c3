"""`vitq report`: whatever a run folder holds, as one self-contained HTML file, report.html."""

import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitq.cli import completion, options
from vitq.cli.chain import Memory, Reading, file_digest, output_path, refuse_missing_sources, run_folder
from vitq.cli.run_folder import find_staircase, read_folder
from vitq.cli.saved_results import read_benchmark, read_evaluations
from vitq.cli.terminal import Terminal
from vitq.commands import BENCH, CHECKPOINT, DEFAULT_FOLDER, EVALUATION, IMAGES, LATENCY, ONNX, PLAN, PROFILE, REPORT, in_run
from vitq.errors import InputError, UsageError, VitqError
from vitq.units import counted, in_units

if TYPE_CHECKING:
    from vitq.report import Findings

WATCHED = 32
"""How many images the layers that hurt are watched on: enough to see how values are spread."""

_FILES = (IMAGES, PROFILE, PLAN, CHECKPOINT, ONNX, EVALUATION, BENCH, LATENCY)


def report(
    folder: Annotated[Path | None, typer.Argument(metavar="[RUN_DIR]", help="The run folder. (default: vitq-run)")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            autocompletion=completion.models,
            help="The float model, for pictures of the layers that hurt. (default: the one that was profiled)",
        ),
    ] = None,
    images: options.RememberedImages = None,
    seed: options.UnusedSeed = None,
    device: options.UnusedDevice = "cpu",
    run_dir: options.RunDir = None,
    output: options.Output = None,
    force: options.Force = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Write what a run folder holds as one HTML file, for people who did not make it."""
    terminal = Terminal(quiet, verbose, as_json)
    if folder is not None and run_dir is not None and folder != run_dir:
        raise UsageError(f"two run folders were given, {folder} and --run-dir {run_dir}; give one")
    folder = folder or run_folder(run_dir)
    folder = folder.parent if folder.is_file() else folder
    _refuse_empty(folder)
    refuse_missing_sources(model, images)
    if not (folder / CHECKPOINT).is_file() and (
        unused := [f"--{name}" for name, at in (("model", model), ("images", images)) if at is not None]
    ):
        remedy = f"run `{in_run('vitq calibrate', folder)}` first, or leave {' and '.join(unused)} out"
        raise UsageError(
            f"{' and '.join(unused)} would change nothing: layers are drawn from {folder / CHECKPOINT}, which is missing; {remedy}"
        )
    path = output_path(output, folder, REPORT, force)
    started = time.perf_counter()
    with terminal.waiting("report"):
        document = write_report(folder, path, model, images)
    lines = [f"{part['title']} is left out: {part['why'] or part['command']}" for part in document["left_out"]] if verbose else []
    seconds = time.perf_counter() - started
    lines.append(
        f"wrote {path} ({in_units(document['file_bytes'], 'B')}), {counted(len(document['sections']), 'part')}, in {seconds:.1f} s"
    )
    for remark in document["remarks"]:
        terminal.note(remark)
    terminal.result(document | {"seconds": seconds}, *lines)
    if document["left_out"]:
        first = document["left_out"][0]
        terminal.next(f"{first['command']}   # adds: {first['title']}")
    else:
        terminal.next(shlex.join(["vitq", "show", str(folder)]))


def _refuse_empty(folder: Path) -> None:
    """Raises InputError where there is nothing to report."""
    remedy = "`vitq profile MODEL --images PATH` begins a run folder, `vitq demo` makes a whole one; or give another RUN_DIR"
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; {remedy}")
    if not any((folder / name).is_file() for name in _FILES) and find_staircase(folder) is None:
        raise InputError(f"{folder} holds nothing that vitq wrote; {remedy}")


def write_report(folder: Path, path: Path, model: str | None = None, images: str | None = None) -> dict[str, Any]:
    """Reads a run folder and writes its report, over an older one; what it has and what it lacks.

    Raises:
        InputError: an artifact is damaged, or the file cannot be written.
    """
    from vitq.report import lacking, page, without_places
    from vitq.whole import write_whole

    found = _with_close_ups(_read(folder), folder, model, images)
    html, sections = page(without_places(found))
    # A path may hold bytes that are no text.
    write_whole(path, lambda temporary: temporary.write_text(html, encoding="utf-8", errors="backslashreplace"))
    left_out = [{"title": title, "command": part.command, "why": part.why} for title, part in lacking(found)]
    done = {"output": str(path), "file_bytes": path.stat().st_size, "sections": sections}
    # What was asked for by an option and is not there is said in the terminal too.
    asked = [found.close_up_lacks] if found.close_up_lacks and (model is not None or images is not None) else []
    return done | {"left_out": left_out, "remarks": [*found.remarks, *asked]}


def _read(folder: Path) -> "Findings":
    """Everything but the close-ups, which need the model."""
    from vitq import checkpoint
    from vitq.artifacts import load_plan, load_profile
    from vitq.artifacts.images import describe_images
    from vitq.latency import load_latency_table
    from vitq.report import File, Findings
    from vitq.runtime import onnx_metadata

    present = {name for name in _FILES if (folder / name).is_file()}
    profile = load_profile(folder / PROFILE) if PROFILE in present else None
    plan = load_plan(folder / PLAN) if PLAN in present else None
    calibrated, made_from = checkpoint.read_plan(folder / CHECKPOINT) if CHECKPOINT in present else (None, {})
    metadata = onnx_metadata(folder / ONNX) if ONNX in present else {}
    exported = {name.removeprefix("vitq."): value for name, value in metadata.items()}
    latencies = load_latency_table(folder / LATENCY) if LATENCY in present else None
    staircase = find_staircase(folder)
    remarks = [f"{row['file']} was {row['stale']}" for row in read_folder(folder) if row["stale"]]
    chosen = calibrated or plan
    if profile and chosen and {entry.name for entry in chosen.layers} != {layer.name for layer in profile.layers}:
        remarks.append(f"{PROFILE} has other layers than the plan, and was left aside")
        profile = None
    if profile and chosen:
        chosen.check(profile.layers)
    if profile and latencies and latencies.graph_digest != profile.model.graph_digest:
        remarks.append(f"{LATENCY} is of another model, and was left aside; run `{in_run('vitq bench --layers', folder)}` again")
        latencies = None
    synthetic = describe_images(folder / IMAGES) if IMAGES in present else None
    said = {
        IMAGES: synthetic["made_from"] if synthetic else {},
        PROFILE: profile.made_from if profile else {},
        PLAN: plan.made_from if plan else {},
        CHECKPOINT: made_from,
        ONNX: _mapping(exported.get("made_from")) | {name: exported[name] for name in ("versions", "verified_with") if name in exported},
        LATENCY: latencies.made_from if latencies else {},
    }
    return Findings(
        folder=str(folder),
        option="" if folder == DEFAULT_FOLDER else f" --run-dir {shlex.quote(str(folder))}",
        files=tuple(
            File(name, (folder / name).stat().st_size, file_digest(folder / name), said.get(name, {}))
            for name in (*_FILES, *([staircase[0]] if staircase else []))
            if name in present or name not in _FILES
        ),
        profile=profile,
        plan=plan,
        staircase=staircase[1] if staircase else None,
        calibrated=calibrated,
        errors=checkpoint.read_errors(folder / CHECKPOINT) if CHECKPOINT in present else {},
        exported=exported or None,
        evaluations=read_evaluations(folder / EVALUATION) if EVALUATION in present else {},
        benchmark=read_benchmark(folder / BENCH) if BENCH in present else None,
        latencies=latencies,
        remarks=tuple(remarks),
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _with_close_ups(found: "Findings", folder: Path, model: str | None, images: str | None) -> "Findings":
    """The findings with pictures of the layers that hurt, as far as the model and the images are at hand."""
    from vitq import checkpoint
    from vitq.report import close_ups, hurting
    from vitq.rewrites import prepare

    names, file = hurting(found), found.file(CHECKPOINT)
    if not names or file is None:
        return found
    memory = Memory({**file.made_from, **_mapping(file.made_from.get("calibration"))}, folder / CHECKPOINT)
    try:
        _refuse_fetching(file.made_from, folder, model)
        loaded = memory.model(model, "--model")
        graph, spec = prepare(loaded)
        calibrated = checkpoint.load(folder / CHECKPOINT)
        if spec.graph_digest != calibrated.plan.model.graph_digest:
            raise InputError(f"{loaded.source} has another graph than {CHECKPOINT}; give the model that it was made from with --model")
    except VitqError as error:
        return replace(found, close_up_lacks=str(error))
    lacks, batches = "", []
    try:
        opened, _ = memory.images(Reading(images, None, None, WATCHED, 0), loaded.data_config, loaded.label_names)
        batches = [batch for batch in (next(iter(opened), None),) if batch is not None]
    except VitqError as error:
        lacks = f"What these layers read is not shown: {error}."
    pictures = close_ups(graph, calibrated, names, batches or None)
    if loaded.digest != _mapping(file.made_from.get("model")).get("digest", loaded.digest):
        other = f"the layers that hurt are drawn with the weights of {model}, which are not those of the model that was calibrated"
        found = replace(found, remarks=(*found.remarks, other))
    return replace(found, close_ups=pictures, close_up_lacks=lacks, num_images=sum(len(batch) for batch, _ in batches))


def _refuse_fetching(made_from: Mapping[str, Any], folder: Path, model: str | None) -> None:
    """Raises InputError where the float model is a name that timm would fetch: a report fetches nothing unasked."""
    source = _mapping(made_from.get("model")).get("source")
    if model is None and source is not None and not any(place.exists() for place in (Path(str(source)), folder / str(source))):
        raise InputError(f"the float model {source} is not a file here; give it with --model")
