"""Sessions of onnxruntime on the CPU: at full optimisation, its default, and with the options that a file says it needs.

Threads wait without spinning: idle ones would take the cores from torch, or from another session that is timed beside.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime

from vitq.commands import writing
from vitq.errors import InputError
from vitq.processor import processor
from vitq.whole import refuse_missing

PROVIDER = "CPUExecutionProvider"
OPTIMISATION = "ORT_ENABLE_ALL"
SETTINGS = {"session.intra_op.allow_spinning": "0"}
INT8_ALLOWED = {"session.qdqisint8allowed": "1"}
"""What a file with int8 activations needs: without it onnxruntime turns them to uint8, whose kernels are slower."""
NEEDED = "vitq.session_options"
"""The metadata that name the options which a file needs, as JSON."""


def open_session(
    model: str | Path | bytes, threads: int = 0, needed: Mapping[str, str] | None = None, optimised: Path | None = None
) -> onnxruntime.InferenceSession:
    """A session for a file or a serialized model.

    Args:
        model: a file's path or content.
        threads: of each run; 0 for one a core.
        needed: session options by name; None for those that the file's metadata name.
        optimised: where to write the graph that onnxruntime makes of the model, if anywhere.

    Raises:
        InputError: the file is missing, or onnxruntime cannot load it.
    """
    if not isinstance(model, bytes):
        refuse_missing(model, "vitq export")
    session = _session(model, threads, needed or {}, optimised)
    if needed is None and (found := needed_options(session)):
        return _session(model, threads, found, optimised)
    return session


def needed_options(session: onnxruntime.InferenceSession) -> dict[str, str]:
    """The session options that a file's metadata name, of those that vitq knows; none where it names none."""
    try:
        found = json.loads(session.get_modelmeta().custom_metadata_map.get(NEEDED, "{}"))
    except ValueError:
        return {}
    return {name: value for name, value in INT8_ALLOWED.items() if found.get(name) == value} if isinstance(found, dict) else {}


def onnx_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `export` wrote into an ONNX file, its values parsed from JSON where they are JSON.

    Raises:
        InputError: onnxruntime cannot load the file, or its metadata are no text.
    """
    session = open_session(path, 1)
    try:
        found = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError:
        raise InputError(f"{path} is damaged: its metadata are no UTF-8; `{writing('vitq export', path)}` writes a new one") from None
    return {name: _parsed(value) for name, value in found.items()}


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def circumstances(needed: Mapping[str, str]) -> dict[str, Any]:
    """What a session's results and kernels depend on, as JSON: the runtime, its provider and options, the processor."""
    return {
        "onnxruntime": onnxruntime.__version__,
        "provider": PROVIDER,
        "session_options": {"graph_optimization_level": OPTIMISATION} | SETTINGS | dict(needed),
        "processor": asdict(processor()),
    }


def _session(model: str | Path | bytes, threads: int, needed: Mapping[str, str], optimised: Path | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, OPTIMISATION)
    options.log_severity_level = 3  # it warns that an optimised graph is for this machine only
    options.intra_op_num_threads = threads
    for key, value in (SETTINGS | dict(needed)).items():
        options.add_session_config_entry(key, value)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    try:
        return onnxruntime.InferenceSession(model, options, providers=[PROVIDER])
    except Exception as error:  # onnxruntime's own exception types are not public
        name, again = ("the model", "vitq export") if isinstance(model, bytes) else (model, writing("vitq export", model))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{name} cannot be loaded by onnxruntime: {reason}; `{again}` writes a new one") from None
