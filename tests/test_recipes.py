"""The papers' recipes: what every recipe promises, and each paper's own part against a slow version written from the paper."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_session import make_images, make_model, vitq
from small_models import captured, images
from test_calibration import in_batches, plan_for

from vitq import checkpoint as checkpoints
from vitq.affine import quantize_weight, weight_qparams
from vitq.calibration import AT_ONCE, LEARNING, RECIPES, Held
from vitq.calibration.channelwise import Channels, fold_channelwise, output_error
from vitq.calibration.erq import compensated_layer
from vitq.calibration.mix_qvit import CLIPS, calibrate_mix_qvit, clipped, readers_error
from vitq.calibration.repq_vit import calibrate_repq_vit
from vitq.checkpoint import Checkpoint
from vitq.cli.calibrate import RECIPE_HELP
from vitq.errors import InputError
from vitq.fitting import FITS
from vitq.fitting.inputs import InputPairs
from vitq.fitting.output_error import refined_by_output, weight_by_output
from vitq.fitting.percentile import percentile_channels, percentile_log_sqrt2, percentile_uniform, percentile_weights
from vitq.fitting.search import as_scale
from vitq.gradients import LayerTrace, probe_for, trace
from vitq.graph import Graph, values_at
from vitq.quantizers import AdaLog, Log2, LogSqrt2, PowerOfTwoFactor, Quantizer, TwinUniform, Uniform
from vitq.ranges import histograms
from vitq.rewrites import fold_factors, foldable_norms, norm_readers, rewrite

PAPERS = sorted(set(RECIPES) - {"reconstruct", "fast"})  # the other two have tests of their own


@pytest.fixture(scope="module")
def graph() -> Graph:
    return rewrite(captured("vit")[1])


def test_held_counts_bytes_that_something_refers_to():
    before = torch.ones(1000)
    with Held() as held:
        doubled = before * 2
        view = doubled[:10]
        assert (held.now, held.most) == (4000, 4000)
        ordered = before.sort().values  # beside them the indices, 8 bytes each
        assert (held.now, held.most) == (8000, 16_000)
        del doubled, ordered
        assert held.now == 4000  # the view
        before.add_(1)
        del view
    assert (held.now, held.most) == (0, 16_000)


@pytest.mark.parametrize("recipe", ["repq-vit", "ptq4vit"])
def test_each_part_of_a_recipe_holds_more_by_a_line(graph: Graph, recipe: str):
    """What `--dry-run` draws out. ptq4vit holds most by the gradients of a batch where images are few, by all images where many."""
    assert recipe in AT_ONCE
    parts, most = {}, {}
    for count in (32, 64, 192):
        with Held() as held:
            RECIPES[recipe](graph, plan_for(graph, "vit"), in_batches(images(count, 32), 32), progress=held.part)
        parts[count] = [*held.parts, held.most]
        most[count] = max(parts[count])
    assert len(parts[32]) == len(parts[64]) > len(graph.layers)
    assert max(b + 4 * (b - a) for a, b in zip(parts[32], parts[64], strict=True)) == pytest.approx(most[192], rel=0.05)


# What every recipe promises


@pytest.fixture(scope="module", params=PAPERS)
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


def quickly(recipe: str) -> dict[str, Any]:
    """Options that let a recipe learn two steps, where it learns."""
    if recipe not in LEARNING:
        return {}
    return {"learning": replace(LEARNING[recipe], iterations=2, scratch=Path(tempfile.mkdtemp()))}


def calibrated(recipe: str, graph: Graph, family: str = "vit") -> Checkpoint:
    plan, batches = plan_for(graph, family, lambda index: 2 + index % 7), in_batches(images(12, graph.input_shape[1:]), 6)
    return RECIPES[recipe](graph, plan, batches, **quickly(recipe))


@pytest.fixture(scope="module")
def found(recipe: str, graph: Graph) -> Checkpoint:
    return calibrated(recipe, graph)


def test_the_plan_is_followed(found: Checkpoint):
    for layer in found.graph.layers:
        bits = found.plan.bits[layer.name]
        assert all(found.activations[operand.tensor].bits == bits.activation_bits for operand in layer.activations)
        if layer.has_weight:
            own = found.graph.module.get_parameter(layer.operands[1].tensor)
            assert found.weights[layer.name].bits == bits.weight_bits and torch.equal(own, found.weights[layer.name].dequantize())
            assert all(len(row.unique()) <= 2 ** found.weights[layer.name].bits for row in own.flatten(1))


def test_every_layer_reads_at_most_two_to_the_bits_values(found: Checkpoint, recipe: str):
    """In every channel, where a quantizer has a scale for each."""
    module = found.quantized_module()
    names = {
        layer.name: next(node for node in module.graph.nodes if node.name == found.graph.nodes[layer.name]) for layer in found.graph.layers
    }
    read = {source.name for node in names.values() for source in node.args[:2] if source.op == "call_module"}
    with torch.no_grad():
        values = values_at(module, images(6, 32, seed=5), read)
    for layer in found.graph.layers:
        for source, operand in zip(names[layer.name].args, layer.activations, strict=False):
            value = values[source.name]
            parts = value.flatten(0, -2).T if hasattr(found.activations[operand.tensor], "exponents") else value.reshape(1, -1)
            assert all(len(part.unique()) <= 2 ** found.plan.bits[layer.name].activation_bits for part in parts), layer.name


def test_a_saved_checkpoint_computes_the_same(found: Checkpoint, tmp_path: Path):
    checkpoints.save(found, tmp_path / "model.safetensors")
    loaded = checkpoints.load(tmp_path / "model.safetensors")
    x = images(3, 32, seed=8)
    with torch.no_grad():
        assert torch.equal(loaded.quantized_module()(x), found.quantized_module()(x))
    assert loaded.activations == found.activations


def test_the_graph_stays_as_it_was_and_the_result_is_the_same_again(found: Checkpoint, recipe: str, graph: Graph):
    before = {name: tensor.clone() for name, tensor in graph.module.state_dict().items()}
    again = calibrated(recipe, graph)
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.module.state_dict().items())
    assert again.activations == found.activations
    state, other = again.graph.module.state_dict(), found.graph.module.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def test_eight_bits_are_near_the_float_model(recipe: str, graph: Graph):
    model, _ = captured("vit")
    x = images(8, 32, seed=9)
    batches = in_batches(images(16, 32), 8)
    told: dict[str, list[float]] = {}

    def progress(done: float, whole: float, name: str) -> None:
        told.setdefault(name, []).append(done / whole)

    module = RECIPES[recipe](graph, plan_for(graph, "vit", 8), batches, progress=progress, **quickly(recipe)).quantized_module()
    with torch.no_grad():
        assert float((module(x) - model(x)).norm() / model(x).norm()) < 0.15
    if recipe not in LEARNING:  # these count layers, of each name from the first to the last
        count = len(graph.layers)
        assert told and all(parts == [pytest.approx((at + 1) / count) for at in range(count)] for parts in told.values())


@pytest.mark.parametrize("family", ["swin", "levit", "cait"])
def test_other_families_are_calibrated_and_loaded(recipe: str, family: str, tmp_path: Path):
    graph = rewrite(captured(family)[1])
    size = graph.input_shape[1:]
    plan = plan_for(graph, family, lambda index: (3, 8, 5)[index % 3])
    checkpoint = RECIPES[recipe](graph, plan, in_batches(images(4, size), 4), **quickly(recipe))
    checkpoints.save(checkpoint, tmp_path / "model.safetensors")
    x = images(2, size, seed=8)
    with torch.no_grad():
        output = checkpoint.quantized_module()(x)
        assert bool(output.isfinite().all()) and torch.equal(checkpoints.load(tmp_path / "model.safetensors").quantized_module()(x), output)


def test_a_plan_for_other_layers_is_refused(recipe: str, graph: Graph):
    plan = plan_for(graph, "vit")
    with pytest.raises(InputError, match="has no entry for layer 'head'"):
        RECIPES[recipe](graph, plan.model_copy(update={"layers": plan.layers[:-1]}), in_batches(images(4, 32), 4))


# The command


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    make_model(folder / "model")
    make_images(folder / "images")
    assert vitq("profile", "model", "--images", "images", "--num-images", 12, folder=folder).code == 0
    assert vitq("allocate", "--uniform", 4, folder=folder).code == 0
    return folder


def test_calibrate_takes_the_recipe_by_name_and_evaluate_its_file(recipe: str, session: Path):
    steps = ("--iterations", 2) if recipe in LEARNING else ()
    done = vitq("calibrate", "--recipe", recipe, *steps, "--force", folder=session)
    assert done.code == 0 and f"14 layers calibrated by recipe {recipe} on 12 images" in done.out
    exported = vitq("export", "--force", folder=session)
    assert exported.code == (2 if "next: vitq evaluate vitq-run/model.safetensors" in done.err else 0), exported.err
    done = vitq("evaluate", "vitq-run/model.safetensors", "--images", "images", "--num-images", 8, "--json", folder=session)
    assert done.code == 0, done.err


def test_help_names_every_recipe():
    assert all(name in RECIPE_HELP for name in RECIPES)


# Quantiles


def naive_range(values: np.ndarray, bits: int) -> tuple[float, float]:
    """Scale and zero point as the paper's code searches them, not widened to 0."""
    best = (math.inf, 0.0, 0.0)
    for p in (0.999, 0.9999, 0.99999):
        high, low = np.quantile(values, p), np.quantile(values, 1 - p)
        scale = (high - low) / (2**bits - 1)
        zero = np.round(-low / scale)
        moved = (np.clip(np.round(values / scale) + zero, 0, 2**bits - 1) - zero) * scale
        best = min(best, (float(((moved - values) ** 2).sum()), scale, zero))
    return best[1:]


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_percentile_ranges_are_those_of_the_papers_code(bits: int):
    x = images(5, (40, 8), seed=bits).flatten(1, 2) * torch.logspace(-2, 1, 8)  # (5, 120, 8): no channel lies on one side of 0
    x[0, 0] *= 40
    scale, zero = naive_range(x.double().numpy(), bits)
    found = percentile_uniform(x, bits)
    assert found.scale == pytest.approx(scale, rel=1e-4) and found.zero_point == zero
    scales, zeros = percentile_channels(x + 3, bits)  # here some do
    rows_scale, rows_zero = percentile_weights(x.flatten(0, 1).T, bits)
    for channel in range(8):
        wanted = naive_range((x + 3)[:, :, channel].double().numpy(), bits)
        assert (float(scales[channel]), float(zeros[channel])) == pytest.approx(wanted, rel=1e-4)
        wanted = naive_range(x[:, :, channel].double().numpy(), bits)
        assert (float(rows_scale[channel]), float(rows_zero[channel])) == pytest.approx(wanted, rel=1e-4)


def test_the_scale_of_the_logarithm_is_a_quantile():
    x = images(2, 50).softmax(-1)
    found = percentile_log_sqrt2(x, 4)
    scales = [as_scale(float(np.quantile(x.double().numpy(), p))) for p in (0.999, 0.9999, 0.99999)]
    candidates = [LogSqrt2(scale, 4, zero) for scale in scales for zero in (True, False)]
    best = min(candidates, key=lambda quantizer: float((quantizer.quantize_dequantize(x) - x).square().sum()))
    assert found.scale == pytest.approx(best.scale, rel=1e-5) and found.holds_zero == best.holds_zero


def test_constants_have_a_range():
    scale, zero = percentile_channels(torch.tensor([[3.0, -2.0, 0.0], [3.0, -2.0, 0.0]]), 4)
    channels = Channels(scale, zero, 4)
    assert torch.allclose(channels.quantize_dequantize(torch.tensor([3.0, -2.0, 0.0])), torch.tensor([3.0, -2.0, 0.0]))
    assert percentile_uniform(torch.zeros(3, 4), 4) == Uniform(1.0, 0, 4)
    assert percentile_log_sqrt2(torch.zeros(3, 4), 4).quantize_dequantize(torch.zeros(2)).abs().max() < 1e-18


# The fold


@pytest.mark.parametrize("family", ["vit", "swin", "cait"])
@pytest.mark.parametrize("k", [math.inf, 2.0, 1.0])
def test_the_fold_moves_no_logit_whatever_is_clipped(family: str, k: float):
    model, before = captured(family)
    graph = rewrite(before)
    x = images(4, graph.input_shape[1:])
    plan = plan_for(graph, family, 4)
    folded, _ = fold_channelwise(graph, plan, in_batches(x, 4), choose=lambda channels, *_: clipped(channels, k))
    own = folded.module.state_dict()
    assert any(not torch.equal(own[name], tensor) for name, tensor in graph.module.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(folded.module(x), model(x), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("k", [math.inf, 2.0])
def test_the_common_scale_gives_the_channels_codes(k: float):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 12, generator=generator) * torch.logspace(-1, 1, 12) + torch.randn(12, generator=generator)
    channels = clipped(Channels(*percentile_channels(x, 4), 4), k)
    ratio, shift = channels.factors
    folded = ((x.double() + shift) / ratio).float()
    codes = ((x.double() / channels.scale.double()).round() + channels.zero_point.double()).clamp(0, 15)
    assert (channels.common.quantize(folded).double() != codes).float().mean() < 0.005  # ties, in float32
    moved = (channels.common.quantize_dequantize(folded).double() * ratio - shift).float()
    assert (moved - channels.quantize_dequantize(x)).abs().median() < 1e-5


def test_norms_that_may_not_shift_have_one_zero_point():
    scale, zero = percentile_channels(images(3, 10).flatten(0, 2) + 1, 4, shiftable=False)
    assert bool((zero == 8).all()) and Channels(scale, zero, 4).factors[1].abs().max() == 0


def test_the_norm_before_the_head_keeps_its_values(graph: Graph):
    readers = norm_readers(graph)
    (last,) = [norm for norm, names in readers.items() if "head" in names]
    assert readers.keys() == foldable_norms(graph).keys() and len(readers) == 5
    folded, activations = fold_channelwise(graph, plan_for(graph, "vit"), in_batches(images(4, 32), 4))
    weights = [g.module.get_parameter("norm.weight") for g in (graph, folded)]
    assert last and torch.equal(*weights)
    assert not torch.equal(*(g.module.get_parameter("blocks.0.norm1.weight") for g in (graph, folded)))
    assert activations.keys() == {operand.tensor for layer in graph.layers for operand in layer.activations}


def test_factors_that_are_one_and_zero_fold_nothing(graph: Graph):
    same = fold_factors(graph, {norm: (torch.ones(64).double(), torch.zeros(64).double()) for norm in foldable_norms(graph)})
    state = same.module.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in graph.module.state_dict().items())
    assert same.digest == fold_factors(graph, {}).digest


# Mix-QViT


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_infinite_clip_is_repq_vit(graph: Graph, bits: int):
    plan, batches = plan_for(graph, "vit", bits), in_batches(images(8, 32), 4)
    a, b = calibrate_mix_qvit(graph, plan, batches, clips=(math.inf,)), calibrate_repq_vit(graph, plan, batches)
    assert a.activations == b.activations
    assert all(torch.equal(x, y) for x, y in zip(a.graph.module.state_dict().values(), b.graph.module.state_dict().values(), strict=True))


def test_clipping_is_that_of_the_equations():
    scale = torch.tensor([1.0, 1.0, 1.2, 0.8, 9.0])
    zero = torch.tensor([3.0, 4.0, -20.0, 5.0, 3.0])
    found = clipped(Channels(scale, zero, 4), 1.5)
    s, z = scale.numpy(), zero.numpy()
    assert np.allclose(found.scale, np.clip(s, max(s.mean() - 1.5 * s.std(), 1e-8), s.mean() + 1.5 * s.std()))
    assert np.allclose(found.zero_point, np.round(np.clip(z, z.mean() - 1.5 * z.std(), z.mean() + 1.5 * z.std())))
    assert torch.equal(clipped(Channels(scale, zero, 4), math.inf).scale, scale)


def test_k_is_chosen_by_the_readers_error_in_folded_units():
    """The same sum from the fold itself: weights, biases and the common quantizer."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 12, generator=generator) * torch.logspace(-1, 1, 12)
    weight = torch.randn(6, 12, generator=generator)
    channels = Channels(*percentile_channels(x, 3), 3)
    for k in CLIPS:
        candidate = clipped(channels, k)
        ratio, shift = (factor.float() for factor in candidate.factors)
        folded = weight * ratio
        quantized = quantize_weight(folded, *percentile_weights(folded, 3), 3).dequantize()
        output = candidate.common.quantize_dequantize((x + shift) / ratio) @ quantized.T - weight @ shift
        wanted = float((output - x @ weight.T).square().sum())
        assert readers_error(candidate, x, [(weight, 3)]) == pytest.approx(wanted, rel=2e-2)


# ERQ


def test_erq_is_the_ridge_regression_of_the_float_output_on_what_is_read():
    """With widths that leave the rounding exact enough to see the regression: numpy's least squares on the rows themselves."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 6, generator=generator) + 1
    read = x + 0.3 * torch.randn(200, 6, generator=generator)
    weight, bias = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    pairs = InputPairs()
    pairs.add(x.double(), read.double())
    codes, moved = compensated_layer(weight, bias, pairs, 8, 0.0)
    rows = np.concatenate([read.double().numpy(), np.ones((200, 1))], 1)
    wanted = np.linalg.lstsq(rows, (x @ weight.T + bias).double().numpy(), rcond=None)[0]
    assert np.allclose(codes.dequantize().double().numpy(), wanted[:6].T, atol=2 * float(codes.scale.max()))
    assert np.allclose(moved.numpy(), wanted[6], atol=1e-4)


def test_erq_comes_nearer_to_the_float_network_than_its_base(graph: Graph):
    """On its own images, of which there are more than inputs."""
    model, _ = captured("vit")
    x = images(48, 32)
    plan, errors = plan_for(graph, "vit", 4), {}
    for recipe in ("repq-vit", "erq"):
        with torch.no_grad():
            errors[recipe] = float((RECIPES[recipe](graph, plan, [(x, None)]).quantized_module()(x) - model(x)).norm())
    assert errors["erq"] < errors["repq-vit"]


# Searches by the layer's output


@pytest.mark.parametrize("position", [0, 1])
def test_the_outputs_error_is_that_of_the_layers_output(position: int):
    generator = torch.Generator().manual_seed(4)
    quantizer = Uniform(0.5, 7, 4)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((5, 9, 6), (4, 6), (4,)))
    linear = torch.nn.functional.linear
    wanted = float((linear(quantizer.quantize_dequantize(x), weight, bias) - linear(x, weight, bias)).square().sum())
    assert output_error(linear, (x, weight, bias), 0, quantizer) == pytest.approx(wanted, rel=1e-4)
    operands = [x, torch.randn(5, 6, 3, generator=generator)]
    before = operands[0] @ operands[1]
    found = output_error(torch.matmul, tuple(operands), position, quantizer)
    operands[position] = quantizer.quantize_dequantize(operands[position])
    assert found == pytest.approx(float((operands[0] @ operands[1] - before).square().sum()), rel=1e-4)
    image, kernel = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(4, 3, 2, 2, generator=generator)
    wanted = torch.conv2d(quantizer.quantize_dequantize(image), kernel, bias, 2) - torch.conv2d(image, kernel, bias, 2)
    assert output_error(torch.conv2d, (image, kernel, bias, 2), 0, quantizer) == pytest.approx(float(wanted.square().sum()), rel=1e-4)


@pytest.mark.parametrize("first", [Uniform(0.25, 5, 4), AdaLog(1.0, 37, 3), TwinUniform(0.0625, 0.5, 4, negative=True)])
def test_the_search_ends_where_no_neighbour_is_better(first: Quantizer):
    x = torch.randn(400, generator=torch.Generator().manual_seed(6)).abs()
    tried: list[Quantizer] = []

    def error(quantizer: Quantizer) -> float:
        tried.append(quantizer)
        return float((quantizer.quantize_dequantize(x) - x).square().sum())

    best = refined_by_output(first, error)
    assert error(best) == min(error(quantizer) for quantizer in list(tried)) < error(first)
    assert type(best) is type(first) and best.bits == first.bits and len(set(tried)) <= 2 * 9 * 6 + 1
    assert refined_by_output(LogSqrt2(1.0, 4), error) == LogSqrt2(1.0, 4)


@pytest.mark.parametrize(("bits", "symmetric"), [(3, False), (3, True), (8, False)])
def test_weights_ranges_have_the_least_error_of_the_output(bits: int, symmetric: bool):
    generator = torch.Generator().manual_seed(7)
    weight, x = torch.randn(5, 8, generator=generator), torch.randn(60, 8, generator=generator) * torch.logspace(-1, 1, 8)
    found = weight_by_output(weight, x.T @ x / 60, bits, symmetric).dequantize()
    for row, own in zip(weight, found, strict=True):
        best = math.inf
        for shrink in torch.linspace(1.0, 0.3, 48).tolist():
            low, high = row.min().clamp(max=0) * shrink, row.max().clamp(min=0) * shrink
            codes = quantize_weight(row[None], *weight_qparams(low[None], high[None], bits, symmetric), bits)
            best = min(best, float((x @ (codes.dequantize()[0] - row)).square().sum()))
        assert float((x @ (own - row)).square().sum()) == pytest.approx(best, rel=1e-3)


# FQ-ViT and PTQ4ViT


def test_fq_vits_factors_are_each_channels_best_power_of_two(graph: Graph):
    x = images(10, 32)
    checkpoint = RECIPES["fq-vit"](graph, plan_for(graph, "vit", 4), in_batches(x, 5))
    layers = {layer.name: layer for layer in graph.layers}
    operand = layers["blocks.1.mlp.fc1"].operands[0]
    found = checkpoint.activations[operand.tensor]
    assert isinstance(found, PowerOfTwoFactor)
    values = values_at(graph.module, x, [operand.tensor])[operand.tensor].detach().reshape(-1, 64).double().numpy()
    assert found.scale * 8 * 15 == pytest.approx(values.max() - values.min(), rel=2e-3)  # the ends are known to a bin
    for channel, exponent in enumerate(found.exponents):
        errors = []
        for alpha in (1, 2, 4, 8):
            scale = found.scale * alpha
            moved = (np.clip(np.round(values[:, channel] / scale) + found.zero_point, 0, 15) - found.zero_point) * scale
            errors.append(((moved - values[:, channel]) ** 2).sum())
        assert errors[exponent] <= min(errors) * (1 + 1e-4)
    assert len(set(found.exponents)) > 1
    softmax = [operand.tensor for layer in graph.layers for operand in layer.activations if operand.role == "post_softmax"]
    assert len(softmax) == 2 and all(checkpoint.activations[tensor] == Log2(1.0, 4) for tensor in softmax)
    own = checkpoint.graph.module.get_parameter("blocks.0.norm1.weight")
    assert torch.equal(own, graph.module.get_parameter("blocks.0.norm1.weight"))


def test_ptq4vits_ranges_have_the_least_error_weighted_by_gradients(graph: Graph):
    plan, batches = plan_for(graph, "vit", 3), in_batches(images(12, 32), 6)
    checkpoint = RECIPES["ptq4vit"](graph, plan, batches)
    squares: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def visit(traced: LayerTrace) -> None:
        for operand, x, gradient in zip(traced.layer.activations, traced.inputs, traced.input_gradients, strict=True):
            squares.setdefault(operand.tensor, []).append((x.double(), gradient.double().square()))

    generator = torch.Generator().manual_seed(0)
    for batch, _ in batches:
        trace(graph, batch, probe_for(10), generator, visit)

    def error(tensor: str, quantizer: Quantizer) -> float:
        return sum(float((weight * (quantizer.quantize_dequantize(x.float()) - x).square()).sum()) for x, weight in squares[tensor])

    plain = histograms(graph, batches)
    for layer in graph.layers:
        for operand in layer.activations:
            found, twin = checkpoint.activations[operand.tensor], operand.role in ("post_softmax", "post_gelu")
            assert isinstance(found, TwinUniform if twin else Uniform)
            other = FITS["twin-uniform" if twin else "uniform"](plain[operand.tensor], 3)
            assert error(operand.tensor, found) <= 1.02 * error(operand.tensor, other), operand.tensor
