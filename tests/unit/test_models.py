import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgeft.config import DataConfig, ModelConfig
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import ConfigError, UnsupportedError
from edgeft.models import Classifier, build_classifier
from tests.tiny import PREPROCESSING, same, tensors

SMALL = DataConfig(size=32)


def build(n_classes: int = 5, data: DataConfig = SMALL, native_size: int | None = None, seed: int = 0, **model: Any) -> Classifier:
    return build_classifier(ModelConfig(**({"backbone": "test_resnet"} | model)), data, n_classes, native_size, seed)


def bytes_of(size: int, n: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, size, size), dtype=np.uint8))


@pytest.fixture(scope="module")
def donor() -> nn.Module:
    """A backbone with its own thousand classes."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net: nn.Module = timm.create_model("test_resnet")
    return net


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def body(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


# --- the classifier ---


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_byobnet", "mobilenetv3_small_050"])
def test_features_and_head_make_the_logits(backbone: str) -> None:
    model = build(backbone=backbone)
    assert not model.training
    with torch.no_grad():
        features = model.features(bytes_of(32))
        assert features.shape == (3, model.head.in_features)
        assert torch.allclose(model.head(features), model(bytes_of(32)), atol=1e-5)
    assert model.head.out_features == 5


def test_bytes_are_normalised_by_the_record() -> None:
    model = build(data=DataConfig(size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125)))
    images = bytes_of(32)
    wanted = (images.double() / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
    assert torch.allclose(model.normalise(images).double(), wanted, atol=1e-6)
    assert torch.equal(model(images), model.net(model.normalise(images)))
    assert model.normalise(images).is_contiguous(memory_format=torch.channels_last)


def test_the_head_is_the_default_initialisation_of_the_seed() -> None:
    assert same(tensors(build(seed=1)), tensors(build(seed=1)))
    first, second = build(seed=1).head, build(seed=2).head
    assert not torch.equal(first.weight, second.weight)
    bound = 1 / first.in_features**0.5
    assert bound * 0.9 < float(first.weight.detach().abs().max()) <= bound
    state = torch.get_rng_state()
    build()
    assert torch.equal(state, torch.get_rng_state())


class ConvHead(nn.Module):
    def get_classifier(self) -> nn.Module:
        return nn.Conv2d(3, 5, 1)


class Scaled(nn.Module):
    """Does something to the scores after its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((2, 3))
        return pooled if pre_logits else 2 * self.fc(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def test_classifiers_that_a_probe_cannot_fit_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="the classifier of backbone 'ConvHead' is Conv2d; only a single Linear layer is supported"):
        Classifier(ConvHead(), PREPROCESSING)
    with pytest.raises(UnsupportedError, match="its last layer applied to its pooled features does not give its logits"):
        Classifier(Scaled(), PREPROCESSING)
    with pytest.raises(UnsupportedError, match="does not run on 32x32 images: RuntimeError"):
        build(args={"global_pool": ""})


@pytest.mark.parametrize(("backbone", "layer"), [("dla46_c", "fc"), ("repvit_m0_9", "head")])
def test_heads_that_are_linear_in_other_words_become_linear(backbone: str, layer: str, tmp_path: Path) -> None:
    """A 1x1 convolution, and the mean of two heads behind batch norms: with their weights the logits stay as they were."""
    torch.manual_seed(0)
    net = timm.create_model(backbone, num_classes=7).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    model = ModelConfig(backbone=backbone, pretrained=False, weights=tmp_path / "weights.safetensors")
    classifier = build_classifier(model, DataConfig(size=64), 7, None, seed=0)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(classifier(images), net(classifier.normalise(images)), rtol=1e-4, atol=1e-4)
    assert classifier.net.get_submodule(layer) is classifier.head
    assert build_classifier(model, DataConfig(size=64), 9, None, seed=0).head.weight.shape[0] == 9


def test_a_size_that_the_net_cannot_take_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="does not run on 40x40 images") as caught:
        build(backbone="test_vit", data=DataConfig(size=40))
    assert "data.size" in caught.value.hint


# --- backbones and arguments ---


def test_unknown_backbones_name_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        build(backbone="mobilnetv2_100")
    assert caught.value.message == "unknown backbone 'mobilnetv2_100'"
    assert "mobilenetv2_100" in caught.value.hint


def test_arguments_reach_the_constructor() -> None:
    model = build(backbone="mobilenetv2_100", args={"pad_type": "same", "bn_eps": 1e-3})
    assert {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"colour": 1}, "cannot be built with colour=1: TypeError: .*unexpected keyword argument 'colour'"),
        ({"act_layer": "reluu"}, "cannot be built with act_layer='reluu': KeyError: 'reluu'"),
        ({"num_classes": 3}, "model.args.num_classes cannot be set"),
        ({"checkpoint_path": "x.pth"}, "model.args.checkpoint_path cannot be set"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build(args=args)


# --- preprocessing ---


def test_preprocessing_follows_the_models_record() -> None:
    wanted = Preprocessing(160, 0.95, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert build(data=DataConfig()).preprocessing == wanted


def test_rendered_images_keep_their_size_uncropped() -> None:
    found = build(data=DataConfig(), native_size=48).preprocessing
    assert (found.size, found.crop_pct) == (48, 1.0)
    found = build(data=DataConfig(size=32, crop_pct=0.9), native_size=48).preprocessing
    assert (found.size, found.crop_pct) == (32, 0.9)


def test_preprocessing_can_be_overridden() -> None:
    data = DataConfig(size=64, crop_pct=0.5, interpolation="bicubic", mean=(0.0, 0.1, 0.2), std=(1.0, 2.0, 3.0))
    assert build(data=data).preprocessing == Preprocessing(64, 0.5, "bicubic", (0.0, 0.1, 0.2), (1.0, 2.0, 3.0))


# --- weights ---


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
def test_weights_are_loaded_and_a_foreign_head_replaced(tmp_path: Path, donor: nn.Module, name: str) -> None:
    model = build(weights=saved(tmp_path / name, donor.state_dict()))
    assert same(body(model.net.state_dict()), body(donor.state_dict()))
    assert torch.equal(model.head.weight, build(seed=0).head.weight)


def test_a_head_for_as_many_classes_is_kept(tmp_path: Path, donor: nn.Module) -> None:
    model = build(n_classes=1000, weights=saved(tmp_path / "w.safetensors", donor.state_dict()))
    assert same(dict(model.net.state_dict()), dict(donor.state_dict()))


def test_step_counters_and_head_may_be_missing(tmp_path: Path, donor: nn.Module) -> None:
    state = {name: value for name, value in body(donor.state_dict()).items() if not name.endswith("num_batches_tracked")}
    model = build(weights=saved(tmp_path / "w.safetensors", state))
    assert torch.equal(tensors(model)["net.conv1.0.weight"], donor.state_dict()["conv1.0.weight"])


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_training_checkpoints_are_unwrapped(tmp_path: Path, donor: nn.Module, key: str) -> None:
    torch.save({key: {f"module.{name}": value for name, value in donor.state_dict().items()}, "epoch": 3}, tmp_path / "w.pth")
    model = build(weights=tmp_path / "w.pth")
    assert same(body(model.net.state_dict()), body(donor.state_dict()))


def test_weights_that_do_not_fit_name_the_keys(tmp_path: Path, donor: nn.Module) -> None:
    state = dict(donor.state_dict())
    del state["bn1.weight"]
    state["extra"] = torch.zeros(1)
    state["conv1.0.weight"] = torch.zeros(2, 2)
    shape = list(donor.state_dict()["conv1.0.weight"].shape)
    path = saved(tmp_path / "w.safetensors", state)
    with pytest.raises(ConfigError) as caught:
        build(weights=path)
    assert caught.value.message == (
        f"the weights in '{path}' do not fit the backbone:\n  1 missing: bn1.weight\n  1 unexpected: extra\n"
        f"  1 of another shape: conv1.0.weight [2, 2] instead of {shape}"
    )


def test_weights_that_are_not_finite_are_named(tmp_path: Path, donor: nn.Module) -> None:
    state = {name: value.clone() for name, value in donor.state_dict().items()}
    state["conv1.0.weight"].view(-1)[0] = torch.nan
    path = saved(tmp_path / "w.safetensors", state)
    with pytest.raises(ConfigError, match=r"are not finite:\n  1 with NaN or infinity: conv1.0.weight"):
        build(weights=path)


def test_long_lists_of_keys_are_cut_at_ten(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", {f"odd{number:02}": torch.zeros(1) for number in range(12)})
    with pytest.raises(ConfigError) as caught:
        build(weights=path)
    text = caught.value.message
    assert f"12 unexpected: {', '.join(f'odd{number:02}' for number in range(10))} and 2 more" in text
    assert "more" in text.split("missing:")[1].splitlines()[0]


class Payload:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("should-not-exist"),)


def test_files_that_are_not_weights(tmp_path: Path, donor: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = saved(tmp_path / "whole.safetensors", donor.state_dict()).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    whole = saved(tmp_path / "whole.pth", donor.state_dict()).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "empty.pth").touch()
    torch.save({"w": torch.zeros(1), "code": Payload()}, tmp_path / "code.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Payload()))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    (tmp_path / "w.ckpt").touch()
    for name, text in {
        "absent.safetensors": "does not exist or is not a file",
        "cut.safetensors": "is not a readable safetensors file",
        "cut.pth": r"is refused: it cannot be read \(.*\); is it truncated\?",
        "text.pth": "is refused",
        "empty.pth": r"is refused: it cannot be read \(.*\); is it truncated\?",
        "code.pth": "is refused: it holds Python objects besides tensors",
        "old.pth": "is refused",
        "list.pth": "does not hold a dictionary of tensors",
        "w.ckpt": r"has the suffix '.ckpt'; allowed: .safetensors, .pth, .pt",
    }.items():
        with pytest.raises(ConfigError, match=text) as caught:
            build(weights=tmp_path / name)
        assert name in caught.value.message
        assert caught.value.message.count("\n") == 0
    assert not (tmp_path / "should-not-exist").exists()


def test_pretrained_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise OSError("no route to host")
        model: nn.Module = create(name, **kwargs)
        return model

    monkeypatch.setattr("edgeft.models.timm.create_model", offline)
    with pytest.raises(ConfigError, match="no pretrained weights for backbone 'test_resnet': OSError: no route to host") as caught:
        build(pretrained=True)
    assert "--weights FILE" in caught.value.hint


def test_the_embedded_backbone_comes_with_its_weights(tmp_path: Path) -> None:
    model = build(n_classes=20, backbone="edgeft_micro", data=DataConfig(), native_size=48)
    again = build(n_classes=20, backbone="edgeft_micro", data=DataConfig(), native_size=48, seed=1)
    assert model.preprocessing == Preprocessing(48, 1.0, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    changed = {name for name, value in tensors(model).items() if not torch.equal(value, tensors(again)[name])}
    assert changed == {"net.classifier.weight", "net.classifier.bias"}
    other = {name: value + 1 for name, value in model.net.state_dict().items() if not name.startswith("classifier")}
    given = build(n_classes=20, backbone="edgeft_micro", native_size=48, weights=saved(tmp_path / "w.safetensors", other))
    assert torch.equal(tensors(given)["net.conv_stem.weight"], other["conv_stem.weight"])
