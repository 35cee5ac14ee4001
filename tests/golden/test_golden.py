"""Golden cases: the interpreter, ONNX Runtime and the C header give the stored integers. Never edit a case by hand."""

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeft.export.c_bundle import write_bundle
from edgeft.export.c_runner import CRunner
from edgeft.export.onnx_qdq import build_model
from edgeft.export.onnx_writer import zero_points
from edgeft.export.ort_runner import OnnxRunner
from edgeft.fixedpoint import FixedPointFormat, requantize
from edgeft.graph import IntegerGraph
from edgeft.interpret import Interpreter
from tests.golden.regenerate import CASES, cases, text
from tests.native import compile_shared

GOLDEN = {path.stem: json.loads(path.read_text()) for path in sorted(CASES.glob("*.json"))}
ROUNDING = [name for name, case in GOLDEN.items() if case["kind"] == "requantize"]
GRAPHS = [name for name, case in GOLDEN.items() if case["kind"] == "graph"]


def load_graph(case: dict[str, Any]) -> IntegerGraph:
    constants = {name: np.array(each["values"], each["dtype"]) for name, each in case["constants"].items()}
    return IntegerGraph.from_json(case["graph"], constants)


def test_the_files_are_what_the_generator_writes() -> None:
    generated = cases()
    for name, case in GOLDEN.items():
        generated[name]["provenance"]["edgeft"] = case["provenance"]["edgeft"]  # an older version may have written it
    stored = {path.stem: path.read_text() for path in CASES.glob("*.json")}
    assert stored == {name: text(case) for name, case in generated.items()}


@pytest.mark.parametrize("name", ROUNDING)
def test_requantize(name: str) -> None:
    case = GOLDEN[name]
    fmt = FixedPointFormat.parse(case["format"])
    assert requantize(np.array(case["acc"]), case["shift"], fmt, relu=case["relu"]).tolist() == case["codes"]


@pytest.mark.cc
def test_requantize_in_c(tmp_path: Path) -> None:
    source = """#include "edgeft_fixedpoint.h"
    int32_t one(int32_t acc, int32_t shift, int32_t low, int32_t high);
    int32_t one(int32_t acc, int32_t shift, int32_t low, int32_t high) { return edgeft_requantize(acc, shift, low, high); }
    """
    one = compile_shared(source, tmp_path).one
    one.argtypes, one.restype = [ctypes.c_int32] * 4, ctypes.c_int32
    for case in (GOLDEN[name] for name in ROUNDING):
        fmt = FixedPointFormat.parse(case["format"])
        low = 0 if case["relu"] else fmt.min_code
        assert [one(acc, case["shift"], low, fmt.max_code) for acc in case["acc"]] == case["codes"], case["provenance"]["purpose"]


@pytest.mark.parametrize("name", GRAPHS)
def test_graph(name: str, tmp_path: Path) -> None:
    case = GOLDEN[name]
    graph, images = load_graph(case), np.array(case["images"], np.uint8)
    path = tmp_path / "model.onnx"
    path.write_bytes(build_model(graph).SerializeToString())
    for runner in (Interpreter(graph), OnnxRunner(path, 1), OnnxRunner(path, 1, optimise=False)):
        layers = runner.layers(images)
        assert {layer: codes.tolist() for layer, codes in layers.items()} == case["layers"], runner.name


@pytest.mark.cc
@pytest.mark.parametrize("name", GRAPHS)
def test_graph_in_c(name: str, tmp_path: Path, compiler: str) -> None:
    case = GOLDEN[name]
    graph, images = load_graph(case), np.array(case["images"], np.uint8)
    write_bundle(graph, images, tmp_path)
    layers = CRunner(tmp_path).layers(images)
    assert {layer: codes.tolist() for layer, codes in layers.items()} == case["layers"]


def test_the_cases_cover_the_edges() -> None:
    codes = [code for name in ROUNDING for code in GOLDEN[name]["codes"]]
    assert {-128, 0, 127, 255} <= set(codes)
    pools = GOLDEN["pools"]["layers"]
    assert np.max(pools["conv"]) < 0
    assert np.max(pools["max"]) < 0
    mixed = GOLDEN["add-mixed"]
    left, right = (load_graph(mixed).format(name) for name in ("conv0", "conv1"))
    assert (left.signed, right.signed) == (False, True)
    assert left.frac != right.frac
    products = GOLDEN["mul-gate"]["layers"]
    assert {-128, 127} <= {code for layer in products.values() for code in np.ravel(layer).tolist()}
    moves = load_graph(GOLDEN["moves"])
    assert zero_points(moves)["conv0"] == 128
    assert np.min(GOLDEN["moves"]["layers"]["conv0"]) == 0
