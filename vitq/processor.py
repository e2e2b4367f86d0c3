"""What is known of this machine's processor: its name, and the instructions on which the speed and the exactness of integer kernels rest.

Read from /proc/cpuinfo, which Linux has; elsewhere the features are not known. Needs no torch.
"""

import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX512-VNNI",
    "amx_int8": "AMX-INT8",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
    "i8mm": "I8MM",
}
"""What Linux calls an instruction set, and what its maker does."""

DOT_PRODUCTS = {"AVX-VNNI", "AVX512-VNNI", "AMX-INT8", "DOTPROD", "I8MM"}
"""With any of these, products of 8-bit integers are added in 32 bits; AVX2 alone adds pairs of them in 16 bits first."""


@dataclass(frozen=True)
class Processor:
    """`features` in the order of FEATURES; None where the system does not tell."""

    architecture: str
    name: str
    features: tuple[str, ...] | None

    @property
    def adds_in_32_bits(self) -> bool | None:
        """Whether it has instructions for sums of 8-bit products; None where that is not known."""
        return None if self.features is None else not DOT_PRODUCTS.isdisjoint(self.features)


def processor(cpuinfo: Path = CPUINFO) -> Processor:
    """This machine's processor, as far as the system tells."""
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    found: dict[str, str] = {}
    for key, _, value in lines:  # the first core's
        found.setdefault(key.strip(), value.strip())
    flags = found.get("flags", found.get("Features"))  # x86, ARM
    features = None if flags is None else tuple(name for flag, name in FEATURES.items() if flag in flags.split())
    return Processor(platform.machine(), found.get("model name", platform.processor()), features)
