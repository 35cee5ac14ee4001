import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeft.errors import EdgeftError, MissingExtraError, UnsupportedError
from edgeft.export import trt_check
from edgeft.export.trt_check import ahead_of_time, available, script_text
from tests.trt_files import N_MATRIX_KERNELS, find, good_model, save, set_constant

needs_builder = pytest.mark.skipif(not available(), reason="tensorrt_rtx is not installed: pip install 'edgeft[trt-check]'")


def refusal(model: onnx.ModelProto, path: Path) -> EdgeftError:
    with pytest.raises(UnsupportedError) as caught:
        ahead_of_time(save(model, path))
    return caught.value


@needs_builder
def test_a_good_file_is_int8_throughout(tmp_path: Path) -> None:
    found = ahead_of_time(save(good_model(), tmp_path / "model.onnx"), ("SM86", "SM89"))
    assert (found.n_int8, found.n_total, found.n_fused_adds, found.n_adds) == (N_MATRIX_KERNELS, N_MATRIX_KERNELS, 1, 1)
    assert found.line == (
        f"parsed and built ahead of time by TensorRT-RTX {found.version} for SM86, SM89; "
        "4 of 4 convolutions and gemms int8; not run on a device"
    )
    assert found.engine_bytes > 10_000
    assert {"correlation", "gemm"} <= {kernel.type for kernel in found.kernels}
    assert json.loads(json.dumps(found.to_json()))["targets"] == ["SM86", "SM89"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@needs_builder
def test_a_convolution_that_would_run_in_float_is_named(tmp_path: Path) -> None:
    model = good_model()
    set_constant(model, "stem/step", np.array([2.0**-4], np.float32))
    set_constant(model, "stem/zero", np.zeros(1, np.int8))
    find(model, "flat/Flatten").input[0] = "pool/mean"
    error = refusal(model, tmp_path / "model.onnx")
    assert error.message.startswith("TensorRT-RTX ")
    assert error.message.endswith(" would run 'block.conv1/Conv', 'fc/Gemm' in float")


@needs_builder
def test_what_the_parser_warns_of_is_refused(tmp_path: Path) -> None:
    model = good_model(batch=1)
    set_constant(model, "stem/zero", np.array(0, np.uint8))
    error = refusal(model, tmp_path / "model.onnx")
    assert f" does not take '{tmp_path / 'model.onnx'}' as it is written: " in error.message
    assert error.message.count("Defaulting to INT8 instead") == 1


@needs_builder
def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    with pytest.raises(UnsupportedError, match=r"refuses '.*': the network is empty: no layers or no outputs were found in the file$"):
        ahead_of_time(path)


@needs_builder
def test_what_the_parser_refuses_is_told_with_node_and_operator(tmp_path: Path) -> None:
    model = good_model()
    set_constant(model, "stem/zero", np.array(3, np.int8))
    assert "': node 'stem/QuantizeLinear' (QuantizeLinear): " in refusal(model, tmp_path / "model.onnx").message


@needs_builder
def test_a_file_that_kills_the_builder_does_not_kill_the_caller(tmp_path: Path) -> None:
    model = good_model()
    (step,) = (each for each in model.graph.initializer if each.name == "stem/step")
    model.graph.initializer.remove(step)
    model.graph.input.append(helper.make_tensor_value_info("stem/step", TensorProto.FLOAT, []))
    error = refusal(model, tmp_path / "model.onnx")
    assert error.message == f"TensorRT's builder died on '{tmp_path / 'model.onnx'}' with signal 11 (Segmentation fault)"
    assert error.hint == "known cause: a scale that is no constant of the file"


Child = Callable[..., None]


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Child:
    """Replaces the child process by its answer."""

    def answer(report: Any, code: int = 0, stderr: str = "") -> None:
        stdout = report if isinstance(report, str) else f"noise\n{json.dumps(report)}\n"
        monkeypatch.setattr(trt_check, "available", lambda: True)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, stdout, stderr))

    return answer


def test_a_check_that_cannot_be_made_says_why(child: Child, tmp_path: Path) -> None:
    child({"error": "no TensorRT", "hint": "install it"}, 2)
    with pytest.raises(UnsupportedError, match=r"^TensorRT-RTX cannot check '.*model.onnx': no TensorRT$"):
        ahead_of_time(tmp_path / "model.onnx")
    child("", 1, "Traceback\nImportError: broken\n")
    with pytest.raises(UnsupportedError, match=r"^TensorRT's builder ended with code 1 on '.*model.onnx': ImportError: broken$"):
        ahead_of_time(tmp_path / "model.onnx")


def test_a_net_without_kernels_is_no_success(child: Child, tmp_path: Path) -> None:
    child({"version": "1.7", "errors": [], "warnings": [], "int8": None})
    with pytest.raises(UnsupportedError, match=r"^TensorRT-RTX 1.7 shows no convolution or gemm in '.*model.onnx'$"):
        ahead_of_time(tmp_path / "model.onnx")


def test_a_builder_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("build_engine.py", 1)

    monkeypatch.setattr(trt_check, "available", lambda: True)
    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(UnsupportedError, match=r"^TensorRT's builder has not finished '.*model.onnx' in 1800 s$"):
        ahead_of_time(tmp_path / "model.onnx")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trt_check, "PACKAGE", "no_such_package")
    assert not available()
    with pytest.raises(MissingExtraError) as caught:
        ahead_of_time(tmp_path / "model.onnx")
    assert caught.value.message == "building ahead of time needs the package 'no_such_package'"
    assert caught.value.hint == "pip install 'edgeft[trt-check]'"


def test_the_shipped_script_is_one_file_without_edgeft() -> None:
    text = script_text()
    assert "edgeft.export" not in text
    assert text.index("def find_tensorrt") < text.index("class EngineRunner") < text.index("def main")
    assert text.rstrip().endswith("sys.exit(main())")
    compile(text, "build_engine.py", "exec")
