"""Forms of the default metric against each other: how much noise, how good a plan, and how well the plan's loss is predicted.

    python examples/metric_forms.py MODEL CALIBRATION_IMAGES TEST_IMAGES [--average 3.0] [--test-images 2000]

Each row is a form of `output-fisher`: the probe with plain signs or turned ones (gradients.py), 128 to 1,024 images, weight and activation
widths tied or apart, costs alone or with terms between layers. `predicted` is what the plan costs by the profile that chose it, `again`
what a profile over other images says of it, without the optimizer's curse, `measured` its KL on the test images (nats per image).
"""

import argparse
import functools

import torch

from vitq import gradients
from vitq.allocation import allocate
from vitq.artifacts import BitPlan, Profile
from vitq.calibration.fast import fit_fast
from vitq.gradients import loss
from vitq.images import open_images
from vitq.importance import MetricOptions, profile
from vitq.models import load
from vitq.ranges import fold
from vitq.rewrites import prepare

FORMS = (
    # likeliest classes whose signs are turned, images, weight and activation widths apart, objective
    (1, 256, False, "sum"),
    (32, 128, False, "sum"),
    (32, 256, False, "sum"),
    (32, 1024, False, "sum"),
    (32, 256, True, "sum"),
    (32, 256, False, "pairwise"),
    (32, 1024, False, "pairwise"),
)


def main() -> None:
    """Prints a Markdown table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--average", default="3.0")
    parser.add_argument("--test-images", type=int, default=2000)
    arguments = parser.parse_args()
    model = load(arguments.model)
    test = list(open_images(arguments.test, model.data_config, arguments.test_images, class_names=model.label_names))
    with torch.no_grad():
        expected = torch.cat([model.module(batch) for batch, _ in test])

    def images(count: int, seed: int):
        return open_images(arguments.calibration, model.data_config, count, seed, class_names=model.label_names)

    @functools.cache
    def priced(likeliest: int, count: int, seed: int, pairs: bool) -> Profile:
        gradients._LIKELIEST = likeliest
        return profile(model, images(count, seed), seed=seed, options=MetricOptions(pairs=pairs))

    fitting = images(256, 0)
    observed = fold(prepare(model)[0], fitting)
    others = priced(32, 1024, 7, pairs=False)
    print("| signs | images | widths | objective | predicted | again | measured |\n" + "| --- " * 7 + "|", flush=True)
    for likeliest, count, apart, objective in FORMS:
        found = priced(likeliest, count, 0, pairs=objective == "pairwise")
        chosen = allocate(found, [arguments.average], bits_apart=apart, objective=objective)
        module = fit_fast(*observed, chosen.plan, fitting).quantized_module()
        with torch.no_grad():
            output = torch.cat([module(batch) for batch, _ in test])
        measured = float(loss(expected, output, model.num_classes).mean())
        form = f"{'turned' if likeliest > 1 else 'plain'} | {count} | {'apart' if apart else 'tied'} | {objective}"
        print(f"| {form} | {chosen.report['objective']:.4f} | {cost(others, chosen.plan):.4f} | {measured:.4f} |", flush=True)


def cost(found: Profile, plan: BitPlan) -> float:
    """What a profile says that a plan costs, without terms between layers."""
    table = found.costs["output-fisher"]
    place = {width: index for index, width in enumerate(table.bits)}
    total = 0.0
    for layer in plan.layers:
        at = place[layer.activation_bits]
        if layer.weight_bits is None or layer.weight_bits == layer.activation_bits:
            total += table.tied[layer.name][at]
        else:
            row = place[layer.weight_bits]
            total += table.weight[layer.name][row] + table.activation[layer.name][at] + (table.cross or {})[layer.name][row][at]
    return total


if __name__ == "__main__":
    main()
