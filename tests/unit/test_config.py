"""What a configuration of the fixed-point stage may say, and what follows from a recipe."""

from pathlib import Path
from typing import Any

import pytest

from edgeft.config import Config, QuantConfig, build_config
from edgeft.errors import ConfigError
from edgeft.quant.recipes import RECIPES

TARGET = {"unlabelled": ["photos"]}


@pytest.mark.parametrize(("recipe", "epochs"), [("f8net-tiny", 0), ("f8net-finetune", 3), ("f8net-conventional", 30)])
def test_epochs_are_the_recipes_unless_given(recipe: Any, epochs: int) -> None:
    assert QuantConfig(recipe=recipe).qat_epochs == epochs
    assert QuantConfig(recipe=recipe).epochs is None
    if epochs:
        assert QuantConfig(recipe=recipe, epochs=7).qat_epochs == 7


def test_every_recipe_is_registered() -> None:
    allowed = QuantConfig.model_fields["recipe"].annotation.__args__  # type: ignore[union-attr]
    assert sorted(allowed) == RECIPES.names()


@pytest.mark.parametrize(
    ("quant", "text"),
    [
        ({"recipe": "f8net-tiny", "epochs": 2}, "recipe f8net-tiny trains nothing, but epochs is 2"),
        ({"recipe": "f8net-tiny", "loss": "distill"}, "loss distill needs epochs of QAT, and recipe f8net-tiny has none here"),
        ({"epochs": 0, "loss": "distill"}, "loss distill needs epochs of QAT"),
        ({"recipe": "f8net-conventional", "epochs": 0}, "recipe f8net-conventional trains, but epochs is 0"),
        ({"format": "pact"}, "format pact is not for recipe f8net-finetune"),
        ({"headroom": "target"}, "headroom target needs folders in quant.unlabelled"),
        (TARGET, "unlabelled images are used by loss distill and headroom target only"),
        ({"format": "pact", "headroom": "target"}, "format pact .*; headroom target"),
    ],
)
def test_contradictions_are_refused(quant: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build_config(flags={f"quant.{key}": value for key, value in quant.items()})


@pytest.mark.parametrize(
    "quant",
    [
        {"recipe": "f8net-tiny", "epochs": 0},
        {"recipe": "f8net-tiny", "headroom": "target", **TARGET},
        {"loss": "distill", **TARGET},
        {"recipe": "f8net-conventional", "format": "pact", "loss": "distill"},
        {"epochs": 0},
    ],
)
def test_what_fits_is_allowed(quant: dict[str, Any]) -> None:
    config = build_config(flags={f"quant.{key}": value for key, value in quant.items()})
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_one_rate_need_not_be_a_list() -> None:
    config = build_config(sets=["train.lr=0.001", "probe.penalties=1"])
    assert (config.train.lr, config.probe.penalties) == ((0.001,), (1.0,))
    assert build_config(sets=["train.lr=1e-3,1e-2"]).train.lr == (0.001, 0.01)


def test_one_folder_need_not_be_a_list() -> None:
    config = build_config(sets=["quant.unlabelled=photos", "quant.loss=distill", "data.ood=night=dark"])
    assert config.quant.unlabelled == (Path("photos"),)
    assert config.data.ood == ("night=dark",)
    assert build_config(sets=["quant.unlabelled=a,b", "quant.loss=distill"]).quant.unlabelled == (Path("a"), Path("b"))


def test_only_long_training_starts_from_the_deviation() -> None:
    assert QuantConfig().format == QuantConfig(recipe="f8net-tiny").format == "l4"
    assert QuantConfig(recipe="f8net-conventional").format == "std"
    assert QuantConfig(recipe="f8net-tiny", format="std").format == "std"
