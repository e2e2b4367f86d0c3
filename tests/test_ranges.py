"""Histograms against numpy on all the data at once, and searched ranges against brute force."""

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NormThenLinear, Tokens, captured, captured_module, images, randomised
from torch import Tensor

from vitq.affine import choose_qparams, highest_code, quantize_dequantize, quantize_weight, weight_qparams
from vitq.errors import InputError
from vitq.fitting import relative_error
from vitq.graph import values_at
from vitq.quantizers import Uniform
from vitq.ranges import BINS, Histogram, activation_qparams, add, channel_ranges, fold, histograms, weight_ranges
from vitq.rewrites import foldable_norms, rewrite

WIDTHS = range(2, 9)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SAMPLES = {
    "normal": random(40_000),
    "shifted": random(40_000) + 3,
    "positive": random(40_000).exp(),
    "negative": -random(40_000).exp(),
    "gelu": torch.nn.functional.gelu(2 * random(40_000)),
    "softmax": (3 * random(600, 64)).softmax(-1).flatten(),
    "heavy tails": random(40_000) * (random(40_000, seed=1) * 0.8).exp(),
    "an outlier": torch.cat([random(40_000), torch.tensor([60.0, -5.0])]),
    "uniform": random(40_000).erf() * 2 - 1,
}


def histogram_of(x: Tensor, batches: int = 5) -> Histogram:
    histogram = None
    for part in x.tensor_split(batches):
        histogram = add(histogram, part)
    assert histogram is not None
    return histogram


def centers(histogram: Histogram) -> Tensor:
    """The middle of each bin."""
    edges = torch.linspace(histogram.low, histogram.high, BINS + 1, dtype=torch.float64)
    return (edges[1:] + edges[:-1]) / 2


def squared_error(x: Tensor, scale: Tensor | float, zero_point: Tensor | float, bits: int) -> float:
    return float((quantize_dequantize(x, scale, zero_point, bits) - x).double().square().sum())


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(1e-4, 1e3), st.integers(1, 300)), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=50)
def test_histograms_count_what_numpy_counts(batches: list[tuple[float, float, int]], seed: int):
    generator = torch.Generator().manual_seed(seed)
    parts = [shift + scale * torch.randn(count, generator=generator) for shift, scale, count in batches]
    histogram = None
    for part in parts:
        histogram = add(histogram, part)
    assert histogram is not None
    x = torch.cat(parts).double().numpy()
    assert histogram.counts.shape == (BINS,)
    assert histogram.low <= x.min() and x.max() <= histogram.high
    assert float(histogram.counts.sum()) == len(x)
    expected, edges = np.histogram(x, bins=BINS, range=(histogram.low, histogram.high))
    # A value within float32 rounding of an edge may fall on its other side: no cumulated count moves past such values.
    slack = 1e-5 * max(abs(histogram.low), abs(histogram.high), 1e-6)
    below, above = ((np.sort(x)[:, None] < edges[None, 1:] + sign * slack).sum(0) for sign in (-1, 1))
    cumulated = histogram.counts.cumsum(0).numpy()
    assert np.all(below <= cumulated) and np.all(cumulated[:-1] <= above[:-1])
    assert len(expected) == len(centers(histogram))
    assert np.allclose(centers(histogram).numpy(), (edges[1:] + edges[:-1]) / 2, rtol=1e-5, atol=slack)


def test_a_range_grows_by_doubling_and_merges_neighbours():
    first = add(None, torch.tensor([0.0, 1.0, 0.5]))
    assert (first.low, first.high) == (0.0, pytest.approx(1.0, abs=2e-3))
    second = add(first, torch.tensor([-0.5, 2.9]))
    assert (second.low, second.high) == (pytest.approx(-1.0, abs=2e-3), pytest.approx(3.0, abs=6e-3))
    counted = {float(centers(second)[index]): int(second.counts[index]) for index in second.counts.nonzero().flatten()}
    assert sum(counted.values()) == 5
    for value in (0.0, 1.0, 0.5, -0.5, 2.9):
        assert min(abs(center - value) for center in counted) <= 4 / BINS


@pytest.mark.parametrize("constant", [0.0, 1e-30, 5.0, -20_000.0, 3e7])
def test_a_constant_first_batch_is_no_dead_end(constant: float):
    histogram = add(add(None, torch.full((50,), constant)), torch.tensor([constant + 1e-3 * abs(constant), -1.0, 1.0, constant]))
    assert float(histogram.counts.sum()) == 54
    alone = activation_qparams(add(None, torch.full((50,), constant)), 8)
    assert squared_error(torch.tensor([constant]), alone.scale, alone.zero_point, 8) <= (1e-2 * constant) ** 2 + 1e-20


def test_samples_do_not_fall_in_step_with_the_channels():
    x = torch.zeros(8_400, 36)  # three times as many values as are counted, and three divides the channels
    x[:, ::3] = 1.0  # a third of the channels
    histogram = add(None, x)
    counts = histogram.counts / histogram.counts.sum()
    assert float(histogram.counts.sum()) < x.numel() / 3 + 1
    assert float(counts[BINS // 2 :].sum()) == pytest.approx(1 / 3, abs=0.01)


def test_the_extremes_are_found_however_many_values_there_are():
    x = torch.zeros(400_001)
    x[77_777], x[300_001] = -3.0, 5.0
    histogram = add(None, x)
    assert -3.01 < histogram.low <= -3.0 and 5.0 <= histogram.high < 5.01


def test_a_batch_that_reaches_as_far_but_for_rounding_does_not_double_the_range():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    first = add(None, x)
    second = add(first, x * (1 + 3e-7))
    assert (second.low, second.high) == (first.low, first.high)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_an_error(value: float):
    with pytest.raises(InputError, match="an activation is not finite"):
        add(None, torch.tensor([0.0, value]))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("sample", SAMPLES)
def test_activation_ranges_are_near_the_best(sample: str, bits: int):
    x = SAMPLES[sample]
    found = activation_qparams(histogram_of(x), bits)
    assert found.bits == bits and 0 <= found.zero_point < 2**bits
    error = squared_error(x, found.scale, found.zero_point, bits)
    scale, zero_point = choose_qparams(x.min(), x.max(), bits)
    assert error <= 1.01 * squared_error(x, scale, zero_point, bits)  # least and greatest value

    best = squared_error(x, *brute_force(x, bits), bits)
    assert error <= 1.04 * best


def brute_force(x: Tensor, bits: int) -> tuple[float, float]:
    """The best of a dense grid of scales for every zero point (every third or fifteenth above 5 bits), judged on a tenth of the values."""
    part = x.sort().values[5::10]
    scales = (max(float(x.max()), 0.0) - min(float(x.min()), 0.0)) / highest_code(bits) * torch.logspace(0.3, -1.7, 100)[:, None]
    best = (float("inf"), 0.0, 0.0)
    for code in range(0, 2**bits, {6: 3, 8: 15}.get(bits, 1)):  # both ends are among them
        errors = (quantize_dequantize(part, scales, float(code), bits) - part).square().sum(1)
        best = min(best, (float(errors.min()), float(scales[errors.argmin()]), float(code)))
    return best[1], best[2]


@pytest.mark.parametrize("sample", SAMPLES)
def test_more_bits_have_less_error(sample: str):
    histogram = histogram_of(SAMPLES[sample])
    fitted = [activation_qparams(histogram, bits) for bits in WIDTHS]
    errors = [squared_error(SAMPLES[sample], found.scale, found.zero_point, found.bits) for found in fitted]
    assert errors == sorted(errors, reverse=True)


def test_a_tensor_of_zeros_has_a_scale():
    assert activation_qparams(add(None, torch.zeros(10)), 4).scale > 0
    assert activation_qparams(histogram_of(torch.zeros(10)), 4).zero_point == 0


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", ["normal", "skewed", "shifted", "few", "zero"])
def test_weight_ranges_are_no_worse_than_least_and_greatest(kind: str, bits: int):
    weight = {
        "normal": random(16, 96),
        "skewed": random(16, 96) + random(16, 96, seed=1).exp(),
        "shifted": random(16, 96) + 1,
        "few": random(16, 3, 3, 1),
        "zero": torch.cat([random(8, 30), torch.zeros(2, 30), random(6, 30) * 1e-3]),
    }[kind]

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        moved = quantize_weight(weight, scale, zero_point, bits).dequantize()
        return (moved - weight).square().flatten(1).sum(1)

    rows = weight.flatten(1)
    low, high = rows.amin(1), rows.amax(1)
    found = error(*weight_ranges(weight, bits))
    assert bool((found <= error(*weight_qparams(low, high, bits)) * (1 + 1e-5) + 1e-12).all())
    best = torch.stack([error(*weight_qparams(low * shrink, high * shrink, bits)) for shrink in torch.linspace(0.1, 1, 300)]).amin(0)
    if kind != "few":  # nine values a channel: the error jumps from shrink to shrink
        assert float(found.sum()) <= (1.03 if bits <= 6 else 1.15) * float(best.sum())  # many near-equal optima at 7 and 8 bits
    if kind == "zero":
        assert bool((found[8:10] == 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weight_ranges_are_near_the_best_of_both_ends(bits: int):
    weight = random(12, 128)
    low, high = weight.amin(1), weight.amax(1)
    shrinks = torch.linspace(0.2, 1, 33)

    def error(scale: Tensor, zero_point: Tensor) -> Tensor:
        return (quantize_weight(weight, scale, zero_point, bits).dequantize() - weight).square().sum(1)

    best = torch.stack([error(*weight_qparams(low * a, high * b, bits)) for a in shrinks for b in shrinks]).amin(0)
    assert float(error(*weight_ranges(weight, bits)).sum()) <= 1.08 * float(best.sum())


@pytest.mark.parametrize("bits", WIDTHS)
def test_symmetric_weight_ranges_have_the_middle_for_zero_and_are_near_the_best_scale(bits: int):
    weight = random(12, 768)
    scale, zero_point = weight_ranges(weight, bits, symmetric=True)
    assert zero_point.tolist() == [2.0 ** (bits - 1)] * 12
    largest = weight.abs().amax(1)

    def error(scale: Tensor) -> Tensor:
        return (quantize_weight(weight, scale, zero_point, bits).dequantize() - weight).square().sum(1)

    best = torch.stack([error(largest * share / 2 ** (bits - 1)) for share in torch.linspace(0.1, 2.1, 1000)]).amin(0)
    assert float(error(scale).sum()) <= (1.03 if bits <= 6 else 1.15) * float(best.sum())


def batches_of(x: Tensor, size: int = 4) -> list[tuple[Tensor, None]]:
    return [(part, None) for part in x.split(size)]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", SAMPLES)
def test_the_relative_error_is_that_of_the_bins_quantized_one_by_one(name: str, bits: int):
    histogram = histogram_of(SAMPLES[name])
    qparams = activation_qparams(histogram, bits)
    middles = centers(histogram)
    moved = quantize_dequantize(middles, qparams.scale, qparams.zero_point, bits)
    error, power = ((histogram.counts * part.square()).sum() for part in (moved - middles, middles))
    assert relative_error(histogram, qparams) == pytest.approx(float(error / power), rel=1e-6)


def test_histograms_of_a_graph_hold_what_its_layers_read():
    graph = rewrite(captured("vit")[1])
    x = images(6, 32)
    found = histograms(graph, batches_of(x))
    tensors = {operand.tensor for layer in graph.layers for operand in layer.activations}
    assert set(found) == tensors
    values = values_at(graph.module, x, tensors)
    for name, histogram in found.items():
        assert float(histogram.counts.sum()) == values[name].numel()
        assert histogram.low <= float(values[name].min()) + 1e-4 and float(values[name].max()) - 1e-4 <= histogram.high
        middle = float((histogram.counts * centers(histogram)).sum() / histogram.counts.sum())
        assert middle == pytest.approx(float(values[name].mean()), abs=(histogram.high - histogram.low) / BINS)


def test_channel_ranges_are_those_of_all_images_together():
    graph = rewrite(captured("swin")[1])
    x = images(5, 40)
    found = channel_ranges(graph, foldable_norms(graph), batches_of(x, 2))
    values = values_at(graph.module, x, list(foldable_norms(graph)))
    assert set(found) == set(values)
    for name, value in values.items():
        rows = value.reshape(-1, value.shape[-1])
        assert torch.allclose(found[name].low, rows.amin(0), atol=1e-5) and torch.allclose(found[name].high, rows.amax(0), atol=1e-5)


def test_the_order_of_batches_hardly_matters():
    graph = captured_module(randomised(Tokens(NormThenLinear())))
    batches = batches_of(images(12, 8))
    forward, backward = fold(graph, batches)[1], fold(graph, batches[::-1])[1]
    for name, histogram in forward.items():
        a, b = activation_qparams(histogram, 4), activation_qparams(backward[name], 4)
        assert a.scale == pytest.approx(b.scale, rel=0.05) and abs(a.zero_point - b.zero_point) <= 1


def test_memory_does_not_grow_with_the_images():
    graph = captured_module(randomised(Tokens(NormThenLinear())))
    seen: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[tuple[Tensor, None]]:
        for seed in range(20):
            assert sum(batch() is not None for batch in seen) <= 1, "batches are held"
            batch = images(4, 8, seed)
            seen.append(weakref.ref(batch))
            yield batch, None

    found = histograms(graph, batches())
    assert len(seen) == 20
    for histogram in found.values():
        assert histogram.counts.numel() == BINS  # and nothing else but the two ends
        assert set(vars(histogram)) == {"low", "high", "counts"}


def test_qparams_are_exact_in_float32():
    for sample in SAMPLES.values():
        found = activation_qparams(histogram_of(sample), 5)
        assert isinstance(found, Uniform) and type(found.zero_point) is int
        assert float(np.float32(found.scale)) == found.scale
