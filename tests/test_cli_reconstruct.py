"""`vitq calibrate --recipe reconstruct`: its options, its dry run, and going on after an interruption."""

import json
import shutil
from pathlib import Path

import pytest
from cli_session import make_chain, vitq

from vitq.calibration import reconstruct

RECONSTRUCT = ("calibrate", "--recipe", "reconstruct", "--iterations", 4, "--force")


def content(path: Path) -> tuple[dict, bytes]:
    """A checkpoint's header and its tensors; safetensors writes the header's entries in any order."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    assert [done.code for done in make_chain(folder)] == [0] * 4
    return folder


def test_it_goes_on_after_an_interruption(session: Path, monkeypatch: pytest.MonkeyPatch):
    run, learn, learned = session / "vitq-run", reconstruct.learn, []
    before = content(run / "model.safetensors")
    assert vitq(*RECONSTRUCT, folder=session).code == 0
    whole = content(run / "model.safetensors")
    assert whole != before and not (run / ".model.scratch").exists()

    def interrupted(*arguments, **keywords):
        learned.append(1)
        if len(learned) == 3:
            raise KeyboardInterrupt
        return learn(*arguments, **keywords)

    monkeypatch.setattr(reconstruct, "learn", interrupted)
    stopped = vitq(*RECONSTRUCT, folder=session)
    assert stopped.code == 130
    kept = "what is done is kept in vitq-run/.model.scratch; the same command again goes on there"
    assert stopped.err.splitlines()[-1] == f"vitq: interrupted; {kept}"
    assert content(run / "model.safetensors") == whole and (run / ".model.scratch").exists()
    done = vitq(*RECONSTRUCT, folder=session)
    assert done.code == 0 and "14 layers calibrated by recipe reconstruct on 24 images" in done.out
    assert len(learned) == 3 + 4 - 2  # four blocks, two of them done
    assert content(run / "model.safetensors") == whole and not (run / ".model.scratch").exists()


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(session: Path):
    before = sorted(path.name for path in (session / "vitq-run").iterdir())
    done = vitq("calibrate", "--recipe", "reconstruct", "--dry-run", folder=session)
    assert done.code == 0
    assert "recipe reconstruct would take about" in done.out and "of memory and" in done.out and "vitq-run/.model.scratch" in done.out
    document = vitq("calibrate", "--recipe", "reconstruct", "--dry-run", "--json", "--num-images", 12, folder=session).document
    assert document.keys() == {"recipe", "num_images", "seconds", "memory_bytes", "disk_bytes"} and document["num_images"] == 12
    assert sorted(path.name for path in (session / "vitq-run").iterdir()) == before


def test_options_of_the_other_recipe_are_refused(session: Path, tmp_path: Path):
    shutil.copytree(session, tmp_path / "session")
    done = vitq("calibrate", "--force", "--iterations", 5, folder=tmp_path / "session")
    assert done.code == 2 and "--iterations is for --recipe reconstruct or fima-q; recipe fast takes minutes" in done.err
    done = vitq(*RECONSTRUCT, "--num-images", 5, folder=session)
    assert done.code == 3 and "5 images are too few for recipe reconstruct; give --num-images at least 8, or --recipe fast" in done.err
