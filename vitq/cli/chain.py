"""How commands chain: the run folder, and the model and images that an artifact remembers in its `made_from`.

    made_from = {"model": {source, digest, options}, "images": {source, digest, num_images, seed}, "profile": digest, ...}

A source is kept as it was given. A relative one is looked for in the current folder, then in the artifact's; what is found must have
the digest that was stored. An option that names a source wins, and then nothing is compared.
"""

import errno
import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vitq.cli.options import DEFAULT_NUM_IMAGES
from vitq.commands import DEFAULT_FOLDER, IMAGES, LATENCY, ONNX, PLAN, PROFILE, in_folder, in_run
from vitq.errors import InputError

if TYPE_CHECKING:
    from vitq.artifacts import BitPlan, Profile
    from vitq.checkpoint import Checkpoint
    from vitq.cli.sources import ImageSource, LoadingOptions, ModelSource
    from vitq.images import Images
    from vitq.latency import LatencyTable
    from vitq.models import LoadedModel


@dataclass(frozen=True)
class Reading:
    """How images are to be read: None stands for what was remembered."""

    source: str | None
    num_images: int | None
    seed: int | None
    batch_size: int
    workers: int


@dataclass(frozen=True)
class Memory:
    """What an artifact remembers: its `made_from`, its path, and its folder, from where relative sources are tried too."""

    made_from: Mapping[str, Any]
    artifact: Path

    def model(self, override: str | None, option: str) -> "LoadedModel":
        """Loads the float model that the artifact was made from, or `override` with the same loading options.

        Raises:
            InputError: nothing is remembered, the model is gone, cannot be loaded, or has other weights than then; the message names
                `option`, which gives it.
        """
        from vitq.cli.sources import ModelSource
        from vitq.models import load

        if override is not None:
            return load(override, **self.loading().model_dump())
        record = self._record("model", ModelSource)
        if record is None:
            raise InputError(f"{self.artifact} does not say which model it is for; give {option} MODEL")
        remedy = f"give it with {option}, or {self._again()}"
        problem = ""
        for place in self._places(record.source):
            try:
                model = load(place, **record.options.model_dump())
            except InputError as error:
                problem = problem or f"the model that {self.artifact} was made from cannot be loaded: {error}"
                continue
            if model.digest == record.digest:
                return model
            problem = f"the weights of {place} are not those that {self.artifact} was made from, they have changed"
        raise InputError(f"{problem}; {remedy}")

    def remembered_in(self, checkpoint: "Checkpoint", images: "ImageSource") -> "Checkpoint":
        """A checkpoint with all that later commands need to open the model, and the images that calibrated it, again."""
        calibration = checkpoint.made_from["calibration"] | {"images": images.model_dump()}
        return replace(checkpoint, made_from={**self.made_from, **checkpoint.made_from, "calibration": calibration})

    def loading(self) -> "LoadingOptions":
        """The options that the float model was loaded with; none where that is not remembered."""
        from vitq.cli.sources import LoadingOptions, ModelSource

        record = self._record("model", ModelSource)
        return record.options if record else LoadingOptions()

    def images(self, reading: Reading, data_config: dict[str, Any], class_names: tuple[str, ...]) -> "tuple[Images, ImageSource]":
        """Opens the images that the artifact was made from, or those of `reading.source`.

        Returns:
            The images, and what to remember of them.

        Raises:
            InputError: nothing is remembered, the images are gone, cannot be read, or are others than then.
        """
        from vitq.cli.sources import ImageSource

        record = self._record("images", ImageSource)
        then = (record.num_images, record.seed) if record else (DEFAULT_NUM_IMAGES, 0)
        default = then[0] if reading.source is None else DEFAULT_NUM_IMAGES
        now = (default if reading.num_images is None else reading.num_images, then[1] if reading.seed is None else reading.seed)

        def opened(place: str, num_images: int, seed: int) -> "Images":
            from vitq.images import open_images

            return open_images(place, data_config, num_images, seed, reading.batch_size, reading.workers, class_names)

        def remembered(source: str, images: "Images") -> "tuple[Images, ImageSource]":
            return images, ImageSource(source=source, digest=images.digest, num_images=images.num_listed, seed=now[1])

        if reading.source is not None:
            return remembered(reading.source, opened(reading.source, *now))
        if record is None:
            raise InputError(f"{self.artifact} does not say which images it was made from; give --images PATH")
        problem = ""
        for place in self._places(record.source):
            try:
                images = opened(place, *then)
            except InputError as error:
                problem = problem or f"the images that {self.artifact} was made from cannot be read: {error}"
                continue
            if images.digest == record.digest:
                return remembered(record.source, images if now == then else opened(place, *now))
            problem = f"the images of {place} are not those that {self.artifact} was made from, they have changed"
        raise InputError(f"{problem}; give them with --images, or {self._again()}")

    def _places(self, source: str) -> list[str]:
        """Where a source may be now; as it is where it is nowhere, since it may be a timm name."""
        return [str(place) for place in (Path(source), self.artifact.parent / source) if place.exists()] or [source]

    def _again(self) -> str:
        """What begins the chain anew, in the folder whose profile this was."""
        folder = self.artifact.parent if (self.artifact.parent / PROFILE).is_file() else DEFAULT_FOLDER
        return f"run `{in_run('vitq profile MODEL --images PATH', folder)}` again"

    def _record(self, name: str, kind: "type[Record]") -> "Record | None":
        from pydantic import ValidationError

        found = self.made_from.get(name)
        if found is None:
            return None
        try:
            return kind.model_validate(found)
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(map(str, ("made_from", name, *fault["loc"])))
            raise InputError(f"{self.artifact}: {place}: {fault['msg']}; {self._again()}") from None


Record = TypeVar("Record", "ModelSource", "ImageSource")


def run_folder(run_dir: Path | None, artifact: Path | None = None) -> Path:
    """The run folder: as given, else the artifact's, else `vitq-run`."""
    return run_dir or (artifact.parent if artifact else DEFAULT_FOLDER)


def next_with_latencies(profile: "Profile", where: Path, latencies: "LatencyTable", table: Path) -> str:
    """The allocation of the profile at `where` that a table of latencies at `table` makes possible; one without where no latency binds."""
    from vitq.allocation import binding_latency

    found = binding_latency(profile, latencies)
    command = "vitq allocate --budget 4.0" + ("" if found is None else f" --budget latency={found:.4g}ms")
    if found is not None and table != where.parent / LATENCY:
        command += f" --latency-table {shlex.quote(str(table))}"
    return in_folder(command, where, PROFILE)


def refuse_missing_sources(model: str | None, images: str | None, arch: str | None = None) -> None:
    """Raises InputError, before an output is refused or anything is loaded, for a model or images that are not there; None is fine."""
    if model and is_run_folder(Path(model)):
        raise InputError(f"{model} is a run folder, no MODEL; give the MODEL, and --run-dir {shlex.quote(model)} to work in that folder")
    if model is not None and not (model and Path(model).exists()):  # Path("") is the current folder
        from vitq.models import refuse_unknown

        refuse_unknown(model, arch)
    if images is not None and not (images and Path(images).exists()):
        from vitq.images import refuse_missing as refuse_missing_images

        refuse_missing_images(images)


def is_run_folder(path: Path) -> bool:
    """Whether this is a folder with artifacts and not a model (which has a config.json)."""
    names = (PROFILE, PLAN, IMAGES, ONNX)
    return path.is_dir() and not (path / "config.json").is_file() and any((path / name).is_file() for name in names)


def refuse_missing_artifact(artifact: str, arch: str | None = None) -> None:
    """Raises InputError, before an output is refused or anything is loaded, where there is no such file, run folder or MODEL."""
    from vitq.whole import refuse_missing

    if artifact and is_run_folder(Path(artifact)):
        return
    path = Path(artifact)
    if (suffix := path.suffix) in (".onnx", ".json"):
        commands = {PLAN: "vitq allocate --budget 4.0", LATENCY: "vitq bench --layers"}
        refuse_missing(artifact, "vitq export" if suffix == ".onnx" else commands.get(path.name, "vitq profile MODEL --images PATH"))
        return
    if suffix != ".safetensors" and path.is_file():
        from vitq.weights import SUFFIXES

        if suffix not in SUFFIXES:
            raise InputError(
                f"{artifact} is no MODEL and nothing that vitq wrote; give a timm local folder, a checkpoint ({', '.join(SUFFIXES)}), "
                "a timm model name, or an artifact (.json, .safetensors, .onnx)"
            )
    refuse_missing_sources(artifact, None, arch)


def output_path(output: Path | None, folder: Path, name: str, force: bool) -> Path:
    """Where to write; raises UsageError, before anything is computed, where that exists and `force` is not set."""
    from vitq.whole import refuse_existing

    path = output or folder / name
    refuse_existing(path, force)
    refuse_unwritable(path)
    return path


def refuse_unwritable(path: Path) -> None:
    """Raises InputError, before anything is computed, where a path lies below a file or in a folder that cannot be written to."""
    from vitq.whole import cannot_write

    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise cannot_write(path, NotADirectoryError(errno.ENOTDIR, ""))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise cannot_write(path, PermissionError(errno.EACCES, ""))


def digest_of(profile: "Profile") -> str:
    """What a plan remembers of the profile that it was made from, whatever the order of its layers and costs."""
    document = profile.model_dump(mode="json")
    document["layers"].sort(key=lambda layer: layer["name"])
    for table in document["costs"].values():
        table["pairs"].sort(key=lambda pair: (pair["first"], pair["second"]))
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plan_memory(plan: "BitPlan", path: Path) -> Memory:
    """What a plan remembers; of one that was written by hand, what the profile beside it does."""
    made_from = plan.made_from
    beside = path.parent / PROFILE
    if "model" not in made_from and beside.is_file():
        from vitq.artifacts import load_profile

        made_from = load_profile(beside).made_from
    return Memory(made_from, path)


def from_another_profile(made_from: Mapping[str, Any], profile: "Profile") -> bool:
    """Whether a plan, or a model calibrated to it, remembers another profile."""
    return "profile" in made_from and made_from["profile"] != digest_of(profile)


def of_another_plan(calibrated: "BitPlan", made_from: Mapping[str, Any], plan: "BitPlan") -> bool:
    """Whether a calibrated model, by its plan and what it was made from, has other bits than a plan or is another model."""
    same_model = plan.made_from.get("model") in (None, made_from.get("model"))
    return plan.layers != calibrated.layers or not same_model


def refuse_stale_plan(plan: "BitPlan", path: Path) -> None:
    """Raises InputError where the profile in the run folder is not the one that its plan was made from."""
    from vitq.artifacts import load_profile

    profile = path.parent / PROFILE
    if profile.is_file() and from_another_profile(plan.made_from, load_profile(profile)):
        again = in_run(f"vitq allocate {bought_with(plan)}", path.parent)
        raise InputError(f"{path} was made from another profile than {profile}; run `{again}` again, or give the PLAN to use")


def bought_with(plan: "BitPlan") -> str:
    """The options of `vitq allocate` for the bits that a plan was made for, else the usual budget."""
    asked = plan.made_from.get("allocation")
    budgets, uniform = (asked.get("budgets"), asked.get("uniform")) if isinstance(asked, dict) else (None, None)
    words = [word for budget in budgets for word in ("--budget", str(budget))] if isinstance(budgets, list) else []
    return shlex.join(words or (["--uniform", str(uniform)] if uniform else ["--budget", "4.0"]))


def refuse_stale_checkpoint(checkpoint: "Checkpoint", path: Path) -> None:
    """Raises InputError where the plan in the run folder is not the one that its calibrated model has."""
    from vitq.artifacts import load_plan

    beside = path.parent / PLAN
    if beside.is_file() and of_another_plan(checkpoint.plan, checkpoint.made_from, load_plan(beside)):
        again = in_run("vitq calibrate", path.parent)
        raise InputError(f"{path} was calibrated to another plan than {beside}; run `{again}` again, or give the CHECKPOINT")
