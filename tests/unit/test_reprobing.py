"""A run for another target from a few images: only the head's integers change, and what cannot be done is said."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from edgeft.artifact import Artifact
from edgeft.config import build_config
from edgeft.errors import ArtifactError, DataError
from edgeft.exporting import export
from edgeft.graph import Linear
from edgeft.pipeline import train_quantize
from edgeft.reprobing import DOCUMENT, reprobe
from tests.conftest import draw_folder

SETS = [
    "data.size=32", "train.method=lp", "probe.penalties=[0.01]", "quant.recipe=f8net-tiny", "quant.calibration_images=8",
    "quant.rounding=nearest", "quant.fit_ranges=false", "verify.samples=4", "verify.golden=4", "train.batch=8", "device=cpu",
]  # fmt: skip
NAMES = {"blue": "green", "green": "red", "red": "blue"}
"""The target calls every colour by another name."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reprobing")
    photos, dark = draw_folder(folder / "photos", n=20), draw_folder(folder / "dark", n=3, shift=-40)
    flags = {"data.source": str(photos), "data.ood": [f"dark={dark}"], "out": str(folder / "run")}
    return train_quantize(build_config(flags=flags, sets=SETS)).path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A few images of each class, under other names."""
    drawn = draw_folder(tmp_path / "drawn", n=8)
    for name, other in NAMES.items():
        shutil.copytree(drawn / name, tmp_path / "target" / other)
    return tmp_path / "target"


def test_only_the_head_changes(run: Path, target: Path, tmp_path: Path) -> None:
    before = Artifact.load(run)
    found = reprobe(run, target, tmp_path / "out")
    after = Artifact.load(tmp_path / "out")
    assert (after.manifest.kind, after.manifest.parent, after.digest) == ("quantized", before.digest, found.artifact.digest)
    assert after.manifest.files.keys() == before.manifest.files.keys() | {DOCUMENT}
    assert (after.manifest.classes, after.manifest.preprocessing) == (before.manifest.classes, before.manifest.preprocessing)
    old, new = before.graph(), after.graph()
    head = old.ops[-1]
    assert isinstance(head, Linear)
    assert old.ops[:-1] == new.ops[:-1]
    changed = {name for name in old.constants if not np.array_equal(old.constants[name], new.constants[name])}
    assert changed == {head.weight, head.bias}
    assert {name for name in old.tensors if old.tensors[name] != new.tensors[name]} <= {head.output}
    assert np.array_equal(before.samples()["images"], after.samples()["images"])
    kept = ("float.safetensors", "training.json", "saturation.json")
    assert [before.manifest.files[name] for name in kept] == [after.manifest.files[name] for name in kept]
    layers = {name: row for name, row in after.formats()["layers"].items() if name != head.output}
    assert layers == {name: row for name, row in before.formats()["layers"].items() if name != head.output}
    assert after.formats()["layers"][head.output]["output"] == "logits"


def test_the_target_is_learned_and_the_run_measured_again(run: Path, target: Path, tmp_path: Path) -> None:
    found = reprobe(run, target, tmp_path / "out")
    record = found.record
    assert (record["images"], record["images_per_class"]) == (24, [8, 8, 8])
    assert record["correct_after"] > record["correct_before"] + 6
    losses = {each["directions"]: each["log_loss"] for each in reversed(record["candidates"])}
    assert losses["head"] < 0.7 * losses["none"]
    report = found.artifact.report()
    assert [model.model for model in report.models] == ["float", "fixed point"]
    assert report.models[0] == Artifact.load(run).report().models[0]
    fixed = report.model("fixed point")
    assert fixed is not None
    assert [split.label for split in fixed.splits] == ["id", "ood:dark"]
    before = Artifact.load(run).report().model("fixed point")
    assert before is not None
    assert fixed.splits[0].correct < before.splits[0].correct, "the source calls the classes by other names"
    text = "\n".join(found.lines())
    assert "head       changed along the 2 directions of the old head, penalty" in text
    assert f"right on the images it was fitted to: {record['correct_before']} -> {record['correct_after']}" in text
    (result,) = export(tmp_path / "out", ["onnx"])
    assert "0 differing codes" in "\n".join(result.lines)


def test_images_that_the_head_knows_are_kept_apart(run: Path, tmp_path: Path) -> None:
    config = Artifact.load(run).manifest.config
    dark = Path(config["data"]["ood"][0].partition("=")[2])
    found = reprobe(run, dark, tmp_path / "out")
    assert found.notes[-1].startswith(f"shifted test set 'dark={dark}' holds images that the head was fitted to")


def test_without_the_runs_data_it_is_not_measured(run: Path, target: Path, tmp_path: Path) -> None:
    photos = Path(Artifact.load(run).manifest.config["data"]["source"])
    photos.rename(photos.with_name("elsewhere"))
    try:
        found = reprobe(run, target, tmp_path / "out")
    finally:
        photos.with_name("elsewhere").rename(photos)
    assert found.notes[-1].startswith("not measured again: ")
    assert [model.model for model in found.artifact.report().models] == ["float"]
    (result,) = export(tmp_path / "out", ["onnx"])
    assert "0 differing codes" in "\n".join(result.lines)


def test_the_default_place_is_beside_the_run_and_must_be_free(run: Path, target: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "mine"
    shutil.copytree(run, copy)
    assert reprobe(copy, target).artifact.path == tmp_path / "runs" / "mine-reprobed"
    with pytest.raises(ArtifactError, match="mine-reprobed' exists and is not an empty folder"):
        reprobe(copy, target)


def test_classes_must_be_those_of_the_run(run: Path, target: Path, tmp_path: Path) -> None:
    (target / "red").rename(target / "pink")
    with pytest.raises(DataError) as caught:
        reprobe(run, target, tmp_path / "out")
    assert caught.value.message == f"the classes in '{target}' are not those of the run; missing: 'red'; unknown: 'pink'"
    assert caught.value.hint == "the run has 'blue', 'green', 'red'"
    (target / "pink").rename(target / "red")
    for file in (target / "red").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="no images of 'red' in"):
        reprobe(run, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_has_no_head_to_fit(run: Path, target: Path, tmp_path: Path) -> None:
    export(run, ["onnx"], tmp_path / "export", evaluate=False)
    with pytest.raises(ArtifactError, match="is an artifact of kind 'exported'; only a quantized run"):
        reprobe(tmp_path / "export" / "onnx", target, tmp_path / "out")
