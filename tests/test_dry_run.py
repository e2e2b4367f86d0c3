"""`--dry-run`: what it counts, what it leaves alone, and that every command has the same document."""

import re
import shutil
import time
from pathlib import Path

import pytest
from cli_session import NUM_IMAGES, make_chain, make_images, make_model, vitq

from vitq.bench import child
from vitq.cli.dry_run import trial_size, tried, tried_twice
from vitq.cli.terminal import Terminal
from vitq.images import Images, open_images
from vitq.models import load


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    assert [done.code for done in make_chain(folder)] == [0] * 4
    return folder


def test_passes_are_drawn_out_and_the_rest_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a clock that only the work moves: 7 s once, two passes of 2 and 3 s an image (a first batch 10 s more), one that stops early."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    make_images(tmp_path / "images")
    images = open_images(tmp_path / "images", load(str(make_model(tmp_path / "model"))).data_config, 8, batch_size=4)

    def work(folder: Path) -> None:
        now[0] += 7
        for each in (2, 3):
            for index, (batch, _) in enumerate(images):
                now[0] += each * len(batch) + (10 if index == 0 else 0)
        for _ in images:
            now[0] += 50
            break
        (folder / "made").write_bytes(b"12345")

    found = tried(Terminal(True, False, False), work, images, 30, started=99.0)
    assert found["seconds"] == pytest.approx(1 + 7 + 50 + sum(10 + each * 30 for each in (2, 3)))
    assert (found["num_images"], found["disk_bytes"]) == (30, 5) and images.progress is None


def test_a_trial_is_two_batches():
    assert (trial_size(32), trial_size(8, 64), trial_size(64, 64)) == (64, 64, 128)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (("profile", "model", "--images", "images", "--batch-size", 4), NUM_IMAGES),
        (("calibrate", "--batch-size", 4), 24),
        (("calibrate", "--recipe", "repq-vit"), 24),
        (("export", "--batch-size", 4), 24),
        (("evaluate", "vitq-run/model.onnx", "--images", "images", "--batch-size", 4), NUM_IMAGES),
        (("synthesize", "model", "--num-images", 3, "--iterations", 9), 3),
        (("finetune", "--images", "images", "--batch-size", 4), NUM_IMAGES),
    ],
    ids=lambda value: " ".join(map(str, value[:3])) if isinstance(value, tuple) else "",
)
def test_every_long_command_has_one_that_writes_nothing(session: Path, arguments: tuple[object, ...], count: int):
    before = {path: path.read_bytes() for path in session.rglob("*") if path.is_file()}
    found = vitq(*arguments, "--dry-run", "--json", folder=session)
    assert found.code == 0, found.err
    assert found.document["num_images"] == count and 0 < found.document["seconds"] < 600
    assert (found.document["disk_bytes"] > 0) == (arguments[0] != "evaluate")
    assert {path: path.read_bytes() for path in session.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)], ids=["", "dry run"])
def test_minutes_that_do_not_suffice_for_a_step_of_every_batch_are_refused(session: Path, dry_run: tuple[str, ...]):
    asked = ("synthesize", "model", "--num-images", 1_000_000, "--batch-size", 10, "--max-minutes", 0.1)
    before = sorted(session.rglob("*"))
    found = vitq(*asked, *dry_run, folder=session)
    assert found.code == 2
    assert re.search(r"one step of each of 100000 batches takes about .* leaves no room for; give --max-minutes \d+", found.err), found.err
    assert sorted(session.rglob("*")) == before


@pytest.mark.slow
def test_a_finetunings_estimate_grows_with_its_epochs_up_to_its_minutes(session: Path, tmp_path: Path):
    asked = ("finetune", "--images", "images", "--batch-size", 4, "--epochs", 100_000, "--dry-run", "--json")
    assert vitq(*asked, folder=session).document["seconds"] > 3600
    folder = shutil.copytree(session, tmp_path / "uncalibrated")
    calibrated = folder / "vitq-run" / "model.safetensors"
    calibrated.unlink()
    assert vitq(*asked, "--max-minutes", 30, folder=folder).document["seconds"] == 1800
    assert not calibrated.exists()


@pytest.mark.slow
def test_an_estimate_of_disk_is_the_file(session: Path):
    said = vitq("export", "--dry-run", folder=session)
    assert "export would take about" in said.out and " of disk, in vitq-run" in said.out
    found = vitq("export", "--dry-run", "--json", folder=session).document
    assert found["disk_bytes"] == (session / "vitq-run" / "model.onnx").stat().st_size


def test_what_holds_all_images_grows_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a clock and a memory that only the work moves: 5 s and 3 s an image; 20 bytes an image and more that the few of a trial hide."""
    now, peak = [100.0], [500]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(child, "peak_memory", lambda: peak[0])
    monkeypatch.setattr(child, "present_memory", lambda: 400)
    make_images(tmp_path / "images")
    config = load(str(make_model(tmp_path / "model"))).data_config
    fewer, more = (open_images(tmp_path / "images", config, count) for count in (8, 16))

    def work(images: Images, folder: Path) -> list[float]:
        now[0] += 5 + 3 * images.num_listed
        peak[0] = 2000
        (folder / "made").write_bytes(b"12345")
        return [500, 30 + 20 * images.num_listed, 9 * images.num_listed]  # the second is the most of many images, not of few

    found = tried_twice(Terminal(True, False, False), work, fewer, more, 100, started=93.0)
    assert found == {"num_images": 100, "seconds": 7 + 5 + 3 * 100, "memory_bytes": 400 + 30 + 20 * 100, "disk_bytes": 5}
    assert tried_twice(Terminal(True, False, False), work, fewer, more, 20, started=93.0)["memory_bytes"] == 2000
