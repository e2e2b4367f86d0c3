"""examples/serve.py prepares pictures as timm does, predicts what `vitq evaluate` counts, and needs neither torch nor timm nor vitq."""

import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from vitq.accuracy import onnx_runnable
from vitq.artifacts import BitPlan, LayerBits
from vitq.calibration.fast import calibrate_fast
from vitq.images import open_images, read_image
from vitq.models import load
from vitq.onnx_file import export
from vitq.rewrites import prepare
from vitq.runtime import onnx_metadata

SERVE = Path(__file__).parents[1] / "examples" / "serve.py"
COUNT = 40


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve", SERVE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def served(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example model, exported at 8 bits, and `pictures` of its test images."""
    folder = tmp_path_factory.mktemp("served")
    model = load(str(demo_data / "vit_cifar10"))
    graph, spec = prepare(model)
    layers = [
        LayerBits(name=layer.name, type=layer.type, weight_bits=8 if layer.has_weight else None, activation_bits=8)
        for layer in graph.layers
    ]
    images = open_images(demo_data / "calibration.tar", model.data_config, num_images=8, class_names=model.label_names)
    checkpoint = calibrate_fast(graph, BitPlan(model=spec, layers=tuple(layers)), images)
    export(checkpoint, folder / "model.onnx", (batch for batch, _ in images))
    with tarfile.open(demo_data / "test.tar") as tar:
        members = [member for member in tar.getmembers() if member.isfile()][::25][:COUNT]
        tar.extractall(folder / "pictures", members, filter="data")
    return folder


def test_pictures_of_the_example_are_prepared_as_vitq_does(serve: ModuleType, served: Path) -> None:
    classifier = serve.Classifier(str(served / "model.onnx"))
    paths = sorted((served / "pictures").rglob("*.*"))
    assert len(paths) == COUNT
    for path in paths:
        with Image.open(path) as image:
            found = serve.preprocess(image, classifier.preprocessing)
        np.testing.assert_allclose(found, read_image(path, classifier.preprocessing).numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border", None])
@pytest.mark.parametrize(("input_size", "crop_pct"), [((3, 32, 32), 0.9), ((3, 24, 40), 0.95), ((1, 32, 32), 1.0), ((3, 33, 33), None)])
def test_pictures_of_any_size_are_prepared_as_timm_does(
    serve: ModuleType, interpolation: str, crop_mode: str | None, input_size: tuple[int, int, int], crop_pct: float | None
) -> None:
    chance = np.random.default_rng(0)
    config = {"input_size": input_size, "interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    config |= {"mean": [0.1, 0.5, 0.7][: input_size[0]], "std": [0.2, 0.3, 0.25][: input_size[0]]}
    transform = create_transform(**{key: value for key, value in config.items() if value is not None})
    for width, height in ((32, 32), (31, 50), (90, 41), (7, 8), (200, 33)):
        picture = Image.fromarray(chance.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = transform(picture.convert("L" if input_size[0] == 1 else "RGB"))
        np.testing.assert_allclose(serve.preprocess(picture, config), expected.numpy(), rtol=0, atol=1e-6)


def test_turned_transparent_and_deep_pictures(serve: ModuleType, tmp_path: Path) -> None:
    config = {"input_size": [3, 20, 20], "interpolation": "bicubic", "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}
    chance = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(chance.integers(0, 256, (30, 50, 3), dtype=np.uint8)).save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(chance.integers(0, 256, (30, 50, 4), dtype=np.uint8)).save(tmp_path / "clear.png")
    Image.fromarray(chance.integers(0, 65536, (30, 50)).astype(np.uint16)).save(tmp_path / "deep.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            found = serve.preprocess(image, config)
        np.testing.assert_allclose(found, read_image(path, config).numpy(), rtol=0, atol=1e-6)


def test_top_classes_are_those_of_evaluate_without_torch(served: Path) -> None:
    metadata = onnx_metadata(served / "model.onnx")
    preprocessing, labels = metadata["vitq.preprocessing"], metadata["vitq.label_names"]
    names = [str(path.relative_to(served)) for path in sorted((served / "pictures").rglob("*.*"))]
    done = run_without_torch(served, "model.onnx", *names)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[::6] == names
    images = open_images(served / "pictures", preprocessing, None, class_names=tuple(labels))
    logits = torch.cat([onnx_runnable(served / "model.onnx")(batch) for batch, _ in images])
    best = logits.softmax(1).topk(5)
    for at, (values, indices) in enumerate(zip(best.values, best.indices, strict=True)):
        expected = [f"  {100 * v:6.2f} %  {labels[i]}" for v, i in zip(values.tolist(), indices.tolist(), strict=True)]
        assert lines[6 * at + 1] == expected[0]
        assert [line[:9] for line in lines[6 * at + 1 : 6 * at + 6]] == [line[:9] for line in expected]


def run_without_torch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs serve.py in a process where the libraries that it must not need cannot be imported."""
    blocked = "import runpy, sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'timm', 'vitq', 'onnx')))"
    script = f"{blocked}; sys.argv = {['serve.py', *arguments]!r}; runpy.run_path({str(SERVE)!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)


def test_a_file_that_is_missing_or_damaged(serve: ModuleType, served: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="gone.onnx does not exist; give a file that `vitq export` wrote"):
        serve.Classifier(str(tmp_path / "gone.onnx"))
    (tmp_path / "cut.onnx").write_bytes((served / "model.onnx").read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r"^\S+cut.onnx cannot be loaded: [^\n]+; give a file that `vitq export` wrote$"):
        serve.Classifier(str(tmp_path / "cut.onnx"))


def test_faults(served: Path, tmp_path: Path) -> None:
    assert "usage: python serve.py MODEL.onnx PICTURE" in run_without_torch(served, "model.onnx").stderr
    model = onnx.load(served / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    assert "bare.onnx does not say how to prepare images" in run_without_torch(tmp_path, "bare.onnx", "x.png").stderr
