"""Runs to bench in tests: measured on paper, exported to "onnx", and a backend that is not there."""

from pathlib import Path

import numpy as np
import pytest

from edgeft.artifact import json_bytes
from edgeft.bench import candidates, measuring, opening
from edgeft.bench.opening import Executed, Opened, Spec
from edgeft.exporting import export
from edgeft.interpret import Interpreter
from edgeft.report import EvalReport, ModelResult, SplitResult
from edgeft.runner import Images, Logits
from tests.exports import plain_net, rewrite, write_run

REPORT = EvalReport(
    (
        ModelResult("float", (SplitResult("id", "id", 100, 90), SplitResult("far", "ood", 100, 60), SplitResult("near", "ood", 100, 80))),
        ModelResult(
            "fixed point",
            (SplitResult("id", "id", 100, 89, 3), SplitResult("far", "ood", 100, 58, 6), SplitResult("near", "ood", 100, 80, 2)),
        ),
    )
)


def measured_run(path: Path, saturation: bytes = b"") -> Path:
    """A run with REPORT and an export to "onnx" that says the same; its images are those of no data set."""
    write_run(path, plain_net())
    rewrite(path, "report.json", json_bytes(REPORT.to_json()))
    if saturation:
        (path / "saturation.json").write_bytes(saturation)
        rewrite(path, "saturation.json", saturation)
    export(path, ["onnx"], evaluate=False)
    exported = ModelResult("onnx", REPORT.models[1].splits)
    rewrite(path / "export" / "onnx", "report.json", json_bytes(REPORT.with_model(exported).to_json()))
    return path


class Fake:
    """A backend that answers as the interpreter does, plus `shift`."""

    name = "fake"

    def __init__(self, shift: float, in_float: tuple[str, ...]) -> None:
        self._shift, self._in_float, self._interpreter = shift, in_float, Interpreter(plain_net())
        self.specs: list[Spec] = []

    def logits(self, images: Images) -> Logits:
        found: Logits = self._interpreter.logits(images) + np.float32(self._shift)
        return found

    def __call__(self, spec: Spec) -> Opened:
        self.specs.append(spec)
        return Opened(self, lambda images: lambda: None, lambda: Executed("Fake 1.0, CPU", {"Conv": 1}, self._in_float))


def fake(monkeypatch: pytest.MonkeyPatch, *, shift: float = 0.0, in_float: tuple[str, ...] = ()) -> Fake:
    """OpenVINO's place is taken by a fake."""
    made = Fake(shift, in_float)
    monkeypatch.setitem(opening.OPENERS, "openvino", made)
    return made


def without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data set, and no processes of their own for memory."""
    monkeypatch.setattr(candidates, "dataset_of", lambda *_: "its images are not here")
    monkeypatch.setattr(measuring, "peak_bytes", lambda *_: 50_000_000)
