"""What `profile` and recipes of `calibrate` cost: forward passes over their images, and peak memory as the images grow in number.

    python examples/cost_in_passes.py MODEL IMAGES [--stages profile fast] [--passes-at 128 256] [--images-at 128 1024] [--bits 4]

The first lines count how many forward passes over the same images a stage is worth, by the processor's time (all threads, the median of
interleaved runs); a profile at seven widths also by arithmetic, the floating-point operations of matmuls and convolutions, which no
busy machine disturbs. The others run each stage at each size in a process of its own and print that process's peak memory.
Each stage is what its command runs: `calibrate` includes the errors of layers that it reports. MODEL is anything that vitq loads.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from vitq.allocation import allocate
from vitq.artifacts import WIDTHS, BitPlan
from vitq.calibration import calibrate
from vitq.fitting import observe
from vitq.images import Images, open_images
from vitq.importance import METRICS, Subject, profile
from vitq.models import LoadedModel, load
from vitq.rewrites import prepare

BATCH = 32
STAGES = ("profile", "fast", "reconstruct")


def opened(arguments: argparse.Namespace, count: int) -> tuple[LoadedModel, Images]:
    """The model and so many images."""
    model = load(arguments.model)
    return model, open_images(arguments.images, model.data_config, count, batch_size=BATCH, class_names=model.label_names)


def planned(model: LoadedModel, images: Images, bits: int) -> BitPlan:
    """The uniform plan."""
    return allocate(profile(model, images), uniform=str(bits)).plan


def stage(name: str, model: LoadedModel, images: Images, plan: BitPlan | None) -> None:
    """Runs one stage."""
    if plan is None:
        profile(model, images)
    else:
        calibrate(model, plan, images, recipe=name)


def passes(name: str, arguments: argparse.Namespace, count: int, repeats: int = 3) -> dict[str, float]:
    """The cost of a stage in forward passes."""
    model, images = opened(arguments, count)
    graph, _ = prepare(model)
    plan = planned(model, opened(arguments, BATCH)[1], arguments.bits) if name != "profile" else None

    def forward() -> None:
        with torch.no_grad():
            for batch, _ in images:
                graph.module(batch)

    def seconds(task) -> float:
        started = time.process_time()
        task()
        return time.process_time() - started

    times = [(seconds(lambda: stage(name, model, images, plan)), seconds(forward)) for _ in range(repeats)]
    found = {"by_time": statistics.median(a / b for a, b in times)}
    return found if plan is not None else found | {"by_arithmetic": arithmetic(model, images)}


def arithmetic(model: LoadedModel, images: Images) -> float:
    """The floating-point operations of a profile over those of a forward pass.

    Capture traces the model once with a symbolic batch, which a counter cannot add; what is counted is what runs on images.
    """

    def operations(task) -> int:
        with FlopCounterMode(display=False) as counter:
            task()
        return counter.get_total_flops()

    def forward() -> None:
        with torch.no_grad():
            for batch, _ in images:
                graph.module(batch)

    graph, _ = prepare(model)
    folded, histograms, covariances = observe(graph, images)
    subject = Subject(folded, histograms, images, WIDTHS, model.num_classes, covariances=covariances)
    found = operations(lambda: observe(graph, images)) + operations(lambda: METRICS["output-fisher"](subject))
    return found / operations(forward)


def peak_megabytes(name: str, arguments: argparse.Namespace, count: int) -> float:
    """The peak resident memory of a process that runs a stage, in MB."""
    command = [sys.executable, __file__, arguments.model, arguments.images, "--bits", str(arguments.bits)]
    command += ["--stages", name, "--peak-of", str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1])


def main() -> None:
    """Prints a JSON document a line, as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["profile", "fast"])
    parser.add_argument("--bits", type=int, default=4, help="of the uniform plan that is calibrated")
    parser.add_argument("--passes-at", type=int, nargs="*", default=[128, 256])
    parser.add_argument("--images-at", type=int, nargs="*", default=[128, 1024])
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        (name,) = arguments.stages
        model, images = opened(arguments, arguments.peak_of)
        few = opened(arguments, BATCH)[1]
        stage(name, model, images, planned(model, few, arguments.bits) if name != "profile" else None)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
        return
    for name in arguments.stages:
        for count in arguments.passes_at:
            print(json.dumps({"stage": name, "num_images": count, "forward_passes": passes(name, arguments, count)}), flush=True)
        for count in arguments.images_at:
            found = {"stage": name, "num_images": count, "peak_megabytes": round(peak_megabytes(name, arguments, count))}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
