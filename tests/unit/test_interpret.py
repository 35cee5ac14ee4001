import dataclasses
from typing import Any, Literal

import numpy as np
import pytest

from edgeft.errors import ArtifactError
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import IntegerGraph, Profile, Tensor
from edgeft.interpret import CHUNK_PIXELS, Interpreter
from tests import naive
from tests.graphs import GraphBuilder, random_images, residual_net


@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("image_format", ["u8.8", "s8.7"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_every_layer_equals_plain_python(profile: Profile, image_format: Literal["u8.8", "s8.7"], per_channel: bool) -> None:
    graph = residual_net(7, size=9, profile=profile, image_format=image_format, per_channel=per_channel, jitter=2)
    images = random_images(graph, 3)
    found = Interpreter(graph).layers(images)
    assert list(found) == [graph.input, *(op.output for op in graph.ops)]
    for i, image in enumerate(images):
        for name, codes in naive.layers(graph, image).items():
            assert np.array_equal(found[name][i], codes), name


def test_channel_multiplier_and_8_bit_linear_equal_plain_python() -> None:
    b = GraphBuilder(1, (2, 5, 6))
    x = b.conv("image", 6, (3, 2), groups=2, stride=(2, 1), padding=(1, 0, 0, 2))
    b.linear(b.linear(b.flatten(x), 4, relu=True, wide=False), 3)
    graph = b.graph()
    images = random_images(graph, 3)
    found = Interpreter(graph).layers(images)
    for name, codes in naive.layers(graph, images[2]).items():
        assert np.array_equal(found[name][2], codes), name


def test_the_random_nets_exercise_saturation_and_both_signs() -> None:
    graph = residual_net(3, jitter=2)
    layers = Interpreter(graph).layers(random_images(graph, 16))
    assert any((codes == graph.format(name).max_code).any() for name, codes in layers.items() if name != graph.input)
    assert any((codes == -128).any() for codes in layers.values())


def test_padding_of_a_max_pool_never_wins() -> None:
    b = GraphBuilder(0, (1, 3, 3), image_format="s8.7")
    b.max_pool("image", (3, 3), (1, 1, 1, 1))
    codes = Interpreter(b.graph()).layers(np.full((1, 1, 3, 3), 7, np.uint8))
    assert np.all(codes["maxpool0"] == 7 - 128)


def test_logits_are_accumulators_in_real_units_and_do_not_depend_on_the_batch() -> None:
    graph = residual_net(3)
    images = random_images(graph, CHUNK_PIXELS // 12**2 + 1)  # one more than fits into a chunk
    runner = Interpreter(graph)
    logits = runner.logits(images)
    assert logits.dtype == np.float32
    assert np.array_equal(logits, np.ldexp(runner.layers(images)[graph.output], -graph.format(graph.output).frac))
    assert np.array_equal(logits[-1:], runner.logits(images[-1:]))


@pytest.mark.parametrize("text", ["u8.7", "s8.8", "s16.7"])
def test_other_input_formats_are_refused(text: str) -> None:
    graph = residual_net(0)
    image = Tensor("image", (3, 12, 12), FixedPointFormat.parse(text))
    with pytest.raises(ArtifactError, match=f"^graph: input format '{text}' is not an image format; allowed: u8.8, s8.7$"):
        Interpreter(dataclasses.replace(graph, tensors={**graph.tensors, "image": image}))


@pytest.mark.parametrize("images", [np.zeros((1, 3, 12, 12)), np.zeros((3, 12, 12), np.uint8), np.zeros((0, 3, 12, 12), np.uint8)])
def test_images_of_another_kind_are_refused(images: Any) -> None:
    with pytest.raises(ArtifactError, match=r"^images must be uint8 \[n, channels, height, width\] with n >= 1"):
        Interpreter(residual_net(0)).logits(images)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"^tensor 'image' has shape \(3, 8, 8\), the graph says \(3, 12, 12\)$"):
        Interpreter(residual_net(0)).logits(np.zeros((1, 3, 8, 8), np.uint8))


def test_a_wrong_shape_in_the_graph_is_named() -> None:
    graph = residual_net(0)
    wrong = dataclasses.replace(graph.tensors["conv2"], shape=(8, 9, 9))
    broken: IntegerGraph = dataclasses.replace(graph, tensors={**graph.tensors, "conv2": wrong})
    with pytest.raises(ArtifactError, match=r"^tensor 'conv2' has shape"):
        Interpreter(broken).logits(random_images(graph, 1))
