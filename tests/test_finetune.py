"""Fine-tuning: its gradients against plain autograd, its loss and schedule against naive ones, going on after a kill, several processes."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_session import environment, make_images, make_model, vitq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitq import checkpoint as checkpoints
from vitq import models
from vitq.affine import highest_code, weight_codes
from vitq.allocation import allocate
from vitq.artifacts import load_profile
from vitq.augmented import Augmentation, TrainingImages, untouched
from vitq.calibration import calibrate
from vitq.checkpoint import Checkpoint
from vitq.errors import InputError, UsageError
from vitq.finetune import Distillation, Training, _split, finetune
from vitq.finetune.learner import Learner
from vitq.finetune.processes import Processes
from vitq.finetune.schedule import Schedule, steps_within
from vitq.finetune.state import keep, kept
from vitq.graph import run
from vitq.images import Images, open_images
from vitq.models import LoadedModel
from vitq.quantizers import RowSquares, TwinGrid, Uniform


def training_with(**changes: Any) -> Training:
    """A short run on a few images, whose state is kept after every step."""
    options: dict[str, Any] = {"epochs": 2.0, "batch_size": 8, "rate": 0.01, "save_minutes": 0.0} | changes
    return Training(**options)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, 40 images and a run folder that is calibrated to 2 bits on one of them: much is left to learn."""
    folder = tmp_path_factory.mktemp("session")
    make_model(folder / "model")
    make_images(folder / "images")
    for command in (
        ("profile", "model", "--images", "images", "--num-images", 24, "--batch-size", 8),
        ("allocate", "--uniform", 2),
        ("calibrate", "--num-images", 1),
    ):
        assert vitq(*command, folder=folder).code == 0
    return folder


@pytest.fixture(scope="module")
def model(session: Path) -> LoadedModel:
    return models.load(session / "model")


@pytest.fixture(scope="module")
def start(session: Path) -> Checkpoint:
    return checkpoints.load(session / "vitq-run" / "model.safetensors")


def opened(session: Path, model: LoadedModel) -> Images:
    return open_images(session / "images", model.data_config, None, batch_size=8)


def everything(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tensors = {f"codes:{name}": weight.codes for name, weight in checkpoint.weights.items()}
    tensors |= {f"scale:{name}": weight.scale for name, weight in checkpoint.weights.items()}
    ranges = {f"range:{name}": torch.tensor([q.scale, q.zero_point]) for name, q in checkpoint.activations.items()}  # type: ignore[attr-defined]
    return tensors | ranges | dict(checkpoint.graph.module.state_dict())


def same(first: Checkpoint, second: Checkpoint) -> bool:
    before, after = everything(first), everything(second)
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# Gradients


def rounded(x: Tensor) -> Tensor:
    """Rounding whose gradient is 1, its value exact."""
    return x.round().detach() + (x - x.detach())


def clipped(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """x within its bounds, whose gradient is 1 where x lies on one: torch's own clamp has 1 or 0 there, by its version."""
    low, high = torch.as_tensor(low).expand_as(x), torch.as_tensor(high).expand_as(x)
    return torch.where(x < low, low, torch.where(x > high, high, x))


def naive_output(start: Checkpoint, leaves: dict[str, Tensor], images: Tensor) -> Tensor:
    """The whole network, quantized by plain differentiable operations: rounding with gradient 1, and clipping."""
    graph = start.graph

    def activation(tensor: str, x: Tensor) -> Tensor:
        quantizer = start.activations[tensor]
        if isinstance(quantizer, TwinGrid):
            scale = torch.tensor(quantizer.scale) * leaves[f"range:{tensor}"].exp()
            steps = x / scale
            whole = quantizer.integers(quantizer.codes(steps.detach())) - quantizer.zero_point
            ends = (quantizer.integers(torch.tensor([0.0, highest_code(quantizer.bits)])) - quantizer.zero_point).tolist()
            inside = (steps >= ends[0] - 0.5) & (steps <= ends[1] + quantizer.ratio / 2)
            return scale * torch.where(inside, steps + (whole - steps).detach(), whole)
        if isinstance(quantizer, RowSquares):
            root = (x / x.amax(-1, keepdim=True)).detach().sqrt()
            squares = (root * (2**quantizer.bits - 1)).round().square()
            return squares / squares.sum(-1, keepdim=True) + (x - x.detach())  # nothing is learned of it
        assert isinstance(quantizer, Uniform)
        scale = torch.tensor(quantizer.scale) * leaves[f"range:{tensor}"].exp()
        learned = leaves[f"zero_point:{tensor}"]
        bounded = learned.detach().clamp(0, highest_code(quantizer.bits)) + (learned - learned.detach())
        zero = rounded(bounded)
        codes = clipped(rounded(x / scale) + zero, 0.0, float(highest_code(quantizer.bits)))
        return (codes - zero) * scale

    def layer_of(layer):
        def intercept(compute, *arguments):
            read = [activation(operand.tensor, x) for operand, x in zip(layer.activations, arguments, strict=False)]
            if not layer.has_weight:
                return compute(*read, *arguments[len(read) :])
            weight = start.weights[layer.name]
            per_channel = (-1, *[1] * (weight.codes.dim() - 1))
            zero = weight.zero_point.float().reshape(per_channel)
            lowest, highest = weight_codes(weight.bits)
            steps = clipped(rounded(leaves[f"steps:{layer.name}"]) + zero, float(lowest), float(highest)) - zero
            scale = weight.scale.reshape(per_channel) * leaves[f"gain:{layer.name}"].exp()
            bias = arguments[2] + leaves[f"bias:{layer.name}"] * weight.dequantize().flatten(1).norm(dim=1)
            return compute(*read, steps * scale, bias, *arguments[3:])

        return intercept

    def norm_of(name):
        def intercept(compute, x, shape, gain, bias, *rest):
            return compute(
                x, shape, gain * leaves[f"norm_gain:norm {name}"].exp(), bias + gain.abs() * leaves[f"norm_bias:norm {name}"], *rest
            )

        return intercept

    intercepts = {graph.nodes[layer.name]: layer_of(layer) for layer in graph.layers}
    norms = [name.removeprefix("norm_gain:norm ") for name in leaves if name.startswith("norm_gain:")]
    return run(graph.module, images, intercepts | {name: norm_of(name) for name in norms})


def test_all_gradients_are_those_of_a_naive_network(model: LoadedModel, start: Checkpoint, session: Path):
    """Every variable of the whole network, by backpropagation through rounding with gradient 1, and clipping."""
    learner = Learner(start, model, training_with(), Processes())
    generator = torch.Generator().manual_seed(0)
    moved = {f"variable {n}": v + 0.05 * torch.randn(v.shape, generator=generator) for n, v in learner._leaves.items()}
    learner.put(moved)
    batch = next(untouched(opened(session, model), range(8), 8))
    learner.backward(batch)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in learner._leaves.items()}
    output = naive_output(start, leaves, batch[0])
    with torch.no_grad():
        wanted = model.module(batch[0]).log_softmax(1)
    torch.nn.functional.kl_div(output.log_softmax(1), wanted, log_target=True, reduction="batchmean").backward()
    assert {name.split(":")[0] for name in leaves} == {"steps", "gain", "bias", "range", "zero_point", "norm_gain", "norm_bias"}
    assert len(leaves) == len(learner._leaves) and len({layer.block for layer in start.graph.layers}) > 2
    for name, leaf in leaves.items():
        found = learner._leaves[name].grad
        assert found is not None and leaf.grad is not None, name
        assert torch.allclose(found, leaf.grad, rtol=1e-3, atol=1e-5 * float(leaf.grad.abs().max()) + 1e-7), name
    assert sum(float(leaf.grad.abs().sum()) > 0 for leaf in leaves.values() if leaf.grad is not None) > 0.9 * len(leaves)


# The loss


@pytest.mark.parametrize(("soft", "hard", "temperature"), [(1.0, 0.0, 1.0), (0.0, 2.0, 1.0), (0.5, 0.25, 3.0)])
def test_the_loss_is_the_naive_one(soft: float, hard: float, temperature: float):
    generator = torch.Generator().manual_seed(0)
    output, wanted, labels = (
        torch.randn(6, 4, generator=generator),
        torch.randn(6, 4, generator=generator),
        torch.tensor([0, 3, 1, 1, 2, 0]),
    )

    def softmax(z: Tensor, t: float) -> list[float]:
        e = [2.718281828459045 ** (float(v) / t) for v in z]
        return [v / sum(e) for v in e]

    naive = 0.0
    for z, y, label in zip(output, wanted, labels, strict=True):
        p, q = softmax(y, temperature), softmax(z, temperature)
        naive += soft * temperature**2 * sum(a * float(torch.tensor(a / b).log()) for a, b in zip(p, q, strict=True)) / 6
        naive -= hard * float(torch.tensor(softmax(z, 1.0)[label]).log()) / 6
    how = Distillation(soft, hard, temperature)
    assert float(how.loss(output, wanted, labels, 4)) == pytest.approx(naive, rel=1e-4)
    spread = torch.nn.functional.one_hot(labels, 4).float()
    assert float(how.loss(output, wanted, spread, 4)) == pytest.approx(naive, rel=1e-4)


def test_a_backbones_loss_is_half_the_squared_relative_error():
    output, wanted = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 3.0], [0.0, 1.0]])
    assert float(Distillation().loss(output, wanted, None, 0)) == pytest.approx(0.5 * (1 / 18 + 1 / 1) / 2)


# The schedule


@settings(max_examples=40)
@given(st.integers(1, 200), st.sampled_from([0.0, 0.05, 0.5]), st.data())
def test_rates_rise_then_fall_to_nothing_whatever_the_steps_become(steps: int, warmup: float, data: st.DataObject):
    schedule, factors, progress = Schedule(steps), [], [0.0]
    while schedule.left:
        factors.append(schedule.factor(warmup))
        schedule = schedule.stepped()
        progress.append(schedule.progress)
        if schedule.left and schedule.taken < 400 and data.draw(st.integers(0, 9)) == 0:
            schedule = replace(schedule, left=data.draw(st.integers(1, 100)))
    assert schedule.progress == pytest.approx(1) and progress == sorted(progress) and len(factors) == schedule.taken
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1]) and factors[top:] == sorted(factors[top:], reverse=True)


def test_a_schedule_that_is_left_alone_is_a_line_and_half_a_cosine():
    schedule, factors = Schedule(100), []
    while schedule.left:
        factors.append(schedule.factor(0.1))
        schedule = schedule.stepped()
    assert factors[0] == pytest.approx(0.05) and factors[4] == pytest.approx(0.45)
    assert factors[54] == pytest.approx(0.5, abs=0.02) and factors[99] < 0.001


@given(st.floats(0, 1e4), st.floats(1e-3, 10), st.integers(1, 10_000))
def test_steps_fit_the_time(seconds: float, each: float, most: int):
    found = steps_within(seconds, each, most)
    assert 1 <= found <= most and (found == 1 or found * each <= seconds * (1 + 1e-9))
    assert found == most or (found + 1) * each > seconds * (1 - 1e-9)


# The images


def test_a_step_sees_the_same_pictures_wherever_a_run_begins(session: Path, model: LoadedModel):
    torch.manual_seed(1)
    source = TrainingImages(opened(session, model), range(32), Augmentation(color_jitter=0.4, reprob=0.5, mixup=0.5), 8, 3, 5)
    whole = [next(batches) for batches in [source.batches()] for _ in range(6)]
    before = torch.random.get_rng_state()
    later = [next(batches) for batches in [source.batches(4)] for _ in range(2)]
    assert torch.equal(before, torch.random.get_rng_state())
    for (images, labels), (again, labels_again) in zip(whole[4:], later, strict=True):
        assert labels is not None and labels_again is not None
        assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(whole[0][0], whole[1][0])
    assert sorted(row for step in range(4) for _, row in source.keys(step)) == list(range(32))
    assert [row for _, row in source.keys(0)] != [row for _, row in source.keys(4)]  # another pass, another order


def test_processes_share_the_pictures_of_a_batch(session: Path, model: LoadedModel):
    one, *parts = (
        next(TrainingImages(opened(session, model), range(40), Augmentation(), 8, 0, share=share, workers=workers).batches(3))
        for share, workers in (((0, 1), 0), ((0, 2), 0), ((1, 2), 1))
    )
    assert torch.equal(one[0], torch.cat([images for images, _ in parts]))


def test_a_view_is_a_crop_that_is_mirrored_or_not(session: Path, model: LoadedModel):
    """Without any change of size or mirroring, the training transform is the preprocessing itself, up to how it resizes."""
    images = opened(session, model)
    batch, labels = next(TrainingImages(images, range(40), Augmentation(min_scale=1.0, hflip=0.0), 40, 0).batches())
    plain, plain_labels = next(untouched(images, range(40), 40))
    assert labels is not None and plain_labels is not None
    by_label = {int(label): plain[plain_labels == label].mean((0, 2, 3)) for label in plain_labels}
    for label, colour in by_label.items():
        assert torch.allclose(batch[labels == label].mean((0, 2, 3)), colour, atol=0.1)


@pytest.mark.parametrize(("count", "held"), [(16, 1), (1000, 62), (8192, 512), (8193, 481), (50_000, 510)])
def test_images_of_all_classes_are_held_out(count: int, held: int):
    """They come in the order of their names, class by class."""
    images = Images("", {}, count, "", True, (), None)  # type: ignore[arg-type]
    out, rows = _split(images)
    assert len(out) == held and sorted(out + rows) == list(range(count))
    gaps = {second - first for first, second in pairwise([-1, *out])}
    assert len(gaps) == 1 and count - 1 - out[-1] < gaps.pop()


# Going on


class Killed(BaseException):
    pass


@pytest.mark.parametrize("changes", [{}, {"recipe": "ofq", "ema": 0.9, "clip": 1.0, "decay": 0.01}])
def test_a_killed_run_goes_on_to_the_same_bits(changes: dict, session: Path, model: LoadedModel, start: Checkpoint, tmp_path: Path):
    training = training_with(**changes)
    whole = finetune(start, model, opened(session, model), training, tmp_path / "whole")

    def killed(done: float, _: float, __: str) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        finetune(start, model, opened(session, model), training, tmp_path / "state", progress=killed)
    torch.manual_seed(123)
    steps = []
    found = finetune(start, model, opened(session, model), training, tmp_path / "state", progress=lambda done, *_: steps.append(done))
    assert steps[0] == 5 and steps[-1] == whole.steps == found.steps == 8  # the fifth step had not been kept
    assert same(whole.checkpoint, found.checkpoint) and not same(start, found.checkpoint)
    assert (whole.before, whole.after) == (found.before, found.after) and found.after < found.before
    steps.clear()  # killed once more, before the state of the run that has ended was removed: the next run begins anew
    finetune(found.checkpoint, model, opened(session, model), training, tmp_path / "state", progress=lambda done, *_: steps.append(done))
    assert steps[0] == 1


def test_a_state_of_another_run_is_refused(session: Path, model: LoadedModel, start: Checkpoint, tmp_path: Path):
    state = tmp_path / "state.safetensors"
    keep(state, "another", Schedule(3), 0.5, {"x": torch.zeros(2)})
    with pytest.raises(
        UsageError, match="is of a fine-tuning with other options, images or another start; give those to go on, or --no-res"
    ):
        finetune(start, model, opened(session, model), training_with(), state)
    schedule, before, tensors = kept(state, "another") or pytest.fail("nothing kept")
    assert schedule == Schedule(3) and before == 0.5 and torch.equal(tensors["x"], torch.zeros(2))
    state.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"state.safetensors is damaged: .*; give --no-resume to begin anew"):
        kept(state, "another")


# What comes of it


@pytest.mark.parametrize("recipe", ["lsq", "ofq"])
def test_the_loss_on_held_out_images_falls_and_the_file_is_what_was_trained(
    recipe: str, session: Path, model: LoadedModel, start: Checkpoint, tmp_path: Path
):
    training = training_with(recipe=recipe, epochs=6.0)
    found = finetune(start, model, opened(session, model), training, tmp_path / "state")
    assert found.after < 0.8 * found.before and found.steps == 24 and found.epochs == pytest.approx(6)
    checkpoints.save(found.checkpoint, tmp_path / "model.safetensors")
    loaded = checkpoints.load(tmp_path / "model.safetensors")
    assert same(found.checkpoint, loaded) and loaded.made_from["finetuning"]["steps"] == 24
    held = torch.cat([images for images, _ in untouched(opened(session, model), [15, 31], 8)])
    with torch.no_grad():
        wanted, output = model.module(held).log_softmax(1), loaded.quantized_module()(held).log_softmax(1)
    assert float((wanted.exp() * (wanted - output)).sum(1).mean()) == pytest.approx(found.after, rel=1e-4)
    assert {entry.name: entry for entry in loaded.plan.layers}[start.graph.layers[0].name].weight_bits == 8


def test_what_is_trained_by_statistics_is_what_comes_back(model: LoadedModel, start: Checkpoint, tmp_path: Path, session: Path):
    """Recipe ofq, wherever the weights were moved to: the scale follows their size, codes and file give what was trained."""
    learner = Learner(start, model, training_with(recipe="ofq"), Processes())
    assert same(learner.checkpoint(), start) and not any(name.startswith("gain:") for name in learner._leaves)
    name = next(name for name in learner._leaves if name.startswith("steps:"))
    factor = torch.linspace(0.5, 2.0, start.weights[name[6:]].scale.numel())[:, None]
    moved = learner.tensors() | {f"variable {name}": learner._leaves[name].detach() * factor}
    learner.put(moved)
    made, images = learner.checkpoint(), opened(session, model)
    assert torch.allclose(made.weights[name[6:]].scale, start.weights[name[6:]].scale * factor[:, 0], rtol=1e-5)
    assert float((made.weights[name[6:]].codes != start.weights[name[6:]].codes).float().mean()) < 0.001  # scaled as a whole
    batch, _ = next(untouched(images, range(8), 8))
    with torch.no_grad():
        assert torch.equal(run(start.graph.module, batch, learner._variables.intercepts()), made.quantized_module()(batch))


def test_annealing_moves_only_weights_that_are_near_a_boundary(model: LoadedModel, start: Checkpoint, session: Path):
    learner = Learner(start, model, training_with(recipe="ofq"), Processes())
    generator = torch.Generator().manual_seed(0)
    learner.put({f"variable {n}": v + 0.3 * torch.rand(v.shape, generator=generator) for n, v in learner._leaves.items()})
    before, steps = {n: v.detach().clone() for n, v in learner._leaves.items()}, learner._variables.steps()
    learner.step(next(untouched(opened(session, model), range(8), 8)), 1.0, annealing=True)
    changed = 0
    for name, value in steps.items():
        moved = learner._leaves[name].detach() != before[name]
        distance = ((value % 1) - 0.5).abs()
        assert float(distance[moved].max() if moved.any() else 0) <= 0.005
        changed += int(moved.sum())
    assert changed > 0 and not torch.equal(learner._leaves["bias:head"], before["bias:head"])


def test_nothing_is_taken_that_is_worse(session: Path, model: LoadedModel, tmp_path: Path):
    """Of 8 bits, which are near to float, such rates leave nothing, and scales run to where float32 ends."""
    profile = load_profile(session / "vitq-run" / "profile.json")
    start = calibrate(model, allocate(profile, uniform="8").plan, opened(session, model))
    found = finetune(start, model, opened(session, model), training_with(rate=50.0, other_rates=3000.0), tmp_path / "state")
    assert found.after > 2 * found.before and found.checkpoint is start and found.fair


def test_other_images_judge_where_they_are_given(session: Path, model: LoadedModel, start: Checkpoint, tmp_path: Path):
    """By all of them, and none is held out; with labels, where none are given, what is trained is taken, since nothing is a fair judge."""
    images, others = opened(session, model), open_images(session / "images", model.data_config, 12, seed=1, batch_size=8)
    training = training_with(rate=50.0, other_rates=3000.0, epochs=0.5, distillation=Distillation(0.5, 1.0))
    found = finetune(start, model, images, training, tmp_path / "state", validation=others)
    assert found.checkpoint is start and found.fair and found.judges == 12 and found.epochs == 2 / 5 and found.after > found.before
    total, quantized = 0.0, start.quantized_module()
    with torch.no_grad():
        for pictures, labels in others:
            wanted, output = model.module(pictures).log_softmax(1), quantized(pictures).log_softmax(1)
            total += float(0.5 * (wanted.exp() * (wanted - output)).sum() - output.gather(1, labels[:, None]).sum())
    assert found.before == pytest.approx(total / 12, rel=1e-4)
    with pytest.raises(UsageError, match="is of a fine-tuning with other options"):
        keep(tmp_path / "state", "other", Schedule(1), 0.0, {})
        finetune(start, model, images, training, tmp_path / "state", validation=others)
    (tmp_path / "state").unlink()
    found = finetune(start, model, images, training, tmp_path / "state")
    assert found.after > found.before and found.judges == 2 and not found.fair and found.checkpoint is not start


def test_autocast_computes_in_bfloat16(model: LoadedModel, start: Checkpoint, session: Path):
    batch = next(untouched(opened(session, model), range(8), 8))
    plain, half = (Learner(start, model, training_with(bfloat16=on), Processes()) for on in (False, True))
    losses = plain.backward(batch), half.backward(batch)
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.5)  # codes flip
    for name, leaf in plain._leaves.items():
        other = half._leaves[name].grad
        assert other is not None and other.dtype == torch.float32 and leaf.grad is not None, name
        if name.startswith("steps:"):
            assert torch.nn.functional.cosine_similarity(leaf.grad.flatten(), other.flatten(), dim=0) > 0.3, name  # 0 of unrelated ones


def test_faults_say_what_to_do(session: Path, model: LoadedModel, start: Checkpoint, tmp_path: Path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (session / "images").rglob("*.png"):
        (flat / path.name).write_bytes(path.read_bytes())
    unlabelled = open_images(flat, model.data_config, None)
    hard = training_with(distillation=Distillation(1.0, 0.5))
    with pytest.raises(
        InputError,
        match="flat has no labels; give --hard 0 to learn from the float model alone, or images in a folder for each of its classes",
    ):
        finetune(start, model, unlabelled, hard, tmp_path / "state")
    with pytest.raises(InputError, match="flat has no labels; give --hard 0"):
        finetune(start, model, opened(session, model), hard, tmp_path / "state", validation=unlabelled)
    few = open_images(flat, model.data_config, 15)
    with pytest.raises(InputError, match="15 images are too few to train on; give --images with at least 16"):
        finetune(start, model, few, training_with(), tmp_path / "state")
    with pytest.raises(
        InputError,
        match=r"38 images to train on \(40 without the 2 that are held out to judge by\) are no batch of 64; give more",
    ):
        finetune(start, model, unlabelled, training_with(batch_size=64), tmp_path / "state")
    for changes, text in (
        ({"recipe": "qat"}, "recipe 'qat' is not known; give one of lsq, ofq"),
        (
            {"epochs": 0.0},
            "--epochs 0, --batch-size 8, --lr 0.01 and --other-lrs 1 cannot be trained with; give more than 0, for rates 0 or more",
        ),
        ({"ema": 1.0}, "--model-ema-decay 1, .* cannot be trained with"),
        ({"distillation": Distillation(0.0, 0.0)}, "--soft 0, --hard 0 and --temperature 1 make no loss"),
        (
            {"augmentation": Augmentation(aa="nonsense")},
            "--aa 'nonsense' is no policy of timm's; give rand-m9-mstd0.5 or the like, .* 3a, or leave it out",
        ),
    ):
        with pytest.raises(UsageError, match=text):
            finetune(start, model, unlabelled, training_with(**changes), tmp_path / "state")
    for policy in (
        "rand-m9-mstd0.5",
        "rand-m9-mstd0.5-inc1",
        "rand-n2-p0.5",
        "augmix-m5-w4-d2",
        "original-mstd0.5",
        "3a",
        "rand",
        "rand-mmax10",
    ):
        Augmentation(aa=policy).check()
    with pytest.raises(UsageError, match="3 processes cannot share batches of 8 images; give --batch-size a multiple of 3"):
        TrainingImages(unlabelled, range(20), Augmentation(), 8, 0, share=(0, 3))


# Several processes

GRADIENTS = """
import sys
from safetensors.torch import save_file
from vitq import checkpoint, models
from vitq.augmented import Augmentation, TrainingImages
from vitq.finetune import Training, joined
from vitq.finetune.learner import Learner
from vitq.images import open_images

with joined("cpu") as processes:
    model = models.load("model")
    images = open_images("images", model.data_config, None)
    source = TrainingImages(images, range(40), Augmentation(), 8, 0, share=(processes.rank, processes.count))
    learner = Learner(checkpoint.load("vitq-run/model.safetensors"), model, Training(batch_size=8), processes)
    learner.backward(next(source.batches()))
    if processes.leads:
        save_file({name: leaf.grad for name, leaf in learner._leaves.items()}, sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(session: Path, tmp_path: Path):
    from safetensors.torch import load_file

    (tmp_path / "gradients.py").write_text(GRADIENTS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    found = []
    for count in (1, 2):
        path = tmp_path / f"{count}.safetensors"
        command = [*launch, str(count), str(tmp_path / "gradients.py"), str(path)]
        done = subprocess.run(
            command, cwd=session, env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(load_file(path))
    one, two = found
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5 * float(one[name].abs().max()) + 1e-8), name
    assert any(float(gradient.abs().max()) > 0 for gradient in one.values())


@pytest.mark.slow
def test_torchrun_trains_one_model(session: Path, tmp_path: Path):
    """The command itself in two processes: one file, one document, and nothing from the second process."""
    shutil.copytree(session, tmp_path / "session")
    options = ["--images", "images", "--epochs", "6", "--batch-size", "8", "--json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "vitq", "finetune", *options]
    done = subprocess.run(
        command, cwd=tmp_path / "session", env=environment() | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["steps"] == 24 and document["loss_after"] < document["loss_before"]
    trained = checkpoints.load(tmp_path / "session" / "vitq-run" / "model.safetensors")
    assert trained.made_from["finetuning"]["processes"] == 2


@pytest.mark.parametrize("far", [-100.0, 100.0])
def test_scales_that_ran_away_are_held_where_float32_divides(session: Path, model: LoadedModel, start: Checkpoint, far: float):
    learner = Learner(start, model, training_with(), Processes())
    away = {name: torch.full_like(v, far) if name.startswith(("range", "gain")) else v for name, v in learner._leaves.items()}
    learner.put({f"variable {name}": value for name, value in away.items()})
    made = learner.checkpoint()
    scales = [q.scale for q in made.activations.values() if not isinstance(q, RowSquares)]  # type: ignore[attr-defined]
    scales += [float(scale) for weight in made.weights.values() for scale in weight.scale]
    assert all((1e-20 < scale < 1e-18) if far < 0 else (1e18 < scale < 1e20) for scale in scales)
