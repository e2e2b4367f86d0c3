"""`vitq doctor` tells what fuses here: all forms of the exporter do, and what does not, or computes something else, is named."""

import json
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
from cli_session import vitq

from vitq import doctor
from vitq.doctor import FORMS, PATTERNS, Form, try_forms
from vitq.errors import VerificationError
from vitq.onnx_file.kernels import INTEGER_KERNELS
from vitq.processor import processor

ONE = (("packed", 3, 4),)


def test_the_document(tmp_path: Path) -> None:
    done = vitq("doctor", "--json", "-o", tmp_path / "said.json", folder=tmp_path)
    assert done.code == 0, done.err
    found = done.document
    assert json.loads((tmp_path / "said.json").read_text()) == found
    assert found["versions"]["onnxruntime"] == onnxruntime.__version__
    assert found["versions"]["onnx"] == onnx.__version__
    assert found["processor"]["name"] == processor().name and found["processor"]["cores"] >= 1
    assert [(form["storage"], form["weight_bits"], form["activation_bits"]) for form in found["forms"]] == list(FORMS)
    assert all(form["fault"] is None and form["fast"] == (not form["not_fused"]) for form in found["forms"])
    assert all(form["fast"] for form in found["forms"] if form["storage"] != "standard")
    kernels = {row["pattern"]: (row["kernel"], row["kernel_below_8_bits"]) for row in found["patterns"]}
    assert list(kernels) == list(PATTERNS.values())
    other = kernels.pop("other convolution")
    assert not set(other) & INTEGER_KERNELS
    assert {kernel for both in kernels.values() for kernel in both} <= INTEGER_KERNELS
    assert found["remarks"][0] == "storage packed and fast run as integer kernels here at every width, and compute what was calibrated"


def test_a_layer_that_does_not_fuse_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.optimised_graph

    def without_one(model: bytes) -> onnx.GraphProto:
        graph = real(model)
        next(node for node in graph.node if node.name == "hidden").op_type = "MatMul"
        return graph

    monkeypatch.setattr(doctor, "optimised_graph", without_one)
    (form,) = try_forms(ONE)
    assert (form.fast, form.not_fused, form.kernels["hidden"], form.fault) == (False, ("hidden",), "MatMul", None)


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (VerificationError("layer head: wrong. No file was written. Report it"), "layer head: wrong."),
        (RuntimeError("[ONNXRuntimeError] : 1\nmore"), "onnxruntime refuses it: [ONNXRuntimeError] : 1"),
    ],
)
def test_a_form_that_fails_is_no_failure_of_the_command(monkeypatch: pytest.MonkeyPatch, error: Exception, fault: str) -> None:
    def fail(*_: object) -> Iterator[None]:
        raise error

    monkeypatch.setattr(doctor, "verify_file", fail)
    (form,) = try_forms(ONE)
    assert (form.fast, form.fault) == (False, fault)


def test_remarks_say_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = dict.fromkeys(PATTERNS, "QGemm")
    forms = [
        Form("packed", 8, 8, kernels, ()),
        Form("packed", 4, 4, kernels, ("qk",)),
        Form("fast", 4, 8, kernels, ("qk",), "layer qk: wrong."),
    ]
    monkeypatch.setattr(doctor, "try_forms", lambda: forms)
    done = vitq("doctor")
    assert done.code == 0
    text = " ".join(done.out.split())
    assert "--storage packed at 4 bits, activations 4: qk run in float" in text
    assert "--storage fast at 4 bits, activations 8: layer qk: wrong." in text
    assert "packed 8 8 all yes packed 4 4 all but 1 yes fast 4 8 - no" in text
