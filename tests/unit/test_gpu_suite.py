"""The suite gpu-check as far as a CPU can tell: what it compares, times, tabulates and refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_exact, gpu_kernels, gpu_steps
from benchmarks.nets import Case
from benchmarks.tables import Result
from edgeft.errors import ConfigError, VerificationError
from edgeft.progress import Progress
from edgeft.quant.lower import enforce_bounds, lower
from edgeft.quant.net import FixedPointNet
from edgeft.report import EvalReport, ModelResult, SplitResult
from tests.nets import calibrated, prepared, randomise, residual_net

CPU = torch.device("cpu")
MICRO = Case("edgeft_micro", 48, 2)
SETTINGS = gpu.Settings(CPU, n_rounds=1, n_steps=1, sets=(), progress=Progress(False))


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    return gpu_exact.measure(gpu_exact.random_subject(MICRO, 3), CPU, Progress(False))


@pytest.fixture(scope="module")
def timed() -> dict[str, Any]:
    return gpu_steps.measure(MICRO, CPU, n_rounds=1, n_steps=1, progress=Progress(False))


def test_a_training_graph_comes_back_from_its_integers() -> None:
    plan = prepared(randomise(residual_net()))
    net = calibrated(plan)
    enforce_bounds(net)
    graph = lower(net)
    again = lower(gpu_exact.training_graph(FixedPointNet(plan, profile="u8", per_channel=False), graph))
    assert again.to_json() == graph.to_json()
    assert all(np.array_equal(again.constants[name], graph.constants[name]) for name in graph.constants)


@pytest.fixture(scope="module")
def rounded() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_kernels, "TENSORS", {"weight per channel": ((8, 4, 3, 3), True), "activation": ((2, 4, 3, 3), False)})
        records = [gpu_kernels.measure(name, CPU, n_rounds=1, progress=Progress(False)) for name in gpu_kernels.TENSORS]
    return records[0] | {"us": records[0]["us"] | {gpu_kernels.FUSED: [1.0]}}


def test_every_code_is_compared_and_a_wrong_one_is_counted(compared: dict[str, Any]) -> None:
    assert compared["differing"] == dict.fromkeys((arithmetic.label for arithmetic in gpu_exact.ARITHMETICS), 0)
    subject = gpu_exact.random_subject(MICRO, 3)
    subject.net.layer(subject.net.plan.output).bias.data[0] += 1.0
    found = gpu_exact.measure(subject, CPU, Progress(False))
    assert set(found["differing"].values()) == {3}, "one logit of each image"
    assert found["codes"] == compared["codes"] == 3 * sum(int(np.prod(tensor.shape)) for tensor in subject.graph.tensors.values())


def test_arithmetic_is_in_force_for_the_block_only() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32
    for arithmetic in gpu_exact.ARITHMETICS:
        with gpu_exact.in_force(arithmetic):
            assert (cudnn.allow_tf32, matmul.allow_tf32) == (arithmetic.tf32, arithmetic.tf32)
            assert (cudnn.benchmark, cudnn.deterministic) == (arithmetic.any_algorithm, not arithmetic.any_algorithm)
        assert (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32) == before


def test_the_result_is_written_when_the_last_part_is_there(
    compared: dict[str, Any], timed: dict[str, Any], rounded: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = SplitResult("id", "id", 10, 9), SplitResult("dim", "ood", 10, 5)
    report = EvalReport((ModelResult("float", splits),)).to_json()
    runs = {
        "runs": [{"precision": "fp32", "wall_s": 61.2, "report": report, "compared": "0 differing codes"}],
        "exact": compared,
        "export": {"printed": ["onnx", "  0 differing codes in 30 tensors"]},
        "killed": {"kills": [{}, {}], "differing": {"of": 1000, "differing": 0}, "same_graph": True},
    }
    records = {"runs": runs, "exact": [compared], "kernels": [rounded], "steps": [timed]}
    monkeypatch.setattr(gpu, "measure", lambda part, settings: records[part])
    assert gpu.run(["runs", "exact", "kernels"], tmp_path / "out", tmp_path / "records", SETTINGS) is None
    file = gpu.run(["steps"], tmp_path / "out", tmp_path / "records", SETTINGS)
    assert file is not None
    assert file.name.startswith("gpu-check_no-gpu_")
    rows = {row[0]: str(row[3]) for row in Result.read(file).rows}
    assert rows["train-quantize, ID / mean OOD"] == "float 90.0 / 50.0 %; fixed point -; 61 s"
    assert rows["kill -9 2 times, --resume"] == "0 of 1,000 weights and biases differ, formats equal"
    assert rows["differing codes"].startswith("0 of ")
    assert "images/s" in rows["training step"]
    assert "of elementwise" in rows["rounding, forward and backward"]


def test_kernels_that_round_otherwise_are_not_timed() -> None:
    x = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    ways = gpu_kernels.roundings((8, 4, 3, 3), True, CPU)
    ours, theirs = (gpu_kernels._both(ways[way], x, x) for way in (gpu_kernels.ELEMENTWISE, gpu_kernels.TORCH))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    gpu_kernels.compare("weight", ways | {gpu_kernels.FUSED: ways[gpu_kernels.ELEMENTWISE]}, x, x)
    with pytest.raises(VerificationError, match="differ from the elementwise operations in 288 values of 288"):
        gpu_kernels.compare("weight", ways | {gpu_kernels.FUSED: lambda x: x * 2 + 1}, x, x)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown part 'latency'"):
        gpu.run(["latency"], tmp_path, None, SETTINGS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device 'cuda' is not available on this machine"):
        gpu.run([], tmp_path, None, replace(SETTINGS, device=torch.device("cuda")))
