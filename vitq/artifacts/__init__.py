"""The values that travel between the stages, and their JSON: layers, cost tables, the profile, the plan, the staircase.

Nothing here needs torch, so a profile can be read and a plan be made anywhere. What is read from a file is validated once, here,
completely; the stages trust it. `made_from` says what made an artifact (sources, digests, versions): it is stored, never compared.
"""

from vitq.artifacts.json_file import dump, load_artifact, load_plan, load_profile, load_staircase, save
from vitq.artifacts.layers import WIDTHS, Bits, Layer, ModelSpec, Operand, Operation, Role, Value
from vitq.artifacts.plan import BitPlan, LayerBits, Staircase, Step
from vitq.artifacts.profile import CostTable, MetricOptions, PairCost, Profile

__all__ = [
    "WIDTHS",
    "BitPlan",
    "Bits",
    "CostTable",
    "Layer",
    "LayerBits",
    "MetricOptions",
    "ModelSpec",
    "Operand",
    "Operation",
    "PairCost",
    "Profile",
    "Role",
    "Staircase",
    "Step",
    "Value",
    "dump",
    "load_artifact",
    "load_plan",
    "load_profile",
    "load_staircase",
    "save",
]
