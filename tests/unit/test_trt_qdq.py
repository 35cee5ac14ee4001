"""Target "trt": what an export writes, checks and says, with and without NVIDIA's builder."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from edgeft.errors import ArtifactError, UnsupportedError, VerificationError
from edgeft.export import TARGETS, trt_check
from edgeft.export.signed import is_signed, signed_graph
from edgeft.export.trt_qdq import TARGET, TrtTarget, conversion_cost, trtexec
from edgeft.export.trt_qdq import TARGETS as GPUS
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Conv, IntegerGraph, Linear
from edgeft.interpret import Interpreter
from tests.exports import CLASSES, N_GOLDEN, plain_net, wide_net, write_run
from tests.graphs import random_images, residual_net

needs_builder = pytest.mark.skipif(not trt_check.available(), reason="tensorrt_rtx is not installed: pip install 'edgeft[trt-check]'")

TRTEXEC = (
    "trtexec --onnx=model.onnx --saveEngine=model.engine --minShapes=images:1x3x12x12 --optShapes=images:1x3x12x12 "
    "--maxShapes=images:32x3x12x12 --profilingVerbosity=detailed --skipInference"
)
NOT_BUILT = "       emitted and linted; not built (pip install 'edgeft[trt-check]' builds it without a GPU)"
ON_THE_DEVICE = f"       on the device: python build_engine.py, or {TRTEXEC}"
INSTEAD = "       trained for it instead, additions inside convolutions: edgeft train-quantize --profile s8 --set quant.residual=wide"


@pytest.fixture
def no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_check, "available", lambda: False)


def built(n: int = 4, fused: int = 0, adds: int = 0) -> trt_check.AheadOfTime:
    return trt_check.AheadOfTime("1.7.1", GPUS, n, n, fused, adds, 1000, ())


def first_line(out: Path, graph: IntegerGraph) -> str:
    megabytes = (out / "model.onnx").stat().st_size / 1e6
    return (
        f"trt    exact on {N_GOLDEN}/{N_GOLDEN} images, {len(graph.tensors)} tensors each, in ONNX Runtime {onnxruntime.__version__} "
        f"without optimizations   {megabytes:.1f} MB   {out / 'model.onnx'}"
    )


# Export


@pytest.mark.usefixtures("no_builder")
def test_an_unsigned_run_is_converted_and_the_cost_is_said(tmp_path: Path) -> None:
    graph = residual_net(0)
    artifact = write_run(tmp_path / "run", graph, labelled=True)
    target: TrtTarget = TARGETS.get("trt")
    result = target.export(artifact, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["build_engine.py", "model.onnx"]
    assert (result.target, result.path, result.converted) == ("trt", tmp_path / "out", True)
    assert is_signed(result.graph)
    samples = artifact.samples()
    images = samples["images"]
    before, after = (Interpreter(each).logits(images).argmax(1) for each in (graph, result.graph))
    same, right = int((before == after).sum()), int((after == samples["labels"]).sum())
    assert result.summary["conversion"] == {"images": 4, "same_class": same, "right_before": 2, "right_after": right}
    assert result.lines == (
        first_line(tmp_path / "out", result.graph),
        NOT_BUILT,
        f"       converted from profile u8, one bit less after every ReLU: {same} of 4 stored samples keep their class; "
        f"right 2 before, {right} after",
        INSTEAD,
        ON_THE_DEVICE,
    )
    np.testing.assert_array_equal(target.load(tmp_path / "out", threads=1).logits(images), Interpreter(result.graph).logits(images))


@pytest.mark.usefixtures("no_builder")
def test_a_signed_run_keeps_its_integers(tmp_path: Path) -> None:
    graph = residual_net(0, profile="s8", image_format="s8.7")
    artifact = write_run(tmp_path / "run", graph)
    result = TARGET.export(artifact, tmp_path / "out")
    assert not result.converted
    assert result.graph.to_json() == graph.to_json()
    assert result.graph.constants.keys() == graph.constants.keys()
    for name, constant in graph.constants.items():
        np.testing.assert_array_equal(result.graph.constants[name], constant, strict=True)
    assert result.lines == (first_line(tmp_path / "out", graph), NOT_BUILT, ON_THE_DEVICE)
    images = artifact.samples()["images"]
    np.testing.assert_array_equal(TARGET.load(tmp_path / "out").logits(images), Interpreter(graph).logits(images))


@pytest.mark.usefixtures("no_builder")
def test_the_summary_is_json_and_says_what_was_done(tmp_path: Path) -> None:
    artifact = write_run(tmp_path / "run", plain_net())
    result = TARGET.export(artifact, tmp_path / "out")
    assert json.loads(json.dumps(result.summary)) == result.summary
    assert {name: result.summary[name] for name in result.summary if name != "conversion"} == {
        "file": "model.onnx", "file_bytes": (tmp_path / "out" / "model.onnx").stat().st_size, "opset": 17,
        "verified_in": f"ONNX Runtime {onnxruntime.__version__}", "verified_images": N_GOLDEN,
        "verified_tensors": len(result.graph.tensors),
        "logits_frac": result.graph.format(result.graph.output).frac, "residual": "branch", "converted_from": "u8",
        "ahead_of_time": None, "trtexec": TRTEXEC,
    }  # fmt: skip


@pytest.mark.usefixtures("no_builder")
def test_the_file_says_where_it_comes_from(tmp_path: Path) -> None:
    artifact = write_run(tmp_path / "run", wide_net())
    TARGET.export(artifact, tmp_path / "out")
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert (about["edgeft.artifact"], about["edgeft.profile"], about["edgeft.residual"]) == (artifact.digest, "s8", "wide")
    assert json.loads(about["edgeft.preprocessing"]) == artifact.manifest.preprocessing
    assert json.loads(about["edgeft.classes"]) == list(CLASSES)


@pytest.mark.parametrize("residual", ["wide", "branch", "none"])
def test_what_the_builder_found_is_said(residual: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, adds, fused = {
        "wide": (wide_net(), 2, 2), "branch": (residual_net(0, profile="s8", image_format="s8.7"), 2, 0),
        "none": (plain_net(profile="s8", image_format="s8.7"), 0, 0),
    }[residual]  # fmt: skip
    asked: list[Any] = []

    def ahead_of_time(*arguments: Any) -> trt_check.AheadOfTime:
        asked.append(arguments)
        return built(4, fused, adds)

    monkeypatch.setattr(trt_check, "available", lambda: True)
    monkeypatch.setattr(trt_check, "ahead_of_time", ahead_of_time)
    result = TARGET.export(write_run(tmp_path / "run", graph), tmp_path / "out")
    assert asked == [(tmp_path / "out" / "model.onnx", ("SM86", "SM89", "SM120"))]
    line = "parsed and built ahead of time by TensorRT-RTX 1.7.1 for SM86, SM89, SM120; 4 of 4 convolutions and gemms int8; "
    expected = [f"       {line}not run on a device"]
    expected += [f"       {fused} of {adds} residual additions run inside a convolution ({residual})"] if adds else []
    assert result.lines == (first_line(tmp_path / "out", graph), *expected, ON_THE_DEVICE)
    assert result.summary["ahead_of_time"] == built(4, fused, adds).to_json()


@needs_builder
def test_the_builder_of_nvidia_takes_what_is_written(tmp_path: Path) -> None:
    result = TARGET.export(write_run(tmp_path / "run", plain_net()), tmp_path / "out")
    found = result.summary["ahead_of_time"]
    n = sum(isinstance(op, Conv | Linear) for op in result.graph.ops)
    assert (found["n_int8"], found["n_total"], found["targets"]) == (n, n, ["SM86", "SM89", "SM120"])
    assert re.fullmatch(
        r" {7}parsed and built ahead of time by TensorRT-RTX [\d.]+ for SM86, SM89, SM120; "
        rf"{n} of {n} convolutions and gemms int8; not run on a device",
        result.lines[1],
    )
    json.dumps(result.summary)


# Failures


@pytest.mark.usefixtures("no_builder")
def test_recorded_codes_that_differ_fail_the_export_of_a_signed_run(tmp_path: Path) -> None:
    graph = plain_net(profile="s8", image_format="s8.7")
    with pytest.raises(VerificationError) as caught:
        TARGET.export(write_run(tmp_path / "run", graph, wrong=1), tmp_path / "out")
    assert caught.value.message == f"layer '{graph.output}': the exported model does not give the codes recorded in the artifact"


@pytest.mark.usefixtures("no_builder")
def test_a_file_that_gives_other_integers_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, other = plain_net(profile="s8", image_format="s8.7"), plain_net(1, profile="s8", image_format="s8.7")
    runner = Interpreter(other)
    monkeypatch.setattr(TrtTarget, "load", lambda *_, **__: runner)
    with pytest.raises(VerificationError, match=r"^layer 'conv0': interpreter differs from interpreter in \d+ of 1152 codes, by up to"):
        TARGET.export(write_run(tmp_path / "run", graph), tmp_path / "out")


def test_a_network_that_cannot_be_exact_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    graph = plain_net(profile="s8", image_format="s8.7")
    shift = int(graph.shift(graph.ops[0])[0])
    fmt = FixedPointFormat(8, graph.format("conv0").frac + shift - 18, signed=True)
    tensors = {**graph.tensors, "conv0": dataclasses.replace(graph.tensors["conv0"], format=fmt)}
    constants = {**graph.constants, "conv0.bias": np.full(8, 2**25, np.int32)}
    coarse = dataclasses.replace(graph, tensors=tensors, constants=constants)
    bound = coarse.accumulator_bound(first) if isinstance(first := coarse.ops[0], Conv) else 0
    with pytest.raises(UnsupportedError) as caught:
        TARGET.export(write_run(tmp_path / "run", coarse), tmp_path / "out")
    assert caught.value.message == (
        f"layer 'conv0': shift 18 is more than 17 and its accumulator may reach {bound}, more than float32 holds exactly (16777216)"
    )
    assert not (tmp_path / "out").exists()


def test_loading_what_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        TARGET.load(tmp_path)
    assert caught.value.message == f"'{tmp_path / 'model.onnx'}' does not exist"
    assert caught.value.hint == "edgeft export RUN --target trt"


# What goes with the file


@pytest.mark.usefixtures("no_builder")
def test_the_script_is_written_and_compiles(tmp_path: Path) -> None:
    TARGET.export(write_run(tmp_path / "run", plain_net()), tmp_path / "out")
    text = (tmp_path / "out" / "build_engine.py").read_text(encoding="utf-8")
    assert text == trt_check.script_text()
    compile(text, "build_engine.py", "exec")


def test_the_command_for_trtexec_has_the_shape_of_the_image() -> None:
    assert trtexec(plain_net()) == TRTEXEC


def test_the_cost_of_a_conversion_is_counted_with_and_without_labels() -> None:
    graph = plain_net(0)
    signed = signed_graph(graph)
    images = random_images(graph, 60)
    before, after = (Interpreter(each).logits(images).argmax(1) for each in (graph, signed))
    assert 0 < (before != after).sum() < 60, "the example shows something"
    same = int((before == after).sum())
    assert conversion_cost(graph, signed, {"images": images}) == {"images": 60, "same_class": same}
    assert conversion_cost(graph, signed, {"images": images, "labels": after}) == {
        "images": 60, "same_class": same, "right_before": same, "right_after": 60,
    }  # fmt: skip
    assert conversion_cost(graph, graph, {"images": images})["same_class"] == 60
