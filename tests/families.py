"""The transformer and hybrid families of timm, each at a small variant, and the chain that every one of them must pass.

`python tests/families.py [NAME ...]` runs capture -> uniform 8 -> export -> onnxruntime on each and prints the table of docs/models.md.
Weights are random, and so are biases and norms: zero biases hide bugs.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from timm.layers.config import set_fused_attn

from vitq.artifacts import BitPlan, LayerBits
from vitq.calibration.fast import calibrate_fast
from vitq.errors import VitqError
from vitq.models import LoadedModel
from vitq.onnx_file import export
from vitq.rewrites import prepare

# name shown -> (timm model, arguments). Where the smallest variant is too large for a test, its depth or its image is reduced: the ops
# are the same.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "aimv2": ("aimv2_large_patch14_224", {"depth": 2}),
    "beit": ("beit_base_patch16_224", {"depth": 3}),
    "beitv2": ("beitv2_base_patch16_224", {"depth": 3}),
    "beit3": ("beit3_base_patch16_224", {"depth": 3}),
    "botnet": ("botnet26t_256", {}),
    "caformer": ("caformer_s18", {}),
    "cait": ("cait_xxs24_224", {"depth": 4}),
    "clip": ("vit_base_patch32_clip_224", {"depth": 3}),
    "coat": ("coat_tiny", {"parallel_depth": 2}),
    "coat_lite": ("coat_lite_tiny", {}),
    "coatnet": ("coatnet_pico_rw_224", {}),
    "coatnext": ("coatnext_nano_rw_224", {}),
    "convit": ("convit_tiny", {}),
    "cpubone": ("cpubone_nano", {}),
    "crossvit": ("crossvit_tiny_240", {}),
    "csatv2": ("csatv2", {}),
    "davit": ("davit_tiny", {}),
    "deepseek_vit": ("deepseek_vit_412m", {"depth": 2, "img_size": 224}),
    "deit": ("deit_tiny_patch16_224", {}),
    "deit (distilled)": ("deit_tiny_distilled_patch16_224", {"depth": 3}),
    "deit3": ("deit3_small_patch16_224", {"depth": 4}),
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 224, "depth": 4}),
    "dinov3": ("vit_small_patch16_dinov3", {"depth": 4}),
    "eca_botnext": ("eca_botnext26ts_256", {}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientformer": ("efficientformer_l1", {}),
    "efficientformerv2": ("efficientformerv2_s0", {}),
    "efficientvim": ("efficientvim_m1", {}),
    "efficientvit (MIT)": ("efficientvit_b0", {}),
    "efficientvit (MSRA)": ("efficientvit_m0", {}),
    "eva02": ("eva02_tiny_patch14_224", {"depth": 3}),
    "fastvit": ("fastvit_sa12", {}),
    "flexivit": ("flexivit_small", {"depth": 4}),
    "focalnet": ("focalnet_tiny_srf", {}),
    "gcvit": ("gcvit_xxtiny", {}),
    "gemma4_vit": ("gemma4_vit_167m", {"depth": 2, "img_size": 192}),
    "halonet": ("halonet26t", {}),
    "hiera": ("hiera_tiny_224", {"stages": (1, 2, 3, 2)}),
    "hieradet (SAM 2)": ("hieradet_small", {"stages": (1, 2, 4, 2), "global_att_blocks": (4, 6)}),
    "iformer": ("iformer_t", {}),
    "lambda_resnet": ("lambda_resnet26t", {}),
    "lamhalobotnet": ("lamhalobotnet50ts_256", {}),
    "levit": ("levit_128s", {}),
    "lowformer": ("lowformer_b0", {}),
    "maxvit": ("maxvit_pico_rw_256", {"depths": (2, 2, 2, 2)}),
    "maxxvit": ("maxxvit_rmlp_nano_rw_256", {}),
    "maxxvitv2": ("maxxvitv2_nano_rw_256", {}),
    "mobileclip (fastvit_mci)": ("fastvit_mci0", {}),
    "mobilenetv4_hybrid": ("mobilenetv4_hybrid_medium_075", {}),
    "mobilenetv5": ("mobilenetv5_base", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mobilevitv2": ("mobilevitv2_050", {}),
    "mvitv2": ("mvitv2_tiny", {}),
    "naflexvit": ("naflexvit_base_patch16_gap", {"depth": 3, "img_size": 224}),
    "nest": ("nest_tiny", {}),
    "nextvit": ("nextvit_small", {}),
    "pit": ("pit_ti_224", {}),
    "pvt_v2": ("pvt_v2_b0", {}),
    "qwen3_vit": ("qwen3_vit_88m", {"depth": 2, "img_size": 224}),
    "samvit": ("samvit_base_patch16_224", {"depth": 3}),
    "sebotnet": ("sebotnet33ts_256", {}),
    "sehalonet": ("sehalonet33ts", {}),
    "shvit": ("shvit_s1", {}),
    "siglip": ("vit_base_patch16_siglip_224", {"depth": 3}),
    "swiftformer": ("swiftformer_xs", {}),
    "swin": ("swin_tiny_patch4_window7_224", {"depths": (2, 2, 2, 2)}),
    "swinv2": ("swinv2_tiny_window8_256", {"depths": (2, 2, 2, 2)}),
    "swinv2_cr": ("swinv2_cr_tiny_224", {}),
    "tiny_vit": ("tiny_vit_5m_224", {}),
    "tnt": ("tnt_s_legacy_patch16_224", {"depth": 3}),
    "twins_pcpvt": ("twins_pcpvt_small", {"depths": (2, 2, 2, 2)}),
    "twins_svt": ("twins_svt_small", {"depths": (2, 2, 2, 2)}),
    "visformer": ("visformer_tiny", {}),
    "vit": ("vit_tiny_patch16_224", {}),
    "vit (hybrid)": ("vit_tiny_r_s16_p8_224", {"depth": 3}),
    "vit (parallel blocks)": ("vit_small_patch16_18x2_224", {"depth": 3}),
    "vit (headless)": ("vit_tiny_patch16_224", {"num_classes": 0, "depth": 3}),
    "vit_relpos": ("vit_relpos_small_patch16_224", {"depth": 4}),
    "vit_srelpos": ("vit_srelpos_small_patch16_224", {"depth": 4}),
    "vitamin": ("vitamin_small_224", {}),
    "volo": ("volo_d1_224", {}),
    "xcit": ("xcit_nano_12_p16_224", {"depth": 3}),
}


@dataclass(frozen=True)
class Row:
    """What became of one family: the counts of its layers, or the reason why it did not pass."""

    family: str
    model: str
    layers: int = 0
    candidates: int = 0
    kernels: int = 0
    float_layers: int = 0
    blocks: int = 0
    seconds: float = 0.0
    fault: str = ""

    def __str__(self) -> str:
        """The row in Markdown."""
        cells = (
            self.family,
            self.model,
            self.layers,
            self.blocks,
            f"{self.kernels} / {self.candidates}",
            self.float_layers,
            self.fault or "yes",
        )
        return "| " + " | ".join(map(str, cells)) + " |"


HEADING = """| family | model | layers | blocks | integer kernels / candidates | float convolutions | passes |
| --- | --- | --- | --- | --- | --- | --- |"""


def random_model(name: str, arguments: dict[str, Any]) -> LoadedModel:
    """A timm model whose weights, biases and norms are all random, as `vitq.models.load` would return it."""
    torch.manual_seed(0)
    set_fused_attn(False)
    module = timm.create_model(name, pretrained=False, **arguments).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim < 2:
                parameter += 0.1 * torch.randn_like(parameter)
        for key, buffer in module.named_buffers():
            if key.endswith("running_mean"):
                buffer += 0.1 * torch.randn_like(buffer)
            if key.endswith("running_var"):
                buffer += 0.3 * torch.rand_like(buffer)
    config = timm.data.resolve_model_data_config(module)
    if size := arguments.get("img_size"):
        config["input_size"] = (3, size, size)
    data_config = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    return LoadedModel(module, name, arguments, module.num_classes, data_config, (), name, "")


def check(family: str) -> Row:
    """Runs one family through the chain; a fault is returned in the row, not raised."""
    name, arguments = FAMILIES[family]
    shown = name + "".join(f", {key} {value}" for key, value in arguments.items())
    started = time.perf_counter()
    try:
        model = random_model(name, arguments)
        graph, spec = prepare(model)
        shape = model.data_config["input_size"]
        generator = torch.Generator().manual_seed(0)
        batches = [(torch.randn(count, *shape, generator=generator), None) for count in (2, 1)]
        with torch.no_grad():
            drift = float((graph.module(batches[0][0]) - model.module(batches[0][0])).norm() / model.module(batches[0][0]).norm())
        assert drift < 1e-4, f"the rewritten graph differs from the model by {drift:.1e}"
        eight = [(layer, 8 if layer.has_weight else None) for layer in graph.layers]
        bits = tuple(LayerBits(name=layer.name, type=layer.type, weight_bits=width, activation_bits=8) for layer, width in eight)
        checkpoint = calibrate_fast(graph, BitPlan(model=spec, layers=bits), batches)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            report = export(checkpoint, file, [images for images, _ in batches])
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            for batch in (1, 3):
                (output,) = session.run(None, {session.get_inputs()[0].name: np.zeros((batch, *shape), np.float32)})
                assert len(output) == batch and np.isfinite(output).all(), f"onnxruntime returns {output.shape} for a batch of {batch}"
    except (VitqError, AssertionError) as fault:
        return Row(family, shown, seconds=time.perf_counter() - started, fault=str(fault).splitlines()[0])
    return Row(
        family, shown, len(graph.layers), report.integer_candidates, report.integer_kernels, report.float_by_choice, len(graph.blocks),
        time.perf_counter() - started,
    )  # fmt: skip


if __name__ == "__main__":
    print(HEADING)
    for chosen in sys.argv[1:] or FAMILIES:
        print(check(chosen), flush=True)
