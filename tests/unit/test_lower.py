import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import edgeft.micro
from edgeft.bounds import FLOAT32_EXACT
from edgeft.errors import UnsupportedError, VerificationError
from edgeft.export.onnx_qdq import build_model, check_fusion
from edgeft.export.ort_runner import OnnxRunner, fusion
from edgeft.export.verify import compare, verify
from edgeft.fixedpoint import requantize
from edgeft.graph import Add, Conv, IntegerGraph, Linear, MaxPool
from edgeft.interpret import Interpreter
from edgeft.quant.lower import enforce_bounds, format_table, integers, lower
from edgeft.quant.net import FixedPointNet
from edgeft.quant.plan import LinearStep
from edgeft.quant.rescale import IMAGE_NORM
from edgeft.quant.training_graph import TrainingGraph
from tests.nets import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIZE,
    bytes_of,
    calibrated,
    depthwise_net,
    head,
    mixed_net,
    prepared,
    randomise,
    residual_net,
)

assert edgeft.micro.STEM_WIDTH  # importing registers the backbone

FORMATS = [(rule, granularity) for rule in ("std", "grid", "minmax") for granularity in ("tensor", "channel")]
NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": residual_net,
    "depthwise": depthwise_net,
    "mixed": mixed_net,
    "depthwise-relu": lambda: depthwise_net(nn.ReLU),
    "same-padding": lambda: timm.create_model("mobilenetv2_100", num_classes=5, pad_type="same"),
    "resnet18": lambda: timm.create_model("resnet18", num_classes=5),
}


def lowered(
    net: nn.Module, profile: str = "u8", size: int = SIZE, image: Any = (HALF, HALF), **quant: Any
) -> tuple[FixedPointNet, IntegerGraph]:
    fixed = calibrated(prepared(randomise(net), profile, size, *image), profile=profile, **quant)
    enforce_bounds(fixed)
    return fixed, lower(fixed)


@pytest.mark.parametrize(("rule", "granularity"), FORMATS)
@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("name", ["residual", "depthwise", "mixed"])
def test_training_graph_is_the_interpreter_on_every_tensor(name: str, profile: str, rule: str, granularity: str) -> None:
    net, _ = lowered(NETS[name](), profile, format=rule, granularity=granularity)
    net.set_fracs({point.name: net.frac(point.name) + 1 for point in net.points})  # a bit too fine: some values saturate
    graph, images = lower(net), bytes_of(10)
    reference = Interpreter(graph).layers(images)
    assert list(reference) == list(TrainingGraph(net).layers(images))
    assert verify(Interpreter(graph), TrainingGraph(net), images) == len(images)
    used = [int(np.unique(codes).size) for codes in reference.values()]
    assert min(used) > 7, "a tensor that is constant proves nothing"
    ends = [(reference[op.output] == graph.format(op.output).max_code).any() for op in graph.ops[:-1]]
    assert any(ends), "saturation must have been seen"


@pytest.mark.parametrize("image", [((0.0,) * 3, (1.0,) * 3), (IMAGENET_MEAN, IMAGENET_STD)], ids=["raw", "image-norm"])
@pytest.mark.parametrize("profile", ["u8", "s8"])
def test_image_forms(profile: str, image: Any) -> None:
    net, graph = lowered(residual_net(), profile, image=image)
    assert str(graph.format("image")) == ("u8.8" if profile == "u8" else "s8.7")
    assert (IMAGE_NORM in graph.tensors) == (image[0] != (0.0,) * 3 or profile == "s8"), "s8 has no unsigned tensor, the image included"
    assert verify(Interpreter(graph), TrainingGraph(net), bytes_of(6)) == 6


@pytest.mark.parametrize("name", ["same-padding", "resnet18"])
def test_timm_networks(name: str) -> None:
    net, graph = lowered(
        NETS[name](), size=32, image=(IMAGENET_MEAN, IMAGENET_STD) if name == "resnet18" else (HALF, HALF), rounding="nearest"
    )
    asymmetric = [op for op in graph.ops if isinstance(op, Conv | MaxPool) and op.padding[:2] != op.padding[2:]]
    assert bool(asymmetric) == (name == "same-padding")
    assert verify(Interpreter(graph), TrainingGraph(net), bytes_of(4, 32)) == 4


def test_embedded_backbone_and_its_accuracy_of_computation() -> None:
    model = timm.create_model("edgeft_micro", pretrained=True, num_classes=5)
    nn.init.normal_(model.get_parameter("classifier.weight"), std=0.1, generator=torch.Generator().manual_seed(0))
    net = calibrated(prepared(model, size=48))
    enforce_bounds(net)
    graph, images = lower(net), bytes_of(8, 48)
    assert verify(Interpreter(graph), TrainingGraph(net), images) == 8
    with torch.no_grad():
        wanted = model.eval()(torch.from_numpy(images).float() / 127.5 - 1).numpy()
    error = Interpreter(graph).logits(images) - wanted
    assert np.sqrt(np.mean(error**2)) < 0.15 * wanted.std()


@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("name", ["residual", "depthwise"])
def test_onnx_runtime_gives_the_same_integers(name: str, profile: str, tmp_path: Path) -> None:
    granularity = "channel" if name == "depthwise" else "tensor"
    _, graph = lowered(NETS[name](), profile, granularity=granularity, image=(IMAGENET_MEAN, IMAGENET_STD))
    model = build_model(graph)
    check_fusion(graph, fusion(model))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert verify(Interpreter(graph), OnnxRunner(path, 1), bytes_of(20)) == 20


def test_residual_operands_are_unsigned_and_signed() -> None:
    _, graph = lowered(residual_net(), "u8")
    kinds = {tuple(graph.format(name).signed for name in (op.left, op.right)) for op in graph.ops if isinstance(op, Add)}
    assert kinds == {(False, True), (True, False)}
    _, graph = lowered(residual_net(), "s8")
    assert all(tensor.format.signed for tensor in graph.tensors.values())


def test_logits_have_their_true_value() -> None:
    net, graph = lowered(residual_net())
    images = bytes_of(5)
    codes = Interpreter(graph).layers(images)[graph.output]
    assert graph.format(graph.output).width == 32
    np.testing.assert_array_equal(TrainingGraph(net).logits(images), (codes * 2.0 ** -graph.format(graph.output).frac).astype(np.float32))
    with torch.no_grad():
        wanted = randomise(residual_net())(torch.from_numpy(images).float() / 127.5 - 1).numpy()
    assert np.corrcoef(wanted.ravel(), TrainingGraph(net).logits(images).ravel())[0, 1] > 0.99


def test_one_layer_by_hand() -> None:
    """Codes of a 1x1 convolution, from the weights as they are: rounding of weight and bias, shift, saturation."""
    conv = nn.Conv2d(3, 2, 1)
    net = nn.Sequential(conv, nn.ReLU(), *head(2, 2))
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[0.5, -0.25, 0.75], [1.0, 0.1, -0.9]]).view(2, 3, 1, 1))
        assert conv.bias is not None
        conv.bias.copy_(torch.tensor([0.1, -0.2]))
    fixed = calibrated(prepared(net, "u8", 4, (0.0,) * 3, (1.0,) * 3), rounding="nearest", fit_ranges=False)
    graph, images = lower(fixed), bytes_of(3, 4)
    frac, out = fixed.weight_fracs("0")[0], graph.format("0")
    weight = np.rint(conv.weight.detach().double().numpy()[..., 0, 0] * 256 / 255 * 2.0**frac).astype(np.int64)
    bias = np.rint(np.array([0.1, -0.2]) * 2.0 ** (frac + 8)).astype(np.int64)
    np.testing.assert_array_equal(graph.constants["0.weight"][..., 0, 0], weight)
    np.testing.assert_array_equal(graph.constants["0.bias"], bias)
    acc = np.einsum("oc,nchw->nohw", weight, images.astype(np.int64)) + bias[:, None, None]
    np.testing.assert_array_equal(TrainingGraph(fixed).layers(images)["0"], requantize(acc, frac + 8 - out.frac, out, relu=True))


def test_graph_survives_its_file_form() -> None:
    _, graph = lowered(depthwise_net(), granularity="channel")
    again = IntegerGraph.from_json(json.loads(json.dumps(graph.to_json())), graph.constants)
    assert compare(Interpreter(graph), Interpreter(again), bytes_of(3)) == []


def test_format_table_describes_the_graph() -> None:
    net, graph = lowered(residual_net(), granularity="channel")
    table = format_table(net, graph, "std", "channel", {})
    tree = json.loads(json.dumps(table.to_json()))
    layers = [op.output for op in graph.ops if isinstance(op, Conv | Linear)]
    assert list(tree["layers"]) == layers
    first = tree["layers"][layers[0]]
    assert len(first["weight"]) == 8
    assert first["input"] == "s8.7"
    assert first["accumulator_frac"] == [7 + f for f in net.weight_fracs(layers[0])]
    assert tree["layers"][layers[-1]]["output"] == "logits"
    assert set(tree["activations"]) == {point.name for point in net.points}
    assert str(min(f for layer in table.layers.values() for f in (w.frac for w in layer.weight))) in table.summary()


def test_wide_accumulator_of_the_logits_narrows_their_weights() -> None:
    net, _ = lowered(residual_net())
    name = net.plan.output
    with torch.no_grad():
        net.layer(name).weight.mul_(1e-3)
        net.layer(name).bias.fill_(60.0)
    net.set_weight_fracs(name, (20,))
    assert enforce_bounds(net) == [name]
    graph = lower(net)
    op = graph.ops[-1]
    assert isinstance(op, Linear)
    assert FLOAT32_EXACT / 4 < graph.accumulator_bound(op) <= FLOAT32_EXACT
    assert enforce_bounds(net) == []
    assert verify(Interpreter(graph), TrainingGraph(net), bytes_of(4)) == 4


def test_bias_beyond_32_bits_narrows_or_is_refused() -> None:
    net, _ = lowered(residual_net())
    first = net.plan.weighted()[0]
    weights = net.weight_fracs(first.name)[0]
    with torch.no_grad():
        net.layer(first.name).bias[0] = -(2.0 ** (34 - weights - 7))  # eight times the largest
    with pytest.raises(UnsupportedError, match=rf"'{first.name}': its bias does not fit 32 bits at fraction {weights + 7}"):
        integers(net, first)
    assert enforce_bounds(net) == [first.name]
    assert weights - 5 <= net.weight_fracs(first.name)[0] < weights - 2
    assert verify(Interpreter(lower(net)), TrainingGraph(net), bytes_of(4)) == 4
    with torch.no_grad():
        net.layer(first.name).bias[0] = 2.0**60
    with pytest.raises(UnsupportedError, match=f"'{first.name}': no weight format keeps its accumulator exact"):
        enforce_bounds(net)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(value: float) -> None:
    net, _ = lowered(residual_net())
    name = net.plan.weighted()[1].name
    with torch.no_grad():
        net.layer(name).bias[0] = value
    with pytest.raises(UnsupportedError, match=f"'{name}' has weights that are not finite"):
        enforce_bounds(net)


def test_hidden_linear_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 12), nn.ReLU(), nn.Linear(12, 5))
    fixed, graph = lowered(net)
    assert [type(step) for step in fixed.plan.weighted()].count(LinearStep) == 2
    assert verify(Interpreter(graph), TrainingGraph(fixed), bytes_of(6)) == 6


def test_values_off_their_grid_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = lowered(residual_net())
    whole = net.tensors
    monkeypatch.setattr(net, "tensors", lambda images: ((name, value + 1e-4) for name, value in whole(images)))
    with pytest.raises(VerificationError, match="'image': fixed point gives values that are no multiples of 2\\^-7"):
        TrainingGraph(net).layers(bytes_of(2))
