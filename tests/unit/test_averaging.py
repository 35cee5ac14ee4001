"""The moving average against its formula, through the training loop, and over a kill."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgeft.averaging import MovingAverage
from tests.tiny import STAGE, Killed, TinyNet, kill_at, same, tensors, trained

AVERAGED = replace(STAGE, ema=0.8)


def test_the_average_follows_its_formula() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average, wanted = MovingAverage(model, 0.5, {}), model.weight.detach().clone()
    for step in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.values["weight"], wanted)
    assert average.values.keys() == {"weight"}


def test_the_average_is_shown_and_taken_back() -> None:
    model = TinyNet()
    average, start = MovingAverage(model, 0.9, {}), tensors(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    own = tensors(model)
    with average.shown():
        assert same(tensors(model), start)
    assert same(tensors(model), own)


def test_without_a_decay_nothing_is_averaged(tmp_path: Path) -> None:
    average = MovingAverage(TinyNet(), 0.0, {})
    average.update(0)
    assert average.values == {}


def test_the_kept_weights_are_the_average_of_an_unaveraged_training(tmp_path: Path) -> None:
    stage = replace(AVERAGED, learning_rates=(0.1,), epochs=1)
    seen: list[dict[str, Tensor]] = []
    model = TinyNet()
    result, _ = trained(tmp_path, stage, model, on_step=lambda step, total: seen.append(tensors(model)))
    plain = TinyNet()
    trained(tmp_path / "plain", replace(stage, ema=0.0), plain)
    weights = [*seen[1:], tensors(plain)]
    for name in ("body.0.weight", "head.bias", "body.1.running_var"):
        wanted = seen[0][name]
        for step, after in enumerate(weights):
            decay = min(0.8, (1 + step) / (10 + step))
            wanted = decay * wanted + (1 - decay) * after[name]
        torch.testing.assert_close(tensors(model)[name], wanted, rtol=1e-4, atol=1e-6)
    assert result.epoch == 1


@pytest.mark.parametrize("calls", [10, 30])
def test_a_killed_average_resumes_to_the_same_weights(tmp_path: Path, calls: int) -> None:
    whole, model = trained(tmp_path / "whole", AVERAGED)
    with pytest.raises(Killed):
        trained(tmp_path / "cut", AVERAGED, on_step=kill_at(calls))
    resumed, other = trained(tmp_path / "cut", AVERAGED)
    assert resumed == whole
    assert same(tensors(model), tensors(other))
