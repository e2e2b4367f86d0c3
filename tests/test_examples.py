"""The examples run as their docstrings say."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def printed(folder: Path, example: str) -> str:
    """What an example prints, run in a folder without arguments; a .sh finds the tests' own `vitq` and `python` on its path."""
    (folder / "bin").mkdir()
    for name, module in (("vitq", "-m vitq "), ("python", "")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module}"$@"\n')
        (folder / "bin" / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable if example.endswith(".py") else "bash", str(ROOT / "examples" / example)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(said: str, name: str) -> float:
    """The last value that `vitq evaluate` printed of a measure."""
    return float(re.findall(rf"^ *{name}\s+([\d.e+-]+)", said, re.MULTILINE)[-1])


@pytest.mark.slow
def test_the_python_api(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "python_api.py"), "made"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"plan.json", "model.safetensors", "model.onnx"}
    size, top1, kl = (float(part.split()[-2]) for part in done.stdout.replace(" from float", "").strip().split(", "))
    assert size <= 1.4 and top1 > 60 and 0 < kl < 0.02


@pytest.mark.slow
def test_comparing_metrics(tmp_path: Path) -> None:
    rows = [line.strip("| ").split(" | ") for line in printed(tmp_path, "compare_metrics.py").splitlines()[2:]]
    assert [row[:2] for row in rows] == [["3.0", "output-fisher"], ["3.0", "sqnr"], ["3.0", "random"]]
    kl = [float(row[2].split()[0]) for row in rows]
    assert 0 < kl[0] < kl[2]  # better than bits by chance


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_swin(tmp_path: Path) -> None:
    said = printed(tmp_path, "swin.sh")
    assert "model: swin_tiny_patch4_window7_224, 10 classes" in said and "layers.0.blocks.0" in said
    assert measured(said, "kl") < 0.1 and (tmp_path / "swin-run" / "model.onnx").is_file()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_checkpoint_of_ones_own(tmp_path: Path) -> None:
    said = printed(tmp_path, "finetuned.sh")
    assert said.startswith("model: vit_tiny_patch16_224, 10 classes, 74 layers")
    first, last = (float(value) for value in re.findall(r"^ *top1\s+([\d.]+)", said, re.MULTILINE))
    assert first > 60 and abs(first - last) < 6 and measured(said, "agreement") > 90
    plan = json.loads((tmp_path / "finetuned-run" / "plan.json").read_text())
    assert plan["model"]["label_names"][:2] == ["airplane", "automobile"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_latency_budget(tmp_path: Path) -> None:
    said = printed(tmp_path, "latency_budget.sh")
    predicted = float(re.search(r"^latency +([\d.]+) ms predicted", said, re.MULTILINE)[1])  # type: ignore[index]
    whole = json.loads((tmp_path / "latency-run" / "latency.json").read_text())["made_from"]["whole_ms"]
    assert predicted <= (whole["8"] + whole["below"]) / 2 + 0.001
    assert re.search(r"^latency-run/model.onnx\s+1\s+[\d.]+", said, re.MULTILINE)


@pytest.mark.slow
def test_the_table_of_accuracies(tmp_path: Path) -> None:
    data = ROOT / "vitq" / "demo_data"
    script = [
        str(ROOT / "examples" / "accuracy_table.py"),
        str(data / "vit_cifar10"),
        str(data / "calibration.tar"),
        str(data / "test.tar"),
    ]
    options = ["--num-images", "32", "--test-images", "100", "--plans", "uniform=8", "uniform=2", "--recipes", "fast", "--seeds"]

    def run(*seeds: str) -> str:
        command = [sys.executable, *script, str(tmp_path), *options, *seeds]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run("0")
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [(cell["recipe"], cell["plan"], cell["seed"]) for cell in cells] == [("fast", "uniform=8", 0), ("fast", "uniform=2", 0)]
    assert 0 < 10 * cells[0]["kl"] < cells[1]["kl"]
    assert f"| `fast` | {cells[0]['kl']:.4f} | {cells[1]['kl']:.4f} |" in first and "Top-1, %:" in first
    doubled = [cell | {"seed": 1, "kl": cell["kl"] + 0.02} for cell in cells]  # measured already, as it seems
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.writelines(json.dumps(cell) + "\n" for cell in doubled)
    assert f"| `fast` | {cells[0]['kl'] + 0.01:.4f} ± {0.02 / 2**0.5:.4f} | " in run("0")
