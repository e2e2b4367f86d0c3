"""How long a proof takes: 500 layers x 49 (weight, activation) pairs with three budgets, to a gap of 1e-4, to 1e-6, and by default.

    python examples/allocation_speed.py [LAYERS] [PROBLEMS] [GAPS, such as 1e-4,default]

The problems are random: costs fall by a factor of 2.5 to 4 a bit from log-normal levels, with a term of both widths; parameters and MACs
spread over a factor of hundreds. The budgets are an average of 4 bits (of weights and of activations), and 5 % less size and 10 % less
BitOps than 4 bits everywhere. Prints a line a problem. A gap that is asked for is searched for without a limit: 1e-6 can take minutes.
"""

import math
import random
import sys
import time

from vitq.allocation import allocate
from vitq.artifacts import WIDTHS, CostTable, Layer, ModelSpec, Operand, Profile


def make_profile(count: int, seed: int) -> Profile:
    """A profile of linears that share no input."""
    chance = random.Random(seed)

    def falling() -> tuple[float, ...]:
        level, ratio = chance.lognormvariate(-7, 1.5), chance.uniform(2.5, 4)
        return tuple(sorted((level * ratio ** -(width - 2) * chance.uniform(0.97, 1) for width in WIDTHS), reverse=True))

    layers = []
    for position in range(count):
        operands = (
            Operand(tensor=f"input{position}", role="plain", shape=(1, 1)),
            Operand(tensor=f"weight{position}", role="weight", shape=(1, 1)),
        )
        parameters, macs = 64 * chance.randrange(200, 50_000), chance.randrange(10**6, 6 * 10**8)
        sizes = {"parameters": parameters, "macs": macs, "channels": chance.choice([192, 768, 3072])}
        layers.append(Layer(name=f"layer{position}", type="fc1", op="linear", block="", operands=operands, **sizes))
    names = [layer.name for layer in layers]
    weight, activation, tied = ({name: falling() for name in names} for _ in range(3))
    cross = {
        name: tuple(tuple(chance.uniform(0, 0.2) * math.sqrt(w * a) for a in activation[name]) for w in weight[name]) for name in names
    }
    table = CostTable(unit="nats", bits=WIDTHS, tied=tied, weight=weight, activation=activation, cross=cross)
    model = ModelSpec(architecture="none", num_classes=0, data_config={}, graph_digest="")
    return Profile(model=model, layers=tuple(layers), costs={"random": table}, rest_bytes=10**6)


def main() -> None:
    """Solves each problem at each gap."""
    layers, problems, gaps = [*sys.argv[1:], *("500", "5", "1e-4,1e-6,default")[len(sys.argv) - 1 :]]
    print(f"{layers} layers x {len(WIDTHS) ** 2} pairs: gap asked for, seconds of `allocate`, gap reached, status")
    for seed in range(int(problems)):
        profile = make_profile(int(layers), seed)
        uniform = allocate(profile, uniform="4", bits_apart=True).report
        budgets = ["4.0", f"size={int(0.95 * uniform['size_bytes'])}B", f"bops={int(0.9 * uniform['bops'])}"]
        for gap in gaps.split(","):
            start = time.perf_counter()
            report = allocate(profile, budgets, bits_apart=True, gap=None if gap == "default" else float(gap)).report
            print(f"problem {seed}  {gap:8} {time.perf_counter() - start:7.2f} s  {report['gap']:.1e}  {report['status']}", flush=True)


if __name__ == "__main__":
    main()
