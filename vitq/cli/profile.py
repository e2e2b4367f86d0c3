"""`vitq profile`: what every layer's bits are worth, into profile.json."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitq.choices import FisherLabels, LrpAggregate, LrpRules, LrpTarget, SensitivityLoss
from vitq.cli import completion, options
from vitq.cli.bit_map import cost_map
from vitq.cli.chain import output_path, refuse_missing_sources, run_folder
from vitq.cli.dry_run import say_estimate, trial_size, tried
from vitq.cli.layer_table import cost_table
from vitq.cli.opening import open_for, say_foreign
from vitq.cli.terminal import Terminal
from vitq.commands import PROFILE, in_folder
from vitq.errors import InputError, UsageError
from vitq.units import counted, in_units

if TYPE_CHECKING:
    from vitq.artifacts import MetricOptions, Profile
    from vitq.cli.sources import LoadingOptions
    from vitq.images import Images
    from vitq.models import LoadedModel

DEFAULT_METRIC = "output-fisher"
HEAT_MAP = "relevance.png"


def profile(
    model: Annotated[str, typer.Argument(autocompletion=completion.models, help="A timm local folder, a checkpoint file, or a timm name.")],
    images: options.OptionalImages = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            autocompletion=completion.metrics,
            callback=completion.known("metric", completion.metrics),
            help="Repeatable; the first is allocate's default.",
        ),
    ] = None,
    bits: Annotated[str, typer.Option("--bits", help="The widths to price.")] = "2,3,4,5,6,7,8",
    arch: options.Arch = None,
    num_classes: options.NumClasses = None,
    img_size: options.ImgSize = None,
    model_kwargs: options.ModelKwargs = None,
    num_images: options.NumImages = options.DEFAULT_NUM_IMAGES,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=options.MOST_SEED, help="Chooses the subset of the images, and all else that is random.")
    ] = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Go on with an interrupted sensitivity, the one metric that takes long, or start anew."),
    ] = True,
    lrp_rules: Annotated[LrpRules, typer.Option("--lrp-rules", help="How relevance is propagated.")] = "chefer",
    lrp_target: Annotated[LrpTarget, typer.Option("--lrp-target", help="Explain the predicted class or the label.")] = "pred",
    lrp_aggregate: Annotated[LrpAggregate, typer.Option("--lrp-aggregate", help="How a layer's relevance becomes one number.")] = "abs",
    sensitivity_loss: Annotated[
        SensitivityLoss, typer.Option("--sensitivity-loss", help="What is compared; all but kl need labels.")
    ] = "kl",
    sensitivity_baseline: Annotated[
        str,
        typer.Option(
            "--sensitivity-baseline",
            autocompletion=completion.baselines,
            callback=completion.known("sensitivity baseline", completion.baselines),
            help="What the other layers run at: fp32, w8a8 or 'uniform 4'.",
        ),
    ] = "fp32",
    fisher: Annotated[
        FisherLabels, typer.Option("--fisher", help="lampq's labels: sampled from the model (true) or the images' own (empirical).")
    ] = "true",
    pairs: Annotated[
        bool, typer.Option("--pairs", help="output-fisher: terms between layers too, for allocate --objective pairwise.")
    ] = False,
    explain: Annotated[
        Path | None, typer.Option("--explain", help="No profile, but a heat map of what in this IMAGE speaks for the model's answer.")
    ] = None,
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
    """Measure what each layer's bits are worth."""
    terminal = Terminal(quiet, verbose, as_json)
    from vitq.artifacts import MetricOptions, save

    if explain is None and images is None:
        raise UsageError("no images were given; give --images a folder, a .tar or an images.safetensors")
    refuse_missing_sources(model, images, arch)
    if explain is not None and not explain.is_file():
        raise InputError(f"{explain} does not exist; give --explain a PNG or JPEG file")
    path = output_path(output, run_folder(run_dir), HEAT_MAP if explain else PROFILE, force or dry_run)
    widths = options.parse_bits(bits) or []
    if pairs and DEFAULT_METRIC not in (metric or [DEFAULT_METRIC]):
        raise UsageError(
            f"--pairs is for --metric {DEFAULT_METRIC}, not {' or '.join(metric or ())}; add that metric, or leave --pairs out"
        )
    chosen = MetricOptions(
        lrp_rules=lrp_rules,
        lrp_target=lrp_target,
        lrp_aggregate=lrp_aggregate,
        sensitivity_loss=sensitivity_loss,
        sensitivity_baseline=sensitivity_baseline,
        fisher=fisher,
        pairs=pairs,
    )
    loading = options.loading(arch, num_classes, img_size, model_kwargs)
    options.usable_device(device)
    if explain is not None:
        _heat_map(terminal, model, loading, explain, chosen, path, device, force)
        return
    assert images is not None
    journal = path.with_name(f".{path.stem}.journal.jsonl")
    if not resume:
        journal.unlink(missing_ok=True)
    from vitq.importance import profile as price
    from vitq.models import load

    started = time.perf_counter()
    with terminal.waiting("load the model"):
        loaded = load(model, **loading.model_dump())
    terminal.resampled(loaded.resampled)
    opened = open_for(
        loaded.digest, images, loaded.data_config, num_images, seed, batch_size, workers, loaded.label_names, loaded.num_classes
    )
    terminal.preprocessing(loaded.data_config)
    say_foreign(terminal, loaded.digest, images)
    terminal.detail(f"model {loaded.source}, sha256 {loaded.digest}; images {opened.source}, sha256 of the list {opened.digest}")
    if dry_run:
        few = min(trial_size(batch_size), opened.num_listed)
        sample = open_for(loaded.digest, images, loaded.data_config, few, seed, batch_size, workers, loaded.label_names, loaded.num_classes)

        def work(folder: Path) -> None:
            save(price(loaded, sample, metric or [DEFAULT_METRIC], widths, seed, device, chosen, folder / "journal"), folder / PROFILE)

        say_estimate(terminal, "profile", tried(terminal, work, sample, opened.num_listed, started), f"in {path.parent}")
        return
    with terminal.keeping(journal), terminal.watching(opened, "profile") as progress:
        found = price(loaded, opened, metric or [DEFAULT_METRIC], widths, seed, device, chosen, journal, progress)
    found = remembering(found, loaded, loading, opened, seed)
    save(found, path, force)
    journal.unlink(missing_ok=True)
    seconds = time.perf_counter() - started
    tables = [cost_table(found, name) for name in found.costs] if verbose else [] if quiet else cost_map(found, next(iter(found.costs)))
    terminal.result(_document(found, str(path), opened, seconds), *_lines(found, seconds), *tables, f"wrote {path}")
    if fused := found.made_from.get("unfused_attention"):
        terminal.note(
            f"attention stays fused in {counted(len(fused), 'place')}, so its matmuls are no layers and stay float: {', '.join(fused)}"
        )
    terminal.next(in_folder("vitq allocate --budget 4.0", path, PROFILE))


def _heat_map(
    terminal: Terminal, model: str, loading: "LoadingOptions", image: Path, chosen: "MetricOptions", path: Path, device: str, force: bool
) -> None:
    from vitq.importance.relevance_map import explain
    from vitq.models import load

    found = explain(load(model, **loading.model_dump()), image, chosen, path, device=device, force=force)
    what = "the squared norm of the output" if found.label is None else f"class {found.label}" + (f", {found.name}" if found.name else "")
    document = {"output": str(path), "label": found.label, "name": found.name, "without_rule": list(found.without_rule)}
    terminal.result(document, f"explained {what}; red speaks for it, blue against it", f"wrote {path}")
    terminal.next(shlex.join(["vitq", "profile", model, *options.loading_words(loading), "--images", "PATH"]))


def remembering(found: "Profile", model: "LoadedModel", loading: "LoadingOptions", images: "Images", seed: int) -> "Profile":
    """The profile with all that later commands need to open the model and the images again."""
    from vitq.cli.sources import ImageSource, ModelSource

    sources = {
        "model": ModelSource(source=model.source, digest=model.digest, options=loading),
        "images": ImageSource(source=images.source, digest=images.digest, num_images=images.num_listed, seed=seed),
    }
    return found.model_copy(update={"made_from": found.made_from | {name: source.model_dump() for name, source in sources.items()}})


def _document(found: "Profile", path: str, images: "Images", seconds: float) -> dict[str, object]:
    return {
        "output": path,
        "architecture": found.model.architecture,
        "layers": len(found.layers),
        "parameters": sum(layer.parameters for layer in found.layers),
        "macs": sum(layer.macs for layer in found.layers),
        "total_costs": {name: _total_costs(found, name) for name in found.costs},
        "num_images": images.num_images,
        "skipped": images.skipped,
        "seconds": seconds,
    }


def _total_costs(found: "Profile", metric: str) -> dict[int, float]:
    """The sum over all layers of the costs at each width."""
    table = found.costs[metric]
    return {width: sum(costs[i] for costs in table.tied.values()) for i, width in enumerate(table.bits)}


def _lines(found: "Profile", seconds: float) -> list[str]:
    parameters, macs = (in_units(sum(getattr(layer, name) for layer in found.layers), "") for name in ("parameters", "macs"))
    lines = [f"{found.model.architecture}: {counted(len(found.layers), 'layer')}, {parameters} weights, {macs} MACs an image"]
    for name, table in found.costs.items():
        totals = ", ".join(f"{width} bits {cost:.3g}" for width, cost in _total_costs(found, name).items())
        lines.append(f"{name}, all layers at {totals} ({'nats an image' if table.unit == 'nats' else table.unit})")
    return [*lines, f"took {seconds:.1f} s"]
