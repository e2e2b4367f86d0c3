"""Plans judged by measuring them: an audit of what a metric predicts, and LampQ's update of a plan.

measure   a plan's loss for real
audit     the chosen plan, random ones of its budget and the uniform one: predicted against measured
refine    one unit up, one down, kept where the measured loss falls
"""

from vitq.trials.audit import Audit, audit
from vitq.trials.judge import Judge
from vitq.trials.measure import Trials
from vitq.trials.refine import Refinement, layer_errors, refine

__all__ = ["Audit", "Judge", "Refinement", "Trials", "audit", "layer_errors", "refine"]
