"""The commands as typed, on a generated image folder and the embedded backbone: files, agreement, manners."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from edgeft.artifact import Artifact
from edgeft.cli import main
from edgeft.interpret import Interpreter
from tests.conftest import ImageFolder

QUICK = (
    "--set", "data.size=32", "--set", "train.epochs=1", "--set", "train.lr=[0.001]", "--set", "train.batch=8", "--set", "quant.epochs=1",
    "--set", "quant.calibration_images=8", "--set", "verify.samples=12", "--set", "verify.golden=4", "--set", "probe.penalties=[0.01]",
)  # fmt: skip


def train(data: Path, out: Path, *extra: str) -> int:
    return main(["train-quantize", "--method", "lpft", "--data", str(data), "--out", str(out), "--device", "cpu", *QUICK, *extra])


@pytest.fixture
def photos(image_folder: ImageFolder) -> Path:
    return image_folder("photos", n=12, size=(40, 36))


def test_train_export_show(photos: Path, image_folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shifted = image_folder("dark", ("blue", "green"), n=5, size=(40, 36), shift=-60)
    out = tmp_path / "run"
    assert train(photos, out, "--ood", f"night={shifted}") == 0
    captured = capsys.readouterr()
    assert "ood:night" in captured.out
    assert "mean OOD" in captured.out
    assert "interpreter = training graph: 0 differing codes" in captured.err
    assert "red" in captured.err, "the class that the shifted set lacks is reported"
    artifact = Artifact.load(out)
    assert artifact.manifest.kind == "quantized"
    assert not (out / "work").exists()
    assert [model.model for model in artifact.report().models] == ["float", "fixed point"]
    samples = artifact.samples()
    codes = Interpreter(artifact.graph()).layers(samples["images"])[artifact.graph().output]
    np.testing.assert_array_equal(codes, samples[f"layer:{artifact.graph().output}"])

    assert main(["export", str(out), "--target", "onnx"]) == 0
    printed = capsys.readouterr().out
    assert "exact on 4/4 images" in printed
    assert "0 differing codes" in printed
    exported = Artifact.load(out / "export" / "onnx")
    assert exported.manifest.parent == artifact.digest
    fixed, onnx = exported.report().model("fixed point"), exported.report().model("onnx")
    assert fixed is not None
    assert onnx is not None
    assert [s.correct for s in fixed.splits] == [s.correct for s in onnx.splits]

    assert main(["show", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["exports"] == ["onnx"]
    assert shown["formats"]["layers"]["conv_stem"]["weight"]


@pytest.mark.parametrize("flags", [("--profile", "s8"), ("--set", "quant.granularity=channel", "--set", "quant.format=grid")])
def test_variants_reach_an_exact_export(photos: Path, tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert train(photos, tmp_path / "run", *flags) == 0
    assert main(["export", str(tmp_path / "run")]) == 0
    assert "0 differing codes" in capsys.readouterr().out


def test_calibration_only_and_baselines(photos: Path, tmp_path: Path) -> None:
    for method in ("lp", "ft"):
        out = tmp_path / method
        assert train(photos, out, "--method", method, "--set", "quant.epochs=0", "--set", "quant.format=minmax") == 0
        assert Artifact.load(out).document("training.json")["qat"] == {"moves": 0}


def test_recipe_without_training(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    sets = [part for part in QUICK if part not in ("--set", "quant.epochs=1")]
    arguments = ["--data", str(photos), "--out", str(out), "--device", "cpu", "--recipe", "f8net-tiny", "--set", "quant.headroom=augmented"]
    assert main(["train-quantize", *arguments, *(text for part in sets for text in ("--set", part))]) == 0
    assert Artifact.load(out).document("training.json")["qat"] == {"moves": 0}
    assert train(photos, tmp_path / "other", "--recipe", "f8net-tiny") == 2
    assert "recipe f8net-tiny trains nothing, but epochs is 1" in capsys.readouterr().err


def test_distillation_with_unlabelled_images(
    photos: Path, image_folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shifted, out = image_folder("dark", n=4, size=(40, 36), shift=-60), tmp_path / "run"
    (shifted / "red" / "broken.png").write_bytes(b"nothing")
    target = ("--loss", "distill", "--set", f'quant.unlabelled=["{shifted}/red", "{shifted}/green"]')
    assert train(photos, out, *target) == 2
    assert "1 of 5 files" in capsys.readouterr().err, "refused before any training"
    (shifted / "red" / "broken.png").unlink()
    assert train(photos, out, *target, "--ood", f"night={shifted}") == 0
    printed = capsys.readouterr()
    assert "images of it, without labels, take part in training" in printed.err
    assert "divergence from float" in printed.err
    record = Artifact.load(out).document("training.json")["qat"]
    assert record["loss"] == "distill"
    assert all(row["val_divergence"] >= 0 for row in record["history"])
    assert main(["show", str(out), "--formats", "--saturation"]) == 0
    printed = capsys.readouterr()
    assert "fractions by layer" in printed.out
    assert "saturated % ood:night" in printed.out


def test_same_seed_same_integers(photos: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert train(photos, tmp_path / name) == 0
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("a", "b"))
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_an_occupied_directory_is_refused_and_a_finished_run_returned(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(photos, out) == 0
    before = Artifact.load(out).digest
    assert train(photos, out) == 2
    assert "already holds a finished run" in capsys.readouterr().err
    assert train(photos, out, "--resume") == 0
    assert Artifact.load(out).digest == before
    assert train(photos, out, "--resume", "--seed", "5") == 2
    assert "seed: was 0, now 5" in capsys.readouterr().err


def test_dry_run_names_everything_and_writes_nothing(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(photos, tmp_path / "run", "--dry-run") == 0
    printed = capsys.readouterr().out
    for word in ("3 classes", "edgeft_micro", "L-BFGS", "batch norm frozen", "23 layers"):
        assert word in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="NOT TESTED: there is a GPU")
def test_a_dry_run_refuses_a_device_that_is_not_there(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(photos, tmp_path / "run", "--dry-run", "--device", "cuda") == 2
    assert "device 'cuda' is not available" in capsys.readouterr().err


def test_an_edited_run_is_not_exported(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(photos, out) == 0
    file = out / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["export", str(out)]) == 2
    assert "weights.safetensors' was changed" in capsys.readouterr().err
    assert not (out / "export").exists()


def test_images_that_changed_since_the_run_are_noticed(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(photos, out) == 0
    for file in photos.rglob("*.png"):
        file.write_bytes((photos / "red" / "000.png").read_bytes())
    assert main(["export", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "accuracy not measured" in printed
    assert "are not those that the run was measured on" in printed


def test_data_that_are_gone_only_cost_the_accuracy(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(photos, out) == 0
    photos.rename(tmp_path / "elsewhere")
    assert main(["export", str(out)]) == 0
    assert "accuracy not measured" in capsys.readouterr().out
