"""What a run folder holds, and which of its files were made from another file than the one that lies beside them."""

import json
import shlex
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitq.cli.chain import bought_with, file_digest, from_another_profile, of_another_plan
from vitq.cli.saved_results import read_benchmark, read_evaluations
from vitq.commands import BENCH, CALIBRATED, CHECKPOINT, EVALUATION, IMAGES, LATENCY, ONNX, PLAN, PROFILE, REPORT, in_run
from vitq.units import counted, in_units

if TYPE_CHECKING:
    from rich.table import Table

    from vitq.artifacts import BitPlan, Profile, Staircase


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """The artifacts that there are, in the order of the chain: `file`, `bytes`, `holds` in words, and `stale`, what is wrong, or None.

    Raises:
        InputError: one of them is damaged.
    """
    from vitq.artifacts import load_plan, load_profile

    profile = load_profile(folder / PROFILE) if (folder / PROFILE).is_file() else None
    plan = load_plan(folder / PLAN) if (folder / PLAN).is_file() else None
    found: list[tuple[str, str, str | None]] = []
    if (folder / IMAGES).is_file():
        from vitq.artifacts.images import describe_images

        images = describe_images(folder / IMAGES)
        found.append((IMAGES, counted(images["num_images"], "image") if images else "images that cannot be read", None))
    if profile:
        holds = f"{profile.model.architecture}, {counted(len(profile.layers), 'layer')}, costs by {', '.join(profile.costs)}"
        found.append((PROFILE, holds, None))
    if plan is not None:
        another = profile and from_another_profile(plan.made_from, profile)
        found.append((PLAN, _bits(plan), _another("made from", PROFILE, folder, f"vitq allocate {bought_with(plan)}") if another else None))
    calibrated = None
    if (folder / CHECKPOINT).is_file():
        from vitq import checkpoint

        calibrated, made_from = checkpoint.read_plan(folder / CHECKPOINT)
        trained = ", fine-tuned" if "finetuning" in made_from else ""
        found.append((CHECKPOINT, _bits(calibrated) + trained, _stale_checkpoint(calibrated, made_from, plan, profile, folder)))
        if (folder / CALIBRATED).is_file():
            found.append((CALIBRATED, "the model before it was fine-tuned", None))
        if (folder / ONNX).is_file():
            found.append((ONNX, "exported model", _stale_onnx(folder / ONNX, calibrated, made_from)))
    elif (folder / ONNX).is_file():
        found.append((ONNX, "exported model", None))
    found += _results(folder)
    return [{"file": name, "bytes": (folder / name).stat().st_size, "holds": holds, "stale": stale} for name, holds, stale in found]


def _results(folder: Path) -> Iterator[tuple[str, str, str | None]]:
    """What was measured, drawn and written for people."""
    from vitq.latency import load_latency_table

    if staircase := find_staircase(folder):
        yield staircase[0], f"{counted(len(staircase[1].plans), 'plan')}, by {staircase[1].metric}", None
    if (folder / EVALUATION).is_file():
        evaluated = read_evaluations(folder / EVALUATION)
        measured = [(name, {entry.digest}) for name, entry in evaluated.items()]
        yield EVALUATION, f"accuracy of {', '.join(evaluated)}", _stale_result(folder / EVALUATION, measured, "evaluate", " --images PATH")
    if (folder / BENCH).is_file():
        timed = read_benchmark(folder / BENCH)
        digests = {file.digest for file in timed.files if Path(file.name).name == ONNX}
        holds = f"latency of {', '.join(dict.fromkeys(row.name for row in timed.results))}"
        yield BENCH, holds, _stale_result(folder / BENCH, [(ONNX, digests)], "bench")
    if (folder / LATENCY).is_file():
        table = load_latency_table(folder / LATENCY)
        layers = sum(len(timing.layers) for timing in table.timings) // 2
        yield LATENCY, f"latencies of {counted(layers, 'layer')}, batch {table.batch}", None
    if (folder / REPORT).is_file():
        yield REPORT, "report", None


def _stale_result(result: Path, measured: Iterable[tuple[str, Set[str | None]]], command: str, options: str = "") -> str | None:
    """What is wrong with measurements of files, each with its digests then, where one that lies beside them is another now.

    Of results that name no digest, as earlier versions wrote them, the times of the files have to do.
    """
    beside = {file.name: file for file in result.parent.iterdir() if file.is_file()}
    for name, digests in measured:
        if (file := beside.get(name)) is None or not digests:
            continue
        again = f"run `vitq {command} {shlex.quote(str(file))}{options}` again"
        if None not in digests and file_digest(file) not in digests:
            return f"measured on another {name} than the one beside it; {again}"
        if None in digests and result.stat().st_mtime < file.stat().st_mtime:
            return f"written before {name}, and may be of an earlier one; {again}"
    return None


def find_staircase(folder: Path) -> "tuple[str, Staircase] | None":
    """The first staircase by name, whatever it is called."""
    from vitq.artifacts import Staircase, load_staircase

    for path in sorted(folder.glob("*.json")):
        if path.name in (PROFILE, PLAN, EVALUATION, BENCH, LATENCY):
            continue
        try:
            kind = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # no artifact of ours
        if isinstance(kind, dict) and kind.get("format") == Staircase.model_fields["format"].default:
            return path.name, load_staircase(path)
    return None


def folder_table(rows: list[dict[str, Any]]) -> "Table":
    """A line a file."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in ("file", "size", "holds"):
        table.add_column(title, justify="right" if title == "size" else "left")
    for row in rows:
        table.add_row(row["file"], in_units(row["bytes"], "B"), row["holds"])
    return table


def _bits(plan: "BitPlan") -> str:
    widths = {bits for entry in plan.layers for bits in (entry.weight_bits, entry.activation_bits) if bits is not None}
    least, most = min(widths, default="no"), max(widths, default="no")
    return f"{plan.model.architecture}, {counted(len(plan.layers), 'layer')} at {least} to {most} bits"


def _stale_checkpoint(
    calibrated: "BitPlan", made_from: dict[str, Any], plan: "BitPlan | None", profile: "Profile | None", folder: Path
) -> str | None:
    if plan and of_another_plan(calibrated, made_from, plan):
        return _another("calibrated to", PLAN, folder, "vitq calibrate")
    if profile and from_another_profile(made_from, profile):
        return _another("made from", PROFILE, folder, f"vitq allocate {bought_with(calibrated)}", "vitq calibrate")
    return None


def _stale_onnx(path: Path, calibrated: "BitPlan", made_from: dict[str, Any]) -> str | None:
    from vitq.runtime import onnx_metadata

    metadata = onnx_metadata(path)
    bits = {entry.name: [entry.weight_bits, entry.activation_bits] for entry in calibrated.layers}
    same = metadata.get("vitq.plan") == bits and metadata.get("vitq.made_from") == made_from
    return None if same else _another("exported from", CHECKPOINT, path.parent, "vitq export")


def _another(how: str, name: str, folder: Path, *commands: str) -> str:
    again = " and ".join(f"`{in_run(command, folder)}`" for command in commands)
    return f"{how} another {name} than the one beside it; run {again} again"
