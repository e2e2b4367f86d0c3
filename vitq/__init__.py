"""vitq: mixed-precision quantization of vision transformers, from a trained checkpoint to an ONNX file that runs.

    load -> profile -> allocate -> calibrate -> export_onnx -> evaluate_model

The public functions are the names in `__all__`, each loaded from its module on first use, so that `import vitq` and
`vitq --help` answer at once. A public name is never a module's name: importing the module would hide the function.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "vitq.models:load",
    "profile": "vitq.importance:profile",
    "allocate": "vitq.allocation:allocate",
    "calibrate": "vitq.calibration:calibrate",
    "export_onnx": "vitq.export:export",
    "evaluate_model": "vitq.evaluate:evaluate",
}
"""Where each public function is: name -> module:attribute."""

__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Loads a public function on first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vitq' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    module, attribute = _PUBLIC[name].split(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(__all__)
