"""A heat map of one image: which pixels the relevance of the model's answer comes from.

Relevance starts at one class (a backbone: at the squared norm of its output), is propagated to the pixels (relevance/), summed over
colours and averaged over small squares. Red speaks for the class, blue against it; the stronger, the more opaque over the image in
grey. The strongest square is the scale, so maps of two images cannot be compared by their brightness.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitq.errors import InputError
from vitq.images import read_image, write_png
from vitq.importance.lrp import start_at
from vitq.importance.relevance import RULES, propagate
from vitq.importance.subject import MetricOptions
from vitq.models import LoadedModel
from vitq.rewrites import prepare
from vitq.whole import refuse_existing

_SQUARES = 28  # along the shorter side; smaller squares show the rules' grain more than the image's parts
_SHOWN = 224  # pixels of the shorter side at least: smaller images are enlarged by a whole number
_FOR, _AGAINST = (0.86, 0.08, 0.10), (0.10, 0.25, 0.85)  # red, blue


@dataclass(frozen=True)
class Explanation:
    """What a heat map shows: `heat` (H, W) is the pixels' relevance, at the output sum 1; `label` the class explained, None for a backbone.

    `name` is the class's name where the model knows it; `without_rule` the ops that took the epsilon rule for want of their own.
    """

    heat: Tensor
    label: int | None
    name: str
    without_rule: tuple[str, ...]


def explain(
    model: LoadedModel,
    image: Tensor | str | Path,
    options: MetricOptions | None = None,
    path: str | Path | None = None,
    label: int | None = None,
    device: str = "cpu",
    force: bool = False,
) -> Explanation:
    """Computes the relevance of an image's pixels and writes it as a PNG, laid over the image.

    Args:
        model: a float model.
        image: a picture's file, or a tensor (C, H, W) or (1, C, H, W) preprocessed for the model.
        options: `lrp_rules` and `lrp_target` are read; "label" needs `label`.
        path: the PNG to write; None writes none.
        label: the class to explain; the predicted one when None.
        device: where to compute.
        force: replace a PNG that exists.

    Raises:
        UsageError: the PNG exists already and `force` is not set.
        InputError: the image cannot be read or has another size than the model takes, the class is none of the model's, or the model
            cannot be captured.
    """
    options = options or MetricOptions()
    if path is not None:
        refuse_existing(path, force)
    pixels = _pixels(image, model)
    target = "pred" if label is None and options.lrp_target == "pred" else "label"
    explained = None if label is None else torch.tensor([label])
    start = partial(start_at, labels=explained, num_classes=model.num_classes, target=target)
    graph, _ = prepare(model, device)
    found = propagate(graph, pixels, start, RULES[options.lrp_rules])
    heat = found.pixels[0].sum(0).cpu()
    if path is not None:
        write_png(overlay(pixels[0], heat, model), path, force)
    shown = label if label is not None or model.num_classes == 0 else int(found.output.argmax())
    name = model.label_names[shown] if shown is not None and model.label_names else ""
    return Explanation(heat, shown, name, tuple(sorted(found.without_rule)))


def overlay(image: Tensor, heat: Tensor, model: LoadedModel) -> np.ndarray:
    """The heat over the image in grey: uint8 (H, W, 3), small images enlarged.

    Args:
        image: (C, H, W), preprocessed.
        heat: (H, W), of any scale.
        model: whose preprocessing is undone.
    """
    mean, std = (torch.tensor(model.data_config[name], dtype=torch.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
    grey = (image.cpu() * std + mean).clamp(0, 1).mean(0)
    smooth = smoothed(heat)
    strength = (smooth / smooth.abs().max().clamp(min=1e-30)).clamp(-1, 1)
    opacity = strength.abs().sqrt()[..., None]
    colour = torch.where(strength[..., None] > 0, torch.tensor(_FOR), torch.tensor(_AGAINST))
    picture = (1 - opacity) * grey[..., None] + opacity * colour
    enlarged = max(1, -(-_SHOWN // min(heat.shape)))
    return (255 * picture).round().to(torch.uint8).numpy().repeat(enlarged, 0).repeat(enlarged, 1)


def smoothed(heat: Tensor) -> Tensor:
    """The mean over the square around each pixel, of a side that is odd and about 1/28 of the image's; less at the borders."""
    side = max(1, min(heat.shape) // _SQUARES) // 2 * 2 + 1
    return torch.nn.functional.avg_pool2d(heat[None, None], side, 1, side // 2, count_include_pad=False)[0, 0]


def _pixels(image: Tensor | str | Path, model: LoadedModel) -> Tensor:
    """(1, C, H, W), as the model takes it."""
    wanted = tuple(model.data_config["input_size"])
    if not isinstance(image, Tensor):
        return read_image(Path(image), model.data_config)[None]
    single = image[None] if image.dim() == 3 else image
    if single.shape != (1, *wanted):
        raise InputError(f"the image is {tuple(image.shape)}; the model takes one of {wanted}: preprocess it, or give its file")
    return single.float()
