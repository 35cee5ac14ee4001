"""verify(): what it compares, how it says what differs, and what it refuses to look at."""

import dataclasses
import importlib.util
import json
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors import numpy as safetensors

from edgeft.artifact import Artifact
from edgeft.cli import main
from edgeft.errors import ArtifactError, EdgeftError
from edgeft.export import TARGETS, trt_check
from edgeft.export.inputs import hard_inputs
from edgeft.export.onnx_qdq import OnnxTarget
from edgeft.export.verify import BATCH
from edgeft.exporting import export
from edgeft.graph import Conv, IntegerGraph
from edgeft.interpret import Interpreter
from edgeft.runner import Images
from edgeft.verifying import Checked, Verification, verify
from tests.exports import N_GOLDEN, plain_net, rewrite, write_run
from tests.graphs import GraphBuilder

NAMES = {"onnx": "onnx", "onnx-int": "onnx-int", "trt": "trt (in ONNX Runtime)"}
"""Targets, and the runtime that each is verified in everywhere; OpenVINO and GPUs may join where they are."""
N, SEED = 40, 7
Codes = dict[str, NDArray[np.int64]]


@pytest.fixture(scope="module")
def exported_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("verifying") / "run"
    write_run(run, plain_net())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt_check, "available", lambda: False)
        export(run, sorted(NAMES), evaluate=False)
    return run


@pytest.fixture
def run(exported_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(exported_run, tmp_path / "run"))


class Fake:
    """A runtime that is right, but for what `change` does to the layers of each batch and `shift` adds to the logits."""

    name = "fake"

    def __init__(self, graph: IntegerGraph, change: Callable[[int, Codes], None] = lambda _, __: None, shift: float = 0.0) -> None:
        self.images: list[Images] = []
        self._interpreter, self._change, self._shift = Interpreter(graph), change, shift

    def layers(self, images: Images) -> Codes:
        self.images.append(images)
        codes = {name: each.copy() for name, each in self._interpreter.layers(images).items()}
        self._change(len(self.images), codes)
        return codes

    def logits(self, images: Images) -> Any:
        wrong = (images == images[:, :1, :1, :1]).all((1, 2, 3))  # grey images only
        return self._interpreter.logits(images) + np.where(wrong, self._shift, 0).astype(np.float32)[:, None]


def use(monkeypatch: pytest.MonkeyPatch, *runtimes: Fake) -> None:
    """Let the target "onnx" have these runtimes."""
    monkeypatch.setattr(OnnxTarget, "runtimes", lambda *_: list(runtimes))


def checked_in(found: Verification, name: str) -> Checked:
    return next(each for each in found.checked if each.runner == name)


def error_of(call: Callable[[], object], kind: type[EdgeftError] = ArtifactError) -> tuple[str, str]:
    with pytest.raises(kind) as caught:
        call()
    return caught.value.message, caught.value.hint


def size_of(graph: IntegerGraph, names: Iterable[str] | None = None) -> int:
    """Codes for one image, in some or all tensors."""
    return sum(int(np.prod(graph.tensors[name].shape)) for name in names or graph.tensors)


# Exact


def test_every_export_is_exact_in_every_runtime(exported_run: Path) -> None:
    found = verify(exported_run, n=N, seed=SEED)
    assert found.exact
    by_target = {target: [each for each in found.checked if each.export.name == target] for target in NAMES}
    assert {target: checked[0].runner for target, checked in by_target.items()} == NAMES
    if importlib.util.find_spec("openvino"):
        assert "trt (in OpenVINO)" in [each.runner for each in by_target["trt"]]
    for each in found.checked:
        codes = N * size_of(Artifact.load(each.export).graph())
        assert (each.images, each.codes, each.logits_differ, each.differing) == (N, codes, 0, {})
        assert each.line() == f"exact: 0 of {codes:,} codes differ"


def test_the_lines_say_on_what_and_in_what(exported_run: Path) -> None:
    found = verify(exported_run, ["onnx-int", "onnx"], n=N, seed=SEED)
    width = max(len(each.runner) for each in found.checked)
    expected = []
    for target in ("onnx-int", "onnx"):
        path = exported_run / "export" / target
        graph = Artifact.load(path).graph()
        summary = hard_inputs(graph, Artifact.load(path).samples()["images"], N, SEED).summary
        assert summary == f"{N_GOLDEN} golden, 36 adversarial, 0 random"
        expected.append(f"{path}: {summary}; seed {SEED}; {found.ties[str(path)]:,} sums were ties")
        line = f"exact: 0 of {N * size_of(graph):,} codes differ"
        expected += [f"  {each.runner:{width}}  {line}" for each in found.checked if each.export == path]
    assert found.lines() == expected
    assert all(n > 0 for n in found.ties.values())


def test_ties_are_counted_once_however_many_runtimes_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    b = GraphBuilder(1, (3, 8, 8))
    b.linear(b.flatten(b.conv("image", 6, (1, 1))), 5)
    graph = b.graph()
    artifact = write_run(tmp_path / "run", graph)
    export(artifact.path, ["onnx"], evaluate=False)
    use(monkeypatch, Fake(graph), Fake(graph), Fake(graph))
    images = hard_inputs(graph, artifact.samples()["images"], 50, SEED).all
    weight, bias = graph.constants["conv0.weight"][:, :, 0, 0].astype(float), graph.constants["conv0.bias"].astype(float)
    sums = np.einsum("oi,nihw->nohw", weight, images.astype(float)) + bias[:, None, None]
    between = (sums / 2.0 ** int(graph.shift(graph.ops[0])[0])) % 1 == 0.5
    found = verify(artifact.path, n=50, seed=SEED)
    assert list(found.ties.values()) == [between.sum()]
    assert between.sum() > 100


def test_an_export_is_verified_away_from_its_run(exported_run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(exported_run / "export" / "onnx", tmp_path / "alone"))
    found = verify(alone, n=10, seed=SEED)
    assert found.exact
    assert {each.export for each in found.checked} == {alone}
    assert verify(alone, ["onnx"], n=1, seed=SEED).inputs == {str(alone): "1 golden, 0 adversarial, 0 random"}


def test_the_command_prints_lines_or_json_and_ends_with_0(
    exported_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--target", "onnx", "--n", "12", "--seed", "3"]
    assert main(["verify", str(exported_run), *arguments]) == 0
    found = verify(exported_run, ["onnx"], n=12, seed=3)
    assert capsys.readouterr().out.splitlines() == found.lines()
    assert main(["verify", str(exported_run), *arguments, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree == found.to_json()
    assert (tree["exact"], tree["seed"]) == (True, 3)
    assert tree["checked"][0] == {
        "export": str(exported_run / "export" / "onnx"), "runner": "onnx", "exact": True, "images": 12,
        "codes": 12 * size_of(plain_net()), "logits_differ": 0, "differing": [],
    }  # fmt: skip
    shutil.copytree(exported_run, tmp_path / "runs" / "latest")
    monkeypatch.chdir(tmp_path)
    assert main(["verify", *arguments]) == 0
    assert capsys.readouterr().out.startswith("runs/latest/export/onnx: 4 golden, 8 adversarial, 0 random; seed 3; ")


# Seeds


def test_a_seed_repeats_the_images(exported_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_at(seed: int | None) -> tuple[Images, int]:
        use(monkeypatch, fake := Fake(plain_net()))
        found = verify(exported_run, ["onnx"], n=N + 20, seed=seed)
        return np.concatenate(fake.images), found.seed

    (first, seed), (again, _), (other, _) = looked_at(7), looked_at(7), looked_at(8)
    assert seed == 7
    assert len(first) == N + 20
    np.testing.assert_array_equal(first, again)
    assert (first[-10:] != other[-10:]).any((1, 2, 3)).all()
    np.testing.assert_array_equal(first[:N_GOLDEN], other[:N_GOLDEN])
    monkeypatch.setattr(secrets, "randbits", lambda bits: bits - 23)
    drawn, seed = looked_at(None)
    assert seed == 8, "a new seed is in the result"
    np.testing.assert_array_equal(drawn, other)


# Differences


def change_weight(export: Path, layer: str) -> IntegerGraph:
    """Change one weight of a layer in model.onnx, and in the graph that is returned."""
    model, graph = onnx.load(export / "model.onnx"), Artifact.load(export).graph()
    (stored,) = (each for each in model.graph.initializer if each.name == f"{layer}/weight/codes")
    weight = onnx.numpy_helper.to_array(stored).copy()
    weight.flat[4] = -100 if weight.flat[4] > 0 else 100
    stored.CopyFrom(onnx.numpy_helper.from_array(weight, stored.name))
    rewrite(export, "model.onnx", model.SerializeToString())
    changed = graph.constants[f"{layer}.weight"].copy()
    changed.flat[4] = weight.flat[4]
    return dataclasses.replace(graph, constants={**graph.constants, f"{layer}.weight": changed})


@pytest.mark.parametrize("target", ["onnx", "trt"])
def test_one_wrong_weight_is_found_and_located(run: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "export" / target
    right = Artifact.load(path).graph()
    layer = [op.output for op in right.ops if isinstance(op, Conv)][-2]
    wrong = change_weight(path, layer)
    images = hard_inputs(right, Artifact.load(path).samples()["images"], N, SEED).all
    expected, found = Interpreter(right).layers(images), Interpreter(wrong).layers(images)
    distance = {name: np.abs(expected[name] - found[name]) for name in expected}
    differing = [name for name in distance if distance[name].any()]
    n, of, largest = np.count_nonzero(distance[layer]), distance[layer].size, distance[layer].max()
    assert differing[0] == layer
    assert main(["verify", str(run), "--target", target, "--n", str(N), "--seed", str(SEED)]) == 1
    header, *lines = capsys.readouterr().out.splitlines()
    text = f"DIFFERS: first in layer '{layer}', in {n:,} of {of:,} codes by up to {largest}; in {len(differing)} layers in all"
    assert header.startswith(f"{path}: 4 golden, ")
    assert lines
    for line in lines:
        assert line.endswith(f"  {text}")
    result = verify(path, n=N, seed=SEED)
    assert not result.exact
    (first, *_) = checked_in(result, NAMES[target]).to_json()["differing"]
    assert first == {"layer": layer, "differing": n, "largest": largest, "of": of}
    json.dumps(result.to_json())


def test_other_exports_of_the_run_stay_exact(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_weight(run / "export" / "onnx", "conv1")
    found = verify(run, ["onnx", "onnx-int"], n=20, seed=SEED)
    assert [each.exact for each in found.checked if each.export.name == "onnx-int"] == [True]
    assert not any(each.exact for each in found.checked if each.export.name == "onnx")
    assert not found.exact
    assert main(["verify", str(run), "--n", "20", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["exact"] is False


def test_counts_are_of_all_images_and_layers_are_in_order(exported_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late layer differs in the first batch, an early one in the second only."""
    graph = plain_net()

    def change(batch: int, codes: Codes) -> None:
        if batch == 1:
            codes["conv2"][0, 0, 0, 0] += 2
        if batch == 2:
            codes["conv1"][0, 0, 0, :2] -= 3

    use(monkeypatch, Fake(graph, change))
    n = 2 * BATCH + 5
    (found,) = verify(exported_run, ["onnx"], n=n, seed=SEED).checked
    size = {name: size_of(graph, [name]) for name in graph.tensors}
    assert found.line() == f"DIFFERS: first in layer 'conv1', in 2 of {n * size['conv1']:,} codes by up to 3; in 2 layers in all"
    assert [vars(each) for each in found.differing.values()] == [
        {"layer": "conv1", "differing": 2, "largest": 3, "of": n * size["conv1"]},
        {"layer": "conv2", "differing": 1, "largest": 2, "of": n * size["conv2"]},
    ]


def test_differences_add_up_over_batches(exported_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(batch: int, codes: Codes) -> None:
        codes["conv0"][:, 0, 0, 0] += batch

    use(monkeypatch, Fake(plain_net(), change))
    (found,) = verify(exported_run, ["onnx"], n=2 * BATCH, seed=SEED).checked
    assert (found.differing["conv0"].differing, found.differing["conv0"].largest) == (2 * BATCH, 2)


def test_logits_that_only_differ_when_no_layer_is_shown(
    exported_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, Fake(plain_net(), shift=0.5), Fake(plain_net()))
    found = verify(exported_run, ["onnx"], n=N, seed=SEED)
    wrong, right = found.checked
    assert (wrong.exact, right.exact, found.exact) == (False, True, False)
    n = wrong.logits_differ
    assert 4 <= n < N
    assert wrong.line() == f"DIFFERS: logits of {n} images, although every layer is equal when it is shown"
    assert wrong.to_json()["logits_differ"] == n
    assert main(["verify", str(exported_run), "--target", "onnx", "--n", str(N), "--seed", str(SEED)]) == 1
    assert f"logits of {n} images" in capsys.readouterr().out


def test_a_layer_that_is_not_shown_is_a_failure(
    exported_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, Fake(plain_net(), lambda _, codes: codes.__delitem__("conv1")))
    assert main(["verify", str(exported_run), "--target", "onnx", "--n", "5"]) == 1
    assert capsys.readouterr().err.endswith("error: fake does not show layer 'conv1' of interpreter\n")


# Refusals


def test_a_run_without_exports_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_run(run, plain_net())
    assert error_of(lambda: verify(run)) == (f"the run '{run}' has no export; it has none", f"edgeft export {run} --target onnx")
    assert main(["verify", str(run)]) == 2
    assert capsys.readouterr().err == f"error: the run '{run}' has no export; it has none\n  edgeft export {run} --target onnx\n"


def test_a_target_that_was_not_exported_is_named(run: Path) -> None:
    shutil.rmtree(run / "export" / "trt")
    message, hint = error_of(lambda: verify(run, ["onnx", "trt"]))
    assert message == f"the run '{run}' has no export to 'trt'; it has onnx, onnx-int"
    assert hint == f"edgeft export {run} --target trt"


def test_an_export_to_another_target_is_not_taken(exported_run: Path) -> None:
    path = exported_run / "export" / "onnx"
    assert error_of(lambda: verify(path, ["trt"])) == (f"'{path}' is an export to 'onnx', not to 'trt'", "")
    assert error_of(lambda: verify(path, ["trt", "c"]))[0] == f"'{path}' is an export to 'onnx', not to 'trt', 'c'"


def test_an_export_of_another_run_is_not_taken(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_run(other, plain_net(1))
    shutil.copytree(run / "export", other / "export")
    message, hint = error_of(lambda: verify(other, ["onnx"]))
    assert message == f"'{other / 'export' / 'onnx'}' was exported from another run than '{other}'"
    assert hint == f"edgeft export {other} --target onnx makes it again"
    assert verify(other / "export" / "onnx", n=2).exact, "as an export of its own it is whole"


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors", "graph.json"])
def test_an_edited_file_is_not_looked_at(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "export" / "onnx" / name
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    text = f"'{file}' was changed after it was written: its hash is not the one in the manifest"
    for path in (run, file.parent):
        assert error_of(lambda path=path: verify(path, n=2)) == (text, "restore the file, or make the artifact again")  # type: ignore[misc]
    assert main(["verify", str(run), "--target", "onnx"]) == 2
    assert capsys.readouterr().err == f"error: {text}\n  restore the file, or make the artifact again\n"


def test_recorded_logits_that_this_interpreter_does_not_give_are_an_error(run: Path) -> None:
    path = run / "export" / "onnx"
    samples = Artifact.load(path).samples()
    samples["layer:linear5"][-1, 0] += 1
    rewrite(path, "samples.safetensors", safetensors.save(samples))
    assert error_of(lambda: verify(run, n=2)) == (
        f"'{path}': the interpreter of this version does not give the logits that were recorded",
        "",
    )


def test_unknown_targets_are_refused_with_the_known_ones(exported_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = ", ".join(TARGETS.names())
    assert main(["verify", str(exported_run), "--target", "tr"]) == 2
    assert capsys.readouterr().err == f"error: unknown export target 'tr'\n  known export targets: {known}\n  did you mean: trt\n"
