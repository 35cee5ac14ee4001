"""What a bench writes: CSV, JSON, plots, and a page that needs nothing else."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgeft.artifact import json_bytes
from edgeft.bench.results import BenchReport
from edgeft.bench.text import ACCURACY, NAMES, SPEED, cells, table
from edgeft.benching import bench
from tests.benches import fake, measured_run, without_data

SHARES = {"id": {"top": 0.0, "bottom": 0.0, "underflow": 0.1}, "ood:far": {"top": 0.01, "bottom": 0.0, "underflow": 0.1}}
SATURATION = {
    "schema": 1, "images": {"id": 8, "ood:far": 8},
    "tensors": {"stem": {"format": "u8.5", "clip": True, "splits": SHARES}, "<b>": {"format": "u8.5", "clip": False, "splits": SHARES}},
}  # fmt: skip


class Reader(HTMLParser):
    """Cells of all tables, tags that are open at the end, and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchReport, Path]:
    """A report with everything that can be drawn without the data set, of two runs, one with an awkward name."""
    root = tmp_path_factory.mktemp("whole")
    runs = [measured_run(root / "a <odd> & run", json_bytes(SATURATION)), measured_run(root / "run")]
    with pytest.MonkeyPatch.context() as patch:
        without_data(patch)
        fake(patch)
        found = bench(runs, backends=["onnx", "openvino", "cuda"], batches=[2], rounds=2, calls=1, out=root / "out")
    return found, root / "out"


def test_csv_and_json_agree(whole: tuple[BenchReport, Path]) -> None:
    _, out = whole
    tree = json.loads((out / "results.json").read_text())
    lines = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert len(lines) == len(tree["rows"]) == 2 * (2 + 1)
    for line, row in zip(lines, tree["rows"], strict=True):
        assert line == {key: "" if row[key] is None else str(row[key]) for key in line}
    first = tree["rows"][0]
    assert (first["ood:far n"], first["ood:far top1"], first["mean_ood"]) == (100, 0.58, pytest.approx(0.69))
    assert {"passed", "failures", "machine", "versions", "rounds", "calls"} <= tree.keys()


def test_the_page_is_complete_and_needs_no_network(whole: tuple[BenchReport, Path]) -> None:
    report, out = whole
    text = (out / "report.html").read_text()
    found = Reader(text)
    assert found.open == []
    timed = [row for row in report.rows if row.status == "timed"]
    for line in [*cells((*NAMES, *SPEED), timed), *cells((*NAMES, *ACCURACY), timed)]:
        assert set(line) <= set(found.cells)
    assert {row.problem for row in report.rows if row.status != "timed"} <= set(found.cells)
    assert "a <odd> & run" in found.cells
    assert not found.tags & {"script", "link", "iframe", "img", "base"}
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=\s]+", "", text)
    assert "@import" not in text
    assert all(given.startswith("#") for given in re.findall(r"url\(([^)]*)\)", text))
    for name, value in found.attributes:
        if name in ("src", "href", "xlink:href", "data"):
            assert (value or "").startswith(("#", "data:image/png;base64,"))
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for part in ("prefers-color-scheme: dark", "width=device-width", "fill: var(--ink)", "overflow-x: auto"):
        assert part in text


def test_every_plot_is_a_picture_and_a_drawing(whole: tuple[BenchReport, Path]) -> None:
    _, out = whole
    names = {file.stem for file in (out / "plots").iterdir()}
    assert names == {
        "accuracy-latency-1t-b2", "id-ood", "formats-run", "formats-a-odd-run", "saturation-a-odd-run",
    }  # fmt: skip
    for name in names:
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / "plots" / f"{name}.svg").read_text()


def test_the_text_names_runs_where_there_are_several(whole: tuple[BenchReport, Path]) -> None:
    report, out = whole
    assert "edgeft int8 in OpenVINO of 'run'" in table(report)
    assert (out / "results.txt").read_text() == table(report) + "\n"
