"""A checkpoint scaled otherwise: the same float function, but with the outlying channels of large vision transformers.

    python examples/rescaled_checkpoint.py MODEL FOLDER [--most 64] [--seed 0]

LayerNorm gains, value rows, and query and key rows are multiplied by random factors up to `--most` either way, and what reads them is
divided by the same. FOLDER gets a checkpoint as timm saves it. For ViTs of timm's form: blocks with norm1, attn.qkv, attn.proj, norm2
and mlp.fc1, and nothing between queries and keys.
"""

import argparse
import copy
import math

import timm
import torch
from torch import Tensor, nn

from vitq.models import load


def rescaled(model: nn.Module, most: float = 64, seed: int = 0) -> nn.Module:
    """A copy of the model that computes the same function with other parameters."""
    generator = torch.Generator().manual_seed(seed)
    found = copy.deepcopy(model)

    def factors(count: int) -> Tensor:
        return torch.exp(math.log(most) * (2 * torch.rand(count, generator=generator) - 1))

    with torch.no_grad():
        for block in found.blocks:  # type: ignore[union-attr]
            width = block.attn.proj.in_features
            for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                r = factors(width)
                norm.weight *= r
                norm.bias *= r
                linear.weight /= r
            meeting, value = factors(width), factors(width)
            rows = torch.cat([meeting, 1 / meeting, value])
            block.attn.qkv.weight *= rows[:, None]
            block.attn.qkv.bias *= rows
            block.attn.proj.weight /= value
    return found


def main() -> None:
    """Writes the rescaled checkpoint and says how far its outputs are from the model's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--most", type=float, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = load(arguments.model)
    made = rescaled(model.module, arguments.most, arguments.seed)
    x = torch.randn(8, *model.data_config["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = float((made(x) - model.module(x)).abs().max())
    made.pretrained_cfg = {**made.pretrained_cfg, **model.data_config}  # type: ignore[dict-item]  # what timm saves
    config = {"label_names": model.label_names} if model.label_names else None
    timm.models.save_for_hf(made, arguments.folder, model_config=config, safe_serialization=True)
    print(f"wrote {arguments.folder}: outputs differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
