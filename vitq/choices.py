"""Choices that options have by name, for commands, artifacts and type checkers alike; without imports, so that `--help` answers at once."""

from typing import Literal

LrpRules = Literal["chefer", "epsilon", "gamma", "attnlrp"]
LrpTarget = Literal["pred", "label"]
LrpAggregate = Literal["abs", "positive", "signed"]
SensitivityLoss = Literal["kl", "cross-entropy", "top1"]
FisherLabels = Literal["true", "empirical"]

BASELINES: dict[str, int | None] = {"fp32": None, "w8a8": 8} | {f"uniform {width}": width for width in range(2, 9)}
"""What the other layers run at while a layer's sensitivity is measured: bits, None for float."""
OPSETS = range(21, 26)
"""The opsets of ONNX that can be written: 4-bit initializers came with 21."""
