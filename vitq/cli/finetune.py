"""`vitq finetune`: a calibrated model trained on images, into model.safetensors."""

import shutil
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitq.cli import completion, options
from vitq.cli.chain import (
    Memory,
    Reading,
    of_another_plan,
    output_path,
    plan_memory,
    refuse_missing_sources,
    refuse_stale_plan,
    run_folder,
)
from vitq.cli.dry_run import say_estimate, trial
from vitq.cli.opening import open_for, say_foreign
from vitq.cli.terminal import Terminal
from vitq.commands import CALIBRATED, CHECKPOINT, PLAN, in_folder, in_run
from vitq.errors import InputError, UsageError
from vitq.units import counted, in_decimals, in_units

if TYPE_CHECKING:
    from vitq.artifacts import BitPlan
    from vitq.finetune import Training
    from vitq.images import Images
    from vitq.models import LoadedModel


def finetune(
    plan: Annotated[Path | None, typer.Argument(help="A plan. (default: plan.json in the run folder)")] = None,
    images: Annotated[
        str | None, typer.Option("--images", help="What to train on: class folders, a .tar of them, or an images.safetensors.")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            autocompletion=completion.trainings,
            callback=completion.known("recipe", completion.trainings),
            help="lsq: weight scales learn; ofq: they follow statistics, and annealing.",
        ),
    ] = "lsq",
    max_minutes: Annotated[
        float | None,
        typer.Option("--max-minutes", callback=options.above_zero, help="Time that all may take; the schedule is fitted to it."),
    ] = None,
    epochs: Annotated[
        float, typer.Option("--epochs", callback=options.above_zero, help="Passes over the images, if the time is enough.")
    ] = 10.0,
    lr: Annotated[float, typer.Option("--lr", min=0, help="AdamW's rate of weights, in steps of their scale.")] = 0.005,
    other_lrs: Annotated[
        float, typer.Option("--other-lrs", min=0, help="What the rates of all else that learns are multiplied with.")
    ] = 1.0,
    warmup: Annotated[float, typer.Option("--warmup", min=0, max=1, help="The part of the run in which rates rise.")] = 0.05,
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0, help="AdamW's, of weights.")] = 0.0,
    clip_grad: Annotated[float, typer.Option("--clip-grad", min=0, help="Largest norm of each kind's gradients; 0: any.")] = 0.0,
    model_ema_decay: Annotated[
        float, typer.Option("--model-ema-decay", min=0, max=1, help="Keep moving averages of all that learns; 0: none.")
    ] = 0.0,
    soft: Annotated[float, typer.Option("--soft", min=0, help="Weight of the KL from the float model's output.")] = 1.0,
    hard: Annotated[float, typer.Option("--hard", min=0, help="Weight of the labels' cross entropy.")] = 0.0,
    temperature: Annotated[float, typer.Option("--temperature", callback=options.above_zero, help="Of the soft loss.")] = 1.0,
    min_scale: Annotated[
        float, typer.Option("--min-scale", min=0, max=1, help="The smallest part of a picture's area that is cropped.")
    ] = 0.5,
    hflip: Annotated[float, typer.Option("--hflip", min=0, max=1, help="How often a picture is mirrored.")] = 0.5,
    color_jitter: Annotated[float, typer.Option("--color-jitter", min=0, help="How far colours change.")] = 0.0,
    aa: Annotated[str | None, typer.Option("--aa", help="timm's AutoAugment or RandAugment policy, such as rand-m9-mstd0.5.")] = None,
    reprob: Annotated[float, typer.Option("--reprob", min=0, max=1, help="How often a part of a picture is erased.")] = 0.0,
    mixup: Annotated[float, typer.Option("--mixup", min=0, help="Alpha of mixing two pictures.")] = 0.0,
    amp: Annotated[bool, typer.Option("--amp", help="Products in bfloat16.")] = False,
    save_minutes: Annotated[float, typer.Option("--save-minutes", min=0, help="How often to keep what a killed run goes on from.")] = 5.0,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with an interrupted run, or start anew.")] = True,
    model: Annotated[
        str | None, typer.Option("--model", autocompletion=completion.models, help="The float model. (default: the one that was profiled)")
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option("--validation", help="Other images, to judge on, as for --images. (default: some of --images are held out)"),
    ] = None,
    num_images: Annotated[int | None, typer.Option("--num-images", min=1, help="Size of the seeded subset. (default: all)")] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=options.MOST_SEED, help="Chooses the subset, the order and the views of the images.")
    ] = 0,
    dry_run: options.DryRun = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, max=options.MOST_IMAGES, help="Images a step, of all processes together.")
    ] = 32,
    workers: options.Workers = 0,
    device: options.Device = "cpu",
    run_dir: options.RunDir = None,
    output: options.Output = None,
    force: options.Force = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a calibrated model on images, to say what the float model says."""
    started = time.perf_counter()
    from vitq.artifacts import load_plan
    from vitq.cli.sources import ImageSource
    from vitq.whole import write_whole

    folder = run_folder(run_dir, plan)
    source = plan or folder / PLAN
    chosen = load_plan(source)
    if plan is None:
        refuse_stale_plan(chosen, source)
    refuse_missing_sources(model, images)
    refuse_missing_sources(None, validation)
    if images is None:
        raise UsageError("no images were given; give --images a folder of class folders, a .tar of one or an images.safetensors")
    calibrated = folder / CHECKPOINT
    path = output_path(output, folder, CHECKPOINT, force or dry_run or output is None)
    memory = plan_memory(chosen, source)
    options.usable_device(device)
    from vitq.checkpoint import load, save
    from vitq.finetune import Augmentation, Distillation, Training, joined
    from vitq.finetune import finetune as train

    training = Training(
        recipe=recipe,
        epochs=epochs,
        minutes=max_minutes,
        rate=lr,
        other_rates=other_lrs,
        batch_size=batch_size,
        warmup=warmup,
        decay=weight_decay,
        clip=clip_grad,
        ema=model_ema_decay,
        bfloat16=amp,
        seed=seed,
        distillation=Distillation(soft, hard, temperature),
        augmentation=Augmentation(min_scale, hflip, color_jitter, aa, reprob, mixup),
        save_minutes=save_minutes,
        workers=workers,
    )
    training.check()
    with joined(device) as processes:
        terminal = Terminal(quiet or not processes.leads, verbose, as_json)
        loaded = memory.model(model, "--model")

        def opened_at(given: str, count: int | None) -> "Images":
            say_foreign(terminal, loaded.digest, given)
            classes = loaded.label_names, loaded.num_classes
            return open_for(loaded.digest, given, loaded.data_config, count, seed, batch_size, workers, *classes)

        opened, judging = opened_at(images, num_images), None if validation is None else opened_at(validation, None)
        terminal.preprocessing(loaded.data_config, chosen.model.data_config)
        if dry_run:
            if processes.leads:
                found = _expected(terminal, memory, loaded, chosen, opened, judging, training, calibrated, device, started)
                say_estimate(terminal, "finetune", found, f"in {folder}")
            return
        state = path.with_name(f".{path.stem}.finetuning.safetensors")
        if processes.leads:
            if not calibrated.is_file():
                _calibrate(terminal, memory, loaded, chosen, batch_size, device, calibrated)
            if not resume:
                state.unlink(missing_ok=True)
        processes.wait()
        start = load(calibrated, processes.device)
        if of_another_plan(start.plan, start.made_from, chosen):
            raise InputError(f"{calibrated} was calibrated to another plan than {source}; run `{in_run('vitq calibrate', folder)}` again")
        with terminal.keeping(state), terminal.watching(opened, "finetune") as progress:
            found = train(start, loaded, opened, training, state, processes, time.perf_counter() - started, progress, judging)
        if not processes.leads:
            return
        better = found.checkpoint is not start
        if better:
            remembered = ImageSource(source=images, digest=opened.digest, num_images=opened.num_listed, seed=seed).model_dump()
            made_from = found.checkpoint.made_from
            made_from = made_from | {"finetuning": made_from["finetuning"] | {"images": remembered}}
            if output is None and "finetuning" not in start.made_from:
                write_whole(folder / CALIBRATED, lambda temporary: shutil.copyfile(calibrated, temporary))
            save(replace(found.checkpoint, made_from=made_from), path, force=True)
        state.unlink(missing_ok=True)
    document: dict[str, Any] = {
        "output": str(path) if better else None,
        "recipe": recipe,
        "steps": found.steps,
        "epochs": found.epochs,
        "loss_before": found.before,
        "loss_after": found.after,
        "judged_on": {"source": validation or images, "num_images": found.judges, "fair": found.fair},
        "num_images": opened.num_images,
        "skipped": opened.skipped,
        "seconds": time.perf_counter() - started,
    }
    what = f"{counted(found.steps, 'step')} by recipe {recipe}, {found.epochs:.2f} epochs, {document['seconds']:.0f} s"
    judges = f"{counted(found.judges, 'image')} {'held out' if validation is None else f'of {validation}'}"
    loss = f"loss on {judges} {in_decimals(found.before)} before, {in_decimals(found.after)} after"
    if not better:
        terminal.result(document, what, f"{loss}: not lower, so {calibrated} is as it was")
        terminal.note("a run this short may end before it gains: give more --images, more --max-minutes, or a lower --lr and --other-lrs")
        terminal.next(in_folder("vitq export", calibrated, CHECKPOINT))
        return
    terminal.result(document, what, loss, f"wrote {path} ({in_units(path.stat().st_size, 'B')})")
    if not found.fair and not found.after < found.before:
        kept = calibrated if output else folder / CALIBRATED
        terminal.note(
            "these images do not say whether it is better: a float model that was trained on them knows their labels by heart. "
            f"Evaluate it, or give --validation other images; {kept} holds the model before training"
        )
    terminal.next(in_folder("vitq export", path, CHECKPOINT))


def _expected(
    terminal: Terminal,
    memory: Memory,
    loaded: "LoadedModel",
    plan: "BitPlan",
    opened: "Images",
    judging: "Images | None",
    training: "Training",
    calibrated: Path,
    device: str,
    started: float,
) -> dict[str, Any]:
    """What the run would take, by a few of its steps; whatever comes once, a calibration that is missing too, is done in full."""
    from vitq.checkpoint import load
    from vitq.finetune import finetune as train

    told: list[tuple[float, float]] = []

    def work(folder: Path) -> None:
        start = calibrated
        if not start.is_file():
            start = folder / CHECKPOINT
            _calibrate(terminal, memory, loaded, plan, training.batch_size, device, start)
        few = replace(training, epochs=_TRIED * training.batch_size / opened.num_listed, minutes=None, save_minutes=0.0)
        train(
            load(start, device),
            loaded,
            opened,
            few,
            folder / "state",
            progress=lambda done, _, __: told.append((time.perf_counter(), done)),
            validation=judging,
        )
        shutil.copyfile(start, folder / CALIBRATED)

    found = trial(terminal, work, f"{_TRIED} steps", started)
    each = min(((at - before) / (done - earlier) for (before, earlier), (at, done) in pairwise(told)), default=0.0)
    left = training.epochs * opened.num_listed / training.batch_size - len(told)
    seconds = found["seconds"] + max(left, 0) * each
    if training.minutes is not None:
        seconds = min(seconds, max(60 * training.minutes, found["seconds"]))
    return {"num_images": opened.num_listed} | found | {"seconds": seconds}


_TRIED = 4  # steps of a dry run


def _calibrate(
    terminal: Terminal, memory: Memory, loaded: "LoadedModel", plan: "BitPlan", batch_size: int, device: str, path: Path
) -> None:
    """By recipe fast, on the images that the plan was made from; as `vitq calibrate` would write it."""
    from vitq.calibration import calibrate
    from vitq.checkpoint import save

    opened, remembered = memory.images(Reading(None, None, None, batch_size, 0), loaded.data_config, loaded.label_names)
    with terminal.watching(opened, "calibrate") as progress:
        checkpoint = calibrate(loaded, plan, opened, device=device, progress=progress)
    save(memory.remembered_in(checkpoint, remembered), path)
