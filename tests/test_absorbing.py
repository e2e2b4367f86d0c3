"""Weights that make up for their inputs' errors, against a version that keeps all rows and runs the network anew for each layer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_models import captured, images
from torch import Tensor

from vitq.affine import QuantizedWeight, quantize_weight
from vitq.calibration import absorbing
from vitq.calibration.absorbing import absorb
from vitq.fitting import fit_operand
from vitq.graph import Graph, run
from vitq.quantizers import Quantizer
from vitq.ranges import fold, weight_ranges
from vitq.rewrites import rewrite


def folded(family: str, x: Tensor, bits: int) -> tuple[Graph, Mapping[str, Quantizer]]:
    graph, histograms = fold(rewrite(captured(family)[1]), [(x, None)])
    activations = {o.tensor: fit_operand(histograms[o.tensor], bits, o.role) for layer in graph.layers for o in layer.activations}
    return graph, activations


class Naive:
    """The whole network again for each layer and batch, in float64 where it counts; all rows are kept."""

    def __init__(self, graph: Graph, activations: Mapping[str, Quantizer], bits: int) -> None:
        self.graph, self.activations, self.bits = graph, activations, bits
        self.weights: dict[str, QuantizedWeight] = {}
        self.rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def read(self, x: Tensor, asked: str, quantized: bool) -> tuple[Any, ...]:
        """What the layer is called with, in the float network or in the one whose earlier layers are quantized."""
        found: list[tuple[Any, ...]] = []

        def intercept(layer: Any, compute: Any, *arguments: Any) -> Tensor:
            if quantized:
                n = len(layer.activations)
                read = [self.activations[o.tensor].quantize_dequantize(v) for o, v in zip(layer.activations, arguments, strict=False)]
                arguments = (*read, *arguments[n:])
            if layer.name == asked:
                found.append(arguments)
            if quantized and layer.name in self.weights and layer.name != asked:
                weight = self.weights[layer.name].dequantize()
                bias = self.bias(layer.name, arguments[1], arguments[2]) if layer.op == "linear" else arguments[2]
                arguments = (arguments[0], weight, bias, *arguments[3:])
            return compute(*arguments)

        hooks = {
            self.graph.nodes[layer.name]: lambda compute, *rest, layer=layer: intercept(layer, compute, *rest)
            for layer in self.graph.layers
        }
        run(self.graph.module, x, hooks)
        return found[0]

    def bias(self, name: str, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, read = (torch.cat(rows).double().mean(0) for rows in self.rows[name])
        return ((0 if bias is None else bias) + weight.double() @ x - self.weights[name].dequantize().double() @ read).float()

    def fit(self, name: str, weight: Tensor) -> None:
        x, read = (torch.cat(rows).double().numpy() for rows in self.rows[name])
        both = np.cov(np.concatenate([read, x], 1).T, bias=True).reshape(2 * x.shape[1], -1)
        n = x.shape[1]
        s, c = both[:n, :n], both[:n, n:]
        ridge = (absorbing.RIDGE * n / len(x)) ** 2 * np.trace(s) / n * np.eye(n)
        moved = np.linalg.solve(s + ridge, (c + ridge) @ weight.T.double().numpy()).T
        moved = torch.from_numpy(moved).float()
        rounded = quantize_weight(moved, *weight_ranges(moved, self.bits), self.bits)
        spread, kept = ((rows @ w.T.double().numpy()).std(0) for rows, w in ((x, weight), (read, rounded.dequantize())))
        gain = torch.from_numpy(np.clip(spread / kept, 0.5, 2)).float()
        self.weights[name] = replace(rounded, scale=rounded.scale * gain)

    def go(self, batches: list[Tensor]) -> dict[str, QuantizedWeight]:
        for count, batch in enumerate(batches, 1):
            for layer in self.graph.layers:
                if not layer.has_weight:
                    continue
                x, weight = self.read(batch, layer.name, quantized=False)[:2]
                if layer.op != "linear":
                    self.weights[layer.name] = quantize_weight(weight, *weight_ranges(weight, self.bits), self.bits)
                    continue
                read = self.read(batch, layer.name, quantized=True)[0]
                for rows, value in zip(self.rows.setdefault(layer.name, ([], [])), (x, read), strict=True):
                    rows.append(value.reshape(-1, value.shape[-1]))
                if count in (1, 2, 4, 8):
                    self.fit(layer.name, weight)
        if len(batches) not in (1, 2, 4, 8):
            for layer in self.graph.layers:
                if layer.op == "linear":
                    self.fit(layer.name, self.read(batches[0], layer.name, quantized=False)[1])
        return self.weights


def nearest(weight: Tensor, _: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> QuantizedWeight:
    return quantize_weight(weight, scale, zero_point, bits)


@pytest.mark.parametrize(("family", "sizes"), [("vit", (3,)), ("vit", (2, 3, 1)), ("levit", (2, 2)), ("pvt", (2, 2))])
def test_streamed_weights_are_those_of_all_rows(family: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Rounded to nearest at 8 bits: where compensation turns one tie of rounding, it turns much of the row behind it."""
    monkeypatch.setattr(absorbing, "compensated", nearest)
    monkeypatch.setattr(absorbing, "RIDGE", 4 if family == "pvt" else 0.5)  # for so few tokens that of the recipe moves nothing
    batches = list(images(sum(sizes), captured(family)[1].input_shape[1:], seed=2).split(sizes))
    graph, activations = folded(family, torch.cat(batches), 4)
    bits = {layer.name: 8 for layer in graph.layers if layer.has_weight}
    pairs = [(batch, None) for batch in batches]
    with torch.no_grad():
        expected = Naive(graph, activations, 8).go(batches)
        found = absorb(graph, activations, bits, pairs)
        monkeypatch.setattr(absorbing, "RIDGE", 1e6)
        unmoved = absorb(graph, activations, bits, pairs)
    assert set(found) == set(expected) == set(bits)
    moved = 0
    for layer in graph.layers:
        if layer.has_weight:
            weight, wanted, without = (weights[layer.name].dequantize() for weights in (found, expected, unmoved))
            moved += bool((wanted - without).norm() > 0.03 * wanted.norm())
            assert (weight - wanted).norm() < 3e-4 * wanted.norm(), layer.name
    assert moved > 0.5 * len(bits)
