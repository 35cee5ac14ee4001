"""The training graph as a LayerRunner: what quantization-aware training computes in eval mode, as integers."""

from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray

from edgeft.errors import VerificationError
from edgeft.quant.net import FixedPointNet
from edgeft.runner import Images, Logits


def _exact_sums() -> AbstractContextManager[None]:
    """On GPUs, convolutions by matrix products: cuDNN may pick a Winograd algorithm, whose transformed sums are not exact in float32."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=False)
    return flags


class TrainingGraph:
    """LayerRunner over a FixedPointNet: what the QAT model computes in eval mode, as integers."""

    name = "fixed point"

    def __init__(self, net: FixedPointNet) -> None:
        self.net = net.eval()
        self.device = next(net.buffers()).device

    def logits(self, images: Images) -> Logits:
        """Scores of a batch."""
        with torch.inference_mode(), _exact_sums():
            out: Logits = self.net(torch.from_numpy(images).to(self.device)).float().cpu().numpy()
        return out

    def layers(self, images: Images) -> dict[str, NDArray[np.int64]]:
        """Codes of every tensor. Raises VerificationError when a value is not on the grid of its format."""
        net, codes = self.net, {}
        with torch.inference_mode(), _exact_sums():
            for name, value in net.tensors(torch.from_numpy(images).to(self.device)):
                last = net.plan[name] if name == net.plan.output else None
                frac = net.frac(last.inputs[0]) + net.weight_fracs(name)[0] if last is not None else net.frac(name)
                scaled = value.double() * 2.0**frac
                if not torch.equal(scaled, scaled.round()):
                    raise VerificationError(f"layer '{name}': {self.name} gives values that are no multiples of 2^-{frac}")
                codes[name] = scaled.to(torch.int64).cpu().numpy()
        return codes
