"""Which parameters a stage trains, at which rate; and that what is left as it is does not change by a bit."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import edgeft.micro  # noqa: F401 - registers the embedded backbone
from edgeft.errors import ConfigError, UnsupportedError
from edgeft.layers import check_stages, rate_scales, trained_names, trained_only
from edgeft.methods import Stage
from edgeft.methods.run import run_stages
from edgeft.models import Classifier
from tests.tiny import DATA, PREPROCESSING, TinyNet, context, tensors

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(autouse=True, scope="module")
def _quick_collection() -> Iterator[None]:
    """Each stage ends with a garbage collection, which would look through all imported modules every time."""
    gc.freeze()
    yield
    gc.unfreeze()


def classifier(backbone: str = "test_resnet") -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # ResNets start with the last scale of a block at 0, through which nothing before it would learn in a single epoch.
        options: dict[str, Any] = {"zero_init_last": False} if backbone == "test_resnet" else {}
        return Classifier(timm.create_model(backbone, num_classes=3, **options), PREPROCESSING)


def stage(**changes: Any) -> Stage:
    settings: dict[str, Any] = {"epochs": 1, "learning_rates": (0.05,), "batch_norm": "train", "momentum": 0.9}
    return Stage("tune", "sgd", **(settings | changes))


def moved(model: Classifier, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in tensors(model).items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_frozen_layers_keep_every_bit_and_their_statistics(tmp_path: Path, batch_norm: Any) -> None:
    model = classifier()
    before = tensors(model)
    run_stages(model, [stage(freeze_k=2, batch_norm=batch_norm, weight_decay=0.1)], DATA, context(tmp_path))
    changed = moved(model, before)
    frozen = tuple(f"net.{part}" for part in ("conv1", "bn1", "layer1"))
    assert not {name for name in changed if name.startswith(frozen)}
    assert {"net.layer2.0.conv1.weight", "net.layer4.0.bn1.weight", "net.fc.weight"} <= changed
    assert {name for name in changed if name.endswith(STATISTICS)} == (
        {name for name in before if name.endswith(STATISTICS) and not name.startswith(frozen)} if batch_norm == "train" else set()
    )
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_surgery_trains_the_named_layers_alone(tmp_path: Path) -> None:
    model = classifier()
    before = tensors(model)
    run_stages(model, [stage(layers=("layer[34].0.conv?.weight", "fc"))], DATA, context(tmp_path))
    weights = {name for name in moved(model, before) if not name.endswith(STATISTICS)}
    convolutions = {f"net.layer{layer}.0.conv{number}.weight" for layer in (3, 4) for number in (1, 2, 3)} & before.keys()
    assert weights == convolutions | {"net.fc.weight", "net.fc.bias"}
    assert not {name for name in moved(model, before) if name.endswith(STATISTICS)}, "batch norms that are not trained stay in eval mode"


def test_norms_only_is_batch_norm_and_the_head(tmp_path: Path) -> None:
    model = classifier("edgeft_micro")
    before = tensors(model)
    run_stages(model, [stage(norms_only=True, batch_norm="frozen")], DATA, context(tmp_path))
    changed = moved(model, before)
    assert {"net.bn_stem.weight", "net.bn_head.bias", "net.classifier.weight"} <= changed
    assert all(before[name].ndim == 1 for name in changed - {"net.classifier.weight"})


def test_layer_decay_slows_layers_down_towards_the_input(tmp_path: Path) -> None:
    model = classifier()
    scales = rate_scales(model, stage(layer_decay=0.5))
    assert scales["net.fc.weight"] == 1.0
    assert [scales[f"net.layer{layer}.0.conv1.weight"] for layer in (4, 3, 2, 1)] == [0.5, 0.25, 0.125, 0.0625]
    assert scales["net.conv1.0.weight"] == 0.5**5
    assert scales.keys() == dict(model.named_parameters()).keys()
    assert rate_scales(model, stage()) == {}
    # Without momentum one step moves a weight by its rate times its gradient: with decay by that share of the whole rate's step.
    whole, decayed = (one_step(tmp_path / str(decay), decay) for decay in (1.0, 0.5))
    for name, scale in scales.items():
        torch.testing.assert_close(decayed[name], scale * whole[name], rtol=1e-2, atol=1e-6, msg=name)


def one_step(work: Path, decay: float) -> dict[str, torch.Tensor]:
    """How far each parameter moves in one step."""
    model = classifier()
    before = tensors(model)
    run_stages(model, [stage(momentum=0.0, batch_norm="frozen", layer_decay=decay)], DATA, context(work, batch=64))
    return {name: value.detach() - before[name] for name, value in model.named_parameters()}


@pytest.mark.parametrize("backbone", ["edgeft_micro", "test_resnet", "mobilenetv2_100"])
def test_two_coarse_layers_are_the_stem_and_the_first_stage(backbone: str) -> None:
    model = classifier(backbone)
    frozen = dict(model.named_parameters()).keys() - trained_names(model, stage(freeze_k=2))
    first = {"edgeft_micro": "blocks.0", "test_resnet": "layer1", "mobilenetv2_100": "blocks.0"}[backbone]
    stem = {"edgeft_micro": ("conv_stem", "bn_stem"), "test_resnet": ("conv1", "bn1"), "mobilenetv2_100": ("conv_stem", "bn1")}[backbone]
    assert {name.removeprefix("net.").partition(".")[0] for name in frozen} == {*stem, first.partition(".")[0]}
    assert all(name.removeprefix("net.").startswith((first, *stem)) for name in frozen)


def test_the_embedded_backbone_has_stages_and_blocks() -> None:
    model = classifier("edgeft_micro")
    coarse = dict(model.named_parameters()).keys() - trained_names(model, stage(freeze_k=3))
    assert {name.split(".")[2] for name in coarse if "blocks" in name} == {"0", "1", "2"}
    assert len(set(rate_scales(model, stage(layer_decay=0.5)).values())) == 1 + len(model.net.blocks) + 2  # type: ignore[arg-type]


def test_everything_is_trainable_again_afterwards() -> None:
    model = classifier()
    with trained_only(model, stage(layers=("fc",))):
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {"net.fc.weight", "net.fc.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_pattern_without_a_layer_names_those_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        check_stages(classifier(), [stage(layers=("fc", "blocks.*"))])
    assert caught.value.message == "train.layers: no layer of backbone 'ResNet' is called 'blocks.*'"
    names = "conv1.0, conv1.1, conv1.3, conv1.4, conv1.6, bn1, layer1.0, layer2.0, layer3.0, layer4.0, fc"
    assert caught.value.hint == f"it has {names}; or what they hold"


def test_more_frozen_layers_than_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        check_stages(classifier(), [stage(freeze_k=6)])
    message = "train.freeze_k 6: backbone 'ResNet' has 6 coarse layers, and the last one, with the head, is trained"
    assert caught.value.message == message
    assert caught.value.hint.startswith("1 ... 5; the layers begin with 1: conv1.0.weight, 2: layer1.0.conv1.weight")


@pytest.mark.parametrize("changes", [{"freeze_k": 1}, {"layer_decay": 0.5}])
def test_a_backbone_without_groups_is_refused_by_name(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifier("edgeft_micro")
    monkeypatch.delattr(type(model.net), "group_matcher")
    with pytest.raises(UnsupportedError, match="timm does not divide backbone 'EdgeftMicro' into layers"):
        check_stages(model, [stage(**changes)])


def test_a_backbone_without_batch_norm_has_no_norms_to_train() -> None:
    net = TinyNet()
    net.body = torch.nn.Sequential(net.body[0])
    model = classifier()
    model.net = net
    net.get_classifier = lambda: net.head  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="backbone 'TinyNet' has no batch norm to train"):
        check_stages(model, [stage(norms_only=True)])


def test_a_fresh_head_must_be_trained() -> None:
    with pytest.raises(ConfigError) as caught:
        check_stages(classifier(), [stage(layers=("layer4",))])
    assert caught.value.message == "stage 'tune' starts from a fresh head, 'fc', and would leave it as it is"
    probe = Stage("probe", "lbfgs", penalties=(1.0,), max_iter=1)
    check_stages(classifier(), [probe, stage(layers=("layer4",))])
