"""What a plan decides: which layers are fixed, which share a width, and the options that are left, as a tree of choices.

Layers whose activation operands are the same tensor form a group with one activation width (union-find over `Operand.tensor`).
While weights and activations are tied, the weights of the group have that width too; apart, each weight chooses its own. A fixed
layer imposes its activation width on its group: tied searched layers in it then get that width altogether, and keep counting as
searched. So each group chooses an activation width, and under each of these each of its layers chooses a weight width. A choice with
one option is merged into what it hangs under, so tied widths make a plain multiple-choice problem.

Everything is ordered by layer name, never by the profile's order, so that equal problems reach the solver equal.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from vitq.artifacts import WIDTHS, Layer
from vitq.errors import UsageError

FIXED_TYPES = {"patch_embed": (8, 8), "head": (8, 8)}
"""Types that are fixed unless `fixed` says another width: (weight bits, activation bits)."""


class Widths(NamedTuple):
    """One layer at its widths; `weight_bits` is None for a matmul."""

    layer: Layer
    weight_bits: int | None
    activation_bits: int


@dataclass(frozen=True)
class Scope:
    """The layers of a plan and what is settled before the search.

    `fixed` holds the (weight, activation) bits of fixed layers; `groups` the layers that share their activation bits, both the groups
    and their members in order of name; `imposed` the activation bits of groups with a fixed member, by the group's position.
    """

    layers: tuple[Layer, ...]
    fixed: dict[str, tuple[int, int]]
    groups: tuple[tuple[Layer, ...], ...]
    imposed: dict[int, int]

    def uniform(self, weight_bits: int, activation_bits: int) -> tuple[Widths, ...]:
        """Every searched layer at the same widths, in order of name; where a fixed layer shares its input, the fixed activation bits."""
        widths = []
        for position, group in enumerate(self.groups):
            for layer in group:
                fixed_weight = self.fixed.get(layer.name, (weight_bits, 0))[0]
                widths.append(Widths(layer, fixed_weight if layer.has_weight else None, self.imposed.get(position, activation_bits)))
        return tuple(sorted(widths, key=lambda entry: entry.layer.name))


@dataclass(frozen=True)
class Choice:
    """Exactly one of `options` (positions in `ChoiceTree.options`) is taken where option `under` is; always, where that is None."""

    options: tuple[int, ...]
    under: int | None


@dataclass(frozen=True)
class ChoiceTree:
    """All options, each settling the widths of some layers, and the choices among them, a choice after the one it hangs under."""

    options: tuple[tuple[Widths, ...], ...]
    choices: tuple[Choice, ...]


def settle(layers: Sequence[Layer], fixed: Sequence[str]) -> Scope:
    """Finds the fixed layers and the groups that share activation bits.

    Args:
        layers: all layers of the model.
        fixed: 'GLOB=8' or 'GLOB=4/8' (weight/activation bits), later ones win over earlier ones and over `FIXED_TYPES`.

    Raises:
        UsageError: text of another form, a glob that matches no layer, or two fixed layers that read one tensor at different bits.
    """
    ordered = sorted(layers, key=lambda layer: layer.name)
    widths = {layer.name: FIXED_TYPES[layer.type] for layer in ordered if layer.type in FIXED_TYPES}
    for text in fixed:
        glob, _, bits = text.rpartition("=")
        if not glob:
            raise UsageError(f"--fixed {text!r} is not understood; give a pattern of layer names and bits, such as 'blocks.0.*=8'")
        matching = [layer.name for layer in ordered if fnmatchcase(layer.name, glob)]
        if not matching:
            raise UsageError(f"--fixed {text!r} matches no layer; {_near(glob, [layer.name for layer in ordered])}")
        widths |= dict.fromkeys(matching, parse_widths(bits, f"--fixed {text!r}"))
    groups = _groups(ordered)
    return Scope(tuple(layers), widths, groups, _imposed(groups, widths))


def paper_parity(weight_bits: int, activation_bits: int, layers: Iterable[Layer]) -> list[str]:
    """What post-training papers fix, in words of `settle`: the head at the plan's own bits, the patch embedding too but for its image.

    The image is read at 8 bits (RepQ-ViT, AdaLog, FIMA-Q), so a patch embedding has the plan's weight bits only.
    """
    settings = {"patch_embed": f"{weight_bits}/8", "head": f"{weight_bits}/{activation_bits}"}
    return [f"{layer.name}={settings[layer.type]}" for layer in layers if layer.type in settings]


def parse_widths(text: str, given: str) -> tuple[int, int]:
    """Reads '4' or '4/8' as (weight bits, activation bits); `given` names the option in the UsageError for anything else."""
    first, slash, second = text.partition("/")
    accepted = {str(width): width for width in WIDTHS}
    if first not in accepted or (second if slash else first) not in accepted:
        raise UsageError(f"{given}: {text!r} is not a width; give whole bits from 2 to 8, such as 4, or 4/8 for weights/activations")
    return accepted[first], accepted[second if slash else first]


def choice_tree(scope: Scope, bits: Iterable[int], bits_apart: bool) -> ChoiceTree:
    """The options that are left with these candidate bits, weights and activations tied or apart."""
    candidates = sorted(bits)
    options: list[tuple[Widths, ...]] = []
    choices: list[Choice] = []
    for position, group in enumerate(scope.groups):
        activations = [scope.imposed[position]] if position in scope.imposed else candidates
        free = [layer for layer in group if layer.has_weight and layer.name not in scope.fixed] if bits_apart else []
        settled = [layer for layer in group if layer not in free]
        alone = free if len(free) == 1 else []
        pairs = [(activation_bits, weight_bits) for activation_bits in activations for weight_bits in (candidates if alone else [None])]
        choices.append(Choice(tuple(range(len(options), len(options) + len(pairs))), None))
        for activation_bits, weight_bits in pairs:
            options.append(
                tuple(_settled(scope, layer, activation_bits) for layer in settled)
                + tuple(Widths(layer, weight_bits, activation_bits) for layer in alone)
            )
        for parent, (activation_bits, _) in zip(choices[-1].options, pairs if not alone else [], strict=False):
            for layer in free:
                choices.append(Choice(tuple(range(len(options), len(options) + len(candidates))), parent))
                options += [(Widths(layer, weight_bits, activation_bits),) for weight_bits in candidates]
    return ChoiceTree(tuple(options), tuple(choices))


def in_words_and_numbers(name: str) -> tuple[list[tuple[int, str]], str]:
    """A key that sorts blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)], name


def _settled(scope: Scope, layer: Layer, activation_bits: int) -> Widths:
    """A layer whose weight width is no choice: it has none, is fixed, or is tied to its activations."""
    if not layer.has_weight:
        return Widths(layer, None, activation_bits)
    return Widths(layer, scope.fixed.get(layer.name, (activation_bits, 0))[0], activation_bits)


def _groups(ordered: Sequence[Layer]) -> tuple[tuple[Layer, ...], ...]:
    """Connected components of layers over shared activation tensors."""
    root = {layer.name: layer.name for layer in ordered}

    def find(name: str) -> str:
        while root[name] != name:
            root[name] = name = root[root[name]]
        return name

    reader: dict[str, str] = {}
    for layer in ordered:
        for operand in layer.activations:
            one, other = sorted((find(layer.name), find(reader.setdefault(operand.tensor, layer.name))))
            root[other] = one
    members: dict[str, list[Layer]] = {}
    for layer in ordered:
        members.setdefault(find(layer.name), []).append(layer)
    return tuple(tuple(members[name]) for name in sorted(members))


def _imposed(groups: Sequence[tuple[Layer, ...]], fixed: dict[str, tuple[int, int]]) -> dict[int, int]:
    imposed: dict[int, int] = {}
    for position, group in enumerate(groups):
        members = [layer.name for layer in group if layer.name in fixed]
        for name in members:
            bits = imposed.setdefault(position, fixed[name][1])
            if bits != fixed[name][1]:
                raise UsageError(
                    f"layers {members[0]!r} and {name!r} share their input tensors, so their activation bits must agree, "
                    f"but are fixed at {bits} and {fixed[name][1]}; fix both at the same with --fixed"
                )
    return imposed


def _near(glob: str, names: list[str]) -> str:
    near = [name for name in names if glob.strip("*") and glob.strip("*") in name][:3] or get_close_matches(glob, names, n=3, cutoff=0.4)
    return f"did you mean {', '.join(near)}?" if near else "`vitq show PROFILE` lists the layers"
