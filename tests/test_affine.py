"""The affine quantizer: properties for any values, and agreement with onnx's own reference of the operators that an exported file holds."""

import numpy as np
import onnx.helper
import onnx.reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vitq.affine import choose_qparams, highest_code, quantize, quantize_dequantize, quantize_weight, weight_qparams

WIDTHS = range(2, 9)
finite = st.floats(-1e6, 1e6, width=32)
ends = st.tuples(finite, finite).map(sorted)
values = arrays(np.float32, st.integers(1, 60), elements=finite)
weights = arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 12)), elements=st.floats(-100, 100, width=32))


def qparams(low: float, high: float, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    return choose_qparams(torch.tensor(low), torch.tensor(high), bits)


@given(ends, st.sampled_from(WIDTHS))
def test_scale_is_positive_and_zero_point_a_code(ends: list[float], bits: int):
    scale, zero_point = qparams(*ends, bits)
    assert scale.dtype == torch.float32
    assert 0 < float(scale) < float("inf")
    assert float(zero_point) in range(2**bits)


@given(ends, st.sampled_from(WIDTHS))
def test_codes_span_the_range_to_half_a_step(ends: list[float], bits: int):
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    scale, zero_point = (float(value) for value in qparams(*ends, bits))
    if high - low > 1e-12:
        assert -zero_point * scale == pytest.approx(low, abs=0.501 * scale)
        assert (2**bits - 1 - zero_point) * scale == pytest.approx(high, abs=0.501 * scale)


@given(values, ends, st.sampled_from(WIDTHS))
def test_codes_are_whole_and_in_range(x: np.ndarray, ends: list[float], bits: int):
    codes = quantize(torch.from_numpy(x), *qparams(*ends, bits), bits)
    assert torch.equal(codes, codes.round())
    assert float(codes.min()) >= 0
    assert float(codes.max()) <= highest_code(bits) == 2**bits - 1


@given(ends, st.sampled_from(WIDTHS))
def test_zero_is_exact(ends: list[float], bits: int):
    assert float(quantize_dequantize(torch.zeros(1), *qparams(*ends, bits), bits)) == 0.0


@given(values, ends, st.sampled_from(WIDTHS))
def test_fake_quantization_is_idempotent_and_has_few_values(x: np.ndarray, ends: list[float], bits: int):
    scale, zero_point = qparams(*ends, bits)
    once = quantize_dequantize(torch.from_numpy(x), scale, zero_point, bits)
    assert torch.equal(quantize_dequantize(once, scale, zero_point, bits), once)
    dense = torch.linspace(-3, 3, 4001) * max(abs(end) for end in [*ends, 1e-3])
    assert len(quantize_dequantize(dense, scale, zero_point, bits).unique()) <= 2**bits


@given(values, ends, st.sampled_from(WIDTHS))
def test_no_code_is_nearer(x: np.ndarray, ends: list[float], bits: int):
    scale, zero_point = (float(value) for value in qparams(*ends, bits))
    moved = quantize_dequantize(torch.from_numpy(x), scale, zero_point, bits).double().numpy()
    levels = scale * (np.arange(2**bits) - zero_point)
    nearest = np.abs(x.astype(np.float64)[:, None] - levels).min(1)
    assert np.all(np.abs(moved - x) <= nearest + 1e-5 * np.maximum(np.abs(x), scale * 2**bits))


def test_halves_round_to_even():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert quantize(x, 1.0, 4, 4).tolist() == [2, 4, 4, 6, 6, 8]


@pytest.mark.parametrize("bits", WIDTHS)
def test_agrees_with_onnx(bits: int):
    node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"]),
            node("Clip", ["q", "lowest", "highest"], ["codes"]),
            node("DequantizeLinear", ["codes", "scale", "zero_point"], ["y"]),
        ],
        "affine",
        [
            tensor("x", onnx.TensorProto.FLOAT, [None]),
            tensor("scale", onnx.TensorProto.FLOAT, []),
            *(tensor(name, onnx.TensorProto.UINT8, []) for name in ("zero_point", "lowest", "highest")),
        ],
        [tensor("codes", onnx.TensorProto.UINT8, [None]), tensor("y", onnx.TensorProto.FLOAT, [None])],
    )
    runtime = onnx.reference.ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]))
    generator = np.random.default_rng(bits)
    for low, high in [(-1.0, 2.0), (0.0, 1.0), (-3.0, 0.0), (-0.17, 8.1), (0.3, 0.9)]:
        scale, zero_point = (float(value) for value in qparams(low, high, bits))
        steps = np.arange(-3, 2**bits + 3, dtype=np.float32) - np.float32(zero_point)
        x = np.concatenate([generator.normal(0, 2, 500), steps * np.float32(scale), (steps + 0.5) * np.float32(scale)]).astype(np.float32)
        feeds = {
            "x": x,
            "scale": np.float32(scale),
            "zero_point": np.uint8(zero_point),
            "lowest": np.uint8(0),
            "highest": np.uint8(highest_code(bits)),
        }
        codes, y = runtime.run(None, feeds)
        assert np.array_equal(quantize(torch.from_numpy(x), scale, zero_point, bits).numpy(), codes)
        assert np.array_equal(quantize_dequantize(torch.from_numpy(x), scale, zero_point, bits).numpy(), y)


@given(weights, st.sampled_from(WIDTHS))
def test_weight_codes_fit_int8_and_stand_for_the_weight(weight: np.ndarray, bits: int):
    rows = torch.from_numpy(weight)
    quantized = quantize_weight(rows, *weight_qparams(rows.amin(1), rows.amax(1), bits), bits)
    difference = quantized.codes.numpy().astype(int) - quantized.zero_point.numpy().astype(int)[:, None]
    assert (quantized.codes.dtype, quantized.scale.dtype, quantized.zero_point.dtype) == (torch.uint8, torch.float32, torch.uint8)
    assert quantized.codes.max() <= 2**bits - 1
    assert 255 * 2 * np.abs(difference).max() <= 2**15 - 1  # two products of any 8-bit activations fit 16 bits
    assert np.array_equal(quantized.integers().numpy(), difference)
    value = quantized.dequantize()
    assert np.array_equal(value.numpy(), difference.astype(np.float32) * quantized.scale.numpy()[:, None])
    assert all(len(row.unique()) <= 2**bits for row in value)
    assert bool(
        ((value - rows).abs() <= 0.501 * quantized.scale[:, None] * (2 if bits < 7 else 1)).all()
    )  # a shifted zero point clips one end
    assert np.all(difference[weight == 0] == 0)


@given(weights, st.sampled_from([7, 8]))
def test_weights_are_symmetric_at_7_and_8_bits(weight: np.ndarray, bits: int):
    rows = torch.from_numpy(weight)
    quantized = quantize_weight(rows, *weight_qparams(rows.amin(1), rows.amax(1), bits), bits)
    mirrored = quantize_weight(-rows, *weight_qparams((-rows).amin(1), (-rows).amax(1), bits), bits)
    assert quantized.zero_point.unique().tolist() == [2 ** (bits - 1)]
    assert torch.equal(quantized.integers(), -mirrored.integers())


def test_shrunk_8_bit_weights_stay_symmetric():
    quantized = quantize_weight(torch.tensor([[-9.0, -1.0, 0.0, 0.5, 9.0]]), torch.tensor([1 / 64]), torch.tensor([128.0]), 8)
    assert quantized.integers().tolist() == [[-64, -64, 0, 32, 64]]


def test_weight_axes_are_kept():
    weight = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    rows = weight.flatten(1)
    parameters = weight_qparams(rows.amin(1), rows.amax(1), 4)
    flat = quantize_weight(rows, *parameters, 4)
    assert torch.equal(quantize_weight(weight, *parameters, 4).dequantize(), flat.dequantize().reshape(weight.shape))
