"""`vitq allocate`: the cheapest plan that the budgets allow, into plan.json."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vitq.artifacts import Profile, load_profile, refuse_existing, save, write_whole
from vitq.cli import options
from vitq.cli.chain import PLAN, PROFILE, digest_of, in_folder, output_path, run_folder
from vitq.cli.layer_table import plan_table
from vitq.cli.terminal import Terminal, in_units
from vitq.errors import UsageError


def allocate(
    profile: Annotated[Path | None, typer.Argument(help="A profile. (default: profile.json in the run folder)")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", help="Average bits 4.0 or 4.0/8.0, size=3.2MB, bops=1.5G, like=4; repeatable, all must hold."),
    ] = None,
    uniform: Annotated[str | None, typer.Option("--uniform", help="4 or 4/8: no search, every searched layer the same.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="The costs to minimise. (default: the profile's first)")] = None,
    bits: Annotated[str | None, typer.Option("--bits", help="Candidate widths, such as 3,4,5. (default: all that have costs)")] = None,
    bits_apart: Annotated[bool, typer.Option("--bits-apart", help="Choose weight and activation widths separately.")] = False,
    objective: Annotated[
        str | None, typer.Option("--objective", help="sum, gamma (LampQ), mix-qvit or pairwise (CLADO). (default: the preset's, or sum)")
    ] = None,
    gamma: Annotated[
        float | None, typer.Option("--gamma", help="By how much a bit divides the cost in --objective gamma. (default: 4)")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="lampq, mix-qvit or lrp-qvit: a paper's metric, objective and candidate bits.")
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
    seed: options.UnusedSeed = None,
    device: options.UnusedDevice = "cpu",
    run_dir: options.RunDir = None,
    output: options.Output = None,
    force: options.Force = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Choose the bits of every layer within a budget."""
    terminal = Terminal(quiet, verbose, as_json)
    folder = run_folder(run_dir, profile)
    alone = pareto is not None and not budget and uniform is None
    path = output_path(output, folder, PLAN, force or alone)
    widths = options.parse_bits(bits)
    found = load_profile(profile or folder / PROFILE)
    from vitq.allocation import allocate as choose

    wanted = {"metric": metric, "bits": widths, "bits_apart": bits_apart, "fixed": fixed or (), "objective": objective, "gamma": gamma}
    wanted["preset"] = preset
    if pareto is not None:
        staircase, lines = _write_staircase(pareto, found, wanted, force)
        if alone:
            terminal.result(staircase, *lines)
            return
        terminal.note("\n".join(lines))
    chosen = choose(found, budget or (), uniform=uniform, gap=gap, **wanted)
    plan = chosen.plan.model_copy(update={"made_from": chosen.plan.made_from | {"profile": digest_of(found)}})
    save(plan, path, force)
    unit = found.costs[plan.made_from["allocation"]["metric"]].unit
    table = [plan_table(plan, found.layers)] if verbose else []
    terminal.result(chosen.report, *table, *_lines(chosen.report, unit), f"wrote {path}")
    terminal.next(in_folder("vitq calibrate", path, PLAN))


def _write_staircase(path: Path, profile: Profile, wanted: dict[str, Any], force: bool) -> tuple[dict[str, Any], list[str]]:
    """Writes the staircase and its picture; (the staircase, what to say)."""
    from vitq.allocation import as_json, draw, pareto

    if path.suffix != ".json":
        raise UsageError(f"--pareto {path}: the staircase is JSON; give a name that ends in .json, its plot lands beside it as .svg")
    picture = path.with_suffix(".svg")
    for file in (path, picture):
        refuse_existing(file, force)
    staircase = pareto(profile, **wanted)
    drawn = draw(staircase, "svg")
    write_whole(path, lambda temporary: temporary.write_text(as_json(staircase), encoding="utf-8"))
    write_whole(picture, lambda temporary: temporary.write_bytes(drawn))
    plans = staircase["plans"]
    ends = f"{plans[0]['budget']:g} bits +{plans[0]['objective']:.4g} to {plans[-1]['budget']:g} bits +{plans[-1]['objective']:.4g}"
    return staircase, [f"{len(plans)} plans, {ends}", f"wrote {path} and {picture}"]


def _lines(report: dict[str, Any], unit: str) -> list[str]:
    relative = report["relative_to_uniform"]
    level = f"uniform {relative['weight_bits']:.4g}/{relative['activation_bits']:.4g}"
    size, bops = (f"{relative[key]:.3f} of {level}" if relative[key] is not None else "" for key in ("size", "bops"))
    nats = "nats an image" if unit == "nats" else unit
    return [
        f"average bits  {_bits(report['average_weight_bits'])} weights, {_bits(report['average_activation_bits'])} activations"
        f" (with fixed layers {_bits(report['average_weight_bits_all'])}, {_bits(report['average_activation_bits_all'])})",
        f"size          {in_units(report['size_bytes'], 'B')}, {size}",
        f"BitOps        {in_units(report['bops'], '')}, {bops}",
        f"loss          +{report['objective']:.4g} predicted ({nats}), gap {report['gap']:.2g}, {report['status']}",
        *(f"{price['quantity']:<14}{price['text']}" for price in report["shadow_prices"]),
    ]


def _bits(average: float | None) -> str:
    return "-" if average is None else f"{average:.3f}"
