"""Sensitivity against running the whole quantized network naively, its options, its journal, and a run that is killed."""

import json
import multiprocessing
import random
import signal
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression
from small_models import NormThenLinear, ThreeProjections, Tokens, captured, captured_module, images, randomised
from test_output_fisher import Mixed
from torch import Tensor, nn

from vitq.affine import quantize_dequantize, quantize_weight
from vitq.artifacts import Layer
from vitq.calibration.matching import match_moments
from vitq.errors import InputError, UsageError
from vitq.graph import Graph, assign, copy, run, tensor_of
from vitq.graph.dataflow import argument
from vitq.graph.layers import operand_nodes
from vitq.importance import MetricOptions, Subject
from vitq.importance.journal import Journal
from vitq.importance.quantizers import Quantizers
from vitq.importance.sensitivity import loss_increases, sensitivity
from vitq.quantizers import Uniform
from vitq.ranges import Batches, Histogram, activation_qparams, fold, weight_ranges
from vitq.rewrites import rewrite

BITS = (2, 3, 8)


@cache
def graph_of(kind: str) -> Graph:
    if kind == "vit":
        return rewrite(captured("vit")[1])
    if kind == "mixed":
        return rewrite(captured_module(randomised(Mixed())))
    return rewrite(captured_module(randomised(Tokens(nn.Sequential(ThreeProjections(), NormThenLinear(), NormThenLinear())))))


CLASSES = {"vit": 10, "mixed": 4, "tokens": 8}


def subject_of(kind: str = "tokens", batches: Batches | None = None, bits: tuple[int, ...] = BITS) -> Subject:
    graph = graph_of(kind)
    labels = torch.arange(6) % CLASSES[kind]
    given = batches if batches is not None else [(images(6, graph.input_shape[1:], seed=s), labels) for s in (0, 1)]
    return Subject(*fold(graph, given), given, bits, CLASSES[kind])


def with_options(subject: Subject, **options) -> Subject:
    return replace(subject, options=MetricOptions(**options))


# The naive version: a calibrated network for the baseline, and for each layer and width one whole pass with that layer changed


def naive_increase(subject: Subject, layer: Layer, bits: int, baseline: int | None, loss) -> float:
    """Mean increase of `loss(output, float output, labels)` over the images, every batch corrected by itself."""
    total, count = 0.0, 0
    for batch, labels in subject.batches:
        with torch.no_grad():
            base, expected = naive_network(subject, batch, baseline, None, 0), run(subject.graph.module, batch)
            total += float(
                (loss(naive_network(subject, batch, baseline, layer, bits), expected, labels) - loss(base, expected, labels)).sum()
            )
        count += len(batch)
    return total / count


def naive_network(subject: Subject, batch: Tensor, baseline: int | None, changed: Layer | None, bits: int) -> Tensor:
    graph = subject.graph
    module = copy(graph)
    if baseline:
        qparams = {tensor: fitted(found, baseline) for tensor, found in subject.histograms.items()}
        weights = {layer.name: quantized(graph, layer, baseline) for layer in graph.layers if layer.has_weight}
        scaled, biases = match_moments(graph, qparams, weights, [(batch, None)])
        tensors = {layer.operands[1].tensor: scaled[layer.name].dequantize() for layer in graph.layers if layer.has_weight}
        tensors |= {str(argument(graph.layer_node(name), 2).target): bias for name, bias in biases.items()}
        assign(module, tensors)

    def at(layer: Layer):
        def intercept(compute, *arguments):
            width = bits if layer is changed else baseline
            assert width is not None
            read = []
            for operand, x in zip(layer.activations, arguments, strict=False):
                if operand.role == "post_softmax" and width < 8:
                    squares = ((x / x.amax(-1, keepdim=True)).sqrt() * (2**width - 1)).round().square()
                    read.append(squares / squares.sum(-1, keepdim=True))
                    continue
                q = fitted(subject.histograms[operand.tensor], width)
                read.append(quantize_dequantize(x, q.scale, q.zero_point, q.bits))
            if layer is not changed or not layer.has_weight:
                return compute(*read, *arguments[len(read) :])
            output = compute(*read, quantized(graph, layer, bits).dequantize(), None, *arguments[3:])
            return restored(output, wanted[layer.name], -1 if layer.op == "linear" else 1)

        return intercept

    wanted: dict[str, Tensor] = {}

    def watch(layer: Layer):
        def intercept(compute, *arguments):
            wanted[layer.name] = compute(*arguments)
            return wanted[layer.name]

        return intercept

    run(graph.module, batch, {graph.nodes[layer.name]: watch(layer) for layer in graph.layers})
    concerned = [layer for layer in graph.layers if baseline or layer is changed]
    return run(module, batch, {graph.nodes[layer.name]: at(layer) for layer in concerned})


def quantized(graph: Graph, layer: Layer, bits: int):
    weight = tensor_of(graph.module, operand_nodes(graph.layer_node(layer.name))[1])
    return quantize_weight(weight, *weight_ranges(weight, bits), bits)


FITTED: dict[tuple[int, int], tuple[Histogram, Uniform]] = {}


def fitted(histogram: Histogram, bits: int) -> Uniform:
    """Fitted once for each histogram, which is kept so that no other gets its id."""
    if (id(histogram), bits) not in FITTED:
        FITTED[id(histogram), bits] = histogram, activation_qparams(histogram, bits)
    return FITTED[id(histogram), bits][1]


def restored(output: Tensor, wanted: Tensor, axis: int) -> Tensor:
    """Each channel of the output with the mean and standard deviation of the wanted one, by a loop."""
    output = output.clone().movedim(axis, 0)
    for channel, like in zip(output, wanted.movedim(axis, 0), strict=True):
        gain = min(max(float(like.double().std(correction=0) / channel.double().std(correction=0)), 0.5), 2.0)
        channel.sub_(channel.mean()).mul_(gain).add_(like.mean())
    return output.movedim(0, axis)


def kl(output: Tensor, expected: Tensor, labels: Tensor | None) -> Tensor:
    p = expected.double().softmax(1)
    return (p * (p.log() - output.double().log_softmax(1))).sum(1)


def cross_entropy(output: Tensor, expected: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    return torch.nn.functional.cross_entropy(output.double(), labels, reduction="none")


def wrong(output: Tensor, expected: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    return 100.0 * (output.argmax(1) != labels)


def relative_error(output: Tensor, expected: Tensor, labels: Tensor | None) -> Tensor:
    return ((output - expected).double().norm(dim=1) / expected.double().norm(dim=1)).square() / 2


# With a quantized baseline, float noise moves single codes of other layers to their neighbours.
def compare(subject: Subject, layers: list[Layer], baseline: int | None, names: tuple[str, ...], naive: list) -> None:
    changes = [(layer, width) for layer in layers for width in BITS]
    with Journal(None, {}) as journal:
        quantizers = Quantizers.of(subject, {*BITS, *([baseline] if baseline else [])})
        found = loss_increases(subject, quantizers, changes, baseline, names, journal)
    assert found.num_images == 12
    for layer, width in changes:
        for value, loss in zip(found.mean[layer.name, width], naive, strict=True):
            expected = naive_increase(subject, layer, width, baseline, loss)
            assert value == pytest.approx(expected, rel=1e-2 if baseline else 1e-4, abs=3e-4 if baseline else 1e-5), (
                layer.name,
                width,
                loss.__name__,
            )


@pytest.mark.parametrize("baseline", [None, 8])
def test_increases_are_those_of_the_whole_network(baseline: int | None):
    subject = subject_of()
    compare(subject, list(subject.graph.layers[::3]), baseline, ("kl", "cross-entropy", "top1"), [kl, cross_entropy, wrong])


def test_increases_of_convolutions_and_windows():
    subject = subject_of("mixed")
    some = [layer for layer in subject.graph.layers if layer.op == "convolution" or layer.type == "qk"]
    compare(subject, some[::2], 8, ("kl",), [kl])


def test_a_backbone_is_priced_by_its_relative_error():
    subject = replace(subject_of(), num_classes=0)
    compare(subject, list(subject.graph.layers[1::4]), 8, ("kl",), [relative_error])


def test_baselines_by_other_names():
    subject = subject_of()
    assert sensitivity(with_options(subject, sensitivity_baseline="uniform 8")) == (
        at_eight := sensitivity(with_options(subject, sensitivity_baseline="w8a8"))
    )
    at_three = sensitivity(with_options(subject, sensitivity_baseline="uniform 3"))
    floating = sensitivity(with_options(subject, sensitivity_baseline="fp32"))
    assert sensitivity(subject) == floating
    assert at_three != floating
    assert sum(costs[2] for costs in floating.tied.values()) > 0.0 == sum(costs[2] for costs in at_eight.tied.values())


def test_the_table_is_the_increase_made_to_fall():
    subject = with_options(subject_of(bits=(2, 3, 4, 8)), sensitivity_baseline="w8a8")
    table = sensitivity(subject)
    changes = [(layer, width) for layer in subject.graph.layers for width in (2, 3, 4)]
    with Journal(None, {}) as journal:
        found = loss_increases(subject, Quantizers.of(subject, (2, 3, 4, 8)), changes, 8, ("kl",), journal).mean
    assert table.unit == "nats"
    for layer in subject.graph.layers:
        raw = [*(float(found[layer.name, width][0]) for width in (2, 3, 4)), 0.0]
        assert np.allclose(table.tied[layer.name], np.maximum(isotonic_regression(raw, increasing=False).x, 0))
        if layer.has_weight:
            assert np.allclose(np.add(table.weight[layer.name], table.activation[layer.name]), table.tied[layer.name])
            assert 0 < table.weight[layer.name][0] < table.tied[layer.name][0]
    for loss, unit in (("cross-entropy", "relative"), ("top1", "accuracy")):
        assert sensitivity(with_options(subject, sensitivity_baseline="w8a8", sensitivity_loss=loss)).unit == unit


def test_values_before_the_layers_block_are_not_computed_again(monkeypatch: pytest.MonkeyPatch):
    """A layer of the last block must not run the first one again: the first block's ops are counted."""
    subject = subject_of("vit", [(images(4, 32), None)], (2, 3, 4))
    counts: dict[str, int] = {}
    module = sys.modules["vitq.graph.run"]
    execute = module._execute

    def counted(owner, node, *rest):
        counts[node.name] = counts.get(node.name, 0) + 1
        return execute(owner, node, *rest)

    monkeypatch.setattr(module, "_execute", counted)
    sensitivity(subject)
    blocks = [layer.block for layer in subject.graph.layers]
    for layer in subject.graph.layers:
        up_to_it = sum(blocks.index(layer.block) >= blocks.index(other) for other in blocks)
        assert counts[subject.graph.nodes[layer.name]] == 2 + 3 * up_to_it, layer.name  # float, baseline, three widths of these layers


def test_options_that_cannot_be_used():
    subject = subject_of(batches=[(images(4, 8), None)])
    with pytest.raises(UsageError, match=r"baseline 'w4a4' is not known; give fp32, w8a8 or uniform K"):
        sensitivity(with_options(subject, sensitivity_baseline="w4a4"))
    with pytest.raises(InputError, match=r"the loss top1 needs labels and the images have none; give a folder of class folders, or"):
        sensitivity(with_options(subject, sensitivity_loss="top1"))
    foreign = replace(subject, batches=[(images(4, 8), torch.tensor([0, 1, 2, 10]))])
    with pytest.raises(InputError, match=r"the images have labels 0 to 10, the model 8 classes; give the model's own images"):
        sensitivity(with_options(foreign, sensitivity_loss="cross-entropy"))
    backbone = with_options(replace(subject, num_classes=0), sensitivity_loss="cross-entropy")
    with pytest.raises(UsageError, match=r"needs a classifier and the model has none \(num_classes 0\); give the loss kl"):
        sensitivity(backbone)


# The journal


def test_a_finished_journal_answers_without_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told: list[float] = []
    subject = replace(subject_of(), journal=tmp_path / "runs" / "journal.jsonl", progress=told.append)
    table = sensitivity(subject)
    assert len(told) == 2 * 3 * len(subject.graph.layers) == len(set(told))  # each measurement of each batch, in images
    assert told == sorted(told) and told[0] == 0 and told[len(told) // 2] == told[-1] - told[len(told) // 2 - 1] > 1
    written = (tmp_path / "runs" / "journal.jsonl").read_bytes()
    lines = [json.loads(line) for line in written.splitlines()]
    assert len(lines) == 1 + 2 * (1 + 3 * len(subject.graph.layers))  # header; two batches of a baseline and three widths a layer
    assert lines[0]["graph"] == subject.graph.digest
    monkeypatch.setattr(sys.modules["vitq.importance.sensitivity"], "advance", None)
    assert sensitivity(subject) == table
    assert (tmp_path / "runs" / "journal.jsonl").read_bytes() == written


def test_a_journal_cut_anywhere_is_gone_on_with(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    subject = replace(subject_of(), journal=path)
    table = sensitivity(subject)
    written = path.read_bytes()
    for length in (0, 5, 40, len(written.splitlines(keepends=True)[0]), len(written) // 3, len(written) - 1):
        path.write_bytes(written[:length])
        assert sensitivity(subject) == table
        assert path.read_bytes() == written
    path.write_bytes(written[: len(written) // 2] + b"\x00\xff garbage\n" + written[len(written) // 2 :])
    assert sensitivity(subject) == table and path.read_bytes() == written


def test_a_journal_of_something_else_is_begun_anew(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    subject = replace(subject_of(), journal=path)
    sensitivity(subject)
    header, first, *_ = path.read_bytes().splitlines()
    others = {
        "loss": with_options(subject, sensitivity_loss="top1"),
        "bits": replace(subject, bits=(2, 4)),
        "weights": replace(subject, graph=doubled(subject.graph)),
        "seed": replace(subject, seed=1),
    }
    for name, other in others.items():
        fresh = sensitivity(replace(other, journal=None))
        assert sensitivity(other) == fresh
        assert path.read_bytes().splitlines()[0] != header, name
        sensitivity(subject)
    other_images = replace(subject, batches=[(batch.flip(3), labels) for batch, labels in subject.batches])
    assert sensitivity(other_images) == sensitivity(replace(other_images, journal=None))
    assert path.read_bytes().splitlines()[0] == header  # the histograms are the same here, the images are not
    assert path.read_bytes().splitlines()[1] != first


def doubled(graph: Graph) -> Graph:
    module = copy(graph)
    name = graph.layers[-1].operands[1].tensor
    assign(module, {name: 2 * module.state_dict()[name]})
    return Graph(module, graph.input_shape, graph.layers, graph.nodes, graph.blocks)


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_text('{"precious": 1}\n')
    with pytest.raises(InputError, match=r"notes.txt is no vitq-journal/1 file, so nothing is written to it; move it away"):
        sensitivity(replace(subject_of(), journal=path))
    assert path.read_text() == '{"precious": 1}\n'
    with pytest.raises(InputError, match=r"cannot write .*; choose another place for the journal"):
        Journal(tmp_path, {})


def test_numbers_survive_the_journal(tmp_path: Path):
    numbers = [0.1, 1e-300, -3.0, 12345678.90123456789, float(np.nextafter(1, 2))]
    for compute in (lambda: numbers, lambda: pytest.fail("it is recorded already")):
        with Journal(tmp_path / "journal", {"of": "a test"}) as journal:
            assert journal.result({"key": 1}, compute) == numbers


# Killed at random moments


PROCESSES = multiprocessing.get_context("forkserver")  # torch is imported once, by the server
PROCESSES.set_forkserver_preload(["timm", "vitq.importance.sensitivity"])


def every_width() -> Subject:
    return subject_of(bits=(2, 3, 4, 5, 6, 7, 8))


def journalled(journal: Path) -> None:
    sensitivity(replace(every_width(), journal=journal))


def kill(journal: Path, moment: int) -> None:
    """Runs the metric in a process of its own and kills it once the journal has so many lines more, wherever it then is."""
    goal = lines(journal) + moment
    process = PROCESSES.Process(target=journalled, args=(journal,))
    process.start()
    while process.is_alive() and lines(journal) < goal:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def resumes(folder: Path, kills: int) -> None:
    whole = sensitivity(replace(every_width(), journal=folder / "whole.jsonl"))
    chance = random.Random(kills)
    for _ in range(kills):
        kill(folder / "killed.jsonl", chance.randint(1, 12))
    assert 1 < lines(folder / "killed.jsonl") < lines(folder / "whole.jsonl")
    resumed = sensitivity(replace(every_width(), journal=folder / "killed.jsonl"))
    assert resumed.model_dump_json() == whole.model_dump_json()
    assert (folder / "killed.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path):
    resumes(tmp_path, kills=1)


@pytest.mark.slow
def test_ten_kills_end_with_the_same_bytes(tmp_path: Path):
    resumes(tmp_path, kills=10)
