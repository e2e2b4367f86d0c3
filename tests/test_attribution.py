"""The error of each layer that calibration reports, against the layers run again one by one and gradients taken by hand."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from small_models import captured, images
from test_calibration import in_batches, plan_for
from torch import Tensor

from vitq.calibration.attribution import attribute
from vitq.calibration.fast import calibrate_fast
from vitq.checkpoint import Checkpoint, load, save
from vitq.cli.layer_table import worst
from vitq.graph import run, values_at
from vitq.rewrites import rewrite


def fixed(output: Tensor, generator: torch.Generator) -> Tensor:
    return (output * torch.linspace(-1, 2, output.shape[1])).sum(1)


def by_hand(checkpoint: Checkpoint, name: str, x: Tensor) -> tuple[float, float]:
    """SQNR and KL of one layer: its quantized operands, its op, its mean taken off, and autograd through all that follows."""
    floats = checkpoint.floats
    assert floats is not None
    layer = next(layer for layer in floats.layers if layer.name == name)
    node = floats.layer_node(name)
    kept: dict[str, Tensor] = {}

    def keep(compute, *arguments):
        kept["output"] = compute(*arguments).requires_grad_()
        return kept["output"]

    with torch.enable_grad():
        result = fixed(run(floats.module, x, {node.name: keep}), torch.Generator()).sum()
        (gradient,) = torch.autograd.grad(result, kept["output"])
    sources = [argument.name for argument in node.args[: len(layer.activations)]]
    read = values_at(floats.module, x, sources)
    quantized = [
        checkpoint.activations[operand.tensor].quantize_dequantize(read[source])
        for operand, source in zip(layer.activations, sources, strict=True)
    ]
    if layer.has_weight:
        weight = floats.module.get_parameter(layer.operands[1].tensor)
        y = torch.nn.functional.linear(read[sources[0]], weight)
        changed = torch.nn.functional.linear(quantized[0], checkpoint.weights[name].dequantize())
        y, changed = (value - value.flatten(0, -2).mean(0) for value in (y, changed))
    else:
        y, changed = read[sources[0]] @ read[sources[1]], quantized[0] @ quantized[1]
    error = (changed - y).double()
    u = (gradient.double() * error).reshape(len(x), -1).sum(1)
    return 10 * math.log10(float(y.double().square().sum() / error.square().sum())), 0.5 * float(u.square().mean())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_are_those_of_layers_run_again(bits: int):
    graph = rewrite(captured("vit")[1])
    x = images(6, 32, seed=3)
    checkpoint = calibrate_fast(graph, plan_for(graph, "vit", bits), in_batches(images(6, 32), 3))
    found = attribute(checkpoint, [(x, None)], probe=fixed)
    assert list(found) == [layer.name for layer in graph.layers]
    for name, error in found.items():
        sqnr, kl = by_hand(checkpoint, name, x)
        assert error.sqnr == pytest.approx(sqnr, abs=0.05), name
        assert error.kl == pytest.approx(kl, rel=2e-2, abs=1e-9), name


def test_batches_add_up_and_fewer_bits_cost_more():
    graph = rewrite(captured("vit")[1])
    x = images(8, 32, seed=3)
    by_bits = {}
    for bits in (2, 4, 8):
        checkpoint = calibrate_fast(graph, plan_for(graph, "vit", bits), in_batches(images(8, 32), 4))
        by_bits[bits] = attribute(checkpoint, [(x, None)])
    assert sum(e.kl for e in by_bits[2].values()) > 3 * sum(e.kl for e in by_bits[4].values()) > 9 * sum(e.kl for e in by_bits[8].values())
    matmuls = [layer.name for layer in graph.layers if not layer.has_weight]  # whose error has no mean over the batch taken off
    parts = attribute(checkpoint, in_batches(x, 2), probe=fixed)
    whole = attribute(checkpoint, [(x, None)], probe=fixed)
    assert all(parts[name].kl == pytest.approx(whole[name].kl, rel=1e-3) for name in matmuls)


def test_a_file_does_not_hold_what_it_would_need(tmp_path):
    graph = rewrite(captured("vit")[1])
    checkpoint = calibrate_fast(graph, plan_for(graph, "vit", 4), in_batches(images(4, 32), 4))
    errors = {name: asdict(error) for name, error in attribute(checkpoint, in_batches(images(4, 32), 4)).items()}
    save(replace(checkpoint, errors=errors), tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert attribute(loaded, in_batches(images(4, 32), 4)) == {} and loaded.errors == errors


def test_the_worst_layers_are_named():
    errors = {"a": {"sqnr": 1.0, "kl": 0.25}, "b": {"sqnr": None, "kl": 0.5}, "c": {"sqnr": 1.0, "kl": 0.25}, "d": {"sqnr": 9.0, "kl": 0.0}}
    assert worst(errors) == "b 50 %, a 25 %, c 25 %" and worst(errors, 1) == "b 50 %"
