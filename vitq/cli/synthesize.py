"""`vitq synthesize`: images made from the model alone, into images.safetensors."""

import math
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vitq import __version__
from vitq.cli import completion, options
from vitq.cli.chain import output_path, refuse_missing_sources, run_folder
from vitq.cli.dry_run import say_estimate, trial
from vitq.cli.terminal import Terminal
from vitq.commands import IMAGES
from vitq.errors import UsageError
from vitq.units import counted, in_minutes

_TRIED = 4  # steps of a dry run; the first ones are slower


def synthesize(
    model: Annotated[str, typer.Argument(autocompletion=completion.models, help="A timm local folder, a checkpoint file, or a timm name.")],
    num_images: Annotated[int, typer.Option("--num-images", min=1, max=options.MOST_IMAGES, help="How many images to make.")] = 32,
    max_minutes: Annotated[
        float,
        typer.Option("--max-minutes", callback=options.above_zero, help="The time that all of it may take; the steps are reduced to fit."),
    ] = 10.0,
    iterations: Annotated[
        int, typer.Option("--iterations", min=1, help="Steps at most; where all fit, the seed alone decides the images.")
    ] = 1000,
    preview: Annotated[Path | None, typer.Option("--preview", help="Also draw all images on one sheet, a PNG.")] = None,
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    img_size: options.ImgSize = None,
    model_kwargs: options.ModelKwargs = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=options.MOST_SEED, help="Of the noise, the classes and all else that is random.")
    ] = 0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=options.MOST_IMAGES, help="Images made together; a batch that is done is kept.")
    ] = 8,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try some steps, say what time, memory and disk all of it takes, and stop.")
    ] = False,
    device: options.Device = "cpu",
    run_dir: options.RunDir = None,
    output: options.Output = None,
    force: options.Force = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Make calibration images from the model alone, where there are no real ones."""
    terminal = Terminal(quiet, verbose, as_json)
    refuse_missing_sources(model, None, arch)
    path = output_path(output, run_folder(run_dir), IMAGES, force or dry_run)
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} would not be read as images; give -o a name that ends in .safetensors")
    if preview is not None:
        output_path(preview, Path(), "", force or dry_run)
    loading = options.loading(arch, num_classes, img_size, model_kwargs)
    options.usable_device(device)
    from vitq.calibration import discard
    from vitq.cli.sources import ModelSource
    from vitq.images import write_png
    from vitq.models import load
    from vitq.synthesize import framed, refuse_too_short, save, sheet
    from vitq.synthesize import synthesize as make
    from vitq.whole import refuse_existing

    started = time.perf_counter()
    with terminal.waiting("load the model"):
        loaded = load(model, **loading.model_dump())
    terminal.resampled(loaded.resampled)
    terminal.detail(f"model {loaded.source}, sha256 {loaded.digest}")
    if dry_run:
        told: list[float] = []

        def work(folder: Path) -> None:
            few, steps = min(batch_size, num_images), min(_TRIED, iterations)
            made = make(loaded, few, seed, folder / "scratch", 60, steps, batch_size, device, lambda *_: told.append(time.perf_counter()))
            save(framed(made.pictures, loaded.data_config), made.labels, {}, folder / IMAGES)

        found = trial(terminal, work, f"{_TRIED} steps", started)
        few = min(batch_size, num_images)
        batches = num_images / few
        each = told[-1] - told[-2] if len(told) > 1 else 0.0
        refuse_too_short(each * math.ceil(batches), 60 * max_minutes, few, math.ceil(batches))
        seconds = min(found["seconds"] + each * (iterations * batches - len(told)), 60 * max_minutes)
        disk = round(batches * found["disk_bytes"])
        say_estimate(
            terminal, "synthesize", found | {"num_images": num_images, "seconds": seconds, "disk_bytes": disk}, f"in {path.parent}"
        )
        return
    scratch = path.with_name(f".{path.stem}.scratch")
    with terminal.keeping(scratch), terminal.working("synthesize", counted(num_images, "image")) as progress:
        made = make(loaded, num_images, seed, scratch, max_minutes, iterations, batch_size, device, progress, keep_scratch=True)
    source = ModelSource(source=loaded.source, digest=loaded.digest, options=loading)
    how = {"num_images": num_images, "seed": seed, "iterations": made.steps, "batch_size": batch_size, "vitq": __version__}
    made_from = {"model": source.model_dump(), "synthesis": how}
    refuse_existing(path, force)
    if preview is not None:
        write_png(sheet(made.pictures), preview, force)
    save(framed(made.pictures, loaded.data_config), made.labels, made_from, path, force)
    discard(scratch)
    document: dict[str, Any] = {
        "output": str(path),
        "preview": None if preview is None else str(preview),
        "num_images": num_images,
        "iterations": made.steps,
        "entropy": made.entropy,
        "noise_entropy": made.noise_entropy,
        "agreement": made.agreement,
        "seconds": time.perf_counter() - started,
    }
    classes = "" if made.agreement is None else f"; the model takes {made.agreement:.0f} % of them for the class prescribed"
    lines = [f"{counted(num_images, 'image')} made in {counted(made.steps, 'step')} a batch, {document['seconds']:.1f} s"]
    lines += [f"entropy of patch similarities {made.entropy:.3f} nats, noise has {made.noise_entropy:.3f}{classes}"]
    if made.steps < iterations:
        terminal.note(f"{made.steps} of {counted(iterations, 'step')} fit in {in_minutes(60 * max_minutes)}; --max-minutes gives more time")
    terminal.result(document, *lines, *([] if preview is None else [f"wrote {preview}"]), f"wrote {path}")
    terminal.next(shlex.join(["vitq", "profile", model, *options.loading_words(loading), "--images", str(path)]))
