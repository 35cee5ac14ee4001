"""FlexRound: rounding learned by gradient, layer by layer (Lee et al. 2023, arXiv:2306.00317), with s1 fixed to a power of two."""

import torch
from torch import Tensor

from edgeft.quant.calibration.layerfit import LayerFit, LayerSample
from edgeft.quant.plan import rectify

STEPS = 300
"""Steps of Adam for each layer."""
BATCH = 1024
"""Columns in each step."""
RATE = 5e-4
"""Learning rate of the divisors' logarithms; it falls linearly to 0."""
BIAS_RATE = 1e-3
"""Learning rate of the bias, in deviations of the output."""
HELD_OUT = 8
"""One in this many columns, all of other images, judges what was learned."""
INSIDE = 0.45
"""Largest distance, in codes, between a weight to be rounded and the code that it starts from."""


class _Round(torch.autograd.Function):
    """Rounding with a straight-through gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


@torch.enable_grad()
def flexround(sample: LayerSample, start: LayerFit, high: int, seed: int) -> LayerFit:
    """Learn which way each weight is rounded: W_q = 2^-frac * round(W * 2^frac / (S2 * s3 * s4)), S2 for each weight, s3 for each output,
    s4 for each input, and the bias, by the error of the rectified outputs.

    Starts at `start` and changes only the outputs whose error falls on columns that were held out. Deterministic for a seed.
    """
    groups, k, n = sample.columns.shape
    scale = sample.rows(torch.exp2(start.fracs).expand(len(start.weight)))
    codes = sample.rows(start.weight) * scale
    latent = codes + (sample.rows(sample.target()) * scale - codes).clamp(-INSIDE, INSIDE)
    deviation = sample.wanted.std(2, keepdim=True, correction=0).clamp(min=1e-6)
    s2 = torch.zeros_like(latent, requires_grad=True)
    s3 = torch.zeros(groups, latent.shape[1], 1, requires_grad=True)
    s4 = torch.zeros(groups, 1, k, requires_grad=True)
    shift = torch.zeros_like(sample.mean, requires_grad=True)
    adam = torch.optim.Adam([{"params": [s2, s3, s4], "lr": RATE}, {"params": [shift], "lr": BIAS_RATE}])
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1.0 - step / STEPS)
    generator = torch.Generator().manual_seed(seed)
    weights = sample.rows(sample.importance)
    norm = float((weights * sample.wanted.var(2, keepdim=True, correction=0)).mean()) + 1e-12
    n_train = n - n // HELD_OUT  # columns are in the order of images, so that those at the end are of other images

    def rounded() -> Tensor:
        out: Tensor = _Round.apply((latent * torch.exp(-(s2 + s3 + s4))).clamp(-high, high)) / scale
        return out

    for _ in range(STEPS):
        chosen = torch.randint(n_train, (min(BATCH, n_train),), generator=generator)
        found = rectify(sample.step, rounded() @ sample.columns[:, :, chosen] + start.offset + shift * deviation)
        loss = (weights * (found - sample.wanted[:, :, chosen]).square()).mean() / norm
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
    with torch.no_grad():
        return _better_rows(sample, start, rounded(), start.offset + shift * deviation, n_train)


def _better_rows(sample: LayerSample, start: LayerFit, rounded: Tensor, offset: Tensor, n_train: int) -> LayerFit:
    held = slice(n_train, None) if n_train < sample.columns.shape[2] else slice(None)
    columns, wanted = sample.columns[:, :, held], sample.wanted[:, :, held]

    def errors(weight: Tensor, bias: Tensor) -> Tensor:
        return (rectify(sample.step, weight @ columns + bias) - wanted).square().mean(2, keepdim=True)

    codes = sample.rows(start.weight)
    better = errors(rounded, offset) < errors(codes, start.offset)
    weight = torch.where(better, rounded, codes).reshape(start.weight.shape)
    bias = torch.where(better, offset, start.offset)
    return LayerFit.of(sample, weight, start.fracs, bias)
