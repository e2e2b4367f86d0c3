"""Metrics against each other: the plans that they lead to, measured, and their ranks against the sensitivity of each layer alone.

    python examples/compare_metrics.py MODEL CALIBRATION_IMAGES TEST_IMAGES [--metrics ...] [--averages 2.5 3.0 3.5 4.0] [--seeds 0 1 2]

Prints a Markdown table: for each metric, average of bits and seed the KL from the float model (nats per image), agreement and top-1 of the
plan, calibrated by recipe `fast`, with 95 % intervals; the last column is the difference in KL from the first metric's plan, paired image
by image. Where `sensitivity` is among the metrics, the Spearman correlation of each one's tied costs with its costs follows.
`--exhaustive FILE` keeps that metric's results as they come, so that a run can go on.
"""

import argparse
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

from vitq.allocation import allocate
from vitq.calibration import calibrate
from vitq.gradients import loss
from vitq.images import open_images
from vitq.importance import METRICS, profile
from vitq.models import load


def main() -> None:
    """Prints both tables, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--metrics", nargs="+", default=[name for name in METRICS if name not in ("sensitivity", "mix-qvit")])
    parser.add_argument("--averages", nargs="+", default=["2.5", "3.0", "3.5", "4.0"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--exhaustive", type=Path)
    arguments = parser.parse_args()
    model = load(arguments.model)
    names = model.label_names
    test = open_images(arguments.test, model.data_config, arguments.test_images, batch_size=100, class_names=names)
    with torch.no_grad():
        outputs = torch.cat([model.module(batch) for batch, _ in test])
    labels = torch.cat([given if given is not None else torch.full((len(batch),), -1) for batch, given in test])

    print("| metric | average | seed | KL | agreement % | top-1 % | KL less that of the first |\n" + "| --- " * 7 + "|", flush=True)
    profiles = {}
    for seed in arguments.seeds:
        images = open_images(arguments.calibration, model.data_config, arguments.num_images, seed, class_names=names)
        profiles[seed] = profile(model, images, arguments.metrics, seed=seed, journal=arguments.exhaustive if seed == 0 else None)
        for average in arguments.averages:
            first: Tensor | None = None
            for metric in arguments.metrics:
                module = calibrate(model, allocate(profiles[seed], [average], metric=metric).plan, images).quantized_module()
                with torch.no_grad():
                    found = torch.cat([module(batch) for batch, _ in test])
                kl = loss(outputs, found, model.num_classes)
                first = kl if first is None else first
                agreement, top1 = (100 * (found.argmax(1) == wanted).double() for wanted in (outputs.argmax(1), labels))
                texts = [
                    f"{value.mean():.{digits}f} ± {margin(value):.{digits}f}" for value, digits in ((kl, 4), (agreement, 2), (top1, 2))
                ]
                difference = f"{(kl - first).mean():+.4f} ± {margin(kl - first):.4f}"
                print(f"| {metric} | {average} | {seed} | {' | '.join(texts)} | {difference} |", flush=True)

    if "sensitivity" in arguments.metrics:
        print("\n| metric | seed | Spearman, all layers and widths |\n| --- | --- | --- |")
        for seed, found in profiles.items():
            judge = [cost for row in found.costs["sensitivity"].tied.values() for cost in row]
            for metric in arguments.metrics:
                costs = [cost for layer in found.costs["sensitivity"].tied for cost in found.costs[metric].tied[layer]]
                print(f"| {metric} | {seed} | {spearmanr(costs, judge)[0]:.3f} |")


def margin(values: Tensor) -> float:
    """The half width of the mean's 95 % interval."""
    return 1.96 * float(values.double().std(correction=0)) / len(values) ** 0.5


if __name__ == "__main__":
    main()
