import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeft.export.trt_builder import (
    BuilderError,
    BuildResult,
    Conditions,
    Int8Summary,
    Kernel,
    build,
    build_or_load,
    conditions,
    engine_path,
    find_tensorrt,
    inspector_kernels,
    int8_summary,
    kernels,
    load_engine,
)
from tests.fake_tensorrt import TABLE, Behaviour, fake_tensorrt

FLAVOURS = [("tensorrt", "10.3.0"), ("tensorrt", "11.4.0.106"), ("tensorrt_rtx", "1.7.1.116")]
DRIVER = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient)"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"a model")
    return path


def rtx(**behaviour: Any) -> Any:
    return fake_tensorrt("tensorrt_rtx", "1.7.1.116", Behaviour(**behaviour))


@pytest.mark.parametrize(("flavour", "version"), FLAVOURS)
def test_one_builder_serves_every_product(flavour: str, version: str, model: Path) -> None:
    behaviour = Behaviour(parse_log=[("WARNING", "careful"), ("INFO", "banner")])
    result = build(fake_tensorrt(flavour, version, behaviour), model, batches=(1, 2, 4))
    assert (result.flavour, result.version, result.engine, result.errors) == (flavour, version, b"plan", [])
    assert result.warnings == ["careful"]
    assert result.matrix_nodes == ["stem/Conv", "fc/Gemm"]
    assert behaviour.seen["flags"] == (0b11 if version.startswith("10") else 0b10)
    assert behaviour.seen["profile"] == {"images": ((1, 3, 2, 2), (2, 3, 2, 2), (4, 3, 2, 2))}
    assert result.int8 == (Int8Summary(2, 2, []) if flavour == "tensorrt_rtx" else None)


def test_targets_are_for_the_builder_that_needs_no_gpu(model: Path) -> None:
    behaviour = Behaviour()
    assert build(fake_tensorrt("tensorrt_rtx", "1.7", behaviour), model, targets=("SM86", "SM89")).engine == b"plan"
    assert behaviour.seen["targets"] == ["sm86", "sm89"]
    assert build(rtx(), model, targets=("SM87",)).errors == ["tensorrt_rtx 1.7.1.116 does not know the target 'SM87'"]
    refused = build(fake_tensorrt("tensorrt", "11.4", Behaviour()), model, targets=("SM86",))
    assert (refused.engine, refused.errors) == (None, ["tensorrt builds for the GPU it runs on: targets SM86 need tensorrt_rtx"])


def test_a_fixed_batch_needs_no_profile(model: Path) -> None:
    behaviour = Behaviour(input_batch=1)
    assert build(fake_tensorrt("tensorrt", "10.3", behaviour), model).engine == b"plan"
    assert "profile" not in behaviour.seen


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ({"parser_errors": [("stem/Conv", "Conv", f"bad weights\n{DRIVER}")], "parse": False}, "node 'stem/Conv' (Conv): bad weights"),
        ({"parser_errors": [("", "", "Failed to parse the ONNX model.")], "parse": False}, "Failed to parse the ONNX model."),
        ({"parse": False}, "the file was not parsed, and no reason given"),
        ({"n_layers": 0}, "the network is empty: no layers or no outputs were found in the file"),
        ({"profile_index": -1}, "input 'images' (-1, 3, 2, 2): batches 1, 1, 32 are refused"),
        ({"builds": False, "build_log": [("ERROR", "no kernel for this"), ("ERROR", DRIVER)]}, "no kernel for this"),
        ({"builds": False, "build_log": [("ERROR", DRIVER)]}, DRIVER),
        ({"builds": False, "parse_log": [("ERROR", "of the parser")]}, "the build failed and gave no reason"),
    ],
)
def test_what_is_wrong_with_a_model_is_in_the_result(behaviour: dict[str, Any], error: str, model: Path) -> None:
    result = build(rtx(**behaviour), model)
    assert (result.engine, result.errors) == (None, [error])


def test_what_is_wrong_with_the_machine_is_raised(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BuilderError, match=r"^TensorRT 8\.6\.1 is too old: 10 is the first that keeps to the types of the file$"):
        build(fake_tensorrt("tensorrt", "8.6.1", Behaviour()), model)
    with pytest.raises(BuilderError, match=r"^tensorrt 10\.3 has no builder on this machine: no device$") as caught:
        build(fake_tensorrt("tensorrt", "10.3", Behaviour(has_device=False)), model)
    assert caught.value.hint == "nvidia-smi"
    for make in (lambda path: build(rtx(), path), lambda path: conditions(rtx(), path, "", "")):
        with pytest.raises(BuilderError, match=r"none.onnx' does not exist$"):
            make(tmp_path / "none.onnx")


def test_the_first_installed_product_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = rtx()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    assert find_tensorrt() is fake
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BuilderError) as caught:
        find_tensorrt()
    assert caught.value.message.startswith("no TensorRT: ")
    assert "tensorrt_rtx" in caught.value.message
    assert caught.value.hint.splitlines() == [
        "RTX GPU: pip install tensorrt-rtx",
        "  other GPU: pip install --extra-index-url https://pypi.nvidia.com tensorrt",
        "  Jetson: JetPack",
    ]


def test_the_table_of_kernels_is_read_from_the_log() -> None:
    assert kernels(["something", TABLE]) == [
        Kernel("a_myl0_1", "kgen", ["UInt8"], [], ["stem/Conv", "image/Cast"]),
        Kernel("stem/Conv_myl0_2", "correlation", ["Int8"], ["Int8", "Float"], ["stem/Conv", "stem/bias/Mul"]),
        Kernel("fc/Gemm_myl0_3", "gemm", ["Int8"], ["Int8"], ["fc/Gemm"]),
    ]
    assert kernels(["no table", "Layers"]) == []
    assert int8_summary(kernels([TABLE])) == Int8Summary(2, 2, [])


def kernel(kind: str, inputs: list[str], constants: list[str], *nodes: str) -> Kernel:
    return Kernel("k", kind, inputs, constants, list(nodes))


@pytest.mark.parametrize(
    ("inputs", "constants", "is_int8"),
    [
        (["Int8"], ["Int8", "Float"], True),
        (["Int8", "Float"], ["Int8", "Float"], True),
        (["Int8", "Int8"], ["Float"], True),
        (["Int8"], [], True),
        (["Float", "Float"], ["Float"], False),
        (["Float"], ["Int8"], False),
        (["Int8"], ["Float"], False),
        ([], ["Int8"], False),
    ],
    ids=str,
)
def test_both_operands_must_be_int8(inputs: list[str], constants: list[str], is_int8: bool) -> None:
    assert kernel("correlation", inputs, constants).is_int8 is is_int8


def test_nodes_in_float_are_named_and_none_is_overlooked() -> None:
    table = [
        kernel("correlation", ["Int8"], ["Int8"], "a/Conv"),
        kernel("correlation", ["Float"], ["Float"], "b/Conv", "b/Relu"),
        kernel("runtime_fusion", ["Float"], ["Int8"], "fc/Gemm"),
        kernel("kgen", ["Float"], [], "b/Conv"),
    ]
    assert int8_summary(table) == Int8Summary(1, 2, ["b/Conv", "b/Relu"])
    assert int8_summary(table, ["a/Conv", "b/Conv", "fc/Gemm"]) == Int8Summary(1, 3, ["b/Conv", "fc/Gemm"])
    assert int8_summary([]) == Int8Summary(0, 0, [])


def test_the_inspector_of_both_majors_is_understood() -> None:
    """Written after the documentation of TensorRT 10 and 11; no device gave these texts."""
    ten = {
        "Layers": [
            {
                "Name": "stem", "LayerType": "CaskConvolution", "ParameterType": "Convolution",
                "Inputs": [{"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
                "Weights": {"Type": "Int8", "Count": 432}, "Metadata": "[ONNX Layer: stem/Conv]\u001e[ONNX Layer: stem/Relu]",
            },
            {"Name": "fc", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Linear FP32"}], "Metadata": "[ONNX Layer: fc/Gemm]"},
            "only a name",
        ]
    }  # fmt: skip
    assert inspector_kernels(json.dumps(ten)) == [
        Kernel("stem", "correlation", ["Int8"], ["Int8"], ["stem/Conv", "stem/Relu"]),
        Kernel("fc", "gemm", ["Linear FP32"], [], ["fc/Gemm"]),
    ]
    eleven = {"Layers": [{"Name": "a", "LayerType": "Reformat", "Inputs": [{"Format": "Row major", "Datatype": "Int8"}, "?"]}]}
    assert inspector_kernels(json.dumps(eleven)) == [Kernel("a", "reformat", ["Int8", ""], [], [])]
    assert inspector_kernels("{}") == []


def cached(model: Path, trt: Any) -> Conditions:
    wanted = conditions(trt, model, "Fake GPU", "8.6")
    assert build_or_load(trt, model, wanted, say=lambda _: None).is_new
    return wanted


def test_an_engine_that_fits_is_not_built_again(model: Path) -> None:
    wanted = cached(model, rtx())
    said: list[str] = []
    engine = build_or_load(rtx(builds=False), model, wanted, say=said.append)
    assert (engine.plan, engine.is_new, engine.int8, said) == (b"plan", False, Int8Summary(2, 2, []), [])
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.engine", "model.engine.json", "model.onnx"]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"flavour": "tensorrt"}, "flavour is 'tensorrt_rtx', not 'tensorrt'"),
        ({"version": "1.8"}, "version is '1.7.1.116', not '1.8'"),
        ({"gpu": "Other GPU"}, "gpu is 'Fake GPU', not 'Other GPU'"),
        ({"compute_capability": "8.9"}, "compute_capability is '8.6', not '8.9'"),
        ({"model_sha256": "0"}, "model_sha256 is '1b4f"),
        ({"batches": [1, 2, 3]}, r"batches is \[1, 1, 32\], not \[1, 2, 3\]"),
    ],
)
def test_an_engine_for_something_else_is_refused_by_name(change: dict[str, Any], differs: str, model: Path) -> None:
    wanted = dataclasses.replace(cached(model, rtx()), **change)
    differs = differs.replace("1b4f", dataclasses.asdict(conditions(rtx(), model, "", ""))["model_sha256"])
    with pytest.raises(BuilderError, match=rf"model.engine' does not fit: {differs}") as caught:
        load_engine(engine_path(model), wanted)
    assert caught.value.hint == "build it again: an engine made elsewhere is code of others"


def test_a_changed_engine_is_refused_before_it_is_loaded(model: Path) -> None:
    wanted = cached(model, rtx())
    engine_path(model).write_bytes(b"evil")
    with pytest.raises(BuilderError, match=r"does not fit: engine_sha256 is '[0-9a-f]{64}', not '[0-9a-f]{64}'$"):
        load_engine(engine_path(model), wanted)


@pytest.mark.parametrize("record", [None, "{", "[]", "{}", '{"int8": {"n": 1}}'])
def test_an_engine_without_a_record_is_refused(record: str | None, model: Path) -> None:
    wanted = cached(model, rtx())
    side = model.with_name("model.engine.json")
    if record is None:
        side.unlink()
    else:
        side.write_text(record)
    with pytest.raises(BuilderError, match=r"model.engine' has no usable record 'model.engine.json': "):
        load_engine(engine_path(model), wanted)


def test_a_changed_model_is_built_again_and_said(model: Path) -> None:
    cached(model, rtx())
    model.write_bytes(b"another model")
    said: list[str] = []
    trt = rtx(parse_log=[("WARNING", "careful")])
    wanted = conditions(trt, model, "Fake GPU", "8.6")
    assert build_or_load(trt, model, wanted, say=said.append).is_new
    assert said[0].startswith(f"building again: '{engine_path(model)}' does not fit: model_sha256 is ")
    assert said[1:] == ["warning of the parser: careful"]
    assert load_engine(engine_path(model), wanted).plan == b"plan"


def test_a_refused_model_leaves_no_engine(model: Path) -> None:
    trt = rtx(parser_errors=[("a/Conv", "Conv", "bad")], parse=False)
    said: list[str] = []
    with pytest.raises(BuilderError, match=r"^tensorrt_rtx 1\.7\.1\.116 refuses '.*model.onnx': node 'a/Conv' \(Conv\): bad$"):
        build_or_load(trt, model, conditions(trt, model, "", ""), say=said.append)
    assert said == [f"building '{engine_path(model)}'"]
    assert not engine_path(model).exists()


def test_a_result_without_a_table_claims_nothing() -> None:
    assert BuildResult("tensorrt", "11.4", b"plan", [], ["a/Conv"], [], []).int8 is None
