"""Closed-form repair of weight rounding, layer by layer: GPTQ-style error compensation and bias correction. No labels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeft.quant.plan import ConvStep, LinearStep

DAMPING = 0.01
"""Share of the mean diagonal added to the Hessian, where there are columns enough."""
POSITIONS = 48
"""Output positions sampled from each calibration image."""
RIDGES = (0.1, 1.0, 10.0)
"""Shares of the mean diagonal that may hold refitted weights near the given ones."""
HELD_OUT = 4
"""One in this many columns, all of other images, judges a refit."""
FEW = 8
"""Columns per weight below which damping grows: a rank-deficient Hessian has directions that cost nothing only on these columns."""
DOUBLE_UP_TO = 1024
"""Weights per output up to which float64 is used. Beyond, its cubic cost outweighs what it gains: damping bounds the condition number."""
BLOCK = 128
"""Columns rounded before their errors are passed on to the rest."""


def patches(step: ConvStep, x: Tensor, generator: torch.Generator) -> Tensor:
    """Input patches of `step` at random output positions of every image: [groups, in/groups * kh * kw, samples]."""
    top, left, bottom, right = step.padding
    padded = F.pad(x, (left, right, top, bottom))
    _, height, width = step.shape
    n = min(POSITIONS, height * width)
    chosen = torch.randperm(height * width, generator=generator)[:n]
    ys, xs = (chosen // width) * step.stride[0], (chosen % width) * step.stride[1]
    kh, kw = step.weight.shape[2:]
    taps = [padded[:, :, ys + i * step.dilation[0], xs + j * step.dilation[1]] for i in range(kh) for j in range(kw)]
    stacked = torch.stack(taps, 2)  # [images, in, taps, positions]
    images, channels = stacked.shape[:2]
    grouped = stacked.view(images, step.groups, channels // step.groups * kh * kw, n)
    return grouped.permute(1, 2, 0, 3).flatten(2)


def layer_inputs(step: ConvStep | LinearStep, x: Tensor, generator: torch.Generator) -> Tensor:
    """Columns that the weights of `step` are multiplied with: [groups, weights per output, samples]."""
    return patches(step, x, generator) if isinstance(step, ConvStep) else x.t().unsqueeze(0)


def centred(inputs: Tensor) -> Tensor:
    """Inputs without their mean over samples: what a shift of the mean does is left to the bias."""
    return inputs - inputs.mean(2, keepdim=True)


def refit(weight: Tensor, inputs: Tensor, exact: Tensor) -> Tensor:
    """Weights that give the float outputs from *quantized* inputs: ridge regression of the remaining error onto the inputs.

    weight [out, ...]; inputs and exact [groups, k, samples], centred, the quantized and the float columns in the order of images. The
    ridge is the one of `RIDGES` with the least error on the last columns, fitted on those before; the given weights stay where that
    does not lower their error.
    """
    groups, k, n = inputs.shape
    dtype = _precision(k)
    w, x = weight.reshape(groups, -1, k).to(dtype), inputs.to(dtype)
    error = w @ (exact.to(dtype) - x)
    n_fit = n - n // HELD_OUT
    held, wanted = x[:, :, n_fit:], error[:, :, n_fit:]
    changes = [_ridge(x[:, :, :n_fit], error[:, :, :n_fit], ridge) for ridge in RIDGES] if n_fit < n else []
    losses = [float(wanted.square().sum()), *(float((wanted - change @ held).square().sum()) for change in changes)]
    best = losses.index(min(losses))
    refitted = w if best == 0 else w + _ridge(x, error, RIDGES[best - 1])
    return refitted.reshape(weight.shape).to(weight.dtype)


def _ridge(x: Tensor, error: Tensor, ridge: float) -> Tensor:
    """Change of weights [groups, rows, k] that predicts `error` [groups, rows, n] from `x` [groups, k, n]."""
    hessian = x @ x.transpose(1, 2)
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    hessian.diagonal(dim1=1, dim2=2).add_(ridge * mean[:, None])
    change: Tensor = torch.cholesky_solve(x @ error.transpose(1, 2), torch.linalg.cholesky(hessian)).transpose(1, 2)
    return change


def compensate_rounding(weight: Tensor, scale: Tensor, inputs: Tensor, max_code: int) -> Tensor:
    """Round weights to their grid one input at a time, pushing each error into the inputs not yet rounded (GPTQ, arXiv:2210.17323).

    weight [out, ...] float; scale 2^frac, 0-dim or [out]; inputs [groups, k, samples] quantized. Returns weights on the grid
    that keep the layer's output close in the mean square over `inputs`.
    """
    groups, k, _ = inputs.shape
    dtype = _precision(k)
    w = weight.reshape(groups, -1, k).to(dtype)
    s = scale.to(dtype).expand(weight.shape[0]).reshape(groups, -1, 1)
    hessian = (inputs @ inputs.transpose(1, 2)).to(dtype)
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    hessian.diagonal(dim1=1, dim2=2).add_(DAMPING * max(1.0, FEW * k / inputs.shape[2]) * mean[:, None] + 1e-12)
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    rows = order.unsqueeze(1).expand(-1, w.shape[1], -1)
    w = w.gather(2, rows)
    hessian = hessian.gather(1, order.unsqueeze(2).expand(-1, -1, k)).gather(2, order.unsqueeze(1).expand(-1, k, -1))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    rounded = torch.empty_like(w)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = torch.empty_like(w[:, :, start:stop])
        for j in range(start, stop):
            column = w[:, :, j : j + 1]
            rounded[:, :, j : j + 1] = (column * s).round().clamp(-max_code, max_code) / s
            error = (column - rounded[:, :, j : j + 1]) / inverse[:, None, j, j, None]
            w[:, :, j + 1 : stop] -= error * inverse[:, None, j, j + 1 : stop]
            errors[:, :, j - start : j - start + 1] = error
        w[:, :, stop:] -= errors @ inverse[:, start:stop, stop:]
    return rounded.gather(2, order.argsort(dim=1).unsqueeze(1).expand(-1, w.shape[1], -1)).reshape(weight.shape).to(weight.dtype)


def _precision(k: int) -> torch.dtype:
    return torch.float64 if k <= DOUBLE_UP_TO else torch.float32


def channel_means(x: Tensor) -> Tensor:
    """Mean over everything but the channel axis of [n, c, ...]."""
    return x.double().transpose(0, 1).flatten(1).mean(1)
