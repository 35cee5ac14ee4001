"""F8Net's conventional recipe: long training with batch norm in training mode and learned clip levels, as the paper has it.

Every convolution that had a batch norm gets it back, and runs twice in a training step: with float weights for the statistics of the
batch, and with the quantized product of weights and normalisation (Jin et al., ICLR 2022, arXiv:2202.05239). What comes out is a
FixedPointNet like any other: `finish` writes the folded weights, biases and formats back, and the integers stay the same.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeft.config import Config, QuantConfig
from edgeft.methods import Stage
from edgeft.quant import a2q
from edgeft.quant.calibration.calibrate import rule_of
from edgeft.quant.calibration.statistics import propose_weight
from edgeft.quant.fakequant import RoundToGrid, power_of_two
from edgeft.quant.formats import weight_format
from edgeft.quant.net import FixedPointNet, module_key
from edgeft.quant.pact import ClipLevels, PublishedFormats, published_limit
from edgeft.quant.plan import IMAGE, ConvStep, LinearStep, Step, Weighted
from edgeft.quant.stage import Job, Trained, calibrated, described
from edgeft.train import fit

RATE = 0.05
"""Published learning rate for 256 images per step; other batches scale it."""
WEIGHT_DECAY = 4e-5
STATISTICS_MOMENTUM = 0.1
"""Weight of a batch in the running statistics."""
RELATIVE_EPS = 1e-5
"""Share of a channel's variance that is added to it; the channel's own scale is not known to be near 1 after folding."""
LEAST_EPS = 1e-12


def conventional_stage(config: Config) -> Stage:
    """The SGD stage of the recipe: momentum 0.9, cosine, batch norm in training mode, rate and decay as published.

    `quant.lr` replaces the rate and `train.weight_decay`, where it is not 0, the decay of 4e-5 on all parameters.
    """
    rate = config.quant.lr if config.quant.lr is not None else RATE * config.train.batch / 256
    return Stage(
        name="qat", solver="sgd", epochs=config.quant.qat_epochs, learning_rates=(rate,), batch_norm="train", momentum=0.9,
        weight_decay=config.train.weight_decay or WEIGHT_DECAY, keep_start=True,
    )  # fmt: skip


def conventional(job: Job) -> Trained:
    """Recipe f8net-conventional: calibration, then the long training, which starts from it and has to beat it.

    Raises TrainingError when it diverges.
    """
    net, sigmas = calibrated(job)
    net.to(job.context.accelerator.device)
    bits = job.config.quant.accumulator_bits
    a2q.prepare(net, bits)
    model = ConventionalNet(net, job.config.quant)
    stage = conventional_stage(job.config)
    result = fit(model, stage, *job.splits(), job.context, model.before_step, job.objective())
    job.context.say(f"qat: {described(result, stage.epochs)}")
    record = {"moves": int(model.moves), "loss": job.config.quant.loss, "lr": result.lr, "epoch": result.epoch,
              "val_accuracy": result.val_accuracy, "history": result.history, "clips": model.clips.to_json()}  # fmt: skip
    net = model.finish()
    a2q.check(net, bits)
    return Trained(net, sigmas, record)


class FoldedNorm(nn.Module):
    """Batch norm of a convolution without bias, as a factor and a shift of its output channels.

    It starts from mean and deviation of the output under the statistics that were folded, where the factor is 1 and the shift is the
    folded bias. `norm` [2, out] and `bias` [out] are those of the folded layer.
    """

    def __init__(self, norm: Tensor, bias: Tensor) -> None:
        super().__init__()
        mean, deviation = norm.to(bias)
        variance = deviation.square()
        self.register_buffer("eps", RELATIVE_EPS * variance + LEAST_EPS)
        self.register_buffer("mean", mean - bias)
        self.register_buffer("variance", variance)
        self.weight = nn.Parameter((variance + self.eps).sqrt())
        self.bias = nn.Parameter(mean.clone())

    eps: Tensor
    mean: Tensor
    variance: Tensor

    def forward(self, batch: Tensor | None) -> tuple[Tensor, Tensor]:
        """Factor and shift [out] by the statistics of `batch` [n, out, h, w], or by the running ones without a batch.

        The biased variance of the batch normalises, and gradients go through both statistics; the unbiased one is averaged.
        """
        if batch is None:
            mean, variance = self.mean, self.variance
        else:
            mean, variance = ChannelMoments.apply(batch.to(self.mean))
            self._average(mean.detach(), variance.detach(), batch.numel() // batch.shape[1])
        factor = self.weight / (variance + self.eps).sqrt()
        return factor, self.bias - factor * mean

    @torch.no_grad()
    def _average(self, mean: Tensor, variance: Tensor, n: int) -> None:
        self.mean.lerp_(mean, STATISTICS_MOMENTUM)
        self.variance.lerp_(variance * (n / max(n - 1, 1)), STATISTICS_MOMENTUM)


class ConventionalNet(nn.Module):
    """A calibrated FixedPointNet in training by the conventional recipe; image bytes [n, 3, h, w] to logits.

    In eval mode it computes the codes of `finish()`. Formats: fractions of activations stay as calibration chose them from sigma in
    real units (the clip level moves the range, and the fraction would cancel out of it), those of weights follow the configured
    rule on the folded weights until `freeze_at`, past `hysteresis`. With quant.format "pact" all follow the published feedback rule
    instead, see `PublishedFormats`. Steps without a batch norm keep their bias. The net's own modules are used, not copied.
    """

    def __init__(self, net: FixedPointNet, config: QuantConfig) -> None:
        super().__init__()
        self.net = net
        self.config = config
        self.norms = nn.ModuleDict()
        for step in self._trained():
            layer = net.layer(step.name)
            norm = dict(layer.named_buffers(recurse=False)).get("norm")
            if norm is not None:
                self.norms[module_key(step.name)] = FoldedNorm(norm, layer.bias.detach())
                layer.bias.requires_grad_(False)
        self.clips = ClipLevels(net)
        self.published = PublishedFormats(net) if config.format == "pact" else None
        self.register_buffer("moves", torch.zeros((), dtype=torch.int64))
        self._last_use = net.plan.last_use()

    moves: Tensor
    """How often a weight format has moved."""

    def _trained(self) -> list[Weighted]:
        return [step for step in self.net.plan.weighted() if not (isinstance(step, ConvStep) and step.fixed)]

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        if self.training and self.published is not None:
            self.published.settle()
        plan, gains = self.net.plan, self.clips.gains()
        env = {IMAGE: plan.encode(images).contiguous(memory_format=torch.channels_last)}
        trained = {step.name for step in self._trained()}
        for index, step in enumerate(plan.steps):
            inputs = [env[name] for name in step.inputs]
            before = self._weighted(step, inputs[0], gains) if step.name in trained else self.net.run_step(step, inputs)
            if self.training and self.published is not None:
                self.published.observe(step, before)
            env[step.name] = self.net.activate(step, before)
            for name in set(step.inputs):
                if self._last_use[name] == index:
                    del env[name]
        return env[plan.output]

    def _weighted(self, step: Step, x: Tensor, gains: Tensor) -> Tensor:
        assert isinstance(step, ConvStep | LinearStep)
        layer = self.net.layer(step.name)
        batch = None
        if self.training and module_key(step.name) in self.norms:
            incoming = layer.weight * self.clips.gain(step.inputs[0], gains)
            batch = convolve(step, x, incoming, None)
        weight, bias = self._folded(step, gains, batch)
        published = self.training and self.published is not None
        if published:
            self._publish_weight_format(step, weight)
        weight, bias = self._fitting(step, weight, bias)
        if not published:  # there, biases are rounded in evaluation only
            bias = RoundToGrid.apply(bias, power_of_two(layer.bias_frac))
        return convolve(step, x, layer.weight_quant(weight), bias)

    def _folded(self, step: Weighted, gains: Tensor, batch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight and bias with batch norm and gains, before rounding: W * factor * eta_in / eta_out and shift / eta_out."""
        layer = self.net.layer(step.name)
        taken, given = self.clips.gain(step.inputs[0], gains), self.clips.gain(step.name, gains)
        if module_key(step.name) not in self.norms:
            return layer.weight * (taken / given), layer.bias / given
        factor, shift = self.norms[module_key(step.name)](batch)
        return layer.weight * (factor * (taken / given)).view(-1, 1, 1, 1), shift / given

    def _fitting(self, step: Weighted, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Projected to what quant.accumulator_bits allows; the gradient passes unchanged."""
        bits, layer = self.config.accumulator_bits, self.net.layer(step.name)
        if bits == a2q.UNLIMITED:
            return weight, bias
        fmt = self.net.format(step.inputs[0])
        fit_weight, fit_bias = a2q.projected(weight, bias, layer.body.frac, layer.bias_frac, fmt, bits)
        return _Replace.apply(weight, fit_weight), _Replace.apply(bias, fit_bias)

    # --- formats -----------------------------------------------------------------------------------------------------

    def before_step(self, step: int, total: int) -> None:
        """The training loop's hook, called before each forward pass of training; `step` counts from 0."""
        moving = self.published is None and self.config.accumulator_bits == a2q.UNLIMITED
        if moving and step % self.config.update_every == 0 and step < math.floor(self.config.freeze_at * total):
            self._follow_weights()

    @torch.no_grad()
    def _follow_weights(self) -> None:
        """Weight formats by the rule on the folded weights; the running statistics in them are the average over steps."""
        for name, weight in self._folded_weights():
            old = self.net.weight_fracs(name)
            values = weight.cpu().double().numpy()
            parts = list(values) if len(old) > 1 else [values]
            rule, margin = rule_of(self.config), 2.0**self.config.hysteresis
            fmt = weight_format(0)
            new = [
                min(max(frac, propose_weight(part * margin, fmt, rule)), propose_weight(part / margin, fmt, rule))
                for frac, part in zip(old, parts, strict=True)
            ]
            self.net.set_weight_fracs(name, tuple(new))
            self.moves += int(self.net.weight_fracs(name) != old)

    def _publish_weight_format(self, step: Weighted, weight: Tensor) -> None:
        """Weight format of this forward pass by the published rule, in the published range."""
        fmt, values = weight_format(0), weight.detach().cpu().double().numpy()
        parts = list(values) if self.net.layer(step.name).body.frac.ndim else [values]
        self.net.set_weight_fracs(step.name, tuple(published_limit(propose_weight(part, fmt, "std"), fmt) for part in parts))

    @torch.no_grad()
    def _folded_weights(self) -> Iterator[tuple[str, Tensor]]:
        gains = self.clips.gains()
        for step in self._trained():
            yield step.name, self._folded(step, gains)[0]

    def train(self, mode: bool = True) -> "ConventionalNet":
        """Training or evaluation mode; evaluation puts averaged formats in force where the published rule runs."""
        super().train(mode)
        if not mode and self.published is not None:
            self.published.settle()
            with torch.no_grad():
                gains = self.clips.gains()
                for step in self._trained():
                    self._publish_weight_format(step, self._folded(step, gains)[0])
        return self

    @torch.no_grad()
    def finish(self) -> FixedPointNet:
        """The trained FixedPointNet, in eval mode: folded weights and biases in its layers, everything trainable again."""
        self.eval()
        gains = self.clips.gains()
        for step in self._trained():
            layer = self.net.layer(step.name)
            weight, bias = self._fitting(step, *self._folded(step, gains))
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
            layer.bias.requires_grad_(True)
        return self.net.eval()


class ChannelMoments(torch.autograd.Function):
    """Mean and biased variance of each channel of [n, c, h, w], in a few passes; `torch.var_mean` takes five times as long on CPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both [c]."""
        mean = x.mean((0, 2, 3))
        ctx.save_for_backward(x, mean)
        return mean, (x - mean[:, None, None]).square_().mean((0, 2, 3))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """(grad of mean + 2 (x - mean) grad of variance) / n."""
        x, mean = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        slope = 2.0 / n * grads[1]
        return torch.addcmul((grads[0] / n - slope * mean)[:, None, None], x, slope[:, None, None])


class _Replace(torch.autograd.Function):
    """The second tensor, with the first one's place in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def convolve(step: Weighted, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A weighted step with other weights than its own; None is a bias of 0."""
    if isinstance(step, LinearStep):
        return F.linear(x, weight, bias)
    top, left, bottom, right = step.padding
    if (top, left) == (bottom, right):  # without a copy of the input
        return F.conv2d(x, weight, bias, step.stride, (top, left), step.dilation, step.groups)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, step.stride, 0, step.dilation, step.groups)
