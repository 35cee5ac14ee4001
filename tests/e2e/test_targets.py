"""Export to every target, verify and predict, as typed, on one tiny run; and what is refused on the way."""

import json
from pathlib import Path

import pytest

from edgeft.artifact import Artifact
from edgeft.cli import main
from edgeft.export import TARGETS
from tests.conftest import draw_folder
from tests.e2e.test_commands import train
from tests.exports import wide_net, write_run

NAMES = ("onnx", "onnx-int", "trt")
KNOWN = f"known export targets: {', '.join(TARGETS.names())}"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("targets") / "photos", n=12, size=(40, 36))


@pytest.fixture(scope="module")
def run(photos: Path) -> Path:
    """The smallest run there is."""
    out = photos.parent / "run"
    assert train(photos, out) == 0
    return out


def flags(*targets: str) -> list[str]:
    return [text for name in targets for text in ("--target", name)]


def test_one_run_to_every_target_then_verify_then_predict(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), *flags(*NAMES)]) == 0
    printed = capsys.readouterr().out
    for name in NAMES:
        assert any(line.startswith(f"{name} ") and " exact on 4/4 images, " in line for line in printed.splitlines())
        exported = Artifact.load(run / "export" / name)
        assert exported.manifest.parent == Artifact.load(run).digest
        assert exported.document("export.json")["target"] == name
        assert name in [model.model for model in exported.report().models] or name == "trt"
    assert printed.count("0 differing codes in ") == len(NAMES)

    assert main(["predict", str(run), str(photos / "red" / "000.png")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    path, label, probability, percent = line.rsplit(maxsplit=3)
    assert (path, label in ("blue", "green", "red"), percent) == (str(photos / "red" / "000.png"), True, "%")
    assert 0 < float(probability) <= 100

    code = main(["verify", str(run), "--n", "70", "--seed", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [Path(path).name for path in found["inputs"]] == list(NAMES)
    assert {each["images"] for each in found["checked"]} == {70}
    assert [(each["runner"], each["differing"], each["logits_differ"]) for each in found["checked"] if not each["exact"]] == []
    assert code == 0


def test_the_default_target_is_one(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--out", str(tmp_path), "--no-evaluate"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    assert main(["verify", str(tmp_path / "onnx"), "--n", "5"]) == 0


@pytest.mark.parametrize("verb", ["export", "verify"])
def test_unknown_targets_are_refused_before_anything_else(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", wide_net())
    assert main([verb, str(tmp_path / "run"), *flags("onnx", "tensor-rt")]) == 2
    assert capsys.readouterr().err == f"error: unknown export target 'tensor-rt'\n  {KNOWN}\n  did you mean: trt\n"
    assert not (tmp_path / "run" / "export").exists()


def test_accumulators_are_not_added_in_onnx_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_run(run, wide_net())
    assert main(["export", str(run), "--no-evaluate"]) == 2
    assert capsys.readouterr().err == (
        "error: layer 'add3' adds accumulators (residual mode wide), which ONNX Runtime computes in float\n"
        "  export it to the targets trt and onnx-int, or train with --set quant.residual=branch\n"
    )
    assert not (run / "export").exists()


def test_a_wide_run_is_exported_to_the_other_targets_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_run(run, wide_net())
    assert main(["export", str(run), "--no-evaluate", *flags("trt", "onnx-int")]) == 0
    printed = capsys.readouterr().out
    assert "converted" not in printed
    assert main(["verify", str(run), "--n", "70"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("exact: 0 of ") == len(printed.splitlines()) - 2
    assert "onnx-int" in printed
