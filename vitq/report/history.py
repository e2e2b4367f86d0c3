"""The commands that make the folder again, as far as its artifacts remember them; nothing is guessed.

`profile`, `allocate` and `calibrate` leave in `made_from` what they were given. Not remembered, and so not said: options of single
metrics, batch sizes and devices, the storage of the exported file, and how `evaluate` and `bench` were called.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitq.artifacts import WIDTHS
from vitq.report.findings import Asked, Findings, asked


@dataclass(frozen=True)
class History:
    """Commands in order, and what is known to be missing from them."""

    commands: tuple[str, ...]
    remarks: tuple[str, ...]


def history(findings: Findings, sums: Mapping[str, Any] | None) -> History:
    """What makes the folder's artifacts again.

    Args:
        findings: what the folder holds.
        sums: of plan.json's layers as they are now; where those that it remembers differ, it was edited after it was made.
    """
    commands, remarks = [], []
    profile, plan = findings.profile, findings.plan
    if profile is not None and (sources := _sources(profile.made_from)):
        widths = sorted({bits for table in profile.costs.values() for bits in table.bits})
        words = ["vitq", "profile", *sources[0], *sources[1], *(word for metric in profile.costs for word in ("--metric", metric))]
        words += ["--bits", ",".join(map(str, widths))] if tuple(widths) != WIDTHS else []
        commands.append(_line(words, findings))
    if plan is not None and (wishes := asked(plan)) is not None:
        refine = ["--refine"] if plan.summary.get("status") == "refined by measuring" else []
        commands.append(_line(["vitq", "allocate", *_words(wishes), *refine], findings))
        if sums is not None and any(plan.summary.get(key) != sums[key] for key in ("size_bytes", "bops")):
            remarks.append("plan.json was edited after that.")
    elif plan is not None:
        remarks.append("plan.json does not say what was asked of allocate.")
    made_from = findings.file("model.safetensors")
    calibration = made_from.made_from.get("calibration") if made_from else None
    if made_from and isinstance(calibration, dict):
        words = ["vitq", "calibrate", "--recipe", str(calibration.get("recipe"))]
        words += ["--symmetric"] if calibration.get("symmetric") else []
        words += ["--iterations", str(calibration["iterations"])] if "iterations" in calibration else []
        others = calibration.get("images") != made_from.made_from.get("images")
        commands.append(_line([*words, *(_images(calibration.get("images")) if others else [])], findings))
    finetuning = made_from.made_from.get("finetuning") if made_from else None
    if isinstance(finetuning, dict):
        words = ["vitq", "finetune", "--recipe", str(finetuning.get("recipe")), *_images(finetuning.get("images"))]
        commands.append(_line([*words, *_trained(finetuning)], findings))
    if findings.file("model.onnx") is not None and commands:
        commands.append(_line(["vitq", "export"], findings))
    return History(tuple(commands), tuple(remarks))


def _line(words: list[str], findings: Findings) -> str:
    return shlex.join(words) + findings.option


def _sources(made_from: Mapping[str, Any]) -> tuple[list[str], list[str]] | None:
    """The words for the model and for the images; None where one of them is not remembered."""
    model, images = made_from.get("model"), _images(made_from.get("images"))
    if not isinstance(model, dict) or "source" not in model or not images:
        return None
    words, options = [str(model["source"])], model.get("options")
    options = options if isinstance(options, dict) else {}
    for name in ("arch", "num_classes", "img_size"):
        words += [f"--{name.replace('_', '-')}", str(options[name])] if options.get(name) is not None else []
    arguments = options.get("model_kwargs")
    for name, value in (arguments if isinstance(arguments, dict) else {}).items():
        words += ["--model-kwargs", f"{name}={value}"]
    return words, images


def _images(source: Any) -> list[str]:
    if not isinstance(source, dict) or "source" not in source:
        return []
    words = ["--images", str(source["source"])]
    for name in ("num_images", "seed"):
        words += [f"--{name.replace('_', '-')}", str(source[name])] if name in source else []
    return words


def _words(wishes: Asked) -> list[str]:
    words = [word for budget in wishes.budgets for word in ("--budget", budget)]
    words += ["--uniform", wishes.uniform] if wishes.uniform else []
    words += ["--metric", wishes.metric] if wishes.metric else []
    words += ["--objective", wishes.objective] if wishes.objective not in (None, "sum") else []
    words += ["--gamma", f"{wishes.gamma:g}"] if wishes.gamma is not None else []
    words += ["--bits", ",".join(map(str, wishes.bits))] if wishes.bits and wishes.bits != WIDTHS else []
    words += ["--bits-apart"] if wishes.bits_apart else []
    return [*words, *(word for text in wishes.fixed for word in ("--fixed", text))]


def _trained(finetuning: Mapping[str, Any]) -> list[str]:
    options = {"epochs": "--epochs", "minutes": "--max-minutes", "rate": "--lr", "other_rates": "--other-lrs", "batch_size": "--batch-size"}
    return [word for key, option in options.items() if finetuning.get(key) is not None for word in (option, str(finetuning[key]))]
