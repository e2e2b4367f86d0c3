"""The options that several commands share, with their help, and the reading of those that are more than a number or a path."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitq.cli import completion
from vitq.errors import UsageError

if TYPE_CHECKING:
    from vitq.cli.sources import LoadingOptions

DEFAULT_NUM_IMAGES = 256
"""How many images profile, calibrate and export take where nothing says otherwise."""
MOST_IMAGES = 2**20
"""Of a batch, or at once in a file."""
MOST_WORKERS = 1024
"""Processes or threads: more are a slip of the keyboard, and would take the machine down."""
MOST_SEED = 2**32 - 1

Arch = Annotated[
    str | None, typer.Option("--arch", autocompletion=completion.architectures, help="timm architecture of a checkpoint that does not say.")
]
NumClasses = Annotated[
    int | None, typer.Option("--num-classes", min=0, help="Classes of the head; 0 for a backbone. (default: the checkpoint's)")
]
ImgSize = Annotated[int | None, typer.Option("--img-size", min=1, help="Input height and width in pixels. (default: the checkpoint's)")]
ModelKwargs = Annotated[
    list[str] | None, typer.Option("--model-kwargs", help="key=value for timm.create_model; repeatable; values are JSON where they parse.")
]
Images = Annotated[
    str, typer.Option("--images", help="A folder of class folders, a flat folder, a .tar of either, or an images.safetensors.")
]
OptionalImages = Annotated[
    str | None, typer.Option("--images", help="A folder of class folders, a flat folder, a .tar of either, or an images.safetensors.")
]
RememberedImages = Annotated[
    str | None, typer.Option("--images", help="A folder, a .tar or an images.safetensors. (default: those of the stage before)")
]
NumImages = Annotated[int | None, typer.Option("--num-images", min=1, help="Size of the seeded subset.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, max=MOST_IMAGES, help="Images a batch.")]
Workers = Annotated[int, typer.Option("--workers", min=0, max=MOST_WORKERS, help="Processes that decode images; 0: none beside this one.")]
Device = Annotated[str, typer.Option("--device", autocompletion=completion.devices, help="Where to compute: cpu, cuda, cuda:1, ...")]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, max=MOST_SEED, help="Chooses the subset of the images. (default: the stage before's, else 0)")
]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Where artifacts are read and written. (default: the given artifact's folder, or vitq-run)")
]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="The file to write. (default: the usual name in the run folder)")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Try it on two batches, say what time, memory and disk all of it takes, and stop.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but the result and faults.")]

# Every command takes the common options; where one makes no difference, its help leaves it out.
UnusedSeed = Annotated[int | None, typer.Option("--seed", hidden=True)]
UnusedDevice = Annotated[str, typer.Option("--device", hidden=True)]
UnusedForce = Annotated[bool, typer.Option("--force", hidden=True)]


def above_zero(option: typer.CallbackParam, value: float | None) -> float | None:
    """The value of an option that must be more than 0; raises UsageError for any other, NaN too."""
    if value is not None and not value > 0:
        raise UsageError(f"{option.opts[0]} {value:g} cannot be used; give more than 0")
    return value


def parse_bits(text: str | None) -> list[int] | None:
    """Reads '2,3,8' as widths; raises UsageError for anything that is no list of whole numbers from 2 to 8."""
    if text is None:
        return None
    from vitq.artifacts import WIDTHS

    try:
        if set(found := [int(part) for part in text.split(",")]) <= set(WIDTHS):
            return found
    except ValueError:
        pass
    raise UsageError(f"--bits {text!r} is not understood; give widths from 2 to 8 with commas between them, such as 3,4,5")


def parse_model_kwargs(texts: Sequence[str] | None) -> dict[str, Any]:
    """Reads 'key=value' texts; a value is JSON where it parses (4, true, [2,2]) and text where it does not."""
    found = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--model-kwargs {text!r} is not understood; give key=value, such as patch_size=4")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def loading(arch: str | None, num_classes: int | None, img_size: int | None, model_kwargs: Sequence[str] | None) -> "LoadingOptions":
    """The options above that say how a MODEL is loaded."""
    from vitq.cli.sources import LoadingOptions

    return LoadingOptions(arch=arch, num_classes=num_classes, img_size=img_size, model_kwargs=parse_model_kwargs(model_kwargs))


def loading_words(loading: "LoadingOptions") -> list[str]:
    """What a command needs to load the same model."""
    words = [word for name in ("arch", "num_classes", "img_size") for word in _words(name, getattr(loading, name))]
    return words + [word for key, value in loading.model_kwargs.items() for word in ("--model-kwargs", f"{key}={_text(value)}")]


def _words(name: str, value: object) -> list[str]:
    return [] if value is None else [f"--{name.replace('_', '-')}", str(value)]


def _text(value: object) -> str:
    """As `parse_model_kwargs` reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def usable_device(text: str) -> str:
    """The device's name as given; raises UsageError where torch cannot compute there."""
    import torch

    try:
        torch.zeros(1, device=text).item()  # device meta holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        known = re.fullmatch(r"cpu|cuda(:\d+)?", text)  # of any other name torch would list all that it was ever built for
        reason = f": {(str(error).strip() or type(error).__name__).splitlines()[0]}" if known else ""
        raise UsageError(f"--device {text!r} cannot be used here{reason}; give cpu, or, where there is a GPU, cuda or cuda:N") from None
    return text
