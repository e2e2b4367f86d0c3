"""HAWQ-V2 (Dong et al., NeurIPS 2020): the mean trace of the Hessian times the squared quantization error.

    cost = tr(H_l) / n_l |W_l - W^_l|^2 for the weight (n_l numbers), and for an input tr(H) / n |X - X^|^2, mean over the images

The trace is Hutchinson's estimate, by vectors of random signs. Of the Gauss-Newton matrix J^T H J, with J the Jacobian of the output by an
operand and H = R^T R the loss's Hessian at the output, the trace is that of R J J^T R^T too, so the signs s can be drawn at the output:

    tr(J^T H J) = E |J^T R^T s|^2

One forward and one backward pass with one s an image gives every operand's estimate.

Differs from the paper: it draws the signs at the weights and multiplies them with the Hessian. One such vector for all layers (one
each would be a double backward pass a layer) adds what couples the layers, of mean 0 but far above a trace: of the demo's 148 operands, 56
estimates were negative after 16 vectors. Its loss needs labels and may have an indefinite Hessian; ours is KL(float || network), or half
the squared relative error of a backbone's output, whose Hessian at the float network is the Gauss-Newton matrix.
"""

from vitq.artifacts import CostTable, Layer
from vitq.importance.costs import table
from vitq.importance.fisher import operand_traces
from vitq.importance.quantizers import Quantizers, layer_weight
from vitq.importance.subject import Subject
from vitq.ranges import Histogram


def hawq_v2(subject: Subject) -> CostTable:
    """Prices every weight and every input by mean trace times squared error; a layer's tied cost is their sum.

    Returns:
        Costs that rank ("relative"): an estimate of the loss but for a factor, if errors were noise.
    """
    traces = operand_traces(subject, lambda _: subject.probe)
    quantizers = Quantizers.of(subject, subject.bits)
    weight, activation = {}, {}
    for layer in subject.graph.layers:
        if layer.has_weight:
            power = float(layer_weight(subject, layer).square().mean())
            errors = [quantizers.relative_errors(subject, layer, width)[0] for width in subject.bits]
            weight[layer.name] = [traces[layer.name][1] * power * error for error in errors]
        activation[layer.name] = [_input_cost(subject, quantizers, layer, traces[layer.name], width) for width in subject.bits]
    return table(subject, "relative", weight, activation)


def _input_cost(subject: Subject, quantizers: Quantizers, layer: Layer, traces: tuple[float, float], bits: int) -> float:
    """The sum over a layer's inputs of trace times the mean square of their error."""
    errors = [quantizers.input_error(subject, operand, bits) for operand in layer.activations]
    powers = [_mean_square(subject.histograms[operand.tensor]) for operand in layer.activations]
    return sum(trace * power * error for trace, power, error in zip(traces, powers, errors, strict=False))


def _mean_square(histogram: Histogram) -> float:
    count, _, squares = histogram.sums[:, -1]
    return float(squares / count.clamp(min=1))
