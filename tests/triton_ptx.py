"""Compile the Triton kernels for a GPU, without one, and print the PTX: python -m tests.triton_ptx 0|1 (formats per channel).

A process of its own: in one that has loaded most of the runtimes there are, Triton's LLVM crashed.
"""

import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from edgeft.kernels import fused_round

SIZES = {"n": "i32", "inner": "i32", "channels": "i32"}
VARIANTS = (
    (fused_round._forward, ("x_at", "out_at", "scale_at", "step_at"), {"LOW": -128.0, "HIGH": 127.0}),
    (fused_round._backward, ("grad_at", "x_at", "out_at", "scale_at"), {"LOWER": 0.0, "UPPER": 255.5}),
    (fused_round._backward, ("grad_at", "x_at", "out_at", "scale_at"), {"LOWER": -128.5, "UPPER": 127.5}),
)

if __name__ == "__main__":
    both = {"PER_CHANNEL": sys.argv[1] == "1", "BLOCK": fused_round.BLOCK}
    for kernel, pointers, constants in VARIANTS:
        constexprs = constants | both
        signature = dict.fromkeys(pointers, "*fp32") | SIZES | dict.fromkeys(constexprs, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
        print(compile(source, target=GPUTarget("cuda", 90, 32), options=fused_round.AS_WRITTEN).asm["ptx"])
