"""Layers that are computed in bands of rows: the same codes as whole maps, in the memory that was planned, and chosen by the rule."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeft.export.c_bands import FusedBlock, Schedule, may_replace
from edgeft.export.c_build import Compiler, find_compiler
from edgeft.export.c_bundle import TARGET, write_bundle
from edgeft.export.c_fusion import SLACK, Search, fuse
from edgeft.export.c_memory import lay_out
from edgeft.export.c_plan import Plan, plan
from edgeft.export.c_runner import CRunner
from edgeft.export.verify import verify
from edgeft.graph import IntegerGraph
from edgeft.interpret import Interpreter
from tests.c_bundles import COMPILERS, need, run
from tests.exports import write_run
from tests.graphs import GraphBuilder, mobilenet_v2, random_images, residual_net, resnet18


def fused_everywhere(planned: Plan, band_bytes: int) -> tuple[FusedBlock, ...]:
    """As many layers as possible in every block, whether or not memory is gained."""
    search, blocks, last = Search(planned), list[FusedBlock](), len(planned.steps) - 1
    while last >= 0:
        found = [block for first in reversed(search.starts(last)) for block in search.blocks(first, last, [band_bytes])]
        blocks += found[:1]
        last = found[0].first - 1 if found else last - 1
    return tuple(reversed(blocks))


@st.composite
def chains(draw: st.DrawFn) -> IntegerGraph:
    """Convolutions, depthwise ones, pools and tables in a row, some with an addition of what one or several of them read."""
    b = GraphBuilder(
        draw(st.integers(0, 2**20)), (draw(st.sampled_from([3, 4, 8])), draw(st.integers(3, 17)), draw(st.integers(3, 11))),
        profile=draw(st.sampled_from(["u8", "s8"])), image_format=draw(st.sampled_from(["u8.8", "s8.7"])), per_channel=draw(st.booleans()),
    )  # fmt: skip
    x = b.conv("image", draw(st.sampled_from([3, 8, 20])), (1, 1), relu=draw(st.booleans()))
    for _ in range(draw(st.integers(2, 6))):
        start, (channels, rows, columns) = x, b.tensors[x].shape
        kind = draw(st.sampled_from(["conv", "conv", "depthwise", "depthwise", "pool", "lookup"]))
        if kind == "pool" and min(rows, columns) > 2:
            x = b.max_pool(x)
        elif kind == "lookup":
            x = b.lookup(x)
        else:
            size, stride = [draw(st.sampled_from([1, 3, 5])) for _ in range(2)], draw(st.sampled_from([1, 1, 2]))
            pad = (draw(st.integers(0, 2)) if draw(st.booleans()) else size[0] // 2) if rows > 4 else size[0] // 2
            padding = (pad, size[1] // 2, size[0] - 1 - min(pad, size[0] - 1), size[1] // 2)
            n_out, groups = (channels, channels) if kind == "depthwise" else (draw(st.sampled_from([4, 8, 20])), 1)
            x = b.conv(x, n_out, (size[0], size[1]), stride=(stride, stride), padding=padding, groups=groups, relu=draw(st.booleans()))
        if b.tensors[x].shape == b.tensors[start].shape and draw(st.booleans()):
            x = b.add(start, x, relu=draw(st.booleans()))
    return b.head(x, 5)


# Rows


def misplaced(schedule: Schedule) -> list[str]:
    """Follows the calls row by row: rows that are read but not there any more, or not in one piece, and rows that are not computed."""
    places: list[dict[int, int]] = [{} for _ in schedule.stages]  # the row at each place of a ring
    done, wrong = [0] * len(schedule.stages), []
    number = {stage.writes: k for k, stage in enumerate(schedule.stages)}

    def place(k: int, row: int) -> int:
        ring = schedule.rings[k]
        return (row + ring.start) % ring.room if ring.room else row

    for band in schedule.bands:
        k, stage = band.stage, schedule.stages[band.stage]
        for source in (number[name] for name in stage.reads if name in number):
            low, high = stage.needs(band.first, band.n)
            wrong += [f"{stage.writes} misses row {row}" for row in range(low, high) if places[source].get(place(source, row)) != row]
            if not stage.is_window and place(source, high - 1) - place(source, low) != high - 1 - low:
                wrong.append(f"{stage.writes} reads rows in two pieces")
        rows = range(band.first, band.first + band.n)
        if band.first != done[k] or place(k, rows[-1]) - place(k, rows[0]) != band.n - 1:
            wrong.append(f"{stage.writes} writes rows {rows} after {done[k]}")
        places[k] |= {place(k, row): row for row in rows}
        done[k] += band.n
    return wrong + [f"{stage.writes} is not done" for stage, n in zip(schedule.stages, done, strict=True) if n != stage.rows]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chains(), st.sampled_from([1, 100, 400, 1000, 4000]))
def test_every_row_is_computed_once_and_there_when_it_is_read(graph: IntegerGraph, band_bytes: int) -> None:
    planned = plan(graph)
    blocks = fused_everywhere(planned, band_bytes)
    assert [wrong for block in blocks for wrong in misplaced(block.schedule)] == []
    memory = lay_out(planned, blocks)
    assert memory.placement.lower_bound <= memory.placement.n_bytes
    for block in blocks:
        assert block.kept
        assert all(memory.homes[name] == "rows" for name in block.lines)


@pytest.mark.parametrize(("padding", "safe"), [((1, 0, 1, 0), False), ((2, 0, 0, 0), False), ((0, 0, 2, 0), True)])
def test_a_sum_is_not_written_over_rows_that_are_still_read(padding: tuple[int, int, int, int], safe: bool) -> None:
    """A 3x1 window reads from row r - padding on: what the addition of earlier rows has written over, unless there is none above."""
    b = GraphBuilder(0, (3, 16, 8))
    x = b.conv("image", 8)
    b.head(b.add(x, b.conv(x, 8, (3, 1), padding=padding)), 3)
    planned = plan(b.graph())
    (block,) = Search(planned).blocks(1, 2, [1])
    assert may_replace(block.schedule, 1, x) == safe
    assert lay_out(planned, (block,)).in_place == (("add2",) if safe else ())


# Codes


@pytest.fixture(params=["portable", "native"])
def tools(request: pytest.FixtureRequest, compiler: str) -> Compiler:
    """The compiler for portable kernels, with few optimizations as only codes are looked at, or for those of this machine."""
    found = find_compiler(more=("-DEDGEFT_PORTABLE",) if request.param == "portable" else None)
    return dataclasses.replace(found, flags=("-O1", *found.flags[2:])) if request.param == "portable" else found


@pytest.mark.cc
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(chains(), st.sampled_from([1, 200, 1000]))
def test_chains_in_bands_give_the_codes_of_the_interpreter(
    tools: Compiler, tmp_path_factory: pytest.TempPathFactory, graph: IntegerGraph, band_bytes: int
) -> None:
    """Every row of every tensor, as the fused stages write it."""
    folder = tmp_path_factory.mktemp("bundle")
    write_bundle(graph, random_images(graph, 1), folder, fusion=lambda planned: fused_everywhere(planned, band_bytes))
    assert "edgeft_fused(" in (folder / "model.c").read_text()
    verify(Interpreter(graph), CRunner(folder, tools), random_images(graph, 4))


def test_no_layer_is_fused_where_nothing_is_gained() -> None:
    assert fuse(plan(residual_net(0))) == ()


@pytest.mark.parametrize(
    ("make", "whole", "fused"), [(mobilenet_v2, 1_505_280, 206_976), (resnet18, 1_003_520, 272_768)], ids=["mobilenet_v2", "resnet18"]
)
def test_arenas_at_224_pixels(make: Any, whole: int, fused: int) -> None:
    planned = plan(make(0, 224))
    found = lay_out(planned, fuse(planned)).placement
    assert (lay_out(planned).placement.n_bytes, found.n_bytes) == (whole, fused)
    assert found.over < 0.1


def test_no_way_to_cut_a_plan_needs_less() -> None:
    """All ways are tried on a net of a few steps."""
    b = GraphBuilder(0, (3, 128, 64))
    x = b.conv(b.conv("image", 16), 16, groups=16)
    b.head(b.add(x, b.conv(b.conv(x, 32, (1, 1)), 16, (1, 1), relu=False)), 4)
    planned = plan(b.graph())
    search, n = Search(planned), len(planned.steps)

    def needs(first: int) -> list[int]:
        """The need of every way to cut the steps from this one on."""
        if first == n:
            return [0]
        found = [max(search.alone(first), rest) for rest in needs(first + 1)]
        for last in range(first + 1, n):
            for block in search.blocks(first, last, [8 * 1024]) if first in search.starts(last) else ():
                found += [max(search.need(block), rest) for rest in needs(last + 1)]
        return found

    least, found = min(needs(0)), lay_out(planned, fuse(planned)).placement.lower_bound
    assert found <= least + least // SLACK
    assert least < lay_out(planned).placement.lower_bound / 2


# Bundles


@pytest.fixture
def wide_maps() -> IntegerGraph:
    """A small net whose first maps are large: an inverted residual behind a stem."""
    b = GraphBuilder(0, (3, 128, 48), profile="s8", image_format="s8.7")
    x = b.conv("image", 16, stride=(2, 2), padding=(0, 0, 1, 1))
    y = b.conv(b.conv(b.conv(x, 64, (1, 1)), 64, groups=64), 16, (1, 1), relu=False)
    return b.head(b.max_pool(b.add(x, y, relu=False)), 5)


@pytest.mark.cc
@pytest.mark.parametrize("name", COMPILERS)
def test_a_fused_bundle_builds_without_a_warning_and_calls_nothing_from_outside(name: str, wide_maps: IntegerGraph, tmp_path: Path) -> None:
    need("make", "nm", name)
    write_bundle(wide_maps, random_images(wide_maps, 4), tmp_path)
    run("make", f"CC={name}", "CFLAGS=-O3 -fno-pie", "LDFLAGS=-no-pie", cwd=tmp_path)  # tables hold addresses, which loaders may change
    assert run("./replay", cwd=tmp_path) == "4 images, 0 of 20 codes differ\n"
    symbols = run("nm", "libmodel.a", cwd=tmp_path).splitlines()
    outside = {line.split()[-1] for line in symbols if line.strip().startswith("U ")}
    assert "edgeft_fused" in outside
    assert {each for each in outside if not each.startswith("edgeft_")} == set()
    assert not [line for line in symbols if re.search(r" [BbDdCc] ", line)], "nothing is kept in memory that changes"


@pytest.mark.cc
def test_sanitizers_find_nothing(wide_maps: IntegerGraph, tmp_path: Path) -> None:
    need("make", "gcc")
    write_bundle(wide_maps, random_images(wide_maps, 4), tmp_path)
    flags = "-fsanitize=address,undefined"
    run("make", "CC=gcc", f"CFLAGS=-O1 -g {flags} -fno-sanitize-recover", f"LDFLAGS={flags}", cwd=tmp_path)
    assert run("./replay", cwd=tmp_path) == "4 images, 0 of 20 codes differ\n"


@pytest.mark.cc
def test_export_reports_the_arena_with_and_without_fused_layers(compiler: str, wide_maps: IntegerGraph, tmp_path: Path) -> None:
    result = TARGET.export(write_run(tmp_path / "run", wide_maps), tmp_path / "out")
    about = json.loads((tmp_path / "out" / "bundle.json").read_text())
    whole = lay_out(plan(wide_maps)).placement
    assert result.summary["arena_unfused"] == about["arena_unfused"] == {"bytes": whole.n_bytes, "lower_bound": whole.lower_bound}
    assert result.summary["arena_bytes"] == about["arena_bytes"] < whole.n_bytes / 2
    layers = [name for block in about["fused"] for name in block]
    assert f"{whole.n_bytes / 1e3:.1f} kB without fusing {len(layers)} layers in " in result.lines[1]
    in_rows = {each["name"] for each in about["tensors"] if each["place"] == "rows"}
    assert in_rows
    assert in_rows < set(layers)
