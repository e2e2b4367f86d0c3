"""Which layer gets how many bits: the cheapest plan that the budgets allow, with a certificate.

    profile ─ settle (fixed layers, shared tensors) ─ choice tree ─┐
    --metric ─ cost table ─ objective (prices) ────────────────────┼─ solver ─ plan + report (proof, shadow prices)
    --budget ─ sums of exact integers with limits ─────────────────┘

Needs no torch, so that a plan can be made anywhere.
"""

from vitq.allocation.allocate import Allocation, Wishes, allocate, lay_out
from vitq.allocation.binding import binding_latency
from vitq.allocation.pareto import as_json, draw, pareto

__all__ = ["Allocation", "Wishes", "allocate", "as_json", "binding_latency", "draw", "lay_out", "pareto"]
