"""Images opened for a model, without labels that are not the model's.

`vitq synthesize` labels its images with the classes that its own model was to see. To another model they are pixels like any others, but
class 3 of one model is not class 3 of another, so such images count as unlabelled. So do class folders of another number than the model has
classes: which class a folder stands for is not known.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitq.cli.terminal import Terminal
    from vitq.images import Images


def open_for(
    digest: str | None,
    source: str,
    data_config: dict[str, Any],
    num_images: int | None,
    seed: int,
    batch_size: int,
    workers: int,
    class_names: tuple[str, ...],
    num_classes: int,
) -> "Images":
    """As `images.open_images`, without labels where they are not this model's.

    Args:
        digest: of the float model, as `LoadedModel` has it; None where it is not known: then no labels are left out.
        source: as for `open_images`, like all that follow.
        data_config: the model's preprocessing.
        num_images: how many to choose; None takes all.
        seed: chooses the subset.
        batch_size: images a batch.
        workers: processes that decode.
        class_names: the model's label names.
        num_classes: of the model; 0 for a backbone.
    """
    from vitq.images import open_images

    foreign = made_by_another(digest, source) is not None
    opened = open_images(source, data_config, num_images, seed, batch_size, workers, () if foreign else class_names)
    others = bool(num_classes) and len(opened.class_names) not in (0, num_classes)
    return replace(opened, labelled=False, class_names=()) if foreign or others else opened


def class_folders(num_classes: int, class_names: tuple[str, ...]) -> str:
    """What images with labels of a model look like, in words."""
    if class_names:
        return f"{num_classes} folders named as its classes ({', '.join(class_names[:2])}, ...), or as many whose order is theirs"
    return f"{num_classes} folders whose names, in natural order (class2 before class10), stand for classes 0 to {num_classes - 1}"


def say_foreign(terminal: "Terminal", digest: str | None, source: str) -> None:
    """Says it where images were made from another model than the one of this digest."""
    if (other := made_by_another(digest, source)) is not None:
        terminal.note(f"{source} was made from another model, {other}: its images are used, any labels are not")


def made_by_another(digest: str | None, source: str) -> str | None:
    """The model that a file of images was made from, as it was given, where that is not the one of this digest; else None."""
    path = Path(source)
    if digest is None or not path.is_file() or path.suffix != ".safetensors":
        return None
    from vitq.artifacts.images import describe_images

    found = describe_images(path)
    model = found["made_from"].get("model", {}) if found else {}
    return str(model.get("source")) if model.get("digest", digest) != digest else None
