"""bench(): what is measured and kept, what is refused or missing, and what the report says about it."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeft import benching
from edgeft.artifact import Artifact
from edgeft.bench import BACKENDS, backend, candidates, measuring, memory, page
from edgeft.bench.opening import Spec
from edgeft.bench.results import BenchReport, Row
from edgeft.bench.text import summary, table
from edgeft.bench.timing import one_round
from edgeft.benching import bench
from edgeft.errors import ArtifactError, ConfigError
from edgeft.exporting import export
from edgeft.progress import Progress
from tests.benches import REPORT, fake, measured_run, without_data
from tests.exports import plain_net, write_run

N_ROUNDS, N_CALLS = 3, 2


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return measured_run(tmp_path_factory.mktemp("benching") / "run")


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn either: what is, asks for it."""
    without_data(monkeypatch)
    monkeypatch.setattr(benching, "write_plots", lambda *_: None)
    monkeypatch.setattr(page, "plots", lambda _: [])


def measured(run: Path, out: Path, **changes: Any) -> BenchReport:
    settings: dict[str, Any] = {"backends": ["onnx", "openvino"], "rounds": N_ROUNDS, "calls": N_CALLS, "out": out} | changes
    return bench([run], **settings)


def row_of(report: BenchReport, name: str) -> Row:
    return next(row for row in report.rows if row.backend == name)


def records(out: Path) -> dict[str, Any]:
    found = (json.loads(file.read_text()) for file in (out / "records").glob("*.json"))
    return {record["key"]["backend"]: record for record in found}


# Rows


def test_a_row_has_all_numbers_of_exactly_that_artifact(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    report = measured(run, tmp_path / "out", threads=[1, 2], batches=[1, 3])
    assert [(row.backend, row.threads, row.batch) for row in report.rows] == [
        (name, threads, batch) for threads in (1, 2) for batch in (1, 3) for name in ("onnx", "openvino")
    ]  # fmt: skip
    row, exported = report.rows[0], Artifact.load(run / "export" / "onnx")
    assert (row.digest, row.file_bytes, row.peak_bytes) == (exported.digest, exported.manifest.file_bytes["model.onnx"], 50_000_000)
    assert (row.n_verified, row.in_float, row.status) == (4, (), "timed")
    assert row.latency is not None
    assert (row.latency.n_rounds, row.latency.n_calls) == (N_ROUNDS, N_ROUNDS * N_CALLS)
    assert row.images_per_s == pytest.approx(1000 / row.latency.median_ms)
    assert row.scored is not None
    assert row.scored.result.splits == REPORT.models[1].splits
    assert row.scored.source == f"report of the export {exported.digest[:12]}"
    assert row.id_cost is not None
    assert row.id_cost.points == pytest.approx(-1.0)
    assert row.ood_cost is not None
    assert row.ood_cost.points == pytest.approx(-1.0)
    assert report.passed


def test_what_is_missing_is_a_row_and_the_rest_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    report = measured(run, tmp_path / "out", backends=[])
    problems = {row.backend: row.problem for row in report.rows if row.status == "missing"}
    assert problems.keys() == BACKENDS.keys() - {"onnx"}
    assert problems["openvino"] == "not available: pip install 'edgeft[openvino]'"
    assert problems["torch"] == f"the quantized artifact '{run}' has no file 'float.safetensors'"
    assert problems["tensorrt"] == f"'run' is not exported to 'trt': edgeft export {run} --target trt"
    assert row_of(report, "onnx").latency is not None
    assert "not available: pip install 'edgeft[openvino]'" in table(report)


def test_other_targets_are_backends_too(run: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "exports", lambda _: ["onnx", "onnx-int"])
        found = candidates.backends_of([], candidates.runs_of([run], Progress(False)))
    assert [one.name for one in found] == list(BACKENDS)  # a proof is timed only when it is asked for
    assert backend("onnx-int", ["onnx", "onnx-int"]).target == "onnx-int"
    with pytest.raises(ConfigError, match="unknown backend 'openvno'") as caught:
        measured(run, tmp_path / "out", backends=["openvno"])
    assert "did you mean: openvino" in caught.value.hint


def test_what_differs_from_the_interpreter_is_not_timed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, shift=0.5)
    report = measured(run, tmp_path / "out")
    row = row_of(report, "openvino")
    assert (row.status, row.latency, row.scored, row.peak_bytes) == ("differs", None, None, None)
    assert row.problem == "differs from the interpreter on 4 of 4 golden images"
    assert not report.passed
    assert report.failures == ("edgeft int8 in OpenVINO of 'run': differs from the interpreter on 4 of 4 golden images",)
    assert "FAILED: edgeft int8 in OpenVINO" in table(report)
    assert row_of(report, "onnx").latency is not None


def test_the_fastest_is_named_where_there_are_two(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    assert any(line.startswith("Fastest") for line in summary(measured(run, tmp_path / "two")))
    alone = summary(measured(run, tmp_path / "one", backends=["onnx"]))
    assert not [line for line in alone if line.startswith(("Fastest", "Smallest", "Least", "Most"))]


def test_a_fall_back_to_float_is_said(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, in_float=("stem", "head"))
    report = measured(run, tmp_path / "out")
    assert "FELL BACK: 2" in table(report)
    assert "Fell back to float: edgeft int8 in OpenVINO of 'run': stem, head." in summary(report)
    assert "Fell back to float: edgeft int8 in OpenVINO" in (tmp_path / "out" / "report.html").read_text()


def test_accuracy_that_is_not_known_is_said(run: Path, tmp_path: Path) -> None:
    unknown = Path(str(tmp_path / "unknown"))
    write_run(unknown, plain_net())
    export(unknown, ["onnx"], evaluate=False)
    report = measured(unknown, tmp_path / "out", backends=["onnx"], max_drop=0.5)
    assert row_of(report, "onnx").not_scored == "not measured: the run has not been measured"
    assert report.failures == (
        "edgeft int8 in ONNX Runtime of 'unknown': its accuracy against the float model is not known, so the gate of 0.5 points cannot "
        "pass it",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"threads": [0]}, "threads: 0 was given"), ({"batches": []}, "batches: nothing was given"), ({"rounds": 0}, "rounds: 0 was given")],
)
def test_impossible_numbers_are_refused(run: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measured(run, tmp_path / "out", **changes)


def test_an_export_is_not_a_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is an export, not a run"):
        measured(run / "export" / "onnx", tmp_path / "out")
    with pytest.raises(ConfigError, match="no run was given"):
        bench([])


# Resuming


def test_an_interrupted_bench_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, out = fake(monkeypatch), tmp_path / "out"
    calls = iter(range(100))

    def killed(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise Killed
        return one_round(*arguments)

    monkeypatch.setattr(measuring, "one_round", killed)
    with pytest.raises(Killed):
        measured(run, out)
    kept = {name: dict(record["rounds"]) for name, record in records(out).items()}
    assert {name: len(rounds) for name, rounds in kept.items()} == {"onnx": 2, "openvino": 2}
    report = measured(run, out)
    assert next(calls) == 4  # one round was left
    for name, record in records(out).items():
        assert kept[name].items() <= record["rounds"].items()
        assert len(record["rounds"]) == N_ROUNDS
    opened = len(made.specs)
    assert [row.latency for row in measured(run, out).rows] == [row.latency for row in report.rows]
    assert next(calls) == 5  # nothing was left
    assert len(made.specs) == opened + 1  # only to see that it is there


def test_a_record_of_another_machine_or_number_of_calls_does_not_count(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    out = tmp_path / "out"
    measured(run, out, backends=["onnx"])
    before = records(out)["onnx"]["rounds"]
    measured(run, out, backends=["onnx"], calls=N_CALLS + 1)
    again = records(out)["onnx"]["rounds"]
    assert not before.keys() & again.keys()
    assert {len(times) for times in again.values()} == {N_CALLS + 1}
    file = next((out / "records").glob("*-onnx-1t-b1.json"))
    file.write_text(file.read_text().replace('"cpu": "', '"cpu": "Another '))
    measured(run, out, backends=["onnx"], calls=N_CALLS + 1)
    assert not again.keys() & records(out)["onnx"]["rounds"].keys()
    file.write_text("{")
    assert measured(run, out, backends=["onnx"]).passed


# The gate


@pytest.mark.parametrize(
    ("max_drop", "failures"),
    [
        (1.0, ()),
        (0.5, ("ID accuracy is 1.00 points below float, more than 0.5", "mean OOD accuracy is 1.00 points below float, more than 0.5")),
    ],
)
def test_the_gate(run: Path, tmp_path: Path, max_drop: float, failures: tuple[str, ...]) -> None:
    report = measured(run, tmp_path / "out", backends=["onnx"], max_drop=max_drop)
    assert report.passed == (not failures)
    assert report.failures == tuple(f"edgeft int8 in ONNX Runtime of 'run': {each}" for each in failures)
    said = "FAILED: edgeft int8" if failures else "Passed: no fixed-point model is more than 1 points below float."
    assert said in (tmp_path / "out" / "results.txt").read_text()


def test_a_gate_with_nothing_to_judge_does_not_pass(run: Path, tmp_path: Path) -> None:
    assert measured(run, tmp_path / "out", backends=["tensorrt"], max_drop=1.0).failures == (
        "the gate of 1 points has no fixed-point model of 'run' to judge",
    )


def test_the_text_names_no_run_where_there_is_one(run: Path, tmp_path: Path) -> None:
    alone = table(measured(run, tmp_path / "out", backends=["onnx"]))
    assert alone.splitlines()[1].startswith("model ")
    assert "of 'run'" not in alone


# Memory


def test_memory_is_that_of_another_process(run: Path) -> None:
    folder = run / "export" / "onnx"
    found = memory.peak_bytes(Spec("onnx", str(folder), 1), folder / "samples.safetensors", 2)
    assert found is not None
    assert 10_000_000 < found < 400_000_000  # without torch
    assert memory.peak_bytes(Spec("onnx", str(run), 1), folder / "samples.safetensors", 1) is None


def printed(call: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> str:
    call()
    return capsys.readouterr().out


def test_the_process_prints_its_peak(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "export" / "onnx"
    order = {"spec": {"backend": "onnx", "folder": str(folder), "threads": 1}, "samples": str(folder / "samples.safetensors"), "batch": 1}
    assert int(printed(lambda: memory.main(json.dumps(order)), capsys)) > 10_000_000
