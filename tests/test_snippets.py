"""The snippets of README.md and docs/ run as they stand, on the example model.

Blocks marked `python` and `sh` are run, page by page and top to bottom, in a folder that has what they name: `vitq`, `examples`, pictures
and a finished run folder. A block under a comment `<!-- not run by the tests: WHY -->` is left out; blocks in other languages are not run.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import typer

from vitq.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- not run by the tests: [^>]+ -->\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLE_MODEL = {"my_vit.safetensors --arch vit_small_patch16_224": "vitq/demo_data/vit_cifar10"}
"""What stands for a reader's own checkpoint."""


def blocks(page: Path, language: str) -> list[str]:
    return [text for left_out, found, text in BLOCK.findall(page.read_text()) if found == language and not left_out]


def run_shell(script: str, folder: Path) -> str:
    for placeholder, there in EXAMPLE_MODEL.items():
        script = script.replace(placeholder, there)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Path:
    """A folder in which the README's seven commands have run, in fewer images than a reader would take."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("vitq", "examples"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("calibration", "validation"):
        with tarfile.open(demo_data / f"{name.replace('validation', 'test')}.tar") as tar:
            tar.extractall(folder / name, [member for member in tar if member.isfile()][::16], filter="data")
    shutil.copy(next((folder / "validation").rglob("*.*")), folder / "cat.jpg")
    (seven,) = blocks(ROOT / "README.md", "sh")
    (folder / "said.txt").write_text(run_shell(seven, folder))
    return folder


@pytest.mark.slow
def test_the_readme_s_seven_commands(finished: Path) -> None:
    made = {path.name for path in (finished / "vitq-run").iterdir()}
    assert made >= {"profile.json", "plan.json", "model.safetensors", "model.onnx", "evaluate.json", "bench.json", "report.html"}
    assert "74 of 74 candidates run as integer kernels" in (finished / "said.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "sh")], ids=lambda page: page.name)
def test_shell_of_the_docs(page: Path, finished: Path) -> None:
    for script in blocks(page, "sh"):
        run_shell(script, finished)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_of_a_page(page: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(finished)
    restore_registries(monkeypatch)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)  # the point of the test: what a reader would paste
    if page.name == "README.md":
        objective, gap, kl = map(float, capsys.readouterr().out.split())
        assert 0 < objective < 1 and 0 <= gap <= 1e-6 and 0 < kl < 0.1


def restore_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the dicts that extending.md adds to as they were, afterwards."""
    from vitq import fitting, importance, quantizers
    from vitq.allocation import objectives

    for module, name in ((importance, "METRICS"), (quantizers, "QUANTIZERS"), (fitting, "FITS"), (objectives, "OBJECTIVES")):
        registry = getattr(module, name)
        for key in ("peaks", "square-root", "careful"):
            if key not in registry:
                monkeypatch.setitem(registry, key, None)
                monkeypatch.delitem(registry, key)


def commands() -> dict[str, set[str]]:
    """Every command, and its options with their short forms."""
    group = typer.main.get_command(app)
    return {name: {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)} for name, command in group.commands.items()}  # type: ignore[attr-defined]


OTHERS = {"--help", "--version"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name)
def test_commands_and_options_that_a_page_names_exist(page: Path) -> None:
    known = commands()
    lines = [line for line in page.read_text().splitlines() if "*not yet*" not in line]
    options = {option for options in known.values() for option in options} | OTHERS
    for line in lines:
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", line)) <= options, line
        for command, rest in re.findall(r"`vitq ([a-z]+)([^`|;&]*)", line):
            assert command in known, line
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", rest)) <= known[command] | OTHERS, line


def test_left_out_blocks_say_why() -> None:
    for page in PAGES:
        assert page.read_text().count("<!-- not run") == sum(bool(left_out) for left_out, *_ in BLOCK.findall(page.read_text())), page
