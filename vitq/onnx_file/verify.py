"""Proof that a file computes what was calibrated, layer by layer, before anybody sees the file.

The end of a deep quantized network says little: one code that flips at a rounding tie flips more behind it. So the file is run in
onnxruntime with every layer's codes made visible, and the captured graph is run beside it with each layer's output, once compared,
replaced by onnxruntime's. Every layer is thus judged on the same input:

1. its codes, from the float ops before it, must equal quantize(x) but for ties (of both grids, the integers that stand for them);
2. its output must be  scale (codes - zero_point) (weight codes - zero_point) + bias,  computed in float64 from onnxruntime's codes;
3. the graph's output, from the float ops behind the last layers, must be onnxruntime's.

This is done twice: with outputs visible, and with codes alone, where onnxruntime is free to fuse an output with the next codes, and 1
and 3 are judged on the outputs that 2 computes. A small file goes through onnx's reference evaluator as well: it must mean the same to
whoever reads ONNX by the letter. Last, the file as it is: its outputs must lie as close to the fake-quantized model's
as two runs do that part at a tie.

Leaves out: accuracy; see evaluate.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from vitq.affine import highest_code
from vitq.artifacts import Layer
from vitq.checkpoint import Checkpoint
from vitq.errors import InputError, VerificationError
from vitq.graph import run
from vitq.onnx_file.file import runnable
from vitq.onnx_file.lowering import LoweredLayer, integer_quantizer
from vitq.quantizers import IntegerQuantizer, RowSquares
from vitq.runtime import open_session

TIE, NOISE = 1e-3, 6e-5
"""Codes are not compared where x is within TIE steps, or within NOISE of the tensor's largest value, of a rounding boundary.

Float ops differ by some 1e-6 of the range, and by ten times that where a LayerNorm reads a stream that has grown large (ViTamin: 4e-5).
"""
SOFTMAX_NOISE = 2e-4
"""The same behind a softmax, which turns an error of a score into up to a quarter of it: 1e-7 of scores of some thousands (Visformer)."""
MISMATCH = 1e-4
"""The fraction of a layer's codes that may differ beyond ties, by one step."""
ROUNDING = 1e-5
"""What float32 may add to a layer's output, of its largest sum of products; a float kernel's long sums cancel to some 1e-6."""
SMALL = 3e8
"""MACs an image up to which the reference evaluator, numpy, takes a part of a second."""
IMAGES = 4
"""Images on which every layer is compared; the output is compared on all."""
PARTED = 1.5
"""How many times quantization's own error the output may differ: two independent errors of one size are sqrt(2) of it apart."""


@dataclass(frozen=True)
class Agreement:
    """How far the file and the fake-quantized model agree: top-1 in percent of the images, the fraction of codes that differ."""

    top1: float
    code_mismatch: float


def verify_file(
    model: onnx.ModelProto,
    layers: Sequence[LoweredLayer],
    checkpoint: Checkpoint,
    batches: Iterable[Tensor],
    calibrated: Checkpoint | None = None,
    needed: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Agreement:
    """Compares a file with its checkpoint on images.

    Args:
        model: the finished file.
        layers: where each layer's numbers are in it.
        checkpoint: whose graph was written.
        batches: images (B, 3, H, W), float32, preprocessed.
        calibrated: what `checkpoint` was rewritten from, whose output the file's must be; None for `checkpoint` itself.
        needed: the session options that the file needs.
        folder: where the tensors of a large file lie.

    Raises:
        VerificationError: some layer or the output differs; the message names the first such layer and by how much.
        InputError: there are no images.
    """
    calibrated = calibrated or checkpoint
    device = next(iter(checkpoint.graph.module.parameters())).device
    session = partial(_session, folder=folder, needed=needed or {})
    plain = session(model)
    apart = any(tensor.external_data for tensor in model.graph.initializer)
    small = not apart and sum(layer.macs for layer in checkpoint.graph.layers) <= SMALL
    quantized = calibrated.quantized_module()
    comparisons = [_LayerComparison(model, layers, checkpoint, session, outputs_visible) for outputs_visible in (True, False)]
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value  # 0 where any number of images will do
    images, agreeing, error, quantization_error, size = 0, 0, 0.0, 0.0, 0.0
    for batch in _of_size(batches, fixed) if fixed else batches:
        if images < IMAGES:
            for part in batch.split(fixed) if fixed else batch[: IMAGES - images].split(2):  # few at a time: all activations are kept
                for comparison in comparisons:
                    comparison.compare(part.to(device))
                if small and images == 0:
                    _compare_by_the_letter(model, layers, checkpoint, part.to(device))
        output = torch.from_numpy(plain.run(None, {"images": _array(batch)})[0])
        with torch.no_grad():
            expected, unquantized = quantized(batch.to(device)).cpu(), calibrated.graph.module(batch.to(device)).cpu()
        images += len(batch)
        agreeing += int((output.flatten(1).argmax(1) == expected.flatten(1).argmax(1)).sum())
        error += float((output - expected).double().square().sum())
        quantization_error += float((expected - unquantized).double().square().sum())
        size += float(expected.double().square().sum())
    if images == 0:
        raise InputError("there are no images to verify the file on; give some with --images")
    if not error**0.5 <= PARTED * quantization_error**0.5 + ROUNDING * size**0.5:
        raise VerificationError(
            f"the file's output differs from the fake-quantized model's by {error**0.5:.3g}, more than {PARTED} times what quantization "
            f"itself changes ({quantization_error**0.5:.3g}), although every layer agrees. {_REPORT}"
        )
    return Agreement(100 * agreeing / images, sum(c.mismatched for c in comparisons) / max(sum(c.compared for c in comparisons), 1))


def _compare_by_the_letter(model: onnx.ModelProto, layers: Sequence[LoweredLayer], checkpoint: Checkpoint, images: Tensor) -> None:
    try:
        _LayerComparison(model, layers, checkpoint, ReferenceEvaluator, outputs_visible=True).compare(images)
    except NotImplementedError:
        return  # an op between the layers that the reference evaluator does not have


def _session(model: onnx.ModelProto, folder: Path | None, needed: Mapping[str, str]) -> onnxruntime.InferenceSession:
    try:
        return open_session(runnable(model, folder), needed=needed)
    except InputError as error:
        raise VerificationError(f"{error}. {_REPORT}") from None


def _of_size(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same images in batches of one size, the last one filled up with the first images."""
    first = waiting = torch.zeros(0)
    for batch in batches:
        first = batch if not len(first) else first
        waiting = torch.cat([waiting, batch]) if len(waiting) else batch
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if len(waiting):
        missing = size - len(waiting)
        yield torch.cat([waiting, first.repeat(-(-missing // len(first)), *[1] * (first.dim() - 1))[:missing]])


_NEGATED = "-"  # before a value's name: its negative


class _LayerComparison:
    """The file with every layer's codes, and its output too if wanted, among its outputs, and the counts of what was compared."""

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Sequence[LoweredLayer],
        checkpoint: Checkpoint,
        runtime: Callable[[onnx.ModelProto], onnxruntime.InferenceSession | ReferenceEvaluator],
        outputs_visible: bool,
    ) -> None:
        self._layers, self._checkpoint, self._outputs_visible = layers, checkpoint, outputs_visible
        self._output = model.graph.output[0].name
        visible = onnx.ModelProto()
        visible.CopyFrom(model)
        self._names = list(dict.fromkeys([self._output, *(str(value.name) for layer in layers for value in layer.codes)]))
        if outputs_visible:
            # As an output itself, a matmul's result would be shown rounded where onnxruntime fuses it with the quantization behind it.
            outputs = dict.fromkeys(str(layer.output.name) for layer in layers)
            visible.graph.node.extend(onnx.helper.make_node("Neg", [name], [_NEGATED + name]) for name in outputs)
            self._names += [_NEGATED + name for name in outputs]
        visible.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._names[1:])
        self._runtime = runtime(visible)
        self.compared = self.mismatched = 0

    def compare(self, images: Tensor) -> None:
        """Compares every layer on images (B, 3, H, W), all of whose activations are kept."""
        graph = self._checkpoint.graph
        arrays = self._runtime.run(self._names, {"images": _array(images)})
        found = {name: torch.from_numpy(array).to(images.device) for name, array in zip(self._names, arrays, strict=True)}
        intercepts = {graph.nodes[layer.layer.name]: self._intercept(layer, found) for layer in self._layers}
        with torch.no_grad():
            output = run(graph.module, images, intercepts)
        _compare_output(output, found[self._output])

    def _intercept(self, layer: LoweredLayer, found: dict[str, Tensor]) -> Callable[..., Tensor]:
        operands = [integer_quantizer(self._checkpoint, operand) for operand in layer.layer.activations]
        codes = [found[str(value.name)].to(torch.float32) + less for value, less in zip(layer.codes, layer.lessened, strict=True)]

        def replaced(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            for operand, x, given, quantizer in zip(layer.layer.activations, arguments, codes, operands, strict=False):
                noise = SOFTMAX_NOISE if operand.role == "post_softmax" else NOISE
                self._compare_codes(layer.layer.name, x, given, quantizer, noise)
            expected, accepted = self._expected(layer.layer, compute, arguments, codes, operands)
            if not self._outputs_visible:
                return expected.to(torch.float32)
            output = -found[_NEGATED + str(layer.output.name)]
            excess = float(((output - expected).abs() / accepted.clamp(min=1e-30)).max())  # a layer may be all zeros
            if not excess <= 1:
                raise VerificationError(
                    f"layer {layer.layer.name}: given the same codes, its output differs by {float((output - expected).abs().max()):.3g}, "
                    f"{excess:.3g} times what rounding explains. {_REPORT}"
                )
            return output

        return replaced

    def _compare_codes(self, layer: str, x: Tensor, found: Tensor, quantizer: IntegerQuantizer, noise: float) -> None:
        codes = quantizer.quantize(x)
        ends = torch.stack([quantizer.integers(end) for end in _ends(x, quantizer, noise)])
        neighbours = torch.stack([quantizer.integers((codes + step).clamp(0, highest_code(quantizer.bits))) for step in (-1, 0, 1)])
        mismatched = int(((found < ends.amin(0)) | (found > ends.amax(0))).sum())
        farther = int((found != neighbours).all(0).sum())  # a NaN equals nothing
        self.compared += found.numel()
        self.mismatched += mismatched
        if farther or mismatched > MISMATCH * found.numel():
            raise VerificationError(
                f"layer {layer}: given the same input, {mismatched} of {found.numel()} codes differ beyond ties, {farther} by more than "
                f"one step; accepted are {MISMATCH:g} of them, by one step. {_REPORT}"
            )

    def _expected(
        self,
        layer: Layer,
        compute: Callable[..., Tensor],
        arguments: Sequence[Any],
        codes: Sequence[Tensor],
        operands: Sequence[IntegerQuantizer],
    ) -> tuple[Tensor, Tensor]:
        """A layer's output from its codes, in float64, and by how much float32 may differ."""
        integers = [given.to(torch.float64) - quantizer.zero_point for given, quantizer in zip(codes, operands, strict=True)]
        rows = isinstance(operands[0], RowSquares)
        unit = 1 / integers[0].sum(-1, keepdim=True) if rows else torch.tensor(operands[0].scale, dtype=torch.float64)
        bias = torch.zeros((), dtype=torch.float64)
        if layer.has_weight:
            weight = self._checkpoint.weights[layer.name]
            products = compute(integers[0], weight.integers().to(torch.float64), None, *arguments[3:])
            per_channel = [1] * products.dim()
            per_channel[-1 if layer.op == "linear" else 1] = -1
            unit = unit * weight.scale.to(torch.float64).reshape(per_channel)
            if len(arguments) > 2 and arguments[2] is not None:
                bias = arguments[2].to(torch.float64).reshape(per_channel)
        else:
            products = compute(*integers)
            unit = unit * operands[1].scale
        return products * unit + bias, ROUNDING * (products.abs().max() * unit + bias.abs())


def _ends(x: Tensor, quantizer: IntegerQuantizer, noise: float) -> tuple[Tensor, Tensor]:
    """The codes of what is as far below x, and above, as x may be off."""
    if isinstance(quantizer, RowSquares):
        steps = quantizer.steps(x)
        slack = (noise * steps).clamp_(min=TIE)
        return (steps - slack).round_().clamp_(min=0), (steps + slack).round_().clamp_(max=highest_code(quantizer.bits))
    slack = max(TIE * quantizer.scale, noise * float(x.abs().max()) if x.numel() else 0.0)
    return quantizer.quantize(x - slack), quantizer.quantize(x + slack)


_REPORT = "No file was written. This is a fault of the exporter or of onnxruntime: please report it, with the model's name and versions."


def _compare_output(expected: Tensor, found: Tensor) -> None:
    difference = float((expected - found).abs().max())
    if not difference <= 1e-4 * float(expected.abs().max()):
        raise VerificationError(
            f"the ops behind the last layer: given the same layer outputs, the output differs by {difference:.3g} of "
            f"{float(expected.abs().max()):.3g}. {_REPORT}"
        )


def _array(images: Tensor) -> np.ndarray:
    return np.ascontiguousarray(images.cpu().numpy())
