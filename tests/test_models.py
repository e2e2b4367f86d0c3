import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vitq.errors import InputError
from vitq.models import LoadedModel, build, load

ARGUMENTS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ARCHITECTURE = "vit_tiny_patch16_224"


def tiny(num_classes: int = 5, **arguments) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, num_classes=num_classes, **{**ARGUMENTS, **arguments}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def config(**more) -> dict:
    return {"architecture": ARCHITECTURE, "model_args": ARGUMENTS, **more}


def folder(path: Path, tensors: dict | None = None, stored: dict | None = None) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tiny().state_dict() if tensors is None else tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config() if stored is None else stored))
    return path


def outputs_agree(loaded: LoadedModel, expected: nn.Module, size: int = 32) -> bool:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        # fused and unfused attention round differently
        return torch.allclose(loaded.module(images), expected.eval()(images), rtol=1e-4, atol=1e-5)


def test_folder_that_timm_wrote_loads_as_timm_loads_it(tmp_path):
    expected = tiny()
    expected.pretrained_cfg.update(input_size=(3, 32, 32), mean=(0.1, 0.2, 0.3), crop_pct=1.0)
    timm.models.save_for_hf(expected, str(tmp_path), model_config={"label_names": list("abcde")}, safe_serialization=True)
    loaded = load(str(tmp_path))
    assert outputs_agree(loaded, expected) and not loaded.module.training
    assert (loaded.num_classes, loaded.label_names, loaded.architecture) == (5, tuple("abcde"), ARCHITECTURE)
    reference = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.data_config == json.loads(json.dumps(timm.data.resolve_model_data_config(reference)))
    assert loaded.data_config["mean"] == [0.1, 0.2, 0.3] and loaded.data_config["input_size"] == [3, 32, 32]
    assert loaded.digest == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.source == str(tmp_path)


def test_build_makes_the_same_architecture_again_from_json(tmp_path):
    loaded = load(str(folder(tmp_path)))
    again = build(loaded.architecture, json.loads(json.dumps(loaded.arguments)), loaded.num_classes)
    again.load_state_dict(loaded.module.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), loaded.module(images)) and not again.training


def test_attention_is_unfused_and_timms_switch_is_put_back(tmp_path):
    timm.layers.set_fused_attn(True)
    loaded = load(str(folder(tmp_path)))
    assert not any(getattr(module, "fused_attn", False) for module in loaded.module.modules())
    assert timm.layers.use_fused_attn()


def test_a_config_as_the_readme_has_it_describes_a_bare_file(demo_data, tmp_path):
    (described,) = re.findall(r"```json\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    (tmp_path / "config.json").write_text(described)
    tensors = load_file(demo_data / "vit_cifar10" / "model.safetensors")
    save_file(tensors, tmp_path / "my_vit.safetensors")
    loaded = load(str(tmp_path / "my_vit.safetensors"))
    assert loaded.data_config["mean"] == [0.49, 0.48, 0.45] and loaded.data_config["input_size"] == [3, 32, 32] and not loaded.resampled
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.module(images), load(str(demo_data / "vit_cifar10")).module(images))


def test_input_size_in_the_config_shapes_the_model(tmp_path):
    arguments = {key: value for key, value in ARGUMENTS.items() if key != "img_size"}
    stored = config(model_args=arguments, pretrained_cfg={"input_size": [3, 32, 32], "fixed_input_size": True})
    loaded = load(str(folder(tmp_path, stored=stored)))
    assert loaded.arguments["img_size"] == 32 and loaded.data_config["input_size"] == [3, 32, 32]
    assert outputs_agree(loaded, tiny())


def test_older_config_with_the_pooling_beside_the_arguments(tmp_path):
    expected = tiny(global_pool="avg")
    loaded = load(str(folder(tmp_path, expected.state_dict(), config(global_pool="avg"))))
    assert loaded.arguments["global_pool"] == "avg" and outputs_agree(loaded, expected)


def test_label_names_by_index_and_of_another_length(tmp_path):
    names = {str(i): f"class {i}" for i in (4, 0, 3, 1, 2)}
    assert load(str(folder(tmp_path, stored=config(label_names=names)))).label_names == tuple(f"class {i}" for i in range(5))
    assert load(str(folder(tmp_path, stored=config(label_names=["one"])))).label_names == ()


@pytest.mark.parametrize("wrap", [
    lambda tensors: tensors,
    lambda tensors: {"state_dict": tensors, "epoch": 3},
    lambda tensors: {"model": tensors, "optimizer": {"lr": 0.1}},
    lambda tensors: {"model": {name: tensor + 1 for name, tensor in tensors.items()}, "model_ema": tensors},
    lambda tensors: {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}},
    lambda tensors: {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()},
    lambda tensors: {"n_averaged": torch.tensor(7)} | {f"module.{name}": tensor for name, tensor in tensors.items()},
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin"])
def test_wrappings_are_undone(tmp_path, wrap, name):
    expected = tiny()
    torch.save(wrap(expected.state_dict()), tmp_path / name)
    loaded = load(str(tmp_path / name), arch=ARCHITECTURE, model_kwargs=ARGUMENTS)
    assert outputs_agree(loaded, expected) and loaded.num_classes == 5


def test_safetensors_file_reads_the_config_beside_it_unless_arch_differs(tmp_path):
    file = str(folder(tmp_path) / "model.safetensors")
    assert outputs_agree(load(file), tiny())
    with pytest.raises(InputError, match="does not fit vit_small_patch16_224"):
        load(file, arch="vit_small_patch16_224", model_kwargs={"depth": 1})
    (tmp_path / "config.json").unlink()
    assert outputs_agree(load(file, arch=ARCHITECTURE, model_kwargs=ARGUMENTS), tiny())
    with pytest.raises(InputError, match="nothing says which architecture .* give --arch NAME"):
        load(file)


def test_architecture_stored_by_timms_training_script(tmp_path):
    expected = timm.create_model("test_vit", num_classes=4)
    torch.save({"arch": "test_vit", "state_dict": expected.state_dict()}, tmp_path / "last.pth")
    loaded = load(str(tmp_path / "last.pth"))
    assert loaded.architecture == "test_vit" and loaded.num_classes == 4 and outputs_agree(loaded, expected, size=160)


def test_headless_models(tmp_path):
    headless = tiny(num_classes=0)
    for stored in (config(num_classes=0), config()):
        loaded = load(str(folder(tmp_path, headless.state_dict(), stored)))
        assert loaded.num_classes == 0 and outputs_agree(loaded, headless)
    assert build(loaded.architecture, loaded.arguments, 0)(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    dropped = load(str(folder(tmp_path)), num_classes=0)
    assert dropped.num_classes == 0 and dropped.module(torch.zeros(1, 3, 32, 32)).shape == (1, 32)


def test_half_precision_becomes_float32_and_integers_stay(tmp_path):
    expected = timm.create_model("test_resnet", num_classes=3).bfloat16()
    expected.bn1.num_batches_tracked.fill_(16_777_217)  # not a float32
    folder(tmp_path, expected.state_dict(), {"architecture": "test_resnet"})
    state = load(str(tmp_path)).module.state_dict()
    assert state["bn1.num_batches_tracked"].item() == 16_777_217
    assert state["conv1.0.weight"].dtype == torch.float32
    assert torch.equal(state["conv1.0.weight"], expected.state_dict()["conv1.0.weight"].float())


def test_another_image_size_on_request_only(tmp_path):
    folder(tmp_path)
    loaded = load(str(tmp_path), img_size=64)
    assert loaded.arguments["img_size"] == 64 and loaded.data_config["input_size"] == [3, 64, 64]
    assert loaded.module(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    assert loaded.resampled == ("pos_embed from (1, 17, 32) to (1, 65, 32)",) and not load(str(tmp_path)).resampled
    assert load(str(tmp_path), model_kwargs={"img_size": 64}).data_config["input_size"] == [3, 64, 64]
    folder(tmp_path, stored=config(model_args={**ARGUMENTS, "img_size": 64}))
    with pytest.raises(InputError, match=r"wrong shape pos_embed: \(1, 17, 32\) stored, \(1, 65, 32\) needed.*--img-size"):
        load(str(tmp_path))


@pytest.mark.parametrize("size", [32, 64, None])
def test_a_patch_embedding_of_another_size_is_another_model(tmp_path, size):
    save_file(tiny().state_dict(), tmp_path / "bare.safetensors")
    arguments = {key: value for key, value in ARGUMENTS.items() if key not in ("patch_size", "img_size")}  # timm's: 16, 224
    given = {"arch": ARCHITECTURE, "img_size": size}
    shapes = r"wrong shape patch_embed.proj.weight: \(32, 3, 8, 8\) stored, \(32, 3, 16, 16\) needed"
    with pytest.raises(InputError, match=f"{shapes}; .*add --model-kwargs patch_size=8; else"):
        load(str(tmp_path / "bare.safetensors"), **given, model_kwargs=arguments)
    with pytest.raises(InputError, match="add --model-kwargs patch_size=8 --model-kwargs embed_dim=32; else"):
        load(str(tmp_path / "bare.safetensors"), **given, model_kwargs=arguments | {"embed_dim": 64})
    loaded = load(str(tmp_path / "bare.safetensors"), arch=ARCHITECTURE, img_size=size or 32, model_kwargs=arguments | {"patch_size": 8})
    assert bool(loaded.resampled) == (size == 64)


def test_relative_positions_are_resampled_and_said_to_be(tmp_path):
    arguments = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4}
    architecture = "swin_tiny_patch4_window7_224"
    save_file(timm.create_model(architecture, num_classes=6, img_size=64, **arguments).state_dict(), tmp_path / "swin.safetensors")
    given = {"arch": architecture, "img_size": 48}
    loaded = load(str(tmp_path / "swin.safetensors"), **given, model_kwargs=arguments | {"window_size": 3})
    assert [line.split(" from ")[1] for line in loaded.resampled] == ["(49, 1) to (25, 1)"] * 2
    with pytest.raises(InputError, match=r"\(16, 3, 4, 4\) stored, \(16, 3, 2, 2\) needed; .* patch_size=4; else"):
        load(str(tmp_path / "swin.safetensors"), **given, model_kwargs=arguments | {"window_size": 3, "patch_size": 2})


def test_wrong_shapes_are_said_before_missing_and_unexpected_names(tmp_path):
    wrong = damaged(norm__weight=None, extra=torch.zeros(2), head__weight=torch.zeros(5, 31))
    with pytest.raises(InputError, match="3 tensors: wrong shape head.weight: .*; missing norm.weight; unexpected extra; give"):
        load(str(folder(tmp_path, wrong)))


def test_image_size_of_an_architecture_without_one_is_preprocessing_only(tmp_path):
    folder(tmp_path, timm.create_model("test_resnet", num_classes=3).state_dict(), {"architecture": "test_resnet"})
    loaded = load(str(tmp_path), img_size=96)
    assert loaded.data_config["input_size"] == [3, 96, 96] and "img_size" not in loaded.arguments


def test_checkpoint_of_the_original_repository_goes_through_timms_filter(tmp_path):
    arguments = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4}
    expected = timm.create_model("swin_tiny_patch4_window7_224", num_classes=6, **arguments).eval()
    original = {name.replace("head.fc.", "head.").replace("layers.1.downsample", "layers.0.downsample"): tensor
                for name, tensor in expected.state_dict().items()}  # fmt: skip
    original["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    torch.save({"model": original}, tmp_path / "swin.pth")
    loaded = load(str(tmp_path / "swin.pth"), arch="swin_tiny_patch4_window7_224", model_kwargs=arguments)
    assert loaded.num_classes == 6 and outputs_agree(loaded, expected, size=64)
    assert loaded.arguments["depths"] == [1, 1]


def damaged(**changes) -> dict:
    tensors = tiny().state_dict()
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


@pytest.mark.parametrize(("changes", "text"), [
    ({"norm__weight": None}, "1 tensor: missing norm.weight"),
    ({"extra": torch.zeros(2)}, "1 tensor: unexpected extra"),
    ({"head__weight": torch.zeros(5, 31)}, r"wrong shape head.weight: \(5, 31\) stored, \(5, 32\) needed"),
    ({"pos_embed": torch.zeros(1, 26, 32)}, r"wrong shape pos_embed: \(1, 26, 32\) stored, \(1, 17, 32\) needed"),
    ({"norm__weight": torch.ones(32, dtype=torch.int8)}, "wrong type norm.weight: torch.int8 stored"),
    ({f"extra{i}": torch.zeros(1) for i in range(9)}, "9 tensors: .*; and 5 more"),
    ({"norm__weight": torch.full((32,), torch.nan)}, "tensor norm.weight holds NaN or infinity"),
    ({"norm__bias": torch.full((32,), torch.inf)}, "tensor norm.bias holds NaN or infinity"),
    ({"norm__bias": torch.full((32,), 1e300, dtype=torch.float64)}, "tensor norm.bias holds NaN or infinity"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_named(tmp_path, changes, text):
    with pytest.raises(InputError, match=text):
        load(str(folder(tmp_path, damaged(**changes))))


def test_other_number_of_classes_names_the_classifier(tmp_path):
    with pytest.raises(InputError, match=r"wrong shape head.weight: \(5, 32\) stored, \(7, 32\) needed.*--num-classes"):
        load(str(folder(tmp_path)), num_classes=7)


class Malicious:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, legacy):
    proof = tmp_path / "proof"
    torch.save({"state_dict": tiny().state_dict(), "args": Malicious(proof)}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"holds code \(\S+mkdir\), which was not run; save the model's state_dict"):
        load(str(tmp_path / "a.pth"), arch=ARCHITECTURE, model_kwargs=ARGUMENTS)
    assert not proof.exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert proof.exists()  # the trap works


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(tiny(), tmp_path / "a.pth")
    with pytest.raises(InputError, match="holds code .*VisionTransformer.*which was not run"):
        load(str(tmp_path / "a.pth"), arch=ARCHITECTURE)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5])
@pytest.mark.parametrize("name", ["model.safetensors", "a.pth"])
def test_truncated_files(tmp_path, name, kept):
    file = folder(tmp_path) / name
    if name == "a.pth":
        torch.save(tiny().state_dict(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(InputError, match=rf"{name} is damaged or no checkpoint: .*fetch or save it again") as error:
        load(str(file))
    assert "\n" not in str(error.value) and "`False`" not in str(error.value)
    if name == "a.pth":
        said = "it is a zip archive of" if kept else "it is empty"
        assert said in str(error.value) and "miniz" not in str(error.value)


def test_files_that_hold_something_else(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "none.pth")
    (tmp_path / "model.onnx").write_bytes(b"x")
    (tmp_path / "text.pth").write_bytes(b"hello")
    save_file({"a": torch.zeros(1)}, tmp_path / "calibrated.safetensors", metadata={"format": "vitq-checkpoint/1"})
    for name, text in (
        ("list.pth", r"holds no tensors by name \(found list\)"), ("none.pth", "holds no tensors by name"),
        ("text.pth", "damaged or no checkpoint: its 5 bytes are not what torch.save writes; fetch or save it again"),
        ("model.onnx", "is no MODEL; give a timm local folder"), ("calibrated.safetensors", "is a vitq-checkpoint/1 file of this tool"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=text):
            load(str(tmp_path / name), arch=ARCHITECTURE)


def test_what_is_missing(tmp_path):
    for missing in ("a.safetensors", "dir/a", str(tmp_path / "a.pth")):
        with pytest.raises(InputError, match="does not exist; give a timm local folder, a .safetensors"):
            load(missing)
    with pytest.raises(InputError, match="the name of the MODEL is empty; give a timm local folder"):
        load("")
    with pytest.raises(InputError, match=r"has no config.json; write .*architecture"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config()))
    with pytest.raises(InputError, match=r"model.safetensors does not exist; a timm local folder has it"):
        load(str(tmp_path))


@pytest.mark.parametrize(("text", "message"), [
    ("{", "config.json cannot be read as JSON"),
    ("[]", "names no `architecture`"),
    ("{}", "names no `architecture`"),
    ('{"architecture": "vit_tiny_patch16_225"}', "no file, folder or timm model .*vit_tiny_patch16_224"),
    ('{"architecture": "test_vit", "model_args": 3}', "`model_args` is 3, which timm does not write there"),
    ('{"architecture": "test_vit", "model_args": {"depths": 3}}', "test_vit cannot be built with .*depths.*unexpected keyword"),
    ('{"architecture": "test_vit", "model_args": {"checkpoint_path": "x"}}', "model argument 'checkpoint_path' cannot be used"),
    ('{"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 32]}}', r"config.json: `input_size` is \[3, 32\]; give"),
    ('{"architecture": "test_vit", "input_size": [3, -1, 32]}', r"config.json: `input_size` is \[3, -1, 32\]; give \[channels"),
    ('{"architecture": "test_vit", "pretrained_cfg": {"mean": ["a", "b", "c"]}}', r"config.json: `mean` is \['a', 'b', 'c'\]; give a"),
    ('{"architecture": "test_vit", "pretrained_cfg": {"mean": 0.5}}', r"config.json: `mean` is 0.5; give a list of numbers"),
    ('{"architecture": "test_vit", "pretrained_cfg": {"mean": [NaN]}}', r"config.json: `mean` is \[nan\]; give a list of numbers"),
    ('{"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 32, 32], "std": [1, 1]}}', "`std` has 2 numbers, but `inp"),
    ('{"architecture": "test_vit", "std": [0, 0, 0]}', r"config.json: `std` is \[0, 0, 0\]; give a list of numbers above 0"),
    ('{"architecture": "test_vit", "crop_pct": "big"}', "config.json: `crop_pct` is 'big'; give a number from 0.01 to 10"),
    ('{"architecture": "test_vit", "crop_pct": true}', "config.json: `crop_pct` is True; give a number"),
    ('{"architecture": "test_vit", "interpolation": "cubist"}', "`interpolation` is 'cubist'; give one of nearest, bilinear"),
    ('{"architecture": "test_vit", "crop_mode": ["center"]}', r"`crop_mode` is \['center'\]; give one of center, squash, border"),
])  # fmt: skip
def test_config_that_cannot_be_used(tmp_path, text, message):
    folder(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load(str(tmp_path))


def test_timm_name_loads_the_weights_that_timm_fetches(monkeypatch):
    expected = timm.create_model("test_vit", num_classes=1000)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **kwargs: expected.state_dict())
    loaded = load("test_vit")
    assert outputs_agree(loaded, expected, size=160)
    assert loaded.architecture == "test_vit.r160_in1k" and loaded.num_classes == 1000 and loaded.label_names[0] == "n01440764"
    assert loaded.digest == load("test_vit.r160_in1k").digest
    again = build(loaded.architecture, loaded.arguments, loaded.num_classes)
    again.load_state_dict(loaded.module.state_dict(), strict=True)
    expected.blocks[0].norm1.weight.data[0] = torch.nan
    with pytest.raises(InputError, match="test_vit: tensor blocks.0.norm1.weight holds NaN"):
        load("test_vit")
    with pytest.raises(InputError, match="test_vit has 1000 classes, not 5"):
        load("test_vit", num_classes=5)


def test_timm_names_without_weights_or_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"weights of test_vit.r160_in1k could not be fetched \(.+\); offline, give a checkpoint file"):
        load("test_vit")
    with pytest.raises(InputError, match=r"'vit_tiny_patch16_22' is no file, folder or timm model \(near: vit_tiny_patch16_224"):
        load("vit_tiny_patch16_22")
    with pytest.raises(InputError, match="timm has no weights 'nope' of test_vit; it has test_vit.r160_in1k"):
        load("test_vit.nope")
    with pytest.raises(InputError, match="timm has no weights for vit_giant_patch14_224"):
        load("vit_giant_patch14_224")


def test_arguments_out_of_range():
    with pytest.raises(InputError, match="image size 0 .* at least 1 pixel"):
        load("test_vit", img_size=0)
    with pytest.raises(InputError, match="-1 classes"):
        load("test_vit", num_classes=-1)
