"""An artifact in words."""

from pathlib import Path

import numpy as np
import pytest

from edgeft.artifact import Arrays, Artifact, write_artifact
from edgeft.config import build_config
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Add, Conv, IntegerGraph, Tensor
from edgeft.report import EvalReport, ModelResult, SplitResult
from edgeft.show import describe, exports, format_table, one_line, size


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


def test_format_table_has_one_row_for_each_operation() -> None:
    constants: Arrays = {"w": np.full((2, 3, 1, 1), 100, np.int8), "b": np.full(2, 5, np.int32)}
    tensors = {
        "image": Tensor("image", (3, 4, 4), FixedPointFormat(8, 8, signed=False)),
        "stem": Tensor("stem", (2, 4, 4), FixedPointFormat(8, 6, signed=False)),
        "sum": Tensor("sum", (2, 4, 4), FixedPointFormat(8, 5, signed=True)),
    }
    stem = Conv("stem", "image", "w", "b", (7, 9), (1, 1), (0, 0, 0, 0), (1, 1), 1, relu=True)
    graph = IntegerGraph(tensors, (stem, Add("sum", "stem", "stem", relu=False)), "image", constants=constants)
    # 3 inputs of at most 255, weight 100, bias 5: at most 76505, 17 bits and a sign.
    assert format_table(graph).splitlines() == [
        "layer  operation  input      weight         output  shift     accumulator bits",
        "stem   Conv       u8.8       w8.7 ... w8.9  u8.6    9 ... 11  18",
        "sum    Add        u8.6 u8.6                 s8.5    1",
    ]
