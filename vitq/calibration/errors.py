"""What a block that is learned should make small: the error of its output y, or that of the network's output.

    sum_i w_i (y^_i - y_i)^2 / 2,        w_i = E[g_i^2]                      g: the gradient of the probe at y (vitq/gradients.py)

is the second-order expansion of the loss with the diagonal of the Fisher information, as in BRECQ (Li et al., ICLR 2021).
Differs from the paper: the expectation is taken over the images, so w is one number for each position and channel; the true Fisher of
the float network, not squared gradients of the quantized one's loss. With w of each image it did no better than with none, and with
the whole inner product of an image, mean over four probes of (g . d)^2 / 2, as FIMA-Q's low rank part has it, much worse on other images:
a network is sure of the images it was trained on, few of them have gradients to speak of, and those few are learned by heart.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vitq.calibration.streams import Stream, Values
from vitq.gradients import probe_for

_IMAGES = 512  # that the expectation is taken over, at most


def block_error(found: Values, images: Tensor, wanted: Stream, weights: Mapping[str, Tensor]) -> Tensor:
    """The error of a block's outputs, summed over them, the mean over images.

    Args:
        found: the outputs by node name.
        images: their numbers.
        wanted: the float block's outputs.
        weights: w of an output, as one image has it; 1 where there is none.
    """
    total = torch.zeros(())
    target = wanted.read(images)
    for name, value in found.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            squares = (value - target[name]).square().reshape(len(images), -1, *value.shape[1:])
            total = total + (squares * weights[name] if name in weights else squares).sum() / (2 * len(images))
    return total


def output_error(
    found: Values, images: Tensor, rest: Callable[[Values], Values], wanted: Stream, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The mean loss of the network's output, with what follows the block float."""
    return loss_of(wanted.read(images)["output"], rest(found)["output"]).mean()


def weights_of_errors(values: Stream, rest: Callable[[Values], Values], num_classes: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The weights w of every floating point tensor at a cut of the float network, as one image has it."""
    probe, sums = probe_for(num_classes), dict[str, Tensor]()
    batches = list(values.batches())[: max(1, _IMAGES // values.batch_size)]
    for images in batches:
        alive = values.read(images)
        tensors = {name: value.requires_grad_() for name, value in alive.items() if isinstance(value, Tensor) and value.is_floating_point()}
        with torch.enable_grad():
            scalar = probe(rest(alive | tensors)["output"], generator).sum()
        gradients = torch.autograd.grad(scalar, list(tensors.values()), allow_unused=True)
        for name, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None:
                squares = gradient.square().reshape(len(images), -1, *gradient.shape[1:]).sum(0)
                sums[name] = sums[name] + squares if name in sums else squares
    return {name: total / sum(map(len, batches)) for name, total in sums.items()}
