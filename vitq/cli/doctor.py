"""`vitq doctor`: versions, the processor's features, and which storage forms and patterns run as integer kernels here."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitq.cli import options
from vitq.cli.bench import usable_cores
from vitq.cli.chain import output_path
from vitq.cli.terminal import Terminal, json_text
from vitq.processor import Processor, processor

if TYPE_CHECKING:
    from rich.table import Table

    from vitq.doctor import Form


def doctor(
    seed: options.UnusedSeed = None,
    device: options.UnusedDevice = "cpu",
    run_dir: Annotated[Path | None, typer.Option("--run-dir", hidden=True)] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Also write the JSON document to this file.")] = None,
    force: options.Force = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Tell what this machine and this onnxruntime run fast, by trying it."""
    terminal = Terminal(quiet, verbose, as_json)
    if output is not None:
        output_path(output, Path(), "", force)
    terminal.note("doctor: a tiny transformer in every form ...")
    from vitq.doctor import PATTERNS, try_forms, versions
    from vitq.whole import write_whole

    with terminal.waiting("try every form"):
        forms, machine = try_forms(), processor()
    remarks = _remarks(forms, machine)
    document = {
        "versions": {"python": platform.python_version()} | versions(),
        "system": platform.platform(),
        "processor": asdict(machine) | {"cores": usable_cores()},
        "forms": [asdict(form) | {"fast": form.fast} for form in forms],
        "patterns": _patterns(forms, PATTERNS),
        "remarks": remarks,
    }
    if output is not None:
        write_whole(output, lambda temporary: temporary.write_text(json_text(document), encoding="utf-8"))
    features = "not known" if machine.features is None else ", ".join(machine.features) or "none of those that matter"
    named = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    lines = [f"versions   {named}", f"system     {document['system']}"]
    lines += [f"processor  {machine.name or machine.architecture}, {usable_cores()} cores; {features}"]
    terminal.result(document, *lines, *_tables(forms, document["patterns"]), *remarks)
    terminal.next("vitq demo")


def _patterns(forms: "Sequence[Form]", named: dict[str, str]) -> list[dict[str, Any]]:
    """A row a pattern: the kernel that it runs as at 8 bits, and with activations below."""
    whole = next(form for form in forms if form.storage == "packed" and form.weight_bits == 8)
    narrow = next(form for form in forms if form.activation_bits < 8)
    return [
        {"pattern": pattern, "kernel": whole.kernels[layer], "kernel_below_8_bits": narrow.kernels[layer]}
        for layer, pattern in named.items()
    ]


def _remarks(forms: "Sequence[Form]", machine: Processor) -> list[str]:
    """What follows from it, a line each."""
    found = []
    if all(form.fast for form in forms if form.storage != "standard"):
        found.append("storage packed and fast run as integer kernels here at every width, and compute what was calibrated")
    for form in forms:
        name = f"--storage {form.storage} at {form.weight_bits} bits, activations {form.activation_bits}"
        if form.fault is not None:
            found.append(f"{name}: {form.fault}")
        elif not form.fast:
            found.append(f"{name}: {', '.join(form.not_fused)} run in float")
    if machine.adds_in_32_bits is False:
        found.append("no instructions for sums of 8-bit products (VNNI and the like): results are the same, the gain in speed is smaller")
    return found


def _tables(forms: "Sequence[Form]", patterns: Sequence[dict[str, Any]]) -> "list[Table]":
    from rich.table import Table

    tried = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in ("storage", "weight bits", "activation bits", "integer kernels", "verified"):
        tried.add_column(title)
    for form in forms:
        fused = "-" if form.fault else "all" if form.fast else f"all but {len(form.not_fused)}"
        tried.add_row(form.storage, str(form.weight_bits), str(form.activation_bits), fused, "no" if form.fault else "yes")
    kernels = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in ("pattern", "kernel", "below 8 bits"):
        kernels.add_column(title)
    for row in patterns:
        kernels.add_row(row["pattern"], row["kernel"], row["kernel_below_8_bits"])
    return [tried, kernels]
