"""What the tests of the command line share: running a command in this process, a tiny model, a few images, and a finished run folder."""

import contextlib
import io
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vitq as vitq_package
from vitq.cli.app import main

CLASSES = 5
NUM_IMAGES = 40


@dataclass(frozen=True)
class Done:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict:
        return json.loads(self.out)


def vitq(*arguments: object, folder: Path | None = None) -> Done:
    """Runs `vitq arguments` in this process, in a folder."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder or Path.cwd()):
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    return Done(code, out.getvalue(), err.getvalue())


def environment() -> dict[str, str]:
    """The environment of a process that finds this vitq from any folder."""
    return os.environ | {"PYTHONPATH": str(Path(vitq_package.__file__).parents[1])}


def make_model(folder: Path, classes: int = CLASSES, seed: int = 0) -> Path:
    """A timm local folder of a ViT with two blocks of width 64 for images of 32 x 32, its weights and biases random."""
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=classes, **arguments)
    tensors = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        tensors[name] = 1 + 0.2 * noise if "norm" in name and name.endswith("weight") else noise * (0.15 if value.ndim > 1 else 0.1)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "fixed_input_size": True, "crop_pct": 1.0}
    described = {"architecture": "vit_tiny_patch16_224", "num_classes": classes, "model_args": arguments, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def make_images(folder: Path, seed: int = 0) -> Path:
    """A folder of five class folders with eight pictures each."""
    generator = np.random.default_rng(seed)
    for index in range(NUM_IMAGES):
        colours = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = folder / f"class{index % CLASSES}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours).resize((40, 36)).save(path)
    return folder


def make_chain(folder: Path) -> list[Done]:
    """A folder with `model`, `images` and a finished `vitq-run`, and what the four bare commands said; made once a process, then copied."""
    made, said = _chain()
    shutil.copytree(made.name, folder, dirs_exist_ok=True)
    return said


@cache
def _chain() -> tuple[tempfile.TemporaryDirectory, list[Done]]:
    made = tempfile.TemporaryDirectory()  # gone when the process ends
    folder = Path(made.name)
    make_model(folder / "model")
    make_images(folder / "images")
    first = vitq("profile", "model", "--images", "images", "--num-images", 24, "--batch-size", 8, folder=folder)
    commands = (("allocate", "--budget", "4.0"), ("calibrate",), ("export",))
    return made, [first, *(vitq(*command, folder=folder) for command in commands)]
