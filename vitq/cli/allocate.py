"""`vitq allocate`: the cheapest plan that the budgets allow, into plan.json."""

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitq.cli import completion, options
from vitq.cli.bit_map import plan_map
from vitq.cli.chain import Memory, Reading, digest_of, output_path, refuse_missing_sources, run_folder
from vitq.cli.layer_table import plan_table
from vitq.cli.terminal import Terminal
from vitq.commands import LATENCY, PLAN, PROFILE, in_folder, writing
from vitq.errors import UsageError
from vitq.units import counted, in_units

if TYPE_CHECKING:
    from rich.table import Table

    from vitq.allocation import Wishes
    from vitq.allocation.allocate import Search
    from vitq.artifacts import BitPlan, Profile
    from vitq.trials import Audit, Judge, Refinement
    from vitq.trials.refine import Errors

_BUDGET = re.compile(r"[\d.]+(/[\d.]+)?|(size|bops|like|latency)=.*")
_AUDITED = 1000  # held-out images: on 256, plans of one budget keep their order less well than the metric predicts it (docs/log.md)


def allocate(
    profile: Annotated[Path | None, typer.Argument(help="A profile. (default: profile.json in the run folder)")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", help="Average bits 4.0 or 4.0/8.0, size=3.2MB, bops=1.5G, like=4, latency=4.0ms; repeatable."),
    ] = None,
    uniform: Annotated[str | None, typer.Option("--uniform", help="4 or 4/8: no search, every searched layer the same.")] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", autocompletion=completion.metrics, help="The costs to minimise. (default: the profile's first)"),
    ] = None,
    bits: Annotated[str | None, typer.Option("--bits", help="Candidate widths, such as 3,4,5. (default: all that have costs)")] = None,
    bits_apart: Annotated[bool, typer.Option("--bits-apart", help="Choose weight and activation widths separately.")] = False,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            autocompletion=completion.objectives,
            help="sum, gamma (LampQ), mix-qvit or pairwise (CLADO). (default: the preset's, or sum)",
        ),
    ] = None,
    gamma: Annotated[
        float | None, typer.Option("--gamma", help="By how much a bit divides the cost in --objective gamma. (default: 4)")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            autocompletion=completion.presets,
            help="lampq, mix-qvit or lrp-qvit: a paper's metric, objective and candidate bits.",
        ),
    ] = None,
    gap: Annotated[
        float | None,
        typer.Option("--gap", min=0.0, help="Relative gap at which to stop, however long it takes. (default: 0, unless that is much work)"),
    ] = None,
    pareto: Annotated[
        Path | None, typer.Option("--pareto", help="Also write the best plan at every average of bits here, .json, and a plot beside it.")
    ] = None,
    fixed: Annotated[
        list[str] | None,
        typer.Option("--fixed", help="'GLOB=8' or 'GLOB=4/8': layers that keep these bits; repeatable. Patch embedding and head: 8."),
    ] = None,
    paper_parity: Annotated[
        bool,
        typer.Option("--paper-parity", help="Head and patch embedding at the plan's bits, the image at 8, as papers do."),
    ] = False,
    latency_table: Annotated[
        Path | None,
        typer.Option("--latency-table", help="Measured latencies, by `vitq bench --layers`. (default: latency.json in the run folder)"),
    ] = None,
    refine: Annotated[bool, typer.Option("--refine", help="LampQ's update: bits move in pairs while the measured loss falls.")] = False,
    audit: Annotated[
        int, typer.Option("--audit", min=0, help="Measure the plan, so many random ones of its budget and the uniform one.")
    ] = 0,
    held_out: Annotated[
        int | None,
        typer.Option(
            "--held-out", min=1, help="Images that plans are measured on. (default: 1000 for --audit, else as many as they are fitted to)"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", autocompletion=completion.models, help="The float model, to measure with. (default: the one that was profiled)"
        ),
    ] = None,
    images: options.RememberedImages = None,
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
    """Choose the bits of every layer within a budget."""
    terminal = Terminal(quiet, verbose, as_json)
    if (refine or audit) and not budget:
        raise UsageError("--refine and --audit measure plans of one budget, and none was given; give --budget 4.0, or leave them out")
    to_measure = {"--held-out": held_out, "--model": model, "--images": images, "--num-images": num_images}
    if not (refine or audit) and (given := [name for name, value in to_measure.items() if value is not None]):
        raise UsageError(
            f"{' and '.join(given)} would change nothing: plans are measured by --audit N and --refine; give one, or leave it out"
        )
    if profile is not None and _BUDGET.fullmatch(str(profile)) and not profile.exists():
        raise UsageError(f"{profile} is no profile; if it is a budget, type `vitq allocate --budget {shlex.quote(str(profile))}`")
    refuse_missing_sources(model, images)
    folder = run_folder(run_dir, profile)
    alone = pareto is not None and not budget and uniform is None
    if alone and output is not None:
        raise UsageError(f"-o {output} is for the plan, and --pareto alone makes none; give --budget 4.0 too, or leave -o out")
    from vitq.artifacts import load_profile, save
    from vitq.latency import MADE_BY, load_latency_table

    found = load_profile(profile or folder / PROFILE)
    limited = any(text.strip().startswith("latency=") for text in budget or ())
    timed = latency_table or folder / LATENCY
    latencies = load_latency_table(timed) if limited or latency_table else None
    if latencies is not None:
        latencies.check(found.layers, found.model.graph_digest, writing(MADE_BY, timed))
    path = output_path(output, folder, PLAN, force or alone)
    from vitq.allocation import Wishes, lay_out
    from vitq.allocation import allocate as choose

    wishes = Wishes(metric, options.parse_bits(bits), bits_apart, tuple(fixed or ()), paper_parity, objective, gamma, preset)
    if pareto is not None:
        staircase, lines = _write_staircase(pareto, found, wishes, gap, force, terminal)
        if alone:
            terminal.result(staircase, *lines)
            terminal.next(in_folder("vitq allocate --budget 4.0", profile or folder / PROFILE, PROFILE))
            return
        terminal.note("\n".join(lines))
    with terminal.waiting("allocate"):
        chosen = choose(found, budget or (), uniform=uniform, gap=gap, latencies=latencies, **vars(wishes))
    measured: list[Any] = []
    if refine or audit:
        reading = Reading(images, num_images, seed, batch_size, workers)
        memory = Memory(found.made_from, profile or folder / PROFILE)
        search = lay_out(found, wishes, budget or (), latencies=latencies)
        number = held_out or (_AUDITED if audit else None)
        with _counting(terminal, refine, audit) as count:
            judge, errors = _judge(search, budget or (), memory, model, reading, number, device, terminal, count)
            if refine:
                chosen, steps = judge.refined(chosen, errors())
                measured += refinement_lines(steps)
            if audit:
                audited = judge.audited(chosen, audit, seed or 0)
                chosen = replace(chosen, report=chosen.report | {"audit": vars(audited) | {"ratio": audited.ratio}})
                measured.append(audit_table(audited))
    plan = chosen.plan.model_copy(update={"made_from": chosen.plan.made_from | {"profile": digest_of(found)}})
    save(plan, path, force)
    unit = found.costs[plan.made_from["allocation"]["metric"]].unit
    table = [plan_table(plan, found.layers)] if verbose else [] if quiet else plan_map(plan, found.layers)
    terminal.result(chosen.report, *measured, *_lines(chosen.report, unit), *table, f"wrote {path}")
    if budget and all(entry.name in plan.fixed for entry in plan.layers):
        terminal.note("every layer is fixed, so there was nothing to buy: averages are of the layers that are not")
    same = None if uniform is not None else _no_choice(plan, found.costs[plan.made_from["allocation"]["metric"]].bits)
    if same is not None and same[0] == same[1]:
        terminal.note(f"the budget leaves no choice: every searched layer gets {same[0]} bits, the fewest; more than that is a choice")
    elif same is not None:
        terminal.note(f"the budget does not bind: every searched layer gets {same[0]} bits, the most; less than that is a choice")
    terminal.next(in_folder("vitq calibrate", path, PLAN))


def _no_choice(plan: "BitPlan", priced: Sequence[int]) -> tuple[int, int] | None:
    """(The bits of every searched layer, the fewest) where all have the fewest, or all the most, that were to be chosen from."""
    bits = plan.made_from["allocation"].get("bits") or priced
    searched = [entry for entry in plan.layers if entry.name not in plan.fixed]
    widths = {bits for entry in searched for bits in (entry.weight_bits, entry.activation_bits) if bits is not None}
    return (widths.pop(), min(bits)) if widths in ({min(bits)}, {max(bits)}) else None


@contextmanager
def _counting(terminal: Terminal, refine: bool, audit: int) -> Iterator[Callable[[], None]]:
    """Gives what is to be called before each plan that is measured: the chosen one, those tried, random ones and the uniform one."""
    from vitq.trials.refine import MOST_STEPS

    most = (1 + MOST_STEPS if refine else 0) + (audit + 2 if audit else 0)
    done = count()
    with terminal.working("measure", f"{counted(most, 'plan')} at most") as progress:
        yield lambda: progress(next(done), most, "plans")


def _judge(
    search: "Search",
    budgets: Sequence[str],
    memory: Memory,
    model: str | None,
    reading: Reading,
    num_held_out: int | None,
    device: str,
    terminal: Terminal,
    told: Callable[[], None],
) -> "tuple[Judge, Callable[[], Errors]]":
    """What plans are measured with: quantizers fitted to the profile's images, losses on others of the same source where it has others."""
    options.usable_device(device)
    from vitq.trials import Judge, Trials, layer_errors

    loaded = memory.model(model, "--model")
    fitting, source = memory.images(reading, loaded.data_config, loaded.label_names)
    held_out, _ = memory.images(
        replace(reading, num_images=num_held_out or reading.num_images, seed=source.seed + 1), loaded.data_config, loaded.label_names
    )
    terminal.note(f"measuring plans on {counted(held_out.num_listed, 'image')} ...")
    trials = Trials.of(loaded, fitting, held_out, device)

    def losses(plan: "BitPlan") -> list[float]:
        told()
        return trials.losses(plan)

    judge = Judge(search, budgets, losses)
    return judge, lambda: layer_errors(trials.graph, trials.histograms, trials.covariances, fitting, search.candidates)


def refinement_lines(found: "Refinement") -> list[str]:
    """What the update tried, and what it came to."""
    kept = sum(step.kept for step in found.steps)
    lines = [f"{'kept' if step.kept else 'left'}  {step.up} up, {step.down} down: loss {step.loss:.4g}" for step in found.steps]
    return [
        *lines,
        f"measured      {found.start:.4g} before and {found.loss:.4g} after {counted(kept, 'pair')} kept",
        *(["price         none: shadow prices are those of the plan before, which was the best predicted"] if kept else []),
    ]


def audit_table(found: "Audit") -> "Table":
    """A row a plan: what it was predicted to cost and what it measured."""
    order = "no rank correlation" if found.correlation is None else f"rank correlation {found.correlation:.3f}"
    again = "" if found.repeatability is None else f", of one half of the images with the other {found.repeatability:.3f}"
    from rich.table import Table

    table = Table(title=f"audit: {order} over {counted(found.compared, 'plan')} of this budget{again}", box=None)
    for name in ("plan", "predicted", "measured"):
        table.add_column(name, justify="left" if name == "plan" else "right")
    for name, predicted, measured in zip(found.names, found.predicted, found.measured, strict=True):
        table.add_row(name, f"{predicted:.4g}", f"{measured:.4g}")
    return table


def _write_staircase(
    path: Path, profile: "Profile", wishes: "Wishes", gap: float | None, force: bool, terminal: Terminal
) -> tuple[dict[str, Any], list[str]]:
    """Writes the staircase and its picture; (the staircase, what to say)."""
    from vitq.allocation import as_json, draw, pareto
    from vitq.whole import refuse_existing, write_whole

    if path.suffix != ".json":
        raise UsageError(f"--pareto {path}: the staircase is JSON; give a name that ends in .json, its plot lands beside it as .svg")
    picture = path.with_suffix(".svg")
    for file in (path, picture):
        refuse_existing(file, force)
    with terminal.working("staircase", "a plan at every tenth of a bit") as progress:
        staircase = pareto(profile, wishes, gap, progress)
    write_whole(path, lambda temporary: temporary.write_text(as_json(staircase), encoding="utf-8"))
    try:
        drawn = draw(staircase, "svg")
        write_whole(picture, lambda temporary: temporary.write_bytes(drawn))
        written = f"wrote {path} and {picture}"
    except UsageError as error:  # the plot needs a library that not everybody has
        written = f"wrote {path}; no plot: {error}"
    plans = staircase["plans"]
    ends = f"{plans[0]['budget']:g} bits +{plans[0]['objective']:.4g} to {plans[-1]['budget']:g} bits +{plans[-1]['objective']:.4g}"
    return staircase, [f"{counted(len(plans), 'plan')}, {ends}", written]


def _lines(report: dict[str, Any], unit: str) -> list[str]:
    relative = report["relative_to_uniform"]
    level = f"uniform {relative['weight_bits']:.4g}/{relative['activation_bits']:.4g}"
    size, bops = (f"{relative[key]:.3f} of {level}" if relative[key] is not None else "" for key in ("size", "bops"))
    nats = "nats an image" if unit == "nats" else unit
    elsewhere = f", +{report['predicted']:.4g} expected on other images" if report["predicted"] != report["objective"] else ""
    return [
        f"average bits  {_bits(report['average_weight_bits'])} weights, {_bits(report['average_activation_bits'])} activations"
        f" (with fixed layers {_bits(report['average_weight_bits_all'])}, {_bits(report['average_activation_bits_all'])})",
        f"size          {in_units(report['size_bytes'], 'B')}, {size}",
        f"BitOps        {in_units(report['bops'], '')}, {bops}",
        *([f"latency       {report['latency_ms']:.4g} ms predicted"] if "latency_ms" in report else []),
        f"loss          +{report['objective']:.4g} predicted{elsewhere} ({nats}), gap {report['gap']:.2g}, {report['status']}",
        *(f"{'price':<14}{price['quantity']}: {price['text']}" for price in report["shadow_prices"]),
    ]


def _bits(average: float | None) -> str:
    return "-" if average is None else f"{average:.3f}"
