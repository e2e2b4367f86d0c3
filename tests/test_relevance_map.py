"""The heat map, on networks of which it is known which pixels decide."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vitq.errors import InputError, UsageError
from vitq.images import read_image
from vitq.importance import MetricOptions
from vitq.importance.relevance import RULES
from vitq.importance.relevance_map import explain, overlay, smoothed
from vitq.models import LoadedModel

SIZE, PATCH = 16, 4  # pixels: four patches a side


def loaded(module: nn.Module, num_classes: int = 3, names: tuple[str, ...] = ("ant", "bee", "cat")) -> LoadedModel:
    config = {"input_size": [3, SIZE, SIZE], "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 1.0}
    return LoadedModel(module.eval(), "made by hand", {}, num_classes, config, names, "nowhere", "")


def noise(seed: int = 0) -> Tensor:
    return torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


class OnePatch(nn.Module):
    """Logits that are read off one patch alone, though every patch goes through the network."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = patch
        self.embed, self.norm, self.fc, self.head = nn.Conv2d(3, 8, PATCH, PATCH), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT
        tokens = tokens + nn.functional.gelu(self.fc(self.norm(tokens)))
        return self.head(tokens[:, self.patch])


class Brightest(nn.Module):
    """Attention of which nearly all falls on the brightest patch: only its value reaches the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.key, self.value, self.head = nn.Conv2d(3, 8, PATCH, PATCH), nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(8, 3)
        self.query = nn.Parameter(torch.ones(1, 4))
        with torch.no_grad():
            assert self.embed.bias is not None
            self.embed.bias.zero_()
            self.embed.weight[0] = 1 / self.embed.weight[0].numel()  # channel 0 is the brightness
            self.key.weight.zero_()
            self.key.weight[:, 0] = 20.0

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).mT  # (B, 16, 8)
        attention = (self.query @ self.key(tokens).mT).softmax(-1)
        return self.head((attention @ self.value(tokens))[:, 0])


def share(heat: Tensor, patch: int) -> float:
    """The part of all heat, signs left out, that lies in one patch."""
    row, column = divmod(patch, SIZE // PATCH)
    inside = heat[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    return float(inside.abs().sum() / heat.abs().sum())


@pytest.mark.parametrize(("rules", "patch"), list(zip(RULES, (0, 5, 6, 15), strict=True)))
def test_the_patch_that_decides_has_all_the_heat(rules: str, patch: int):
    found = explain(loaded(OnePatch(patch)), noise(), MetricOptions(lrp_rules=rules))
    assert share(found.heat, patch) == pytest.approx(1, abs=1e-6) and found.without_rule == ()


@pytest.mark.parametrize("rules", RULES)
def test_the_patch_that_attention_picks_has_the_heat(rules: str):
    image = 0.3 * noise()
    image[:, PATCH : 2 * PATCH, 2 * PATCH : 3 * PATCH] += 1.5
    assert share(explain(loaded(Brightest()), image, MetricOptions(lrp_rules=rules)).heat, 6) > 0.95


def test_says_which_class_it_explains():
    module, image = OnePatch(3), noise()
    with torch.no_grad():
        predicted = int(module(image[None]).argmax())
    other = (predicted + 1) % 3
    first, same, another = (explain(loaded(module), image, label=label) for label in (None, predicted, other))
    assert (first.label, first.name) == (predicted, ("ant", "bee", "cat")[predicted]) and (another.label, another.name)[0] == other
    assert torch.equal(first.heat, same.heat) and not torch.allclose(first.heat, another.heat)
    assert explain(loaded(module, names=()), image).name == ""


def test_explains_a_backbone_by_its_norm():
    found = explain(loaded(OnePatch(5), num_classes=0, names=()), noise())
    assert found.label is None and share(found.heat, 5) == pytest.approx(1, abs=1e-6)


def test_writes_the_heat_over_the_image(tmp_path: Path):
    path = tmp_path / "new" / "relevance.png"
    found = explain(loaded(OnePatch(6)), noise(), path=path)
    picture = np.asarray(Image.open(path))
    assert picture.shape == (224, 224, 3) and picture.dtype == np.uint8
    coloured = (picture.max(-1).astype(int) - picture.min(-1) > 2).reshape(SIZE, 14, SIZE, 14).any((1, 3))
    inside = np.zeros((SIZE, SIZE), bool)
    inside[4:8, 8:12] = True
    assert coloured[inside].any() and not coloured[~inside].any()  # grey where no relevance lies
    strongest = np.unravel_index(int(found.heat.abs().argmax()), (SIZE, SIZE))
    red, _, blue = picture[strongest[0] * 14, strongest[1] * 14].astype(int)
    assert (red > blue) == bool(found.heat[strongest] > 0)
    with pytest.raises(UsageError, match="exists already; give --force"):
        explain(loaded(OnePatch(6)), noise(), path=path)
    explain(loaded(OnePatch(6)), noise(), path=path, force=True)


def test_no_heat_leaves_the_image_as_it_is():
    model, image = loaded(OnePatch(0)), noise().clamp(-2, 2)
    picture = overlay(image, torch.zeros(SIZE, SIZE), model)[::14, ::14]
    grey = (image.mean(0) * 0.25 + 0.5) * 255
    assert torch.allclose(torch.from_numpy(picture.copy()).float(), grey[..., None].expand(-1, -1, 3), atol=0.51)


def test_squares_are_means_over_the_pixels_around():
    heat = torch.randn(90, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(smoothed(heat[:50, :50]), heat[:50, :50])
    mean = smoothed(heat)
    for row, column in ((0, 0), (40, 50), (89, 3)):
        around = heat[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        assert mean[row, column] == pytest.approx(float(around.mean()), abs=1e-6)


def test_reads_a_picture_as_the_model_is_fed(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    model = loaded(OnePatch(2))
    tensor = read_image(tmp_path / "one.png", model.data_config)
    assert torch.allclose(tensor, (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.25, atol=1e-5)
    assert torch.equal(explain(model, tmp_path / "one.png").heat, explain(model, tensor[None]).heat)


@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_what_is_no_picture_is_an_error(tmp_path: Path, content: bytes | None):
    path = tmp_path / "one.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"one.png cannot be read as a picture \(.+\); give a PNG or JPEG file"):
        explain(loaded(OnePatch(0)), path)


def test_unusable_arguments_are_errors():
    model = loaded(OnePatch(0))
    with pytest.raises(
        InputError, match=r"the image is \(3, 8, 8\); the model takes one of \(3, 16, 16\): preprocess it, or give its file"
    ):
        explain(model, torch.zeros(3, 8, 8))
    with pytest.raises(InputError, match="label 3 is none of the model's 3 classes"):
        explain(model, noise(), label=3)
    with pytest.raises(InputError, match="lrp target 'label' cannot be used with images without labels"):
        explain(model, noise(), MetricOptions(lrp_target="label"))
