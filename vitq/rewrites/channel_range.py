"""What rewrites that rescale channels need to know of a value."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ChannelRange:
    """The range of each channel of a value on the images: `low` and `high`, float32 (C,)."""

    low: Tensor
    high: Tensor
