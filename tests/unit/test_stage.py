"""What a recipe is given: learning rate, stage, loss and splits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeft.config import build_config
from edgeft.data import NO_LABEL, Split
from edgeft.objective import Distillation, Labels
from edgeft.quant.recipes import RECIPES
from edgeft.quant.stage import FALLBACK_RATE, Job, described, finetune, tiny
from edgeft.train import FitResult
from tests.tiny import DATA, TinyNet, context, split

TARGET = split("unlabelled", "train", 20, 9)
MIXED = replace(DATA, unlabelled=Split("unlabelled", "train", TARGET.images, np.full(20, NO_LABEL, dtype=np.int64)))


def job(work: Path, rate: float | None = 1e-3, data: Any = DATA, **quant: Any) -> Job:
    config = build_config(flags={f"quant.{key}": value for key, value in quant.items()})
    return Job(TinyNet(), data, context(work), config, rate)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rate", "lr", "expected"), [(1e-3, None, 1e-4), (None, None, FALLBACK_RATE), (1e-3, 5e-2, 5e-2)])
def test_learning_rate(tmp_path: Path, rate: float | None, lr: float | None, expected: float) -> None:
    found = job(tmp_path, rate, lr=lr)
    assert found.learning_rate == pytest.approx(expected)
    stage = found.stage()
    assert (stage.learning_rates, stage.epochs, stage.keep_start, stage.batch_norm) == ((found.learning_rate,), 3, True, "frozen")


def test_loss_and_splits(tmp_path: Path) -> None:
    plain = job(tmp_path, data=MIXED)
    assert isinstance(plain.objective(), Labels)
    assert plain.splits() == (DATA.train, DATA.val)
    mixed = job(tmp_path, data=MIXED, loss="distill", unlabelled=["x"])
    assert isinstance(mixed.objective(), Distillation)
    train, val = mixed.splits()
    assert (len(train), len(val)) == (len(DATA.train) + 18, len(DATA.val) + 2)
    assert (train.name, val.name) == ("train", "val")
    assert [int((part.labels == NO_LABEL).sum()) for part in (train, val)] == [18, 2]
    assert job(tmp_path, loss="distill").splits() == (DATA.train, DATA.val)


def test_recipes_are_functions_of_a_job() -> None:
    assert RECIPES.get("f8net-tiny") is tiny
    assert RECIPES.get("f8net-finetune") is finetune
    assert callable(RECIPES.get("f8net-conventional"))


def test_outcome_in_words() -> None:
    rows = [{"lr": 0.0, "epoch": 0, "val_accuracy": 0.9, "val_correct": 9}, {"lr": 0.1, "epoch": 1, "val_accuracy": 1.0, "val_correct": 10}]
    assert described(FitResult(0.1, 1, 1.0, rows), 3) == "validation 100.0%; kept epoch 1 of 3"
    assert described(FitResult(0.0, 0, 0.9, rows), 3) == "validation 90.0%; kept the calibrated weights, which no epoch beat"
    near = [row | {"val_divergence": 0.01234} for row in rows]
    assert described(FitResult(0.1, 1, 1.0, near), 3) == "validation 100.0%, divergence from float 0.0123; kept epoch 1 of 3"
