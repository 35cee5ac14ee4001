"""Benchmark suites at tiny settings: each writes a valid result, peers compute the same net, and what cannot be compared is refused."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from benchmarks import latency, runs, shapes_methods, throughput
from benchmarks.__main__ import app, main
from benchmarks.nets import Case, chosen, random_classifier, random_images
from benchmarks.record import Machine, cpu_name, write
from benchmarks.tables import Result, fill, page
from edgeft.artifact import write_artifact
from edgeft.bench import peers
from edgeft.bench.timing import shuffled
from edgeft.config import Config, build_config
from edgeft.data import Dataset
from edgeft.errors import ArtifactError, ConfigError, UnsupportedError, VerificationError
from edgeft.evaluate import evaluate
from edgeft.export import float_onnx
from edgeft.methods import METHODS
from edgeft.methods.run import run_stages
from edgeft.models import Classifier, build_classifier
from edgeft.pipeline import FloatModel
from edgeft.progress import Progress
from edgeft.quant.plan import Plan, Step
from edgeft.quant.tracing.trace import trace
from edgeft.report import EvalReport, ModelResult, SplitResult
from tests.tiny import PREPROCESSING, context, dataset

MICRO = Case("edgeft_micro", 48, 4)
MACHINE = Machine("Some CPU", 2, 1, ("avx2",), 0.5)
SILENT = Progress(False)


def read(file: Path) -> tuple[Result, dict[str, Any]]:
    tree = json.loads(file.read_text())
    assert {"options", "n", "machine", "measurements"} <= tree.keys()
    assert {"cpu", "n_cores", "n_threads", "flags", "load", "platform"} <= tree["machine"].keys()
    return Result.read(file), tree


# --- record ------------------------------------------------------------------------------------------------------------


def test_hardware_is_named_in_tables_and_file_names(tmp_path: Path) -> None:
    file = write(
        tmp_path / "new", MACHINE, suite="s", title="T", columns=["a"], rows=[[1]], notes=[], options={"x": 1}, n={"things": 3},
        measurements=[],
    )  # fmt: skip
    assert re.fullmatch(r"s_some-cpu-2c_\d{6}\.json", file.name)
    assert read(file)[0].hardware == "Some CPU, 2 cores, 1 thread, avx2"
    assert Machine("x", 1, 2, (), 0.0).text == "x, 1 core, 2 threads, no 8-bit instructions known"


def test_a_row_that_does_not_fit_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="row 1 has 2 cells, there are 1 columns"):
        write(tmp_path, MACHINE, suite="s", title="T", columns=["a"], rows=[[1, 2]], notes=[], options={}, n={}, measurements=[])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model name\t: Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz\n", "Intel Xeon Platinum 8488C"),
        ("processor : 0\nmodel name : AMD EPYC 9R14 Processor\nmodel name : other\n", "AMD EPYC 9R14"),
    ],
)
def test_cpu_name(text: str, name: str) -> None:
    assert cpu_name(text) == name


def test_only_the_lead_rows_are_in_the_readme(tmp_path: Path) -> None:
    file = write(
        tmp_path, MACHINE, suite="s", title="T", columns=["a"], rows=[["lead"], ["rest"]], notes=[], options={}, n={}, measurements=[],
        n_lead_rows=1,
    )  # fmt: skip
    result = Result.read(file)
    shown = fill("<!-- table:s -->\n<!-- /table:s -->", [result], [])
    assert "| lead |" in shown
    assert "| rest |" not in shown
    assert "| rest |" in page([result], [])


# --- command line --------------------------------------------------------------------------------------------------------


def test_help_lists_the_suites(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    names = [command.name for command in app.registered_commands]
    assert {"shapes-methods", "runs", "train-throughput", "qat-step", "ort-latency"} <= set(names)
    assert all(str(name) in text for name in names)


def test_mistakes_have_a_hint_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "nothing", "--name", "x", "--title", "X"]) == 2
    assert capsys.readouterr().err == (
        "error: 'nothing' is not of the form NAME=DIR or NAME:MODEL=DIR\n  example: LP:float=runs/lp LP-FT=runs/lpft\n"
    )
    assert main(["shapes-methods", "--seeds", "1,b"]) == 2


def test_cases() -> None:
    assert len(chosen(None, None)) == 3
    assert chosen("resnet18", 32, 8) == (Case("resnet18", 32, 8),)
    with pytest.raises(ConfigError, match="--size and --batch need --backbone"):
        chosen(None, 64)


def test_rounds_are_shuffled_and_complete() -> None:
    rounds = list(shuffled(["a", "b", "c"], 20))
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert {names[0] for names in rounds} == {"a", "b", "c"}


# --- ort-latency ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def micro() -> Classifier:
    return random_classifier(MICRO)


def planes(n: int, size: int) -> Any:
    return random_images(n, size).transpose(0, 3, 1, 2).copy()


@pytest.mark.parametrize("backbone", ["edgeft_micro", "resnet18"])
def test_float_peer_is_the_torch_net(backbone: str, tmp_path: Path) -> None:
    classifier, file = random_classifier(Case(backbone, 32, 4)), tmp_path / "float.onnx"
    peers.float_peer(classifier, file)
    images = planes(3, 32)
    with torch.inference_mode():
        expected = classifier(torch.from_numpy(images)).numpy()
    found = float_onnx.session(file, 1).run(None, {"image": peers.normalised(classifier, images)})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    assert peers.check_float_peer(classifier, file, images) <= 1e-4
    assert np.abs(expected).max() > 0.1  # or the comparison would say nothing


def test_a_peer_that_computes_something_else_is_refused(micro: Classifier, tmp_path: Path) -> None:
    file = tmp_path / "float.onnx"
    plan = trace(micro.net, (3, 48, 48))
    plan.steps[-1].bias += 0.5  # type: ignore[attr-defined]
    onnx.save(peers.float_model(plan), file)
    with pytest.raises(
        VerificationError, match=r"the float32 ONNX peer differs from PyTorch by .* of the largest score, more than 0\.0001"
    ):
        peers.check_float_peer(micro, file, planes(2, 48))


def test_a_step_without_a_float_form_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"layer 'odd' \(Step\) has no float32 ONNX form"):
        peers.float_model(Plan([Step("odd", ("image",), (3,))], (3, 8, 8)))


def test_the_quantized_peer_is_close_to_the_float_one(micro: Classifier, tmp_path: Path) -> None:
    inputs = peers.normalised(micro, planes(8, 48))
    peers.float_peer(micro, tmp_path / "float.onnx")
    float_onnx.quantize_statically(tmp_path / "float.onnx", tmp_path / "int8.onnx", inputs)
    scores = [float_onnx.session(tmp_path / name, 1).run(None, {"image": inputs})[0] for name in ("float.onnx", "int8.onnx")]
    assert np.corrcoef(scores[0].ravel(), scores[1].ravel())[0, 1] > 0.9
    operators = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators


def test_latency_of_random_weights(tmp_path: Path) -> None:
    file = latency.run([partial(latency.random_subject, MICRO)], tmp_path, n_rounds=2, n_calls=3, threads=1, progress=SILENT)
    result, tree = read(file)
    models, runtimes = ("edgeft", "fp32", "ORT static int8"), ("ONNX Runtime", "OpenVINO")
    assert [row[:3] for row in result.rows] == [("edgeft_micro 48 px", name, runtime) for name in models for runtime in runtimes]
    assert all(isinstance(value, float) and value > 0 for row in result.rows for value in row[3:7])
    assert (result.rows[2][5], result.rows[4][6]) == (1.0, 1.0)
    assert np.shape(tree["measurements"][0]["rounds_ms"]["edgeft in OpenVINO"]) == (2, 3)
    assert tree["measurements"][0]["verified_images"] == latency.N_VERIFIED
    assert any(note.startswith("edgeft takes 'images' as bytes") for note in result.notes)


def test_speed_is_the_median_of_ratios_within_rounds() -> None:
    record = {
        "net": "n", "file_bytes": {"edgeft": 1000, "fp32": 4000, "ORT static int8": 2000},
        "rounds_ms": {
            "edgeft in A": [[1.0, 1.0], [2.0, 2.0], [10.0, 10.0]], "fp32 in A": [[2.0, 2.0], [6.0, 6.0], [10.0, 10.0]],
            "ORT static int8 in A": [[1.0, 1.0], [4.0, 4.0], [8.0, 8.0]],
        },
    }  # fmt: skip
    assert latency.rows_of(record) == [
        ("n", "edgeft", "A", 2.0, 10.0, 2.0, 1.0, 1), ("n", "fp32", "A", 6.0, 10.0, 1.0, 1.5, 4),
        ("n", "ORT static int8", "A", 4.0, 8.0, 1.5, 1.0, 2),
    ]  # fmt: skip


# --- train-throughput ------------------------------------------------------------------------------------------------------


def test_throughput(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "peak_mib", lambda variant, case, threads: 100.4 if variant == throughput.BARE else None)
    result, tree = read(throughput.run([MICRO], tmp_path, n_rounds=1, n_steps=1, threads=1, progress=SILENT))
    assert [row[2] for row in result.rows] == list(throughput.VARIANTS)
    assert [row[6] for row in result.rows] == [100, "-", "-", "-"]
    assert all(isinstance(row[3], float) and row[3] > 0 for row in result.rows)
    assert result.rows[0][4] == result.rows[1][5] == 1.0
    assert all(len(rates) == 1 for rates in tree["measurements"][0]["images_per_s"].values())


def test_the_clock_leaves_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = iter([0.0, 50.0, 80.0, 100.0, 101.0, 102.0])  # three steps of warm-up, then two of a second each
    monkeypatch.setattr("benchmarks.throughput.time.perf_counter", lambda: next(stamps))
    clock = throughput.Clock(batch=4)
    for _ in range(6):
        clock.stamp()
    assert clock.images_per_s() == 4.0


@pytest.mark.slow
def test_peak_memory_of_a_fresh_process() -> None:
    peak = throughput.peak_mib(throughput.BARE, MICRO, 1)
    assert peak is None or 100 < peak < 4000


# --- shapes-methods --------------------------------------------------------------------------------------------------------


def tiny_load(config: Config) -> Dataset:
    return dataset(n_train=24, n_val=12)


def test_shapes_methods(tmp_path: Path) -> None:
    sets = ["train.epochs=1", "train.lr=1e-3,1e-2", "probe.max_iter=5", "train.batch=8", "device=cpu"]
    result, tree = read(shapes_methods.run([20, 21], tmp_path, sets=sets, progress=SILENT, load=tiny_load))
    assert result.suite == "shapes-methods"
    assert result.columns == ("method", "seeds", "id", "ood:dim", "mean OOD", "chosen")
    assert [row[0] for row in result.rows] == ["LP", "FT", "LP-FT", "LP-FT - FT"] + ["LP", "FT", "LP-FT"] * 2 + ["LP-FT - FT"] * 2
    assert result.n_lead_rows == 4
    assert [row[1] for row in result.rows[4:]] == ["seed 20"] * 3 + ["seed 21"] * 3 + ["seed 20", "seed 21"]
    assert str(result.rows[4][5]).startswith("penalty ")
    assert str(result.rows[5][5]) in ("0.001", "0.01")
    assert tree["n"] == {"seeds": 2, "train": 24, "val": 12, "id": 30, "dim": 30}
    splits = tree["measurements"][0]["report"]["splits"]
    assert [(split["kind"], split["n"], len(split["interval"])) for split in splits] == [("id", 30, 2), ("ood", 30, 2)]
    with pytest.raises(ConfigError, match=r"unknown key 'train\.epoch'"):
        shapes_methods.run([20], tmp_path, sets=["train.epoch=1"], progress=SILENT, load=tiny_load)


def test_lp_on_the_way_to_lpft_is_the_method_lp(tmp_path: Path) -> None:
    config = build_config(flags={"device": "cpu"}, sets=["train.epochs=1", "train.lr=[1e-2]", "probe.max_iter=5", "train.batch=8"])
    data = tiny_load(config)
    measured = {outcome.method: outcome for outcome in shapes_methods.measure_seed(config, data, SILENT)}
    assert list(measured) == ["LP", "FT", "LP-FT"]
    for label, method in (("LP", "lp"), ("FT", "ft"), ("LP-FT", "lpft")):
        classifier = build_classifier(config.model, config.data, len(data.classes), data.size, config.seed)
        place = replace(context(tmp_path / method, seed=config.seed), preprocessing=classifier.preprocessing)
        record = run_stages(classifier, METHODS.get(method).stages(config), data, place)[-1]["result"]
        result, _ = evaluate(FloatModel(classifier), data, classifier.preprocessing, float_predictions=None, progress=SILENT)
        assert measured[label].result.splits == result.splits
        assert measured[label].chosen == {key: record[key] for key in measured[label].chosen}
    assert "penalty" in measured["LP"].chosen
    assert measured["FT"].chosen["lr"] == measured["LP-FT"].chosen["lr"] == 1e-2


def outcome(seed: int, method: str, correct: int) -> shapes_methods.Outcome:
    splits = (SplitResult("id", "id", 100, correct), SplitResult("far", "ood", 100, correct - 10))
    return shapes_methods.Outcome(seed, method, ModelResult(method, splits), {"lr": 0.01})


def test_differences_are_paired_by_seed() -> None:
    outcomes = [
        outcome(seed, method, base + up) for seed, base in ((1, 50), (2, 70)) for method, up in (("LP", 0), ("FT", 5), ("LP-FT", seed + 7))
    ]
    rows, n_lead = shapes_methods.rows_of(outcomes)
    assert n_lead == 4
    assert rows[1] == ["FT", "2", "65.0 ± 14.1", "55.0 ± 14.1", "55.0 ± 14.1", ""]
    assert rows[3] == ["LP-FT - FT", "2", "+3.5 ± 0.7", "+3.5 ± 0.7", "+3.5 ± 0.7", ""]
    assert rows[-1] == ["LP-FT - FT", "seed 2", "+4.0", "+4.0", "+4.0", ""]


# --- runs ------------------------------------------------------------------------------------------------------------------


def report(*models: str, n: int = 200) -> EvalReport:
    splits = (SplitResult("id", "id", n, 190, 2), SplitResult("sketch", "ood", n, 80, 6))
    unflipped = tuple(SplitResult(split.split, split.kind, split.n, split.correct) for split in splits)
    return EvalReport(tuple(ModelResult(model, unflipped if model == "float" else splits) for model in models))


def make_run(path: Path, method: str, *, exported: bool = False, n: int = 200, seed: int = 0) -> Path:
    config = build_config(flags={"train.method": method, "seed": seed}).model_dump(mode="json")
    common: dict[str, Any] = {"config": config, "seed": seed, "preprocessing": PREPROCESSING.to_json(), "classes": ("a", "b"), "arrays": {}}
    training = {"images": {"train": 900, "val": 100}, "qat": {"epoch": 2}}
    documents = {"report.json": report("float", "fixed point", n=n).to_json(), "training.json": training}
    run = write_artifact(path, kind="quantized", documents=documents, **common)
    if exported:
        tree = report("float", "fixed point", "onnx", n=n).to_json()
        documents = {"report.json": tree, "export.json": {"target": "onnx", "compared_images": 256}}
        write_artifact(path / "export" / "onnx", kind="exported", documents=documents, parent=run.digest, **common)
    return path


def test_runs(tmp_path: Path) -> None:
    lp, lpft = make_run(tmp_path / "lp", "lp"), make_run(tmp_path / "lpft", "lpft", exported=True)
    out, arguments = tmp_path / "out", ["--name", "pacs", "--title", "PACS", f"LP:float={lp}", f"LP-FT={lpft}"]
    assert main(["runs", "--out", str(out), *arguments]) == 0
    result, tree = read(next(out.iterdir()))
    assert (result.suite, result.title) == ("pacs", "PACS")
    assert result.columns == ("method", "model", "id (n=200)", "ood:sketch (n=200)", "mean OOD", "flips %")
    cells = ("95.0 [91.0, 97.3]", "40.0 [33.5, 46.9]", "40.0")
    assert result.rows == (
        ("LP", "float", *cells, "-"),
        ("LP-FT", "float", *cells, "-"), ("LP-FT", "fixed point", *cells, "2.0"), ("LP-FT", "onnx", *cells, "2.0"),
    )  # fmt: skip
    assert tree["n"] == {"train": 900, "val": 100, "id": 200, "ood:sketch": 200}
    assert len(tree["measurements"][1]["exports"]["onnx"]) == 64
    assert "Exported models have 0 differing codes in any layer; test images compared: LP-FT: 256." in result.notes
    assert any("edgeft_micro at 16 px, 900 train images, 100 val images, seed 0" in note for note in result.notes)


def test_results_of_runs_carry_no_paths(tmp_path: Path) -> None:
    flags = {
        "data.source": "/far/away/photos",
        "data.ood": ["night=/far/away/dark", "/far/away/dusk"],
        "model.weights": "/far/w.safetensors",
    }
    tree = runs.portable(build_config(flags=flags | {"out": "/far/run"}).model_dump(mode="json"))
    assert "far" not in json.dumps(tree)
    assert (tree["data"]["source"], tree["data"]["ood"], tree["model"]["weights"]) == ("photos", ["night=dark", "dusk"], "w.safetensors")


def test_a_model_that_a_run_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run 'A' has no model 'trt'"):
        runs.run("x", "X", [("A:trt", make_run(tmp_path / "a", "lp"))], tmp_path / "out")


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    named = [("A", make_run(tmp_path / "a", "lp")), ("B", make_run(tmp_path / "b", "ft", n=300, seed=1))]
    with pytest.raises(ConfigError, match=r"runs 'A' and 'B' cannot stand in one table: they differ in test splits, seed$"):
        runs.run("x", "X", named, tmp_path / "out")
    with pytest.raises(ConfigError, match="no run was given"):
        runs.run("x", "X", [], tmp_path / "out")


def test_an_export_of_an_older_run_is_refused(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", "lp", exported=True)
    make_run(path, "lp", n=201)
    with pytest.raises(ArtifactError, match="was not exported from the run as it is now"):
        runs.run("x", "X", [("A", path)], tmp_path / "out")
