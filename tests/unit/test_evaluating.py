"""evaluate() on a finished run and its export: both models, the run's own numbers, other sets, groups, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeft import evaluating
from edgeft.artifact import Artifact
from edgeft.bench.peers import float_classifier
from edgeft.cli import main
from edgeft.config import Config, build_config
from edgeft.data.loading import load_dataset, subset
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import ArtifactError, ConfigError, DataError, UnsupportedError
from edgeft.evaluating import evaluate
from edgeft.evaluation.counting import count_shares
from edgeft.evaluation.movement import Moved, moved_features, moved_head
from edgeft.evaluation.rendering import render
from edgeft.evaluation.saturating import Saturation, Shares
from edgeft.exporting import export
from edgeft.interpret import Interpreter
from edgeft.models import Classifier, build_classifier
from edgeft.pipeline import train_quantize
from edgeft.progress import Progress
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


def test_movement_and_saturation_are_in_the_report(run: Path, cache: Path, tmp_path: Path) -> None:
    found = evaluate(run, sets={"web": draw_folder(tmp_path / "web", n=4, size=(40, 36), shift=90)}, cache=cache)
    assert found.movement is not None
    assert [(one.name, one.kind, one.n) for one in found.movement.sets] == [("id", "id", 6), ("night", "ood", 15), ("web", "ood", 12)]
    artifact = Artifact.load(run)
    config = Config.model_validate(artifact.manifest.config)
    after = float_classifier(artifact)
    start = Classifier(build_classifier(config.model, config.data, 3, 32, 0).net, after.preprocessing).eval()
    dataset = load_dataset(config, Progress(False))
    images = torch.from_numpy(subset([dataset.id_test], after.preprocessing, 6, 0))
    with torch.inference_mode():
        old, new = start.features(images), after.features(images)
    assert found.movement.sets[0].moved.distance == pytest.approx(float((new - old).norm(dim=1).mean()), rel=1e-4)
    assert found.movement.sets[0].moved.distance > 0
    assert found.movement.head == Moved(**artifact.document("training.json")["stages"][-1]["head_moved"])
    assert found.saturation is not None
    assert found.saturation.images == {"id": 6, "ood:night": 8, "ood:web": 12}
    known = artifact.document("saturation.json")["tensors"]
    assert [one.name for one in found.saturation.activations] == list(known)
    assert all("ood:web" in one.sets for one in found.saturation.activations)
    tree = json.loads(json.dumps(found.to_json()))
    assert tree["saturation"]["activations"][0]["sets"]["id"].keys() == {"saturated", "underflow"}
    assert tree["movement"]["sets"][1]["moved"].keys() == {"distance", "relative"}
    for part in ("Movement by fine-tuning", "features, ood:web", "head, since fine-tuning began", "Saturation of the fixed-point"):
        assert part in render(found)


def test_the_interpreter_counts_what_the_run_wrote_down(run: Path) -> None:
    artifact = Artifact.load(run)
    config, p = Config.model_validate(artifact.manifest.config), Preprocessing.from_json(artifact.manifest.preprocessing)
    night = load_dataset(config, Progress(False)).ood[0]
    counted = count_shares(artifact.graph(), subset([night], p, config.verify.samples, config.seed))
    for one in Saturation.of_run(artifact.document("saturation.json")).activations:
        assert counted[one.name] == pytest.approx(one.sets["ood:night"])


def test_without_the_pretrained_weights_movement_is_not_measured(run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ConfigError("cannot read the weights 'w.safetensors'")

    monkeypatch.setattr(evaluating, "build_classifier", missing)
    found = evaluate(run, cache=cache)
    assert found.movement is None
    assert "movement by fine-tuning not measured: cannot read the weights 'w.safetensors'" in found.notes
    assert "Movement by fine-tuning" not in render(found)


def test_movement_by_hand() -> None:
    before = np.array([[3, 4], [0, 2]], np.float32)
    assert moved_features(before, before) == Moved(0.0, 0.0)
    found = moved_features(before, before + np.array([[0, 1], [3, 0]], np.float32))
    assert (found.distance, found.relative) == pytest.approx((2.0, (1 / 5 + 3 / 2) / 2))
    assert moved_head(np.array([1.0, 0.0]), np.array([1.0, 0.5])) == Moved(0.5, 0.5)


def test_saturation_ranks_by_what_is_new_out_of_distribution() -> None:
    def entry(inside: float, outside: float, clip: bool = False) -> dict[str, object]:
        splits = {label: {"top": share, "bottom": 0.0, "underflow": 0.0} for label, share in (("id", inside), ("ood:a", outside))}
        return {"format": "u8.6", "clip": clip, "splits": splits}

    tensors = {"same": entry(0.2, 0.2), "more": entry(0.1, 0.3), "new": entry(0.0, 0.1), "relu6": entry(0.0, 0.9, clip=True)}
    found = Saturation.of_run({"images": {"id": 5, "ood:a": 5}, "tensors": tensors})
    assert [one.name for one in found.most_beyond(5)] == ["more", "new"]
    assert [one.name for one in found.most_beyond(1)] == ["more"]
    assert found.mean("ood:a") == pytest.approx(0.2)
    wider = found.with_set("ood:b", 3, {"more": Shares(0.9, 0.0)})
    assert wider.activations[1].worst == "ood:b"
    assert wider.activations[1].excess == pytest.approx(0.8)
    assert wider.mean("ood:b") == 0.9


def test_the_verb_takes_workers(run: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(run, cache=cache)
    flags = ["--corruptions", "fog", "--severity", "2", "--cache", str(cache), "--json"]
    assert main(["evaluate", str(run), *flags, "--workers", "1"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["speed"]["workers"] == 1
    assert tree["speed"]["views"] == 2 * 6, "the rest is known"
    assert main(["evaluate", str(run), *flags]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again.pop("speed") == {"views": 0, "seconds": pytest.approx(0, abs=60), "workers": 0, "views_per_s": 0.0}
    tree.pop("speed")
    assert again == tree
