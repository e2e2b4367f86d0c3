"""Choices that options have by name, for commands, artifacts and type checkers alike; without imports, so that `--help` answers at once."""

from typing import Literal

LrpRules = Literal["chefer", "epsilon", "gamma", "attnlrp"]
LrpTarget = Literal["pred", "label"]
LrpAggregate = Literal["abs", "positive", "signed"]
SensitivityLoss = Literal["kl", "cross-entropy", "top1"]
FisherLabels = Literal["true", "empirical"]
