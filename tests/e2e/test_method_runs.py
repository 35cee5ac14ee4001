"""Methods that average weights, as typed: trained, quantized, lowered and measured like any other, and refused before training."""

from pathlib import Path

import pytest

from edgeft.artifact import Artifact
from edgeft.cli import main
from tests.conftest import ImageFolder

QUICK = (
    "--device", "cpu", "--set", "data.size=32", "--set", "train.epochs=1", "--set", "train.lr=[0.001,0.003]", "--set", "train.batch=8",
    "--set", "quant.epochs=1", "--set", "quant.calibration_images=8", "--set", "quant.rounding=nearest", "--set", "verify.samples=4",
    "--set", "verify.golden=2", "--set", "probe.penalties=[0.01]",
)  # fmt: skip


@pytest.mark.parametrize(
    ("method", "sets", "chosen"),
    [("wise", ("train.ema=0.9", "train.l2sp=0.01", "train.freeze_k=2"), "alpha"), ("soup", ("train.mixup=0.2",), "members")],
)
def test_averages_are_quantized_like_any_model(
    method: str, sets: tuple[str, ...], chosen: str, image_folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = image_folder("photos", n=10), tmp_path / "run"
    options = [part for text in sets for part in ("--set", text)]
    assert main(["train-quantize", "--method", method, "--data", str(photos), "--out", str(out), *QUICK, *options]) == 0
    assert "interpreter = training graph: 0 differing codes" in capsys.readouterr().err
    artifact = Artifact.load(out)
    record = artifact.document("training.json")
    assert [stage["stage"]["name"] for stage in record["stages"]] == ["probe", "fine-tune", method]
    assert chosen in record["stages"][-1]["result"]
    assert record["qat"]["history"][1]["lr"] == pytest.approx(record["stages"][1]["result"]["lr"] / 10), "the rate that fine-tuning chose"
    assert [model.model for model in artifact.report().models] == ["float", "fixed point"]


def test_layers_that_there_are_not_are_refused_before_training(
    image_folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = image_folder("photos", n=10), tmp_path / "run"
    flags = ["--method", "surgical", "--data", str(photos), "--out", str(out), *QUICK, "--set", "train.layers=blocks.9"]
    assert main(["train-quantize", *flags]) == 2
    error = capsys.readouterr().err
    assert "train.layers: no layer of backbone 'EdgeftMicro' is called 'blocks.9'" in error
    assert "it has conv_stem, bn_stem, blocks.0, blocks.1, blocks.2" in error
    assert not out.exists()
