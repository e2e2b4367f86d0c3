"""What an artifact's `made_from` says of its model and its images."""

from typing import Any

from pydantic import Field

from vitq.artifacts import Value
from vitq.cli.options import MOST_SEED


class LoadingOptions(Value):
    """What `models.load` takes beside the model."""

    arch: str | None = None
    num_classes: int | None = None
    img_size: int | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)


class ModelSource(Value):
    """A float model as it was given, its digest, and how it was loaded."""

    source: str
    digest: str
    options: LoadingOptions = LoadingOptions()


class ImageSource(Value):
    """Images as they were given, the digest of the chosen list, and what chose it."""

    source: str
    digest: str
    num_images: int = Field(ge=1)
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
