"""The whole way in Python, on the model and the images that come with vitq.

python examples/python_api.py [FOLDER]
"""

import sys
from pathlib import Path

import vitq

DATA = Path(vitq.__file__).parent / "demo_data"


def main(folder: Path) -> None:
    """Writes plan.json, model.safetensors and model.onnx into a folder, and prints what the file measures."""
    folder.mkdir(parents=True, exist_ok=True)
    model = vitq.load(DATA / "vit_cifar10")
    images = vitq.open_images(DATA / "calibration.tar", model.data_config, 64, class_names=model.label_names)
    test = vitq.open_images(DATA / "test.tar", model.data_config, 200, class_names=model.label_names)

    profile = vitq.profile(model, images)
    allocation = vitq.allocate(profile, ["4.0", "size=1.4MB"])
    checkpoint = vitq.calibrate(model, allocation.plan, images)
    report = vitq.export(checkpoint, folder / "model.onnx", (batch for batch, _ in images))
    found = vitq.evaluate(vitq.onnx_runnable(folder / "model.onnx"), test, model.module)

    vitq.save_artifact(allocation.plan, folder / "plan.json")
    vitq.save_checkpoint(checkpoint, folder / "model.safetensors")
    assert found.top1 is not None and found.kl is not None
    print(f"{report.file_bytes / 1e6:.2f} MB, top-1 {found.top1.mean:.1f} %, {found.kl.mean:.4f} nats from float")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "python-api"))
