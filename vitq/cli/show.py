"""`vitq show`: the layers of a model or of any artifact, with all that is known of them."""

import json
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitq.cli import completion, options
from vitq.cli.bench import timing_table
from vitq.cli.chain import is_run_folder, next_with_latencies, output_path, refuse_missing_artifact
from vitq.cli.layer_table import Row, cost_table, layer_rows, layer_table
from vitq.cli.run_folder import folder_table, read_folder
from vitq.cli.saved_results import saved_result
from vitq.cli.staircase_table import staircase_table
from vitq.cli.terminal import Terminal, json_text
from vitq.commands import CHECKPOINT, LATENCY, PLAN, PROFILE, REPORT, STAIRCASE, in_folder
from vitq.errors import InputError
from vitq.units import counted, in_units

if TYPE_CHECKING:
    from rich.table import Table

    from vitq.artifacts import ModelSpec, Profile
    from vitq.cli.sources import LoadingOptions
    from vitq.latency import LatencyTable


def show(
    artifact: Annotated[
        str,
        typer.Argument(
            autocompletion=completion.models, help="A MODEL, a file that vitq wrote (.json, .safetensors, .onnx), or a run folder."
        ),
    ],
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    img_size: options.ImgSize = None,
    model_kwargs: options.ModelKwargs = None,
    seed: options.UnusedSeed = None,
    device: options.UnusedDevice = "cpu",
    run_dir: Annotated[Path | None, typer.Option("--run-dir", hidden=True)] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Also write the JSON document to this file.")] = None,
    force: options.Force = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Show a model's layers, or what a file holds."""
    terminal = Terminal(quiet, verbose, as_json)
    from vitq.whole import write_whole

    refuse_missing_artifact(artifact, arch)
    if output is not None:
        output_path(output, Path(), "", force)
    found = _read(artifact, options.loading(arch, num_classes, img_size, model_kwargs))
    document = found.head | ({"layers": found.rows} if found.tables is None else {})
    if output is not None:
        write_whole(output, lambda temporary: temporary.write_text(json_text(document), encoding="utf-8"))
    if found.tables is not None:
        terminal.result(document, *found.tables)
        terminal.next(_next(artifact, found.head))
        return
    tables = [layer_table(found.rows)]
    tables += [cost_table(found.profile, metric) for metric in found.profile.costs] if found.profile else []
    terminal.result(document, *_lines(found), *tables)
    terminal.next(_next(artifact, found.head))


def _next(artifact: str, head: dict[str, Any]) -> str:
    """What is done with such a thing."""
    folder = Path(artifact).parent
    if head["kind"] == "latency table":
        return _next_of_latencies(Path(artifact))
    commands = {
        "model": f"vitq profile {shlex.quote(artifact)} --images PATH",
        "images": f"vitq profile MODEL --images {shlex.quote(artifact)}",
        "profile": in_folder("vitq allocate --budget 4.0", Path(artifact), PROFILE),
        "staircase": in_folder("vitq allocate --budget 4.0", folder / PROFILE, PROFILE),
        "plan": in_folder("vitq calibrate", Path(artifact), PLAN),
        "calibrated model": in_folder("vitq export", Path(artifact), CHECKPOINT),
        "exported model": f"vitq evaluate {shlex.quote(artifact)} --images PATH",
    }
    return commands.get(
        head["kind"], in_folder("vitq report", (Path(artifact) if head["kind"] == "run folder" else folder) / REPORT, REPORT)
    )


def _next_of_latencies(path: Path) -> str:
    from vitq.artifacts import load_profile
    from vitq.latency import load_latency_table

    beside, table = path.parent / PROFILE, load_latency_table(path)
    profile = load_profile(beside) if beside.is_file() else None
    if profile is None or profile.model.graph_digest != table.graph_digest:
        return in_folder("vitq allocate --budget 4.0", beside, PROFILE)
    return next_with_latencies(profile, beside, table, path)


@dataclass(frozen=True)
class Shown:
    """What is shown: facts about the whole, a row a layer, and the profile whose costs are shown too.

    What has no layers of its own, a staircase or a run folder, has `tables` and lines in their place.
    """

    head: dict[str, Any]
    rows: list[Row]
    profile: "Profile | None" = None
    tables: "list[Table | str] | None" = None


def _read(artifact: str, loading: "LoadingOptions") -> Shown:
    path = Path(artifact)
    if path.suffix == ".json":
        return _read_json(path)
    if is_run_folder(path):
        rows = read_folder(path)
        stale = [f"{row['file']} was {row['stale']}" for row in rows if row["stale"]]
        return Shown({"kind": "run folder", "files": rows}, [], tables=[folder_table(rows), *map(_filled, stale)])
    if path.suffix == ".safetensors" and (images := _images(path)) is not None:
        return images
    if path.suffix == ".onnx":
        return _read_onnx(path)
    from vitq import checkpoint

    if path.is_file() and checkpoint.is_checkpoint(path):
        found = checkpoint.load(path)
        rows = [row | found.errors.get(row["name"], {}) for row in layer_rows(found.graph.layers, found.plan.bits)]
        return Shown(_head("calibrated model", found.plan.model, found.made_from), rows)
    from vitq.models import load
    from vitq.rewrites import prepare

    loaded = load(artifact, **loading.model_dump())
    graph, spec = prepare(loaded)
    more = {"unfused_attention": graph.unfused(), "resampled": list(loaded.resampled)}
    return Shown(_head("model", spec, {}) | more, layer_rows(graph.layers))


def _read_json(path: Path) -> Shown:
    from vitq.artifacts import BitPlan, Profile, Staircase, load_plan, load_profile, load_staircase
    from vitq.latency import LatencyTable, load_latency_table

    try:
        kind = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        kind = None  # what loads it says what is wrong
    if isinstance(kind, dict) and kind.get("format") == BitPlan.model_fields["format"].default:
        plan = load_plan(path)
        head = _head("plan", plan.model, plan.made_from) | {"fixed": list(plan.fixed)}
        profile = _profile_beside(path, {entry.name for entry in plan.layers})
        if profile is None:
            return Shown(head, [entry.model_dump(mode="json") for entry in plan.layers])
        from vitq.allocation.summary import summarize_plan

        return Shown(head | {"summary": summarize_plan(plan, profile)}, layer_rows(profile.layers, plan.bits))
    if isinstance(kind, dict) and kind.get("format") == Staircase.model_fields["format"].default:
        staircase = load_staircase(path)
        what = f"staircase: metric {staircase.metric}, objective {staircase.objective}, {counted(len(staircase.plans), 'plan')}"
        return Shown({"kind": "staircase"} | staircase.model_dump(mode="json"), [], tables=[what, staircase_table(staircase)])
    if (result := saved_result(path)) is not None:
        what, content, tables = result
        return Shown({"kind": what} | content, [], tables=[*tables])
    if isinstance(kind, dict) and kind.get("format") == LatencyTable.model_fields["format"].default:
        table = load_latency_table(path)
        return Shown({"kind": "latency table"} | table.model_dump(mode="json"), [], tables=[*_latency_lines(table), timing_table(table)])
    known = {PLAN: load_plan, STAIRCASE: load_staircase, LATENCY: load_latency_table}
    if path.name in known:
        known[path.name](path)
    if path.name != PROFILE and (not isinstance(kind, dict) or kind.get("format") != Profile.model_fields["format"].default):
        what = "cannot be read as JSON" if kind is None else "holds nothing that vitq writes"
        raise InputError(f"{path} {what}; give a profile, a plan, a staircase, a latency table, evaluate.json or bench.json")
    profile = load_profile(path)
    head = _head("profile", profile.model, profile.made_from) | {"costs": {n: t.model_dump(mode="json") for n, t in profile.costs.items()}}
    return Shown(head, layer_rows(profile.layers), profile)


def _latency_lines(table: "LatencyTable") -> list[str]:
    batch = "one image at a time" if table.batch == 1 else f"batches of {table.batch}"
    lines = [f"latency table: {table.architecture}, {batch}, {counted(table.threads, 'thread')}; {table.rest_ms:.4g} ms beside the layers"]
    if processor := table.made_from.get("processor"):
        lines.append(f"measured on {processor}")
    return [_filled(line) for line in lines]


def _images(path: Path) -> Shown | None:
    """What an images.safetensors holds; None for any other file."""
    from vitq.artifacts.images import describe_images

    found = describe_images(path)
    if found is None:
        return None
    size = " x ".join(map(str, found["shape"]))
    lines = [f"images: {found['num_images']} of {size}, {'with' if found['labelled'] else 'without'} labels"]
    if how := found["made_from"].get("synthesis"):
        lines.append(
            f"made from the model alone: {how.get('iterations')} steps in batches of {how.get('batch_size')}, seed {how.get('seed')}"
        )
    if source := found["made_from"].get("model"):
        lines.append(f"made from model: {source.get('source')}")
    return Shown({"kind": "images"} | found, [], tables=[*map(_filled, lines)])


def _read_onnx(path: Path) -> Shown:
    from vitq.runtime import onnx_metadata

    metadata = {name.removeprefix("vitq."): value for name, value in onnx_metadata(path).items() if name.startswith("vitq.")}
    metadata.pop("digests", None)  # for evaluate --verify
    plan = metadata.pop("plan", None)
    if not isinstance(plan, dict) or not all(isinstance(pair, list) and len(pair) == 2 for pair in plan.values()):
        raise InputError(f"{path} holds no plan, so vitq did not write it; `vitq export` writes one that does")
    bits = {name: {"weight_bits": weight, "activation_bits": activation} for name, (weight, activation) in plan.items()}
    beside = _profile_beside(path, set(bits))
    layers = layer_rows(beside.layers) if beside else [{"name": name} for name in bits]
    rows = [row | bits[row["name"]] for row in layers]
    return Shown({"kind": "exported model", "file_bytes": path.stat().st_size} | metadata, rows)


def _profile_beside(path: Path, names: set[str]) -> "Profile | None":
    """The profile in the same folder, where it is of the same model."""
    from vitq.artifacts import load_profile

    beside = path.parent / PROFILE
    profile = load_profile(beside) if beside.is_file() else None
    return profile if profile and {layer.name for layer in profile.layers} == names else None


def _head(kind: str, spec: "ModelSpec", made_from: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "architecture": spec.architecture,
        "arguments": spec.arguments,
        "num_classes": spec.num_classes,
        "preprocessing": spec.data_config,
        "label_names": list(spec.label_names),
        "made_from": dict(made_from),
    }


def _lines(found: Shown) -> list[str]:
    from vitq.preparation import describe

    head, rows = found.head, found.rows
    size = f", {in_units(head['file_bytes'], 'B')}" if "file_bytes" in head else ""
    classes = head.get("num_classes")
    known = counted(classes, "class") if isinstance(classes, int) else f"{classes} classes"
    lines = [f"{head['kind']}: {head.get('architecture')}, {known}, {counted(len(rows), 'layer')}{size}"]
    if any("macs" in row for row in rows):
        parameters, macs = (in_units(sum(row.get(key, 0) for row in rows), "") for key in ("parameters", "macs"))
        lines.append(f"in layers: {parameters} weights, {macs} MACs an image")
    if sums := head.get("summary"):
        weights, activations = (sums[f"average_{kind}_bits"] for kind in ("weight", "activation"))
        averages = ", ".join(
            f"{bits:.3f} {kind}" for bits, kind in ((weights, "weights"), (activations, "activations")) if bits is not None
        )
        lines.append(f"average bits: {averages}; {in_units(sums['size_bytes'], 'B')}, {in_units(sums['bops'], '')} BitOps")
    if head.get("preprocessing"):
        lines.append(f"preprocessing: {describe(head['preprocessing'])}")
    made_from = origin if isinstance(origin := head.get("made_from"), dict) else {}
    sources = {name: made_from.get(name) for name in ("model", "images")}
    lines += [f"made from {name}: {source.get('source')}" for name, source in sources.items() if isinstance(source, dict)]
    if fused := head.get("unfused_attention") or made_from.get("unfused_attention"):
        lines.append(f"attention stays fused in {counted(len(fused), 'place')}, so its matmuls are no layers: {', '.join(fused)}")
    lines += [f"resampled to the size of the images: {table}" for table in head.get("resampled", [])[:1]]
    return [_filled(line) for line in lines]


def _filled(line: str) -> str:
    from rich.console import Console

    return textwrap.fill(line, Console().width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
