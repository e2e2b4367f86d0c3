"""The squared quantization error of each operand over its own power: no network is run, no gradient taken.

    cost(l, b) = |W_l - W^_l|^2 / |W_l|^2 + |X - X^|^2 / |X|^2

The simplest metric that looks at the weights at all, and a baseline for the others. Relative, not absolute, as a layer's scale is arbitrary
(a LayerNorm before it or a residual gain after it may hold any part of it). The inputs' error is that of the histograms; a matmul has two.
"""

from vitq.artifacts import CostTable
from vitq.importance.costs import table
from vitq.importance.quantizers import Quantizers
from vitq.importance.subject import Subject


def weight_mse(subject: Subject) -> CostTable:
    """Prices every layer by its operands' relative squared errors; costs that rank ("relative")."""
    quantizers = Quantizers.of(subject, subject.bits)
    errors = {layer.name: [quantizers.relative_errors(subject, layer, width) for width in subject.bits] for layer in subject.graph.layers}
    weight, activation = ({name: [pair[side] for pair in pairs] for name, pairs in errors.items()} for side in range(2))
    return table(subject, "relative", weight, activation)
