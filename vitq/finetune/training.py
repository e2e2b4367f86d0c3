"""How to fine-tune: recipe, length, rates, loss and augmentation."""

from dataclasses import dataclass, field

from vitq.augmented import Augmentation
from vitq.errors import UsageError
from vitq.finetune.distillation import Distillation

RECIPES = ("lsq", "ofq")


@dataclass(frozen=True)
class Training:
    """How to fine-tune.

    `epochs` and `minutes` end the run, whichever is first. `rate` is AdamW's for weights, in steps of their scale a step; `other_rates` is
    what the rates of all else (`learner.RATES`) are multiplied with. `warmup` is the part of the run in which rates rise;
    `decay` is AdamW's weight decay of weights; `clip` the largest norm of each kind's gradients, `ema` the decay of moving averages of
    all variables, which are what is returned; 0: none. `bfloat16` computes products under autocast. State is kept every `save_minutes`.
    """

    recipe: str = "lsq"
    epochs: float = 10.0
    minutes: float | None = None
    rate: float = 0.005
    other_rates: float = 1.0
    batch_size: int = 32
    warmup: float = 0.05
    decay: float = 0.0
    clip: float = 0.0
    ema: float = 0.0
    bfloat16: bool = False
    seed: int = 0
    distillation: Distillation = field(default_factory=Distillation)
    augmentation: Augmentation = field(default_factory=Augmentation)
    save_minutes: float = 5.0
    workers: int = 0

    def check(self) -> None:
        """Raises UsageError for what cannot be trained with."""
        if self.recipe not in RECIPES:
            raise UsageError(f"recipe {self.recipe!r} is not known; give one of {', '.join(RECIPES)}")
        if (
            not self.epochs > 0
            or (self.minutes is not None and not self.minutes > 0)
            or self.batch_size < 1
            or min(self.rate, self.other_rates) < 0
        ):
            minutes = "" if self.minutes is None else f"--max-minutes {self.minutes:g}, "
            given = f"--epochs {self.epochs:g}, {minutes}--batch-size {self.batch_size}"
            rates = f"--lr {self.rate:g} and --other-lrs {self.other_rates:g}"
            raise UsageError(f"{given}, {rates} cannot be trained with; give more than 0, for rates 0 or more")
        if not (0 <= self.warmup < 1 and 0 <= self.ema < 1 and self.decay >= 0 and self.clip >= 0):
            given = f"--warmup {self.warmup:g}, --model-ema-decay {self.ema:g}, --weight-decay {self.decay:g} and --clip-grad {self.clip:g}"
            raise UsageError(f"{given} cannot be trained with; give the first two from 0 to below 1, the others 0 or more")
        weights = self.distillation
        if min(weights.soft, weights.hard) < 0 or weights.soft + weights.hard <= 0 or not weights.temperature > 0:
            given = f"--soft {weights.soft:g}, --hard {weights.hard:g} and --temperature {weights.temperature:g}"
            raise UsageError(f"{given} make no loss; give weights of which one is more than 0, and a temperature above 0")
        self.augmentation.check()
