"""The table of 256 entries that stands for an elementwise function in the training graph."""

from typing import Any

import torch
from torch import Tensor, nn

from edgeft.fixedpoint import FixedPointFormat
from edgeft.quant.fakequant import TableLookup
from edgeft.quant.tables import apply_function


class Table(nn.Module):
    """output_gain * function(input_gain * x) for x on the grid of an 8-bit format, read from 256 values that float64 computed.

    The values are not rounded to codes: the quantizer behind does that, as behind every other layer. `tabulate` must be called when
    the format of the input changes. The gradient is the function's own derivative at the code.
    """

    gains: Tensor
    values: Tensor
    slopes: Tensor
    position: Tensor

    def __init__(self, function: str, input_gain: float, output_gain: float) -> None:
        super().__init__()
        self.function = function
        # A buffer, because calibration chooses them: a restored net has them in its own units.
        self.register_buffer("gains", torch.tensor([input_gain, output_gain], dtype=torch.float64))
        self.register_buffer("values", torch.zeros(256))
        self.register_buffer("slopes", torch.zeros(256))
        self.register_buffer("position", torch.zeros(2))  # 2^frac and the lowest code of the input
        self._seen: tuple[Tensor | None, int] = (None, -1)
        self._constants = (1.0, 0)

    def __getstate__(self) -> dict[str, Any]:
        # A copy's buffers count their versions anew, so the copy must not trust what this one has seen.
        return {**self.__dict__, "_seen": (None, -1)}

    def tabulate(self, fmt: FixedPointFormat) -> None:
        """Fill the table for inputs of an 8-bit format."""
        codes = torch.arange(fmt.min_code, fmt.max_code + 1, dtype=torch.float64)
        input_gain, output_gain = self.gains.tolist()
        with torch.enable_grad():
            x = (codes * fmt.step).requires_grad_()
            y = output_gain * apply_function(self.function, input_gain * x)
            (slopes,) = torch.autograd.grad(y.sum(), x)
        self.values.copy_(y.detach())
        self.slopes.copy_(slopes)
        self.position.copy_(torch.tensor([2.0**fmt.frac, float(fmt.min_code)]))

    def forward(self, x: Tensor) -> Tensor:
        """Values of the function, not rounded to codes."""
        if self._seen[0] is not self.position or self._seen[1] != self.position._version:
            self._constants = (float(self.position[0]), int(self.position[1]))
            self._seen = (self.position, self.position._version)
        out: Tensor = TableLookup.apply(x, *self._constants, self.values, self.slopes)
        return out
