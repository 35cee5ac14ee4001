"""Write the golden cases and show what changed; run as `python -m tests.golden.regenerate`.

Expected values come from tests/naive.py, not from the package: whole numbers and fractions in plain Python.
"""

import difflib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgeft
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import Conv, GlobalPool, IntegerGraph, MaxPool, Tensor
from tests import naive
from tests.graphs import GraphBuilder, random_images

CASES = Path(__file__).parent / "cases"


def cases() -> dict[str, dict[str, Any]]:
    """Every case by file name without its ending."""
    halves = [acc + delta for acc in (-1026, -514, -506, -10, -6, -2, 2, 6, 10, 506, 510, 1018, 1022) for delta in (-1, 0, 1)]
    return {
        "requantize-u8": _requantize("halves of both signs, saturation at 0 and 255", "u8.4", 2, halves, relu=True),
        "requantize-s8": _requantize("negative halves, saturation at -128 and 127", "s8.4", 2, halves, relu=False),
        "requantize-s8-relu": _requantize("the s8 profile after a ReLU: 0 to 127", "s8.4", 2, halves, relu=True),
        "requantize-zero-shift": _requantize("no rounding, both saturations", "s8.0", 0, [-129, -128, -1, 0, 127, 128], relu=False),
        "requantize-left-shift": _requantize("multiplication by 8", "s8.9", -3, [-17, -16, -1, 0, 1, 15, 16], relu=False),
        "requantize-limits": _requantize("ends of 32 bits, longest shift", "s8.0", 31, [-(2**31), -(2**30), 2**30, 2**31 - 1], relu=False),
        "conv-asymmetric-padding": _graph("s8.7 image, stride 2, padding below and right only, both signs", _asymmetric(), 1),
        "conv-per-channel": _graph("depthwise with multiplier, one shift per output channel", _per_channel(), 2),
        "add-mixed": _graph("unsigned and signed branch with different fractions", _mixed_addition(), 3),
        "mul-gate": _graph("product of two signed tensors, then a gate of one unsigned code per channel", _gate(), 6),
        "lookup": _graph("random tables, signed to unsigned to signed, on a map and on a vector", _tables(), 7),
        "moves": _graph("rectified beside signed codes, a shuffle, a slice, enlargement by 2 and 3", _moves(), 8),
        "pools": _graph("max-pool whose padding meets only negative codes, then global pool and logits", _pools(), 4),
    }


def text(case: dict[str, Any]) -> str:
    """A case as it is stored: one line per top-level key."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in case.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    """Rewrite the files; print a diff of each that changed."""
    found = cases()
    for stale in sorted(path for path in CASES.glob("*.json") if path.stem not in found):
        print(f"no longer generated: {stale.name}")
    for name, case in found.items():
        path = CASES / f"{name}.json"
        before = path.read_text() if path.is_file() else ""
        sys.stdout.writelines(
            difflib.unified_diff(before.splitlines(True), text(case).splitlines(True), f"a/{path.name}", f"b/{path.name}")
        )
        path.write_text(text(case))


def _provenance(purpose: str, seed: int) -> dict[str, Any]:
    generator, reference = "tests/golden/regenerate.py", "tests/naive.py"
    return {"purpose": purpose, "generator": generator, "reference": reference, "edgeft": edgeft.__version__, "seed": seed}


def _requantize(purpose: str, fmt: str, shift: int, acc: list[int], *, relu: bool) -> dict[str, Any]:
    parsed = FixedPointFormat.parse(fmt)
    codes = [naive.requantize(each, parsed.frac + shift, parsed, relu) for each in acc]
    provenance = _provenance(purpose, 0)
    return {"provenance": provenance, "kind": "requantize", "format": fmt, "shift": shift, "relu": relu, "acc": acc, "codes": codes}


def _graph(purpose: str, graph: IntegerGraph, seed: int) -> dict[str, Any]:
    images = random_images(graph, 3, seed)
    layers = [naive.layers(graph, image) for image in images]
    return {
        "provenance": _provenance(purpose, seed),
        "kind": "graph",
        "graph": graph.to_json(),
        "constants": {name: {"dtype": str(value.dtype), "values": value.tolist()} for name, value in graph.constants.items()},
        "images": images.tolist(),
        "layers": {name: [each[name].tolist() for each in layers] for name in layers[0]},
    }


def _asymmetric() -> IntegerGraph:
    b = GraphBuilder(1, (2, 5, 4), image_format="s8.7")
    b.conv("image", 3, (3, 2), stride=(2, 2), padding=(0, 0, 1, 1), relu=False)
    return b.graph()


def _per_channel() -> IntegerGraph:
    b = GraphBuilder(2, (2, 4, 4), per_channel=True)
    b.conv("image", 4, groups=2)
    return b.graph()


def _mixed_addition() -> IntegerGraph:
    b = GraphBuilder(5, (2, 3, 3), jitter=3)
    b.add(b.conv("image", 3, (1, 1)), b.conv("image", 3, (1, 1), relu=False), relu=False)
    return b.graph()


def _gate() -> IntegerGraph:
    b = GraphBuilder(6, (2, 3, 4), image_format="s8.7", jitter=1)
    product = b.mul("image", b.conv("image", 2, relu=False))
    b.mul(product, b.lookup(b.global_pool("image"), FixedPointFormat.parse("u8.8")))
    return b.graph()


def _tables() -> IntegerGraph:
    b = GraphBuilder(7, (2, 4, 3), image_format="s8.7")
    x = b.lookup(b.lookup("image", FixedPointFormat.parse("u8.6")))
    b.lookup(b.linear(b.flatten(x), 4, wide=False))
    return b.graph()


def _moves() -> IntegerGraph:
    b = GraphBuilder(8, (2, 3, 3))
    shared = FixedPointFormat.parse("s8.5")
    rectified, signed = b.conv("image", 2, fmt=shared), b.conv("image", 3, relu=False, fmt=shared)
    joined = b.concat(rectified, signed, rectified)
    b.resize(b.concat(b.select(joined, (5, 0, 3, 3)), b.select(joined, (1, 2))), (2, 3))
    return b.graph()


def _pools() -> IntegerGraph:
    """A bias of -40000 and small weights keep every code of the convolution below zero."""
    tensors = {
        "image": Tensor("image", (1, 4, 4), FixedPointFormat.parse("u8.8")),
        "conv": Tensor("conv", (2, 4, 4), FixedPointFormat.parse("s8.5")),
        "max": Tensor("max", (2, 3, 3), FixedPointFormat.parse("s8.5")),
        "mean": Tensor("mean", (2, 1, 1), FixedPointFormat.parse("s8.6")),
    }
    weight: NDArray[np.int8] = np.array([37, -53], np.int8).reshape(2, 1, 1, 1)
    ops = (
        Conv("conv", "image", "weight", "bias", (7,), (1, 1), (0, 0, 0, 0), (1, 1), 1, relu=False),
        MaxPool("max", "conv", (2, 2), (2, 2), (1, 1, 1, 1)),
        GlobalPool("mean", "max", 3),
    )
    return IntegerGraph(tensors, ops, "image", constants={"weight": weight, "bias": np.array([-40000, -20000], np.int32)})


if __name__ == "__main__":
    main()
