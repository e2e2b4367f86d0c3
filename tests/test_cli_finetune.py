"""`vitq finetune`: from a plan to a trained model.safetensors that exports and verifies, interrupted and gone on with, and its faults."""

import shutil
from pathlib import Path

import pytest
from cli_session import make_images, make_model, vitq
from test_cli_reconstruct import content

from vitq import checkpoint as checkpoints
from vitq.finetune import learner

FINETUNE = ("finetune", "--images", "images", "--epochs", 6, "--batch-size", 8)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, images, a profile and a plan of two bits."""
    folder = tmp_path_factory.mktemp("session")
    make_model(folder / "model")
    make_images(folder / "images")
    assert vitq("profile", "model", "--images", "images", "--num-images", 24, "--batch-size", 8, folder=folder).code == 0
    assert vitq("allocate", "--uniform", 2, folder=folder).code == 0
    return folder


@pytest.fixture
def session(planned: Path, tmp_path: Path) -> Path:
    shutil.copytree(planned, tmp_path / "session")
    return tmp_path / "session"


@pytest.mark.slow
def test_a_finetuned_model_exports_verifies_and_loads(session: Path):
    run = session / "vitq-run"
    done = vitq(*FINETUNE, folder=session)  # calibrates first
    assert done.code == 0, done.err
    assert "24 steps by recipe lsq, 6.00 epochs" in done.out and "next: vitq export" in done.err
    calibrated, trained = checkpoints.load(run / "calibrated.safetensors"), checkpoints.load(run / "model.safetensors")
    assert "finetuning" not in calibrated.made_from and trained.made_from["finetuning"]["images"]["source"] == "images"
    assert calibrated.plan == trained.plan and content(run / "calibrated.safetensors") != content(run / "model.safetensors")
    assert not list(run.glob(".model*"))
    exported = vitq("export", "--json", folder=session)
    assert exported.code == 0 and exported.document["code_mismatch"] <= 1e-4
    losses = [
        vitq("evaluate", f"vitq-run/{name}", "--images", "images", "--json", folder=session).document["kl"]
        for name in ("calibrated.safetensors", "model.safetensors", "model.onnx")
    ]
    assert losses[1] < losses[0] and losses[2] == pytest.approx(losses[1], rel=0.1)
    shown = vitq("show", "vitq-run", folder=session)
    said = " ".join(shown.out.split())
    assert shown.code == 0 and "2 to 8 bits, fine-tuned" in said and "the model before it was fine-tuned" in said
    assert vitq("report", folder=session).code == 0
    assert "finetune" in (run / "report.html").read_text()
    before = content(run / "calibrated.safetensors")
    again = vitq(*FINETUNE, "--json", "--recipe", "ofq", folder=session)  # from the trained one; the calibrated one stays
    assert again.code == 0 and content(run / "calibrated.safetensors") == before
    assert again.document.keys() == {
        "output", "recipe", "steps", "epochs", "loss_before", "loss_after", "judged_on", "num_images", "skipped", "seconds"
    }  # fmt: skip


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bytes(session: Path, monkeypatch: pytest.MonkeyPatch):
    run = session / "vitq-run"
    assert vitq("calibrate", folder=session).code == 0
    start = content(run / "model.safetensors")
    assert vitq(*FINETUNE, folder=session).code == 0
    whole = content(run / "model.safetensors")
    shutil.copy(run / "calibrated.safetensors", run / "model.safetensors")
    step, taken = learner.Learner.step, []

    def interrupted(self, *arguments):
        taken.append(1)
        if len(taken) == 6:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(learner.Learner, "step", interrupted)
    command = (*FINETUNE, "--save-minutes", 0)
    assert vitq(*command, folder=session).code == 130
    assert content(run / "model.safetensors") == start and (run / ".model.finetuning.safetensors").exists()
    other = vitq(*command, "--lr", 0.02, folder=session)
    assert other.code == 2 and "is of a fine-tuning with other options" in other.err
    assert vitq(*command, folder=session).code == 0
    assert len(taken) == 6 + 24 - 5 and content(run / "model.safetensors") == whole


@pytest.mark.slow
def test_a_run_keeps_to_its_minutes(session: Path):
    """By steps that are timed, so only about: a machine may be busy with other things."""
    assert vitq("calibrate", folder=session).code == 0
    done = vitq(*FINETUNE[:3], "--batch-size", 8, "--epochs", 100_000, "--max-minutes", 0.3, "--json", folder=session)
    assert done.code == 0 and 1 < done.document["steps"] < 10_000


@pytest.mark.slow
def test_labels_need_other_images_to_judge_on(session: Path):
    worse = ("--hard", 1, "--lr", 50, "--other-lrs", 3000, "--epochs", 1, "--no-resume")
    done = vitq(*FINETUNE[:3], "--batch-size", 8, *worse, "--validation", "images", "--json", folder=session)
    assert done.code == 0 and done.document["output"] is None
    assert done.document["judged_on"] == {"source": "images", "num_images": 40, "fair": True}
    done = vitq(*FINETUNE[:3], "--batch-size", 8, *worse, folder=session)
    assert done.code == 0 and "these images do not say whether it is better" in done.err and "model.safetensors" in done.out
    assert "calibrated.safetensors holds the model before training" in " ".join(done.err.split())


@pytest.mark.slow
def test_faults_say_what_to_do(session: Path):
    def refused(code: int, text: str, *arguments: object) -> None:
        done = vitq("finetune", *arguments, folder=session)
        assert done.code == code and text in done.err, done.err

    refused(2, "no images were given; give --images a folder of class folders, a .tar of one or an images.safetensors")
    refused(3, "elsewhere does not exist", "--images", "elsewhere")
    refused(2, "recipe 'qat' is not known; give one of lsq, ofq", "--images", "images", "--recipe", "qat")
    refused(3, "other/plan.json does not exist", "other/plan.json", "--images", "images")
    refused(3, "elsewhere does not exist", "--images", "images", "--validation", "elsewhere")
    assert vitq("calibrate", folder=session).code == 0
    refused(3, "5 images are too few to train on; give --images with at least 16", "--images", "images", "--num-images", 5)
    assert vitq("allocate", "--uniform", 3, "--force", folder=session).code == 0
    refused(3, "model.safetensors was calibrated to another plan than", "--images", "images")
    assert sorted(path.name for path in (session / "vitq-run").iterdir()) == ["model.safetensors", "plan.json", "profile.json"]
