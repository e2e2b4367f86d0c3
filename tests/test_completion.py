"""Names after TAB: they are those of the registries, though no registry is imported for them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from cli_session import environment, vitq

from vitq.allocation.objectives import OBJECTIVES
from vitq.allocation.presets import PRESETS
from vitq.artifacts import MetricOptions
from vitq.calibration import RECIPES
from vitq.cli import completion
from vitq.cli.profile import profile
from vitq.finetune.training import RECIPES as TRAININGS
from vitq.importance import METRICS
from vitq.onnx_file.storage import STORAGES


def offered(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """What bash gets for the last of these words."""
    monkeypatch.setenv("_VITQ_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(("vitq", *words)))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    return vitq().out.split()


def test_registries_are_read_as_python_reads_them():
    for offer, registry in (
        (completion.metrics, METRICS),
        (completion.recipes, RECIPES),
        (completion.trainings, TRAININGS),
        (completion.storages, STORAGES),
        (completion.objectives, OBJECTIVES),
        (completion.presets, PRESETS),
    ):
        assert offer("") == list(registry)


def test_a_registry_that_moved_is_a_fault():
    with pytest.raises(LookupError, match=r"units.py has no METRICS"):
        completion.names_in("units.py", "METRICS")


REFUSED = {
    "calibrate --recipe soup": "recipe 'soup' is not known; give one of fast, ",
    "finetune --recipe fast": "recipe 'fast' is not known; give one of lsq, ofq",
    "profile model --metric sqnr --metric luck": "metric 'luck' is not known; give one of output-fisher, ",
    "profile model --sensitivity-baseline w4a4": "sensitivity baseline 'w4a4' is not known; give one of fp32, w8a8, uniform 2, ",
    "profile model --images . --bits 4,9": "--bits '4,9' is not understood; give widths from 2 to 8",
    "profile model --img-size 0": "--img-size",
    "profile model --explain gone.png": "gone.png does not exist; give --explain a PNG or JPEG file",
    "export --storage attic": "storage 'attic' is not known; give one of packed, ",
    "export --opset 26": "--opset",
    "synthesize model --max-minutes 0": "--max-minutes 0 cannot be used; give more than 0",
    "finetune --max-minutes nan": "--max-minutes nan cannot be used; give more than 0",
    "finetune --epochs 0": "--epochs 0 cannot be used; give more than 0",
    "finetune --hflip 2": "--hflip",
}


def test_what_needs_no_model_is_refused_before_torch_is_loaded(tmp_path: Path):
    (tmp_path / "model").mkdir()
    code = f"""
import sys
from vitq.cli.app import main
for words in {list(REFUSED)}:
    print(words, file=sys.stderr)
    try:
        main(words.split())
    except SystemExit as ended:
        print(ended.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["3 False" if "gone" in words else "2 False" for words in REFUSED]
    said = re.split("|".join(map(re.escape, REFUSED)), done.stderr)[1:]
    for words, message, expected in zip(REFUSED, said, REFUSED.values(), strict=True):
        assert expected in message, words


def test_a_shell_is_offered_names(monkeypatch: pytest.MonkeyPatch):
    assert offered(monkeypatch, "calibrate", "--recipe", "f") == [name for name in RECIPES if name.startswith("f")]
    assert offered(monkeypatch, "profile", "--metric", "sens") == ["sensitivity"]
    assert offered(monkeypatch, "profile", "--lrp-target", "") == ["pred", "label"]
    assert offered(monkeypatch, "allocate", "--objective", "nothing") == []
    assert "calibrate" in offered(monkeypatch, "cal")


def test_models_are_timms_names_and_what_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert completion.architectures("") == sorted(timm.list_models())
    (tmp_path / "deit_mine").mkdir()
    (tmp_path / "deit_[1].safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert offered(monkeypatch, "profile", "deit_t") == timm.list_models("deit_t*")
    assert offered(monkeypatch, "show", "deit_") == ["deit_[1].safetensors", "deit_mine", *timm.list_models("deit_*")]
    assert offered(monkeypatch, "show", "deit_[") == ["deit_[1].safetensors"]
    assert offered(monkeypatch, "synthesize", "") == ["deit_[1].safetensors", "deit_mine"]
    for words in (("profile", "x", "--arch"), ("evaluate", "x", "--reference"), ("calibrate", "--model")):
        assert offered(monkeypatch, *words, "swin_tiny_p") == timm.list_models("swin_tiny_p*")


def test_completion_can_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = vitq("--install-completion", "bash")
    assert done.code == 0, done.err
    written = [Path(folder) / name for folder, _, names in os.walk(tmp_path) for name in names]
    assert any("_VITQ_COMPLETE=complete_bash" in path.read_text() for path in written)


def test_the_options_of_metrics_default_as_in_python():
    """They are written out in the command, which must not load pydantic for its help."""
    defaults = MetricOptions().model_dump()
    given = dict(
        zip(
            profile.__code__.co_varnames[: profile.__code__.co_argcount][-len(profile.__defaults__ or ()) :],
            profile.__defaults__ or (),
            strict=True,
        )
    )
    assert {name: given[name] for name in defaults} == defaults
