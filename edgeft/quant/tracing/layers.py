"""Rules for layers: convolutions, linear layers, batch norm, pooling."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import AvgPool2dSame, BatchNormAct2d, Conv2dSame, DropPath, StdConv2d
from timm.layers.norm_act import FrozenBatchNormAct2d
from timm.layers.pool2d_same import MaxPool2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from edgeft.quant.plan import ConvStep
from edgeft.quant.tracing.activations import ACTIVATION_TYPES, ACTIVATIONS, activate
from edgeft.quant.tracing.builder import Builder, window_shape
from edgeft.quant.tracing.fold import affine, exact_frac, per_channel
from edgeft.quant.tracing.pools import adaptive_max_pool, adaptive_pool, average_pool, max_pool, pair, same_padding, sum_of, symmetric
from edgeft.quant.tracing.values import Value

PASS_THROUGH: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, DropPath)
_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
LEAVES: tuple[type[nn.Module], ...] = (
    BatchNormAct2d, FrozenBatchNormAct2d, Conv2dSame, MaxPool2dSame, AvgPool2dSame, *_STANDARDISED, *PASS_THROUGH, *ACTIVATIONS,
)  # fmt: skip
"""Modules of timm that have a rule of their own; others are traced through."""


def convolve(
    b: Builder, x: Value, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Value:
    """Convolution of a map; weights that nothing trains and that are exact in 8 bits are constants of the network."""
    fixed = not isinstance(weight, nn.Parameter) and bias is None
    name, around = b.padded(x)
    kernel, stride, dilation = pair(weight.shape[2:]), pair(stride), pair(dilation)
    size = b.shape(name)[1:]
    padded = (size[0] + around[0] + around[2], size[1] + around[1] + around[3])
    if isinstance(padding, str):
        # Padding 'same' of PyTorch leaves the extra row at the bottom, like TensorFlow's at stride 1.
        total = same_padding(padded, kernel, stride, dilation) if padding in ("same", "SAME") else (0, 0, 0, 0)
    else:
        total = symmetric(padding)
    total = sum_of(total, around)
    weight = weight.detach().double()
    shape = (weight.shape[0], *window_shape((size[0], size[1]), kernel, stride, total, dilation))
    return b.add(ConvStep(
        b.layer_name(), (name,), shape, weight=weight, bias=weight.new_zeros(shape[0]) if bias is None else bias.detach().double(),
        stride=stride, padding=total, dilation=dilation, groups=groups, fixed_frac=exact_frac(weight) if fixed else None,
    ))  # fmt: skip


def _conv(b: Builder, x: Value, module: nn.Conv2d) -> Value:
    if module.padding_mode != "zeros":
        raise b.unsupported(f"pads with '{module.padding_mode}', only zeros are supported")
    weight: Tensor = module.weight
    if isinstance(module, _STANDARDISED):
        weight = _standardised(module)
    same = isinstance(module, Conv2dSame) or getattr(module, "same_pad", False)
    out = convolve(b, x, weight, module.bias, module.stride, "same" if same else module.padding, module.dilation, module.groups)
    step = b.steps[out.name]
    assert isinstance(step, ConvStep)
    step.fixed_frac = None
    return out


def _standardised(module: Any) -> Tensor:
    """Weight standardisation (Qiao et al. 2019, arXiv:1903.10520), scaled where the layer is (Brock et al. 2021, arXiv:2101.08692)."""
    weight = module.weight.detach().double()
    variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    scaled = isinstance(module, ScaledStdConv2d | ScaledStdConv2dSame)
    gain: Tensor = module.gain.detach().double() * module.scale if scaled else torch.ones((), dtype=torch.float64)
    standardised: Tensor = (weight - mean) / torch.sqrt(variance + module.eps)
    return standardised * gain


def _conv1d(b: Builder, x: Value, module: nn.Conv1d) -> Value:
    """Convolution along the channels of a pooled map (ECA, Wang et al. 2020, arXiv:1910.03151): a layer with a banded weight matrix."""
    if module.padding_mode != "zeros":
        raise b.unsupported(f"pads with '{module.padding_mode}', only zeros are supported")
    if len(x.shape) != 3 or x.source[1:] != (1, 1):
        raise b.unsupported("must run over the channels of a globally pooled tensor")
    positions = x.elements.flatten()
    basis = torch.eye(len(positions), dtype=torch.float64).view(len(positions), *x.shape[1:])
    weight = module.weight.detach().double()
    responses = F.conv1d(basis, weight, None, module.stride, module.padding, module.dilation, module.groups)
    used = positions >= 0
    matrix = torch.zeros(x.source[0], responses[0].numel(), dtype=torch.float64)
    matrix.index_add_(0, positions[used], responses.flatten(1)[used])
    bias = weight.new_zeros(len(matrix[0]))
    if module.bias is not None:
        bias = module.bias.detach().double().repeat_interleave(responses.shape[2])
    out = b.add(ConvStep(b.layer_name(), (x.name,), (len(bias), 1, 1), weight=matrix.T[:, :, None, None].contiguous(), bias=bias))
    return Value(out.name, out.source, (1, *responses.shape[1:]))


def linear(b: Builder, x: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
    """Linear layer as a convolution: on a vector its kernel covers the map that the vector came from, on [1, h, w, c] it is 1x1."""
    weight = weight.detach().double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
    if len(x.shape) == 4:
        name = b.map(x.moved(x.elements.permute(0, 3, 1, 2)))
        out = b.add(ConvStep(b.layer_name(), (name,), (len(weight), *b.shape(name)[1:]), weight=weight[:, :, None, None], bias=bias))
        return out.moved(out.elements.permute(0, 2, 3, 1))
    if len(x.shape) != 2:
        raise b.unsupported(f"reads a tensor of shape {x.shape[1:]}, only vectors and maps are supported")
    source = x.source if x.plain else b.shape(b.map(x))
    name = x.name if x.plain else b.map(x)
    out = b.add(ConvStep(b.layer_name(), (name,), (len(weight), 1, 1), weight=weight.view(len(weight), *source), bias=bias))
    b.linear.add(out.name)
    return Value(out.name, out.source, (1, len(weight)))


def _batch_norm(b: Builder, x: Value, module: Any) -> Value:
    if module.running_mean is None or module.running_var is None:
        raise b.unsupported("keeps no running statistics, so it cannot be folded")
    if not x.whole:
        x = Value(name := b.map(x), b.shape(name), x.shape)
    factor = (module.running_var.double() + module.eps).rsqrt()
    ones = torch.ones_like(factor)
    gamma = module.weight.detach().double() if module.weight is not None else ones
    beta = module.bias.detach().double() if module.bias is not None else torch.zeros_like(ones)
    offset = beta - module.running_mean.double() * factor * gamma
    view = (1, -1, *(1,) * (len(x.shape) - 2))
    factor, offset, beta, gamma = (per_channel(b, x, v.view(view)) for v in (factor * gamma, offset, beta, gamma))
    return affine(b, x, factor, offset, torch.stack([beta, gamma.abs()]))


def _batch_norm_act(b: Builder, x: Value, module: Any) -> Value:
    x = _batch_norm(b, x, module)
    for part in (module.drop, module.act):
        if isinstance(part, ACTIVATION_TYPES):
            x = activate(b, x, part)
        elif not isinstance(part, PASS_THROUGH):
            raise b.unsupported(f"has the activation {type(part).__name__}, which has no fixed-point form")
    return x


def _max_pool(b: Builder, x: Value, m: Any) -> Value:
    same = isinstance(m, MaxPool2dSame)
    return max_pool(b, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices, same=same)


def _average_pool(b: Builder, x: Value, m: Any) -> Value:
    same = isinstance(m, AvgPool2dSame)
    return average_pool(b, x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override, same=same)


def _flatten(b: Builder, x: Value, module: nn.Flatten) -> Value:
    return x.moved(x.elements.flatten(module.start_dim, module.end_dim))


def _zero_pad(b: Builder, x: Value, module: nn.ZeroPad2d) -> Value:
    return x.moved(F.pad(x.elements, module.padding, value=-1))


def _upsample(b: Builder, x: Value, module: nn.Upsample) -> Value:
    return enlarge(b, x, module.size, module.scale_factor, module.mode)


def enlarge(b: Builder, x: Value, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *_: Any, **__: Any) -> Value:
    """Nearest-neighbour interpolation."""
    if mode not in ("nearest", "nearest-exact"):
        raise b.unsupported(f"interpolates by '{mode}', only 'nearest' is supported")
    wanted = tuple(size) if isinstance(size, tuple | list) else size
    return x.moved(F.interpolate(x.elements.double(), wanted, scale_factor, mode).long())


MODULES: list[tuple[type[nn.Module], Callable[[Builder, Value, Any], Value]]] = [
    (BatchNormAct2d, _batch_norm_act), (FrozenBatchNormAct2d, _batch_norm_act), (nn.BatchNorm2d, _batch_norm),
    (nn.BatchNorm1d, _batch_norm), (nn.Conv2d, _conv), (nn.Conv1d, _conv1d), (nn.Linear, lambda b, x, m: linear(b, x, m.weight, m.bias)),
    (nn.MaxPool2d, _max_pool), (nn.AvgPool2d, _average_pool), (nn.AdaptiveAvgPool2d, lambda b, x, m: adaptive_pool(b, x, m.output_size)),
    (nn.AdaptiveMaxPool2d, lambda b, x, m: adaptive_max_pool(b, x, m.output_size, m.return_indices)),
    (nn.Flatten, _flatten), (nn.ChannelShuffle, lambda b, x, m: x.moved(F.channel_shuffle(x.elements, m.groups))),
    (nn.ZeroPad2d, _zero_pad), (nn.Upsample, _upsample),
    *((kind, activate) for kind in ACTIVATIONS), *((kind, lambda b, x, m: x) for kind in PASS_THROUGH),
]  # fmt: skip
"""The first entry whose type fits gives the rule."""
