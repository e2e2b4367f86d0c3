"""What runs fast here: every storage form and every pattern of an exported file, tried on a tiny transformer.

A model of random weights goes through the real calibration, exporter and verification once for each form; then it is seen which of its
layers onnxruntime made integer kernels of, on this machine, in this version. That a pattern fuses is what makes it fast: one that does
not is computed in float, behind dequantizations. How fast, `vitq bench` measures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq import __version__
from vitq.artifacts import WIDTHS, BitPlan, Bits, LayerBits, ModelSpec
from vitq.calibration.fast import calibrate_fast
from vitq.errors import VerificationError
from vitq.graph import capture
from vitq.onnx_file.finish import finish_file
from vitq.onnx_file.kernels import INTEGER_KERNELS, optimised_graph
from vitq.onnx_file.lowering import lower
from vitq.onnx_file.storage import Storage
from vitq.onnx_file.trace import trace_graph
from vitq.onnx_file.verify import verify_file
from vitq.rewrites import rewrite

PATTERNS = {
    "embedding": "patch embedding",
    "query": "linear",
    "head": "linear of rank 2",
    "qk": "queries times keys",
    "av": "attention times values",
    "convolution": "other convolution",
}
"""What the layers of the tiny transformer stand for; a convolution that is no patch embedding computes in float by choice."""

FORMS: tuple[tuple[Storage, Bits, Bits], ...] = (
    *(("packed", bits, 8) for bits in WIDTHS),
    ("packed", 4, 4),
    ("standard", 4, 8),
    ("standard", 8, 8),
    ("fast", 4, 8),
)
"""Storage, weight bits, activation bits."""

PACKAGES = ("onnxruntime", "onnx", "onnxscript", "onnx-ir", "torch", "timm", "numpy", "highspy")


@dataclass(frozen=True)
class Form:
    """How one form fared: the kernels of all layers by name, those that should be integer kernels and are not, and what failed."""

    storage: Storage
    weight_bits: int
    activation_bits: int
    kernels: dict[str, str]
    not_fused: tuple[str, ...]
    fault: str | None = None

    @property
    def fast(self) -> bool:
        """Whether every layer that should became an integer kernel, and computes what was calibrated."""
        return not self.not_fused and self.fault is None


def try_forms(forms: Sequence[tuple[Storage, Bits, Bits]] = FORMS) -> list[Form]:
    """Exports the tiny transformer in each form, (storage, weight bits, activation bits), and looks at what onnxruntime makes of it.

    Raises:
        InputError: this torch cannot capture or export it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = rewrite(capture(_Tiny().eval(), (3, 16, 16)))
        images = torch.randn(4, 3, 16, 16)
    spec = ModelSpec(architecture="doctor", num_classes=8, data_config={"input_size": [3, 16, 16]}, graph_digest=graph.digest)
    candidates = [layer.name for layer in graph.layers if layer.op in ("linear", "matmul")]
    found = []
    for storage, weight_bits, activation_bits in forms:
        entries = [
            LayerBits(
                name=layer.name, type=layer.type, weight_bits=weight_bits if layer.has_weight else None, activation_bits=activation_bits
            )
            for layer in graph.layers
        ]
        checkpoint = calibrate_fast(graph, BitPlan(model=spec, layers=tuple(entries)), [(images, None)], symmetric=storage == "standard")
        model = trace_graph(checkpoint.graph)
        layers = lower(model, checkpoint, storage)
        file = finish_file(model, layers, checkpoint)
        fault = None
        try:
            verify_file(file, layers, checkpoint, [images])
            nodes = {node.name: node.op_type for node in optimised_graph(file.SerializeToString()).node}
        except VerificationError as error:
            nodes, fault = {}, str(error).partition(" No file was written.")[0]
        except Exception as error:  # onnxruntime's own exception types are not public
            nodes, fault = {}, f"onnxruntime refuses it: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        kernels = {layer.name: nodes.get(layer.name, "float" if fault is None else "none") for layer in graph.layers}
        not_fused = tuple(name for name in candidates if kernels[name] not in INTEGER_KERNELS)
        found.append(Form(storage, weight_bits, activation_bits, kernels, not_fused, fault))
    return found


def versions() -> dict[str, str]:
    """The version of vitq and those of the packages on which results may depend; one that is not installed is left out."""
    found = {"vitq": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class _Tiny(nn.Module):
    """Every pattern of a vision transformer once."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(3, 32, 4, stride=4)
        self.convolution = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm = nn.LayerNorm(32)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.hidden, self.output = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.convolution(self.embedding(images)).flatten(2).transpose(1, 2))
        attended = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1) @ self.value(x)
        x = x + self.output(F.gelu(self.hidden(attended)))
        return self.head(x.mean(1))
