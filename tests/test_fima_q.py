"""Recipe `fima-q`: its loss against dense matrices, its gradients against the Fisher information itself, and what the recipe promises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import captured, images
from test_calibration import in_batches, plan_for
from torch import Tensor

from vitq import checkpoint as checkpoints
from vitq.calibration import fima_q
from vitq.calibration.blocks import Turn
from vitq.calibration.fima_q import Fisher, RoundedBlock, calibrate_fima_q, fit_uniform, observed
from vitq.calibration.learning import Learning
from vitq.calibration.scratch import Scratch
from vitq.calibration.streams import Stream
from vitq.checkpoint import Checkpoint
from vitq.errors import UsageError
from vitq.gradients import loss
from vitq.graph import Graph, run
from vitq.quantizers import Uniform
from vitq.rewrites import rewrite

BATCHES = in_batches(images(24, 32), 10)


def learning(folder: Path, iterations: int = 6, seed: int = 3) -> Learning:
    return Learning(iterations=iterations, seed=seed, batch_size=8, views=1, scratch=folder / "scratch")


@pytest.fixture(scope="module")
def graph() -> Graph:
    return rewrite(captured("vit")[1])


@pytest.fixture(scope="module")
def first(graph: Graph) -> Checkpoint:
    return fit_uniform(graph, plan_for(graph, "vit", 3), BATCHES)


def codes(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: weight.codes for name, weight in checkpoint.weights.items()}


# The loss


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_loss_is_that_of_the_dense_matrices(rank: int):
    generator = torch.Generator().manual_seed(rank)
    gradients, changes = (torch.rand(rank, 9, generator=generator) for _ in range(2))
    errors = torch.rand(4, 9, generator=generator)
    g, d, e = (values.double().numpy() for values in (gradients, changes, errors))
    low_rank = g.T @ np.linalg.inv(d @ d.T) @ g
    diagonal = np.diag(g.mean(0))
    fisher = Fisher(gradients, changes)
    assert fisher.low_rank(errors).tolist() == pytest.approx([float(row @ low_rank @ row) for row in e], rel=1e-4)
    assert fisher.diagonal(errors).tolist() == pytest.approx([float(row @ diagonal @ row) for row in e], rel=1e-4)


def test_an_observation_that_is_made_twice_says_nothing_new():
    generator = torch.Generator().manual_seed(0)
    once = Fisher(torch.rand(1, 9, generator=generator), torch.rand(1, 9, generator=generator))
    twice = Fisher(once.gradients.repeat(2, 1), once.changes.repeat(2, 1))
    errors = torch.rand(4, 9, generator=generator)
    assert torch.allclose(twice.low_rank(errors), once.low_rank(errors)) and torch.allclose(twice.diagonal(errors), once.diagonal(errors))


def turn_of(scratch: Scratch, y: Tensor, change: Tensor, rest: Callable[[Tensor], Tensor], **options: Any) -> tuple[Turn, Stream]:
    """A block that gives y where it should give y - change, and the float network's outputs."""
    streams = {name: Stream(scratch, name, len(y), 4, y.device) for name in ("read", "after", "wanted")}
    for numbers in streams["read"].batches():
        streams["read"].write(numbers, {"y": y[numbers], "batch": len(numbers)})
        streams["after"].write(numbers, {"y": (y - change)[numbers], "batch": len(numbers)})
        streams["wanted"].write(numbers, {"output": rest((y - change)[numbers])})
    turn: Turn[Any] = Turn(
        0, None, dict, lambda values: {"output": rest(values["y"])}, streams["read"], streams["after"], (streams["read"],),
        torch.Generator(), lambda part: None,
    )  # fmt: skip
    return turn, streams["wanted"]


def test_the_gradients_of_the_kl_are_the_fisher_information_times_the_change(tmp_path: Path):
    """Theorem 3.2, with the Fisher information of a linear network from its definition; logits are divided by 20."""
    generator = torch.Generator().manual_seed(0)
    matrix, y = torch.randn(5, 3, generator=generator), torch.randn(8, 3, generator=generator)
    change = 0.05 * torch.randn(8, 3, generator=generator)
    turn, wanted = turn_of(Scratch(tmp_path / "scratch", "x"), y, change, lambda y: y @ matrix.T)
    found = observed(turn, wanted, 5)
    sums = np.zeros(3)
    m = matrix.double().numpy() / 20
    for row, moved in zip((y - change).double().numpy(), change.double().numpy(), strict=True):
        p = np.exp(m @ row) / np.exp(m @ row).sum()
        sums += abs(m.T @ (np.diag(p) - np.outer(p, p)) @ m @ moved)
    assert found.gradients.tolist()[0] == pytest.approx((sums / 8).tolist(), rel=0.01)
    assert torch.allclose(found.changes[0], change.abs().mean(0), atol=1e-6)


# A block


def test_variables_start_at_the_checkpoint(first: Checkpoint):
    assert first.floats is not None
    block = RoundedBlock(first.floats, first, list(first.graph.layers))
    found = block.checkpoint()
    assert all(torch.equal(before, codes(found)[name]) for name, before in codes(first).items())
    assert found.activations == first.activations and all(isinstance(quantizer, Uniform) for quantizer in found.activations.values())


def test_what_comes_back_is_what_was_trained(first: Checkpoint, tmp_path: Path):
    """Not learning, a block computes what its checkpoint does, bit by bit, wherever the variables are; no weight moves by a whole step."""
    assert first.floats is not None
    block = RoundedBlock(first.floats, first, list(first.graph.layers))
    generator = torch.Generator().manual_seed(0)
    block.put({name: value + 0.4 * torch.randn(value.shape, generator=generator) for name, value in block.tensors().items()})
    found = block.checkpoint()
    assert any(not torch.equal(before, codes(found)[name]) for name, before in codes(first).items())
    assert all((codes(found)[name].int() - before.int()).abs().max() <= 1 for name, before in codes(first).items())
    checkpoints.save(found, tmp_path / "model.safetensors")
    x = images(5, 32, seed=8)
    with torch.no_grad():
        trained = run(first.graph.module, x, block.intercepts())
        assert torch.equal(trained, found.quantized_module()(x))
        assert torch.equal(trained, checkpoints.load(tmp_path / "model.safetensors").quantized_module()(x))


def test_a_block_that_learns_reads_half_in_float_and_rounds_softly(first: Checkpoint):
    assert first.floats is not None
    layer = next(layer for layer in first.graph.layers if layer.type == "fc1")
    block = RoundedBlock(first.floats, first, [layer])
    block.drops = torch.Generator().manual_seed(0)
    seen: list[Tensor] = []

    def keep(*read: Tensor) -> Tensor:
        seen.extend(read)
        return read[0]

    x = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(1))
    float_weight = first.floats.module.get_parameter(layer.operands[1].tensor)
    block.intercepts()[first.floats.nodes[layer.name]](keep, x, float_weight, None)
    read, weight, bias = seen
    quantizer = first.activations[layer.operands[0].tensor]
    assert bool(((read == x) | (read == quantizer.quantize_dequantize(x))).all()) and 0.4 < float((read == x).float().mean()) < 0.6
    (low, high), zero_point = (0, 7), first.weights[layer.name].zero_point[:, None]
    steps = float_weight / first.weights[layer.name].scale[:, None] + zero_point
    inside = (steps >= low) & (steps <= high)  # there nothing is rounded yet; what lies outside is at the end of the range
    assert bias is None and float(inside.float().mean()) > 0.5 and torch.allclose(weight[inside], float_weight[inside], atol=1e-6)


# The recipe


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_it_ends_nearer_to_the_float_network_than_it_starts(family: str, tmp_path: Path):
    model, before = captured(family)
    graph = rewrite(before)
    size = graph.input_shape[1:]
    plan, batches = plan_for(graph, family, 3), in_batches(images(24, size), 10)
    x = images(24, size, seed=7)  # others than those that are learned from
    found = calibrate_fima_q(graph, plan, batches, learning=learning(tmp_path, 60))
    with torch.no_grad():
        start, end = (
            float(loss(model(x), checkpoint.quantized_module()(x), plan.model.num_classes).mean())
            for checkpoint in (fit_uniform(graph, plan, batches), found)
        )
    assert end < start
    assert not (tmp_path / "scratch").exists()


def test_the_rank_grows_as_a_block_learns(graph: Graph, first: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ranks: list[int] = []

    class Counted(Fisher):
        def low_rank(self, errors: Tensor) -> Tensor:
            ranks.append(len(self.gradients))
            return super().low_rank(errors)

    monkeypatch.setattr(fima_q, "Fisher", Counted)
    calibrate_fima_q(graph, first.plan, BATCHES, learning=learning(tmp_path, 10))
    assert ranks == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5] * (len(graph.blocks) - 1)  # the last block learns from the output itself


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_to_the_same_codes(graph: Graph, first: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = calibrate_fima_q(graph, first.plan, BATCHES, learning=learning(tmp_path))
    learn_block, learned = fima_q.learn_block, []

    def killed(*arguments: Any) -> None:
        learned.append(arguments)
        if len(learned) == 3:
            raise Killed
        learn_block(*arguments)

    monkeypatch.setattr(fima_q, "learn_block", killed)
    with pytest.raises(Killed):
        calibrate_fima_q(graph, first.plan, BATCHES, learning=learning(tmp_path))
    resumed = calibrate_fima_q(graph, first.plan, BATCHES, learning=learning(tmp_path))
    assert len(learned) == 3 + len(graph.blocks) - 2
    assert all(torch.equal(value, codes(resumed)[name]) for name, value in codes(whole).items())
    assert resumed.activations == whole.activations


def test_faults_say_what_to_do(graph: Graph, first: Checkpoint, tmp_path: Path):
    with pytest.raises(UsageError, match="iterations 0 cannot be learned with; give at least 1, or recipe fast"):
        calibrate_fima_q(graph, first.plan, BATCHES, learning=learning(tmp_path, 0))
