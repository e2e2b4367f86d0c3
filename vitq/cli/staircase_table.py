"""A staircase of plans, as `vitq allocate --pareto` writes it, as a table: a line a plan, those of equal bits below."""

from typing import TYPE_CHECKING

from vitq.units import in_units

if TYPE_CHECKING:
    from rich.table import Table

    from vitq.artifacts import Staircase


def staircase_table(staircase: "Staircase") -> "Table":
    """What each average of bits allows, and what the plan there comes to."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("budget")
    for title in ("weights", "activations", "size", "BitOps", staircase.unit, "gap"):
        table.add_column(title, justify="right", no_wrap=True)
    for word, steps in (("", staircase.plans), ("uniform ", staircase.uniform)):
        for step in steps:
            averages = ("-" if bits is None else f"{bits:.2f}" for bits in (step.average_weight_bits, step.average_activation_bits))
            gap = "-" if step.gap is None else f"{step.gap:.1g}"
            sizes = in_units(step.size_bytes, "B"), in_units(step.bops, "")
            table.add_row(f"{word}{step.budget:g}", *averages, *sizes, f"{step.objective:.4g}", gap)
    return table
