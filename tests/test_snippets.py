"""The snippets of README.md and docs/ run as they stand, on the example model.

Blocks marked `python` and `sh` are run, page by page and top to bottom, in a folder that has what they name: `vitq`, `examples` and
pictures. A block under a comment `<!-- not run by the tests: WHY -->` is left out; blocks in other languages are not run.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from vitq import fitting, importance, quantizers
from vitq.allocation import objectives
from vitq.cli.app import app

ROOT = Path(__file__).parents[1]
README, *DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run by the tests: [^>]+ -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLE_MODEL = {"my_vit.safetensors --arch vit_small_patch16_224": "vitq/demo_data/vit_cifar10"}
"""What stands for a reader's own checkpoint."""
REGISTRIES = (importance.METRICS, quantizers.QUANTIZERS, fitting.FITS, objectives.OBJECTIVES)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The blocks that are to be run, as (language, text)."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(language, text) for left_out, language, text in found if language in ("python", "sh") and not left_out]


def has_shell(page: Path) -> bool:
    return any(language == "sh" for language, _ in blocks(page))


def run_page(page: Path, folder: Path) -> str:
    """Runs a page in a folder, which is the current one; returns what its shell said."""
    said, names = "", {"__name__": "__main__"}
    for number, (language, text) in enumerate(blocks(page)):
        if language == "sh":
            said += run_shell(text, folder)
        else:
            exec(compile(text, f"{page.name}, block {number}", "exec"), names)  # the point of the test: what a reader would paste
    return said


def run_shell(script: str, folder: Path) -> str:
    for placeholder, there in EXAMPLE_MODEL.items():
        script = script.replace(placeholder, there)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path, demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a reader has: a checkout, and pictures in two folders."""
    for name in ("vitq", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, source in (("calibration", "calibration.tar"), ("validation", "test.tar")):
        with tarfile.open(demo_data / source) as tar:
            tar.extractall(tmp_path / name, [member for member in tar if member.isfile()][::16], filter="data")
    shutil.copy(next((tmp_path / "validation").rglob("*.*")), tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def registries_kept() -> Iterator[None]:
    """Takes away again what a page adds to the dicts of metrics, quantizers and objectives."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, content in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(content)


@pytest.mark.slow
def test_the_readme_and_the_pages_that_go_on_in_the_shell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run_page(README, folder)
    assert "74 of 74 candidates run as integer kernels" in said
    made = {path.name for path in (folder / "vitq-run").iterdir()}
    assert made >= {"profile.json", "plan.json", "model.safetensors", "model.onnx", "evaluate.json", "bench.json", "report.html"}
    objective, gap, kl = map(float, capsys.readouterr().out.split())
    assert 0 < objective < 1 and 0 <= gap <= 1e-6 and 0 < kl < 0.1
    for page in filter(has_shell, DOCS):
        run_page(page, folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in DOCS if blocks(page) and not has_shell(page)], ids=lambda page: page.name)
def test_python_of_a_page(page: Path, folder: Path, registries_kept: None) -> None:
    run_page(page, folder)


def options_of(command: Any) -> set[str]:
    return {"--help"}.union(*([*parameter.opts, *parameter.secondary_opts] for parameter in command.params))


@pytest.mark.parametrize("page", [page for page in (README, *DOCS) if page.name != "log.md"], ids=lambda page: page.name)
def test_commands_and_options_that_a_page_names_exist(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    known = {name: options_of(command) for name, command in group.commands.items()}
    options = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
    text = "\n".join(line for line in page.read_text(encoding="utf-8").splitlines() if "*not yet*" not in line)
    shell = "\n".join(block for _, language, block in BLOCK.findall(text) if language == "sh")
    assert set(options.findall(text)) <= options_of(group).union(*known.values())
    inline, lines = r"`vitq ([a-z]+)([^`|;&]*)", r"(?:^ *|&& )vitq ([a-z]+)([^|;&#\n]*)"
    for command, rest in re.findall(inline, text) + re.findall(lines, shell, re.MULTILINE):
        assert command in known, f"vitq {command}{rest}"
        assert set(options.findall(rest)) <= known[command], f"vitq {command}{rest}"


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_blocks_that_are_left_out_say_why(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- not run") == sum(bool(left_out) for left_out, *_ in BLOCK.findall(text))
    never_run = re.findall(r"^    (?:vitq|bash|python) .*", BLOCK.sub("", text), re.MULTILINE)  # in an indented block
    assert never_run == []
