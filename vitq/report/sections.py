"""The parts of the page in order: what each says, from what the folder holds, or which command brings what it lacks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vitq.allocation.summary import summarize_plan
from vitq.errors import InputError
from vitq.preparation import describe
from vitq.report import pictures
from vitq.report.bit_map import bit_map
from vitq.report.costs import errors, sensitivity
from vitq.report.findings import CloseUp, File, Findings, Lacking
from vitq.report.history import History, history
from vitq.report.measured import accuracy, latency, size
from vitq.report.staircase import staircase


@dataclass(frozen=True)
class Model:
    """What the model is."""

    architecture: str
    arguments: Mapping[str, Any]
    num_classes: int
    label_names: tuple[str, ...]
    preprocessing: str
    layers: int | None
    parameters: int | None
    macs: int | None
    source: str
    unfused: tuple[str, ...]


def model(findings: Findings) -> Model | Lacking:
    """From whichever artifact says it."""
    artifacts = [artifact for artifact in (findings.calibrated, findings.plan, findings.profile) if artifact is not None]
    layers = findings.profile.layers if findings.profile else None
    sums = (len(layers), sum(layer.parameters for layer in layers), sum(layer.macs for layer in layers)) if layers else (None, None, None)
    said = findings.exported or {}
    if artifacts:
        spec = artifacts[0].model
        about = spec.architecture, spec.arguments, spec.num_classes, spec.label_names, _preprocessing(spec.data_config)
    elif "architecture" in said:
        classes, labels, preprocessing = (said.get(name) for name in ("num_classes", "label_names", "preprocessing"))
        labels = tuple(map(str, labels)) if isinstance(labels, list) else ()
        about = str(said["architecture"]), {}, classes if isinstance(classes, int) else 0, labels, _preprocessing(_mapping(preprocessing))
    else:
        return Lacking("vitq profile MODEL --images PATH" + findings.option)
    made_from = [_mapping(artifact.made_from) for artifact in artifacts] + [_mapping(said.get("made_from"))]
    sources = [str(source) for found in made_from if (source := _mapping(found.get("model")).get("source"))]
    unfused = next((found["unfused_attention"] for found in made_from if isinstance(found.get("unfused_attention"), list)), [])
    return Model(*about, *sums, sources[0] if sources else "", tuple(map(str, unfused)))


def _preprocessing(data_config: Mapping[str, Any]) -> str:
    """In words; what an edited artifact says in its own."""
    try:
        return describe(dict(data_config))
    except InputError:
        return ", ".join(f"{name} {text}" for name, text in _flat(data_config))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class CloseUps:
    """The pictures of the layers that hurt: by layer, its tensors' outlines before and after."""

    layers: tuple[tuple[str, tuple[tuple[str, pictures.Outline, pictures.Outline, int], ...]], ...]
    num_images: int
    lacks: str


def close_up(findings: Findings) -> CloseUps | Lacking:
    """Values of weights and inputs before and after."""
    if not findings.close_ups:
        if not findings.errors:
            return Lacking(f"vitq calibrate{findings.option}")
        command = f"vitq report{findings.option} --model MODEL --images PATH --force"
        return Lacking(command, findings.close_up_lacks)

    def drawn(found: CloseUp) -> tuple[tuple[str, pictures.Outline, pictures.Outline, int], ...]:
        return tuple(
            (panel.title, pictures.outline(panel.before), pictures.outline(panel.after, panel.levels), len(panel.levels))
            for panel in found.panels
        )

    return CloseUps(tuple((found.layer, drawn(found)) for found in findings.close_ups), findings.num_images, findings.close_up_lacks)


def provenance(findings: Findings) -> tuple[tuple[File, list[tuple[str, str]]], ...]:
    """Every file with what made it, one line a value; what a file before it says in the same words is not said again."""
    said: set[tuple[str, str]] = set()
    found = []
    for file in findings.files:
        facts = _flat(file.made_from)
        found.append((file, [fact for fact in facts if fact not in said]))
        said.update(facts)
    return tuple(found)


def _flat(value: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """A mapping of mappings as (dotted name, text); what is empty or not given is left out."""
    found = []
    for key, item in value.items():
        if isinstance(item, dict):
            found += _flat(item, f"{before}{key}.")
        elif item is not None and item != []:
            found.append((f"{before}{key}", ", ".join(map(str, item)) if isinstance(item, list) else str(item)))
    return found


def commands(findings: Findings) -> History | Lacking:
    """What was typed, as far as that is remembered."""
    found = history(findings, _sums_of_plan(findings))
    return found if found.commands else Lacking("vitq profile MODEL --images PATH" + findings.option)


def _sums_of_plan(findings: Findings) -> Mapping[str, Any] | None:
    try:
        return summarize_plan(findings.plan, findings.profile) if findings.plan and findings.profile else None
    except InputError:  # of another model than what was calibrated, which is said elsewhere
        return None


SECTIONS: dict[str, tuple[str, Callable[[Findings], Any]]] = {
    "model": ("The model", model),
    "bit_map": ("Where the bits went", bit_map),
    "staircase": ("What a bit buys", staircase),
    "sensitivity": ("What each layer's bits are worth", sensitivity),
    "errors": ("What quantization does to each layer", errors),
    "close_up": ("The layers that hurt, close up", close_up),
    "accuracy": ("Accuracy", accuracy),
    "size": ("Size against plan", size),
    "latency": ("Latency", latency),
    "commands": ("How to make it again", commands),
    "provenance": ("Where everything came from", provenance),
}
"""The parts of the page, in its order: name in the template -> title, and what it says or lacks."""
