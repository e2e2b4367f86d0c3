"""Recipes: from a plan and images to a calibrated checkpoint. One file each, one line of `RECIPES` each."""

from collections.abc import Callable
from dataclasses import replace

from vitq.artifacts import BitPlan
from vitq.calibration.fast import calibrate_fast
from vitq.checkpoint import Checkpoint
from vitq.errors import InputError, UsageError
from vitq.images import Images
from vitq.models import LoadedModel
from vitq.rewrites import prepare

__all__ = ["RECIPES", "calibrate"]

RECIPES: dict[str, Callable[..., Checkpoint]] = {"fast": calibrate_fast}


def calibrate(
    model: LoadedModel, plan: BitPlan, images: Images, recipe: str = "fast", device: str = "cpu", symmetric: bool = False
) -> Checkpoint:
    """Fits the quantizers of a plan to a model.

    Args:
        model: the float model that the plan was made for.
        plan: bits of every layer.
        images: calibration images, preprocessed for the model.
        recipe: a name in `RECIPES`.
        device: where to compute.
        symmetric: weights without zero points, which `--storage standard` needs; costs accuracy below 7 bits.

    Raises:
        UsageError: an unknown recipe.
        InputError: the plan is for another model or graph, or the images cannot be used.
    """
    if recipe not in RECIPES:
        raise UsageError(f"recipe {recipe!r} is not known; give one of {', '.join(RECIPES)}")
    graph, spec = prepare(model, device)
    if spec.graph_digest != plan.model.graph_digest:
        raise InputError(
            f"the plan is for {plan.model.architecture}, whose graph differs from that of {model.source} ({spec.architecture}); "
            "run `vitq profile` again for this model with this torch and timm"
        )
    checkpoint = RECIPES[recipe](graph, plan, images, symmetric=symmetric)
    calibrated_on = {"source": images.source, "digest": images.digest, "num_images": images.num_listed}
    calibration = {"recipe": recipe, "images": calibrated_on} | ({"symmetric": True} if symmetric else {})
    return replace(checkpoint, made_from={**plan.made_from, "calibration": calibration})
