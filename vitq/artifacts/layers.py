"""What a model is to the stages: its layers, what enters them, the widths that they may get, and how the model is built again."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["weight", "post_layernorm", "post_softmax", "post_gelu", "image", "plain"]
Operation = Literal["linear", "convolution", "matmul"]
Bits = Literal[2, 3, 4, 5, 6, 7, 8]

WIDTHS: tuple[Bits, ...] = (2, 3, 4, 5, 6, 7, 8)
"""The bit-widths that a layer may get."""

Count = Annotated[int, Field(ge=0, le=2**53)]


class Value(BaseModel):
    """An immutable, closed record: unknown fields and non-finite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Operand(Value):
    """One tensor that enters a layer.

    `tensor` names the tensor in the graph: operands with the same name are one tensor and share one quantizer. `shape` is that of a
    batch of one image (a leading axis may count windows as well).
    """

    tensor: str
    role: Role
    shape: tuple[int, ...]


class Layer(Value):
    """One multiplying op of the captured graph that may be quantized.

    `operands` are (input, weight) of a linear or convolution and (left, right) of a matmul. `parameters` counts weight elements
    without the bias, 0 for a matmul; `macs` is multiply-accumulates per image; `channels` the number of output channels, each
    with its own weight scale, 0 for a matmul. `block` is the name of the block that holds the layer.
    """

    name: str
    type: str
    op: Operation
    block: str
    parameters: Count
    channels: Count
    macs: Count
    operands: tuple[Operand, Operand]

    @property
    def has_weight(self) -> bool:
        """Whether the second operand is a weight."""
        return self.op != "matmul"

    @property
    def activations(self) -> tuple[Operand, ...]:
        """The operands that are activations: one of a linear or convolution, two of a matmul."""
        return self.operands[:1] if self.has_weight else self.operands


class ModelSpec(Value):
    """All that is needed to build the architecture again, without its weights, and to feed it.

    `arguments` go to `timm.create_model` beside the architecture's name. `data_config` is timm's (input_size, mean, std,
    interpolation, crop_pct, crop_mode). `graph_digest` is the digest of the captured graph: ops, layer names and shapes.
    """

    architecture: str
    arguments: dict[str, Any] = {}
    num_classes: int = Field(ge=0)
    data_config: dict[str, Any]
    label_names: tuple[str, ...] = ()
    graph_digest: str
