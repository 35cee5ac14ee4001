"""Suite edge-cpu: its grid and order, what --only means, tables, notes on the papers' orderings, and a tiny run that goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import edge_cpu, edge_cpu_latency, edge_cpu_notes, edge_cpu_results
from benchmarks.__main__ import main
from benchmarks.edge_cpu import DataSet, Grid, wanted
from benchmarks.edge_cpu_cells import FLOAT, FORMS, Cell, Records
from benchmarks.edge_cpu_results import Scored
from benchmarks.paired import Repeated, difference, repeated_difference
from benchmarks.plot import digest, svg
from benchmarks.tables import read_all, read_plots
from edgeft.artifact import Artifact
from edgeft.bench.measuring import Plan
from edgeft.errors import ConfigError
from edgeft.evaluation.paired import Pair
from edgeft.progress import Progress
from tests.conftest import draw_folder
from tests.exports import plain_net, write_run

SILENT = Progress(False)
GRID = Grid(
    (DataSet("A", Path("a"), (Path("b"),)), DataSet("B", Path("c"), (Path("d"),))), (0, 1), None, ("B:data.size=32", "train.epochs=2")
)


# --- grid ----------------------------------------------------------------------------------------------------------------


def test_a_stop_at_any_time_leaves_something_useful() -> None:
    cells = GRID.cells()
    assert len(cells) == len(set(cells)) == 2 * 2 * 12 * 5
    floats, rest = cells[:48], cells[48:]
    assert {cell.form for cell in floats} == {FLOAT}
    assert [(cell.data, cell.seed) for cell in floats[::12]] == [("A", 0), ("A", 1), ("B", 0), ("B", 1)]
    assert [cell.method for cell in floats[:3]] == ["lp", "ft", "lpft"]
    assert rest[:8] == [Cell("A", "lpft", seed, form) for seed in (0, 1) for form in FORMS]
    assert {cell.method for cell in rest[:16]} == {"lpft"}


def test_settings_for_all_data_sets_and_for_one() -> None:
    first, second = (GRID.config(Cell(data, "lpft", 1)) for data in "AB")
    assert (first.data.size, second.data.size) == (64, 32)
    assert {first.train.epochs, second.train.epochs} == {2}
    assert (second.data.source, second.data.ood, second.seed) == ("c", ("d=d",), 1)
    assert first.model.pretrained
    assert first.train.layers == ()
    assert GRID.config(Cell("A", "surgical", 1)).train.layers == edge_cpu.SURGICAL_LAYERS


def test_words_choose_cells() -> None:
    name = Cell("A", "lpft", 0, "edgeft per tensor").name
    assert [wanted(name, [text]) for text in ("A lpft", "ft", "lpft 1", "edgeft tensor", "float")] == [True, False, False, True, False]
    assert wanted(name, [])
    assert wanted(name, ["float", "lpft 0"])


@pytest.mark.parametrize("text", ["A", "A=", "A=x", "A=x,", "=x,y", "A B=x,y"])
def test_a_data_set_that_is_not_one(text: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form NAME=DIR,SHIFTED"):
        DataSet.parse(text)


# --- intervals -----------------------------------------------------------------------------------------------------------


def test_repeated_measurements_of_an_image_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    names = [str(number) for number in range(400)]
    first, second = rng.random(400) < 0.7, rng.random(400) < 0.6
    once = repeated_difference([Repeated.of([(names, first, second)])])
    labels = np.ones(400, np.int64)
    assert once == pytest.approx(difference([Pair.of(first.astype(np.int64), second.astype(np.int64), labels)]), abs=0.3)
    thrice = repeated_difference([Repeated.of([(names, first, second)] * 3)])
    assert thrice == pytest.approx(once, abs=0.3), "three copies of a measurement say no more than one"


def test_images_that_not_every_seed_has() -> None:
    right, wrong = np.ones(2, bool), np.zeros(2, bool)
    split = Repeated.of([(["a", "b"], right, wrong), (["b", "c"], wrong, wrong)])
    assert (split.more_right.tolist(), split.seen.tolist()) == ([1, 1, 0], [1, 2, 1])
    assert split.points == 50.0


# --- tables and notes ------------------------------------------------------------------------------------------------------


def scored(method: str, seed: int, form: str, n_right: Sequence[int]) -> Scored:
    """Of ten images on each of "id", "x" and "y"."""
    names = ("id", "x", "y")
    right = {name: np.arange(10) < n for name, n in zip(names, n_right, strict=True)}
    images = {name: [f"{name}{number}" for number in range(10)] for name in names}
    top = {name: found.astype(np.int64) for name, found in right.items()}
    kinds = {"id": "id", "x": "ood", "y": "ood"}
    return Scored(Cell("A", method, seed, form), kinds, images, right, top, dict.fromkeys(names, 5.0))


def found_of(*every: Scored) -> dict[Cell, Scored]:
    return {one.cell: one for one in every}


def test_methods_table() -> None:
    found = found_of(scored("lp", 0, FLOAT, (9, 4, 2)), scored("lp", 1, FLOAT, (7, 4, 4)), scored("ft", 0, FLOAT, (8, 1, 2)))
    table = edge_cpu_results.methods_table("A", ["lp", "ft", "lpft"], 2, found, [])
    assert table.columns == ["method", "seeds", "ID", "x", "y", "mean OOD", "ECE ID", "ECE OOD"]
    assert table.rows == [
        ["lp", "2", "80.0 ± 14.1", "40.0 ± 0.0", "30.0 ± 14.1", "35.0 ± 7.1", "5.0 ± 0.0", "5.0 ± 0.0"],
        ["ft", "1 of 2", "80.0", "10.0", "20.0", "15.0", "5.0", "5.0"],
    ]  # fmt: skip


def test_quantizers_table_compares_nets_that_have_both(monkeypatch: pytest.MonkeyPatch) -> None:
    form = "edgeft per tensor"
    monkeypatch.setattr(edge_cpu_results, "FORMS", {form: FORMS[form]})
    found = found_of(
        scored("lpft", 0, FLOAT, (8, 4, 2)), scored("lpft", 1, FLOAT, (10, 4, 2)), scored("lpft", 0, form, (6, 4, 4)),
        scored("lp", 0, FLOAT, (8, 4, 2)), scored("lp", 0, form, (8, 4, 2)),
    )  # fmt: skip
    table = edge_cpu_results.quantizers_table("A", ["lpft", "ft", "lp"], 2, found, [])
    assert [row[:3] for row in table.rows] == [
        ["lpft", FLOAT, "2"], ["lpft", form, "1 of 2"], ["all complete", FLOAT, "2 nets"], ["all complete", form, "2 nets"],
        ["lp", FLOAT, "1 of 2"], ["lp", form, "1 of 2"],
    ]  # fmt: skip
    assert table.n_lead_rows == 4
    lpft, everything = table.rows[1], table.rows[3]
    assert str(lpft[5]).startswith("-20.0 [")
    assert str(lpft[6]).startswith("+10.0 [")
    assert lpft[7] == f"{100 * 4 / 30:.1f}"
    assert str(everything[5]).startswith("-10.0 [")
    assert table.rows[5][5:] == ["+0.0 [+0.0, +0.0]", "+0.0 [+0.0, +0.0]", "0.0"]


def test_orderings_that_do_not_reproduce_are_said() -> None:
    values = {
        ("lp", 0): (60.0, 30.0), ("lp", 1): (60.0, 30.0), ("ft", 0): (70.0, 31.0), ("ft", 1): (70.0, 35.0), ("lpft", 0): (71.0, 40.0),
        ("l2sp", 0): (69.0, 31.0), ("l2sp", 1): (73.0, 35.0),
    }  # fmt: skip
    top1 = {Cell("A", method, seed): {"id": first, "mean OOD": second} for (method, seed), (first, second) in values.items()}
    holds, undecided, fails = edge_cpu_notes.orderings("A", top1)
    assert holds.startswith("Orderings of the papers that hold here in every seed")
    assert undecided == (
        "Orderings that hold on average but not in every seed (points, paired by seed): "
        "l2sp over ft in ID +1.0 ± 2.8 (1 of 2 seeds; Li et al. 2018)."
    )
    assert "lpft over ft in mean OOD +9.0 (1 of 1 seeds; Kumar et al. 2022)" in holds
    assert fails == (
        "Orderings that do NOT reproduce here (points, paired by seed): "
        "lp over ft in mean OOD -3.0 ± 2.8 (0 of 2 seeds; Kumar et al. 2022)."
    )


def test_missing_cells_are_named() -> None:
    configs: dict[Cell, Any] = {
        Cell("A", method, seed, form): None for method in ("lp", "ft") for seed in (0, 1) for form in (FLOAT, *FORMS)
    }
    found = {cell: None for cell in configs if cell.form == FLOAT or (cell.method, cell.form) == ("lp", "ORT static")}
    del found[Cell("A", "ft", 1, FLOAT)]
    assert edge_cpu_notes.missing_cells("A", [FLOAT], configs, found) == ["Not measured yet: float of ft (seed 1)."]
    assert edge_cpu_notes.missing_cells("A", list(FORMS), configs, found) == [
        "Not measured yet: ORT static of ft; Brevitas QAT, edgeft per tensor, edgeft per channel of lp, ft."
    ]
    assert edge_cpu_notes.missing_cells("A", list(FORMS), configs, configs) == []


# --- plot ----------------------------------------------------------------------------------------------------------------


def test_plot() -> None:
    form = "edgeft per tensor"
    found = found_of(*(scored("lpft", seed, kind, (8, 4, 2 + seed)) for seed in (0, 1) for kind in (FLOAT, form)))
    record = {"rounds_ms": {"float in ONNX Runtime": [[2.0, 2.0]], f"{form} in ONNX Runtime": [[1.0, 1.2]], f"{form} in C": [[3.0, 3.0]]}}
    data = edge_cpu_results.plot_of(["A", "B"], found, {"A": record})
    assert data is not None
    ((first, second),) = data["rows"]
    assert (first["title"], second["title"]) == ("A, in distribution", "A, mean out of distribution")
    assert second["points"][1] == {"form": f"{form}, ONNX Runtime", "method": "lpft", "ms": 1.1, "percent": 32.5, "spread": 3.54}
    image = svg(data)
    assert digest(data) in image
    assert image == svg(data), "the same bytes"
    assert digest(data | {"title": "other"}) not in image
    assert edge_cpu_results.plot_of(["A"], found, {}) is None


# --- suite ---------------------------------------------------------------------------------------------------------------

SETS = (
    "model.backbone=edgeft_micro", "model.pretrained=false", "data.size=32", "train.epochs=1", "train.lr=[0.001]", "train.batch=8",
    "quant.calibration_images=8", "quant.epochs=1", "quant.rounding=nearest", "quant.fit_ranges=false", "quant.format=minmax",
    "probe.penalties=[0.01]",
)  # fmt: skip


def test_suite_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_cpu_latency, "in_c", lambda run, image: {})
    photos, dark = draw_folder(tmp_path / "photos", n=12, size=(40, 36)), draw_folder(tmp_path / "dark", n=5, size=(40, 36), shift=-60)
    records, out = tmp_path / "records", tmp_path / "out"
    sets = [part for text in SETS for part in ("--set", text)]
    common = ["edge-cpu", f"tiny={photos},{dark}", "--seeds", "0,1", *sets, "--records", str(records), "--out", str(out)]
    assert main([*common, "--only", "lp 0 float", "--only", "lpft 0 float"]) == 0
    (file,) = out.iterdir()
    (table,) = read_all(out)
    assert (table.suite, [row[:2] for row in table.rows]) == ("edge-cpu-tiny-methods", [("lp", "1 of 2"), ("lpft", "1 of 2")])
    assert "float of lp (seed 1), ft, lpft (seed 1), bang" in table.notes[-1]
    kept = {path: path.stat().st_mtime_ns for path in records.rglob("*") if path.is_file() and "work" not in path.parts}

    assert main([*common, "--only", "lpft 0"]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "nothing is measured twice"
    assert [result.suite for result in read_all(out)] == ["edge-cpu-tiny-methods", "edge-cpu-tiny-quantizers"]
    assert [row[1] for row in read_all(out)[1].rows] == [FLOAT, *FORMS]
    tree = json.loads(file.read_text())
    assert {cell["form"] for cell in tree["measurements"]["cells"]} == {FLOAT, *FORMS}
    assert str(tmp_path) not in file.read_text()
    assert read_plots(out) == []

    assert main([*common, "--only", "latency", "--rounds", "2", "--calls", "1"]) == 0
    latency = next(result for result in read_all(out) if result.suite == "edge-cpu-latency")
    assert {row[1:3] for row in latency.rows} >= {(form, "OpenVINO") for form in edge_cpu_latency.OURS}
    assert latency.rows[0][5] == latency.rows[1][6] == 1.0
    (plot,) = read_plots(out)
    assert {point["method"] for point in plot.data["rows"][0][0]["points"]} == {"lp", "lpft"}
    record = edge_cpu_latency.file_of(Records(records), "tiny")
    before = record.stat().st_mtime_ns
    assert main([*common, "--only", "latency", "--rounds", "2", "--calls", "1"]) == 0
    assert record.stat().st_mtime_ns == before
    assert main([*common, "--only", "latency", "--rounds", "2", "--calls", "1", "--again"]) == 0
    assert record.stat().st_mtime_ns != before


@pytest.mark.cc
def test_c_bundle_is_built_and_weighed(compiler: str, tmp_path: Path) -> None:
    write_run(tmp_path, plain_net())
    run = Artifact.load(tmp_path)
    image = run.samples()["images"][:1]
    ((runtime, (call, n_bytes)),) = edge_cpu_latency.in_c(run, image).items()
    assert runtime == edge_cpu_latency.C
    call()
    assert n_bytes > 100


def test_latency_needs_recorded_nets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"latency needs cells that are not recorded: A lpft 0 edgeft per tensor, A lpft 0 edgeft per ch"):
        edge_cpu.run(GRID, tmp_path, tmp_path, only=["A latency"], plan=Plan(2, 1), progress=SILENT)
    with pytest.raises(ConfigError, match="no cell of this grid is recorded, and none was asked for"):
        edge_cpu.run(GRID, tmp_path, tmp_path, only=["nothing"], plan=Plan(2, 1), progress=SILENT)
