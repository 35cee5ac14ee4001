import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgeft.export.trt_builder import BuilderError, Int8Summary
from edgeft.export.trt_runner import Cuda, EngineRunner, compare, describe, main, read_safetensors
from tests.fake_tensorrt import FRAC, N_LOGITS, SIDE, Behaviour, FakeLibrary, expected_logits, fake_tensorrt

Run = Callable[..., int]


def random_images(n: int) -> NDArray[np.uint8]:
    return np.random.default_rng(n).integers(0, 256, (n, 3, SIDE, SIDE), np.uint8)


def runner(behaviour: Behaviour) -> EngineRunner:
    return EngineRunner(fake_tensorrt("tensorrt", "11.4", behaviour), b"plan", Cuda(behaviour.library))


@pytest.mark.parametrize("smallest", [1, 3, 4])
@pytest.mark.parametrize("n", [1, 4, 9])
def test_any_number_of_images_runs(n: int, smallest: int) -> None:
    images = random_images(n)
    outputs = runner(Behaviour(smallest_batch=smallest)).run(images)
    assert set(outputs) == {"logits"}
    assert outputs["logits"].dtype == np.float32
    assert np.array_equal(outputs["logits"], expected_logits(images))


def test_images_in_another_order_of_memory_are_copied_right() -> None:
    images = random_images(3).transpose(0, 1, 3, 2)
    assert np.array_equal(runner(Behaviour()).run(images)["logits"], expected_logits(images))


def test_memory_is_taken_once_for_the_largest_batch() -> None:
    behaviour = Behaviour()
    engine = runner(behaviour)
    for n in (1, 4, 2):
        engine.run(random_images(n))
    assert [len(each) for each in behaviour.library.memory.values()] == [4 * 3 * SIDE * SIDE, 4 * N_LOGITS * 4]


def test_times_come_from_pairs_of_events() -> None:
    behaviour = Behaviour()
    assert runner(behaviour).time_ms(random_images(2), n_warm_up=1, n_calls=3) == [0.5, 0.5, 0.5]
    assert behaviour.library.n_events == 6


def test_images_that_do_not_fit_are_refused() -> None:
    engine = runner(Behaviour())
    with pytest.raises(BuilderError, match=r"^the engine takes images as uint8, not float32$"):
        engine.run(np.zeros((1, 3, SIDE, SIDE), np.float32))
    with pytest.raises(BuilderError, match=r"^the engine does not take images of shape \(1, 3, 5, 5\)$"):
        engine.run(np.zeros((1, 3, 5, 5), np.uint8))
    with pytest.raises(BuilderError, match=r"^a batch of 5 is outside 1 \.\.\. 4 of the engine$"):
        engine.time_ms(random_images(5))


def test_an_engine_that_does_not_load_or_start_says_so() -> None:
    with pytest.raises(BuilderError, match=r"^tensorrt 11\.4 does not load the engine: built by another version$"):
        runner(Behaviour(loads=False))
    with pytest.raises(BuilderError, match=r"^the engine did not start: no reason given$"):
        runner(Behaviour(starts=False)).run(random_images(1))


def test_errors_of_the_driver_name_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary()
    library.fails = "cuDeviceGet"
    with pytest.raises(BuilderError, match=r"^cuDeviceGet failed with CUDA error 100$") as caught:
        Cuda(library)
    assert caught.value.hint == "nvidia-smi"

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(BuilderError, match=r"^no CUDA driver: libcuda.so.1: cannot open shared object file$"):
        Cuda.open()


def test_the_gpu_is_named() -> None:
    cuda = Cuda(FakeLibrary())
    assert (cuda.gpu, cuda.compute_capability) == ("Fake GPU", "8.6")


def test_safetensors_are_read_as_the_library_wrote_them(tmp_path: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "images": random_images(2),
        "layer:a": np.arange(-3, 3, dtype=np.int64).reshape(2, 3),
        "b": np.array([[1.5]], np.float32),
        "scalar": np.array(7, np.int32),
    }
    save_file(arrays, tmp_path / "s.safetensors", metadata={"made": "here"})
    found = read_safetensors(tmp_path / "s.safetensors")
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], value) and found[name].dtype == value.dtype for name, value in arrays.items())
    (tmp_path / "s.safetensors").write_bytes(b"garbage")
    with pytest.raises(BuilderError, match=r"s.safetensors' is not a readable safetensors file: "):
        read_safetensors(tmp_path / "s.safetensors")


def test_logits_are_compared_as_codes() -> None:
    codes = np.array([[3, -5], [8, 0]])
    logits = np.ldexp(codes.astype(np.float32), -6)
    assert compare(logits, codes, 6) == {"images": 2, "codes": 4, "differing": 0, "largest_difference": 0.0}
    logits[0, 1] += 2 * 2.0**-6
    logits[1, 0] += 2.0**-7
    assert compare(logits, codes, 6) == {"images": 2, "codes": 4, "differing": 2, "largest_difference": 2.0}
    logits[1, 0] = np.nan
    assert compare(logits, codes, 6) == {"images": 2, "codes": 4, "differing": 2, "largest_difference": "not finite"}
    with pytest.raises(BuilderError, match=r"^the engine gives logits of shape \(2, 2\), the samples hold \(4,\)$"):
        compare(logits, codes.ravel(), 6)


def test_counts_are_worded_without_overclaiming() -> None:
    assert describe(Int8Summary(21, 21, [])) == "21 of 21 convolutions and gemms int8"
    assert describe(Int8Summary(1, 2, ["a/Conv"])) == "1 of 2 convolutions and gemms int8 (not: a/Conv)"
    assert describe(None) == describe(Int8Summary(0, 0, [])) == "this TensorRT shows no table of kernels, so int8 is not confirmed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export: model, golden samples, export.json."""
    images = random_images(6)
    codes = np.ldexp(expected_logits(images), FRAC).astype(np.int64)
    (tmp_path / "model.onnx").write_bytes(b"a model")
    save_file({"images": images, "layer:fc": codes}, tmp_path / "samples.safetensors")
    (tmp_path / "export.json").write_text(json.dumps({"logits_frac": FRAC}))
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The script beside the export, on a fake TensorRT."""

    def start(*arguments: str, flavour: str = "tensorrt_rtx", **behaviour: Any) -> int:
        fake = Behaviour(**behaviour)
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        monkeypatch.setitem(sys.modules, flavour, fake_tensorrt(flavour, "1.7" if flavour == "tensorrt_rtx" else "11.4", fake))
        monkeypatch.setattr(sys, "argv", [str(folder / "build_engine.py")])
        return main(list(arguments), lambda: Cuda(fake.library))

    return start


def test_the_script_builds_compares_and_times(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--time", "10", "--batch", "4") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"building '{folder / 'model.engine'}'",
        "tensorrt_rtx 1.7 on Fake GPU (8.6): 2 of 2 convolutions and gemms int8",
        "0 of 30 logits differ on 6 golden images, by at most 0.0 codes",
        "0.5000 ms median, 0.5000 ms 95th percentile of 10 calls, batch 4, without copies",
    ]
    assert run("--batch", "4", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["built"], report["gpu"], report["int8"]) == (False, "Fake GPU", {"n_int8": 2, "n_total": 2, "in_float": []})
    assert report["samples"] == {"images": 6, "codes": 30, "differing": 0, "largest_difference": 0.0}


def test_a_difference_is_exit_code_1(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--logits-frac", str(FRAC + 1)) == 1
    assert "24 of 30 logits differ on 6 golden images" in capsys.readouterr().out


def test_the_inspector_is_asked_where_the_log_has_no_table(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    layer = {"Name": "a", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Int8"}], "Weights": {"Type": "Int8"}}
    assert run(flavour="tensorrt", inspector=json.dumps({"Layers": [layer]})) == 0
    assert "tensorrt 11.4 on Fake GPU (8.6): 1 of 1 convolutions and gemms int8" in capsys.readouterr().out
    assert run(flavour="tensorrt", inspector="no JSON") == 0
    assert "shows no table of kernels, so int8 is not confirmed" in capsys.readouterr().out


def test_without_samples_the_engine_is_only_built(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "samples.safetensors").unlink()
    assert run("--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"] is None


def test_what_cannot_be_done_is_exit_code_2(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "export.json").unlink()
    assert run("--json") == 2
    captured = capsys.readouterr()
    message = f"the fraction of the logits is not known: '{folder / 'export.json'}' does not tell 'logits_frac'"
    assert json.loads(captured.out) == {"error": message, "hint": "--logits-frac N"}
    assert f"error: {message}\n  --logits-frac N\n" in captured.err
    save_file({"images": random_images(1)}, folder / "samples.safetensors")
    assert run() == 2
    assert "must hold 'images' and one 'layer:...', the codes of the logits, and holds ['images']" in capsys.readouterr().err
    assert run(str(folder / "none.onnx")) == 2
    assert f"error: '{folder / 'none.onnx'}' does not exist\n" in capsys.readouterr().err


def test_a_check_needs_no_gpu_and_writes_nothing(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--check-only", "--targets", "SM86") == 0
    line = "tensorrt_rtx 1.7 builds it; 2 of 2 convolutions and gemms int8; not run on a device\n"
    assert capsys.readouterr().out == line
    assert run("--check-only", "--json", parse_log=[("WARNING", "careful")]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["warnings"], report["engine"], report["engine_bytes"], captured.err) == (["careful"], None, 4, f"careful\n{line}")
    assert run("--check-only", n_layers=0) == 1
    assert capsys.readouterr().out == "the network is empty: no layers or no outputs were found in the file\n"
    assert not (folder / "model.engine").exists()
