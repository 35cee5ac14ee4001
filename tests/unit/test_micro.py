"""The bundled backbone: size, registration with timm, weights, and what tracing needs."""

from importlib.resources import as_file

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from timm.data.config import resolve_model_data_config
from torch import Tensor, fx, nn

from edgeft.data.shapes import GENERATOR_VERSION, PRETRAINING_CLASSES, load, pretraining_stream
from edgeft.micro import EdgeftMicro, load_pretrained_weights, weights_path
from edgeft.micro.pretrain import BATCH, bundled_tensors, digest, pretrain


def images(n: int = 4) -> Tensor:
    """Normalised random images, [n, 3, 48, 48]."""
    return torch.rand(n, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def created(num_classes: int = 20, pretrained: bool = False) -> EdgeftMicro:
    """The backbone as timm makes it, in evaluation mode."""
    model = timm.create_model("edgeft_micro", pretrained, num_classes=num_classes)
    assert isinstance(model, EdgeftMicro)
    return model.eval()


def loaded(num_classes: int = 20) -> EdgeftMicro:
    """The backbone with the bundled weights and a random head, in evaluation mode."""
    model = created(num_classes)
    load_pretrained_weights(model)
    return model


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts() -> None:
    assert parameter_count(created(0)) == 100_448
    assert parameter_count(timm.create_model("edgeft_micro")) == 119_748  # with the 100 pretraining classes


def test_timm_knows_its_preprocessing() -> None:
    config = resolve_model_data_config(created())
    assert config["input_size"] == (3, 48, 48)
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)
    assert config["crop_pct"] == 1.0
    assert config["interpolation"] == "bicubic"


def test_head_interface() -> None:
    model = created(7)
    maps = model.forward_features(images())
    assert maps.shape == (4, model.num_features, 6, 6)
    assert model.forward_head(maps, pre_logits=True).shape == (4, 192)
    torch.testing.assert_close(model.get_classifier()(model.forward_head(maps, pre_logits=True)), model(images()))
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model(images()).shape == (4, 3)
    model.reset_classifier(0)
    assert model(images()).shape == (4, 192)


def test_pretrained_cfg_names_real_layers() -> None:
    model = created()
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()


def test_bundled_weights_change_the_logits_and_leave_the_head() -> None:
    model = created()
    before, head = model(images()), model.state_dict()["classifier.weight"].clone()
    load_pretrained_weights(model)
    assert not torch.allclose(before, model(images()))
    torch.testing.assert_close(model.state_dict()["classifier.weight"], head)
    assert all(value.dtype in (torch.float32, torch.int64) for value in model.state_dict().values())


def test_pretrained_flag_of_timm_is_the_same_weights() -> None:
    ours, timms = loaded(0), created(0, pretrained=True)
    torch.testing.assert_close(ours(images()), timms(images()))


def test_bundled_file_is_small_and_says_how_it_was_made() -> None:
    with as_file(weights_path()) as path:
        assert path.stat().st_size <= 2_000_000
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    assert metadata["generator_version"] == str(GENERATOR_VERSION)
    assert metadata["sha256"] == digest(tensors)
    assert float(metadata["streaming_accuracy"]) > 0.93
    assert not any(name.startswith("classifier.") for name in tensors)


def test_writing_the_bundled_tensors_again_changes_nothing() -> None:
    tensors = bundled_tensors(loaded())
    with as_file(weights_path()) as path, safe_open(path, "pt") as stored:
        assert stored.metadata()["sha256"] == digest(tensors)


def test_fx_traces_it_to_plain_layers() -> None:
    model = loaded()
    traced = fx.symbolic_trace(model)
    torch.testing.assert_close(traced(images()), model(images()))
    modules = dict(traced.named_modules())
    kinds = {type(modules[str(node.target)]) for node in traced.graph.nodes if node.op == "call_module"}
    assert kinds == {nn.Conv2d, nn.BatchNorm2d, nn.ReLU6, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear}
    assert {node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"} == {"add"}
    assert not [node for node in traced.graph.nodes if node.op in ("call_method", "get_attr")]


def test_bundled_features_separate_unseen_classes() -> None:
    """Nearest class mean in feature space on 20 new classes: far above the 5 % of chance, and above random weights."""
    dataset = load(0)
    scores = {}
    for name, model in (("bundled", loaded(0)), ("random", created(0))):
        with torch.no_grad():
            train, test = (
                model(torch.from_numpy(np.stack([split.images.image(i) for i in range(n)])).permute(0, 3, 1, 2) / 127.5 - 1)
                for split, n in ((dataset.train, 100), (dataset.ood[0], 400))
            )
        labels = torch.from_numpy(dataset.train.labels)
        means = torch.stack([train[labels == c].mean(0) for c in range(20)])
        guess = torch.cdist(test, means).argmin(1).numpy()
        scores[name] = float((guess == dataset.ood[0].labels[:400]).mean())
    assert scores["bundled"] > 0.5
    assert scores["bundled"] > scores["random"] + 0.3


@pytest.mark.slow
def test_pretraining_leaves_chance_within_800_steps() -> None:
    model, accuracy = pretrain(800, seed=1)
    assert accuracy > 0.2  # chance is 1 %; the mean over the last 200 steps, still rising
    (batch, labels), *_ = pretraining_stream(2, BATCH, 1)
    guess = model(torch.from_numpy(batch).permute(0, 3, 1, 2) / 127.5 - 1).argmax(1).numpy()
    assert (guess == labels).mean() > 0.2
    assert isinstance(model, EdgeftMicro)
    assert model.num_classes == PRETRAINING_CLASSES
