from typing import Any

import pytest

from edgeft.config import build_config
from edgeft.errors import ConfigError
from edgeft.methods import METHODS, Stage


def stages(method: str, **flags: Any) -> list[Stage]:
    found: list[Stage] = METHODS.get(method).stages(build_config(flags=flags))
    return found


def test_the_methods_and_their_stages() -> None:
    names = ["bang", "ema", "flyp", "freeze", "ft", "l2sp", "layer-decay", "lp", "lpft", "norm-tune", "soup", "surgical", "wise"]
    assert METHODS.names() == names
    assert [[(stage.name, stage.solver) for stage in stages(name)] for name in ("ft", "lp", "lpft", "wise", "soup")] == [
        [("fine-tune", "sgd")],
        [("probe", "lbfgs")],
        [("probe", "lbfgs"), ("fine-tune", "sgd")],
        [("probe", "lbfgs"), ("fine-tune", "sgd"), ("wise", "wise")],
        [("probe", "lbfgs"), ("fine-tune", "sgd"), ("soup", "soup")],
    ]


def test_lpft_names_its_paper() -> None:
    assert "Kumar et al., ICLR 2022" in METHODS.entry("lpft").summary


def test_lpft_freezes_batch_norm_and_takes_a_tenth_of_the_rates() -> None:
    tuning, full = stages("lpft")[1], stages("ft")[0]
    assert (tuning.batch_norm, full.batch_norm) == ("frozen", "train")
    assert full.learning_rates == (3e-3, 1e-2, 3e-2)
    assert tuning.learning_rates == pytest.approx([rate / 10 for rate in full.learning_rates])
    assert (tuning.momentum, tuning.weight_decay, tuning.epochs) == (0.9, 0.0, 40)


@pytest.mark.parametrize("method", ["ft", "lpft"])
def test_the_configuration_wins(method: str) -> None:
    flags = {"train.lr": [0.5], "train.epochs": 2, "train.momentum": 0.0, "train.weight_decay": 0.1}
    stage = stages(method, **flags)[-1]
    assert (stage.learning_rates, stage.epochs, stage.momentum, stage.weight_decay) == ((0.5,), 2, 0.0, 0.1)


def test_epochs_depend_on_the_data_unless_given() -> None:
    assert [stages(method)[-1].epochs for method in ("ft", "lpft")] == [40, 40]
    assert [stages(method, **{"data.source": "photos"})[-1].epochs for method in ("ft", "lpft")] == [8, 8]


def test_penalties_depend_on_the_data_unless_given() -> None:
    assert stages("lp")[0].penalties == (1e-1, 1e-2)
    assert stages("lp", **{"data.source": "photos"})[0].penalties == (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    given = stages("lp", **{"probe.penalties": [0.5], "probe.max_iter": 7})[0]
    assert (given.penalties, given.max_iter) == ((0.5,), 7)


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("ft", {"train.lr": [0.1, 0.0]}, "stage 'fine-tune': learning rates (0.1, 0.0) cannot be used; allowed: at least one, all above 0"),
        (
            "lpft",
            {"train.lr": [float("nan")]},
            "stage 'fine-tune': learning rates (nan,) cannot be used; allowed: at least one, all above 0",
        ),
        ("lp", {"probe.penalties": [-1.0]}, "stage 'probe': penalties (-1.0,) cannot be used; allowed: at least one, all above 0"),
    ],
)
def test_values_that_cannot_be_trained_with(method: str, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stages(method, **flags)
    assert caught.value.message == message


def test_stage_names_are_folder_names() -> None:
    with pytest.raises(ConfigError, match=r"stage name '\.\./x'"):
        Stage("../x", "sgd", epochs=1, learning_rates=(0.1,))
    with pytest.raises(ConfigError, match="epochs 0 cannot be used; allowed: at least 1"):
        Stage("x", "sgd", epochs=0, learning_rates=(0.1,))
