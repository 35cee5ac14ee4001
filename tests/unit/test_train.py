import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from edgeft.checkpoint import read_checkpoint
from edgeft.config import build_config
from edgeft.data.preprocess import Augmentation
from edgeft.errors import ConfigError, TrainingError
from edgeft.feed import epoch_steps, stream_seed
from edgeft.methods import Stage
from edgeft.objective import Labels
from edgeft.progress import Progress
from edgeft.train import fit, kept_epochs, make_accelerator
from tests.conftest import ROOT
from tests.tiny import DATA, STAGE, STEPS, TinyNet, context, same, tensors, trained


@pytest.fixture(autouse=True, scope="module")
def _quick_collection() -> Iterator[None]:
    """Each stage ends with a garbage collection, which would look through all imported modules every time."""
    gc.freeze()
    yield
    gc.unfreeze()


# --- the loop against a plain one ---


def plain_loop(stage: Stage, lr: float, seeds: list[int]) -> tuple[nn.Module, list[float]]:
    """What `fit` must do at one rate, written straight from its description."""
    model = TinyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=stage.momentum, weight_decay=stage.weight_decay)
    pictures = torch.from_numpy(np.stack([DATA.train.images.image(i).transpose(2, 0, 1) for i in range(len(DATA.train))]))
    labels = torch.from_numpy(DATA.train.labels)
    losses = []
    for epoch in range(stage.epochs):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * epoch / stage.epochs)) / 2
        model.train(stage.batch_norm == "train")
        total = 0.0
        for step in epoch_steps(len(DATA.train), 8, 1, seeds[epoch]):
            loss = nn.functional.cross_entropy(model(pictures[step[0]]), labels[step[0]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(step[0])
        losses.append(total / len(DATA.train))
    return model.eval(), losses


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_fit_equals_a_plain_loop(tmp_path: Path, batch_norm: Any) -> None:
    stage = Stage("tune", "sgd", epochs=3, learning_rates=(0.05,), batch_norm=batch_norm, momentum=0.9, weight_decay=0.01)
    model = TinyNet()
    # All epochs tie on a split without a right answer, so that the last one stays in the model.
    hopeless = replace(DATA.val, labels=np.full(len(DATA.val), 99))
    result = fit(model, stage, DATA.train, hopeless, context(tmp_path))
    wanted, losses = plain_loop(stage, 0.05, [stream_seed(3, "tune", "order", epoch) for epoch in range(3)])
    assert [row["train_loss"] for row in result.history] == pytest.approx(losses, rel=1e-4)
    for name, value in tensors(wanted).items():
        assert torch.allclose(tensors(model)[name].float(), value.float(), rtol=1e-3, atol=1e-5), name


def test_learns_and_reports_the_best_epoch(tmp_path: Path) -> None:
    result, model = trained(tmp_path)
    rows = result.history
    assert [(row["lr"], row["epoch"]) for row in rows] == [(lr, epoch) for lr in (0.02, 0.1) for epoch in (1, 2, 3)]
    best = max(row["val_correct"] for row in rows)
    wanted = min((row["lr"], -row["epoch"]) for row in rows if row["val_correct"] == best)
    assert (result.lr, -result.epoch) == wanted
    assert result.val_accuracy == best / len(DATA.val) > 0.6
    assert not model.training
    pictures = torch.from_numpy(np.stack([DATA.val.images.image(i).transpose(2, 0, 1) for i in range(len(DATA.val))]))
    with torch.no_grad():
        assert int((model(pictures).argmax(1).numpy() == DATA.val.labels).sum()) == best
    assert json.loads(json.dumps(rows)) == rows


def test_ties_go_to_the_smaller_rate_and_the_later_epoch(tmp_path: Path) -> None:
    # Rates too small to change any answer: all epochs tie.
    for rates, folder in (((1e-9, 1e-8), "up"), ((1e-8, 1e-9), "down")):
        result, _ = trained(tmp_path / folder, replace(STAGE, learning_rates=rates, batch_norm="frozen"))
        assert len({row["val_correct"] for row in result.history}) == 1
        assert (result.lr, result.epoch) == (1e-9, 3)


def test_every_rate_starts_from_the_same_weights(tmp_path: Path) -> None:
    alone, first = trained(tmp_path / "alone", replace(STAGE, learning_rates=(0.1,)))
    both, second = trained(tmp_path / "both", replace(STAGE, learning_rates=(5.0, 0.1)))
    assert both.history[-3:] == alone.history
    if both.lr == 0.1:
        assert same(tensors(first), tensors(second))


def test_a_start_that_is_better_is_kept_where_asked(tmp_path: Path) -> None:
    _, model = trained(tmp_path / "first")
    start = tensors(model)
    ruin = Stage("ruin", "sgd", epochs=1, learning_rates=(0.5,), batch_norm="frozen", keep_start=True)
    result, _ = trained(tmp_path / "second", ruin, model)
    assert (result.lr, result.epoch, len(result.history)) == (0.0, 0, 2)
    assert same(start, tensors(model))


def test_the_start_wins_a_tie_against_training(tmp_path: Path) -> None:
    still = Stage("still", "sgd", epochs=2, learning_rates=(1e-9,), keep_start=True)
    result, _ = trained(tmp_path, still)
    assert (result.lr, result.epoch) == (0.0, 0)


def test_frozen_batch_norm_keeps_statistics_and_trains_the_rest(tmp_path: Path) -> None:
    model = TinyNet(dropout=0.5)
    start = tensors(model)
    trained(tmp_path, Stage("tune", "sgd", epochs=1, learning_rates=(0.05,), batch_norm="frozen"), model)
    for name, value in tensors(model).items():
        statistic = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(value, start[name]) == statistic, name


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    model = TinyNet()
    model.body.requires_grad_(False)
    start = tensors(model)
    trained(tmp_path, Stage("tune", "sgd", epochs=1, learning_rates=(0.05,)), model)
    assert torch.equal(tensors(model)["body.0.weight"], start["body.0.weight"])
    assert not torch.equal(model.head.weight, start["head.weight"])


@pytest.mark.parametrize("accumulate", [2, 3])
def test_micro_batches_give_the_same_step(tmp_path: Path, accumulate: int) -> None:
    stage = Stage("tune", "sgd", epochs=1, learning_rates=(0.05,), momentum=0.9)
    whole, first = trained(tmp_path / "whole", stage)
    parts, second = trained(tmp_path / "parts", stage, accumulate=accumulate)
    assert parts.history[0]["train_loss"] == pytest.approx(whole.history[0]["train_loss"], rel=1e-5)
    for name, value in tensors(first).items():
        assert torch.allclose(tensors(second)[name].float(), value.float(), rtol=1e-4, atol=1e-6), name


def test_mixed_images_have_the_labels_of_both(tmp_path: Path) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watching(Labels):
        def loss(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
            seen.append((images, labels))
            return super().loss(images, logits, labels)

    stage = Stage("tune", "sgd", epochs=1, learning_rates=(0.05,), mixup=1.0)
    fit(TinyNet(), stage, DATA.train, DATA.val, context(tmp_path), objective=Watching())
    pictures = torch.from_numpy(np.stack([DATA.train.images.image(i).transpose(2, 0, 1) for i in range(len(DATA.train))])).float()
    assert len(seen) == 2 * 7, "two labels for each of seven steps"
    n_mixed = 0
    for (images, first), (same_images, second) in zip(seen[::2], seen[1::2], strict=True):
        assert images is same_images
        for mixed, left, right in zip(images, first, second, strict=True):
            # The share of the first image is the one number that explains all pixels, whatever the pair.
            pairs = [
                (a, b) for a in pictures[DATA.train.labels == int(left)] for b in pictures[DATA.train.labels == int(right)]
                if _explains(mixed, a, b)
            ]  # fmt: skip
            assert pairs
            n_mixed += not any(torch.equal(mixed, a) for a in pictures)
    assert n_mixed > 25


def _explains(mixed: Tensor, a: Tensor, b: Tensor) -> bool:
    difference = (a - b).flatten()
    if not bool(difference.any()):
        return torch.allclose(mixed, a, atol=1e-3)
    share = float((mixed - b).flatten() @ difference / (difference @ difference))
    return -1e-3 <= share <= 1 + 1e-3 and torch.allclose(mixed, share * a + (1 - share) * b, atol=1e-2)


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_order_and_dropout_ignore_the_global_generators(tmp_path: Path, augment: Augmentation) -> None:
    results = []
    for number in range(2):
        torch.manual_seed(number)
        np.random.seed(number)
        model = TinyNet(dropout=0.5)
        trained(tmp_path / str(number), model=model, augment=augment)
        results.append(tensors(model))
        assert torch.initial_seed() == number
    assert same(*results)
    _, other = trained(tmp_path / "seed", model=TinyNet(dropout=0.5), seed=4)
    assert not same(results[0], tensors(other))


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path) -> None:
    results = [trained(tmp_path / str(workers), workers=workers, augment="crop-flip") for workers in (0, 2)]
    assert results[0][0] == results[1][0]
    assert same(tensors(results[0][1]), tensors(results[1][1]))


def test_on_step_counts_the_steps_of_each_rate(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    trained(tmp_path, on_step=lambda step, total: calls.append((step, total)))
    assert calls == [(step, STEPS) for _ in range(2) for step in range(STEPS)]


def test_bf16_autocast_leaves_float32_weights_and_the_model_unpatched(tmp_path: Path) -> None:
    model = TinyNet()
    place = context(tmp_path)
    place.accelerator = make_accelerator(build_config(flags={"device": "cpu", "train.precision": "bf16"}))
    fit(model, Stage("tune", "sgd", epochs=1, learning_rates=(0.05,)), DATA.train, DATA.val, place)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert "forward" not in vars(model)


def test_settings_of_cudnn_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, seen = torch.backends.cudnn, set()
    for name, value in (("allow_tf32", False), ("benchmark", True), ("deterministic", False)):
        monkeypatch.setattr(cudnn, name, value)
    trained(tmp_path, on_step=lambda *_: seen.add((cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic)))
    assert seen == {(False, False, True)}, "the same convolution at every step, in the arithmetic that the caller allows"
    assert (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic) == (False, True, False)


def test_precision_and_device_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device 'cuda' is not available"):
        make_accelerator(build_config(flags={"device": "cuda"}))
    with pytest.raises(ConfigError, match="'fp16' needs a GPU"):
        make_accelerator(build_config(flags={"train.precision": "fp16"}))


# --- losses that are not finite ---


class Exploding(TinyNet):
    """Gives scores that are not a number from a given training step on where the weights have moved far."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits + (logits.new_tensor(float("nan")) if float(self.head.weight.detach().abs().max()) > 1e3 else 0.0)


def test_the_only_rate_diverging_is_an_error_at_once(tmp_path: Path) -> None:
    start = tensors(Exploding())
    model = Exploding()
    with pytest.raises(TrainingError) as caught:
        trained(tmp_path, replace(STAGE, learning_rates=(1e6,)), model)
    kept = tmp_path / "tune" / "start.safetensors"
    assert caught.value.message == (
        f"tune: the loss is not finite at step 2 of {STEPS} with learning rate 1e+06; the last good checkpoint is kept in '{kept}'"
    )
    assert kept.exists()
    assert same(start, tensors(model))


def test_a_diverging_rate_leaves_the_others_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = context(tmp_path)
    place.progress = Progress()
    result = fit(Exploding(), replace(STAGE, learning_rates=(1e6, 0.02)), DATA.train, DATA.val, place)
    assert result.lr == 0.02
    assert result.history[0] == {"lr": 1e6, "epoch": 1, "non_finite_step": 2}
    text = f"tune: the loss is not finite at step 2 of {STEPS} with learning rate 1e+06; going on with the other rates"
    assert text in capsys.readouterr().err
    alone, _ = trained(tmp_path / "alone", replace(STAGE, learning_rates=(0.02,)))
    assert alone.history == result.history[1:]


def test_all_rates_diverging_is_an_error_also_when_resumed(tmp_path: Path) -> None:
    stage = replace(STAGE, learning_rates=(1e6, 2e6))
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"any learning rate \(step 2 with 1e\+06, step 2 with 2e\+06\); the last good"):
            trained(tmp_path, stage, Exploding())


def test_a_last_good_epoch_is_kept_and_named(tmp_path: Path) -> None:
    class Late(TinyNet):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * (float("nan") if self.training and next(passes) >= 10 else 1.0)

    passes = iter(range(100))
    with pytest.raises(TrainingError, match=rf"at step 11 of {STEPS} .* is kept in '.*state\.safetensors'"):
        trained(tmp_path, replace(STAGE, learning_rates=(0.02,)), Late())
    note, found = read_checkpoint(tmp_path / "tune" / "state.safetensors") or ({}, {})
    assert note["epoch"] == 1
    assert all(bool(torch.isfinite(value).all()) for value in found.values())


def test_scores_that_break_in_validation_count_as_divergence(tmp_path: Path) -> None:
    class Broken(TinyNet):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * (1.0 if self.training else float("inf"))

    with pytest.raises(TrainingError, match=f"not finite at step 7 of {STEPS}"):
        trained(tmp_path, replace(STAGE, learning_rates=(0.02,)), Broken())


# --- several processes ---

WORKER = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from edgeft.data.preprocess import Preprocessing
from edgeft.methods import Stage
from tests.tiny import TinyNet, context, dataset, tensors
from edgeft.config import build_config
from edgeft.train import fit, make_accelerator
data, place, model = dataset(), context(Path(sys.argv[1])), TinyNet()
result = fit(model, Stage("tune", "sgd", epochs=2, learning_rates=(0.02, 0.05), momentum=0.9), data.train, data.val, place)
rank = place.accelerator.process_index
save_file({name: value.contiguous() for name, value in tensors(model).items()}, Path(sys.argv[1]) / f"{rank}.safetensors")
(Path(sys.argv[1]) / f"{rank}.txt").write_text(repr([row["val_correct"] for row in result.history]))
again = make_accelerator(build_config(flags={"device": "cpu", "train.precision": "bf16"}))
assert (again.num_processes, again.mixed_precision, place.accelerator.process_index) == (2, "bf16", rank)
place.accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    # `accelerate launch` starts several processes on GPUs only; on a CPU it is torchrun (or mpirun) that sets the same variables.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    stage = Stage("tune", "sgd", epochs=2, learning_rates=(0.02, 0.05), momentum=0.9)
    result, model = trained(tmp_path / "one", stage)
    counts = repr([row["val_correct"] for row in result.history])
    found = []
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text() == counts
        with safe_open(tmp_path / f"{rank}.safetensors", framework="pt") as file:
            found.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert same(*found)
    for name, value in tensors(model).items():
        assert torch.allclose(found[0][name].float(), value.float(), rtol=1e-3, atol=1e-5), name


def test_kept_epochs_are_evenly_spaced_and_end_with_the_last() -> None:
    assert kept_epochs(12, 4) == [3, 6, 9, 12]
    assert kept_epochs(10, 3) == [4, 7, 10]
    assert kept_epochs(3, 8) == [1, 2, 3]
    assert kept_epochs(5, 0) == []
