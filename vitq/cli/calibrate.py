"""`vitq calibrate`: quantizers fitted to a plan, into model.safetensors."""

import math
import shlex
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitq.cli import completion, options
from vitq.cli.chain import (
    Reading,
    output_path,
    plan_memory,
    refuse_missing_sources,
    refuse_stale_plan,
    run_folder,
)
from vitq.cli.dry_run import say_estimate, trial_size, tried, tried_twice
from vitq.cli.layer_table import worst
from vitq.cli.opening import say_foreign
from vitq.cli.terminal import Terminal
from vitq.commands import CHECKPOINT, PLAN, in_folder
from vitq.errors import UsageError
from vitq.units import counted, in_decimals, in_units

if TYPE_CHECKING:
    from vitq.images import Images

RECIPE_HELP = (
    "fast: minutes, no gradients; reconstruct: the most accurate; "
    "as papers do, to compare with: repq-vit, mix-qvit, erq, adalog, fq-vit, ptq4vit, and, by gradients, fima-q."
)
LEARNING = ("reconstruct", "fima-q")


def calibrate(
    plan: Annotated[Path | None, typer.Argument(help="A plan. (default: plan.json in the run folder)")] = None,
    images: options.RememberedImages = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", autocompletion=completion.recipes, callback=completion.known("recipe", completion.recipes), help=RECIPE_HELP
        ),
    ] = "fast",
    iterations: Annotated[
        int | None, typer.Option("--iterations", min=1, help="reconstruct, fima-q: steps a block. (default: 150, 300)")
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Weights without zero points, for export --storage standard; less accurate below 7 bits.")
    ] = False,
    dry_run: options.DryRun = False,
    model: Annotated[
        str | None, typer.Option("--model", autocompletion=completion.models, help="The float model. (default: the one that was profiled)")
    ] = None,
    num_images: options.NumImages = None,
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
    """Fit the quantizers of a plan to its model."""
    terminal = Terminal(quiet, verbose, as_json)
    from vitq.artifacts import load_plan

    folder = run_folder(run_dir, plan)
    source = plan or folder / PLAN
    chosen = load_plan(source)
    if plan is None:
        refuse_stale_plan(chosen, source)
    refuse_missing_sources(model, images)
    if iterations is not None and recipe not in LEARNING:
        raise UsageError(f"--iterations is for --recipe {' or '.join(LEARNING)}; recipe {recipe} takes minutes")
    path = output_path(output, folder, CHECKPOINT, force or dry_run)
    memory = plan_memory(chosen, source)
    options.usable_device(device)
    from vitq.bench.child import present_memory
    from vitq.calibration import AT_ONCE, HELD_AT_ONCE, Held, discard, expected
    from vitq.calibration import LEARNING as DEFAULTS
    from vitq.calibration import calibrate as fit
    from vitq.calibration.attribution import IMAGES as ATTRIBUTED
    from vitq.checkpoint import save
    from vitq.quantizers import INTEGER_QUANTIZERS
    from vitq.rewrites import prepare

    started = time.perf_counter()
    reading = Reading(images, num_images, seed, batch_size, workers)
    with terminal.waiting("load the model"):
        loaded = memory.model(model, "--model")
    opened, remembered = memory.images(reading, loaded.data_config, loaded.label_names)
    terminal.preprocessing(loaded.data_config, chosen.model.data_config)
    if images is not None:
        say_foreign(terminal, loaded.digest, images)
    terminal.detail(f"model {loaded.source}, sha256 {loaded.digest}; images {opened.source}, sha256 of the list {opened.digest}")
    scratch, learning = None, None
    if recipe in LEARNING:
        scratch, default = path.with_name(f".{path.stem}.scratch"), DEFAULTS[recipe]
        learning = replace(default, iterations=iterations or default.iterations, seed=remembered.seed, scratch=scratch, keep_scratch=True)
    if dry_run:
        prepare(loaded, device)  # what capturing loads stays loaded, and is not the recipe's
        if learning is not None:  # steps on blocks, not passes over images: from the time of one pass
            present = present_memory()
            found = {"num_images": opened.num_listed} | asdict(expected(loaded, chosen, opened, device, learning))
            found["memory_bytes"] = None if present is None else present + found["memory_bytes"]
        else:
            few = min(trial_size(batch_size, ATTRIBUTED), opened.num_listed)

            def sample(count: int) -> "Images":
                return memory.images(replace(reading, num_images=count), loaded.data_config, loaded.label_names)[0]

            def work(images: "Images", folder: Path) -> list[float]:
                held = Held() if recipe in AT_ONCE else None
                save(fit(loaded, chosen, images, recipe, device, symmetric, None, held and held.part, held), folder / CHECKPOINT)
                return [HELD_AT_ONCE * most for most in (*held.parts, held.most)] if held else []

            if recipe in AT_ONCE and opened.num_listed > 2 * few:
                found = tried_twice(terminal, work, sample(few), sample(2 * few), opened.num_listed, started)
            else:
                some = opened if recipe in AT_ONCE else sample(few)
                found = tried(terminal, partial(work, some), some, opened.num_listed, started)
        say_estimate(terminal, f"recipe {recipe}", {"recipe": recipe} | found, f"under {scratch or path.parent}")
        return
    with terminal.keeping(scratch), terminal.watching(opened, "calibrate") as progress:
        checkpoint = fit(loaded, chosen, opened, recipe, device, symmetric, learning, progress)
    save(memory.remembered_in(checkpoint, remembered), path, force)
    if scratch is not None:
        discard(scratch)
    lines: list[str] = []
    document: dict[str, Any] = {
        "output": str(path),
        "recipe": recipe,
        "quantized_layers": len(chosen.layers),
        "file_bytes": path.stat().st_size,
        "num_images": opened.num_images,
        "skipped": opened.skipped,
        "seconds": time.perf_counter() - started,
    }
    if errors := checkpoint.errors:
        document |= {"predicted_kl": math.fsum(error["kl"] or 0.0 for error in errors.values()), "layers": errors}
        unit = "nats per image" if chosen.model.num_classes else "half the relative squared error"
        lines.append(
            f"its layers cost {in_decimals(document['predicted_kl'])} ({unit}) on the first of these images, most of all {worst(errors)}"
        )
    on = f"on {counted(opened.num_images, 'image')} in {document['seconds']:.1f} s"
    what = f"{counted(len(chosen.layers), 'layer')} calibrated by recipe {recipe} {on}"
    terminal.result(document, what, *lines, f"wrote {path} ({in_units(document['file_bytes'], 'B')})")
    exports = all(isinstance(quantizer, INTEGER_QUANTIZERS) for quantizer in checkpoint.activations.values())
    terminal.next(
        in_folder("vitq export", path, CHECKPOINT) if exports else shlex.join(["vitq", "evaluate", str(path), "--images", "PATH"])
    )
