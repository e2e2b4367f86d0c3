"""Every transformer family of timm goes through capture, 8 bits, export and onnxruntime; eight of them in the default run."""

from collections.abc import Callable

import pytest
import timm
from families import FAMILIES, check

DEFAULT = ("vit", "deit (distilled)", "swin", "levit", "mobilevit", "vit (headless)")


@pytest.mark.parametrize("family", [pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.slow) for name in FAMILIES])
def test_family_passes(family: str, record_property: Callable[[str, object], None]) -> None:
    row = check(family)
    record_property("family", str(row))  # tests/conftest.py prints the table
    assert not row.fault, row.fault
    assert row.layers > 0
    assert row.kernels >= 0.95 * row.candidates, f"{row.kernels} of {row.candidates} candidates became integer kernels"


# Modules of timm that hold transformers or hybrids; each must be in the table with at least one model.
MODULES = """
beit byoanet cait coat convit cpubone crossvit csatv2 davit deepseek_vit deit edgenext efficientformer efficientformer_v2
efficientvim efficientvit_mit efficientvit_msra eva fastvit focalnet gcvit gemma4_vit hiera hieradet_sam2 iformer levit
lowformer maxxvit metaformer mobilenetv3 mobilenetv5 mobilevit mvitv2 naflexvit nest nextvit pit pvt_v2 qwen3_vit shvit
swiftformer swin_transformer swin_transformer_v2 swin_transformer_v2_cr tiny_vit tnt twins visformer vision_transformer
vision_transformer_hybrid vision_transformer_relpos vision_transformer_sam vitamin volo xcit
"""


def test_every_transformer_module_of_timm_is_in_the_table() -> None:
    covered = {timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1] for name, _ in FAMILIES.values()}
    assert not set(MODULES.split()) - covered
