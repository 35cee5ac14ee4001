import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import edgeft.checkpoint
from edgeft.checkpoint import read_checkpoint, write_checkpoint
from edgeft.errors import ArtifactError
from edgeft.methods import Stage
from edgeft.train import FitResult, fit
from tests.conftest import ROOT
from tests.tiny import DATA, STAGE, Killed, TinyNet, context, kill_at, same, split, tensors, trained


@pytest.fixture(autouse=True, scope="module")
def _quick_collection() -> Iterator[None]:
    """Each stage ends with a garbage collection, which would look through all imported modules every time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[FitResult, dict[str, Tensor]]:
    result, model = trained(tmp_path_factory.mktemp("whole"), model=TinyNet(dropout=0.2), augment="flip")
    return result, tensors(model)


def resumed(work: Path) -> tuple[FitResult, dict[str, Tensor]]:
    result, model = trained(work, model=TinyNet(dropout=0.2), augment="flip")
    return result, tensors(model)


@pytest.mark.parametrize("calls", [1, 7, 8, 20, 21, 22, 29, 42])
def test_a_kill_at_any_step_changes_nothing(tmp_path: Path, calls: int, uninterrupted: tuple[FitResult, dict[str, Tensor]]) -> None:
    with pytest.raises(Killed):
        trained(tmp_path, model=TinyNet(dropout=0.2), on_step=kill_at(calls), augment="flip")
    result, weights = resumed(tmp_path)
    assert result == uninterrupted[0]
    assert same(weights, uninterrupted[1])


@pytest.mark.parametrize("write", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_a_checkpoint_changes_nothing(
    tmp_path: Path, write: int, when: str, uninterrupted: tuple[FitResult, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_file, left = os.replace, iter(range(write, 0, -1))

    def dying(source: Path, target: Path) -> None:
        last = next(left) == 1
        if last and when == "before":
            raise Killed
        replace_file(source, target)
        if last:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("edgeft.checkpoint.os.replace", dying)
        with pytest.raises(Killed):
            resumed(tmp_path)
    result, weights = resumed(tmp_path)
    assert result == uninterrupted[0]
    assert same(weights, uninterrupted[1])


def test_a_killed_process_is_resumed(tmp_path: Path, uninterrupted: tuple[FitResult, dict[str, Tensor]]) -> None:
    script = (
        "import os, sys, signal; from pathlib import Path; from tests.tiny import trained, TinyNet\n"
        "calls = iter(range(32))\n"
        "def die(step, total):\n"
        "    if next(calls) == 31: os.kill(os.getpid(), signal.SIGKILL)\n"
        "trained(Path(sys.argv[1]), model=TinyNet(dropout=0.2), on_step=die, augment='flip')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    note, _ = read_checkpoint(tmp_path / "tune" / "state.safetensors") or ({}, {})
    assert (note["rate"], note["epoch"]) == (1, 1)
    result, weights = resumed(tmp_path)
    assert result == uninterrupted[0]
    assert same(weights, uninterrupted[1])


def test_a_finished_stage_is_only_read_back(tmp_path: Path) -> None:
    first, model = trained(tmp_path)
    source = split("train", "train", 50, 1)
    again = TinyNet()
    second = fit(again, STAGE, source, DATA.val, context(tmp_path), kill_at(1))
    assert second == first
    assert same(tensors(model), tensors(again))
    assert source.images.n_read == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "stage"), [({"seed": 4}, STAGE), ({"batch": 9}, STAGE), ({"augment": "flip"}, STAGE), ({}, replace(STAGE, epochs=4))]
)
def test_checkpoints_of_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any], stage: Stage) -> None:
    with pytest.raises(Killed):
        trained(tmp_path, on_step=kill_at(9))
    with pytest.raises(ArtifactError, match="belong to a run with other settings or data"):
        trained(tmp_path, stage, **changes)


def test_checkpoints_from_other_start_weights_are_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    other = TinyNet()
    with torch.no_grad():
        other.head.weight.mul_(2)
    with pytest.raises(ArtifactError, match="started from other weights"):
        trained(tmp_path, model=other)


def test_checkpoints_hold_no_pickle_and_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained(tmp_path, on_step=kill_at(9))
    path = tmp_path / "tune" / "state.safetensors"
    assert sorted(file.name for file in path.parent.iterdir()) == ["start.safetensors", "state.safetensors"]
    with safe_open(path, framework="pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == {"best", "model", "momentum"}  # noqa: SIM118
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"state\.safetensors' is damaged"):
        trained(tmp_path)


def test_a_full_disk_is_an_error_that_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    write_checkpoint(path, {"epoch": 1}, {"w": torch.ones(2)})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(edgeft.checkpoint, "save_file", full)
    with pytest.raises(ArtifactError, match="no space left on the device"):
        write_checkpoint(path, {"epoch": 2}, {"w": torch.zeros(2)})
    note, found = read_checkpoint(path) or ({}, {})
    assert note == {"epoch": 1}
    assert torch.equal(found["w"], torch.ones(2))
