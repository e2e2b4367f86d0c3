"""The model card of an exported file: what it is, what it needs and how to run it, as Markdown with the header that model hubs read.

Says what the checkpoint and the export know. Accuracy is measured later, by `vitq evaluate`, and is not claimed here.
"""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from vitq import __version__
from vitq.artifacts import BitPlan
from vitq.checkpoint import Checkpoint
from vitq.units import counted, in_units

if TYPE_CHECKING:
    from vitq.onnx_file import ExportReport


def model_card(checkpoint: Checkpoint, report: "ExportReport", file: str, needed: Mapping[str, str], batch: int | None = None) -> str:
    """The card's text.

    Args:
        checkpoint: what the file was made from.
        report: what `export` found.
        file: the file's name.
        needed: the session options that it needs.
        batch: the number of images that it takes; None for any.
    """
    spec = checkpoint.plan.model
    task = "image-classification" if spec.num_classes else "image-feature-extraction"
    tags = ["vitq", "onnxruntime", "quantized", "vision-transformer"]
    header = ModelCardData(library_name="onnx", tags=tags, pipeline_tag=task)
    answer = f"logits of {spec.num_classes} classes" if spec.num_classes else "features"
    options = "".join(f'options.add_session_config_entry("{name}", "{value}")\n' for name, value in needed.items())
    size = tuple(spec.data_config["input_size"])
    return f"""---
{header.to_yaml()}
---

# {spec.architecture}, quantized by vitq

A Q/DQ ONNX file for onnxruntime on a CPU: `{file}`, {in_units(report.file_bytes, "B")}. {report.integer_kernels} of
{report.integer_candidates} linears and matmuls run as integer kernels; {counted(report.float_by_choice, "convolution")} in float.
Before it was written it was compared, layer by layer, with the quantized model that it was made from:
{report.code_mismatch:.2g} of the integers differ, the top-1 class agrees on {report.top1_agreement:.2f} % of the images.

## Bits

| bits | layers, by weight | layers, by input |
| --- | --- | --- |
{_bits(checkpoint.plan)}

Quantization changes answers. How many on your images: `vitq evaluate {file} --images PATH --reference MODEL`.

## How to run it

Input `images`, float32 ({batch or "batch"}, {", ".join(map(str, size))}), prepared as for training: {_preprocessing(spec.data_config)}.
Output `output`: {answer}. The file's metadata hold this preprocessing, the class names and the plan, as JSON under `vitq.`.

```python
import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
{options}session = onnxruntime.InferenceSession("{file}", options, providers=["CPUExecutionProvider"])
(output,) = session.run(["output"], {{"images": np.zeros(({batch or 1}, {", ".join(map(str, size))}), np.float32)}})
```

Made with vitq {__version__}.
"""


def _bits(plan: BitPlan) -> str:
    weights = Counter(entry.weight_bits for entry in plan.layers if entry.weight_bits is not None)
    inputs = Counter(entry.activation_bits for entry in plan.layers)
    return "\n".join(f"| {bits} | {weights[bits]} | {inputs[bits]} |" for bits in sorted({*weights, *inputs}))


def _preprocessing(config: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {config[name]}" for name in ("interpolation", "crop_pct", "crop_mode", "mean", "std") if name in config)
