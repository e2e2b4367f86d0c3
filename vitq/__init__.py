"""vitq: mixed-precision quantization of vision transformers, from a trained checkpoint to an ONNX file that runs.

    load -> profile -> allocate -> calibrate -> export -> evaluate

The public functions and types are the names in `__all__`, each loaded from its module on first use, so that `import vitq` and
`vitq --help` answer at once; `__init__.pyi` tells type checkers what they are. A public name is never a module's name: importing the
module would hide the function.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "vitq.models:load",
    "profile": "vitq.importance:profile",
    "allocate": "vitq.allocation:allocate",
    "calibrate": "vitq.calibration:calibrate",
    "export": "vitq.onnx_file:export",
    "evaluate": "vitq.accuracy:evaluate",
    "open_images": "vitq.images:open_images",
    "onnx_runnable": "vitq.accuracy:onnx_runnable",
    "load_profile": "vitq.artifacts:load_profile",
    "load_plan": "vitq.artifacts:load_plan",
    "load_checkpoint": "vitq.checkpoint:load",
    "save_artifact": "vitq.artifacts:save",
    "save_checkpoint": "vitq.checkpoint:save",
    "LoadedModel": "vitq.models:LoadedModel",
    "Images": "vitq.images:Images",
    "Profile": "vitq.artifacts:Profile",
    "Allocation": "vitq.allocation:Allocation",
    "BitPlan": "vitq.artifacts:BitPlan",
    "Checkpoint": "vitq.checkpoint:Checkpoint",
    "ExportReport": "vitq.onnx_file:ExportReport",
    "Evaluation": "vitq.accuracy:Evaluation",
    "VitqError": "vitq.errors:VitqError",
}
"""Where each public name is: name -> module:attribute."""

__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Loads a public function or type on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vitq' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    module, attribute = _PUBLIC[name].split(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(__all__)
