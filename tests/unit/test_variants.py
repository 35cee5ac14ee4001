"""Every method through its stages on a small dataset: what it keeps, that it resumes, and which settings contradict it."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray

from edgeft.checkpoint import read_checkpoint
from edgeft.config import build_config
from edgeft.data import ImageSource
from edgeft.data.loading import load_dataset
from edgeft.errors import ConfigError
from edgeft.feed import balanced_order
from edgeft.merging import interpolated
from edgeft.methods import METHODS, Stage
from edgeft.methods.run import run_stages
from edgeft.models import Classifier
from edgeft.pipeline import _describe
from tests.conftest import ImageFolder
from tests.tiny import DATA, PREPROCESSING, Killed, context, same, tensors

QUICK = {"train.epochs": 2, "train.lr": [0.01, 0.05], "probe.penalties": [0.1]}
SETTINGS: dict[str, dict[str, Any]] = {"surgical": {"train.layers": ["layer4", "fc"]}}
COMBINED = {"train.l2sp": 0.01, "train.ema": 0.9, "train.mixup": 0.3, "train.label_smoothing": 0.1, "train.sampler": "balanced"}


@pytest.fixture(autouse=True, scope="module")
def _quick_collection() -> Iterator[None]:
    """Each stage ends with a garbage collection, which would look through all imported modules every time."""
    gc.freeze()
    yield
    gc.unfreeze()


def classifier() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier(timm.create_model("test_resnet", num_classes=3), PREPROCESSING)


def stages(method: str, **flags: Any) -> list[Stage]:
    found: list[Stage] = METHODS.get(method).stages(build_config(flags=QUICK | SETTINGS.get(method, {}) | flags))
    return found


def trained(work: Path, method: str, data: Any = DATA, **flags: Any) -> tuple[list[dict[str, Any]], Classifier]:
    model = classifier()
    return run_stages(model, stages(method, **flags), data, context(work)), model


@pytest.mark.parametrize("method", sorted(set(METHODS.names()) - {"flyp"}))
def test_every_method_runs_and_is_read_back(method: str, tmp_path: Path) -> None:
    records, model = trained(tmp_path, method)
    again, other = trained(tmp_path, method)
    assert records == again
    assert same(tensors(model), tensors(other))
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert records[-1]["result"]["val_accuracy"] > 1 / 3
    assert all(_describe(stage) for stage in stages(method))
    for record in records:
        assert ("head_moved" in record) == (record["stage"]["solver"] != "lbfgs")
    assert all(record["head_moved"]["distance"] > 0 for record in records if record["stage"]["solver"] == "sgd")


@pytest.mark.parametrize("method", sorted(set(METHODS.names()) - {"lp", "ft"}))
def test_every_variant_names_its_paper(method: str) -> None:
    assert any(text in METHODS.entry(method).summary for text in ("et al.", "Polyak and Juditsky"))


def test_wise_lies_between_the_probe_and_lpft(tmp_path: Path) -> None:
    records, model = trained(tmp_path / "wise", "wise")
    _, probe = trained(tmp_path / "lp", "lp")
    _, tuned = trained(tmp_path / "lpft", "lpft")
    wanted = interpolated(tensors(probe), tensors(tuned), records[-1]["result"]["alpha"])
    assert same(tensors(model), wanted)
    assert records[-1]["result"]["history"][0]["val_accuracy"] == records[0]["result"]["val_accuracy"]
    assert records[-1]["result"]["history"][-1]["val_accuracy"] == records[1]["result"]["val_accuracy"]


def test_a_soup_of_a_single_rate_is_lpft(tmp_path: Path) -> None:
    _, model = trained(tmp_path / "soup", "soup", **{"train.lr": [0.05]})
    _, tuned = trained(tmp_path / "lpft", "lpft", **{"train.lr": [0.05]})
    assert same(tensors(model), tensors(tuned))


def test_the_weights_kept_of_a_rate_are_its_best_epoch(tmp_path: Path) -> None:
    records, _ = trained(tmp_path / "soup", "soup", **{"train.epochs": 3})
    rows = records[1]["result"]["history"]
    for number, lr in enumerate((0.01, 0.05)):
        saved = read_checkpoint(tmp_path / "soup" / "fine-tune" / f"rate-{number}.safetensors")
        assert saved is not None
        best = max((row for row in rows if row["lr"] == lr), key=lambda row: (row["val_correct"], row["epoch"]))
        assert saved[0] == best
        alone = stages("lpft", **{"train.lr": [lr], "train.epochs": 3})
        model = classifier()
        run_stages(model, alone, DATA, context(tmp_path / f"alone-{number}"))
        assert same(saved[1], tensors(model))


class Fatal:
    """Images of which reading the n-th kills."""

    def __init__(self, images: ImageSource, n: int) -> None:
        self._images, self._left = images, n

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> NDArray[np.uint8]:
        self._left -= 1
        if self._left == 0:
            raise Killed
        return self._images.image(index)


@pytest.mark.parametrize("method", ["wise", "soup", "ft"])
def test_a_killed_combination_resumes_to_the_same_weights(method: str, tmp_path: Path) -> None:
    flags = COMBINED | ({"train.layer_decay": 0.8} if method == "wise" else {})
    records, model = trained(tmp_path / "whole", method, **flags)
    # In the middle of the second epoch of the second rate: 50 images an epoch, and the probe reads them once and a few more.
    n = (50 + 8 if method != "ft" else 0) + 3 * 50 + 25
    with pytest.raises(Killed):
        trained(tmp_path / "cut", method, replace(DATA, train=replace(DATA.train, images=Fatal(DATA.train.images, n))), **flags)
    resumed, other = trained(tmp_path / "cut", method, **flags)
    assert resumed == records
    assert same(tensors(model), tensors(other))


def test_a_kill_in_the_last_validation_resumes_too(tmp_path: Path) -> None:
    records, model = trained(tmp_path / "whole", "wise")
    n_val = len(DATA.val)
    # Probe (and its key), four epochs, and part of the eleven places between.
    fatal = replace(DATA, val=replace(DATA.val, images=Fatal(DATA.val.images, 8 + n_val * (1 + 4 + 5) + 3)))
    with pytest.raises(Killed):
        trained(tmp_path / "cut", "wise", fatal)
    assert not (tmp_path / "cut" / "wise" / "state.safetensors").exists()
    resumed, other = trained(tmp_path / "cut", "wise")
    assert resumed == records
    assert same(tensors(model), tensors(other))


def test_defaults_of_the_methods() -> None:
    assert {name: stages(name)[-1].l2sp for name in ("ft", "l2sp", "lpft")} == {"ft": 0.0, "l2sp": 0.01, "lpft": 0.0}
    assert (stages("l2sp")[0].batch_norm, len(stages("l2sp"))) == ("train", 1)
    assert stages("freeze")[1].freeze_k == 2
    assert stages("layer-decay")[1].layer_decay == 0.75
    assert stages("ema")[1].ema == 0.999
    assert (stages("bang")[1].label_smoothing, stages("bang")[1].mixup, stages("bang")[2].solver) == (0.1, 0.2, "wise")
    assert stages("norm-tune")[1].norms_only
    assert stages("soup")[1].keep_rates
    assert all(stage.batch_norm == "frozen" for name in METHODS.names() if name not in ("ft", "l2sp", "flyp") for stage in stages(name))


def test_the_configuration_has_the_last_word() -> None:
    assert stages("l2sp", **{"train.l2sp": 0.1})[0].l2sp == 0.1
    assert stages("bang", **{"train.mixup": 0.0})[1].mixup == 0.0
    tuning = stages("wise", **COMBINED, **{"train.freeze_k": 1})[1]
    assert (tuning.l2sp, tuning.ema, tuning.mixup, tuning.label_smoothing, tuning.sampler) == (0.01, 0.9, 0.3, 0.1, "balanced")
    assert tuning.freeze_k == 1
    assert stages("freeze", **{"train.freeze_k": 0})[1].freeze_k == 0


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("lp", {"train.freeze_k": 2}, "method 'lp' fits the head alone, and train.freeze_k is about fine-tuning"),
        (
            "lp",
            {"train.ema": 0.9, "train.sampler": "balanced"},
            "method 'lp' fits the head alone, and train.ema, train.sampler is about fine-tuning",
        ),
        (
            "freeze",
            {"train.layers": ["fc"]},
            "stage 'fine-tune': freeze_k 2 and layers ('fc',) both say which layers are trained",
        ),
        (
            "norm-tune",
            {"train.freeze_k": 1},
            "stage 'fine-tune': freeze_k 1 and norms_only True both say which layers are trained",
        ),
        ("surgical", {"train.layers": []}, "method 'surgical' trains the layers in train.layers, which is empty"),
    ],
)
def test_settings_that_contradict_a_method(method: str, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stages(method, **flags)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("key", "value"),
    [("ema", 1.0), ("ema", -0.1), ("layer_decay", 0.0), ("layer_decay", 1.1), ("label_smoothing", 1.0), ("l2sp", -1.0), ("mixup", -1.0),
     ("freeze_k", -1), ("sampler", "random")],
)  # fmt: skip
def test_values_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"train.{key}"):
        build_config(flags={f"train.{key}": value})


def test_description_shows_what_is_special() -> None:
    text = _describe(stages("wise", **{"train.l2sp": 0.1, "train.ema": 0.9})[1])
    assert text == "SGD, 2 epochs at each of 0.01, 0.05; batch norm frozen; l2sp 0.1; ema 0.9"
    assert _describe(stages("lpft")[1]) == "SGD, 2 epochs at each of 0.01, 0.05; batch norm frozen"


def test_groups_of_a_csv_reach_the_sampler(image_folder: ImageFolder, tmp_path: Path) -> None:
    photos = image_folder("photos", n=12)
    files = sorted(photos.rglob("*.png"))
    rows = [f"photos/{file.relative_to(photos)},{'night' if file.stem < '003' else 'day'}" for file in files]
    (tmp_path / "groups.csv").write_text("\n".join(["file,group", *rows]))
    flags = {"data.source": str(photos), "train.sampler": "balanced", "train.groups": tmp_path / "groups.csv"}
    train = load_dataset(build_config(flags=flags)).train
    assert train.groups is not None
    assert len(np.unique(train.strata)) == 6
    drawn = train.groups[balanced_order(train.strata, seed=0)]
    assert abs(int((drawn == 0).sum()) - int((drawn == 1).sum())) <= 6, "three nights weigh as much as nine days"
    assert load_dataset(build_config(flags=flags), training=False).train.groups is None


def test_groups_need_the_balanced_sampler() -> None:
    with pytest.raises(ConfigError, match="groups are drawn by sampler balanced, and it is shuffle"):
        build_config(flags={"train.groups": "groups.csv"})
