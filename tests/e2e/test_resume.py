"""A run that is killed (kill -9) in any stage and resumed ends with the integers of an uninterrupted one."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgeft.artifact import is_finished
from tests.conftest import draw_folder

FLAGS = (
    "--device", "cpu", "--set", "data.size=32", "--set", "train.epochs=2", "--set", "train.lr=[0.001,0.002]", "--set", "train.batch=4",
    "--set", "quant.epochs=2", "--set", "quant.calibration_images=8", "--set", "quant.update_every=1", "--set", "verify.samples=8",
    "--set", "probe.penalties=[0.01]",
)  # fmt: skip
DEADLINE_S = 120


def command(data: Path, out: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "edgeft", "train-quantize", "--data", str(data), "--out", str(out), *FLAGS, *extra]


def kill_when(path: Path, arguments: list[str]) -> None:
    """Start a command and kill it as soon as `path` exists."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + DEADLINE_S
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    process.wait()


def check_kill_and_resume(point: str, folder: Path, reference: dict[str, np.ndarray], *extra: str) -> None:
    data, out = draw_folder(folder / "photos", n=10), folder / "run"
    kill_when(out / "work" / point, command(data, out, *extra))
    assert (out / "work").is_dir(), "killed while it was at work"
    assert not is_finished(out)
    subprocess.run(command(data, out, *extra, "--resume"), check=True, capture_output=True)
    resumed = load_file(out / "weights.safetensors")
    assert resumed.keys() == reference.keys()
    assert all(np.array_equal(resumed[key], reference[key]) for key in reference)


@pytest.mark.parametrize("point", ["fine-tune/state.safetensors", "calibrated.safetensors", "qat/state.safetensors"])
def test_kill_and_resume(point: str, tmp_path: Path, reference: dict[str, np.ndarray]) -> None:
    check_kill_and_resume(point, tmp_path, reference)


def test_kill_and_resume_a_distillation(tmp_path: Path) -> None:
    draw_folder(tmp_path / "target", n=5, shift=60)
    extra = ("--loss", "distill", "--set", "quant.headroom=target", "--set", f'quant.unlabelled=["{tmp_path}/target"]')
    draw_folder(tmp_path / "whole" / "photos", n=10)
    subprocess.run(command(tmp_path / "whole" / "photos", tmp_path / "whole" / "run", *extra), check=True, capture_output=True)
    reference = load_file(tmp_path / "whole" / "run" / "weights.safetensors")
    check_kill_and_resume("qat/state.safetensors", tmp_path / "cut", reference, *extra)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Weights of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference")
    draw_folder(folder / "photos", n=10)
    subprocess.run(command(folder / "photos", folder / "run"), check=True, capture_output=True)
    return load_file(folder / "run" / "weights.safetensors")
