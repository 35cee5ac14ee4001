"""Random integer graphs and images for tests: small nets with every op, both profiles, and networks of realistic size."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import (
    Add,
    Concat,
    Conv,
    Flatten,
    GlobalPool,
    IntegerGraph,
    Linear,
    Lookup,
    MaxPool,
    Mul,
    Op,
    Profile,
    Resize,
    Select,
    Tensor,
)

_WEIGHT_STD, _INPUT_RMS, _OUTPUT_STD = 73.0, 80.0, 64.0
"""Of uniform weights in -127 ... 127, of typical codes, and the spread of output codes aimed at: some values saturate."""
_OUTPUT_FRAC = 5
"""Weight fractions are chosen so that activations stay near this one, however deep the net."""


class GraphBuilder:
    """Appends ops with random constants; picks each output format so that codes use their range and some saturate.

    Every method returns the name of the tensor it made. `jitter` moves each output fraction by up to that many bits.
    """

    def __init__(
        self,
        seed: int,
        image: tuple[int, int, int] = (3, 12, 12),
        *,
        profile: Profile = "u8",
        per_channel: bool = False,
        image_format: Literal["u8.8", "s8.7"] = "u8.8",
        jitter: int = 0,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.profile, self.per_channel, self.jitter = profile, per_channel, jitter
        self.input = "image"
        self.tensors = {"image": Tensor("image", image, FixedPointFormat.parse(image_format))}
        self.ops: list[Op] = []
        self.constants: dict[str, NDArray[Any]] = {}

    def graph(self) -> IntegerGraph:
        """The graph of all ops so far."""
        return IntegerGraph(self.tensors, tuple(self.ops), self.input, self.profile, constants=self.constants)

    def conv(
        self,
        x: str,
        n_out: int,
        kernel: tuple[int, int] = (3, 3),
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] | None = None,
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        relu: bool = True,
        fmt: FixedPointFormat | None = None,
    ) -> str:
        """A convolution; `padding` None keeps the size at stride 1, `fmt` is the output format instead of a chosen one."""
        channels, *size = self.tensors[x].shape
        span = [dilation[i] * (kernel[i] - 1) for i in (0, 1)]
        top, left, bottom, right = padding or (span[0] // 2, span[1] // 2, span[0] - span[0] // 2, span[1] - span[1] // 2)
        rows = (size[0] + top + bottom - span[0] - 1) // stride[0] + 1
        columns = (size[1] + left + right - span[1] - 1) // stride[1] + 1
        name = f"conv{len(self.ops)}"
        weight_frac = self._constants(name, x, (n_out, channels // groups, *kernel))
        fmt = fmt or self._activation(_OUTPUT_FRAC + self._jitter(), relu)
        op = Conv(name, x, f"{name}.weight", f"{name}.bias", weight_frac, stride, (top, left, bottom, right), dilation, groups, relu)
        return self._append(op, (n_out, rows, columns), fmt)

    def linear(self, x: str, n_out: int, *, relu: bool = False, wide: bool = True) -> str:
        """A matrix product; `wide` keeps the 32-bit accumulators (logits), otherwise 8-bit codes."""
        (n_in,) = self.tensors[x].shape
        name = f"linear{len(self.ops)}"
        weight_frac = self._constants(name, x, (n_out, n_in))
        if wide:
            weight_frac = weight_frac[:1]
            fmt = FixedPointFormat(32, self._frac(x) + weight_frac[0], signed=True)
        else:
            fmt = self._activation(_OUTPUT_FRAC + self._jitter(), relu)
        return self._append(Linear(name, x, f"{name}.weight", f"{name}.bias", weight_frac, relu), (n_out,), fmt)

    def add(self, left: str, right: str, *, relu: bool = True) -> str:
        """A residual addition; the result has the coarser operand's fraction, or one bit less."""
        fmt = self._activation(min(self._frac(left), self._frac(right)) - int(self.rng.integers(2)) + self._jitter(), relu)
        return self._append(Add(f"add{len(self.ops)}", left, right, relu), self.tensors[left].shape, fmt)

    def mul(self, left: str, right: str, fmt: FixedPointFormat | None = None) -> str:
        """A product, or a gate [c, 1, 1] on the right; signed where an operand is."""
        formats = [self.tensors[name].format for name in (left, right)]
        signed = any(each.signed for each in formats)
        fmt = fmt or FixedPointFormat(8, sum(each.frac for each in formats) - 7 + self._jitter(), signed)
        return self._append(Mul(f"mul{len(self.ops)}", left, right), self.tensors[left].shape, fmt)

    def lookup(self, x: str, fmt: FixedPointFormat | None = None) -> str:
        """A random function whose values are anywhere in the output format (signed unless `fmt` says otherwise)."""
        fmt = fmt or FixedPointFormat(8, _OUTPUT_FRAC + self._jitter(), signed=True)
        name = f"lookup{len(self.ops)}"
        self.constants[f"{name}.table"] = self.rng.integers(fmt.min_code, fmt.max_code + 1, 256).astype(np.int16)
        return self._append(Lookup(name, x, f"{name}.table"), self.tensors[x].shape, fmt)

    def concat(self, *xs: str) -> str:
        """Tensors of one format side by side along the channels."""
        shapes = [self.tensors[x].shape for x in xs]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return self._append(Concat(f"concat{len(self.ops)}", xs), shape, self.tensors[xs[0]].format)

    def select(self, x: str, index: tuple[int, ...]) -> str:
        """Channels by number."""
        source = self.tensors[x]
        return self._append(Select(f"select{len(self.ops)}", x, index), (len(index), *source.shape[1:]), source.format)

    def resize(self, x: str, factor: tuple[int, int]) -> str:
        """Nearest-neighbour enlargement."""
        channels, rows, columns = self.tensors[x].shape
        shape = (channels, rows * factor[0], columns * factor[1])
        return self._append(Resize(f"resize{len(self.ops)}", x, factor), shape, self.tensors[x].format)

    def max_pool(self, x: str, kernel: tuple[int, int] = (3, 3), padding: tuple[int, int, int, int] = (1, 1, 1, 1)) -> str:
        """A max-pool of stride 2."""
        channels, *size = self.tensors[x].shape
        rows, columns = ((size[i] + padding[i] + padding[i + 2] - kernel[i]) // 2 + 1 for i in (0, 1))
        op = MaxPool(f"maxpool{len(self.ops)}", x, kernel, (2, 2), padding)
        return self._append(op, (channels, rows, columns), self.tensors[x].format)

    def global_pool(self, x: str) -> str:
        """A global average pool whose divisor is the nearest power of two."""
        channels, rows, columns = self.tensors[x].shape
        fmt = self.tensors[x].format
        out = FixedPointFormat(fmt.width, fmt.frac + self._jitter(), fmt.signed)
        op = GlobalPool(f"pool{len(self.ops)}", x, round(np.log2(rows * columns)))
        return self._append(op, (channels, 1, 1), out)

    def flatten(self, x: str) -> str:
        """Codes as one vector per image."""
        shape = (int(np.prod(self.tensors[x].shape)),)
        return self._append(Flatten(f"flatten{len(self.ops)}", x), shape, self.tensors[x].format)

    def head(self, x: str, n_classes: int) -> IntegerGraph:
        """Pool, flatten, classify; the finished graph."""
        self.linear(self.flatten(self.global_pool(x)), n_classes)
        return self.graph()

    def _frac(self, name: str) -> int:
        return self.tensors[name].format.frac

    def _jitter(self) -> int:
        return int(self.rng.integers(-self.jitter, self.jitter + 1))

    def _constants(self, name: str, x: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Draws weights and bias of a layer on `x` and returns its weight fractions."""
        largest = 127 if len(shape) == 4 else min(127, 2**24 // (192 * shape[1]))  # logits must be exact in float32
        spread = _WEIGHT_STD * largest / 127 * _INPUT_RMS * np.sqrt(np.prod(shape[1:]))
        self.constants[f"{name}.weight"] = self.rng.integers(-largest, largest + 1, shape).astype(np.int8)
        self.constants[f"{name}.bias"] = self.rng.integers(-int(spread), int(spread) + 1, shape[0]).astype(np.int32)
        frac = round(np.log2(spread / _OUTPUT_STD)) + _OUTPUT_FRAC - self._frac(x)
        if not self.per_channel:
            return (frac + self._jitter(),)
        return tuple(int(each) for each in frac + self.rng.integers(-2, 3, shape[0]))

    def _activation(self, frac: int, relu: bool) -> FixedPointFormat:
        if relu and self.profile == "u8":
            return FixedPointFormat(8, frac, signed=False)
        return FixedPointFormat(8, frac - int(relu), signed=True)

    def _append(self, op: Op, shape: tuple[int, ...], fmt: FixedPointFormat) -> str:
        self.tensors[op.output] = Tensor(op.output, shape, fmt)
        self.ops.append(op)
        return op.output


def residual_net(
    seed: int,
    *,
    size: int = 12,
    profile: Profile = "u8",
    per_channel: bool = False,
    image_format: Literal["u8.8", "s8.7"] = "u8.8",
    jitter: int = 0,
) -> IntegerGraph:
    """Every op in one small net: stem, max-pool, depthwise, grouped, dilated, asymmetric padding, two additions, pool, linear."""
    b = GraphBuilder(seed, (3, size, size), profile=profile, per_channel=per_channel, image_format=image_format, jitter=jitter)
    x = b.max_pool(b.conv("image", 8, stride=(2, 2), padding=(0, 0, 1, 1)), padding=(0, 1, 1, 0))
    y = b.conv(b.conv(x, 8, groups=8), 8, (1, 1), relu=False)
    x = b.add(x, y, relu=False)
    y = b.conv(b.conv(x, 16, (1, 1), relu=False), 16, groups=4, dilation=(2, 2), relu=False)
    return b.head(b.add(b.conv(x, 16, (1, 1)), y), 5)


def mobilenet_v1(seed: int, size: int = 128, n_classes: int = 1000, profile: Profile = "u8") -> IntegerGraph:
    """The layer shapes of MobileNetV1 0.25 with random weights."""
    b = GraphBuilder(seed, (3, size, size), profile=profile)
    x, channels = b.conv("image", 8, stride=(2, 2), padding=(0, 0, 1, 1)), 8
    for n_out, stride in [(16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *[(128, 1)] * 5, (256, 2), (256, 1)]:
        x = b.conv(x, channels, stride=(stride, stride), padding=(0, 0, 1, 1) if stride == 2 else None, groups=channels)
        x, channels = b.conv(x, n_out, (1, 1)), n_out
    return b.head(x, n_classes)


def mobilenet_v2(seed: int, size: int = 128, n_classes: int = 1000, profile: Profile = "u8") -> IntegerGraph:
    """The layer shapes of MobileNetV2 1.0 with random weights."""
    b = GraphBuilder(seed, (3, size, size), profile=profile)
    x, channels = b.conv("image", 32, stride=(2, 2), padding=(0, 0, 1, 1)), 32
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, n_out, repeats, first_stride in rows:
        for i in range(repeats):
            stride = first_stride if i == 0 else 1
            hidden = channels * expansion
            y = x if expansion == 1 else b.conv(x, hidden, (1, 1))
            y = b.conv(y, hidden, stride=(stride, stride), padding=(0, 0, 1, 1) if stride == 2 else None, groups=hidden)
            y = b.conv(y, n_out, (1, 1), relu=False)
            x, channels = (b.add(x, y, relu=False) if stride == 1 and channels == n_out else y), n_out
    return b.head(b.conv(x, 1280, (1, 1)), n_classes)


def resnet18(seed: int, size: int = 224, n_classes: int = 1000, profile: Profile = "u8") -> IntegerGraph:
    """The layer shapes of ResNet-18 with random weights."""
    b = GraphBuilder(seed, (3, size, size), profile=profile)
    x, channels = b.max_pool(b.conv("image", 64, (7, 7), stride=(2, 2), padding=(3, 3, 3, 3))), 64
    for n_out in (64, 64, 128, 128, 256, 256, 512, 512):
        stride = 1 if n_out == channels else 2
        y = b.conv(x, n_out, stride=(stride, stride), padding=(1, 1, 1, 1))
        y = b.conv(y, n_out, relu=False)
        skip = x if stride == 1 else b.conv(x, n_out, (1, 1), stride=(2, 2), relu=False)
        x, channels = b.add(skip, y), n_out
    return b.head(x, n_classes)


def random_images(graph: IntegerGraph, n: int, seed: int = 0) -> NDArray[np.uint8]:
    """Uniform bytes of the graph's input shape; the first two images are all 0 and all 255."""
    images = np.random.default_rng(seed).integers(0, 256, (n, *graph.tensors[graph.input].shape)).astype(np.uint8)
    images[:1], images[1:2] = 0, 255
    return images
