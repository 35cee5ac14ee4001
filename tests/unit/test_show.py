"""An artifact in words."""

from pathlib import Path

import numpy as np
import pytest

from edgeft.artifact import Arrays, Artifact, write_artifact
from edgeft.config import build_config
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Add, Conv, IntegerGraph, Tensor
from edgeft.report import EvalReport, ModelResult, SplitResult
from edgeft.show import describe, exports, one_line, size
from edgeft.show_formats import format_plot, format_table
from edgeft.show_saturation import saturation_table


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    config = build_config(flags={"data.ood": ["sketch=s", "c"], "model.backbone": "resnet18"}).model_dump(mode="json")
    report = EvalReport((ModelResult("float", (SplitResult("id", "id", 10, 9),)),))
    return write_artifact(
        tmp_path / "run", kind="quantized", config=config, seed=7, preprocessing={"size": 48, "mean": [0.5, 0.25, 1 / 3]},
        classes=[f"class{i}" for i in range(12)], arrays={}, documents={"report.json": report.to_json()},
    )  # fmt: skip


@pytest.mark.parametrize(("n_bytes", "text"), [(999, "999 B"), (4500, "4.5 kB"), (1_234_567, "1.2 MB")])
def test_size(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text


def test_describe_names_recipe_origin_and_accuracy(artifact: Artifact) -> None:
    text = describe(artifact)
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line.strip()}
    assert text.startswith(one_line(artifact))
    assert lines["data.ood"] == "sketch=s c"
    assert lines["model.backbone"] == "resnet18"
    assert lines["seed"] == "7"
    assert lines["classes"] == "12: " + " ".join(f"class{i}" for i in range(10)) + " ..."
    assert lines["image"] == "size 48, mean 0.5 0.25 0.333333"
    assert lines["digest"] == artifact.digest[:16]
    assert lines["id"].startswith("10 90.0")
    assert "parent" not in lines
    assert "model.weights" not in lines


def test_exports_are_listed_when_they_are_finished(artifact: Artifact) -> None:
    for name, finished in (("onnx", True), ("c", False)):
        folder = artifact.path / "export" / name
        folder.mkdir(parents=True)
        if finished:
            (folder / "manifest.json").write_text("{}")
    assert exports(artifact) == ["onnx"]


def two_layers() -> IntegerGraph:
    constants: Arrays = {"w": np.full((2, 3, 1, 1), 100, np.int8), "b": np.full(2, 5, np.int32)}
    tensors = {
        "image": Tensor("image", (3, 4, 4), FixedPointFormat(8, 8, signed=False)),
        "stem": Tensor("stem", (2, 4, 4), FixedPointFormat(8, 6, signed=False)),
        "sum": Tensor("sum", (2, 4, 4), FixedPointFormat(8, 5, signed=True)),
    }
    stem = Conv("stem", "image", "w", "b", (7, 9), (1, 1), (0, 0, 0, 0), (1, 1), 1, relu=True)
    return IntegerGraph(tensors, (stem, Add("sum", "stem", "stem", relu=False)), "image", constants=constants)


def test_format_table_has_one_row_for_each_operation() -> None:
    # 3 inputs of at most 255, weight 100, bias 5: at most 76505, 17 bits and a sign.
    assert format_table(two_layers(), {}).splitlines() == [
        "#  layer  operation  input      weight         output  shift     accumulator bits",
        "1  stem   Conv       u8.8       w8.7 ... w8.9  u8.6    9 ... 11  18",
        "2  sum    Add        u8.6 u8.6                 s8.5    1",
    ]


def test_format_table_says_why_and_what_the_neighbours_would_cost() -> None:
    formats = {
        "rule": "std",
        "layers": {"stem": {"weight_sigma": 0.12345, "reason": "narrowed", "alternatives_by_change": {"-1": 0.5, "0": 0.25, "+1": 0.75}}},
        "activations": {
            "stem": {"format": "u8.6", "sigma": 1.5, "alternatives": {"5": 0.01, "6": 0.005, "7": 0.0251}},
            "sum": {"format": "s8.5", "sigma": None, "alternatives": {"5": 0.002}},
        },
    }
    head, stem, total = format_table(two_layers(), formats).splitlines()
    columns = [head.index(name) for name in ("weight sigma", "output sigma", "chosen by", "weight error %", "output error %")]
    cells = [[row[i:j].strip() for i, j in zip(columns, [*columns[1:], None], strict=True)] for row in (stem, total)]
    assert cells[0] == ["0.123", "1.5", "narrowed / std", "25.00 (-1: 50.00, +1: 75.00)", "0.50 (-1: 1.00, +1: 2.51)"]
    assert cells[1] == ["", "", "std", "", "0.20"]


def test_format_plot_marks_weights_and_outputs() -> None:
    assert format_plot(two_layers()).splitlines()[1:] == [
        "   9 |w",
        "   8 |",
        "   7 |w",
        "   6 |a",
        "   5 | a",
        "     +--",
        "      12",
    ]


def test_saturation_table() -> None:
    def shares(top: float, bottom: float, underflow: float) -> dict[str, float]:
        return {"top": top, "bottom": bottom, "underflow": underflow}

    none, some, most = shares(0, 0, 0), shares(0.1, 0, 0), shares(0.02, 0.06, 0)
    document = {
        "images": {"id": 12, "ood:a": 10, "ood:b": 9},
        "tensors": {
            "x": {"format": "s8.5", "clip": False, "splits": {"id": shares(0.01, 0.01, 0.5), "ood:a": most, "ood:b": none}},
            "y": {"format": "u8.5", "clip": True, "splits": dict.fromkeys(("id", "ood:a", "ood:b"), some)},
            "z": {"format": "u8.5", "clip": False, "splits": {"id": none, "ood:a": some, "ood:b": none}},
        },
    }  # fmt: skip
    rows = [line.split("  ") for line in saturation_table(document).splitlines()]
    table = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert table[0] == [
        "activation", "format", "saturated % id", "saturated % ood:a", "saturated % ood:b", "OOD / ID", "underflow % id",
        "underflow % ood:a", "underflow % ood:b",
    ]  # fmt: skip
    assert table[1] == ["x", "s8.5", "2.000", "8.000", "0", "4.0", "50.000", "0", "0"]
    assert table[2][:6] == ["y", "u8.5", "10.000", "10.000", "10.000", "clip"]
    assert table[3][5] == "only OOD"
    assert table[4] == ["images: id 12, ood:a 10, ood:b 9; underflow: share of the nonzero values that become 0"]
