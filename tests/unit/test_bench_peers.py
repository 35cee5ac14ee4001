"""A bench of a run whose float net and images are at hand: peers, accuracy that is measured now, probabilities."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.nets import N_CLASSES, Case, fixed_point, random_classifier, random_images
from edgeft import benching
from edgeft.artifact import Artifact, json_bytes, write_artifact
from edgeft.bench import candidates, measuring, page
from edgeft.bench.opening import Spec, open_model
from edgeft.bench.results import BenchReport
from edgeft.bench.store import PEER_FILES
from edgeft.benching import bench
from edgeft.checkpoint import state_of
from edgeft.config import build_config
from edgeft.evaluate import evaluate
from edgeft.export.verify import golden
from edgeft.exporting import export
from edgeft.pipeline import FloatModel
from edgeft.progress import Progress
from edgeft.quant.lower import lower
from edgeft.report import EvalReport
from tests.exports import rewrite
from tests.tiny import dataset

SIZE = 32
DATA = dataset()
BACKENDS = ("torch", "ort-float", "ort-static", "onnx")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized run with random weights, measured in float only, and its export to "onnx"."""
    path = tmp_path_factory.mktemp("peers") / "run"
    classifier = random_classifier(Case("edgeft_micro", SIZE, 4))
    graph, p = lower(fixed_point(classifier)[0]), classifier.preprocessing
    measured, tops = evaluate(FloatModel(classifier), DATA, p, float_predictions=None, progress=Progress(False))
    images = random_images(8, SIZE, seed=5).transpose(0, 3, 1, 2).copy()
    write_artifact(
        path, kind="quantized", config=build_config(sets=[f"data.size={SIZE}"]).model_dump(mode="json"), seed=0,
        preprocessing=p.to_json(), classes=[f"c{index}" for index in range(N_CLASSES)],
        arrays={
            "weights.safetensors": dict(graph.constants), "samples.safetensors": golden(graph, images),
            "float.safetensors": {name: value.detach().numpy() for name, value in state_of(classifier.net).items()},
            "predictions.safetensors": {f"float/{split}": top for split, top in tops.items()},
        },
        documents={"graph.json": graph.to_json(), "report.json": EvalReport((measured,)).to_json()},
    )  # fmt: skip
    export(path, ["onnx"], evaluate=False)
    return path


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "dataset_of", lambda *_: DATA)
    monkeypatch.setattr(measuring, "peak_bytes", lambda *_: None)
    monkeypatch.setattr(benching, "write_plots", lambda *_: None)
    monkeypatch.setattr(page, "plots", lambda _: [])


@pytest.fixture(scope="module")
def first(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchReport, Path]:
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "dataset_of", lambda *_: DATA)
        patch.setattr(measuring, "peak_bytes", lambda *_: None)
        patch.setattr(page, "plots", lambda _: [])
        return bench([run], backends=BACKENDS, rounds=2, calls=2, out=out), out


def test_all_forms_of_a_net_stand_side_by_side(first: tuple[BenchReport, Path], run: Path) -> None:
    report, _ = first
    rows = {row.backend: row for row in report.rows}
    assert tuple(rows) == BACKENDS
    assert {name: row.status for name, row in rows.items()} == dict.fromkeys(BACKENDS, "timed")
    assert rows["torch"].scored is not None
    assert rows["torch"].scored.result.splits == Artifact.load(run).report().models[0].splits
    for name in BACKENDS[1:]:
        scored = rows[name].scored
        assert scored is not None
        assert scored.source == "measured by this bench"
        assert [(split.label, split.n) for split in scored.result.splits] == [("id", 30), ("ood:dim", 30)]
        assert {kind: found.n for kind, found in scored.reliability.items()} == {"id": 30, "ood": 30}
        assert rows[name].id_cost is not None
    equal = rows["ort-float"].id_cost
    assert equal is not None
    assert (equal.points, equal.low, equal.high) == (0.0, 0.0, 0.0)
    assert (rows["ort-float"].in_float, rows["ort-static"].in_float, rows["onnx"].in_float) == (None, (), ())
    assert rows["ort-float"].speed_to_float == rows["ort-static"].speed_to_static == 1.0
    assert report.runs[0].peers.startswith("calibrated on 50 training images; its float32 file equals PyTorch to ")


def test_files_and_pictures_of_them(first: tuple[BenchReport, Path], run: Path) -> None:
    _, out = first
    folder = out / "peers" / Artifact.load(run).digest[:16]
    assert {"float.onnx", "static.onnx", "peers.json"} <= {file.name for file in folder.iterdir()}
    assert (out / "plots" / "reliability-run.png").is_file()


def test_a_second_bench_measures_nothing_again(
    first: tuple[BenchReport, Path], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    report, out = first
    monkeypatch.setattr(measuring, "one_round", lambda *_: pytest.fail("timed again"))
    files = {file: file.stat().st_mtime_ns for file in (out / "peers").rglob("*.onnx")}
    again = bench([run], backends=BACKENDS, rounds=2, calls=2, out=out)
    assert again.rows == report.rows
    assert {file: file.stat().st_mtime_ns for file in files} == files


def test_a_backend_that_joins_is_timed_beside_what_it_is_compared_with(run: Path, tmp_path: Path) -> None:
    bench([run], backends=["ort-float"], rounds=2, calls=1, out=tmp_path)
    report = bench([run], backends=["ort-float", "onnx"], rounds=2, calls=1, out=tmp_path)
    by_name = {row.backend: row for row in report.rows}
    assert by_name["onnx"].speed_to_float is not None
    assert by_name["ort-float"].latency is not None
    assert by_name["ort-float"].latency.n_rounds == 4


def test_a_report_that_says_otherwise_is_not_believed(run: Path, tmp_path: Path) -> None:
    report = Artifact.load(run).report()
    wrong = dataclasses.replace(
        report.models[0], model="onnx", splits=tuple(dataclasses.replace(split, correct=split.n) for split in report.models[0].splits)
    )  # fmt: skip
    folder = run / "export" / "onnx"
    kept = {name: (folder / name).read_bytes() for name in ("report.json", "manifest.json")}
    rewrite(folder, "report.json", json_bytes(report.with_model(wrong).to_json()))
    (row,) = bench([run], backends=["onnx"], rounds=1, calls=1, out=tmp_path, max_drop=100).rows
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    assert row.scored is None
    assert row.not_scored.startswith("not known: the report of the export ")


def test_static_int8_that_stays_in_float_is_counted(first: tuple[BenchReport, Path], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = first[1] / "peers" / Artifact.load(run).digest[:16]
    monkeypatch.setitem(PEER_FILES, "ort-static", "float.onnx")
    executed = open_model(Spec("ort-static", str(folder), 1)).executed()
    assert executed.in_float is not None
    assert any(text.endswith("Conv") for text in executed.in_float)
    images = np.zeros((1, 3, SIZE, SIZE), np.uint8)
    opened = open_model(Spec("ort-float", str(folder), 1))
    np.testing.assert_array_equal(opened.prepare(images)(), opened.runner.logits(images))
