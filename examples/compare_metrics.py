"""Metrics against each other: the plans that they lead to, measured, and their ranks against the sensitivity of each layer alone.

    python examples/compare_metrics.py MODEL CALIBRATION_IMAGES TEST_IMAGES [--metrics ...] [--averages 2.5 3.0 3.5 4.0] [--seeds 0 1 2]

Without arguments: a few metrics on the model and the images that come with vitq, in minutes.

Each seed draws its own calibration images; profile, plan and recipe `fast` use the same ones, and the exported file is measured in
onnxruntime. Prints a Markdown table: for each metric and average of bits the KL from the float model (nats per image), agreement and
top-1, means over the seeds with the 95 % interval over the test images and the seeds' own values; the last column is the difference in
KL from the first metric's plan, paired image by image. Where `sensitivity` is among the metrics, the Spearman correlation of each one's
tied costs with its costs follows. `--keep FOLDER` keeps profiles and each plan's outputs, so that a run can go on.
"""

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor

from vitq.accuracy import onnx_runnable
from vitq.allocation import allocate
from vitq.artifacts import BitPlan, Profile
from vitq.calibration.fast import fit_fast
from vitq.gradients import loss
from vitq.graph import Graph
from vitq.images import Images, open_images
from vitq.importance import METRICS, profile
from vitq.models import load
from vitq.onnx_file import export
from vitq.ranges import Histogram, fold
from vitq.rewrites import prepare

DATA = Path(__file__).parents[1] / "vitq" / "demo_data"

Observed = tuple[Graph, dict[str, Histogram]]
"""The folded graph and histograms of its activations."""


def main() -> None:
    """Prints both tables, the first one line by line as its plans are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DATA / "vit_cifar10")
    parser.add_argument("calibration", nargs="?", default=DATA / "calibration.tar")
    parser.add_argument("test", nargs="?", default=DATA / "test.tar")
    parser.add_argument("--metrics", nargs="+", default=list(METRICS))
    parser.add_argument("--averages", nargs="+", default=["2.5", "3.0", "3.5", "4.0"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--keep", type=Path)
    if len(sys.argv) == 1:
        parser.set_defaults(metrics=["output-fisher", "sqnr", "random"], averages=["3.0"], seeds=[0], num_images=64, test_images=400)
    arguments = parser.parse_args()
    model = load(arguments.model)
    names = model.label_names
    test = open_images(arguments.test, model.data_config, arguments.test_images, batch_size=100, class_names=names)
    with torch.no_grad():
        expected = torch.cat([model.module(batch) for batch, _ in test])
    labels = torch.cat([given if given is not None else torch.full((len(batch),), -1) for batch, given in test])
    graph, _ = prepare(model)

    with tempfile.TemporaryDirectory() as temporary:
        keep = arguments.keep or Path(temporary)
        keep.mkdir(exist_ok=True)
        profiles: dict[int, Profile] = {}
        outputs: dict[tuple[str, str, int], Tensor] = {}
        for seed in arguments.seeds:
            images = open_images(arguments.calibration, model.data_config, arguments.num_images, seed, class_names=names)
            kept = keep / f"profile_{seed}.json"
            if not kept.exists():
                journal = keep / f"sensitivity_{seed}.journal"
                kept.write_text(profile(model, images, arguments.metrics, seed=seed, journal=journal).model_dump_json())
            profiles[seed] = Profile.model_validate_json(kept.read_text())
            observed = fold(graph, images)
            for average in arguments.averages:
                for metric in arguments.metrics:
                    plan = allocate(profiles[seed], [average], metric=metric).plan
                    outputs[metric, average, seed] = _outputs(plan, observed, images, test, keep / f"{seed}_{_digest(plan)}.safetensors")
        print("| average | metric | KL | of each seed | agreement % | top-1 % | KL less that of the first |\n" + "| --- " * 7 + "|")
        for average in arguments.averages:
            first: Tensor | None = None
            for metric in arguments.metrics:
                found = [outputs[metric, average, seed] for seed in arguments.seeds]
                kl = torch.stack([loss(expected, output, model.num_classes) for output in found])
                first = kl if first is None else first
                top = torch.stack([output.argmax(1) for output in found])
                agreement, top1 = (100 * (top == wanted).double() for wanted in (expected.argmax(1), labels))
                each = " ".join(f"{value:.4f}" for value in kl.mean(1))
                texts = [_text(kl, 4), each, _text(agreement, 2), _text(top1, 2), _text(kl - first, 4, "+")]
                print(f"| {average} | {metric} | {' | '.join(texts)} |", flush=True)

    if "sensitivity" in arguments.metrics:
        print("\n| metric | Spearman, all layers and widths, of each seed |\n| --- | --- |")
        for metric in arguments.metrics:
            print(f"| {metric} | {' '.join(f'{_correlation(found, metric):.3f}' for found in profiles.values())} |")


def _outputs(plan: BitPlan, observed: Observed, images: Images, test: Images, kept: Path) -> Tensor:
    """The output of a plan's exported file on the test images; equal plans are measured once."""
    if not kept.exists():
        checkpoint = fit_fast(*observed, plan, images)
        some = next(iter(images))[0][:4]
        with tempfile.TemporaryDirectory() as folder:
            export(checkpoint, Path(folder) / "model.onnx", [some], storage="fast")
            runnable = onnx_runnable(Path(folder) / "model.onnx", threads=torch.get_num_threads())
            save_file({"output": torch.cat([runnable(batch) for batch, _ in test])}, kept)
    return load_file(kept)["output"]


def _digest(plan: BitPlan) -> str:
    return hashlib.sha256(repr(plan.layers).encode()).hexdigest()[:16]


def _text(values: Tensor, digits: int, sign: str = "") -> str:
    """The mean of values (seeds, images) and the half width of its 95 % interval over the images."""
    images = values.double().mean(0)
    return f"{images.mean():{sign}.{digits}f} ± {1.96 * float(images.std(correction=0)) / len(images) ** 0.5:.{digits}f}"


def _correlation(found: Profile, metric: str) -> float:
    judge = found.costs["sensitivity"].tied
    costs = [cost for layer in judge for cost in found.costs[metric].tied[layer]]
    return float(spearmanr(costs, [cost for row in judge.values() for cost in row])[0])  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
