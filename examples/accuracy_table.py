"""Accuracy of each recipe at each plan, mean and spread of seeds: the table of docs/accuracy.md.

    python examples/accuracy_table.py MODEL CALIBRATION_IMAGES TEST_IMAGES FOLDER [--recipes fast erq] [--plans uniform=4 3.0] [--seeds 0 1]

A cell is one recipe at one plan on one draw of calibration images. What exports is measured through onnxruntime, the rest as the
fake-quantized graph. Each cell is written to FOLDER/cells.jsonl as soon as it is measured, and is not measured again; at the end the
tables of all that the file holds are printed: KL from the float model (nats per image), agreement and top-1 (percent), each with its spread
over seeds (standard deviation) where there are several. The test images are held in memory, decoded once.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from vitq.accuracy import evaluate, onnx_runnable
from vitq.allocation import allocate
from vitq.artifacts import Profile, load_profile, save
from vitq.calibration import RECIPES, calibrate
from vitq.calibration.learning import Learning
from vitq.images import Images, open_images
from vitq.importance import profile
from vitq.models import LoadedModel, load
from vitq.onnx_file import export

PLANS = ["uniform=8", "uniform=6", "uniform=4", "uniform=3", "uniform=2", "4.0", "3.0", "2.5"]
FIGURES = {"kl": ("KL, nats per image", 4), "agreement": ("Agreement, %", 1), "top1": ("Top-1, %", 1)}
EXPORTED = ("fast", "reconstruct", "fima-q")


def main() -> None:
    """Measures the cells that are missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "test"):
        parser.add_argument(name)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipes", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-images", type=int, default=256, help="calibration images")
    parser.add_argument("--test-images", type=int, help="of the test set; all by default")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    cells = arguments.folder / "cells.jsonl"
    model = load(arguments.model)
    test = list(open_images(arguments.test, model.data_config, arguments.test_images, batch_size=100, class_names=model.label_names))
    with torch.no_grad():
        outputs = [model.module(batch) for batch, _ in test]
    for seed in arguments.seeds:
        images = open_images(arguments.calibration, model.data_config, arguments.num_images, seed, class_names=model.label_names)
        found = profiled(arguments.folder, model, images, seed)
        for plan in arguments.plans:
            for recipe in arguments.recipes:
                if (recipe, plan, seed) not in {(cell["recipe"], cell["plan"], cell["seed"]) for cell in read(cells)}:
                    cell = measured(model, found, images, test, outputs, recipe, plan, seed)
                    with cells.open("a") as file:
                        print(json.dumps(cell), file=file)
    print(tables(read(cells)))


def profiled(folder: Path, model: LoadedModel, images: Images, seed: int) -> Profile:
    """The profile of a draw of images, kept in the folder."""
    path = folder / f"profile-{images.num_listed}-{seed}.json"
    if not path.exists():
        save(profile(model, images, seed=seed), path)
    return load_profile(path)


def measured(model: LoadedModel, found: Profile, images: Images, test: list, outputs: list, recipe: str, plan: str, seed: int) -> dict:
    """One cell."""
    kind, _, value = plan.partition("=")
    chosen = allocate(found, uniform=value) if kind == "uniform" else allocate(found, [plan])
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        learning = {"learning": Learning(seed=seed, scratch=Path(folder) / "scratch")} if recipe == "reconstruct" else {}
        checkpoint = calibrate(model, chosen.plan, images, recipe=recipe, **learning)
        seconds = time.process_time() - started
        if recipe in EXPORTED:
            export(checkpoint, Path(folder) / "model.onnx", [batch for batch, _ in images])
            runnable = onnx_runnable(Path(folder) / "model.onnx")
        else:
            runnable = checkpoint.quantized_module()
        reference = iter(outputs)
        with torch.no_grad():
            result = evaluate(runnable, test, lambda _: next(reference))
    figures = {name: getattr(result, name).mean for name in ("kl", "agreement", "top1", "top1_change")}
    return {"recipe": recipe, "plan": plan, "seed": seed, "seconds": seconds, "kl_margin": result.kl.margin, **figures}  # type: ignore[union-attr]


def read(cells: Path) -> list[dict]:
    """The cells that were measured."""
    return [json.loads(line) for line in cells.read_text().splitlines()] if cells.exists() else []


def tables(cells: list[dict]) -> str:
    """Markdown: a table a figure, a row a recipe, a column a plan."""
    plans = sorted({cell["plan"] for cell in cells}, key=lambda plan: PLANS.index(plan) if plan in PLANS else len(PLANS))
    heading = [["recipe", *(plan.replace("uniform=", "uniform ") for plan in plans)], ["---"] * (len(plans) + 1)]
    found = []
    for name, (title, places) in FIGURES.items():
        rows = list(heading)
        for recipe in RECIPES:
            of_recipe = [[cell[name] for cell in cells if (cell["recipe"], cell["plan"]) == (recipe, plan)] for plan in plans]
            if any(of_recipe):
                rows.append([f"`{recipe}`", *(figure(values, places) for values in of_recipe)])
        found.append(f"{title}:\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join(found)


def figure(values: list[float], places: int) -> str:
    """The mean, with the spread of several."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{spread}"


if __name__ == "__main__":
    main()
