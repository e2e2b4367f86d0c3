"""Recipe `reconstruct`: its gradients against finite differences, what it promises on held-out images, its scratch folder, and resuming."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import captured, images
from test_calibration import in_batches, plan_for
from torch import Tensor

from vitq import checkpoint as checkpoints
from vitq.affine import quantize_dequantize, weight_codes
from vitq.calibration import reconstruct
from vitq.calibration.attribution import attribute
from vitq.calibration.errors import block_error, weights_of_errors
from vitq.calibration.estimate import estimate
from vitq.calibration.fast import fit_fast
from vitq.calibration.held import Held
from vitq.calibration.learned import learned_activation, learned_twin_grid, learned_weight, straight_through
from vitq.calibration.learning import Learning
from vitq.calibration.reconstruct import calibrate_reconstruct, held_out, held_out_loss
from vitq.calibration.scratch import Rows, Scratch
from vitq.calibration.streams import Stream
from vitq.calibration.variables import BlockVariables
from vitq.calibration.views import view
from vitq.checkpoint import Checkpoint
from vitq.errors import InputError, UsageError
from vitq.graph import Graph, run
from vitq.quantizers import Log2, Quantizer, RowSquares, TwinGrid
from vitq.ranges import fold
from vitq.rewrites import rewrite

BATCHES = in_batches(images(24, 32), 10)  # 10, 10 and 4: images of all batches are held out


def learning(folder: Path, **changes: int) -> Learning:
    options: dict[str, Any] = {"iterations": 6, "seed": 3, "batch_size": 8, "views": 2} | changes
    return Learning(scratch=folder / "scratch", **options)


def start_of(family: str = "vit", bits: int = 3) -> tuple[Graph, Graph, Checkpoint]:
    """The rewritten graph, the folded one and what `fast` makes of it on the images that are learned from."""
    graph = rewrite(captured(family)[1])
    batches = in_batches(images(24, graph.input_shape[1:]), 10)
    others = [
        (some[[index % 8 != 7 for index in range(first, first + len(some))]], None)
        for first, (some, _) in zip((0, 10, 20), batches, strict=True)
    ]
    folded, histograms = fold(graph, others)
    return graph, folded, fit_fast(folded, histograms, plan_for(graph, family, bits), others)


def everything(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tensors = {f"codes:{name}": weight.codes for name, weight in checkpoint.weights.items()}
    tensors |= {f"scale:{name}": weight.scale for name, weight in checkpoint.weights.items()}
    ranges = {f"range:{name}": torch.tensor([q.scale, q.zero_point]) for name, q in checkpoint.activations.items()}  # type: ignore[attr-defined]
    return tensors | ranges | dict(checkpoint.graph.module.state_dict())


# Gradients


def test_values_are_those_of_the_affine_quantizer():
    x = 3 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    for scale, zero_point, bits in ((0.31, 3, 3), (0.07, 0, 4), (0.5, 1, 2)):
        found = learned_activation(x, torch.tensor(scale), torch.tensor(zero_point + 0.4), bits)
        assert torch.equal(found, quantize_dequantize(x, torch.tensor(scale), zero_point, bits))


@pytest.mark.parametrize("zero_point", [0.0, 2.0])
def test_the_scales_gradient_is_the_derivative_with_rounding_held(zero_point: float):
    """Rounding held to what it does at the first scale, x^ is a smooth function of the scale: finite differences of that."""
    x = (2 * torch.randn(300, generator=torch.Generator().manual_seed(1))).double()
    out = torch.randn(300, generator=torch.Generator().manual_seed(2)).double()
    scale = torch.tensor(0.37, dtype=torch.float64)
    steps = x / scale
    offset, inside = steps.round() - steps, (steps.round() >= -zero_point) & (steps.round() <= 7 - zero_point)

    def held(scale: Tensor, shift: float = 0.0) -> Tensor:
        bound = torch.where(steps < 0, 0.0, 7.0).double() - zero_point - shift
        return (out * torch.where(inside, x / scale + offset, bound) * scale).sum()

    step = 1e-6
    a, z = scale.clone().requires_grad_(), torch.tensor(zero_point, dtype=torch.float64).requires_grad_()
    values = x.clone().requires_grad_()
    (out * learned_activation(values, a, z, 3)).sum().backward()
    assert a.grad is not None and z.grad is not None and values.grad is not None
    assert float(a.grad) == pytest.approx(float(held(scale + step) - held(scale - step)) / (2 * step), abs=1e-4)
    assert float(z.grad) == pytest.approx(float(held(scale, step) - held(scale, -step)) / (2 * step), abs=1e-4)
    assert torch.equal(values.grad, out * inside)


def test_a_weights_gradients_are_the_naive_ones():
    generator = torch.Generator().manual_seed(0)
    steps = (3 * torch.randn(4, 5, generator=generator)).requires_grad_()
    scale = torch.rand(4, 1, generator=generator).requires_grad_()
    lowest, highest = torch.tensor([[-3.0]] * 4), torch.tensor([[4.0]] * 4)
    out = torch.randn(4, 5, generator=generator)
    (out * learned_weight(steps, scale, lowest, highest)).sum().backward()
    assert steps.grad is not None and scale.grad is not None
    for row in range(4):
        by_scale = 0.0
        for column in range(5):
            whole = round(float(steps[row, column].detach()))
            by_scale += float(out[row, column]) * min(max(whole, -3), 4)
            wanted = float(out[row, column] * scale[row, 0].detach()) if -3 <= whole <= 4 else 0.0
            assert float(steps.grad[row, column]) == pytest.approx(wanted, abs=1e-6)
        assert float(scale.grad[row, 0]) == pytest.approx(by_scale, abs=1e-5)


def test_a_twin_grids_gradients_are_those_with_rounding_held():
    """By number: inside the range the gradient of x passes, and the scale's is c - u; outside it is c."""
    quantizer = TwinGrid(0.125, 2, 5, 3, 3)  # -2 to 3 steps one by one, then 6 and 9
    x = (torch.randn(400, generator=torch.Generator().manual_seed(1)) * 0.6).requires_grad_()
    out = torch.randn(400, generator=torch.Generator().manual_seed(2))
    scale = torch.tensor(0.11, requires_grad=True)
    found = learned_twin_grid(x, scale, quantizer)
    assert torch.equal(found, replace(quantizer, scale=float(scale.detach())).quantize_dequantize(x.detach()))
    (out * found).sum().backward()
    assert scale.grad is not None and x.grad is not None
    by_scale = 0.0
    for value, weight, passed in zip((x.detach() / 0.11).tolist(), out.tolist(), x.grad.tolist(), strict=True):
        whole = min((-2, -1, 0, 1, 2, 3, 6, 9), key=lambda number: abs(number - value))
        inside = -2.5 <= value <= 10.5
        by_scale += weight * (whole - value if inside else whole)
        assert passed == pytest.approx(weight if inside else 0.0)
    assert float(scale.grad) == pytest.approx(by_scale, rel=1e-4)


def test_any_other_quantizer_is_passed_straight_through():
    x = torch.rand(50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantizer = Log2(1.0, 3)
    found = straight_through(x, quantizer)
    found.sum().backward()
    assert torch.allclose(found, quantizer.quantize_dequantize(x)) and torch.equal(x.grad, torch.ones(50))  # type: ignore[arg-type]


# Variables


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_variables_start_at_the_checkpoint(bits: int):
    _, folded, fast = start_of(bits=bits)
    found = BlockVariables(folded, fast, list(folded.layers)).checkpoint()
    before, after = everything(fast), everything(found)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_comes_back_is_what_was_trained(tmp_path: Path):
    """The variables' ops and the checkpoint's module, from its file, agree bit by bit, wherever the variables were moved to."""
    _, folded, fast = start_of(bits=3)
    variables = BlockVariables(folded, fast, list(folded.layers))
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: value + (1.5 if name.startswith(("steps", "zero")) else 0.1) * torch.randn(value.shape, generator=generator)
        for name, value in variables.tensors().items()
    }
    variables.put(moved)
    found = variables.checkpoint()
    for weight in found.weights.values():
        lowest, highest = weight_codes(weight.bits)
        assert weight.codes.dtype == torch.uint8 and lowest <= int(weight.codes.min()) and int(weight.codes.max()) <= highest
    checkpoints.save(found, tmp_path / "model.safetensors")
    x = images(5, 32, seed=8)
    with torch.no_grad():
        trained = run(fast.graph.module, x, variables.intercepts())
        assert torch.equal(trained, found.quantized_module()(x))
        assert torch.equal(trained, checkpoints.load(tmp_path / "model.safetensors").quantized_module()(x))
        assert not torch.equal(trained, fast.quantized_module()(x))


def test_layernorms_learn_where_a_layer_of_the_block_reads_them():
    _, folded, fast = start_of()
    block = folded.blocks[1].name
    variables = BlockVariables(folded, fast, [layer for layer in folded.layers if layer.block == block])
    names = {name for name in variables.tensors() if name.startswith("norm_gain:")}
    assert len(names) == 2  # before attention and before the MLP
    first = min(names).removeprefix("norm_gain:norm ")
    moved = variables.tensors(copied=True)
    moved[f"norm_gain:norm {first}"] += 0.5
    moved[f"norm_bias:norm {first}"] -= 2.0
    variables.put(moved)
    found, node = variables.checkpoint(), next(node for node in fast.graph.module.graph.nodes if node.name == first)
    (gain, bias), (new_gain, new_bias) = (
        [checkpoint.graph.module.state_dict()[str(node.args[index].target)] for index in (2, 3)]  # type: ignore[union-attr]
        for checkpoint in (fast, found)
    )
    assert torch.allclose(new_gain, gain * math.e**0.5) and torch.allclose(new_bias, bias - 2 * gain.abs())


def test_an_activation_that_an_earlier_block_learned_stays():
    _, folded, fast = start_of()
    first = folded.layers[1].activations[0].tensor
    variables = BlockVariables(folded, fast, list(folded.layers), {first})
    learned = {tensor for tensor, quantizer in fast.activations.items() if not isinstance(quantizer, RowSquares)}
    assert first in learned and variables.activations == learned - {first}


@pytest.mark.parametrize("quantizer", [Log2(1.0, 3), RowSquares(3)])
def test_quantizers_that_are_not_affine_stay_as_they_are(quantizer: Quantizer):
    _, folded, fast = start_of()
    softmax = next(layer.activations[0].tensor for layer in folded.layers if layer.type == "av")
    activations = dict(fast.activations) | {softmax: quantizer}
    mixed = Checkpoint(fast.graph, fast.plan, fast.weights, activations)  # type: ignore[arg-type]
    variables = BlockVariables(folded, mixed, list(folded.layers))
    assert softmax not in variables.activations
    watched = {}
    av = next(layer for layer in folded.layers if layer.type == "av")

    def watch(compute, *arguments):
        return variables.intercepts()[folded.nodes[av.name]](lambda *read: watched.setdefault("read", read)[0], *arguments)

    x = torch.rand(1, 4, 17, 17)
    watch(None, x, torch.rand(1, 4, 17, 16))
    assert torch.allclose(watched["read"][0], quantizer.quantize_dequantize(x))


# Errors


def test_a_blocks_error_is_the_naive_sum(tmp_path: Path):
    scratch = Scratch(tmp_path / "scratch", "x")
    wanted = Stream(scratch, "y", 4, 4, torch.device("cpu"))
    target, found, weights = images(4, 4, 1), images(4, 4, 2), images(1, 4, 3).abs()
    wanted.write(torch.arange(4), {"y": target, "batch": 4})
    naive = sum(
        0.5 * float(weights[0, c, i, j]) * float(found[n, c, i, j] - target[n, c, i, j]) ** 2
        for n in range(4) for c in range(3) for i in range(4) for j in range(4)
    ) / 4  # fmt: skip
    assert float(block_error({"y": found, "batch": 4}, torch.arange(4), wanted, {"y": weights})) == pytest.approx(naive, rel=1e-5)


def test_the_weights_of_errors_are_the_fisher_informations_diagonal(tmp_path: Path):
    scratch = Scratch(tmp_path / "scratch", "x")
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    values = Stream(scratch, "y", 4_000, 500, torch.device("cpu"))
    y = torch.tensor([0.3, -0.2, 0.5])
    for numbers in values.batches():
        values.write(numbers, {"y": y.repeat(500, 1)})
    found = weights_of_errors(values, lambda alive: {"output": alive["y"] @ matrix.T}, 5, torch.Generator().manual_seed(0))["y"]
    p = (matrix @ y).softmax(0)
    fisher = matrix.T @ (torch.diag(p) - torch.outer(p, p)) @ matrix
    assert found[0].tolist() == pytest.approx(fisher.diagonal().tolist(), rel=0.1)


# The recipe


@pytest.mark.parametrize(("family", "bits", "iterations"), [("vit", 3, 1), ("vit", 2, 40), ("swin", 3, 10)])
def test_it_is_never_worse_than_fast_on_held_out_images(family: str, bits: int, iterations: int, tmp_path: Path):
    graph, folded, fast = start_of(family, bits)
    batches = in_batches(images(24, graph.input_shape[1:]), 10)
    found = calibrate_reconstruct(graph, fast.plan, batches, learning=learning(tmp_path, iterations=iterations))
    learned, before = (held_out_loss(checkpoint, folded, batches) for checkpoint in (found, fast))
    assert learned <= before
    if iterations == 40:
        assert learned < 0.85 * before
    assert not (tmp_path / "scratch").exists()


def test_it_returns_fasts_where_all_that_is_learned_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    graph, _, fast = start_of()
    monkeypatch.setattr(reconstruct, "_judged", lambda *_: 0.0)  # every block is taken
    monkeypatch.setattr(
        "vitq.calibration.variables.RATES",
        {"steps": 9.0, "gain": 1.0, "bias": 5.0, "range": 2.0, "zero_point": 5.0, "norm_gain": 1.0, "norm_bias": 5.0},
        raising=True,
    )
    found = calibrate_reconstruct(graph, fast.plan, BATCHES, learning=learning(tmp_path))
    before, after = everything(fast), everything(found)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_block_that_is_worse_on_held_out_images_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    graph, _, fast = start_of()
    answers = iter(range(1000))
    monkeypatch.setattr(reconstruct, "_judged", lambda *_: float(next(answers)))  # each time worse than before
    found = calibrate_reconstruct(graph, fast.plan, BATCHES, learning=learning(tmp_path))
    before, after = everything(fast), everything(found)
    assert all(torch.equal(before[name], after[name]) for name in before)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    graph, folded, fast = start_of()
    whole = calibrate_reconstruct(graph, fast.plan, BATCHES, learning=learning(tmp_path))
    learn, learned = reconstruct.learn, []

    def killed(*arguments, **keywords):
        learned.append(arguments)
        if len(learned) > at:
            raise Killed
        return learn(*arguments, **keywords)

    monkeypatch.setattr(reconstruct, "learn", killed)
    with pytest.raises(Killed):
        calibrate_reconstruct(graph, fast.plan, BATCHES, learning=learning(tmp_path))
    assert len(list((tmp_path / "scratch").glob("*.safetensors"))) == at
    blocks = len(folded.blocks)

    def counted(*arguments, **keywords):
        learned.append(arguments)
        return learn(*arguments, **keywords)

    learned.clear()
    monkeypatch.setattr(reconstruct, "learn", counted)
    resumed = calibrate_reconstruct(graph, fast.plan, BATCHES, learning=learning(tmp_path))
    assert len(learned) == blocks - at
    first, second = everything(whole), everything(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "scratch").exists()


def test_another_seed_or_other_images_begin_anew(tmp_path: Path):
    Scratch(tmp_path / "scratch", "one").keep("blocks.0", {"x": torch.ones(2)})
    assert Scratch(tmp_path / "scratch", "one").kept("blocks.0") is not None
    assert Scratch(tmp_path / "scratch", "two").kept("blocks.0") is None


def test_seeds_are_arguments(tmp_path: Path):
    graph, _, fast = start_of(bits=2)
    found = [calibrate_reconstruct(graph, fast.plan, BATCHES, learning=learning(tmp_path, seed=seed, iterations=40)) for seed in (0, 0, 1)]
    first, again, other = (everything(checkpoint) for checkpoint in found)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_progress_rises_to_the_whole(tmp_path: Path):
    graph, _, fast = start_of()
    told: list[tuple[float, float, str]] = []
    calibrate_reconstruct(graph, fast.plan, BATCHES, learning=learning(tmp_path), progress=lambda *news: told.append(news))
    done = [news[0] for news in told]
    assert done == sorted(done) and done[-1] == pytest.approx(told[-1][1]) and told[-1][2] == graph.blocks[-1].name


# Files


def test_rows_come_back(tmp_path: Path):
    rows = Rows(tmp_path / "x.rows", 6)
    x = torch.arange(36.0).reshape(6, 2, 3)
    rows.write(4, x[4:])
    rows.write(0, x[:4])
    assert torch.equal(rows.read(torch.tensor([5, 0, 3])), x[[5, 0, 3]])
    rows.remove()
    assert not list(tmp_path.iterdir())


def test_a_stream_keeps_windows_with_their_images(tmp_path: Path):
    stream = Stream(Scratch(tmp_path / "scratch", "x"), "w", 4, 2, torch.device("cpu"))
    windows = images(12, 4)  # three an image
    for numbers in stream.batches():
        first = int(numbers[0])
        stream.write(numbers, {"w": windows[3 * first : 3 * first + 6], "batch": 2})
    found = stream.read(torch.tensor([3, 1]))
    assert torch.equal(found["w"], torch.cat([windows[9:], windows[3:6]])) and found["batch"] == 2
    with pytest.raises(InputError, match=r"w is \(5, 3, 4, 4\) for 2 images, so its rows are no images; calibrate with --recipe fast"):
        stream.write(torch.arange(2), {"w": images(5, 4)})


def test_views_are_pictures_of_the_same_values():
    x = images(8, 16)
    seen = view(x, torch.Generator().manual_seed(0))
    assert seen.shape == x.shape and not torch.equal(seen, x)
    assert float(seen.max()) <= float(x.max()) and float(seen.min()) >= float(x.min())
    assert torch.equal(seen, view(x, torch.Generator().manual_seed(0)))


def test_an_estimate_counts_images_in_disk_alone():
    graph, _, fast = start_of()
    small, large = (estimate(graph, fast.plan, count, Learning()) for count in (100, 1_000))
    assert large.memory_bytes == small.memory_bytes and 5 < large.disk_bytes / small.disk_bytes <= 10
    assert large.seconds > 0


def test_an_estimate_of_memory_covers_what_the_layers_costs_take():
    """They are found behind the learning, by gradients of the whole network on whole batches; a third and more is for the allocator."""
    graph, _, fast = start_of()
    said = {size: estimate(graph, fast.plan, 128, Learning(batch_size=1), size).memory_bytes for size in (32, 64)}
    for size, memory in said.items():
        with Held() as held:
            attribute(fast, in_batches(images(64, 32), size))
        assert 1.1 * held.most < memory < 2.5 * held.most


# Faults


def test_faults_say_what_to_do(tmp_path: Path):
    graph, _, fast = start_of()
    with pytest.raises(InputError, match="7 images are too few for recipe reconstruct; give --num-images at least 8, or --recipe fast"):
        calibrate_reconstruct(graph, fast.plan, in_batches(images(7, 32), 4), learning=learning(tmp_path))
    with pytest.raises(UsageError, match="iterations 0 cannot be learned with; give at least 1, or recipe fast"):
        calibrate_reconstruct(graph, fast.plan, BATCHES, learning=learning(tmp_path, iterations=0))
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="scratch is no scratch folder of vitq, so nothing is written to it; move it away"):
        calibrate_reconstruct(graph, fast.plan, BATCHES, learning=learning(tmp_path))
    assert (tmp_path / "scratch" / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*file"):
        Scratch(tmp_path / "file", "x")


def test_a_damaged_result_is_named(tmp_path: Path):
    scratch = Scratch(tmp_path / "scratch", "x")
    (tmp_path / "scratch" / "blocks.0.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"blocks.0.safetensors is damaged: .*; remove .*scratch and run again"):
        scratch.kept("blocks.0")


def test_one_image_in_eight_is_held_out():
    assert held_out(BATCHES).nonzero().flatten().tolist() == [7, 15, 23]
