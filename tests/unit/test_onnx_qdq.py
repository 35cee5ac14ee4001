import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edgeft.artifact import Artifact, write_artifact
from edgeft.errors import ArtifactError, UnsupportedError, VerificationError
from edgeft.export import TARGETS, onnx_qdq, ort_runner
from edgeft.export.onnx_nodes import AVX2_PRECISION_KEY, TENSORS_KEY, StoredTensor
from edgeft.export.onnx_qdq import OPSET, TARGET, build_model, check_fusion
from edgeft.export.ort_runner import Fusion, OnnxRunner, fusion, lacks_vnni, with_layer_outputs
from edgeft.export.verify import verify
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import IntegerGraph, Profile
from edgeft.interpret import Interpreter
from tests.graphs import GraphBuilder, random_images, residual_net

RESIDUAL_NET = {"QGemm": 1, "QLinearAdd": 2, "QLinearConv": 7}


def write_run(path: Path, graph: IntegerGraph, wrong: int = 0) -> Artifact:
    """A quantized artifact; `wrong` is added to the recorded logits."""
    images = random_images(graph, 20)
    logits = Interpreter(graph).layers(images)[graph.output] + wrong
    return write_artifact(
        path,
        kind="quantized",
        config={},
        seed=0,
        preprocessing={"size": 12},
        classes=("ant", "bee", "cat", "dog", "eel"),
        arrays={"weights.safetensors": graph.constants, "samples.safetensors": {"images": images, f"layer:{graph.output}": logits}},
        documents={"graph.json": graph.to_json()},
    )


def save(graph: IntegerGraph, path: Path) -> Path:
    path.write_bytes(build_model(graph).SerializeToString())
    return path


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_everything_fuses_and_every_layer_is_equal(profile: Profile, per_channel: bool, tmp_path: Path) -> None:
    graph = residual_net(3, profile=profile, per_channel=per_channel, image_format="s8.7" if per_channel else "u8.8", jitter=2)
    model = build_model(graph)
    found = fusion(model)
    check_fusion(graph, found)
    assert {name: n for name, n in found.operators.items() if name.startswith("Q")} == RESIDUAL_NET
    path = save(graph, tmp_path / "model.onnx")
    images = random_images(graph, 33)
    assert verify(Interpreter(graph), OnnxRunner(path, 1), images) == 33
    assert verify(Interpreter(graph), OnnxRunner(path, 1, optimise=False), images) == 33


@pytest.mark.parametrize("profile", ["u8", "s8"])
def test_showing_every_layer_does_not_undo_fusion(profile: Profile) -> None:
    model = build_model(residual_net(0, profile=profile))
    tensors = [StoredTensor.from_json(tree) for tree in json.loads(metadata(model)[TENSORS_KEY])]
    found = fusion(with_layer_outputs(model, tensors))
    assert found.in_float == ()
    assert {name: n for name, n in found.operators.items() if name.startswith("Q")} == RESIDUAL_NET


def test_the_file_is_what_the_readme_says() -> None:
    model = build_model(residual_net(0), {"edgeft.artifact": "abc"})
    assert [each.version for each in model.opset_import] == [OPSET]
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, image.type.tensor_type.elem_type) == ("images", onnx.TensorProto.UINT8)
    assert (logits.name, logits.type.tensor_type.elem_type) == ("logits", onnx.TensorProto.FLOAT)
    for value, rest in ((image, [3, 12, 12]), (logits, [5])):
        batch, *sizes = value.type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        assert [size.dim_value for size in sizes] == rest
    assert {node.op_type for node in model.graph.node} == {
        "Add", "Cast", "Conv", "DequantizeLinear", "Flatten", "Gemm", "MaxPool", "QuantizeLinear",
    }  # fmt: skip
    stored = metadata(model)
    assert stored["session.x64quantprecision"] == "1"
    assert (stored["edgeft.profile"], stored["edgeft.rounding"], stored["edgeft.residual"]) == ("u8", "half_even", "branch")
    assert stored["edgeft.artifact"] == "abc"


def test_every_scale_is_a_power_of_two_and_every_bias_an_integer() -> None:
    model = build_model(residual_net(0, per_channel=True))
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    steps = [value for name, value in constants.items() if name.endswith("/step")]
    assert len(steps) > 20
    assert all(np.all(np.frexp(step)[0] == 0.5) for step in steps)
    assert all(value.dtype == np.int32 for name, value in constants.items() if name.endswith("/bias/codes"))
    assert all(value.dtype == np.int8 for name, value in constants.items() if name.endswith("/weight/codes"))


def test_any_batch_size_runs(tmp_path: Path) -> None:
    graph = residual_net(1)
    runner = OnnxRunner(save(graph, tmp_path / "model.onnx"), 1)
    images = random_images(graph, 7)
    assert np.array_equal(runner.logits(images)[3:4], runner.logits(images[3:4]))


def test_a_net_that_ends_in_8_bits_or_flattens_its_logits_is_exact(tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 4, 4))
    narrow = b.conv("image", 4)
    graph = b.graph()
    assert verify(Interpreter(graph), OnnxRunner(save(graph, tmp_path / "narrow.onnx"), 1), random_images(graph, 5)) == 5
    b.flatten(b.linear(b.flatten(narrow), 3))
    graph = b.graph()
    assert verify(Interpreter(graph), OnnxRunner(save(graph, tmp_path / "flat.onnx"), 1), random_images(graph, 5)) == 5


def tables_and_moves(profile: Profile, seed: int) -> IntegerGraph:
    """A table before an addition, a gate, a choice, an enlargement, a concatenation and a table before a convolution."""
    b = GraphBuilder(seed, (3, 12, 12), profile=profile, per_channel=bool(seed % 2))
    x = b.max_pool(b.conv("image", 8))
    x = b.add(x, b.conv(b.lookup(x), 8))
    gate = b.lookup(b.conv(b.global_pool(x), 8, (1, 1), relu=False), FixedPointFormat(8, 8 if profile == "u8" else 7, profile == "s8"))
    x = b.resize(b.select(b.mul(x, gate), (3, 1, 0, 2)), (2, 2))
    x = b.conv(b.concat(x, b.select(x, (1, 2))), 8, relu=False)
    return b.head(b.conv(b.lookup(x), 8), 5)


@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("net", ["residual", "tables"])
def test_openvino_gives_the_same_logits(net: str, seed: int, profile: Profile, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    from edgeft.export.openvino_runner import OpenVinoRunner

    graph = tables_and_moves(profile, seed) if net == "tables" else residual_net(seed, profile=profile, per_channel=bool(seed))
    path, images = save(graph, tmp_path / "model.onnx"), random_images(graph, 16)
    check_fusion(graph, fusion(onnx.load(path)))
    expected = Interpreter(graph).logits(images)
    runner = OpenVinoRunner(path, 1)
    np.testing.assert_array_equal(runner.logits(images), expected)  # of the file as it is: showing tensors changes what is fused
    np.testing.assert_array_equal(OnnxRunner(path, 1).logits(images), expected)
    assert verify(Interpreter(graph), runner, images) == 16
    if net == "residual":
        found = runner.executes()
        assert (found.operators["Convolution"], found.operators["FullyConnected"], found.in_float) == (7, 1, ())


SIGNALLED = """
import signal, subprocess, sys
from pathlib import Path
import numpy as np
from edgeft.export.openvino_runner import OpenVinoRunner
for _ in range(2):
    OpenVinoRunner(Path(sys.argv[1])).logits(np.zeros((1, 3, 12, 12), np.uint8))
signal.signal(signal.SIGCHLD, lambda *_: print("told"))
subprocess.run(["true"])
"""


def test_a_signal_after_openvino_has_run_does_no_harm(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    command = [sys.executable, "-c", SIGNALLED, str(save(residual_net(0), tmp_path / "model.onnx"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr


@pytest.mark.parametrize("fmt", ["s8.7", "u8.7"])
def test_a_pixelwise_layer_of_few_channels_is_spread_over_many(fmt: str, tmp_path: Path) -> None:
    for per_channel in (False, True):
        b = GraphBuilder(1, (3, 10, 12), per_channel=per_channel)
        x = b.conv("image", 3, (1, 1), groups=3, relu=fmt[0] == "u", fmt=FixedPointFormat.parse(fmt))
        graph = b.head(b.conv(x, 8), 3)
        model = build_model(graph)
        spread = next(node for node in model.graph.node if node.name == f"{x}/Conv")
        assert {each.name: each.i for each in spread.attribute if each.name == "group"} == {"group": 3 * 60}
        check_fusion(graph, fusion(model))
        assert verify(Interpreter(graph), OnnxRunner(save(graph, tmp_path / "model.onnx"), 1), random_images(graph, 5)) == 5


def test_export_writes_verifies_and_reports(tmp_path: Path) -> None:
    artifact = write_run(tmp_path / "run", residual_net(0))
    target = TARGETS.get("onnx")
    result = target.export(artifact, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
    assert (result.target, result.path) == ("onnx", tmp_path / "out")
    assert result.summary["verified_images"] == 20
    assert result.summary["file_bytes"] == (tmp_path / "out" / "model.onnx").stat().st_size
    assert {name: result.summary["operators"][name] for name in RESIDUAL_NET} == RESIDUAL_NET
    assert result.lines[0].startswith("onnx   exact on 20/20 images, 13 tensors each")
    assert json.loads(json.dumps(result.summary)) == result.summary
    stored = metadata(onnx.load(tmp_path / "out" / "model.onnx"))
    assert stored["edgeft.artifact"] == artifact.digest
    assert json.loads(stored["edgeft.classes"]) == ["ant", "bee", "cat", "dog", "eel"]
    assert json.loads(stored["edgeft.preprocessing"]) == {"size": 12}
    images = artifact.samples()["images"]
    assert np.array_equal(target.load(tmp_path / "out", threads=1).logits(images), Interpreter(artifact.graph()).logits(images))


def test_recorded_codes_that_differ_fail_the_export(tmp_path: Path) -> None:
    artifact = write_run(tmp_path / "run", residual_net(0), wrong=1)
    with pytest.raises(VerificationError, match=r"^layer 'linear11': the exported model does not give the codes recorded in the artifact$"):
        TARGET.export(artifact, tmp_path / "out")


def test_a_wrong_weight_in_the_file_is_located(tmp_path: Path) -> None:
    graph = residual_net(0)
    path = save(graph, tmp_path / "model.onnx")
    constants: dict[str, NDArray[Any]] = {**graph.constants, "conv3.weight": graph.constants["conv3.weight"] // 2}
    with pytest.raises(VerificationError, match=r"^layer 'conv3': onnx differs from interpreter in "):
        verify(Interpreter(dataclasses.replace(graph, constants=constants)), OnnxRunner(path, 1), random_images(graph, 4))


def test_a_layer_left_in_float_is_named(tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 4, 4))
    x = b.conv("image", 4, (4, 4), padding=(0, 0, 0, 0), relu=False)
    conv = b.ops[0]
    wide = dataclasses.replace(b.tensors[x].format, width=32, frac=int(b.graph().shift(conv)[0]) + b.tensors[x].format.frac)
    b.tensors[x] = dataclasses.replace(b.tensors[x], format=wide)
    b.flatten(x)
    with pytest.raises(UnsupportedError, match=r"^ONNX Runtime [\d.]+ leaves nodes in float: .*'conv0/Conv'.*; it lacks 1 QLinearConv$"):
        TARGET.export(write_run(tmp_path / "run", b.graph()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_runtime_that_fuses_nothing_here_is_reported_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_qdq, "fusion", lambda _: Fusion({"Conv": 8}, ("conv0/Conv",)))
    result = TARGET.export(write_run(tmp_path / "run", residual_net(0)), tmp_path / "out")
    assert result.summary["fused"] is False
    assert "this build fuses nothing on this processor" in result.lines[1]


def test_loading_what_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        TARGET.load(tmp_path)
    assert caught.value.message == f"'{tmp_path / 'model.onnx'}' does not exist"
    assert caught.value.hint == "edgeft export RUN --target onnx"


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    model = build_model(residual_net(0))
    del model.metadata_props[:]
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=f"^{re.escape(repr(str(path)))} was not exported by edgeft"):
        OnnxRunner(path)


def test_the_exact_kernels_are_chosen_where_pair_sums_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    for lacking in (True, False):
        monkeypatch.setattr(ort_runner, "lacks_vnni", lambda *_, lacking=lacking: lacking)
        options = ort_runner.session_options(1, optimise=True)
        if lacking:
            assert options.get_session_config_entry(AVX2_PRECISION_KEY) == "1"
        else:
            with pytest.raises(RuntimeError):
                options.get_session_config_entry(AVX2_PRECISION_KEY)


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "expected"),
    [
        ("x86_64", "flags : sse avx2 avx512_vnni", False),
        ("AMD64", "flags : avx_vnni avx2", False),
        ("x86_64", "flags : sse avx2", True),
        ("x86_64", "", True),
        ("aarch64", "Features : asimd asimddp", False),
    ],
)
def test_processors_that_saturate_pair_sums_are_known(machine: str, cpuinfo: str, expected: bool) -> None:
    assert lacks_vnni(machine, cpuinfo) is expected
