"""Sweeps: grids, a queue that is worked off once, failures that stay apart, and interrupted ones that go on."""

import csv
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from edgeft.artifact import runs_of_sweep, write_artifact
from edgeft.config import Config
from edgeft.errors import ConfigError
from edgeft.report import EvalReport, ModelResult, SplitResult
from edgeft.sweeping import SweepReport, grid, sweep


class FakeEdgeft:
    """Stands in for the command: writes a run, or fails for the names in `broken`; keeps its arguments."""

    def __init__(self, *broken: str) -> None:
        self.broken = set(broken)
        self.calls: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []
        self._lock = threading.Lock()

    def __call__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
        with self._lock:
            self.calls.append(list(arguments))
            self.environments.append(environment)
        name = log.stem
        if name in self.broken:
            log.write_text("something\nerror: the loss is not finite\n")
            return 2
        if arguments[0] == "train-quantize":
            splits = (SplitResult("id", "id", 10, 9), SplitResult("sketch", "ood", 10, 5))
            report = EvalReport((ModelResult("float", splits), ModelResult("fixed point", splits)))
            write_artifact(
                log.parent / name, kind="quantized", config=Config().model_dump(mode="json"), seed=0, preprocessing={}, classes=("a",),
                arrays={}, documents={"report.json": report.to_json()},
            )  # fmt: skip
        return 0


def configs(out: Path) -> dict[str, Config]:
    return grid(["train.method=lp,lpft", "seed=0,1"], None, {}, ["quant.granularity=channel"], out)


def states(report: SweepReport) -> dict[str, str]:
    return {row.run: row.state for row in report.rows}


def test_a_grid_has_every_combination_and_a_folder_for_each(tmp_path: Path) -> None:
    found = configs(tmp_path)
    assert list(found) == ["lp-0", "lp-1", "lpft-0", "lpft-1"]
    assert (found["lp-1"].train.method, found["lp-1"].seed, found["lp-1"].quant.granularity) == ("lp", 1, "channel")
    assert found["lp-1"].run_dir == tmp_path / "lp-1"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["train.method"], r"^--set 'train.method=' is not of the form|^--grid 'train.method' is not of the form"),
        (["train.method=lp,lp"], r"^--grid 'train.method=lp,lp' is not of the form"),
        (["quant.format=grid,nonsense"], r"^combination quant.format=nonsense: 1 error in the configuration"),
        (["train.methods=lp"], r"^combination train.methods=lp: .*\n  unknown key 'train.methods' \(did you mean 'method'\?\)"),
        (["train.method=lp,lpftt"], r"^combination train.method=lpftt: unknown method 'lpftt'$"),
        (["data.source=a/b,a-b"], r"^two combinations have the name 'a-b'$"),
    ],
)
def test_grids_that_make_no_sense_are_refused_before_anything_runs(axes: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        grid(axes, None, {}, [], tmp_path)


def test_every_run_is_made_once_and_tabulated(tmp_path: Path) -> None:
    edgeft = FakeEdgeft()
    report = sweep(configs(tmp_path), tmp_path, targets=("onnx", "trt"), command=edgeft)
    assert report.complete
    assert [call[0] for call in edgeft.calls] == ["train-quantize", "export"] * 4
    assert edgeft.calls[1] == ["export", str(tmp_path / "lp-0"), "--target", "onnx", "--target", "trt"]
    assert report.rows[0].cells() == ("lp-0", "finished", "90.0", "90.0", "50.0", "50.0", "")
    assert report.text().splitlines()[0].split() == ["run", "state", "id", "float", "id", "fixed", "point", "ood", "float", "ood", "fixed",
                                                     "point", "error"]  # fmt: skip
    assert json.loads((tmp_path / "sweep.json").read_text())["complete"] is True
    with (tmp_path / "sweep.csv").open(newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["run", "lp-0", "lp-1", "lpft-0", "lpft-1"]
    assert runs_of_sweep(tmp_path) == report.runs
    again = FakeEdgeft()
    assert sweep(configs(tmp_path), tmp_path, command=again).complete
    assert again.calls == []


def test_a_failure_is_a_row_and_can_be_retried(tmp_path: Path) -> None:
    report = sweep(configs(tmp_path), tmp_path, command=FakeEdgeft("lp-1"))
    assert states(report) == {"lp-0": "finished", "lp-1": "failed", "lpft-0": "finished", "lpft-1": "finished"}
    assert report.rows[1].error == "the loss is not finite"
    assert not report.complete
    mended = FakeEdgeft()
    assert states(sweep(configs(tmp_path), tmp_path, command=mended))["lp-1"] == "failed"
    assert sweep(configs(tmp_path), tmp_path, retry=True, command=mended).complete
    assert [call[0] for call in mended.calls] == ["train-quantize"]


def test_an_interrupted_sweep_goes_on(tmp_path: Path) -> None:
    class Interrupted(FakeEdgeft):
        def __call__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> int:
            if log.stem == "lp-1":
                raise KeyboardInterrupt
            return super().__call__(arguments, log, environment)

    with pytest.raises(KeyboardInterrupt):
        sweep(configs(tmp_path), tmp_path, command=Interrupted())
    edgeft = FakeEdgeft()
    assert sweep(configs(tmp_path), tmp_path, command=edgeft).complete
    assert [Path(call[2]).stem for call in edgeft.calls] == ["lpft-0", "lpft-1", "lp-1"]
    assert all(call[-1] == "--resume" for call in edgeft.calls)


def test_more_axes_join_an_older_sweep(tmp_path: Path) -> None:
    sweep(configs(tmp_path), tmp_path, command=FakeEdgeft())
    more = grid(["train.method=ft,lpft", "seed=0"], None, {}, ["quant.granularity=channel"], tmp_path)
    edgeft = FakeEdgeft()
    report = sweep(more, tmp_path, command=edgeft)
    assert states(report) == {"ft-0": "finished", "lpft-0": "finished"}
    assert len(edgeft.calls) == 1


def test_workers_share_the_queue_and_the_devices(tmp_path: Path) -> None:
    edgeft = FakeEdgeft()
    report = sweep(configs(tmp_path), tmp_path, workers=3, devices=("0", "1"), command=edgeft)
    assert report.complete
    assert len(edgeft.calls) == 4
    assert {environment["CUDA_VISIBLE_DEVICES"] for environment in edgeft.environments} <= {"0", "1"}


def test_the_log_is_named_where_it_holds_no_error(tmp_path: Path) -> None:
    report = sweep(grid(["seed=0"], None, {}, [], tmp_path), tmp_path, command=lambda *_: -9)
    assert report.rows[0].error == f"signal 9, see '{tmp_path / '0.log'}'"
