"""What `profile` costs: forward passes over its images, and peak memory as the images grow in number.

    python examples/profile_cost.py MODEL IMAGES [--passes-at 128 256] [--images-at 128 1024]

The first table counts in two ways how many forward passes over the same images one profile at seven widths is worth: by arithmetic
(floating-point operations of matmuls and convolutions, which no busy machine disturbs) and by time (the median of interleaved runs).
The second runs each size in a process of its own and prints that process's peak memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitq.artifacts import WIDTHS
from vitq.fitting import observe
from vitq.images import open_images
from vitq.importance import METRICS, Subject, profile
from vitq.models import load
from vitq.rewrites import prepare

BATCH = 32


def passes(model_source: str, image_source: str, num_images: int, repeats: int = 3) -> dict[str, float]:
    """The cost of one profile in forward passes, by arithmetic and by time."""
    model = load(model_source)
    images = open_images(image_source, model.data_config, num_images, batch_size=BATCH, class_names=model.label_names)
    graph, _ = prepare(model)

    def forward() -> None:
        with torch.no_grad():
            for batch, _ in images:
                graph.module(batch)

    def flops(task) -> int:
        with FlopCounterMode(display=False) as counter:
            task()
        return counter.get_total_flops()

    def seconds(task) -> float:
        started = time.perf_counter()
        task()
        return time.perf_counter() - started

    # Capture traces the model once with a symbolic batch, which a counter cannot add; what is counted is what runs on images.
    folded, histograms, covariances = observe(graph, images)
    subject = Subject(folded, histograms, images, WIDTHS, model.num_classes, covariances=covariances)
    found = flops(lambda: observe(graph, images)) + flops(lambda: METRICS["output-fisher"](subject))
    by_arithmetic = found / flops(forward)
    times = [(seconds(lambda: profile(model, images)), seconds(forward)) for _ in range(repeats)]
    return {"by_arithmetic": by_arithmetic, "by_time": statistics.median(a / b for a, b in times)}


def peak_megabytes(model_source: str, image_source: str, num_images: int) -> float:
    """The peak resident memory of a process that profiles, in MB."""
    command = [sys.executable, str(Path(__file__)), model_source, image_source, "--peak-of", str(num_images)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1])


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--passes-at", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--images-at", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        model = load(arguments.model)
        profile(model, open_images(arguments.images, model.data_config, arguments.peak_of, batch_size=BATCH))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
        return
    for count in arguments.passes_at:
        print(json.dumps({"num_images": count, "forward_passes": passes(arguments.model, arguments.images, count)}), flush=True)
    for count in arguments.images_at:
        print(json.dumps({"num_images": count, "peak_megabytes": round(peak_megabytes(arguments.model, arguments.images, count))}))


if __name__ == "__main__":
    main()
