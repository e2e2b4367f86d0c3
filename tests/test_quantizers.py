"""Every quantizer of the registry: what all promise, and agreement with slow versions written from the papers, value by value.

`EXAMPLES` makes quantizers of each kind at random and `PAPERS` tells what each should do; an entry of the registry that lacks one fails.
"""

import json
import math
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vitq.affine import quantize_dequantize
from vitq.quantizers import (
    QUANTIZERS,
    AdaLog,
    Log2,
    LogSqrt2,
    PowerOfTwoFactor,
    Quantizer,
    RowSquares,
    TwinGrid,
    TwinUniform,
    Uniform,
    from_json,
    to_json,
)

CHANNELS = 3
widths = st.integers(2, 8)
scales = st.floats(2.0**-14, 2.0**10, width=32)
zero_points = st.integers(0, 3)
values = arrays(
    np.float32, st.tuples(st.integers(1, 30), st.just(CHANNELS)), elements=st.floats(-1e4, 1e4, width=32) | st.floats(-1, 1, width=32)
)


def twin_grid(scale: float, knee: int, depth: float, ratio: int, bits: int) -> TwinGrid:
    """The knee as near to the one asked for as the grid has room."""
    highest = 2**bits - 1
    knee = max(min(knee, highest), -((255 - ratio * highest) // (ratio - 1)))
    return TwinGrid(scale, int(depth * knee), knee, ratio, bits)


EXAMPLES: dict[str, st.SearchStrategy[Quantizer]] = {
    "uniform": st.builds(Uniform, scales, zero_points, widths),
    "log2": st.builds(Log2, scales, widths, st.booleans()),
    "log-sqrt2": st.builds(LogSqrt2, scales, widths, st.booleans()),
    "adalog": st.builds(AdaLog, scales, st.integers(1, 138), widths, st.just(0.0) | scales, st.booleans()),
    "twin-uniform": st.tuples(scales, scales).map(sorted).flatmap(lambda steps: st.builds(TwinUniform, *map(st.just, steps), widths))
    | st.builds(TwinUniform, scales, scales, widths, st.just(True)),
    "twin-grid": st.builds(twin_grid, scales, st.integers(0, 126), st.floats(0, 1), st.sampled_from([3, 5, 7, 9]), st.integers(2, 7)),
    "power-of-two-factor": st.builds(PowerOfTwoFactor, scales, zero_points, widths, st.tuples(*[st.integers(0, 3)] * CHANNELS)),
    "row-squares": st.builds(RowSquares, widths),
}
any_quantizer = st.one_of(*EXAMPLES.values())
each_kind = pytest.mark.parametrize("name", EXAMPLES)


def dense(quantizer: Quantizer) -> torch.Tensor:
    """Values (N, CHANNELS), rising, that reach every code: linear and geometric, both signs, steps beyond the last, and the codes' own."""
    own = quantizer.dequantize(torch.arange(2.0**quantizer.bits)[:, None].expand(-1, CHANNELS)).flatten()
    reach = 2 * float(own.abs().max()) + 1.0
    geometric = reach * torch.logspace(-9, 0, 3001)
    parts = [torch.linspace(-reach, reach, 3001), geometric, -geometric, torch.zeros(1), own]
    return torch.cat(parts).sort().values[:, None].repeat(1, CHANNELS)


def test_every_quantizer_is_tested():
    assert set(EXAMPLES) == {*PAPERS, "row-squares"} == set(QUANTIZERS)


@given(any_quantizer)
def test_a_channel_has_no_more_values_than_codes(quantizer: Quantizer):
    x = dense(quantizer)
    codes, moved = quantizer.quantize(x), quantizer.quantize_dequantize(x)
    assert codes.dtype == moved.dtype == torch.float32 and codes.shape == moved.shape == x.shape
    assert torch.equal(codes, codes.round()) and float(codes.min()) >= 0 and float(codes.max()) <= 2**quantizer.bits - 1
    for channel in range(CHANNELS):
        assert len(moved[:, channel].unique()) <= 2**quantizer.bits


@given(any_quantizer, values)
def test_quantizing_twice_is_quantizing_once(quantizer: Quantizer, x: np.ndarray):
    for given_x in (torch.from_numpy(x), dense(quantizer)):
        once = quantizer.quantize_dequantize(given_x)
        assert torch.equal(quantizer.quantize_dequantize(once), once)


@given(any_quantizer, values)
def test_codes_stand_for_what_fake_quantization_returns(quantizer: Quantizer, x: np.ndarray):
    moved = quantizer.quantize_dequantize(torch.from_numpy(x))
    assert torch.equal(quantizer.dequantize(quantizer.quantize(torch.from_numpy(x))), moved)


@given(any_quantizer)
def test_higher_values_never_become_lower_ones(quantizer: Quantizer):
    assert bool((quantizer.quantize_dequantize(dense(quantizer)).diff(dim=0) >= 0).all())


@given(any_quantizer)
def test_every_value_has_a_code(quantizer: Quantizer):
    extremes = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 3e38, -3e38])[:, None].repeat(1, CHANNELS)
    codes, moved = quantizer.quantize(extremes), quantizer.quantize_dequantize(extremes)
    assert bool(((codes >= 0) & (codes < 2**quantizer.bits)).all())
    assert bool(moved.isfinite().all())
    assert len(quantizer.quantize_dequantize(torch.zeros(5, CHANNELS)).unique()) == 1


@given(any_quantizer)
def test_quantizers_go_to_json_and_back(quantizer: Quantizer):
    assert from_json(json.loads(json.dumps(to_json(quantizer)))) == quantizer


@each_kind
def test_damaged_parameters_are_refused(name: str):
    good = to_json(example(name))
    for field in fields(QUANTIZERS[name]):
        for bad in (math.nan, -1.0, None, "4", 1e-30, [0.5], []):
            with pytest.raises(ValueError):
                from_json(good | {field.name: bad})
    for bits in (0, 1, 9, 4.0, True):
        with pytest.raises(ValueError, match="do not go together"):
            from_json(good | {"bits": bits})
    with pytest.raises(ValueError, match=f"are not the parameters of quantizer '{name}'"):
        from_json(good | {"colour": 1})
    with pytest.raises(ValueError, match="are not the parameters of quantizer"):
        from_json({"quantizer": name, **dict(list(good.items())[2:])})


def test_an_unknown_quantizer_is_refused():
    known = "uniform, log2, log-sqrt2, adalog, twin-uniform, twin-grid, power-of-two-factor, row-squares"
    with pytest.raises(ValueError, match=f"quantizer 'log3' is not known; there are {known}"):
        from_json({"quantizer": "log3", "bits": 4})


def test_scales_that_float32_does_not_hold_are_refused():
    for scale in (0.1, 1e39, 1):
        with pytest.raises(ValueError, match="do not go together"):
            Log2(scale, 4)
    with pytest.raises(ValueError, match="do not go together"):
        TwinUniform(2.0, 1.0, 4)


def example(name: str) -> Quantizer:
    return {
        "uniform": Uniform(0.5, 3, 4),
        "log2": Log2(1.0, 4),
        "log-sqrt2": LogSqrt2(1.0, 4, True),
        "adalog": AdaLog(2.0, 20, 4, 0.25),
        "twin-uniform": TwinUniform(0.25, 1.0, 4),
        "twin-grid": TwinGrid(0.25, 2, 6, 5, 4),
        "power-of-two-factor": PowerOfTwoFactor(0.5, 3, 4, (0, 1, 3)),
        "row-squares": RowSquares(4),
    }[name]


# The papers' equations, one number at a time, in float64. Each returns what x may become: two values near a tie.


def paper_uniform(q: Uniform, x: float, _: int) -> list[float]:
    return affine(x, q.scale, q.zero_point, q.bits)


def affine(x: float, scale: float, zero_point: int, bits: int) -> list[float]:
    return [scale * (min(max(code + zero_point, 0), 2**bits - 1) - zero_point) for code in roundings(x / scale)]


def roundings(x: float) -> list[int]:
    slack = 1e-3 if abs(x) < 1e4 else 1e-6 * abs(x)
    return [math.floor(x - slack + 0.5), math.floor(x + slack + 0.5)]


def logarithmic(x: float, scale: float, step: float, bits: int, holds_zero: bool, decode: Callable[[int], float]) -> list[float]:
    last = 2**bits - 1
    codes = [last] * 2 if x <= 0 else [min(max(code, 0), last) for code in roundings(-math.log2(x / scale) / step)]
    return [0.0 if holds_zero and code == last else decode(code) for code in codes]


def paper_log2(q: Log2, x: float, _: int) -> list[float]:
    """FQ-ViT, Log-Int-Softmax."""
    return logarithmic(x, q.scale, 1.0, q.bits, q.holds_zero, lambda code: q.scale * 2.0**-code)


def paper_log_sqrt2(q: LogSqrt2, x: float, _: int) -> list[float]:
    """RepQ-ViT, log-sqrt2: shifts, and a second scale for odd codes."""
    return logarithmic(
        x, q.scale, 0.5, q.bits, q.holds_zero, lambda code: q.scale * (code % 2 * (math.sqrt(2) - 1) + 1) * 2.0 ** -math.ceil(code / 2)
    )


def paper_adalog(q: AdaLog, x: float, _: int) -> list[float]:
    """AdaLog: a shift and a table of 37 powers."""
    table = [2 ** (-j / 37) for j in range(37)]

    def decode(code: int) -> float:
        power = q.scale * 2.0 ** -(code * q.numerator // 37) * table[code * q.numerator % 37]
        return power if not q.shift or power >= 2**-15 * q.shift else 0.0

    return [power - q.shift for power in logarithmic(x + q.shift, q.scale, q.numerator / 37, q.bits, q.holds_zero, decode)]


def paper_twin_uniform(q: TwinUniform, x: float, _: int) -> list[float]:
    """PTQ4ViT: two uniform quantizers of bits - 1, the upper one only beyond the lower; of their values, the nearest."""
    lower = [(-q.lower_step if q.negative else q.lower_step) * code for code in range(2 ** (q.bits - 1))]
    upper = [q.upper_step * code for code in range(2 ** (q.bits - 1)) if q.upper_step * code > lower[-1]]
    nearest = min(abs(x - value) for value in lower + upper)
    return [value for value in lower + upper if abs(x - value) <= nearest + 1e-3 * min(q.lower_step, q.upper_step) + 1e-6 * abs(x)]


def paper_twin_grid(q: TwinGrid, x: float, _: int) -> list[float]:
    """PTQ4ViT's two uniform quantizers, fine and coarse, side by side: of all their values, the nearest."""
    fine = [q.scale * (code - q.zero_point) for code in range(q.knee + 1)]
    coarse = [fine[-1] + q.scale * q.ratio * step for step in range(1, 2**q.bits - q.knee)]
    nearest = min(abs(x - value) for value in fine + coarse)
    return [value for value in fine + coarse if abs(x - value) <= nearest + 1e-3 * q.scale + 1e-6 * abs(x)]


def paper_power_of_two_factor(q: PowerOfTwoFactor, x: float, channel: int) -> list[float]:
    """FQ-ViT, Power-of-Two Factor."""
    return affine(x, 2 ** q.exponents[channel] * q.scale, q.zero_point, q.bits)


PAPERS: dict[str, Callable[..., list[float]]] = {
    "uniform": paper_uniform,
    "log2": paper_log2,
    "log-sqrt2": paper_log_sqrt2,
    "adalog": paper_adalog,
    "twin-uniform": paper_twin_uniform,
    "twin-grid": paper_twin_grid,
    "power-of-two-factor": paper_power_of_two_factor,
}


@pytest.mark.parametrize("name", PAPERS)
@given(st.data(), values)
def test_agrees_with_the_paper(name: str, data: st.DataObject, x: np.ndarray):
    quantizer = data.draw(EXAMPLES[name])
    scale = float(getattr(quantizer, "scale", getattr(quantizer, "upper_step", 0.0)))
    inputs = torch.cat([torch.from_numpy(x), torch.from_numpy(x).clamp(-1, 1) * scale, torch.zeros(1, CHANNELS)])
    moved = quantizer.quantize_dequantize(inputs)
    for row, results in zip(inputs.tolist(), moved.tolist(), strict=True):
        for channel, (before, after) in enumerate(zip(row, results, strict=True)):
            expected = PAPERS[name](quantizer, before, channel)
            slack = 1e-6 * (float(getattr(quantizer, "shift", 0.0)) + scale) if name == "adalog" else 1e-37
            assert any(after == pytest.approx(value, rel=2e-5, abs=slack) for value in expected), (quantizer, before, after, expected)


@given(st.integers(2, 8), st.integers(1, 40), st.floats(0.1, 20), st.integers(0, 2**32))
def test_rows_of_squares_are_distributions_whose_roots_are_even_steps(bits: int, length: int, sharpness: float, seed: int):
    """Number by number: the code of each value of a softmax's row, and the row that codes stand for."""
    scores = sharpness * torch.randn(3, length, generator=torch.Generator().manual_seed(seed))
    quantizer, x, highest = RowSquares(bits), scores.softmax(-1), 2**bits - 1
    moved = quantizer.quantize_dequantize(x)
    for row, codes, values_of in zip(x.double().tolist(), quantizer.quantize(x).tolist(), moved.tolist(), strict=True):
        assert all(code in roundings(highest * math.sqrt(value / max(row))) for code, value in zip(codes, row, strict=True))
        squares = [round(min(highest**2, 255) * (code / highest) ** 2) for code in codes]
        assert values_of == pytest.approx([square / sum(squares) for square in squares], rel=1e-6)
        assert sum(values_of) == pytest.approx(1.0, rel=1e-5) and len(set(values_of)) <= 2**bits
        ordered = [value for _, value in sorted(zip(row, values_of, strict=True))]
        assert ordered == sorted(ordered)
    assert torch.equal(quantizer.quantize_dequantize(0.25 * x), moved) and torch.equal(quantizer.quantize_dequantize(moved), moved)


@pytest.mark.parametrize("bits", range(2, 9))
def test_exact_powers_and_zero_survive_the_logarithms(bits: int):
    powers = 2.0 ** -torch.arange(2.0**bits - 1).clamp(max=100)
    assert torch.equal(Log2(1.0, bits).quantize_dequantize(powers), powers)
    assert torch.allclose(LogSqrt2(1.0, bits).quantize_dequantize(powers.sqrt()), powers.sqrt(), rtol=1e-6, atol=0)
    for quantizer in (Log2(1.0, bits, True), LogSqrt2(1.0, bits, True), AdaLog(1.0, 37, bits, 0.0, True)):
        assert quantizer.quantize_dequantize(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_adalog_holds_both_fixed_bases(bits: int):
    x = torch.rand(4000, generator=torch.Generator().manual_seed(bits)) ** 4
    assert torch.equal(AdaLog(1.0, 37, bits).quantize_dequantize(x), Log2(1.0, bits).quantize_dequantize(x))


@given(scales, st.integers(0, 15), values)
def test_uniform_is_the_affine_quantizer(scale: float, zero_point: int, x: np.ndarray):
    expected = quantize_dequantize(torch.from_numpy(x), scale, zero_point, 4)
    assert torch.equal(Uniform(scale, zero_point, 4).quantize_dequantize(torch.from_numpy(x)), expected)
    assert torch.equal(PowerOfTwoFactor(scale, zero_point, 4, (0, 0, 0)).quantize_dequantize(torch.from_numpy(x)), expected)


@pytest.mark.parametrize(("smallest", "shift", "bits"), [(2.0**-24, 1.0, 4), (2.0**-149, 0.0, 6)])
def test_powers_that_float32_cannot_hold_are_zero(smallest: float, shift: float, bits: int):
    """Two powers of 0.515 and 1.911 times the smallest number: the first would be rounded to 1, and that be nearer to the second."""
    code = 2**bits - 3
    scale = float(np.float32(1.911 * smallest * 2 ** (code * 70 / 37)))
    quantizer = AdaLog(scale, 70, bits, shift)
    own = quantizer.dequantize(torch.arange(2.0**bits))
    assert torch.equal(quantizer.quantize_dequantize(own), own)
    assert own[-2:].tolist() == [-shift, -shift]
