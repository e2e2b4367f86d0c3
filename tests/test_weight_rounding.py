"""Weights rounded beyond nearest: against slow versions written from the papers, and by the output error that they are for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import captured, images
from torch import Tensor

from vitq.affine import QuantizedWeight, quantize_weight, weight_codes
from vitq.calibration.rounding import beta_at, first_variables, fraction, penalty, rounded, softly_rounded
from vitq.fitting import compensation, fit_weights, input_covariances, observe
from vitq.fitting.compensation import compensated
from vitq.fitting.halves import halved, refined
from vitq.fitting.inputs import InputPairs, ridged
from vitq.fitting.ridge import absorbed
from vitq.fitting.weights import InputSums
from vitq.graph import tensor_of, values_at
from vitq.ranges import fold, weight_ranges
from vitq.rewrites import rewrite

torch.set_num_threads(1)  # the matrices are small

WIDTHS = range(2, 9)
ROUNDINGS = {"compensated": compensated, "halved": halved}


def problem(seed: int, rows: int = 12, inputs: int = 24, tokens: int = 400, rank: int = 8) -> tuple[Tensor, Tensor]:
    """A weight and inputs (tokens, inputs) that go together: a few directions and some noise, channels of different size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, inputs, generator=generator)
    sizes = torch.randn(inputs, generator=generator).exp()
    return torch.randn(rows, inputs, generator=generator) / math.sqrt(inputs), (
        mixed + torch.randn(tokens, inputs, generator=generator)
    ) * sizes


def second_moment(x: Tensor) -> Tensor:
    return x.T.double() @ x.double() / len(x)


def output_error(weight: Tensor, found: Tensor, x: Tensor) -> float:
    return float(((found - weight).double() @ x.T.double()).square().sum())


def nearest(weight: Tensor, bits: int) -> QuantizedWeight:
    return quantize_weight(weight, *weight_ranges(weight, bits), bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", ROUNDINGS)
def test_output_error_is_below_that_of_nearest(name: str, bits: int):
    ratios = []
    for seed in range(12):
        weight, x = problem(seed)
        found = ROUNDINGS[name](weight, second_moment(x), *weight_ranges(weight, bits), bits).dequantize()
        ratios.append(output_error(weight, found, x) / output_error(weight, nearest(weight, bits).dequantize(), x))
    assert float(np.exp(np.mean(np.log(ratios)))) < 0.6
    assert sum(ratio < 1 for ratio in ratios) >= 11


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", ROUNDINGS)
def test_output_error_is_below_that_of_nearest_on_new_inputs(name: str, bits: int):
    ratios = []
    for seed in range(12):
        weight, x = problem(seed, tokens=800)
        seen, new = x[:400], x[400:]
        found = ROUNDINGS[name](weight, second_moment(seen), *weight_ranges(weight, bits), bits).dequantize()
        ratios.append(output_error(weight, found, new) / output_error(weight, nearest(weight, bits).dequantize(), new))
    assert float(np.exp(np.mean(np.log(ratios)))) < 0.65


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", ROUNDINGS)
def test_codes_are_weight_codes_under_the_given_scales(name: str, bits: int):
    weight, x = problem(3)
    scale, zero_point = weight_ranges(weight, bits)
    found = ROUNDINGS[name](weight, second_moment(x), scale, zero_point, bits)
    lowest, highest = weight_codes(bits)
    assert (found.codes.dtype, found.codes.shape, found.bits) == (torch.uint8, weight.shape, bits)
    assert lowest <= int(found.codes.min()) and int(found.codes.max()) <= highest
    assert torch.equal(found.scale, scale) and torch.equal(found.zero_point, zero_point.to(torch.uint8))


def brain_surgeon(weight: Tensor, matrix: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> np.ndarray:
    """Optimal Brain Quantization with all rows in one order, with an explicit inverse of what is left (Frantar et al., eq. 2)."""
    w = weight.double().numpy().copy()
    inverse = np.linalg.inv(matrix.numpy())
    s, z = scale.double().numpy(), zero_point.double().numpy()
    codes = np.zeros(w.shape)
    for i in np.argsort(-np.diag(matrix.numpy()), kind="stable"):
        codes[:, i] = np.clip(np.round(w[:, i] / s) + z, *weight_codes(bits))
        error = (w[:, i] - s * (codes[:, i] - z)) / inverse[i, i]
        w -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_compensation_is_the_column_loop_with_the_inverse(bits: int, block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compensation, "_BLOCK", block)
    for seed in range(4):
        weight, x = problem(seed, inputs=30)
        qparams = weight_ranges(weight, bits)
        expected = brain_surgeon(weight, ridged(second_moment(x), 0.1), *qparams, bits)
        assert np.array_equal(compensated(weight, second_moment(x), *qparams, bits).codes.numpy(), expected)


def halves_of_a_row(row: Tensor, matrix: Tensor, moment: Tensor, scale: float, zero_point: float, bits: int) -> list[float]:
    """ERQ's algorithm for one output channel, one weight at a time."""
    w, codes, first = row.double().numpy().copy(), [], 0
    s, (lowest, highest) = moment.numpy(), weight_codes(bits)
    while first < len(w):
        last = first + max((len(w) - first) // 2, 1)
        mine, target = s[first:last, first:last], w[first:last]
        chosen = np.clip(np.round(target / scale) + zero_point, lowest, highest)

        def cost(codes: np.ndarray, target: np.ndarray = target, mine: np.ndarray = mine) -> float:
            error = scale * (codes - zero_point) - target
            return float(error @ mine @ error)

        for _ in range(100):
            error = scale * (chosen - zero_point) - target
            gradient = mine @ error
            able = [
                i
                for i in range(len(target))
                if error[i] * gradient[i] > 0 and abs(error[i]) < scale and lowest <= chosen[i] - np.sign(error[i]) <= highest
            ]
            if not able:
                break
            flipped = chosen.copy()
            best = max(able, key=lambda i, gradient=gradient: abs(gradient[i]))
            flipped[best] -= np.sign(error[best])
            if cost(flipped) >= cost(chosen):
                break
            chosen = flipped
        error = scale * (chosen - zero_point) - target
        w[last:] -= np.linalg.inv(matrix.numpy()[last:, last:]) @ s[last:, first:last] @ error
        codes += list(chosen)
        first = last
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_halves_are_those_of_one_weight_at_a_time(bits: int):
    for seed in range(4):
        weight, x = problem(seed, rows=5, inputs=21)
        scale, zero_point = weight_ranges(weight, bits)
        found = halved(weight, second_moment(x), scale, zero_point, bits).codes
        matrix = ridged(second_moment(x), 0.01)
        for row, codes, s, z in zip(weight, found, scale.tolist(), zero_point.tolist(), strict=True):
            assert codes.tolist() == halves_of_a_row(row, matrix, second_moment(x), s, z, bits)


@given(st.integers(0, 500), st.sampled_from(WIDTHS))
@settings(max_examples=40)
def test_refined_rounding_is_never_worse_row_by_row(seed: int, bits: int):
    weight, x = problem(seed, rows=6, inputs=9)
    scale, zero_point = weight_ranges(weight, bits)
    moment = second_moment(x)
    codes = refined(weight.double(), moment, scale, zero_point, bits)
    first = nearest(weight, bits).codes.double()
    before, after = ((part - zero_point[:, None]) * scale.double()[:, None] - weight for part in (first, codes))
    assert bool(((after @ moment * after).sum(1) <= (before @ moment * before).sum(1) * (1 + 1e-5) + 1e-12).all())
    assert float((codes - first).abs().max()) <= 1


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_large_ridge_is_rounding_to_nearest(bits: int):
    weight, x = problem(5)
    expected = nearest(weight, bits)
    found = compensated(weight, second_moment(x), expected.scale, expected.zero_point, bits, ridge=1e12)
    assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_inputs_that_never_come_change_nothing(name: str):
    weight, x = problem(6)
    qparams = weight_ranges(weight, 4)
    x[:, ::3] = 0.0
    found = ROUNDINGS[name](weight, second_moment(x), *qparams, 4, 0.01)
    alone = [column for column in range(weight.shape[1]) if column % 3]
    assert torch.equal(found.codes[:, ::3], nearest(weight, 4).codes[:, ::3])
    assert output_error(weight, found.dequantize(), x) < output_error(weight, nearest(weight, 4).dequantize(), x)
    if name == "compensated":  # those that come are compensated among themselves; the ridge's unit counts all inputs
        part = compensated(weight[:, alone], second_moment(x)[alone][:, alone], *qparams, 4, 0.01 * len(alone) / weight.shape[1])
        assert torch.equal(part.codes, found.codes[:, alone])
    nothing = ROUNDINGS[name](weight, torch.zeros(24, 24), *qparams, 4)
    assert torch.equal(nothing.codes, nearest(weight, 4).codes)


def test_independent_inputs_leave_nearest_alone():
    weight, _ = problem(7)
    for name, rounding in ROUNDINGS.items():
        found = rounding(weight, torch.diag(torch.arange(1.0, 25.0)), *weight_ranges(weight, 4), 4)
        assert torch.equal(found.codes, nearest(weight, 4).codes), name


@given(st.integers(0, 200), st.integers(1, 4))
@settings(max_examples=20)
def test_input_moments_are_numpys_however_batched(seed: int, batches: int):
    _, x = problem(seed, inputs=6, tokens=60)
    read = (x * 2).round() / 2 + 0.3
    together = np.cov(np.concatenate([read.double().numpy(), x.double().numpy()], 1).T, bias=True)
    size = np.abs(together).max()
    exact = InputPairs()
    for a, b in zip(x.double().chunk(batches), read.double().chunk(batches), strict=True):
        exact.add(a, b)
    assert np.allclose(exact.covariance.numpy(), together[:6, :6], atol=1e-9 * size)
    assert np.allclose(exact.missing.numpy(), (together[:6, 6:] - together[:6, :6]), atol=1e-9 * size)
    pairs = InputPairs()
    for a, b in zip(x.chunk(batches), read.chunk(batches), strict=True):
        pairs.add(a, b)
    assert np.allclose(pairs.covariance.numpy(), together[:6, :6], atol=1e-5 * size)
    assert np.allclose(pairs.float_covariance.numpy(), together[6:, 6:], atol=1e-5 * size)
    assert np.allclose(pairs.missing.numpy(), (together[:6, 6:] - together[:6, :6]), atol=1e-5 * size)
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))
    output, made = pairs.output(weight), (read.double() @ weight.T.double())
    assert np.allclose(output.mean, made.mean(0), atol=1e-4) and np.allclose(output.variance, made.var(0, correction=0), rtol=1e-3)
    assert np.allclose(pairs.mean, x.mean(0), atol=1e-5) and np.allclose(pairs.quantized_mean, read.mean(0), atol=1e-5)


def test_absorbed_weights_solve_the_ridge_regression():
    weight, x = problem(8, tokens=2_000)
    read = (x / x.std(0) * 1.5).round() / 1.5 * x.std(0)
    moments, same = InputPairs(), InputPairs()
    moments.add(x.double(), read.double())
    same.add(x.double(), x.double())
    found = absorbed(weight, moments.covariance, moments.missing, 0.02).double()
    centred, seen = (value.double() - value.double().mean(0) for value in (x, read))
    strength = 0.02 * float(seen.square().mean())
    # rows of the inputs, then rows that draw each weight to its first value: plain least squares
    rows = torch.cat([seen, math.sqrt(len(x) * strength) * torch.eye(24)])
    wanted = torch.cat([centred @ weight.T.double(), math.sqrt(len(x) * strength) * weight.T.double()])
    assert torch.allclose(found.T, torch.linalg.lstsq(rows, wanted).solution, atol=1e-5)

    def error(candidate: Tensor) -> float:
        return float((seen @ candidate.T - centred @ weight.T.double()).square().sum())

    assert error(found) < 0.9 * error(weight.double())
    assert torch.allclose(absorbed(weight, moments.covariance, moments.missing, 1e12), weight, atol=1e-6)
    assert torch.allclose(absorbed(weight, same.covariance, same.missing), weight, atol=1e-6)


# AdaRound


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=20), st.floats(2, 20))
def test_fractions_and_their_penalty_are_the_papers(variables: list[float], beta: float):
    expected = [min(max(1 / (1 + math.exp(-v)) * (1.1 + 0.1) - 0.1, 0.0), 1.0) for v in variables]
    found = fraction(torch.tensor(variables, dtype=torch.float64))
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    cost = sum(1 - abs(2 * h - 1) ** beta for h in expected)
    assert float(penalty(torch.tensor(variables, dtype=torch.float64), beta)) == pytest.approx(cost, abs=1e-9)


def test_the_exponent_falls_after_the_warm_up():
    assert [beta_at(progress) for progress in (0.0, 0.1, 0.199)] == [None] * 3
    assert [beta_at(progress) for progress in (0.2, 0.6, 1.0)] == pytest.approx([20, 11, 2])


@pytest.mark.parametrize("bits", WIDTHS)
def test_rounding_starts_at_the_float_weight_and_chooses_a_neighbour(bits: int):
    weight = problem(9)[0].reshape(12, 4, 3, 2)
    low, high = weight.flatten(1).amin(1), weight.flatten(1).amax(1)
    scale = torch.maximum(high, -low) / (1.4 if bits == 2 else 2 ** (bits - 1) - 2 if bits < 8 else 63)
    zero_point = torch.full_like(scale, 2.0 ** (bits - 1))
    variables = first_variables(weight, scale)
    inside = ((weight / scale[:, None, None, None]).floor() + 2 ** (bits - 1)).clamp(*weight_codes(bits)) < weight_codes(bits)[1]
    softly = softly_rounded(weight, variables, scale, zero_point, bits)
    assert torch.allclose(softly[inside], weight[inside], atol=1e-5)
    found = rounded(weight, variables, scale, zero_point, bits)
    apart = (found.codes.int() - quantize_weight(weight, scale, zero_point, bits).codes.int()).abs()
    assert int(apart.max()) <= 1 and int(apart.sum()) <= 1  # but for a fraction of exactly one half
    settled = softly_rounded(weight, torch.where(fraction(variables) >= 0.5, 9.0, -9.0), scale, zero_point, bits)
    assert torch.equal(settled, found.dequantize())


def test_gradients_reach_variables_and_scale():
    weight = problem(10)[0][:2, :3].double()
    scale, zero_point = torch.tensor([0.11, 0.07], dtype=torch.float64, requires_grad=True), torch.tensor([8.0, 8.0])
    variables = first_variables(weight, scale.detach()).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, s: softly_rounded(weight, v, s, zero_point, 4), (variables, scale.detach().clone().requires_grad_()), raise_exception=True
    )
    assert torch.autograd.gradcheck(lambda v: penalty(v, 3.0), (variables,))


def test_learned_rounding_has_less_output_error_and_settles():
    ratios = []
    for seed in range(3):
        weight, x = problem(seed)
        moment = second_moment(x).float()
        scale, zero_point = weight_ranges(weight, 3)
        variables = first_variables(weight, scale).requires_grad_()
        optimizer = torch.optim.Adam([variables], lr=0.02)
        unit = float(((nearest(weight, 3).dequantize() - weight) @ moment * (nearest(weight, 3).dequantize() - weight)).sum())
        for step in range(600):
            error = softly_rounded(weight, variables, scale, zero_point, 3) - weight
            beta = beta_at(step / 600)
            loss = (error @ moment * error).sum() / unit + (0.0 if beta is None else 0.03 * penalty(variables, beta))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = rounded(weight, variables.detach(), scale, zero_point, 3)
        assert float(((fraction(variables) - 0.5).abs() > 0.45).float().mean()) > 0.95
        ratios.append(output_error(weight, found.dequantize(), x) / output_error(weight, nearest(weight, 3).dequantize(), x))
    assert max(ratios) < 0.75


def test_widths_rounded_together_are_those_rounded_alone():
    weight, x = problem(8)
    qparams = [weight_ranges(weight, bits) for bits in WIDTHS]
    together = compensation.compensated_widths(weight, second_moment(x), qparams, list(WIDTHS))
    for bits, pair, found in zip(WIDTHS, qparams, together, strict=True):
        alone = compensated(weight, second_moment(x), *pair, bits)
        assert torch.equal(found.codes, alone.codes) and found.bits == bits and torch.equal(found.scale, alone.scale)


def test_covariances_are_those_of_what_the_linears_read():
    graph = rewrite(captured("vit")[1])
    x = images(6, 32)
    found = input_covariances(graph, [(x[:2], None), (x[2:], None)])
    linears = [layer for layer in graph.layers if layer.op == "linear"]
    assert set(found) == {layer.name for layer in linears}
    read = {layer.name: graph.layer_node(layer.name).args[0] for layer in linears}
    values = values_at(graph.module, x, [node.name for node in read.values()])
    for name, node in read.items():
        rows = values[node.name].reshape(-1, values[node.name].shape[-1]).double()
        assert torch.allclose(found[name].double(), torch.cov(rows.T, correction=0), atol=1e-4 * float(rows.var(0).max()))


def test_a_layer_whose_inputs_are_known_is_compensated():
    graph = rewrite(captured("vit")[1])
    covariances = input_covariances(graph, [(images(6, 32), None)])
    name = next(layer.name for layer in graph.layers if layer.type == "fc2")
    weight = tensor_of(graph.module, graph.layer_node(name).args[1])
    for (bits, found), to_nearest in zip(
        zip((3, 8), fit_weights(graph, covariances, name, (3, 8)), strict=True), fit_weights(graph, {}, name, (3, 8)), strict=True
    ):
        expected = compensated(weight, covariances[name], *weight_ranges(weight, bits), bits)
        assert torch.equal(found.codes, expected.codes) and torch.equal(to_nearest.codes, nearest(weight, bits).codes)
        assert not torch.equal(found.codes, to_nearest.codes)


def test_one_pass_sees_what_two_passes_see():
    graph = rewrite(captured("vit")[1])
    batches = [(images(4, 32), None), (images(3, 32, seed=1), None)]
    folded, histograms, covariances = observe(graph, batches)
    alone, apart = fold(graph, batches)
    assert folded.digest == alone.digest and set(histograms) == set(apart)
    assert all(torch.equal(histograms[name].counts, apart[name].counts) and histograms[name].low == apart[name].low for name in apart)
    expected = input_covariances(folded, batches)
    assert set(covariances) == set(expected) and all(torch.equal(covariances[name], expected[name]) for name in expected)


def test_a_moment_that_rounding_left_indefinite_is_trusted_less():
    weight, x = problem(9)
    moment = second_moment(x)
    values, axes = torch.linalg.eigh(moment)
    broken = axes @ torch.diag(torch.cat([-0.5 * moment.diagonal().mean()[None], values[1:]])) @ axes.T
    assert broken.diagonal().mean() > 0
    found = compensated(weight, broken, *weight_ranges(weight, 4), 4)
    assert torch.equal(found.codes, compensated(weight, broken, *weight_ranges(weight, 4), 4, 1.0).codes)


def test_covariances_survive_a_mean_that_dwarfs_the_spread():
    sums, x = InputSums(6, torch.device("cpu")), 1000 + torch.randn(3, 200, 6, generator=torch.Generator().manual_seed(0))
    for batch in x:
        sums.add(batch)
    assert torch.allclose(sums.covariance, torch.cov(x.flatten(0, 1).double().T, correction=0).float(), atol=1e-3)
    torch.linalg.cholesky(sums.covariance)
