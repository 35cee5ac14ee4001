"""Suite qat: paired intervals, the int8 peer, and the whole suite on a tiny finished run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import qat
from benchmarks.__main__ import main
from benchmarks.int8_peer import calibrated_peer
from benchmarks.paired import Pair, difference, text
from benchmarks.tables import Result
from edgeft.data.loading import ImageCache
from edgeft.errors import ConfigError
from edgeft.models import build_classifier
from edgeft.pipeline import FloatModel, train_quantize
from edgeft.progress import Progress
from edgeft.quant.plan import run_float
from tests.conftest import draw_folder
from tests.nets import bytes_of, calibrated, depthwise_net, prepared, randomise, residual_net

SILENT = Progress(False)


# --- paired differences --------------------------------------------------------------------------------------------------


def test_pairs_count_what_only_one_model_has_right() -> None:
    labels, first, second = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0]), np.array([0, 0, 1, 0, 1])
    assert Pair.of(first, second, labels) == Pair(5, gained=1, lost=1)


def test_difference_is_the_mean_over_splits_and_its_interval_that_of_the_normal_approximation() -> None:
    pairs = [Pair(1000, 30, 50), Pair(500, 20, 10)]
    mean, low, high = difference(pairs)
    assert mean == pytest.approx((-2.0 + 2.0) / 2)
    shares = [(0.03, 0.05, 1000), (0.04, 0.02, 500)]
    deviation = 100 * sum((gained + lost - (gained - lost) ** 2) / n for gained, lost, n in shares) ** 0.5 / 2
    assert (low, high) == pytest.approx((-1.96 * deviation, 1.96 * deviation), abs=0.12)
    assert difference(pairs) == (mean, low, high), "repeatable"
    assert difference([Pair(10, 0, 0)]) == (0.0, 0.0, 0.0)
    assert text([Pair(100, 0, 0)]) == "+0.0 [+0.0, +0.0]"


# --- peer ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [residual_net, depthwise_net])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_peer_is_the_float_net_in_8_bits_and_trains(build: Any, per_channel: bool) -> None:
    net = calibrated(prepared(randomise(build())), rounding="nearest")
    images = torch.from_numpy(bytes_of(64))
    peer = calibrated_peer(net, images, per_channel=per_channel)
    wanted, found = run_float(net.plan, images), peer(images)
    error = float((found - wanted).detach().norm() / wanted.norm())
    assert 1e-4 < error < 0.05
    found.square().sum().backward()
    scales = {name: p.grad for name, p in peer.named_parameters() if "quantizers" in name}
    assert len(scales) == len(net.points)
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in scales.values())
    layers: list[Any] = list(peer.layers.values())
    sizes = {layer.quant_weight().scale.numel() for layer in layers if layer.weight_quant.is_quant_enabled}
    assert (max(sizes) > 1) == per_channel


# --- suite ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgeft.config import build_config

    root = tmp_path_factory.mktemp("runs")
    photos, dark = draw_folder(root / "photos", n=12, size=(40, 36)), draw_folder(root / "dark", n=5, size=(40, 36), shift=-60)
    sets = ["data.size=32", "train.epochs=1", "train.lr=[0.001]", "train.batch=8", "quant.calibration_images=8", "probe.penalties=[0.01]"]
    flags = {"data.source": str(photos), "data.ood": [f"night={dark}"], "out": root / "run", "device": "cpu", "quant.recipe": "f8net-tiny"}
    train_quantize(build_config(flags=flags, sets=[*sets, "verify.samples=8"]))
    return root / "run"


def test_suite(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--set", "quant.epochs=1", "--records", str(tmp_path / "records"), "--out", str(tmp_path / "out")]
    arguments = ["qat", f"tiny={finished}", *common]
    assert main([*arguments, "--variant", "per tensor, none", "--variant", "per channel, distill"]) == 0
    (file,) = (tmp_path / "out").iterdir()
    result, tree = Result.read(file), json.loads(file.read_text())
    assert result.suite == "qat"
    assert [row[1:4] for row in result.rows] == [
        ("float", "-", "-"), ("edgeft", "tensor", "none"), ("Brevitas int8", "tensor", "none"), ("edgeft", "channel", "distill"),
        ("Brevitas int8", "channel", "distill"),
    ]  # fmt: skip
    assert [row[8] == "-" for row in result.rows] == [True, False, True, False, True], "edgeft is compared with its peer"
    assert [row[11] for row in result.rows[:3]] == ["-", "-", "-"]
    splits = tree["measurements"][0]["splits"]
    assert set(splits) == {"id", "night"}
    assert splits["night"]["n"] == 15
    assert str(tmp_path) not in file.read_text()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()}
    assert len(made) == 4
    capsys.readouterr()
    assert main([*arguments, "--variant", "per tensor, none"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()} == made, "nothing is measured twice"


def test_float_weights_of_the_run_are_used(finished: Path) -> None:
    subject = qat.Subject.read("tiny", finished, ["quant.epochs=2"], SILENT)
    assert subject.config.quant.epochs == 2
    assert subject.rate == 0.001
    top = qat.scores(FloatModel(subject.classifier()), subject.dataset, subject.preprocessing, ImageCache(64))
    stored = subject.artifact.arrays("predictions.safetensors")
    assert all(np.array_equal(logits.argmax(1), stored[f"float/{split}"]) for split, logits in top.items())


def test_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run was given"):
        qat.run([], tmp_path, sets=[], variants=qat.VARIANTS, records=None, progress=SILENT)


def test_resnet20_is_found_by_name_and_lowers(capsys: pytest.CaptureFixture[str]) -> None:
    import benchmarks.resnet20  # noqa: F401
    from edgeft.config import build_config
    from edgeft.quant.stage import plan_of

    config = build_config(flags={"model.backbone": "resnet20_cifar10", "data.size": 32})
    classifier = build_classifier(config.model, config.data, 10, None, 0)
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 269_722
    assert len([step for step in plan_of(classifier, "u8").weighted() if not getattr(step, "fixed", False)]) == 20
    assert main(["edgeft", "list", "recipes"]) == 0
    assert "f8net-tiny" in capsys.readouterr().out
