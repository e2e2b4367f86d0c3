"""Capture, layers, blocks and running from cached points, against the models: their outputs, hooks on modules, torch's flop counter."""

import pytest
import torch
from small_models import (
    FAMILIES,
    ThreeProjections,
    Tokens,
    captured,
    captured_module,
    images,
    randomised,
    timm_model,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitq.errors import InputError
from vitq.graph import Graph, advance, assign, capture, copy, run, tensor_of, values_at
from vitq.graph.blocks import computing_nodes
from vitq.graph.dataflow import aten, consumers, walk_back

families = pytest.mark.parametrize("family", FAMILIES)


def of(graph: Graph, name: str):
    return next(layer for layer in graph.layers if layer.name == name)


def types(graph: Graph) -> dict[str, str]:
    return {layer.name: layer.type for layer in graph.layers}


def size_of(graph: Graph) -> tuple[int, int]:
    return graph.input_shape[1], graph.input_shape[2]


@families
def test_capture_equals_the_model_at_any_batch(family: str):
    model, graph = captured(family)
    for batch in (1, 2, 5):
        x = images(batch, size_of(graph), seed=batch)
        with torch.no_grad():
            expected = model(x)
            assert torch.equal(graph.module(x), expected)
            assert torch.equal(run(graph.module, x), expected)


@families
def test_no_guards_dropout_or_writing_ops_are_left(family: str):
    _, graph = captured(family)
    for node in graph.module.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        assert "assert" not in str(node.target) and "dropout" not in str(node.target)
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node.format_node()
    assert not any(parameter.requires_grad for parameter in graph.module.parameters())


@families
def test_what_depends_on_no_image_is_a_constant(family: str):
    _, graph = captured(family)
    depends = {node for node in graph.module.graph.nodes if node.op == "placeholder"}
    for node in computing_nodes(graph.module):
        assert depends & set(node.all_input_nodes), f"{node.format_node()} depends on no image"
        depends.add(node)


def test_swin_position_biases_are_folded():
    model, graph = captured("swin")
    sources = {str(node.target) for node in graph.module.graph.nodes if node.op == "get_attr"}
    assert not any("relative_position" in source for source in sources)
    expected = model.layers[0].blocks[0].attn._get_rel_pos_bias().detach()
    constants = [getattr(graph.module, source) for source in sources if source.startswith("constant_")]
    assert any(constant.shape == expected.shape and torch.equal(constant, expected) for constant in constants)


@families
def test_layers_with_a_weight_are_those_that_hooks_see(family: str):
    model, graph = captured(family)
    seen: list[tuple[str, int, int]] = []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            hooks.append(
                module.register_forward_hook(
                    lambda module, inputs, output, name=name: seen.append((name, module.weight.numel(), module.weight.shape[0]))
                )
            )
    with torch.no_grad():
        model(images(1, size_of(graph)))
    for hook in hooks:
        hook.remove()
    assert [(layer.name, layer.parameters, layer.channels) for layer in graph.layers if layer.has_weight] == seen


@families
def test_macs_are_half_of_the_flops_that_torch_counts(family: str):
    model, graph = captured(family)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images(1, size_of(graph)))
    assert 2 * sum(layer.macs for layer in graph.layers) == counter.get_total_flops()
    by_module = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for layer in graph.layers:
        if layer.name in linears:
            assert 2 * layer.macs == by_module[layer.name], layer.name


def test_vit_layers():
    _, graph = captured("vit")
    block = {"qkv": "attn.qkv", "qk": "attn.qk", "av": "attn.av", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    expected = {"patch_embed.proj": "patch_embed"}
    expected |= {f"blocks.{index}.{name}": kind for index in range(2) for kind, name in block.items()}
    assert types(graph) == expected | {"head": "head"}
    roles = {name: [operand.role for operand in of(graph, name).operands] for name in expected}
    assert roles["patch_embed.proj"] == ["image", "weight"]
    assert roles["blocks.0.attn.qkv"] == roles["blocks.1.mlp.fc1"] == ["post_layernorm", "weight"]
    assert roles["blocks.0.mlp.fc2"] == ["post_gelu", "weight"]
    assert roles["blocks.0.attn.av"] == ["post_softmax", "plain"]
    assert of(graph, "blocks.1.attn.qk").macs == 4 * 17 * 17 * 16  # heads, queries, keys, channels of a head
    assert of(graph, "blocks.1.attn.qk").operands[0].shape == (1, 4, 17, 16)
    assert graph.unfused() == []


def test_swin_roles_are_found_through_windows_padding_and_shifts():
    _, graph = captured("swin")
    for block in ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"):
        assert of(graph, f"{block}.attn.qkv").operands[0].role == "post_layernorm"
        assert of(graph, f"{block}.attn.qkv").type == "qkv"
        assert of(graph, f"{block}.attn.av").operands[0].role == "post_softmax"
        assert of(graph, f"{block}.mlp.fc2").operands[0].role == "post_gelu"
    reduction = of(graph, "layers.1.downsample.reduction")
    assert (reduction.type, reduction.operands[0].role) == ("reduction", "post_layernorm")
    assert of(graph, "head.fc").type == "head"


def test_cait_class_attention_has_three_projections_of_which_two_share_a_tensor():
    _, graph = captured("cait")
    q, k, v = (of(graph, f"blocks_token_only.0.attn.{part}") for part in "qkv")
    assert (q.type, k.type, v.type) == ("q", "k", "v")
    assert k.operands[0].tensor == v.operands[0].tensor != q.operands[0].tensor  # q reads the class token alone
    assert q.operands[0].role == k.operands[0].role == "post_layernorm"


def test_three_projections_share_their_tensor():
    graph = captured_module(randomised(Tokens(ThreeProjections())))
    parts = [of(graph, f"body.{name}") for name in ("query", "key", "value")]
    assert [part.type for part in parts] == ["q", "k", "v"]
    assert len({part.operands[0].tensor for part in parts}) == 1
    assert types(graph)["body.qk"] == "qk" and types(graph)["body.av"] == "av" and types(graph)["body.out"] == "proj"


@pytest.mark.parametrize(
    "through",
    [
        lambda x: x.unflatten(1, (2, 8)).permute(0, 2, 1, 3).reshape(-1, 16, 8),
        lambda x: torch.roll(x, (1,), (1,)),
        lambda x: nn.functional.pad(x, (0, 0, 1, 2)),
        lambda x: x.unsqueeze(0).expand(2, -1, -1, -1).unbind(0)[1],
        lambda x: x.chunk(2, 1)[1],
        lambda x: x.split([4, 12], 1)[0],
        lambda x: x.flip(1)[:, ::2],
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: nn.functional.dropout(x, 0.5, training=False),
        lambda x: x.reshape(x.shape[0], 4, 4, 8).view_as(torch.zeros(x.shape[0], 4, 4, 8)),
    ],
)
def test_roles_are_found_through_shape_ops(through):
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.gelu, self.softmax = nn.LayerNorm(8), nn.GELU(), nn.Softmax(-1)
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            normed, gelu, softmax = self.norm(x), self.gelu(x), self.softmax(x)
            return self.a(through(normed)) + self.b(through(gelu)) + self.c(through(softmax)) + self.d(through(x + 1))

    graph = captured_module(Tokens(Body()))
    roles = [of(graph, f"body.{name}").operands[0].role for name in "abcd"]
    assert roles == ["post_layernorm", "post_gelu", "plain", "plain"]  # a linear has a bias behind its sums


@pytest.mark.parametrize(
    ("through", "role"),
    [
        (lambda x: x.softmax(-1), "post_softmax"),
        (lambda x: x.softmax(2).unflatten(1, (2, 8)).permute(0, 2, 1, 3).reshape(-1, 16, 8), "post_softmax"),
        (lambda x: x.softmax(-1).reshape(x.shape[0], 4, 4, 8).flip(1), "post_softmax"),
        (lambda x: x.transpose(1, 2).softmax(1).transpose(1, 2), "post_softmax"),
        (lambda x: x.softmax(1), "plain"),
        (lambda x: x.softmax(-1).roll(1, 2), "plain"),
        (lambda x: x.softmax(-1).reshape(x.shape[0], 32, 4).reshape(x.shape[0], 16, 8)[..., :4], "plain"),
        (lambda x: 2 * x.softmax(-1), "plain"),
    ],
)
def test_a_matmul_that_sums_over_a_softmaxs_rows_has_its_role(through, role: str):
    class Body(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left = through(x)
            other = (x.flatten(1)[:, : left.shape[-1]] + 1)[:, :, None].expand(-1, -1, 3)
            other = other if left.dim() == 3 else other[:, None]
            summed = left @ other
            turned = (left + 1).transpose(-1, -2) @ left
            return x + summed.sum() + turned.sum()

    layers = [layer for layer in captured_module(Tokens(Body())).layers if layer.op == "matmul"]
    assert [operand.role for operand in layers[0].activations] == [role, "plain"]
    assert [operand.role for operand in layers[1].activations] == ["plain", "plain"]


def test_arithmetic_ends_a_role():
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x) + x)

    assert of(captured_module(Tokens(Body())), "body.linear").operands[0].role == "plain"


def test_a_user_that_takes_only_the_shape_is_no_consumer():
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return torch.relu(y.flatten(0, 1)).reshape_as(y)

    graph = captured_module(Tokens(Body()))
    node = graph.layer_node("body.linear")
    assert len(node.users) == 2
    assert [user.target for user, _ in consumers(node, {aten.flatten.using_ints})] == [aten.relu.default]
    assert walk_back(next(user for user, _ in consumers(node, {aten.flatten.using_ints})).args[0], {aten.flatten.using_ints}) is node


class InPlace(nn.Module):
    """Writes over a layer's output, adds into it, and fills parts of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(x))
        y += x
        parts = torch.zeros_like(y)
        parts[:, 1:] = y[:, :-1]
        parts[:, 0] = 2 * y[:, 0]
        return self.second(parts)


def test_ops_that_write_are_replaced_where_nothing_else_sees_it():
    model = randomised(Tokens(InPlace()))
    graph = captured_module(model)
    x = images(3, 8)
    with torch.no_grad():
        assert torch.equal(run(graph.module, x), model(x))
        first = graph.nodes["body.first"]
        kept = values_at(graph.module, x, [first])[first]
        body = model.body
        assert torch.equal(kept, body.first(model.embed(x).flatten(2).transpose(1, 2)))  # not what the ReLU left of it
    targets = {str(node.target) for node in graph.module.graph.nodes}
    assert {"aten.relu.default", "aten.add.Tensor"} <= targets and not {"aten.relu_.default", "aten.add_.Tensor"} & targets


def test_a_stretch_under_its_own_autocast_setting_is_part_of_the_graph():
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                a, b = self.first(x.float()).chunk(2, -1)
            return self.second(torch.cat([b, a.relu()], -1))

    model = randomised(Tokens(Body()))
    graph = captured_module(model)
    x = images(3, 8)
    with torch.no_grad():
        assert torch.equal(run(graph.module, x), model(x))
    assert [layer.name for layer in graph.layers] == ["embed", "body.first", "body.second"]
    assert {node.op for node in graph.module.graph.nodes} == {"placeholder", "get_attr", "call_function", "output"}


def test_digests_are_equal_for_equal_structures_alone():
    first = captured_module(randomised(Tokens(ThreeProjections()), seed=0))
    second = captured_module(randomised(Tokens(ThreeProjections()), seed=1))
    other = captured_module(Tokens(ThreeProjections(heads=4)))
    longer = captured_module(Tokens(ThreeProjections()), size=16)
    assert first.digest == second.digest
    assert len({graph.digest for graph in (first, other, longer)}) == 3
    _, vit = captured("vit")
    assert capture(timm_model("vit"), (3, 32, 32)).digest == vit.digest


@families
def test_blocks_cover_the_graph_in_order(family: str):
    _, graph = captured(family)
    order = [node.name for node in computing_nodes(graph.module)]
    starts = [order.index(block.first) for block in graph.blocks]
    assert starts == sorted(set(starts)) and starts[0] == 0
    names = [block.name for block in graph.blocks]
    assert len(set(names)) == len(names) > 2
    for layer in graph.layers:
        position = order.index(graph.nodes[layer.name])
        assert layer.block == names[max(index for index, start in enumerate(starts) if start <= position)]


def test_blocks_are_the_repeated_modules():
    assert [block.name for block in captured("vit")[1].blocks] == ["stem", "blocks.0", "blocks.1", "end"]
    assert all(len(block.inputs) == 1 for block in captured_module(randomised(Tokens(ThreeProjections()))).blocks)


@families
def test_running_on_from_every_block_equals_the_whole_run(family: str):
    _, graph = captured(family)
    x = images(3, size_of(graph), seed=1)
    with torch.no_grad():
        whole = run(graph.module, x)
        stepwise = {next(node.name for node in graph.module.graph.nodes if node.op == "placeholder"): x}
        for block, following in zip(graph.blocks, [*graph.blocks[1:], None], strict=True):
            cached = values_at(graph.module, x, block.inputs)
            assert torch.equal(advance(graph.module, cached, block.first, None)["output"], whole), block.name
            assert set(stepwise) == set(block.inputs)
            stepwise = advance(graph.module, stepwise, block.first, following.first if following else None)
    assert torch.equal(stepwise["output"], whole)


def test_interception_sees_the_arguments_and_replaces_the_output():
    model, graph = captured("vit")
    x = images(2, 32)
    seen = {}

    def double(compute, *arguments):
        seen["input"] = arguments[0]
        return 2 * compute(*arguments)

    with torch.no_grad():
        changed = run(graph.module, x, {graph.nodes["head"]: double})
        assert torch.allclose(changed, 2 * model(x), atol=1e-5)
        assert torch.equal(seen["input"], model.forward_head(model.forward_features(x), pre_logits=True))
        assert torch.equal(run(graph.module, x), model(x))  # nothing stays behind


def test_a_copy_is_edited_alone():
    _, graph = captured("vit")
    before = graph.module.head.weight.clone()
    edited = copy(graph)
    assert edited.head.weight is graph.module.head.weight
    assign(edited, {"head.weight": torch.zeros_like(before), "new.deep.name": torch.ones(3), "count": torch.ones(2, dtype=torch.int64)})
    assert torch.equal(graph.module.head.weight, before) and not hasattr(graph.module, "new")
    assert torch.equal(edited.new.deep.name, torch.ones(3)) and "count" in dict(edited.named_buffers())
    assert torch.count_nonzero(run(edited, images(1, 32)) - graph.module.head.bias) == 0


def test_fused_attention_is_reported():
    graph = capture(timm_model("vit", fused=True), (3, 32, 32))
    assert len(graph.unfused()) == 2
    assert not any(layer.op == "matmul" for layer in graph.layers)


def test_a_layer_run_twice_is_two_layers():
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.linear(x)))

    graph = captured_module(Tokens(Body()))
    assert [layer.name for layer in graph.layers[1:]] == ["body.linear", "body.linear.2"]
    assert len({layer.operands[1].tensor for layer in graph.layers[1:]}) == 1


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x - 1


class OneBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1) * 2


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TwoOutputs(), "TwoOutputs returns 2 values; vitq takes models that return one tensor"),
        (OneBatch(), "OneBatch.*(any batch size|needs a dynamic batch)"),
        (Branches(), "torch.export cannot capture Branches: "),
    ],
)
def test_models_that_cannot_be_captured_are_refused(model: nn.Module, message: str):
    with pytest.raises(InputError, match=message):
        captured_module(model)


def test_tensors_are_found_by_their_dotted_name():
    _, graph = captured("vit")
    node = next(node for node in graph.module.graph.nodes if node.target == "blocks.1.mlp.fc2.bias")
    assert tensor_of(graph.module, node) is graph.module.get_parameter("blocks.1.mlp.fc2.bias")
