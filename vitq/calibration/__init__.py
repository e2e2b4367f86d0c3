"""Recipes: from a plan and images to a calibrated checkpoint. One file each, one line of `RECIPES` each."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

from vitq.artifacts import BitPlan
from vitq.calibration.adalog import calibrate_adalog
from vitq.calibration.attribution import LayerError, attribute
from vitq.calibration.blocks import Progress
from vitq.calibration.erq import calibrate_erq
from vitq.calibration.estimate import HELD_AT_ONCE, Estimate, estimate
from vitq.calibration.fast import calibrate_fast
from vitq.calibration.fima_q import LEARNING as FIMA_Q_LEARNING
from vitq.calibration.fima_q import calibrate_fima_q
from vitq.calibration.fq_vit import calibrate_fq_vit
from vitq.calibration.held import Held
from vitq.calibration.learning import Learning
from vitq.calibration.mix_qvit import calibrate_mix_qvit
from vitq.calibration.ptq4vit import calibrate_ptq4vit
from vitq.calibration.reconstruct import calibrate_reconstruct
from vitq.calibration.repq_vit import calibrate_repq_vit
from vitq.calibration.scratch import discard
from vitq.checkpoint import Checkpoint
from vitq.errors import InputError, UsageError
from vitq.graph import Graph
from vitq.images import Images
from vitq.models import LoadedModel
from vitq.rewrites import prepare

__all__ = [
    "AT_ONCE",
    "HELD_AT_ONCE",
    "LEARNING",
    "RECIPES",
    "Estimate",
    "Held",
    "LayerError",
    "Learning",
    "Progress",
    "attribute",
    "calibrate",
    "discard",
    "expected",
]

RECIPES: dict[str, Callable[..., Checkpoint]] = {
    "fast": calibrate_fast,
    "reconstruct": calibrate_reconstruct,
    "repq-vit": calibrate_repq_vit,
    "mix-qvit": calibrate_mix_qvit,
    "erq": calibrate_erq,
    "adalog": calibrate_adalog,
    "fq-vit": calibrate_fq_vit,
    "ptq4vit": calibrate_ptq4vit,
    "fima-q": calibrate_fima_q,
}

AT_ONCE = ("repq-vit", "mix-qvit", "erq", "adalog", "ptq4vit")
"""The recipes that hold all images at once, so that memory grows with their number."""

LEARNING = {"reconstruct": Learning(), "fima-q": FIMA_Q_LEARNING}
"""The recipes that take a Learning, each with its default."""


def calibrate(
    model: LoadedModel,
    plan: BitPlan,
    images: Images,
    recipe: str = "fast",
    device: str = "cpu",
    symmetric: bool = False,
    learning: Learning | None = None,
    progress: Progress | None = None,
    held: Held | None = None,
) -> Checkpoint:
    """Fits the quantizers of a plan to a model.

    Args:
        model: the float model that the plan was made for.
        plan: bits of every layer.
        images: calibration images, preprocessed for the model.
        recipe: a name in `RECIPES`.
        device: where to compute.
        symmetric: weights without zero points, which `--storage standard` needs; costs accuracy below 7 bits.
        learning: for the recipes of `LEARNING`: iterations, seed, scratch folder.
        progress: is told how far it is, between the passes over the images.
        held: counts what the recipe holds, before the layers' costs are found.

    Raises:
        UsageError: an unknown recipe, or one that does not learn given how to.
        InputError: the plan is for another model or graph, or the images cannot be used.
    """
    if recipe not in RECIPES:
        raise UsageError(f"recipe {recipe!r} is not known; give one of {', '.join(RECIPES)}")
    if learning is not None and recipe not in LEARNING:
        raise UsageError(f"recipe {recipe!r} has no iterations; give recipe {' or '.join(LEARNING)}")
    graph = _graph(model, plan, device)
    options: dict[str, Any] = {"progress": progress} | ({"learning": learning or LEARNING[recipe]} if recipe in LEARNING else {})
    with held or nullcontext():
        checkpoint = RECIPES[recipe](graph, plan, images, symmetric=symmetric, **options)
    errors = {name: asdict(error) for name, error in attribute(checkpoint, images).items()}
    calibrated_on = {"source": images.source, "digest": images.digest, "num_images": images.num_listed}
    calibration: dict[str, Any] = {"recipe": recipe, "images": calibrated_on} | ({"symmetric": True} if symmetric else {})
    if recipe in LEARNING:
        calibration |= {"iterations": options["learning"].iterations, "seed": options["learning"].seed}
    return replace(checkpoint, errors=errors, made_from={**plan.made_from, "calibration": calibration})


def expected(model: LoadedModel, plan: BitPlan, images: Images, device: str = "cpu", learning: Learning | None = None) -> Estimate:
    """What a recipe that learns would take; raises InputError where the plan is for another model or graph."""
    first, _ = next(iter(images))
    return estimate(_graph(model, plan, device), plan, images.num_listed, learning or Learning(), len(first))


def _graph(model: LoadedModel, plan: BitPlan, device: str) -> Graph:
    graph, spec = prepare(model, device)
    if spec.graph_digest != plan.model.graph_digest:
        raise InputError(
            f"the plan is for {plan.model.architecture}, whose graph differs from that of {model.source} ({spec.architecture}); "
            "run `vitq profile` again for this model with this torch and timm"
        )
    return graph
