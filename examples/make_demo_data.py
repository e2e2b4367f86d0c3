"""Makes the data that `vitq demo` and the tests use, from a timm model folder and two tars of class folders.

    python examples/make_demo_data.py MODEL_FOLDER TRAIN.tar TEST.tar vitq/demo_data

writes into the output folder

    vit_cifar10/config.json, model.safetensors    the model, its floating-point tensors stored as float16
    calibration.tar                               512 images of TRAIN.tar, in class folders
    test.tar                                      1,000 images of TEST.tar, in class folders

The images are drawn evenly over the classes with a fixed seed and copied byte for byte; the same inputs give the same files.
"""

import argparse
import io
import random
import shutil
import tarfile
from pathlib import Path, PurePosixPath

import torch
from safetensors.torch import load_file, save_file

CALIBRATION_IMAGES = 512
TEST_IMAGES = 1000
SEED = 0


def make_demo_data(model: Path, train: Path, test: Path, output: Path) -> None:
    """Writes the model folder and the two tars under `output`, replacing older ones."""
    store_half(model, output / "vit_cifar10")
    draw_images(train, output / "calibration.tar", CALIBRATION_IMAGES)
    draw_images(test, output / "test.tar", TEST_IMAGES)


def store_half(model: Path, output: Path) -> None:
    """Copies a timm local folder with its floating-point tensors as float16; a value beyond float16 is an error."""
    tensors = load_file(model / "model.safetensors")
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in sorted(tensors.items())}
    for name, tensor in halved.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {name!r} does not fit float16")
    output.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model / "config.json", output / "config.json")
    save_file(halved, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner may read


def draw_images(source: Path, target: Path, count: int) -> None:
    """Copies `count` images of a tar of class folders into a new tar, each class as often as the others, give or take one."""
    with tarfile.open(source) as archive:
        members: dict[str, list[str]] = {}
        for member in archive.getmembers():
            if member.isfile():
                members.setdefault(PurePosixPath(member.name).parent.name, []).append(member.name)
        generator = random.Random(SEED)
        chosen = []
        for place, label in enumerate(sorted(members)):
            share = count // len(members) + (place < count % len(members))
            chosen += generator.sample(sorted(members[label]), share)
        images = {str(PurePosixPath(name)): archive.extractfile(name).read() for name in chosen}  # pyright: ignore[reportOptionalMemberAccess]
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(images):
            header = tarfile.TarInfo(name)  # time, owner and group 0
            header.size = len(images[name])
            archive.addfile(header, io.BytesIO(images[name]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with config.json and model.safetensors")
    parser.add_argument("train", type=Path, help="a tar of class folders: calibration images come from here")
    parser.add_argument("test", type=Path, help="a tar of class folders: test images come from here")
    parser.add_argument("output", type=Path, help="the folder to write to")
    make_demo_data(**vars(parser.parse_args()))
