"""Fitted quantizers against dense grids and the data itself, and weighted histograms against gradients taken by hand."""

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NormThenLinear, Tokens, captured_module, images, randomised
from torch import Tensor

from vitq.affine import choose_qparams, quantize_dequantize
from vitq.fitting import FITS, RANGES, fit, fit_operand, relative_error
from vitq.fitting.factors import channel_errors, power_of_two_factor
from vitq.fitting.importance import importance_histograms
from vitq.fitting.search import squared_error
from vitq.fitting.uniform import quantile
from vitq.gradients import error_probe
from vitq.quantizers import QUANTIZERS, AdaLog, Log2, LogSqrt2, PowerOfTwoFactor, Quantizer, RowSquares, TwinGrid, TwinUniform, Uniform
from vitq.ranges import BINS, Histogram, activation_qparams, add


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SOFTMAX = (3 * random(400, 48)).softmax(-1).flatten()
GELU = torch.nn.functional.gelu(2 * random(20_000))
SAMPLES = {"softmax": SOFTMAX, "gelu": GELU, "normal": random(20_000), "outliers": random(20_000) * (1.5 * random(20_000, seed=1)).exp()}


def of(x: Tensor, weight: Tensor | None = None) -> Histogram:
    return add(None, x, weight)


def error_on(x: Tensor, quantizer: Quantizer) -> float:
    return float((quantizer.quantize_dequantize(x) - x).double().square().sum())


def test_every_quantizer_can_be_fitted():
    assert set(FITS) | {"power-of-two-factor", "row-squares"} == set(QUANTIZERS)
    for name, fitted in FITS.items():
        assert type(fitted(of(SOFTMAX), 4)) is QUANTIZERS[name]


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_the_error_over_the_histogram_is_that_of_the_data(name: str, sample: str):
    quantizer = FITS[name](of(SAMPLES[sample]), 4)
    assert squared_error(of(SAMPLES[sample]), quantizer) == pytest.approx(error_on(SAMPLES[sample], quantizer), rel=0.02)


def float32(value: float) -> float:
    return float(np.float32(value))


def dense(name: str, x: Tensor, bits: int) -> Iterator[Quantizer]:
    """Many quantizers of a kind for a softmax, or a GELU (twin-uniform)."""
    top = float(x.max())
    scales = [float32(top * 2.0**-octaves) for octaves in np.linspace(-0.5, 4, 60)]
    if name == "log2":
        yield from (Log2(scale, bits, zero) for scale in scales for zero in (False, True))
    if name == "log-sqrt2":
        yield from (LogSqrt2(scale, bits, zero) for scale in scales for zero in (False, True))
    if name == "adalog":
        yield from (AdaLog(scale, q, bits, 0.0, zero) for scale in scales[::3] for q in range(1, 139, 2) for zero in (False, True))
    if name == "twin-grid":
        highest, low = 2**bits - 1, max(-float(x.min()), 0.0)
        for ratio, knee in product((3, 5, 7, 9), range(1, highest, max(1, highest // 16))):
            if knee + ratio * (highest - knee) <= 255:
                reaches = np.geomspace(0.05, 1, 25) * top
                for scale, zero in product((reaches + low) / (knee + ratio * (highest - knee)), np.linspace(0, 1, 4)):
                    yield TwinGrid(float32(scale), min(round(zero * low / scale), knee), knee, ratio, bits)
    if name == "twin-uniform":
        steps = [float32(scale / (2 ** (bits - 1) - 1)) for scale in scales[::2]]
        if float(x.min()) < 0:
            lowers = [float32(-float(x.min()) * ratio / (2 ** (bits - 1) - 1)) for ratio in np.linspace(0.05, 1.2, 40)]
            yield from (TwinUniform(lower, upper, bits, True) for upper in steps for lower in lowers)
        else:
            ratios = [2.0**octaves for octaves in np.linspace(0, 12, 60)]
            yield from (TwinUniform(float32(upper / ratio), upper, bits) for upper in steps for ratio in ratios)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize(
    ("name", "sample"), [*((name, "softmax") for name in FITS if name != "uniform"), ("twin-uniform", "gelu"), ("twin-grid", "gelu")]
)
def test_fits_are_near_the_best_of_a_dense_grid(name: str, sample: str, bits: int):
    part = SAMPLES[sample].sort().values[3::7]
    best = min(error_on(part, quantizer) for quantizer in dense(name, SAMPLES[sample], bits))
    assert error_on(part, FITS[name](of(SAMPLES[sample]), bits)) <= 1.05 * best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_is_worth_a_code_where_few_bits_meet_a_softmax(bits: int):
    for name in ("log2", "log-sqrt2", "adalog"):
        fitted = FITS[name](of(SOFTMAX), bits)
        codes = fitted.quantize(torch.zeros(1))
        assert bits == 4 or float(fitted.dequantize(codes)) == 0.0


def test_adalog_shifts_a_gelu_by_its_least_value():
    fitted = FITS["adalog"](of(GELU), 4)
    assert isinstance(fitted, AdaLog) and fitted.shift == pytest.approx(0.16997124, abs=1e-2)
    unshifted = FITS["adalog"](of(SOFTMAX), 4)
    assert isinstance(unshifted, AdaLog) and unshifted.shift == 0.0


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_searched_base_is_no_worse_than_the_fixed_ones(bits: int):
    adalog, *fixed = (squared_error(of(SOFTMAX), FITS[name](of(SOFTMAX), bits)) for name in ("adalog", "log2", "log-sqrt2"))
    assert adalog <= 1.02 * min(fixed)


def test_the_best_kind_is_taken_among_those_allowed():
    for sample in SAMPLES.values():
        errors = {name: squared_error(of(sample), fitted(of(sample), 3)) for name, fitted in FITS.items()}
        assert squared_error(of(sample), fit(of(sample), 3, tuple(FITS))) == min(errors.values())
        assert type(fit(of(sample), 3)) is Uniform
        assert squared_error(of(sample), fit(of(sample), 3, ("log2", "uniform"))) == min(errors["log2"], errors["uniform"])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", [*FITS, *RANGES])
def test_constants_and_zeros_are_fitted(name: str, bits: int):
    fitting = {**FITS, **RANGES}[name]
    for constant in (0.0, 1e-30, 0.25, 3e4, -5.0):
        x = torch.full((50,), constant)
        moved = fitting(of(x), bits).quantize_dequantize(x)
        assert bool(moved.isfinite().all())
        if constant >= 0 or name not in ("log2", "log-sqrt2"):  # which have no negative values
            assert float((moved - x).abs().max()) <= 0.02 * abs(constant) + 1e-12
    nothing = of(random(50), torch.zeros(50))
    assert bool(fitting(nothing, bits).quantize_dequantize(random(50)).isfinite().all())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sample", SAMPLES)
def test_named_ranges(sample: str, bits: int):
    x = SAMPLES[sample]
    found = {name: fitting(of(x), bits) for name, fitting in RANGES.items()}
    bin_width = float(x.max() - x.min()) / BINS
    scale, zero_point = choose_qparams(x.min(), x.max(), bits)
    assert found["min-max"].scale == pytest.approx(float(scale), abs=bin_width)
    assert found["min-max"].zero_point == pytest.approx(float(zero_point), abs=1)
    least = activation_qparams(of(x), bits)
    assert found["mse"] == Uniform(least.scale, least.zero_point, bits)
    errors = []
    for p in (0.999, 0.9999, 0.99999):
        low, high = (torch.tensor(np.quantile(x.numpy(), level)).float() for level in (1 - p, p))
        scale, zero_point = choose_qparams(low, high, bits)
        errors.append(float((quantize_dequantize(x, scale, zero_point, bits) - x).double().square().sum()))
    assert error_on(x, found["percentile"]) <= (1.15 if sample == "outliers" else 1.03) * min(
        errors
    )  # far out, a bin holds no or one value
    assert error_on(x, found["mse"]) <= 1.03 * min(error_on(x, found["percentile"]), error_on(x, found["min-max"]))


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=200), st.floats(0, 1))
@settings(max_examples=60)
def test_quantiles_leave_that_part_below(values: list[float], level: float):
    histogram = of(torch.tensor(values))
    found = quantile(histogram, level)
    below = sum(value < found - 1.01 * histogram.width for value in values) / len(values)
    through = sum(value <= found + 1.01 * histogram.width for value in values) / len(values)
    assert below - 1e-9 <= level <= through + 1e-9


CHANNELS = random(3_000, 12) * torch.logspace(-2, 1, 12) + 0.1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_factors_are_those_of_a_loop_over_channels(bits: int):
    low, high = float(CHANNELS.min()), float(CHANNELS.max())
    total = sum(channel_errors(part.reshape(5, -1, 12), low, high, bits) for part in CHANNELS.split(1_000))
    assert isinstance(total, Tensor)
    found = power_of_two_factor(low, high, bits, total)
    scale, zero_point = (float(value) for value in choose_qparams(torch.tensor(low), torch.tensor(high), bits))
    assert (found.scale, found.zero_point) == (pytest.approx(scale / 8), zero_point)
    for channel, exponent in enumerate(found.exponents):
        x = CHANNELS[:, channel]
        errors = [float((quantize_dequantize(x, scale / 8 * 2**a, zero_point, bits) - x).double().square().sum()) for a in range(4)]
        assert errors[exponent] == pytest.approx(min(errors))
    assert error_on(CHANNELS, found) < 0.9 * error_on(CHANNELS, PowerOfTwoFactor(found.scale, found.zero_point, bits, (3,) * 12))


def test_factors_of_zeros():
    zeros = torch.zeros(10, 3)
    found = power_of_two_factor(0.0, 0.0, 4, channel_errors(zeros, 0.0, 0.0, 4))
    assert torch.equal(found.quantize_dequantize(zeros), zeros)


@given(st.integers(0, 99), st.integers(1, 4))
@settings(max_examples=25)
def test_weighted_histograms_are_numpys(seed: int, batches: int):
    x, weight = random(900, seed=seed) * 3, random(900, seed=seed + 1).square()
    histogram = None
    for part, share in zip(x.tensor_split(batches), weight.tensor_split(batches), strict=True):
        histogram = add(histogram, part, share)
    assert histogram is not None
    expected = np.histogram(x.double().numpy(), BINS, (histogram.low, histogram.high), weights=weight.double().numpy())[0].cumsum()
    near_an_edge = 2 * float(weight.max())  # float32 may put a value on the other side
    assert np.abs(histogram.counts.cumsum(0).numpy() - expected).max() <= near_an_edge
    assert float(histogram.counts.sum()) == pytest.approx(float(weight.double().sum()))


def test_weights_of_ones_count():
    assert torch.allclose(of(GELU).counts.cumsum(0), of(GELU, torch.ones_like(GELU)).counts.cumsum(0), atol=3)


def test_weights_of_a_large_tensor_stay_with_their_values():
    x = torch.rand(350_001, generator=torch.Generator().manual_seed(0))
    histogram = of(x, (x > 0.5).float())
    assert float(histogram.counts[: BINS // 2 - 4].sum()) == 0
    assert float(histogram.counts.sum()) > 40_000


@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("bits", [2, 4])
def test_fits_to_weighted_histograms_have_less_weighted_error(name: str, bits: int):
    weight = torch.where(SOFTMAX < 0.1, 1.0, 0.01)

    def weighted(quantizer: Quantizer) -> float:
        return float(weight.double() @ (quantizer.quantize_dequantize(SOFTMAX) - SOFTMAX).double().square())

    plain, aware = (FITS[name](histogram, bits) for histogram in (of(SOFTMAX), of(SOFTMAX, weight)))
    assert weighted(aware) < 0.99 * weighted(plain)


def test_importance_is_the_squared_gradient_by_hand():
    model = randomised(Tokens(NormThenLinear()))
    graph = captured_module(model)
    batches = [(images(4, 8, seed), None) for seed in range(3)]
    found = importance_histograms(graph, batches, error_probe, seed=7)
    (operand,) = next(layer for layer in graph.layers if "fc2" in layer.name).activations

    inputs, generator = [], torch.Generator().manual_seed(7)
    hook = model.body.fc2.register_forward_pre_hook(
        lambda _, arguments: (inputs.append(arguments[0].detach().requires_grad_()), inputs[-1])[1]
    )
    weights, values = [], []
    for x, _ in batches:
        error_probe(model(x), generator).sum().backward()
        values.append(inputs[-1].detach().flatten())
        weights.append(inputs[-1].grad.square().flatten())
    hook.remove()
    value, weight = torch.cat(values).double().numpy(), torch.cat(weights).double().numpy()
    histogram = found[operand.tensor]
    expected = np.histogram(value, BINS, (histogram.low, histogram.high), weights=weight)[0].cumsum()
    assert np.allclose(histogram.counts.cumsum(0).numpy(), expected, atol=2 * weight.max(), rtol=1e-3)
    assert float(histogram.counts.sum()) == pytest.approx(weight.sum(), rel=1e-4)
    assert set(found) == {read.tensor for layer in graph.layers for read in layer.activations}


def test_scales_stay_within_float32():
    for size in (1e-35, 1e35):
        for name, fitted in FITS.items():
            quantizer = fitted(of(SOFTMAX * size), 4)
            assert all(math.isfinite(value) for value in quantizer.quantize_dequantize(SOFTMAX * size).tolist()), name


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_a_softmax_gets_rows_of_squares_below_8_bits(bits: int):
    """Rows of very different sharpness, which one range for all serves badly; their error is about what `relative_error` says."""
    rows = (torch.linspace(0.2, 4, 400)[:, None] * random(400, 197)).softmax(-1)
    chosen = fit_operand(of(rows.flatten()), bits, "post_softmax")
    assert chosen == (RowSquares(bits) if bits < 8 else fit_operand(of(rows.flatten()), bits, "plain"))
    squares = error_on(rows, RowSquares(bits))
    assert squares < 0.5 * error_on(rows, fit_operand(of(rows.flatten()), bits, "plain"))
    said = relative_error(of(rows.flatten()), RowSquares(bits))
    assert bits == 8 or 0.5 * said < squares / float(rows.double().square().sum()) < 2 * said


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_a_gelus_output_gets_two_steps_where_they_are_worth_it(bits: int):
    uniform, twin = (error_on(GELU, FITS[name](of(GELU), bits)) for name in ("uniform", "twin-grid"))
    chosen = fit_operand(of(GELU), bits, "post_gelu")
    assert type(chosen) is (TwinGrid if twin <= 0.8 * uniform else Uniform)
    assert bits < 4 or type(chosen) is TwinGrid
    even = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    assert type(fit_operand(of(even), bits, "post_gelu")) is type(fit_operand(of(GELU), bits, "plain")) is Uniform
