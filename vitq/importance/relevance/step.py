"""One op of the graph with its values, as a rule sees it, and the three things that all rules are made of.

A *rule* takes a Step and the relevance of its output and returns the relevance of each of its inputs. Inputs are the values that depend
on the image; parameters and folded constants are none: what a rule gives to them is absorbed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-6
"""The stabiliser of the epsilon rules, added to a denominator with its sign."""


@dataclass(frozen=True)
class Step:
    """An op and its values.

    `op(*arguments, **keywords)` made `output`, a tensor or several. `inputs` are the tensors among the arguments that carry relevance, in
    the order in which they are read (one that is read twice stands there twice), and `places` the index in `arguments` of each.
    `compute(*inputs)` runs the op on other values of the inputs. `images` is the size of the batch and `image_axis` the axis of the
    output that counts images (times windows, heads, ...), None where no axis does. `on_pixels`: what it reads is the image itself.
    """

    name: str
    op: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    places: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    output: Any
    compute: Callable[..., Any]
    images: int
    image_axis: int | None
    on_pixels: bool

    def vjp(self, cotangent: Any) -> list[Tensor]:
        """The vector-Jacobian product at the inputs; zeros where an input has no part in the output's values."""
        return vjp(self.compute, self.inputs, cotangent)


Rule = Callable[[Step, Any], Sequence[Tensor]]
"""From a step and its output's relevance (a tuple where the output is one) to the relevance of each of the step's inputs."""

Rules = dict[Any, Rule]
"""The rule of each ATen op."""


def vjp(compute: Callable[..., Any], inputs: Sequence[Tensor], cotangent: Any) -> list[Tensor]:
    """The vector-Jacobian product of `compute` at `inputs`."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        output = compute(*leaves)
        several = isinstance(output, list | tuple)
        pairs = zip(output, cotangent, strict=True) if several else [(output, cotangent)]
        reached = [(y, c) for y, c in pairs if y.requires_grad]
        if not reached:
            return [torch.zeros_like(x) for x in inputs]
        outputs, cotangents = zip(*reached, strict=True)
        return list(torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True))


def ratio(relevance: Tensor, denominator: Tensor, epsilon: float = EPSILON) -> Tensor:
    """R / (z + epsilon sign z), and 0 where z is 0."""
    return (relevance / (denominator + epsilon * denominator.sign())).masked_fill(denominator == 0, 0.0)


def times(x: Tensor, gradient: Tensor) -> Tensor:
    """Their product; an infinite x (a mask's) carries no relevance."""
    return (x * gradient).masked_fill(x.isinf(), 0.0)


def sum_per_image(values: Tensor, images: int, axis: int | None) -> Tensor:
    """The sum over each image's part, (images,), of a tensor whose `axis` counts images; (1,), over all, where `axis` is None."""
    return values.sum().reshape(1) if axis is None else values.movedim(axis, 0).reshape(images, -1).sum(1)


def spread_per_image(values: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """One number an image (images,), so shaped that it can be multiplied with `like`, whose `axis` counts images."""
    if axis is None:
        return values.reshape([1] * like.dim())
    rows = values.repeat_interleave(like.shape[axis] // len(values))
    return rows.reshape([-1 if index == axis else 1 for index in range(like.dim())])


def image_axis(shape: Sequence[int], one_image: Sequence[int], images: int) -> int | None:
    """The axis of a value of a batch that counts images, given the shape that one image's has; None where no axis does."""
    if images == 1:
        return 0 if shape else None
    return next((axis for axis, (now, one) in enumerate(zip(shape, one_image, strict=True)) if now == images * one), None)


@dataclass(frozen=True)
class Linear:
    """A product seen as linear in the input x that carries relevance: `apply(x, weight)` is the output without the bias."""

    x: Tensor
    weight: Tensor
    apply: Callable[[Tensor, Tensor], Tensor]

    def back(self, s: Tensor, weight: Tensor) -> Tensor:
        """W^T s, for another weight of the same shape."""
        (gradient,) = vjp(lambda x: self.apply(x, weight), [self.x], s)
        return gradient


def linear_in_input(step: Step) -> Linear:
    """A linear, convolution or product of two matrices whose other factor carries no relevance."""
    (place,) = step.places
    rest = (None, *step.arguments[3:]) if len(step.arguments) > 2 else ()
    keywords = {name: value for name, value in step.keywords.items() if name != "bias"}

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        factors = (x, weight) if place == 0 else (weight, x)
        return step.op(*factors, *rest, **keywords)

    return Linear(step.arguments[place], step.arguments[1 - place], apply)
