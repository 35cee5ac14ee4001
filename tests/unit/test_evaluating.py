"""evaluate() on a finished run and its export: both models, the run's own numbers, other sets, groups, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from edgeft import evaluating
from edgeft.artifact import Artifact
from edgeft.bench.peers import float_classifier
from edgeft.config import build_config
from edgeft.errors import ArtifactError, ConfigError, DataError, UnsupportedError
from edgeft.evaluating import evaluate
from edgeft.evaluation.movement import movement
from edgeft.evaluation.rendering import render
from edgeft.exporting import export
from edgeft.interpret import Interpreter
from edgeft.pipeline import train_quantize
from tests.conftest import draw_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    photos, dark = draw_folder(root / "photos", n=12, size=(40, 36)), draw_folder(root / "dark", n=5, size=(40, 36), shift=-60)
    sets = ["data.size=32", "train.epochs=1", "train.lr=[0.001]", "train.batch=8", "quant.calibration_images=8", "probe.penalties=[0.01]"]
    flags = {"data.source": str(photos), "data.ood": [f"night={dark}"], "out": root / "run", "device": "cpu", "quant.recipe": "f8net-tiny"}
    train_quantize(build_config(flags=flags, sets=[*sets, "verify.samples=8"]))
    return root / "run"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_a_run_gives_the_numbers_of_its_own_report_for_both_models(run: Path, cache: Path) -> None:
    found = evaluate(run, corruptions=["impulse_noise", "contrast"], severities=(5, 1), cache=cache)
    report = Artifact.load(run).report()
    assert [model.model for model in found.models] == ["float", "fixed point"]
    for model in found.models:
        known = report.model(model.model)
        assert known is not None
        assert [(one.name, one.kind, one.top1.n, one.top1.correct) for one in model.sets] == [
            (split.split, split.kind, split.n, split.correct) for split in known.splits
        ]
    fixed = found.models[1]
    assert [one.against.flips.flipped for one in fixed.sets if one.against] == [split.flips for split in report.models[1].splits]
    assert found.models[0].detection[0].auroc.keys() == {"msp", "energy", "mahalanobis"}
    assert [one.filter for one in fixed.resizes] == ["bilinear", "bicubic", "nearest", "box"]
    assert "'fixed point' is computed in ONNX Runtime by an export made for this evaluation" in found.notes
    assert "set 'night': n = 15 is too small for a 95 % interval that says much (*: fewer than 30)" in found.notes
    assert "ood:night" in render(found)
    assert list(fixed.corruptions[0].severities) == [5, 1]


def test_an_export_is_measured_beside_the_float_model_of_its_run(run: Path, cache: Path, tmp_path: Path) -> None:
    export(run, ["onnx"], evaluate=False)
    with_run = evaluate(run / "export" / "onnx", cache=cache)
    assert [model.model for model in with_run.models] == ["float", "onnx"]
    of_run = evaluate(run, cache=cache)
    assert "'fixed point' is computed by the run's export 'onnx'" in of_run.notes
    assert [one.top1 for one in with_run.models[1].sets] == [one.top1 for one in of_run.models[1].sets]
    alone = evaluate(shutil.copytree(run / "export" / "onnx", tmp_path / "device" / "onnx"))
    assert [model.model for model in alone.models] == ["onnx"]
    assert alone.models[0].sets[0].against is None
    assert "the run around the export was not found: no float model to compare with" in alone.notes
    shutil.rmtree(run / "export")


def test_other_sets_masks_and_groups(run: Path, cache: Path, tmp_path: Path) -> None:
    web = draw_folder(tmp_path / "web", ("blue", "pink", "red"), n=4, size=(40, 36))
    (tmp_path / "mask.txt").write_text("blue\nred\n")
    rows = [f"web/{label}/{index:03}.png,{'day' if index < 2 else 'night'}" for label in ("blue", "red") for index in range(4)]
    (tmp_path / "groups.csv").write_text("\n".join(["file,group", *rows]))
    given = {"web": web}
    found = evaluate(run, sets=given, masks={"web": tmp_path / "mask.txt"}, groups={"web": tmp_path / "groups.csv"}, cache=cache)
    last = found.models[1].sets[-1]
    assert (last.name, last.top1.n, last.permitted_answers) == ("web", 8, 2)
    assert {name: share.n for name, share in last.groups.items()} == {"day": 4, "night": 4}
    assert [one.name for one in found.models[1].detection] == ["night", "web", "web other classes"]
    assert found.models[1].detection[-1].kind == "other classes"
    assert any(note.endswith("for detection only: 'pink'") for note in found.notes)


def test_nets_that_onnx_cannot_express_are_interpreted(run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedError("no")

    monkeypatch.setattr("edgeft.export.onnx_qdq.OnnxTarget.export", refuse)
    artifact = Artifact.load(run)
    runner, how = evaluating._fixed_point(artifact, cache)
    assert isinstance(runner, Interpreter)
    assert how == "'fixed point' is computed by the interpreter, slowly: no"


def test_what_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown corruption 'fogg'"):
        evaluate(run, corruptions=["fogg"])
    with pytest.raises(ArtifactError, match="there is no run at"):
        evaluate(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="the test set 'night' has the name of one of the run's own"):
        evaluate(run, sets={"night": tmp_path})
    with pytest.raises(ConfigError, match="mask given for the test set 'nigt', which is not measured"):
        evaluate(run, masks={"nigt": tmp_path})
    photos = run.parent / "photos"
    photos.rename(run.parent / "moved")
    try:
        with pytest.raises(DataError) as caught:
            evaluate(run)
    finally:
        (run.parent / "moved").rename(photos)
    assert caught.value.message.startswith(f"the data of '{run}' are not at hand: ")


def test_movement_of_features_and_head(run: Path) -> None:
    artifact = Artifact.load(run)
    before, after = float_classifier(artifact), float_classifier(artifact)
    images = artifact.samples()["images"]
    still = movement(before, after, images)
    assert (still.n, still.features, still.features_relative, still.head, still.head_relative) == (len(images), 0, 0, 0, 0)
    after.head.weight.data += 0.5
    after.head.bias.data -= 0.5
    moved = movement(before, after, images)
    count = after.head.weight.numel() + after.head.bias.numel()
    assert moved.head == pytest.approx(0.5 * np.sqrt(count), rel=1e-5)
    assert moved.features == 0
    first = next(parameter for parameter in after.net.parameters() if parameter.ndim == 4)
    first.data *= 1.1
    both = movement(before, after, images)
    assert 0 < both.features_relative < 1
    assert both.features > 0
