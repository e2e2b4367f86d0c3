"""`vitq synthesize` and what it rests on: the entropy against a slow version, the descent, seeds, resumption, families, and the file."""

import json
import math
from pathlib import Path

import pytest
import torch
from cli_session import CLASSES, make_model, vitq
from PIL import Image
from safetensors import safe_open
from small_models import ThreeProjections, Tokens, captured, captured_module, images, timm_model

from vitq import synthesize as room
from vitq.artifacts import load_profile
from vitq.errors import InputError, UsageError
from vitq.graph import capture, values_at
from vitq.images import open_images
from vitq.models import LoadedModel, build, load
from vitq.synthesize.descent import descend, schedule
from vitq.synthesize.entropy import MOST_PATCHES, differential_entropy, similarities
from vitq.synthesize.objective import VARIATION, objective_of, total_variation
from vitq.synthesize.patches import places
from vitq.synthesize.pictures import framed, pixels, preprocessed, save, sheet

CONFIG = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "crop_pct": 1.0}
FEW = ("--num-images", 6, "--batch-size", 2, "--iterations", 4)


def slow_entropy(values: list[float], bandwidth: float, points: int) -> float:
    """From the definition, one number at a time."""
    least, most = min(values), max(values)
    xs = [least + (most - least) * k / (points - 1) for k in range(points)]
    density = []
    for x in xs:
        kernels = [math.exp(-((x - v) ** 2) / (2 * bandwidth**2)) / (bandwidth * math.sqrt(2 * math.pi)) for v in values]
        density.append(sum(kernels) / len(values) + 1e-4)
    heights = [-p * math.log(p) for p in density]
    return sum((xs[k + 1] - xs[k]) * (heights[k] + heights[k + 1]) / 2 for k in range(points - 1))


def test_the_entropy_is_that_of_the_definition():
    values = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for bandwidth, points in ((0.01, 10), (0.1, 25)):
        found = differential_entropy(values, bandwidth, points)
        assert found.tolist() == pytest.approx([slow_entropy(row.tolist(), bandwidth, points) for row in values], rel=1e-4, abs=1e-5)


def test_the_entropy_of_a_known_density():
    even = torch.linspace(-1, 1, 2001, dtype=torch.float64)[None]
    assert float(differential_entropy(even, 0.01, 400)) == pytest.approx(math.log(2), abs=0.02)
    alike = torch.full((1, 50), 0.5)
    assert float(differential_entropy(alike)) == 0  # there is nowhere to go


def test_similarities_are_the_cosines_of_pairs():
    patches = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    found = similarities(patches)
    wanted = [
        [
            float(torch.cosine_similarity(patches[image, window, i], patches[image, window, j], dim=0))
            for window in range(3)
            for i in range(5)
            for j in range(i + 1, 5)
        ]
        for image in range(2)
    ]
    assert torch.allclose(found, torch.tensor(wanted), atol=1e-6)
    assert similarities(torch.randn(1, 1, 300, 4)).shape == (1, MOST_PATCHES * (MOST_PATCHES - 1) // 2)


def test_total_variation_of_a_checkerboard():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 3.0
    assert float(total_variation(board.expand(1, 3, 8, 8))) == pytest.approx((3 + 3 + 0 + 0) / 4, abs=1e-5)


def test_the_schedule_warms_up_and_falls():
    rates = [schedule(step, 50) for step in range(50)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1 and rates[30] == pytest.approx(0.5) and 0 < rates[-1] < 0.01


@pytest.mark.parametrize(
    ("family", "prefixes", "windows"),
    [("vit", {1}, {1}), ("swin", {0}, {9, 4}), ("cait", {0}, {1}), ("levit", {0}, {1}), ("visformer", {0}, {1})],
)
def test_patches_are_found_in_every_family(family: str, prefixes: set[int], windows: set[int]):
    _, graph = captured(family)
    found = places(graph)
    assert {place.prefix for place in found} == prefixes
    batch = images(2, graph.input_shape[1])
    with torch.no_grad():
        values = values_at(graph.module, batch, [place.node for place in found])
        one = values_at(graph.module, batch[1:], [place.node for place in found])
    seen = [place.patches(values[place.node], 2) for place in found]
    assert {patches.shape[1] for patches in seen} == windows
    for place, patches in zip(found, seen, strict=True):  # an image's patches are its own
        assert torch.allclose(patches[1:], place.patches(one[place.node], 1), atol=1e-4)


def test_without_attention_the_blocks_values_are_compared():
    graph = capture(timm_model("vit", fused=True), (3, 32, 32))
    assert graph.unfused() and {place.prefix for place in places(graph)} == {1}
    parts = objective_of(graph).parts(images(2, 32), None)
    assert parts.entropy.shape == (2,) and parts.cross_entropy.tolist() == [0, 0]


def test_registers_are_dropped_and_attention_between_channels_is_turned():
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "reg_tokens": 4}
    registers = captured_module(build("vit_tiny_patch16_224", small, 5), 32)
    assert {place.prefix for place in places(registers)} == {5}

    class BetweenChannels(ThreeProjections):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (part(x).unflatten(-1, (2, -1)).permute(0, 2, 3, 1) for part in (self.query, self.key, self.value))
            return x + self.out(((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2))

    graph = captured_module(Tokens(BetweenChannels()), 8)
    (place,) = places(graph)
    assert place.channels_first and place.patches(torch.zeros(3, 2, 4, 16), 3).shape == (3, 1, 16, 4)


def test_a_model_without_patches_is_refused():
    graph = capture(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4)), (3, 4, 4))
    with pytest.raises(InputError, match="neither attention nor blocks with patches"):
        places(graph)


@pytest.mark.parametrize("family", ["vit", "swin", "cait", "visformer"])
def test_the_gradient_lowers_the_loss(family: str):
    _, graph = captured(family)
    wanted, x = objective_of(graph), images(2, graph.input_shape[1]).requires_grad_()
    labels, variation = torch.tensor([3, 1]), torch.tensor(VARIATION)
    here = wanted.loss(x, labels, variation)
    (slope,) = torch.autograd.grad(here, x)
    with torch.no_grad():
        there = wanted.loss(x - 1e-3 * slope / slope.norm(), labels, variation)
    assert float(here.detach() - there) == pytest.approx(1e-3 * float(slope.norm()), rel=0.3)  # the ends of the integral are held constant


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_descent_lowers_the_loss(family: str):
    _, graph = captured(family)
    size = graph.input_shape[1]
    wanted, labels = objective_of(graph), torch.tensor([1, 2])
    config = CONFIG | {"input_size": [3, size, size]}
    mean, std = torch.tensor(CONFIG["mean"]), torch.tensor(CONFIG["std"])
    least, most = -mean / std, (1 - mean) / std
    made = [descend(wanted, config, 2, labels, steps, torch.Generator().manual_seed(0)) for steps in (1, 60)]
    with torch.no_grad():
        losses = [float(wanted.loss(x, labels, torch.full((2,), sum(VARIATION) / 2))) for x in made]
        parts = wanted.parts(made[1], labels)
    assert losses[1] < 0.2 * losses[0]
    assert bool((made[1].amax((0, 2, 3)) <= most + 1e-6).all()) and bool((made[1].amin((0, 2, 3)) >= least - 1e-6).all())
    assert parts.variation.mean() < 0.5  # noise has 1.4


@pytest.mark.parametrize("crop", [(1.0, "center"), (0.9, "center"), (0.875, "squash"), (0.9, "border")])
def test_pictures_read_back_are_the_images_that_were_made(tmp_path: Path, crop: tuple[float, str]):
    config = CONFIG | {"input_size": [3, 30, 34], "crop_pct": crop[0], "crop_mode": crop[1]}
    made = torch.rand(3, 3, 30, 34, generator=torch.Generator().manual_seed(0))
    made = (made - torch.tensor(config["mean"])[:, None, None]) / torch.tensor(config["std"])[:, None, None]
    pictures = pixels(made, config)
    save(framed(pictures, config), torch.tensor([2, 0, 1]), {}, tmp_path / "images.safetensors")
    ((read, labels),) = open_images(tmp_path / "images.safetensors", config)
    assert torch.allclose(read, preprocessed(pictures, config), atol=1e-5)
    assert float(((read - made) * torch.tensor(config["std"])[:, None, None]).abs().max()) <= 0.5 / 255 + 1e-6
    assert labels is not None and labels.tolist() == [2, 0, 1]


def test_a_grey_model_gets_grey_pictures(tmp_path: Path):
    config = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "interpolation": "bicubic", "crop_pct": 1.0}
    made = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save(framed(pixels(made, config), config), None, {}, tmp_path / "images.safetensors")
    ((read, labels),) = open_images(tmp_path / "images.safetensors", config)
    assert labels is None and torch.allclose(read, made, atol=1.01 / 255)


def test_the_sheet_shows_every_picture():
    pictures = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 6) * 40
    drawn = sheet(pictures)
    assert drawn.shape == (2 * 98 + 2, 3 * (24 * 6 + 2) + 2, 3)
    assert drawn[2, 2].tolist() == [0] * 3 and drawn[100, 150].tolist() == [160] * 3 and drawn[-3, -3].tolist() == [255] * 3


def made_by(model: LoadedModel, scratch: Path, **options) -> room.Synthesis:
    return room.synthesize(model, **({"num_images": 4, "seed": 0, "scratch": scratch, "steps": 3, "batch_size": 2} | options))


def test_a_model_without_a_classifier_goes_without_classes(tmp_path: Path):
    made = made_by(load(make_model(tmp_path / "model"), num_classes=0), tmp_path / "scratch")
    assert made.labels is None and made.agreement is None and made.pictures.shape == (4, 3, 32, 32)


def test_numbers_that_are_too_small_are_refused(tmp_path: Path):
    model = load(make_model(tmp_path / "model"))
    for options in ({"num_images": 0}, {"steps": 0}, {"max_minutes": 0}, {"max_minutes": math.nan}):
        with pytest.raises(UsageError, match="give 1 or more, and more than 0 minutes"):
            made_by(model, tmp_path / "scratch", **options)


def test_steps_are_reduced_to_the_time(tmp_path: Path):
    made = made_by(load(make_model(tmp_path / "model")), tmp_path / "scratch", steps=10**6, max_minutes=0.1)
    assert 1 <= made.steps < 10**5


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    make_model(folder / "model")
    done = vitq("synthesize", "model", *FEW, "--preview", "sheet.png", folder=folder)
    assert done.code == 0, done.err
    assert done.err.splitlines() == ["synthesize: 6 images ...", "next: vitq profile model --images vitq-run/images.safetensors"]
    assert "6 images made in 4 steps a batch" in done.out and done.out.endswith("wrote sheet.png\nwrote vitq-run/images.safetensors\n")
    return folder


def test_the_file_is_accepted_with_its_labels(session: Path):
    model = load(session / "model")
    file = session / "vitq-run" / "images.safetensors"
    opened = open_images(file, model.data_config, class_names=model.label_names)
    ((read, labels),) = opened
    assert opened.num_images == 6 and opened.labelled and read.shape == (6, 3, 32, 32)
    assert labels is not None and sorted(labels.tolist()[:CLASSES]) == list(range(CLASSES))
    with safe_open(file, "pt") as stored:
        made_from = json.loads(stored.metadata()["made_from"])
    assert made_from["model"]["source"] == "model" and made_from["model"]["digest"] == model.digest
    assert {"num_images": 6, "seed": 0, "iterations": 4, "batch_size": 2}.items() <= made_from["synthesis"].items()
    assert Image.open(session / "sheet.png").size == (3 * 98 + 2, 2 * 98 + 2)
    assert sorted(path.name for path in (session / "vitq-run").iterdir()) == ["images.safetensors"]


def test_the_images_are_good_for_the_next_command(session: Path):
    images_file = session / "vitq-run" / "images.safetensors"
    done = vitq("profile", "model", "--images", images_file, "--metric", "lampq", "--fisher", "empirical", "--bits", "4,8", folder=session)
    assert done.code == 0, done.err
    assert load_profile(session / "vitq-run" / "profile.json").made_from["images"]["num_images"] == 6


def test_show_says_what_the_file_holds(session: Path):
    done = vitq("show", "vitq-run/images.safetensors", folder=session)
    assert done.code == 0 and done.out.splitlines() == [
        "images: 6 of 3 x 32 x 32, with labels",
        "made from the model alone: 4 steps in batches of 2, seed 0",
        "made from model: model",
    ]
    assert vitq("show", "vitq-run/images.safetensors", "--json", folder=session).document["num_images"] == 6


def test_the_same_seed_makes_the_same_bytes_and_another_others(session: Path):
    for name, seed in (("again", 0), ("other", 1)):
        assert vitq("synthesize", "model", *FEW, "--seed", seed, "-o", f"{name}.safetensors", folder=session).code == 0
    first, again, other = (session / name for name in ("vitq-run/images.safetensors", "again.safetensors", "other.safetensors"))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_it_goes_on_after_an_interruption(session: Path, monkeypatch: pytest.MonkeyPatch):
    make, made = room.descend, []

    def interrupted(*arguments, **keywords):
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return make(*arguments, **keywords)

    monkeypatch.setattr(room, "descend", interrupted)
    command = ("synthesize", "model", *FEW, "-o", "resumed.safetensors")
    assert vitq(*command, folder=session).code == 130
    assert not (session / "resumed.safetensors").exists() and (session / ".resumed.scratch").exists()
    assert vitq(*command, folder=session).code == 0
    assert len(made) == 3 + 1  # three batches, two of them done
    assert (session / "resumed.safetensors").read_bytes() == (session / "vitq-run" / "images.safetensors").read_bytes()
    assert not (session / ".resumed.scratch").exists()


def test_json_is_one_document(session: Path):
    done = vitq("synthesize", "model", *FEW, "--force", "--json", folder=session)
    assert done.code == 0, done.err
    keys = {"output", "preview", "num_images", "iterations", "entropy", "noise_entropy", "agreement", "seconds"}
    assert done.document.keys() == keys and done.document["iterations"] == 4 and 0 <= done.document["agreement"] <= 100


def test_faults_end_with_their_codes(session: Path):
    before = (session / "vitq-run" / "images.safetensors").read_bytes()
    existing = vitq("synthesize", "model", folder=session)
    assert existing.code == 2 and "vitq-run/images.safetensors exists already; give --force" in existing.err
    drawn = vitq("synthesize", "model", "-o", "new.safetensors", "--preview", "sheet.png", folder=session)
    assert drawn.code == 2 and "sheet.png exists already" in drawn.err
    assert vitq("synthesize", "model", "-o", "new.tensors", folder=session).code == 2
    missing = vitq("synthesize", "no/such/model", "-o", "new.safetensors", folder=session)
    assert missing.code == 3 and "no/such/model does not exist" in missing.err
    assert vitq("synthesize", "model", "--max-minutes", 0, "-o", "new.safetensors", folder=session).code == 2
    assert not list(session.glob("*new*")) and (session / "vitq-run" / "images.safetensors").read_bytes() == before


def test_the_next_command_loads_the_same_model(session: Path):
    done = vitq(
        "synthesize", "model/model.safetensors", "--arch", "vit_tiny_patch16_224", *FEW, "-o", "by arch.safetensors", folder=session
    )
    assert done.err.splitlines()[-1] == (
        "next: vitq profile model/model.safetensors --arch vit_tiny_patch16_224 --images 'by arch.safetensors'"
    )


def test_another_models_images_are_pixels_without_labels(session: Path):
    """Its labels say nothing to a model with other classes, fewer here than they number."""
    make_model(session / "other", classes=3, seed=1)
    images = ("--images", "vitq-run/images.safetensors")
    said = "vitq-run/images.safetensors was made from another model, model: its images are used, any labels are not"
    own = vitq("evaluate", "model", *images, "--json", folder=session)
    foreign = vitq("evaluate", "other", *images, "--json", "--reference", "other", folder=session)
    assert (own.code, foreign.code) == (0, 0), foreign.err
    assert own.document.keys() >= {"top1", "top5"} and not foreign.document.keys() & {"top1", "top5"}
    assert said in foreign.err and "another model" not in own.err
    alone = vitq("evaluate", "other", *images, folder=session)
    assert alone.code == 0 and said in alone.err and "nothing is measured; give it with --reference MODEL" in alone.err
    empirical = vitq("profile", "other", *images, "--metric", "lampq", "--fisher", "empirical", "--run-dir", "other-run", folder=session)
    assert empirical.code == 3 and said in empirical.err and "needs labels and the images have none" in empirical.err
