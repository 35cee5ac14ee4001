"""A diagnosis from folders and runs: what is looked at, what is counted, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from edgeft.artifact import Artifact
from edgeft.cli import main
from edgeft.config import Config, ModelConfig, build_config
from edgeft.data import Split
from edgeft.data.loading import load_dataset
from edgeft.diagnosing import diagnose, effective_robustness, quantization_robustness
from edgeft.diagnosis.family import answers
from edgeft.diagnosis.report import render
from edgeft.diagnosis.seeing import look
from edgeft.errors import ArtifactError, ConfigError, DataError, EdgeftError
from edgeft.exporting import export
from edgeft.models import build_classifier
from edgeft.pipeline import train_quantize
from edgeft.predicting import load
from edgeft.progress import Progress
from tests.conftest import ImageFolder, draw_folder
from tests.tiny import Squares

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of 90 images: two draws of the training images' distribution, and much darker ones, where red is called crimson."""
    root = tmp_path_factory.mktemp("diagnosing")
    for name, shift in (("photos", 0), ("other-photos", 0), ("dark", -90)):
        draw_folder(root / name, n=70 if name == "photos" else 30, shift=shift)
    (root / "dark" / "red").rename(root / "dark" / "crimson")
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    """A run of the linear probe on `photos`, exported; 63 of its images are its ID test set."""
    config = build_config(
        flags={
            "data.source": str(root / "photos"), "data.ood": [f"night={root / 'dark-known'}"], "data.size": 32, "data.test_fraction": 0.3,
            "train.method": "lp", "probe.penalties": [0.01], "quant.recipe": "f8net-tiny", "quant.calibration_images": 8,
            "verify.samples": 4, "verify.golden": 4, "device": "cpu", "out": root / "run",
        }
    )  # fmt: skip
    shutil.copytree(root / "dark" / "blue", root / "dark-known" / "blue")
    train_quantize(config)
    export(root / "run", ["onnx"])
    return root / "run"


def refusal(kind: type[EdgeftError], ref: Path | None, shift: Path | str, **options: object) -> str:
    with pytest.raises(kind) as caught:
        diagnose(ref, shift, **options)  # type: ignore[arg-type]
    return caught.value.message


def test_a_darker_folder_is_out_of_support_and_measured_where_labels_are_known(root: Path, run: Path) -> None:
    found = diagnose(root / "other-photos", root / "dark", run=run)
    assert (found.n_ref, found.n_shift) == (90, 90)
    assert found.outside > 0.95
    assert found.unknown == ("crimson",)
    assert "shifted folders that are no classes of the reference, taken without labels: 'crimson'" in found.notes
    assert [parts.model for parts in found.models] == ["float", "onnx"]
    for parts in found.models:
        assert (parts.ref.n, parts.shift.n) == (90, 60)
        assert parts.inside.n + parts.outside.n == 60
    assert "edgeft_micro, fine-tuned in float by the run" in found.backbone
    # The same as the exported model says by another way.
    files = sorted((root / "dark" / "blue").iterdir()) + sorted((root / "dark" / "green").iterdir())
    labels = load(run).predict(files).labels
    expected = sum(label == path.parent.name for label, path in zip(labels, files, strict=True))
    assert found.models[1].shift.correct == expected


def test_the_same_distribution_is_in_support(root: Path, run: Path) -> None:
    found = diagnose(root / "photos", root / "other-photos", run=run)
    assert found.outside < 0.05
    assert found.n_ref == 63
    assert found.ref == f"ID test images of '{root / 'photos'}'"
    assert found.notes[0].startswith("the reference are the run's ID test images")


def test_a_shifted_split_of_the_run_goes_by_its_name(root: Path, run: Path) -> None:
    found = diagnose(None, "night", run=run)
    assert (found.n_ref, found.n_shift, found.shift) == (63, 30, "'night'")
    stored = Artifact.load(run).report().model("float")
    assert stored is not None
    split = stored.split("ood:night")
    assert split is not None
    assert found.models[0].shift.correct == split.correct


def test_a_part_of_the_training_folder_as_reference_is_said(root: Path, run: Path) -> None:
    found = diagnose(root / "photos" / "blue", root / "dark", run=run)
    assert any(note.startswith(f"the run was trained on images in '{root / 'photos'}'") for note in found.notes)
    assert found.models[0].ref.n == 0, "files without a class folder have no label"


def test_without_a_run_there_is_the_split_alone(root: Path) -> None:
    found = diagnose(root / "photos", root / "dark")
    assert found.models == ()
    assert found.outside > 0.95
    assert found.unknown == ("crimson",)
    assert found.backbone == "edgeft_micro, bundled weights"


def test_images_of_both_folders_are_counted(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "photos" / "blue", tmp_path / "some")
    found = diagnose(root / "photos", tmp_path / "some")
    assert "70 shifted images are also in the reference" in found.notes


def test_folders_that_cannot_serve_are_refused(root: Path, tmp_path: Path, image_folder: ImageFolder) -> None:
    (tmp_path / "empty" / "blue").mkdir(parents=True)
    assert refusal(DataError, root / "photos", tmp_path / "empty") == f"the folder '{tmp_path / 'empty'}' holds no images"
    assert refusal(DataError, root / "photos", tmp_path / "none") == f"the folder '{tmp_path / 'none'}' does not exist"
    assert refusal(DataError, root / "photos", root / "photos" / ".").endswith("is the reference folder itself")
    few = image_folder("few", n=2)
    assert refusal(DataError, root / "photos", few) == "6 shifted images are too few to tell what is in support"


def test_what_must_be_given_is_asked_for(root: Path, run: Path) -> None:
    message = "features come from the run or from a backbone, and both were given"
    assert refusal(ConfigError, None, "night", run=run, backbone=ModelConfig()) == message
    assert refusal(ConfigError, None, root / "dark") == "a reference folder is needed where no run is given"
    random_net = ModelConfig(backbone="test_resnet")
    message = "backbone 'test_resnet' has no weights here: features of a random net say nothing about images"
    assert refusal(ConfigError, root / "photos", root / "dark", backbone=random_net) == message


def test_an_export_of_another_run_is_refused(root: Path, run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    manifest = copy / "export" / "onnx" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(Artifact.load(run).digest, "0" * 64))
    message = refusal(ArtifactError, root / "other-photos", root / "dark", run=copy)
    assert message == f"'{copy / 'export' / 'onnx'}' was exported from another run than '{copy}' now holds"


def test_a_run_whose_images_changed_cannot_stand_for_the_reference(root: Path, run: Path, tmp_path: Path) -> None:
    moved = root / "photos" / "blue" / "000.png"
    moved.rename(tmp_path / "000.png")
    try:
        message = refusal(DataError, None, root / "dark", run=run)
    finally:
        (tmp_path / "000.png").rename(moved)
    assert message.startswith("the run's own images cannot be used: the images of '")


def test_features_are_those_of_the_net_with_the_moments_of_its_first_convolutions() -> None:
    config = build_config(flags={"data.size": 32})
    classifier = build_classifier(config.model, config.data, 3, None, 0)
    labels = np.arange(70) % 3
    seen = look(Split("squares", "ood", Squares(labels, 1), labels), classifier, "float", None, lambda *_: None)
    assert seen.features.shape == (70, 192 + 2 * (16 + 16 + 16))
    assert seen.tops["float"].shape == (70,)
    assert len(set(seen.digests)) == 70
    assert not any(module._forward_hooks for module in classifier.modules())
    assert torch.isfinite(torch.from_numpy(seen.features)).all()


# Baselines from one run, and backbones


@pytest.fixture(scope="module")
def family(root: Path, run: Path) -> Path:
    """A run from random weights that has kept all of its six epochs."""
    config = build_config(
        flags={
            "data.source": str(root / "photos"), "data.ood": [f"night={root / 'dark-known'}"], "data.size": 32, "data.test_fraction": 0.3,
            "model.backbone": "test_resnet", "train.method": "ft", "train.epochs": 6, "train.lr": [0.001, 0.003],
            "train.keep_checkpoints": 6, "quant.recipe": "f8net-tiny", "quant.calibration_images": 8, "verify.samples": 4,
            "verify.golden": 4, "device": "cpu", "out": root / "family",
        }
    )  # fmt: skip
    train_quantize(config)
    return root / "family"


def test_a_run_keeps_epochs_of_the_rate_that_it_chose(family: Path) -> None:
    artifact = Artifact.load(family)
    states = artifact.arrays("checkpoints.safetensors")
    assert {int(key.partition(".")[0]) for key in states} == {1, 2, 3, 4, 5, 6}
    result = artifact.document("training.json")["stages"][-1]["result"]
    own = artifact.arrays("float.safetensors")
    assert {key.partition(".")[2] for key in states} == set(own)
    for name, value in own.items():
        np.testing.assert_array_equal(states[f"{result['epoch']}.{name}"], value)
    rows = {row["epoch"]: row["val_accuracy"] for row in result["history"] if row["lr"] == result["lr"]}
    val = load_dataset(Config.model_validate(artifact.manifest.config), Progress(False)).val
    for name, (top,) in answers(artifact, [val], Progress(False)).items():
        assert (top == val.labels).mean() == pytest.approx(rows[int(name.rpartition(" ")[2])])


def test_the_epochs_of_a_run_are_a_family_of_baselines(run: Path, family: Path) -> None:
    found = effective_robustness(family, [run])
    assert [point.name for point in found.line.points] == [f"{family}: epoch {epoch}" for epoch in range(1, 7)]
    assert [(point.n_id, point.n_ood) for point in found.line.points] == [(63, 30)] * 6
    assert [model.point.name for model in found.models] == [f"{run}: float", f"{run}: fixed point"]


def test_a_diagnosis_with_baselines_has_a_line_for_each_part(root: Path, run: Path, family: Path) -> None:
    found = diagnose(None, "night", run=run, baselines=family)
    assert [(part.part, part.n) for part in found.robustness] == [
        ("shifted", 30), ("in support", found.models[0].inside.n), ("out of support", found.models[0].outside.n),
    ]  # fmt: skip
    tree = found.to_json()["effective_robustness"]
    assert [part["part"] for part in tree] == ["shifted", "in support", "out of support"]
    assert "effective robustness, points [95 %]" in render(found)
    assert refusal(ConfigError, root / "photos", root / "dark", baselines=family) == "baselines were given, and no run to hold against them"
    message = refusal(DataError, None, "night", run=run, baselines=run)
    assert message == f"the run '{run}' has kept 0 epochs of its training, and a line of baselines needs 5"


def test_features_of_any_backbone_with_a_file_of_weights(
    root: Path, family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(Artifact.load(family).arrays("float.safetensors"), tmp_path / "net.safetensors")
    flags = ["--backbone", "test_resnet", "--weights", str(tmp_path / "net.safetensors"), "--json"]
    assert main(["diagnose", "--ref", str(root / "photos"), "--shift", str(root / "dark"), *flags]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["backbone"] == "test_resnet, pretrained weights"
    assert tree["out_of_support"]["share"] > 0.9
    assert main(["diagnose", "--ref", "a", "--shift", "b", "--weights", "w"]) == 2
    assert "error: --weights are those of a backbone, and none was named" in capsys.readouterr().err


# Effective robustness of runs


def test_runs_against_a_file_of_baselines(run: Path, tmp_path: Path) -> None:
    rows = "\n".join(f"b{i},{0.4 + 0.1 * i},{0.2 + 0.1 * i}" for i in range(6))
    (tmp_path / "family.csv").write_text(f"name,id,ood\n{rows}\n")
    found = effective_robustness(tmp_path / "family.csv", [run])
    assert [model.point.name for model in found.models] == [f"{run}: {model}" for model in ("float", "fixed point")]
    assert found.models[0].point.n_ood == 30
    alone = effective_robustness(tmp_path / "family.csv", [])
    assert [model.point.name for model in alone.models] == [f"b{i}" for i in range(6)]
    with pytest.raises(DataError, match="the shifted split 'sketch' was not measured in every run; those that were: 'night'"):
        effective_robustness(tmp_path / "family.csv", [run], ood="sketch")


def test_too_few_runs_make_no_line(run: Path) -> None:
    with pytest.raises(DataError, match="a line of baselines needs at least 5 models, found 1"):
        quantization_robustness([run])
