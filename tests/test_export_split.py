"""Queries, keys and values as linears of their own, and attention's scale inside one: the same codes, and the same function."""

from collections.abc import Callable

import pytest
import torch
from export_checkpoints import make_checkpoint, mixed
from small_models import images
from torch import Tensor, nn

from vitq.graph import run
from vitq.onnx_file.factors import fold_numbers
from vitq.onnx_file.split import split_linears

Cut = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def heads_inside(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As timm's Attention: which of the three, head, dimension."""
    return x.reshape(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]


def heads_outside(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As MaxViT's: head, which of the three, dimension; rows of a part are then not next to each other."""
    return x.view(x.shape[0], x.shape[1], 2, 24).transpose(1, 2).chunk(3, dim=3)  # type: ignore[return-value]


def sliced(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = [x[..., at : at + 16].unflatten(-1, (2, 8)).transpose(1, 2) for at in (32, 0, 16)]
    return parts[0], parts[1], parts[2]


def unequal(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, kv = x.split([16, 32], dim=-1)
    k, v = kv.unflatten(-1, (2, 2, 8)).permute(2, 0, 3, 1, 4)
    return q.unflatten(-1, (2, 8)).transpose(1, 2), k, v


class Attention(nn.Module):
    def __init__(self, cut: Cut, factor: float = 8**-0.5) -> None:
        super().__init__()
        self.embedding, self.qkv, self.proj, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 5)
        self.cut, self.factor = cut, factor

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).flatten(2).transpose(1, 2)
        q, k, v = self.cut(self.qkv(x))
        attended = (q * self.factor @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head(self.proj(attended.transpose(1, 2).flatten(2)).mean(1))


CUTS = [heads_inside, heads_outside, sliced, unequal]


@pytest.mark.parametrize("cut", CUTS)
def test_parts_compute_what_the_whole_did(cut: Cut) -> None:
    torch.manual_seed(1)
    checkpoint = make_checkpoint(Attention(cut), weight=mixed, activation=mixed)
    split, became = split_linears(checkpoint)
    assert len(became["qkv"]) == 3 and all(names == (layer,) for layer, names in became.items() if layer != "qkv")
    x = images(5, checkpoint.graph.input_shape[1:], seed=3)
    with torch.no_grad():
        expected, found = checkpoint.quantized_module()(x), split.quantized_module()(x)
        assert torch.allclose(run(split.graph.module, x), run(checkpoint.graph.module, x), rtol=1e-5, atol=1e-6)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    whole = checkpoint.weights["qkv"]
    parts = [split.weights[name] for name in became["qkv"]]
    rows = torch.cat([torch.cat([part.codes, part.zero_point[:, None]], 1) for part in parts])
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, torch.cat([whole.codes, whole.zero_point[:, None]], 1).tolist()))


@pytest.mark.parametrize("cut", CUTS)
def test_the_scale_of_attention_moves_into_the_queries(cut: Cut) -> None:
    torch.manual_seed(1)
    checkpoint = make_checkpoint(Attention(cut), weight=mixed, activation=8)
    split, became = split_linears(checkpoint)
    folded = fold_numbers(split)
    assert not any(node.target is torch.ops.aten.mul.Tensor for node in folded.graph.module.graph.nodes)
    x = images(5, checkpoint.graph.input_shape[1:], seed=3)
    with torch.no_grad():
        assert torch.allclose(run(folded.graph.module, x), run(checkpoint.graph.module, x), rtol=1e-5, atol=1e-6)
    changed = [name for name in became["qkv"] if not torch.equal(folded.weights[name].scale, split.weights[name].scale)]
    assert len(changed) == 1
    assert torch.equal(folded.weights[changed[0]].scale, 8**-0.5 * split.weights[changed[0]].scale)
    assert torch.equal(folded.weights[changed[0]].codes, split.weights[changed[0]].codes)


class WholeToo(Attention):
    """Something reads all of the linear's output as well."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(x)
        q, k, v = self.cut(qkv)
        attended = (q * self.factor @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head(attended.transpose(1, 2).flatten(2).mean(1)) + qkv.sigmoid().mean((1, 2))[:, None]


class EmptyToo(Attention):
    """A slice of nothing, as prefix tokens that a model could have and has not."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(x)
        q, k, v = self.cut(qkv)
        attended = (q * self.factor @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head(torch.cat([qkv[:, :, :0], attended.transpose(1, 2).flatten(2)], -1).mean(1))


def overlapping(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    parts = [x[..., at : at + 16].unflatten(-1, (2, 8)).transpose(1, 2) for at in (0, 8, 32)]
    return parts[0], parts[1], parts[2]


def rolled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return heads_inside(x.roll(3, dims=-1))


@pytest.mark.parametrize(
    "model",
    [WholeToo(heads_inside), EmptyToo(heads_inside), Attention(overlapping), Attention(rolled)],
    ids=["whole", "empty", "overlapping", "rolled"],
)
def test_what_is_not_only_cut_up_stays_whole(model: nn.Module) -> None:
    checkpoint = make_checkpoint(model, weight=8, activation=8)
    split, became = split_linears(checkpoint)
    assert split is checkpoint and became["qkv"] == ("qkv",)


def test_a_factor_that_is_no_scale_stays() -> None:
    checkpoint = make_checkpoint(Attention(heads_inside, -0.5), weight=8, activation=8)
    split, _ = split_linears(checkpoint)
    assert fold_numbers(split) is split


def test_a_factor_that_only_one_reader_sees_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).flatten(2).transpose(1, 2)
            return self.second(x * 0.5 + x.sigmoid()).mean(1)

    checkpoint = make_checkpoint(Shared(), weight=8, activation=8)
    assert fold_numbers(checkpoint) is checkpoint
