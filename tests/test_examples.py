"""The examples run as their docstrings say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_python_api(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "python_api.py"), "made"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"plan.json", "model.safetensors", "model.onnx"}
    size, top1, kl = (float(part.split()[-2]) for part in done.stdout.replace(" from float", "").strip().split(", "))
    assert size <= 1.4 and top1 > 60 and 0 < kl < 0.02
