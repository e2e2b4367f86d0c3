"""Accuracy at many bit budgets, through onnxruntime: one profile, then each plan calibrated, exported and evaluated.

    python examples/bits_table.py MODEL CALIBRATION_IMAGES TEST_IMAGES [--plans uniform=8 uniform=3 3.0 like=3]

Prints a Markdown table: predicted and measured KL from the float model (nats per image), agreement, top-1 with 95 % intervals, file size
against the predicted one, integer kernels, and for budgets the KL relative to uniform bits of the same average where that was run.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from vitq.accuracy import evaluate, onnx_runnable
from vitq.allocation import allocate
from vitq.calibration import calibrate
from vitq.images import open_images
from vitq.importance import profile
from vitq.models import load
from vitq.onnx_file import export

PLANS = ["uniform=8", "uniform=6", "uniform=4", "4.0", "like=4", "3.5", "uniform=3", "3.0", "like=3", "uniform=2", "2.5"]


def main() -> None:
    """Prints the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = load(arguments.model)
    names = model.label_names
    images = open_images(arguments.calibration, model.data_config, arguments.num_images, arguments.seed, class_names=names)
    test = open_images(arguments.test, model.data_config, None, batch_size=100, class_names=names)
    found = profile(model, images, seed=arguments.seed)
    outputs: list[Tensor] = []
    with torch.no_grad():
        outputs = [model.module(batch) for batch, _ in test]

    print("| plan | W / A bits | predicted KL | KL | agreement % | top-1 % | against float | file bytes (predicted) | kernels | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in arguments.plans:
        kind, _, value = name.partition("=")
        chosen = allocate(found, uniform=value) if kind == "uniform" else allocate(found, [name])
        checkpoint = calibrate(model, chosen.plan, images)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            exported = export(checkpoint, file, [batch for batch, _ in images])
            reference = iter(outputs)
            result = evaluate(onnx_runnable(file), test, lambda _, reference=reference: next(reference))
        report = chosen.report
        kl, agreement, top1, change = (getattr(result, field) for field in ("kl", "agreement", "top1", "top1_change"))
        print(
            f"| {name} | {report['average_weight_bits']:.2f} / {report['average_activation_bits']:.2f} | {report['predicted']:.4f} "
            f"| {kl.mean:.4f} ± {kl.margin:.4f} | {agreement.mean:.2f} | {top1.mean:.2f} | {change.mean:+.2f} ± {change.margin:.2f} "
            f"| {exported.file_bytes} ({report['size_bytes']}) | {exported.integer_kernels} / {exported.integer_candidates} "
            f"| {report['solve_seconds']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
