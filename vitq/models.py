"""MODEL -> a float model in eval mode whose attention shows its matmuls, and what it takes to build and feed it again.

A timm local folder, a checkpoint file or a timm name is resolved to an architecture, its arguments and its tensors. Tensors that fit as
they are stored are loaded as they are; others first go through timm's own conversion for the family (original repositories, or another
image size where one was asked for). What is loaded in the end fits exactly: a missing, unexpected or wrongly shaped tensor is an error
that names it, and so is a NaN or an infinity. Only tables of positions may be resampled: a patch embedding of another size is that of
another model.

Left out: Hugging Face Hub names (download the folder first), NumPy checkpoints, checkpoints in several files.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_data_config
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.layers.config import set_fused_attn, use_fused_attn
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from vitq.errors import InputError
from vitq.preparation import refuse_unusable
from vitq.units import counted
from vitq.weights import SUFFIXES, count_classes, fit, load_strictly, read_tensors, refuse_not_finite

LARGEST = 2**16
"""The largest whole number that a width, a depth, an image's height or any other argument of a model may be."""

_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pth")
_REFUSED = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only"}


@dataclass(frozen=True)
class LoadedModel:
    """A float32 model in eval mode, images (B, C, H, W) to logits (B, num_classes) or features, and how it came to be.

    `build(architecture, arguments, num_classes)` makes the same architecture again. `arguments` and `data_config` (timm's: input_size,
    mean, std, interpolation, crop_pct, crop_mode) hold JSON values only, lists rather than tuples. `label_names` has `num_classes`
    entries or none. `source` is the model as given; `digest` the sha256 of the weights file, or of the tensors for a timm name. `resampled`
    names the tables of positions of a folder or file that timm resampled to another size of image, each with both shapes.
    """

    module: nn.Module
    architecture: str
    arguments: dict[str, Any]
    num_classes: int
    data_config: dict[str, Any]
    label_names: tuple[str, ...]
    source: str
    digest: str
    resampled: tuple[str, ...] = ()


def load(
    model: str | Path,
    arch: str | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Loads a timm local folder, a checkpoint file or a timm name with its pretrained weights.

    Args:
        model: A folder, a file, or a timm name (with or without a tag).
        arch: The timm architecture of a folder or file; wins over what the checkpoint says.
        num_classes: Classes of the head, 0 for none (a stored head is then left out); read from the checkpoint when None.
        img_size: Input height and width in pixels where they differ from the checkpoint's; tables of positions are then resampled.
        model_kwargs: More arguments of `timm.create_model`, JSON values; they win over the checkpoint's.

    Raises:
        InputError: nothing of that name, weights that cannot be fetched, read or built, or tensors that do not fit or are not finite.
    """
    if (img_size is not None and img_size < 1) or (num_classes is not None and num_classes < 0):
        raise InputError(f"image size {img_size} and {num_classes} classes cannot be used; give at least 1 pixel, and 0 or more classes")
    model, path, extra = str(model), Path(model), dict(model_kwargs or {})
    if model and (path.is_dir() or path.is_file()):
        return _load_local(path, model, arch, num_classes, img_size, extra)
    refuse_unknown(model, arch)
    return _load_pretrained(model, num_classes, img_size, extra)


def refuse_unknown(model: str, arch: str | None = None) -> None:
    """Raises InputError where there is no folder, file or timm model of that name; loads nothing."""
    path = Path(model)
    accepted = "give a timm local folder, a .safetensors, .pth, .pt or .bin file, or a timm model name"
    if not model:
        raise InputError(f"the name of the MODEL is empty; {accepted}")
    if path.is_dir() or path.is_file():
        return
    if arch is not None or path.suffix in SUFFIXES or "/" in model or "\\" in model:
        raise InputError(f"{model} does not exist; {accepted}")
    _default_config(model)


def build(architecture: str, arguments: Mapping[str, Any], num_classes: int, stored: int | None = None) -> nn.Module:
    """The architecture without trained weights (none are fetched), in eval mode, its attention as matmuls and softmax.

    Args:
        architecture: timm's name.
        arguments: of `timm.create_model`.
        num_classes: of the head.
        stored: how many numbers a file holds for it; what would have far more is not built.

    Raises:
        InputError: timm does not know the architecture, or it cannot be built with these arguments.
    """
    _default_config(architecture)
    return _create(architecture, arguments, num_classes, stored=stored)


def _load_local(
    path: Path, source: str, arch: str | None, num_classes: int | None, img_size: int | None, extra: dict[str, Any]
) -> LoadedModel:
    weights = next((file for file in (path, *(path / name for name in _WEIGHTS)) if file.is_file()), path / _WEIGHTS[0])
    config = _read_config(path, arch)
    tensors, stored_arch = read_tensors(weights)
    architecture = arch or config.get("architecture") or stored_arch
    if architecture is None:
        raise InputError(f"nothing says which architecture {source} is; give --arch NAME (timm's) or a config.json beside the file")
    default = _default_config(architecture)
    pretrained = config.get("pretrained_cfg") or {key: config[key] for key in default if key in config}
    merged = {**default, **{key: value for key, value in pretrained.items() if value is not None}}
    arguments = {**config.get("model_args", {}), **extra}
    said = (num_classes, arguments.pop("num_classes", None), config.get("num_classes"), pretrained.get("num_classes"))
    classes = next((count for count in said if isinstance(count, int) and count >= 0), None)
    arguments = _sized(arguments, merged, default, img_size)

    stored = sum(tensor.numel() for tensor in tensors.values())
    module = _create(architecture, arguments, classes, stored=stored)
    pool = config.get("global_pool")
    if pool and "global_pool" not in arguments and getattr(module, "global_pool", pool) != pool:
        arguments["global_pool"] = pool  # timm's older configs name the pooling beside the arguments only
        module = _create(architecture, arguments, classes, stored=stored)
    heads = default.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    fitted = fit(tensors, module)
    if classes is None and heads and (found := count_classes(tensors, heads) or count_classes(fitted, heads)) != _classes_of(module):
        module = _create(architecture, arguments, found, stored=stored)
        fitted = fit(tensors, module)
    if num_classes == 0:
        fitted = {name: tensor for name, tensor in fitted.items() if not name.startswith(tuple(f"{head}." for head in heads))}
    may_resize = img_size is not None or "img_size" in extra
    resampled = load_strictly(module, fitted, tensors, may_resize, weights, architecture)
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    names = config.get("label_names") or pretrained.get("label_names")
    return _loaded(module, architecture, arguments, merged, img_size, names, source, digest, resampled)


def _load_pretrained(name: str, num_classes: int | None, img_size: int | None, extra: dict[str, Any]) -> LoadedModel:
    default = _default_config(name)
    if not any(default.get(place) for place in ("url", "hf_hub_id", "file")):
        near = _near(name, timm.list_pretrained())
        raise InputError(f"timm has no weights for {name}; give a checkpoint file{f', or one of: {near}' if near else ''}")
    if num_classes not in (None, 0, default["num_classes"]):
        raise InputError(
            f"{name} has {counted(default['num_classes'], 'class')}, not {num_classes}; leave --num-classes out or give a checkpoint"
        )
    # The tag pins the weights and their input size: timm's default tag may move.
    architecture = f"{default['architecture']}.{default['tag']}" if default.get("tag") else name
    arguments = _sized(extra, default, default, img_size)
    module = _create(architecture, arguments, num_classes, pretrained=True)
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        refuse_not_finite(key, tensor, name)
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.contiguous().numpy().tobytes())
    subset = infer_imagenet_subset({"num_classes": _classes_of(module)})
    names = default.get("label_names") or (ImageNetInfo(subset).label_names() if subset else ())
    return _loaded(module, architecture, arguments, default, img_size, names, name, digest.hexdigest())


def _loaded(
    module: nn.Module, architecture: str, arguments: dict[str, Any], config: dict[str, Any],
    img_size: int | None, names: Any, source: str, digest: str, resampled: tuple[str, ...] = (),
) -> LoadedModel:  # fmt: skip
    data_config = resolve_data_config(pretrained_cfg=config)
    channels = arguments.get("in_chans", data_config["input_size"][0])
    size = img_size or arguments.get("img_size") or data_config["input_size"][1:]
    data_config["input_size"] = [channels, size, size] if isinstance(size, int) else [channels, *size]
    if isinstance(names, Mapping):  # timm's other form: class index -> name
        names = [names[key] for key in sorted(names, key=int)]
    classes = _classes_of(module)
    labels = tuple(str(name) for name in names) if names and len(names) == classes else ()
    return LoadedModel(module, architecture, arguments, classes, _json_values(data_config), labels, source, digest, resampled)


def _read_config(path: Path, arch: str | None) -> dict[str, Any]:
    """The config.json of the folder, or beside the file; {} where there is none, or where --arch names another architecture."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        if path.is_dir() and arch is None:
            raise InputError(f'folder {path} has no config.json; write {{"architecture": "NAME"}} (timm\'s) there or give --arch NAME')
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}; correct it, or remove it and give --arch NAME") from None
    named = config.get("architecture") if isinstance(config, dict) else None
    if arch is not None and str(named).partition(".")[0] != arch.partition(".")[0]:
        return {}
    if not isinstance(named, str):
        if path.is_file():  # another tool's
            return {}
        raise InputError(f"{file} names no `architecture` (found {named!r}); add timm's name of it or give --arch NAME")
    kinds = {"model_args": dict, "pretrained_cfg": dict, "num_classes": int, "label_names": (list, dict), "global_pool": str}
    for field, kind in kinds.items():
        if config.get(field) is None:
            config.pop(field, None)
        elif not isinstance(config[field], kind):
            raise InputError(f"{file}: `{field}` is {config[field]!r:.80}, which timm does not write there; correct it")
    refuse_unusable(config.get("pretrained_cfg") or config, file)
    return config


def _default_config(architecture: str) -> dict[str, Any]:
    """The pretrained_cfg that timm has for an architecture, with or without a tag; InputError with near matches where timm knows none."""
    base, _, tag = architecture.partition(".")
    if not timm.is_model(base):
        near = _near(base, timm.list_models())
        remedy = f" (near: {near}); give one of these" if near else "; give a path that exists, or a name that `timm.list_models()` has"
        raise InputError(f"{architecture!r} is no file, folder or timm model{remedy}")
    try:
        config = timm.get_pretrained_cfg(architecture)
    except RuntimeError:
        raise InputError(
            f"timm has no weights {tag!r} of {base}; it has {', '.join(timm.list_pretrained(base + '.*')) or 'none'}"
        ) from None
    return config.to_dict() if config else {"architecture": base, "num_classes": 1000, "input_size": (3, 224, 224)}


def _near(name: str, names: list[str]) -> str:
    """Up to three names that a slip of the keyboard may have been meant for; most often none of what is no name at all."""
    return ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.8))


def _sized(arguments: dict[str, Any], config: dict[str, Any], default: dict[str, Any], img_size: int | None) -> dict[str, Any]:
    """The arguments with the input size and channels that the weights were made for, where these shape the architecture."""
    sized = _json_values(arguments)
    if refused := sorted(_REFUSED & set(sized)):
        raise InputError(f"model argument {refused[0]!r} cannot be used: only those that shape the architecture are; leave it out")
    try:
        channels, *size = (int(extent) for extent in config["input_size"])
        if len(size) != 2 or min(channels, *size) < 1:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"input_size {config['input_size']!r:.80} of the model's config is not [channels, height, width]; correct it"
        ) from None
    fixed = config.get("fixed_input_size") and default.get("fixed_input_size") and not sized.get("dynamic_img_size")
    if img_size is not None and (fixed or "img_size" in sized):
        sized["img_size"] = img_size
    elif fixed and size != list(default["input_size"][1:]):
        sized.setdefault("img_size", size[0] if size[0] == size[1] else size)
    if channels != default["input_size"][0]:
        sized.setdefault("in_chans", channels)
    return sized


def _json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"the model's arguments are no JSON values ({error}); give numbers, strings, booleans or lists") from None


def _create(
    architecture: str, arguments: Mapping[str, Any], num_classes: int | None, pretrained: bool = False, stored: int | None = None
) -> nn.Module:
    try:
        _refuse_large_numbers(arguments)
        with _unfused_attention(), _bounded(stored):
            return timm.create_model(architecture, pretrained=pretrained, num_classes=num_classes, **arguments).eval()
    except Exception as error:  # constructors and the hub's client raise whatever they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        if pretrained:
            raise InputError(f"the weights of {architecture} could not be fetched ({reason}); offline, give a checkpoint file") from None
        given = dict(arguments) or "its defaults"
        raise InputError(f"{architecture} cannot be built with {given}: {reason}; correct the model's arguments") from None


def _refuse_large_numbers(value: Any) -> None:
    """Raises ValueError for a whole number that no width, depth or size of a model is: what timm would do with it takes all memory."""
    if isinstance(value, Mapping):
        value = list(value.values())
    for item in value if isinstance(value, list | tuple) else ():
        _refuse_large_numbers(item)
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{value} is more than {LARGEST}")


@contextmanager
def _bounded(stored: int | None) -> Iterator[None]:
    """A model that is made inside has at most four times as many numbers as are stored for it, and 100 million more; None: any number.

    Files come from anywhere. A tensor is refused when its module gets it: before its values take memory.
    """
    most, numbers = 4 * (stored or 0) + 10**8, 0

    def count(_: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal numbers
        numbers += tensor.numel() if isinstance(tensor, Tensor) else 10_000  # a module takes memory too
        if stored is not None and numbers > most:
            raise ValueError(f"with {name} it has more than {most} numbers, far more than the {stored} that are stored for it")

    hooks = (
        register_module_parameter_registration_hook,
        register_module_buffer_registration_hook,
        register_module_module_registration_hook,
    )
    handles = [register(count) for register in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Attention made inside shows its matmuls and softmax; timm's switch is put back after."""
    enabled, experimental = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(False)
    try:
        yield
    finally:
        set_fused_attn(enabled, experimental)


def _classes_of(module: nn.Module) -> int:
    return int(getattr(module, "num_classes", 0) or 0)
