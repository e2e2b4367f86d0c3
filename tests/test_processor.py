"""The processor's name and features, from what systems tell."""

import platform
from pathlib import Path

import pytest

from vitq.processor import FEATURES, Processor, processor

X86 = (
    "processor\t: 0\nmodel name\t: A Chip @ 2 GHz: fast\nflags\t\t: fpu avx avx2 avx512f avx512_vnni sse2\n\nprocessor: 1\nmodel name: B\n"
)
AVX2 = "processor\t: 0\nmodel name\t: Old\nflags\t\t: fpu avx2_not avx2\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp crc32\n"


@pytest.mark.parametrize(
    ("text", "name", "features", "adds"),
    [
        (X86, "A Chip @ 2 GHz: fast", ("AVX2", "AVX512", "AVX512-VNNI"), True),
        (AVX2, "Old", ("AVX2",), False),
        (ARM, platform.processor(), ("NEON", "DOTPROD"), True),
        ("processor\t: 0\n", platform.processor(), None, None),
    ],
)
def test_what_linux_tells(text: str, name: str, features: tuple[str, ...] | None, adds: bool | None, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    found = processor(tmp_path / "cpuinfo")
    assert found == Processor(platform.machine(), name, features)
    assert found.adds_in_32_bits is adds


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert processor(tmp_path / "gone") == Processor(platform.machine(), platform.processor(), None)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux has it")
def test_this_machine_as_numpy_sees_it() -> None:
    from numpy._core._multiarray_umath import __cpu_features__ as seen

    ours = set(processor().features or ())
    for feature, name in {"AVX2": "AVX2", "AVX512F": "AVX512", "ASIMD": "NEON", "ASIMDDP": "DOTPROD"}.items():
        assert name in FEATURES.values()
        assert seen.get(feature, False) == (name in ours)
