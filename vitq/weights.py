"""The tensors of a checkpoint file: read without running code, unwrapped, fitted to a module and loaded strictly."""

import argparse
import inspect
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from vitq.errors import InputError
from vitq.units import counted

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")
_WRAPPINGS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_tensors(file: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a checkpoint file without its wrappings, floating ones as float32, and the architecture if it says so."""
    if file.suffix not in SUFFIXES:
        raise InputError(f"{file} is no MODEL; give a timm local folder, a .safetensors, .pth, .pt or .bin file, or a timm model name")
    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, "pt") as opened:
                kind = (opened.metadata() or {}).get("format", "")
            stored = safetensors.torch.load_file(file)
        else:
            # timm's training script stores its options as a Namespace, which holds values only.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
                kind, stored = "", torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; a timm local folder has it beside config.json, or give the file itself") from None
    except Exception as error:  # a damaged archive raises anything from EOFError to KeyError
        if blocked := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(f"{file} holds code ({blocked[1]}), which was not run; save the model's state_dict() and give that") from None
        if file.suffix == ".safetensors" or isinstance(error, OSError):
            reason = (str(error).strip() or "it ends too early").splitlines()[0][:120]
        else:  # torch's own text is of its readers' insides, and for a foreign pickle advises to run it
            reason = _what_it_is(file)
        raise InputError(f"{file} is damaged or no checkpoint: {reason}; fetch or save it again") from None
    if kind.startswith("vitq-"):
        raise InputError(f"{file} is a {kind} file of this tool, not a float MODEL; give the model that it was made from")
    arch = stored.get("arch") if isinstance(stored, Mapping) else None
    while isinstance(stored, Mapping) and (key := next((key for key in _WRAPPINGS if isinstance(stored.get(key), Mapping)), None)):
        stored = stored[key]
    if not isinstance(stored, Mapping) or not any(isinstance(value, Tensor) for value in stored.values()):
        raise InputError(f"{file} holds no tensors by name (found {type(stored).__name__}); save the model's state_dict()")
    tensors = {str(key): value for key, value in stored.items() if isinstance(value, Tensor)}
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    tensors.pop("n_averaged", None)  # torch's AveragedModel counts beside the weights
    while prefix := next((prefix for prefix in _PREFIXES if tensors and all(key.startswith(prefix) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors, arch if isinstance(arch, str) else None


def _what_it_is(file: Path) -> str:
    """Why torch cannot read a file, by how it begins."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        begun_as_zip = opened.read(2) == b"PK"
    if begun_as_zip:
        return f"it is a zip archive of {size} bytes that is cut off, changed or not torch's"
    return f"its {size} bytes are not what torch.save writes" if size else "it is empty"


def fit(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The tensors as they are, or as timm's filter for the family rewrites them where that leaves fewer faults."""
    convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    faults = len(_faults(module, tensors, tensors))
    if convert is None or not faults:
        return tensors
    parameters = inspect.signature(convert).parameters
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in parameters else {}
    try:
        converted = convert(*(dict(tensors), module)[: len(parameters)], **options)
    except Exception:  # written for timm's own files: on others it trips over whatever is missing, and the strict load says what
        return tensors
    return converted if len(_faults(module, converted, converted)) < faults else tensors


def count_classes(tensors: dict[str, Tensor], heads: tuple[str, ...]) -> int:
    """The classes of the first classifier among the tensors, 0 without one."""
    names = [f"{head}.{part}" for head in heads for part in ("weight", "bias")]
    return next((len(tensors[name]) for name in names if name in tensors and tensors[name].ndim), 0)


def load_strictly(
    module: nn.Module, tensors: dict[str, Tensor], stored: dict[str, Tensor], resize: bool, file: Path, architecture: str
) -> tuple[str, ...]:
    """Loads exactly the module's tensors.

    Args:
        module: gets them.
        tensors: as `fit` gave them.
        stored: the tensors of the file; none may have had another size there, since a patch embedding of another size is another model's.
        resize: whether tables of positions may: timm resamples them to another size of image.
        file: where the tensors come from.
        architecture: what the module is.

    Returns:
        What was resampled, a line a table.

    Raises:
        InputError: a tensor is missing, too much, or of another shape or type; it has a NaN or an infinity.
    """
    unresized = {name: tensor for name, tensor in stored.items() if not (resize and _holds_positions(name))}
    if faults := _faults(module, tensors, unresized):
        shown = "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        asked = " ".join(f"--model-kwargs {word}" for word in _patch_arguments(module, stored))
        remedy = f"by its patch embedding, add {asked}; else " if asked else ""
        remedy += "give the right --arch, --num-classes, --img-size or --model-kwargs, or another file"
        raise InputError(f"{file} does not fit {architecture}, {counted(len(faults), 'tensor')}: {shown}; {remedy}")
    for name, tensor in tensors.items():
        refuse_not_finite(name, tensor, str(file))
    module.load_state_dict(tensors, strict=True)
    return tuple(
        f"{name} from {tuple(stored[name].shape)} to {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in stored and name not in unresized and stored[name].numel() != tensor.numel()
    )


def _holds_positions(name: str) -> bool:
    """Whether a tensor has an entry a place or a distance, as timm names them: pos_embed, relative_position_bias_table, rel_pos_h."""
    return "pos" in name or "attention_biases" in name


def _patch_arguments(module: nn.Module, stored: dict[str, Tensor]) -> list[str]:
    """The arguments of a model that have its patch embedding's shape, (width, channels, height, width of a patch), as it is stored."""
    found, convolution = stored.get("patch_embed.proj.weight"), getattr(getattr(module, "patch_embed", None), "proj", None)
    if found is None or found.ndim != 4 or not isinstance(convolution, nn.Conv2d) or convolution.stride != convolution.kernel_size:
        return []
    here, there = convolution.weight.shape, found.shape
    patch = there[2] if there[2] == there[3] else f"[{there[2]},{there[3]}]"
    said = {"patch_size": (patch, here[2:] != there[2:]), "embed_dim": (there[0], here[0] != there[0])}
    said["in_chans"] = (there[1], here[1] != there[1])
    accepted = inspect.signature(type(module)).parameters
    return [f"{name}={value}" for name, (value, differs) in said.items() if differs and name in accepted]


def _faults(module: nn.Module, tensors: dict[str, Tensor], unresized: dict[str, Tensor]) -> list[str]:
    """What does not fit, in words: wrong shapes first, which often explain the rest."""
    expected = module.state_dict()
    faults = []
    for name in [name for name in expected if name in tensors]:
        wanted, stored = expected[name], tensors[name]
        if name in unresized and unresized[name].numel() != stored.numel():
            stored = unresized[name]
        if stored.shape != wanted.shape:
            faults.append(f"wrong shape {name}: {tuple(stored.shape)} stored, {tuple(wanted.shape)} needed")
        elif stored.is_floating_point() != wanted.is_floating_point():
            faults.append(f"wrong type {name}: {stored.dtype} stored, {wanted.dtype} needed")
    faults += [f"missing {name}" for name in expected if name not in tensors]
    return faults + [f"unexpected {name}" for name in tensors if name not in expected]


def refuse_not_finite(name: str, tensor: Tensor, source: str) -> None:
    """Raises InputError where a floating tensor holds NaN or infinity, naming it."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{source}: tensor {name} holds NaN or infinity; the checkpoint is damaged or its training diverged: give another")
