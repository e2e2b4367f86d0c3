"""Bad input to every command, as a table: the exit code, and what the message must say of the thing and of the remedy.

Every line is a command in a finished session. None may end with a traceback, say anything on stdout, or change a file.
"""

import shutil
from pathlib import Path

import pytest
from cli_session import make_chain, vitq

ON = ("--images", "images")
AGAIN = "--force"

USAGE: dict[str, tuple[str, ...]] = {
    # profile
    "profile": ("Missing argument", "model"),
    "profile model images": ("unexpected", "images"),
    "profile model --metrics x": ("--metrics", "--metric"),
    "profile model --run-dir new": ("no images were given", "--images"),
    "profile model --images images --force --bits ,": ("--bits ','", "3,4,5"),
    "profile model --images images --force --bits 4.0": ("--bits '4.0'", "3,4,5"),
    "profile model --images images --force --bits 1": ("--bits '1' is not understood", "from 2 to 8"),
    "profile model --images images --force --bits 1e300": ("--bits '1e300'", "from 2 to 8"),
    "profile model --images images --force --metric output_fisher": ("metric 'output_fisher'", "output-fisher"),
    "profile model --images images --force --num-images -1": ("--num-images", "greater than or equal to 1"),
    "profile model --images images --force --num-images ٣": ("--num-images", "valid integer"),
    "profile model --images images --force --num-images nan": ("--num-images", "valid integer"),
    "profile model --images images --force --batch-size 0": ("--batch-size", "greater than or equal to 1"),
    "profile model --images images --force --batch-size 1000000000000": ("--batch-size", "less than or equal to 1048576"),
    "profile model --images images --force --workers 1000000": ("--workers", "less than or equal to 1024"),
    "profile model --images images --force --seed 100000000000000000000": ("--seed", "less than or equal to"),
    "profile model --images images --force --seed -1": ("--seed", "greater than or equal to 0"),
    "profile model --images images --force --device meta": ("--device 'meta' cannot be used here", "give cpu"),
    "profile model --images images --force --device cuda:99": ("--device 'cuda:99' cannot be used here", "give cpu"),
    "profile model --images images --force --model-kwargs =3": ("--model-kwargs '=3'", "key=value"),
    "profile model --images images --force --lrp-rules foo": ("--lrp-rules", "chefer"),
    "profile model --images images --force -o model": ("model is a folder", "give -o a file"),
    "profile model --images images": ("vitq-run/profile.json exists already", "--force"),
    # allocate
    "allocate --force": ("neither a budget nor a uniform width", "--budget"),
    "allocate --budgets 4": ("--budgets", "--budget"),
    "allocate --force --budget nan": ("budget 'nan'", "4.0/8.0"),
    "allocate --force --budget inf": ("budget 'inf'", "average bits"),
    "allocate --force --budget -1": ("budget '-1'", "average bits"),
    "allocate --force --budget 1e300": ("budget '1e300'", "average bits"),
    "allocate --force --budget 4,0": ("budget '4,0'", "4.0"),
    "allocate --force --budget ٤": ("budget '٤'", "decimal"),
    "allocate --force --budget 4/4/4": ("budget '4/4/4'", "4.0/8.0"),
    "allocate --force --budget size=3": ("budget 'size=3'", "KB, MB"),
    "allocate --force --budget size=3XB": ("unit 'XB'", "KB, MB"),
    "allocate --force --budget speed=3": ("budget 'speed=3'", "latency=4.0ms"),
    "allocate --force --budget like=9": ("budget 'like=9'", "from 2 to 8"),
    "allocate --force --uniform 4.5": ("--uniform: '4.5'", "from 2 to 8"),
    "allocate --force --uniform 4 --budget 4": ("both budgets and a uniform width", "--uniform 4"),
    "allocate --force --budget 4 --bits 9": ("--bits '9'", "from 2 to 8"),
    "allocate --force --budget 4 --metric hawq": ("metric 'hawq' is not in the profile", "output-fisher"),
    "allocate --force --budget 4 --objective summ": ("objective 'summ'", "pairwise"),
    "allocate --force --budget 4 --gamma nan --objective gamma": ("--gamma nan", "above 1"),
    "allocate --force --budget 4 --gamma 4": ("--gamma has no meaning for objective 'sum'", "--objective gamma"),
    "allocate --force --budget 4 --preset lampq": ("metric 'lampq'", "vitq profile --metric lampq"),
    "allocate --force --budget 4 --gap -1": ("--gap", "greater than or equal to 0"),
    "allocate --force --budget 4 --fixed blocks": ("--fixed 'blocks'", "blocks.0.*=8"),
    "allocate --force --budget 4 --fixed nothing=4": ("matches no layer", "vitq show"),
    "allocate --force --uniform 4 --audit 2": ("--audit", "--budget 4.0"),
    "allocate --force --pareto x.txt": ("--pareto x.txt", ".json"),
    # calibrate
    "calibrate --force --recipe Fast": ("recipe 'Fast'", "fast"),
    "calibrate --force --iterations 5": ("--iterations", "--recipe reconstruct"),
    "calibrate --force --recipe reconstruct --iterations 0": ("--iterations", "greater than or equal to 1"),
    "calibrate --force -o images": ("images is a folder", "give -o a file"),
    # export
    "export --force --opset 0": ("--opset", "greater than or equal to 21"),
    "export --force --opset x": ("--opset", "valid integer"),
    "export --force --batch 1e3": ("--batch '1e3'", "a number of images"),
    "export --force --batch 1000000000000": ("--batch '1000000000000'", "at most"),
    "export --force --storage Packed": ("storage 'Packed'", "packed"),
    "export --force --storage standard": ("zero points", "vitq calibrate --symmetric"),
    # evaluate
    "evaluate vitq-run/model.onnx": ("needs images", "--images"),
    "evaluate model --verify": ("model is none", ".onnx"),
    "evaluate vitq-run/model.onnx --verify --min-top1 3": ("gates need images", "--images"),
    "evaluate vitq-run/model.onnx --images images --min-top1 nan": ("--min-top1", "0"),
    "evaluate vitq-run/model.onnx --images images --min-agreement -1": ("--min-agreement", "0"),
    "evaluate vitq-run/model.onnx --images images --max-kl -1": ("--max-kl", "0"),
    "evaluate model --images images --max-kl 1": ("--max-kl", "--reference"),
    # bench, report, synthesize, demo, and no command
    "bench --threads 0": ("--threads", "greater than or equal to 1"),
    "bench --batch 1000000000": ("--batch", "less than or equal to"),
    "bench --max-ms nan": ("--max-ms", "0"),
    "bench --layers --baselines": ("--layers", "--baselines"),
    "report vitq-run --run-dir other": ("two run folders", "give one"),
    "synthesize model --max-minutes nan -o new.safetensors": ("--max-minutes nan", "more than 0"),
    "synthesize model -o new.png": ("new.png", ".safetensors"),
    "demo --run-dir images": ("images exists already", "--force"),
    "bake": ("bake",),
    "--verison": ("--verison", "--version"),
}
"""Exit code 2."""

INPUT: dict[str, tuple[str, ...]] = {
    # what is not there
    "profile gone --images images": ("'gone' is no file, folder or timm model; give a path", "timm.list_models()"),
    "profile no_such_model_x --images images": ("'no_such_model_x' is no file, folder or timm model; give a path",),
    "profile deit_smal_patch16_224 --images images": ("(near: deit_small_patch16_224, deit3_small_patch16_224",),
    "profile vit_tny_patch16_224 --images images": ("'vit_tny_patch16_224'", "near: vit_tiny_patch16_224"),
    "profile model --images gone": ("gone does not exist", "give a folder of images"),
    "allocate gone.json --budget 4": ("gone.json does not exist", "vitq profile"),
    "allocate --force --budget 4 --latency-table gone.json": ("gone.json does not exist", "vitq bench --layers"),
    "allocate --force --budget latency=1ms": ("latency.json does not exist", "vitq bench --layers"),
    "calibrate --run-dir images": ("images/plan.json does not exist", "vitq allocate"),
    "bench gone.onnx": ("gone.onnx does not exist", "vitq export"),
    "bench --run-dir images": ("images/model.onnx does not exist", "vitq export"),
    "evaluate vitq-run/model.onnx --images images --reference gone": ("'gone' is no file", "timm"),
    "report gone": ("no folder gone", "vitq profile"),
    "report --force --images gone": ("gone does not exist", "give a folder of images"),
    # what is something else
    "profile vitq-run/plan.json --images images --force": ("vitq-run/plan.json is no MODEL", "give a timm local folder"),
    "profile vitq-run/model.onnx --images images --force": ("vitq-run/model.onnx is no MODEL", "give a timm local folder"),
    "profile vitq-run/model.safetensors --images images --force": ("not a float MODEL", "give the model that it was made from"),
    "profile images --images images --force": ("folder images has no config.json", "--arch"),
    "profile model --images model --force": ("model holds no images", "give a folder or .tar"),
    "profile model --images vitq-run/plan.json --force": ("vitq-run/plan.json is no source of images", "give a folder"),
    "profile model --images vitq-run/model.safetensors --force": ("`images` is None", "it must be uint8"),
    "profile model --images images/class0/0.png --force": ("0.png is no source of images", "give a folder"),
    "profile model --images images --force --explain model/config.json": ("config.json cannot be read as a picture", "give a PNG"),
    "allocate vitq-run/plan.json --budget 4 --force": ("not a vitq-profile/1 file", "vitq profile"),
    "allocate vitq-run/model.onnx --budget 4 --force": ("is no JSON but another kind of file", "vitq profile"),
    "allocate vitq-run --budget 4 --force": ("vitq-run is a folder", "give vitq-run/profile.json, or --run-dir vitq-run"),
    "allocate --force --budget latency=1ms --latency-table vitq-run/plan.json": ("not a vitq-latency/1 file", "vitq bench --layers"),
    "calibrate vitq-run/profile.json --force": ("not a vitq-plan/1 file", "vitq allocate"),
    "calibrate vitq-run/model.safetensors --force": ("is no JSON but another kind of file", "vitq allocate"),
    "calibrate --force --model images": ("folder images has no config.json", "config.json"),
    "calibrate --force --images model": ("model holds no images", "give a folder"),
    "export vitq-run/plan.json --force": ("vitq-run/plan.json is no calibrated model", "vitq calibrate"),
    "export model/model.safetensors --force": ("is not a calibrated model", "vitq calibrate"),
    "export vitq-run --force": ("vitq-run is a folder", "give vitq-run/model.safetensors, or --run-dir vitq-run"),
    "export --force --images vitq-run/plan.json": ("no source of images", "give a folder"),
    "evaluate vitq-run --images images": ("vitq-run is a run folder", "such as vitq-run/model.onnx"),
    "profile vitq-run --images images --force": ("vitq-run is a run folder, no MODEL", "--run-dir vitq-run to work in that folder"),
    "bench --layers vitq-run": ("vitq-run is a folder", "give vitq-run/profile.json, or --run-dir vitq-run"),
    "evaluate vitq-run/plan.json --images images": ("vitq-run/plan.json is nothing to evaluate", "an exported .onnx"),
    "evaluate vitq-run/model.onnx --images images --reference vitq-run/model.safetensors": ("not a float MODEL", "give the model"),
    "bench vitq-run": ("vitq-run is a folder", "give vitq-run/model.onnx, or --run-dir vitq-run"),
    "bench vitq-run/model.safetensors": ("vitq-run/model.safetensors is no ONNX file", "vitq export"),
    "bench --layers vitq-run/plan.json": ("not a vitq-profile/1 file", "vitq profile"),
    "report images": ("images holds nothing that vitq wrote", "vitq profile"),
    "synthesize vitq-run/model.safetensors -o new.safetensors": ("not a float MODEL", "give the model"),
    "show images": ("folder images has no config.json", "--arch"),
    "show images/class0/0.png": ("0.png is no MODEL", "give a timm local folder"),
    "show /dev/null": ("/dev/null does not exist", "give a timm local folder"),
    # what does not fit
    "profile model --images images --force --num-classes 7": ("head.weight: (5, 64) stored, (7, 64) needed", "--num-classes"),
    "profile model --images images --force --num-classes 1000000000000": ("cannot be built", "correct the model's arguments"),
    "profile model --images images --force --img-size 1000000000": ("cannot be built", "correct the model's arguments"),
    "profile model --images images --force --model-kwargs embed_dim=1000000000": (
        "1000000000 is more than",
        "correct the model's arguments",
    ),
    "profile model --images images --force --model-kwargs depth=60000": ("far more than", "correct the model's arguments"),
    "profile model --images images --force --model-kwargs depth=99": ("missing blocks.2.norm1.weight", "--model-kwargs"),
    "profile model --images images --force --model-kwargs nonsense=1": ("'nonsense'", "correct the model's arguments"),
    "profile model --images images --force --model-kwargs pretrained=true": ("'pretrained' cannot be used", "leave it out"),
    "profile model --images images --force --arch vit_tiny_patch16_224.nonsense": ("no weights 'nonsense'", "it has"),
    "profile model --images images --force --arch resnet18": ("does not fit resnet18", "--arch"),
    "profile model --images images --force -o model/config.json/x.json": ("a file where a folder is needed", "give a path"),
    "demo --run-dir model/config.json/x": ("a file where a folder is needed", "give a path"),
    "profile a\0b --images images": ("'a\\x00b' is no file", "give a path that exists"),
}
"""Exit code 3."""

BUDGET: dict[str, tuple[str, ...]] = {
    "allocate --force --budget 0": ("budget '0' cannot be met", "2 to 8", "raise the budget"),
    "allocate --force --budget size=1KB": ("budget 'size=1KB' cannot be met", "MB to", "raise the budget"),
    "allocate --force --budget bops=0": ("budget 'bops=0' cannot be met", "G to", "raise the budget"),
    "allocate --force --budget 4 --bits 5,6": ("budget '4' cannot be met", "5 to 6", "--bits"),
}
"""Exit code 4."""

TABLE = [(code, line, words) for code, table in ((2, USAGE), (3, INPUT), (4, BUDGET)) for line, words in table.items()]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    assert all(done.code == 0 for done in make_chain(folder))
    return folder


def state(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize(("code", "line", "words"), TABLE, ids=[line for _, line, _ in TABLE])
def test_bad_input(session: Path, code: int, line: str, words: tuple[str, ...]):
    before = state(session)
    done = vitq(*line.split(" "), folder=session)
    message = " ".join(done.err.replace("│", " ").split())
    assert done.code == code, done.err
    assert done.out == "" and "Traceback" not in message
    assert not [word for word in words if word not in message], message
    assert state(session) == before


def test_the_table_covers_every_command():
    commands = {line.split(" ")[0] for _, line, _ in TABLE}
    assert {"profile", "allocate", "calibrate", "export", "evaluate", "bench", "report", "synthesize", "show", "demo"} <= commands
    assert len(TABLE) >= 120


def test_a_checkpoint_that_changed_between_stages(session: Path, tmp_path: Path):
    spoilt = shutil.copytree(session, tmp_path / "session")
    weights = spoilt / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the last byte of the last tensor
    weights.write_bytes(content)
    for command in (("calibrate", "--force"), ("evaluate", "vitq-run/model.onnx", *ON)):
        done = vitq(*command, folder=spoilt)
        assert done.code == 3
        assert (
            "the weights of model are not those that" in done.err
            and "have changed" in done.err
            and "`vitq profile MODEL --images PATH --force` again" in done.err
        )
    (spoilt / "vitq-run" / "plan.json").write_text(
        (spoilt / "vitq-run" / "plan.json").read_text().replace('"weight_bits": 8', '"weight_bits": 7')
    )
    done = vitq("export", AGAIN, folder=spoilt)
    assert done.code == 3 and "calibrated to another plan" in done.err and "`vitq calibrate --force` again" in done.err
