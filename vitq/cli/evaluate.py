"""`vitq evaluate`: accuracy of a float model, a calibrated one or an ONNX file, against labels and against the float model."""

import json
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitq.cli import completion, options
from vitq.cli.chain import Memory, file_digest, is_run_folder, output_path, refuse_missing_artifact, refuse_missing_sources
from vitq.cli.dry_run import say_estimate, trial_size, tried
from vitq.cli.opening import class_folders, open_for, say_foreign
from vitq.cli.terminal import Terminal, json_text
from vitq.commands import BENCH, EVALUATION, ONNX, PROFILE, in_run
from vitq.errors import GateError, InputError, UsageError
from vitq.intervals import COUNTED, wilson
from vitq.units import counted
from vitq.whole import locked

if TYPE_CHECKING:
    from torch import Tensor

    from vitq.accuracy import Evaluation
    from vitq.cli.sources import LoadingOptions
    from vitq.images import Images
    from vitq.models import LoadedModel

_UNITS = {"top1": "%", "top5": "%", "top1_change": "points", "agreement": "%", "kl": "nats an image", "cosine": "", "relative_error": ""}


def evaluate(
    artifact: Annotated[str, typer.Argument(autocompletion=completion.models, help="A MODEL, a calibrated .safetensors, or a .onnx.")],
    images: options.OptionalImages = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="First compare the .onnx with the digests it was exported with; needs no --images.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option("--reference", autocompletion=completion.models, help="The float MODEL. (default: the artifact's run folder's)"),
    ] = None,
    min_top1: Annotated[float | None, typer.Option("--min-top1", min=0, help="Percent; below it: exit 6.")] = None,
    min_agreement: Annotated[float | None, typer.Option("--min-agreement", min=0, help="Percent; below it: exit 6.")] = None,
    max_kl: Annotated[float | None, typer.Option("--max-kl", min=0, help="Nats an image; above it: exit 6.")] = None,
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    img_size: options.ImgSize = None,
    model_kwargs: options.ModelKwargs = None,
    num_images: Annotated[int | None, typer.Option("--num-images", min=1, help="Size of the seeded subset. (default: all)")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=options.MOST_SEED, help="Chooses the subset of the images.")] = 0,
    dry_run: options.DryRun = False,
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
    """Measure accuracy, and agreement with the float model."""
    terminal = Terminal(quiet, verbose, as_json)
    if artifact and is_run_folder(Path(artifact)):
        inside = Path(artifact, ONNX)
        how = "" if inside.is_file() else f", once `{in_run('vitq export', inside.parent)}` has written it"
        raise InputError(f"{artifact} is a run folder; give the file in it that is to be evaluated, such as {inside}{how}")
    refuse_missing_artifact(artifact, arch)
    if images is None and not verify:
        raise UsageError("evaluate needs images: give --images PATH, or --verify to check an ONNX file alone")
    refuse_missing_sources(reference, images)
    if output is not None:
        output_path(output, Path(), "", force)
    gates = {"min_top1": min_top1, "min_agreement": min_agreement, "max_kl": max_kl}
    gates = {name: limit for name, limit in gates.items() if limit is not None}
    if images is None and gates:
        raise UsageError("gates need images to measure on; give --images PATH")
    verified = _verified(artifact) if verify else {}
    said = f"{artifact} is the file that was exported: all {verified['parts']} parts have their digests" if verified else ""
    if images is None:
        if output is not None:
            _write(output, verified)
        terminal.result(verified, said)
        terminal.next(shlex.join(["vitq", "evaluate", artifact, "--images", "PATH"]))
        return
    loading = options.loading(arch, num_classes, img_size, model_kwargs)
    options.usable_device(device)
    from vitq.accuracy import evaluate as measure

    started = time.perf_counter()
    with terminal.waiting("load"):
        subject = _open(artifact, loading, device)
        float_model = _reference(subject, reference, loading, run_dir)
    terminal.resampled(subject.resampled)
    opened = open_for(
        subject.model_digest, images, subject.data_config, num_images, seed, batch_size, workers, subject.label_names, subject.num_classes
    )
    say_foreign(terminal, subject.model_digest, images)
    labelled = subject.num_classes > 0 and opened.labelled
    _refuse_unmeasurable(gates, subject.num_classes, labelled, float_model is not None)
    terminal.preprocessing(subject.data_config, _profiled(run_dir or subject.folder))
    if not labelled and subject.num_classes:
        wanted = class_folders(subject.num_classes, subject.label_names)
        terminal.note(
            f"{images} has no labels of the model's {subject.num_classes} classes, so there is no top-1 accuracy; for it, give {wanted}"
        )
    if float_model is None and (subject.folder is not None or not labelled):
        nothing = "" if labelled else ": nothing is measured"
        terminal.note(f"no float model is known to compare with{nothing}; give it with --reference MODEL")
    runnable = None if float_model is None else on_device(float_model.module, device)

    def measured(images: "Images") -> "Evaluation":
        batches = ((batch, labels if labelled else None) for batch, labels in images)
        return measure(subject.runnable, batches, runnable, subject.num_classes > 0)

    if dry_run:
        few = min(trial_size(batch_size), opened.num_listed)
        sample = open_for(
            subject.model_digest, images, subject.data_config, few, seed, batch_size, workers, subject.label_names, subject.num_classes
        )
        say_estimate(
            terminal, "evaluate", tried(terminal, lambda _: measured(sample), sample, opened.num_listed, started), "for its result"
        )
        return
    with terminal.watching(opened, "evaluate"):
        found = measured(opened)
    document = flat(found) | {"digest": subject.digest} | verified
    folder = run_dir or subject.folder
    saved = folder if output is None and folder is not None and (folder / PROFILE).is_file() else None
    if output is not None:
        _write(output, document)
    if saved is not None:
        save_result(document, saved, subject.name)
    terminal.result(document, *([said] if said else []), f"{subject.name} on {counted(found.num_images, 'image')}", *_lines(found))
    _check(gates, document)
    if saved is not None:
        timed = (saved / BENCH).is_file() or not (saved / ONNX).is_file()
        terminal.next(in_run("vitq report" if timed else "vitq bench --baselines", saved))
    elif subject.folder is None:
        terminal.next(shlex.join(["vitq", "profile", artifact, *options.loading_words(loading), "--images", "PATH"]))
    else:
        terminal.next(shlex.join(["vitq", "bench" if artifact.endswith(".onnx") else "export", artifact]))


@dataclass(frozen=True)
class Subject:
    """What is evaluated: its sha256, a function from images to the output, how to feed it, and what it says of its float model.

    `resampled` is that of `LoadedModel`.
    """

    name: str
    digest: str
    runnable: "Callable[[Tensor], Tensor]"
    data_config: dict[str, Any]
    num_classes: int
    label_names: tuple[str, ...]
    folder: Path | None
    made_from: Mapping[str, Any]
    resampled: tuple[str, ...] = ()

    @property
    def model_digest(self) -> str | None:
        """The float model's."""
        known = self.made_from.get("model")
        return known.get("digest") if isinstance(known, dict) else None


def flat(found: "Evaluation") -> dict[str, Any]:
    """The measures that there are, as numbers with `..._margin` for their 95 % intervals."""
    document: dict[str, Any] = {"num_images": found.num_images}
    for name in _UNITS:
        if (estimate := getattr(found, name)) is not None:
            document |= {name: estimate.mean, f"{name}_margin": estimate.margin}
    return document


def save_result(document: dict[str, Any], folder: Path, name: str) -> None:
    """Puts a result into a run folder's evaluations, in place of an earlier one of the same artifact."""
    path = folder / EVALUATION
    with locked(folder):  # else, of two runs that end at once, one result would be lost
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (ValueError, RecursionError):
            found = {}
        _write(path, (found if isinstance(found, dict) else {}) | {name: document})


def _write(path: Path, document: dict[str, Any]) -> None:
    from vitq.whole import write_whole

    write_whole(path, lambda temporary: temporary.write_text(json_text(document), encoding="utf-8"))


def on_device(module: "Callable[[Tensor], Tensor]", device: str) -> "Callable[[Tensor], Tensor]":
    """A function from images to outputs on the CPU that computes on a device; a module is moved there."""
    moved: Any = module.to(device)  # pyright: ignore[reportFunctionMemberAccess]
    return lambda batch: moved(batch.to(device)).cpu()


def _verified(artifact: str) -> dict[str, Any]:
    """What --verify adds to the document, once every part of the file has the digest that it was exported with."""
    if not artifact.endswith(".onnx"):
        raise UsageError(f"--verify compares an ONNX file with what was exported; {artifact} is none, give a .onnx or leave --verify out")
    from vitq.onnx_file.digests import check_digests

    return {"verified": True, "parts": check_digests(artifact)}


def _open(artifact: str, loading: "LoadingOptions", device: str) -> Subject:
    from vitq import checkpoint
    from vitq.accuracy import onnx_runnable
    from vitq.models import load
    from vitq.runtime import onnx_metadata

    path = Path(artifact)
    if path.is_file() and path.suffix in (".json", ".html"):
        raise InputError(f"{path} is nothing to evaluate; give a MODEL, a calibrated .safetensors or an exported .onnx")
    if path.suffix == ".onnx":
        metadata = onnx_metadata(path)
        preprocessing, classes = metadata.get("vitq.preprocessing"), metadata.get("vitq.num_classes")
        if not isinstance(preprocessing, dict) or not isinstance(classes, int):
            raise InputError(f"{path} does not say how to preprocess images, so vitq did not write it; `vitq export` writes one that does")
        labels, made_from = metadata.get("vitq.label_names"), metadata.get("vitq.made_from")
        labels = tuple(labels) if isinstance(labels, list) else ()
        made_from = made_from if isinstance(made_from, dict) else {}
        return Subject(path.name, file_digest(path), onnx_runnable(path), preprocessing, classes, labels, path.parent, made_from)
    if path.is_file() and checkpoint.is_checkpoint(path):
        found = checkpoint.load(path)
        spec, runnable = found.plan.model, on_device(found.quantized_module(), device)
        return Subject(
            path.name, file_digest(path), runnable, spec.data_config, spec.num_classes, spec.label_names, path.parent, found.made_from
        )
    model = load(artifact, **loading.model_dump())
    made_from = {"model": {"source": artifact, "digest": model.digest}}
    runnable = on_device(model.module, device)
    return Subject(
        artifact, model.digest, runnable, model.data_config, model.num_classes, model.label_names, None, made_from, model.resampled
    )


def _reference(subject: Subject, given: str | None, loading: "LoadingOptions", run_dir: Path | None) -> "LoadedModel | None":
    """The float model: as given, else the one that the artifact was made from where its run folder is at hand."""
    from vitq.models import load

    folder = run_dir or subject.folder
    memory = Memory(subject.made_from, (folder or Path()) / subject.name)
    if given is not None:
        model = load(given, **(memory.loading().model_dump() | loading.model_dump(exclude_defaults=True)))
        if model.data_config["input_size"] != list(subject.data_config["input_size"]):
            sizes = f"{model.data_config['input_size']}, {subject.name} takes {subject.data_config['input_size']}"
            raise InputError(f"--reference {given} takes images of {sizes}; give the model that it was made from, or its --img-size")
        return model
    if folder is None or subject.folder is None or not (folder / PROFILE).is_file() or "model" not in subject.made_from:
        return None
    return memory.model(None, "--reference")


def _profiled(folder: Path | None) -> dict[str, Any] | None:
    """The preprocessing that the profile of a run folder has; None where there is no profile."""
    from vitq.artifacts import load_profile

    path = folder / PROFILE if folder else None
    return load_profile(path).model.data_config if path and path.is_file() else None


def _refuse_unmeasurable(gates: Mapping[str, float], num_classes: int, labelled: bool, with_reference: bool) -> None:
    """Raises UsageError for a gate on what will not be measured, before anything is."""
    if gates and not num_classes:
        raise UsageError("a model without classes has no top-1, agreement or KL; leave the gates out")
    if "min_top1" in gates and not labelled:
        raise UsageError(
            f"--min-top1 needs images with labels; give --images a folder with a folder for each of {counted(num_classes, 'class')}"
        )
    if {"min_agreement", "max_kl"} & set(gates) and not with_reference:
        raise UsageError("--min-agreement and --max-kl need the float model; give it with --reference MODEL")


def _lines(found: "Evaluation") -> list[str]:
    lines = []
    for name, unit in _UNITS.items():
        if (estimate := getattr(found, name)) is None:
            continue
        value = f"{estimate.mean:>+10.4g}" if name == "top1_change" else f"{estimate.mean:>10.4g}"
        if name in COUNTED:
            low, high = wilson(estimate.mean, found.num_images)
            sure = f"{unit} ({low:.1f} to {high:.1f})"
        else:
            sure = f"± {estimate.margin:.2g} {unit}".rstrip()
        lines.append(f"  {name.replace('_', ' '):<15}{value} {sure}")
    return lines


def _check(gates: Mapping[str, float], document: Mapping[str, Any]) -> None:
    """Raises GateError for the gates that do not hold; a NaN holds none."""
    missed = []
    for gate, limit in gates.items():
        bound, _, name = gate.partition("_")
        if not (document[name] >= limit if bound == "min" else document[name] <= limit):
            missed.append(f"{name} is {document[name]:.6g}, {'below' if bound == 'min' else 'above'} --{gate.replace('_', '-')} {limit:g}")
    if missed:
        raise GateError("; ".join(missed) + "; give the layers more bits, or loosen the gate")
