"""`vitq export`: the calibrated model as a verified ONNX file, model.onnx."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from vitq.choices import OPSETS
from vitq.cli import completion, options
from vitq.cli.chain import (
    Memory,
    Reading,
    output_path,
    refuse_missing_sources,
    refuse_stale_checkpoint,
    run_folder,
)
from vitq.cli.dry_run import say_estimate, trial_size, tried
from vitq.cli.terminal import Terminal
from vitq.commands import CHECKPOINT, ONNX, in_folder
from vitq.errors import UsageError
from vitq.units import counted, in_units

if TYPE_CHECKING:
    from vitq.images import Images
    from vitq.onnx_file import ExportReport, Storage


def export(
    checkpoint: Annotated[Path | None, typer.Argument(help="A calibrated model. (default: model.safetensors in the run folder)")] = None,
    images: options.RememberedImages = None,
    num_images: options.NumImages = None,
    storage: Annotated[
        str,
        typer.Option(
            "--storage",
            autocompletion=completion.storages,
            callback=completion.known("storage", completion.storages),
            help="packed: every width at its true size; fast: int8; standard: plain int4 and int8, for other runtimes.",
        ),
    ] = "packed",
    attention_int8: Annotated[
        bool,
        typer.Option("--attention-int8", help="Keys and values as int8: faster in a session with the option that the file names."),
    ] = False,
    opset: Annotated[int, typer.Option("--opset", min=OPSETS[0], max=OPSETS[-1], help="Of ONNX.")] = 21,
    batch: Annotated[str, typer.Option("--batch", metavar="dynamic|N", help="How many images the file takes at once.")] = "dynamic",
    card: Annotated[bool, typer.Option("--card", help="Also README.md beside the file: a model card.")] = False,
    dry_run: options.DryRun = False,
    seed: options.Seed = None,
    batch_size: options.BatchSize = 32,
    workers: options.Workers = 0,
    device: options.Device = "cpu",
    run_dir: options.RunDir = None,
    output: options.Output = None,
    force: options.Force = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Write an ONNX file that onnxruntime runs with integer kernels, and verify it."""
    terminal = Terminal(quiet, verbose, as_json)
    from vitq.whole import refuse_existing, refuse_missing, write_whole

    folder = run_folder(run_dir, checkpoint)
    source = checkpoint or folder / CHECKPOINT
    refuse_missing(source, "vitq calibrate")
    refuse_missing_sources(None, images)
    path = output_path(output, folder, ONNX, force or dry_run)
    if path.suffix != ".onnx":
        raise UsageError(f"-o {path}: what is exported is ONNX; give a name that ends in .onnx")
    fixed = _fixed_batch(batch)
    card_path = path.with_name("README.md")
    if card:
        refuse_existing(card_path, force or dry_run)
    options.usable_device(device)
    from vitq.checkpoint import load
    from vitq.onnx_file import export as write
    from vitq.onnx_file import refuse_unwritten
    from vitq.onnx_file.card import model_card
    from vitq.runtime import INT8_ALLOWED

    started = time.perf_counter()
    with terminal.waiting("load the calibrated model"):
        calibrated = load(source, device)
    if checkpoint is None:
        refuse_stale_checkpoint(calibrated, source)
    refuse_unwritten(calibrated, storage, opset, fixed)
    spec = calibrated.plan.model
    memory = Memory(calibrated.made_from | calibrated.made_from.get("calibration", {}), source)
    reading = Reading(images, num_images, seed, batch_size, workers)
    opened, _ = memory.images(reading, spec.data_config, spec.label_names)
    terminal.preprocessing(spec.data_config, spec.data_config)
    terminal.detail(f"images {opened.source}, sha256 of the list {opened.digest}")

    def written(images: "Images", place: Path, progress: "Callable[[float, float, str], None] | None" = None) -> "ExportReport":
        forms = {"attention_int8": attention_int8, "opset": opset, "batch": fixed}
        return write(calibrated, place, (given for given, _ in images), cast("Storage", storage), force, progress=progress, **forms)

    if dry_run:
        few = min(trial_size(batch_size), opened.num_listed)
        sample, _ = memory.images(replace(reading, num_images=few), spec.data_config, spec.label_names)
        found = tried(terminal, lambda folder: written(sample, folder / ONNX), sample, opened.num_listed, started)
        say_estimate(terminal, "export", found, f"in {path.parent}")
        return
    with terminal.watching(opened, "export") as progress:
        report = written(opened, path, progress)
    if card:
        text = model_card(calibrated, report, path.name, INT8_ALLOWED if attention_int8 else {}, fixed)
        write_whole(card_path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    wrote = f"wrote {path} and {card_path}" if card else f"wrote {path}"
    terminal.result(asdict(report), *_lines(report, opened.num_images), wrote)
    if report.not_fused and storage == "standard":
        terminal.note("onnxruntime has no integer kernel for int4, and is slower there than in float32: for it, give --storage packed")
    if report.not_fused:
        terminal.note(f"not fused by onnxruntime: {', '.join(report.not_fused)}")
    if attention_int8:
        options_needed = ", ".join(f"{name}={value}" for name, value in INT8_ALLOWED.items())
        terminal.note(f"sessions that run it should set {options_needed} (`vitq.session_options` in its metadata)")
    terminal.next(f"{in_folder('vitq evaluate', path, '')} --images PATH")


def _fixed_batch(batch: str) -> int | None:
    if batch == "dynamic":
        return None
    if not (batch.isdecimal() and batch.isascii() and len(batch) < 8 and 0 < int(batch) <= options.MOST_IMAGES):
        raise UsageError(f"--batch {batch!r} is not known; give dynamic or a number of images, at most {options.MOST_IMAGES}")
    return int(batch)


def _lines(report: "ExportReport", num_images: int) -> list[str]:
    by_choice = f"; {counted(report.float_by_choice, 'convolution')} in float" if report.float_by_choice else ""
    return [
        f"file      {in_units(report.file_bytes, 'B')}, of which weights {in_units(report.weight_bytes, 'B')} "
        f"(planned {in_units(report.planned_weight_bytes, 'B')})",
        f"kernels   {report.integer_kernels} of {report.integer_candidates} candidates run as integer kernels{by_choice}",
        f"verified  on {counted(num_images, 'image')}: {report.code_mismatch:.2g} of the codes differ, "
        f"top-1 agrees on {report.top1_agreement:.2f} % with the fake-quantized model",
        f"took      {report.seconds:.1f} s",
    ]
