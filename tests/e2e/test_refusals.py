"""Bad input ends before training, with exit code 2, one line and a hint, and leaves nothing behind."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgeft.cli import main
from tests.conftest import ImageFolder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--backbone", "mobilenetv2_10"), ("unknown backbone 'mobilenetv2_10'", "mobilenetv2_100")),
        (("--backbone", "edgenext_xx_small"), ("layer 'stem.1", "layer_norm", "has no fixed-point form")),
        (("--backbone", "vit_tiny_patch16_224"), ("VisionTransformer", "48x48")),
        (("--method", "lpff"), ("unknown method 'lpff'", "did you mean: lpft")),
        (("--weights", "missing.safetensors"), ("missing.safetensors",)),
        (("--set", "quant.formatt=grid"), ("unknown key 'quant.formatt'", "quant.format")),
        (("--set", "quant.format=best", "--set", "train.epochs=0"), ("2 errors", "quant.format", "train.epochs")),
        (("--data", "nowhere/at/all"), ("nowhere/at/all",)),
        (("--device", "tpu"), ("device",)),
        (("--set", "model.args.no_such_argument=3"), ("no_such_argument",)),
    ],
)
def test_refused_before_training(
    flags: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train-quantize", "--out", "run", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") or "\nerror: " in error
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_name_their_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"conv_stem.weight": torch.zeros(3, 3, 3, 3), "other": torch.zeros(1)}, tmp_path / "w.safetensors")
    assert main(["train-quantize", "--out", str(tmp_path / "run"), "--weights", str(tmp_path / "w.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "conv_stem.weight" in error
    assert "other" in error


def test_folders_that_do_not_fit(image_folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = image_folder("photos", n=8)
    foreign = image_folder("foreign", ("green", "zebra"), n=3)
    single = image_folder("single", ("red",), n=8)
    for flags, word in (
        (("--data", str(photos), "--ood", str(foreign)), "zebra"),
        (("--data", str(single)), "single"),
        (("--data", str(photos), "--ood", f"id={foreign}"), "'id'"),
    ):
        assert main(["train-quantize", "--out", str(tmp_path / "run"), *flags]) == 2
        assert word in capsys.readouterr().err
    (photos / "empty").mkdir()
    assert main(["train-quantize", "--out", str(tmp_path / "run"), "--data", str(photos)]) == 2
    assert "empty" in capsys.readouterr().err


def test_divergence_is_said_and_nothing_is_lost(image_folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = image_folder("photos", n=12)
    out = tmp_path / "run"
    flags = ["--set", "train.lr=[1e30]", "--set", "data.size=32", "--set", "train.batch=8", "--set", "probe.penalties=[0.01]"]
    assert main(["train-quantize", "--data", str(photos), "--out", str(out), "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert "not finite at step" in error
    assert "1e+30" in error
    assert list((out / "work" / "fine-tune").glob("*.safetensors")), "the last good weights are kept"


def test_export_of_what_is_not_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nothing")]) == 2
    assert "there is no run" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--target", "tensor-rt"]) == 2
    assert "unknown export target 'tensor-rt'" in capsys.readouterr().err
