"""What every test file may use: the example model and images that come with the package; no network, no chance."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

import vitq

# Before torch and huggingface_hub are imported: a test that would fetch something fails, and parallel workers do not fight for cores.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("vitq", deadline=None, derandomize=True)
settings.load_profile("vitq")


@pytest.fixture(scope="session")
def demo_data() -> Path:
    """The folder of the example data: `vit_cifar10/` (float16), `calibration.tar` (512 images), `test.tar` (1,000 images)."""
    return Path(vitq.__file__).parent / "demo_data"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny `model`, `images` and a finished `vitq-run`; to be read, not changed."""
    from cli_session import make_chain

    folder = tmp_path_factory.mktemp("finished")
    assert all(done.code == 0 for done in make_chain(folder))
    return folder


@pytest.fixture
def session(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished folder, free to be spoilt."""
    return shutil.copytree(finished, tmp_path / "session")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table of the timm families that were tested, in whichever process."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    rows = [value for report in reports if report.when == "call" for name, value in report.user_properties if name == "family"]
    if rows:
        from families import HEADING

        terminalreporter.write_line("\n".join(["", HEADING, *sorted(rows)]))
