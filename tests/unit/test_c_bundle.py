"""Target c: the bundle gives the integers of the interpreter, builds without a warning, and needs nothing but a compiler."""

import ctypes
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeft import kernels
from edgeft.errors import ArtifactError, MissingExtraError, UnsupportedError, VerificationError
from edgeft.export import TARGETS, c_build
from edgeft.export.c_bundle import TARGET, write_bundle
from edgeft.export.c_runner import CRunner
from edgeft.export.verify import verify
from edgeft.fixedpoint import FixedPointFormat
from edgeft.graph import IntegerGraph
from edgeft.interpret import Interpreter
from tests.c_bundles import COMPILERS, need, run, write
from tests.exports import every_op, plain_net, wide_net, write_run
from tests.graphs import GraphBuilder, mobilenet_v2, random_images, residual_net, resnet18
from tests.native import STRICT

pytestmark = pytest.mark.cc

STATUS = {"null": 1, "misaligned": 2, "too small": 3}


@pytest.fixture(autouse=True)
def _needs_a_compiler(compiler: str) -> None:
    """Every test here builds something."""


def check_exact(graph: IntegerGraph, folder: Path, n: int = 6) -> CRunner:
    """Write, build and compare every tensor with the interpreter."""
    runner = CRunner(write(graph, folder, 1))
    assert verify(Interpreter(graph), runner, random_images(graph, n)) == n
    return runner


# Exactness


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("image_format", ["u8.8", "s8.7"])
@pytest.mark.parametrize("profile", ["u8", "s8"])
@pytest.mark.parametrize("make", [residual_net, every_op, wide_net, plain_net])
def test_every_tensor_is_that_of_the_interpreter(
    make: Callable[..., IntegerGraph], profile: str, image_format: str, per_channel: bool, tmp_path: Path
) -> None:
    check_exact(make(3, profile=profile, image_format=image_format, per_channel=per_channel), tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_shifts_to_the_left_and_far_to_the_right(seed: int, tmp_path: Path) -> None:
    check_exact(residual_net(seed, jitter=9, per_channel=bool(seed % 2)), tmp_path)


@pytest.mark.parametrize("make", [mobilenet_v2, pytest.param(resnet18, marks=pytest.mark.slow)])
def test_networks_of_realistic_depth(make: Callable[..., IntegerGraph], tmp_path: Path) -> None:
    check_exact(make(0, 64, 100), tmp_path, 3)


@pytest.mark.parametrize("image_format", ["u8.8", "s8.7"])
def test_ops_that_read_the_image_itself(image_format: Any, tmp_path: Path) -> None:
    """Moves, products, tables and pools of image codes; vectors in the order of a map; logits of 8 bits."""
    b = GraphBuilder(0, (3, 5, 4), image_format=image_format)
    gate = b.lookup(b.global_pool("image"), FixedPointFormat.parse("u8.8"))
    x = b.add(b.mul("image", gate), b.mul("image", "image"))
    x = b.conv(b.lookup(x), 6, (1, 1))
    x = b.linear(b.flatten(x), 7, wide=False)
    y = b.linear(b.lookup(b.flatten(b.max_pool("image"))), 7, wide=False)
    b.add(x, y)
    check_exact(b.graph(), tmp_path)


@pytest.mark.parametrize("image_format", ["u8.8", "s8.7"])
def test_a_map_of_8_bits_leaves_the_network_in_the_order_of_the_graph(image_format: Any, tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 5, 4), image_format=image_format)
    b.resize(b.concat("image", b.select("image", (2, 0)), b.resize("image", (1, 1))), (2, 3))
    check_exact(b.graph(), tmp_path)


def test_windows_that_miss_the_map_sum_up_nothing(tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 4, 5))
    x = b.conv("image", 4, padding=(4, 0, 0, 5), dilation=(1, 2), stride=(2, 1))
    b.conv(b.conv(x, 4, (2, 2), padding=(3, 3, 3, 3), groups=4), 6, (3, 1), padding=(0, 4, 2, 4), groups=2, dilation=(3, 1))
    check_exact(b.graph(), tmp_path)


def test_a_depthwise_convolution_with_several_outputs_per_channel(tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 6, 6), per_channel=True)
    b.conv(b.conv("image", 6, groups=3), 40, (1, 1))
    check_exact(b.graph(), tmp_path)


def test_a_wrong_weight_is_located(tmp_path: Path) -> None:
    graph = residual_net(0)
    constants = {**graph.constants, "conv3.weight": graph.constants["conv3.weight"] // 2}
    other = dataclasses.replace(graph, constants=constants)
    with pytest.raises(VerificationError, match=r"^layer 'conv3': c differs from interpreter in "):
        verify(Interpreter(other), CRunner(write(graph, tmp_path)), random_images(graph, 4))


# As a firmware engineer would


@pytest.mark.parametrize("name", COMPILERS)
@pytest.mark.parametrize("make", [every_op, pytest.param(wide_net, marks=pytest.mark.slow)])
def test_its_own_makefile_builds_and_replays_it_in_an_empty_folder(make: Callable[..., IntegerGraph], name: str, tmp_path: Path) -> None:
    need("make", name)
    shutil.copytree(write(make(0), tmp_path / "bundle"), tmp_path / "elsewhere")
    run("make", f"CC={name}", cwd=tmp_path / "elsewhere")
    assert run("./replay", cwd=tmp_path / "elsewhere") == "4 images, 0 of 20 codes differ\n"
    run("make", "clean", cwd=tmp_path / "elsewhere")
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == sorted(path.name for path in (tmp_path / "bundle").iterdir())


@pytest.mark.slow
def test_cmake_builds_and_replays_it(tmp_path: Path) -> None:
    need("cmake", "ctest", "make")
    write(every_op(0), tmp_path / "bundle")
    run("cmake", "-S", "bundle", "-B", "build", "-G", "Unix Makefiles", cwd=tmp_path)
    run("cmake", "--build", "build", cwd=tmp_path)
    assert "100% tests passed" in run("ctest", cwd=tmp_path / "build")


def test_the_replay_counts_what_differs(tmp_path: Path) -> None:
    need("make")
    write(residual_net(0), tmp_path)
    golden = (tmp_path / "golden.h").read_text()
    head, table = golden.split("golden_logits[GOLDEN_IMAGES]")
    (tmp_path / "golden.h").write_text(head + "golden_logits[GOLDEN_IMAGES]" + re.sub(r"\{\n    ([-\d]+),", r"{\n    1 + \1,", table))
    run("make", cwd=tmp_path)
    with pytest.raises(AssertionError, match="4 images, 4 of 20 codes differ"):
        run("./replay", cwd=tmp_path)


@pytest.mark.parametrize("make", [every_op, *(pytest.param(each, marks=pytest.mark.slow) for each in (wide_net, residual_net))])
@pytest.mark.parametrize("machine", ["", "-march=native"])
def test_sanitizers_find_nothing(machine: str, make: Callable[..., IntegerGraph], tmp_path: Path) -> None:
    need("make", "gcc")
    write(make(0, profile="s8", image_format="s8.7"), tmp_path)
    flags = "-fsanitize=address,undefined"
    run("make", "CC=gcc", f"CFLAGS=-O1 -g {machine} {flags} -fno-sanitize-recover", f"LDFLAGS={flags}", cwd=tmp_path)
    assert run("./replay", cwd=tmp_path) == "4 images, 0 of 20 codes differ\n"


@pytest.mark.parametrize("name", COMPILERS)
@pytest.mark.parametrize("level", ["-O3", *(pytest.param(each, marks=pytest.mark.slow) for each in ("-O1", "-O2", "-Os"))])
def test_nothing_is_called_but_its_own(name: str, level: str, tmp_path: Path) -> None:
    """No malloc, no printf, no memcpy that a compiler made of a loop."""
    need("make", "nm", name)
    write(every_op(0), tmp_path)
    run("make", f"CC={name}", f"CFLAGS={level} -march=native", "libmodel.a", cwd=tmp_path)
    symbols = run("nm", "libmodel.a", cwd=tmp_path).splitlines()
    outside = {line.split()[-1] for line in symbols if re.match(r"^\s+U ", line)}
    assert {name for name in outside if not name.startswith("edgeft_")} == set()
    assert not [line for line in symbols if re.search(r" [BbDdCc] ", line)], "nothing is kept in memory that changes"


@pytest.mark.parametrize("name", COMPILERS)
def test_kernels_compile_without_a_warning(name: str, tmp_path: Path) -> None:
    need(name)
    for source in sorted((kernels.include_dir().parent / "src").glob("*.c")):
        run(name, *STRICT, "-Wshadow", "-Wcast-align", f"-I{kernels.include_dir()}", "-c", source, "-o", "out.o", cwd=tmp_path)


def test_each_kernel_is_in_the_file_of_its_name() -> None:
    contract = "".join((kernels.include_dir() / f"edgeft_{name}.h").read_text() for name in ("kernels", "bands"))
    declared = set(re.findall(r"^int edgeft_(\w+)\(", contract, re.MULTILINE))
    files = {path.stem: path.read_text() for path in kernels.sources() if path.suffix == ".c"}
    assert set(files) == declared
    for name, text in files.items():
        assert re.findall(r"^int edgeft_(\w+)\(", text, re.MULTILINE) == [name]
        assert "float" not in text
        assert "double" not in text


# Bad input


@pytest.fixture
def model(tmp_path: Path) -> tuple[Any, IntegerGraph, int]:
    """edgeft_run of a small net, the net, and the bytes of its arena."""
    graph = residual_net(0)
    folder = write(graph, tmp_path)
    about = json.loads((folder / "bundle.json").read_text())
    return ctypes.CDLL(str(c_build.build(folder, about["sources"], c_build.find_compiler()))).edgeft_run, graph, about["arena_bytes"]


@pytest.mark.parametrize(
    ("what", "offset", "missing"), [("misaligned", 4, 0), ("too small", 0, 1), ("null", 0, 0)], ids=lambda value: str(value)
)
def test_an_arena_that_does_not_fit_is_a_status_and_nothing_is_written(
    model: tuple[Any, IntegerGraph, int], what: str, offset: int, missing: int
) -> None:
    edgeft_run, graph, n = model
    memory, logits, image = np.full(n + 128, 7, np.uint8), np.full(5, 7, np.int32), np.zeros(graph.tensors[graph.input].shape, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    arena = None if what == "null" else ctypes.c_void_p(memory.ctypes.data + start)
    status = edgeft_run(ctypes.c_void_p(image.ctypes.data), ctypes.c_void_p(logits.ctypes.data), arena, ctypes.c_uint32(n - missing))
    assert status == STATUS[what]
    assert (memory == 7).all()
    assert (logits == 7).all()


def test_a_run_stays_inside_its_arena(model: tuple[Any, IntegerGraph, int]) -> None:
    edgeft_run, graph, n = model
    memory, logits, image = np.full(n + 192, 7, np.uint8), np.empty(5, np.int32), random_images(graph, 3)[2]
    start = -memory.ctypes.data % 64 + 64
    pointers = [ctypes.c_void_p(each) for each in (image.ctypes.data, logits.ctypes.data, memory.ctypes.data + start)]
    assert edgeft_run(*pointers, ctypes.c_uint32(n)) == 0
    assert (memory[:start] == 7).all()
    assert (memory[start + n :] == 7).all()


def test_sizes_that_do_not_fit_are_a_status(tmp_path: Path) -> None:
    folder = write(residual_net(0), tmp_path)
    text = (folder / "model.c").read_text()
    (folder / "model.c").write_text(text.replace(".groups = 8", ".groups = 3"))
    with pytest.raises(VerificationError, match=r"^the C bundle returned status 4; kernels/edgeft_status.h says what it means$"):
        CRunner(folder).logits(random_images(residual_net(0), 1))


def test_text_that_does_not_compile_is_shown(tmp_path: Path) -> None:
    folder = write(residual_net(0), tmp_path)
    (folder / "model.c").write_text("no C\n")
    with pytest.raises(UnsupportedError, match=r"(?s)^\w+ [\d.]+ does not compile the bundle '.*': *\n.*model\.c:1:1: error: ") as caught:
        CRunner(folder)
    assert caught.value.hint.startswith("the command was: ")


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    runner = CRunner(write(residual_net(0), tmp_path))
    with pytest.raises(ArtifactError, match=r"^images must be uint8 \[3, 12, 12\], not uint8 \[3, 10, 12\]$"):
        runner.logits(np.zeros((1, 3, 10, 12), np.uint8))


def test_a_folder_without_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"^'.*bundle.json' does not exist$"):
        TARGET.load(tmp_path)


# Target


def test_export_writes_builds_verifies_and_reports(tmp_path: Path) -> None:
    artifact, out = write_run(tmp_path / "run", residual_net(0)), tmp_path / "out"
    result = TARGETS.get("c").export(artifact, out)
    assert sorted(path.name for path in out.iterdir()) == [
        "CMakeLists.txt", "Makefile", "bundle.json", "golden.h", "kernels", "main.c", "model.c", "model.h", "weights.c", "weights.h",
    ]  # fmt: skip
    isa = {"avx2", "avx512", "dsp", "dsp_depth", "dsp_tile", "neon", "scalar", "vector"}
    headers = {"bands", "fixedpoint", "kernels", "packed", "status", "sums"} | isa
    used = {"add_narrow", "conv2d_packed", "conv2d_packed_wide", "dwconv2d_packed", "global_pool", "max_pool"}
    files = {path.name for path in (out / "kernels").iterdir()}
    assert files == {f"edgeft_{name}.h" for name in headers} | {f"{name}.c" for name in used}
    assert (result.target, result.path, result.converted, result.not_run) == ("c", out, False, "")
    assert json.loads(json.dumps(result.summary)) == result.summary
    compiler = c_build.find_compiler()
    assert re.match(r"^(gcc|clang) \d+\.\d+ -O3( -m\w+=native)? \(.+ kernels\)$", compiler.text)
    assert result.lines == (
        f"c      exact on 4/4 images, 13 tensors each, in C, {compiler.text}",
        f"       constants 5.3 kB   arena 1.4 kB (0 % over the least)   {out}",
        "       make check in it replays 4 golden images; CC=... for another compiler",
    )
    (runner,) = TARGET.runtimes(out)
    assert (runner.name, runner.runtime) == ("c", f"C, {compiler.text}")
    assert runner.executes().in_float == ()
    assert runner.executes().operators == {
        "add_narrow": 2, "conv2d_packed": 5, "conv2d_packed_wide": 1, "dwconv2d_packed": 1, "global_pool": 1, "max_pool": 1,
    }  # fmt: skip


def test_recorded_codes_that_differ_fail_the_export(tmp_path: Path) -> None:
    artifact = write_run(tmp_path / "run", residual_net(0), wrong=1)
    with pytest.raises(VerificationError, match=r"^layer 'linear11': the exported model does not give the codes recorded in the artifact$"):
        TARGET.export(artifact, tmp_path / "out")


def test_without_a_compiler_the_bundle_is_written_and_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    result = TARGET.export(write_run(tmp_path / "run", residual_net(0)), tmp_path / "out")
    assert (tmp_path / "out" / "Makefile").is_file()
    assert result.not_run == result.summary["not_built"] == "there is no C compiler here: looked for cc, gcc, clang"
    assert result.lines[0] == f"c      written, not built here: {result.not_run} (apt-get install gcc libc6-dev)"
    with pytest.raises(MissingExtraError) as caught:
        TARGET.runtimes(tmp_path / "out")
    assert caught.value.hint == "apt-get install gcc libc6-dev"


def test_what_make_left_of_an_earlier_bundle_is_no_part_of_the_next(tmp_path: Path) -> None:
    need("make")
    graph = residual_net(0)
    write(graph, tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    run("make", cwd=tmp_path)
    write(graph, tmp_path)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_golden_images_fit_into_a_small_device(tmp_path: Path) -> None:
    b = GraphBuilder(0, (3, 300, 300))
    graph = b.head(b.conv("image", 2, stride=(8, 8)), 2)
    summary = write_bundle(graph, random_images(graph, 4), tmp_path)
    assert summary["golden_images"] == 1
    assert "#define GOLDEN_IMAGES 1\n" in (tmp_path / "golden.h").read_text()
