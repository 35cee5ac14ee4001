"""Suite cortex-m: what it refuses, what it reads from a board, and its tables; the boards themselves are in test_c_cross.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import boards
from benchmarks.__main__ import main
from benchmarks.boards import BOARDS, PROGRAMS, Count
from benchmarks.cortex_m import COLUMNS, VARIANTS, multiplications, rows_of, run
from benchmarks.nets import Case
from benchmarks.tables import read_tables
from edgeft.errors import MissingExtraError, VerificationError
from edgeft.progress import Progress
from tests.c_bundles import need
from tests.graphs import GraphBuilder

M4 = BOARDS["cortex-m4"]
PRINTED = "differing {wrong} of 80\nloop {loop}\nrun 1600\nstack 512 of 16384\nkernel conv2d 800\nkernel linear 480\n"
SIZES = "   text\t   data\t    bss\t    dec\t    hex\tfilename\n    100\t      0\t      {bss}\t    100\t     64\tmodel.o (ex libmodel.a)\n"


def read(monkeypatch: pytest.MonkeyPatch, *, wrong: int = 0, loop: int = 3_200_008, bss: int = 0) -> Count:
    sizes = SIZES.format(bss=bss) + "   4000\t      0\t      0\t   4000\t    fa0\tweights.o (ex libmodel.a)\n"
    monkeypatch.setattr(boards, "_call", lambda command, folder: sizes)
    return boards._read(PRINTED.format(wrong=wrong, loop=loop), M4, Path())


def test_what_a_board_prints_becomes_instructions_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch) == Count(1000, {"conv2d": 500, "linear": 300}, 512, 100, 4000, 80)


def test_nothing_is_counted_where_something_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VerificationError, match=r"^3 of 80 codes differ on cortex-m4$"):
        read(monkeypatch, wrong=3)
    with pytest.raises(VerificationError, match=r"^a loop of 2000000 instructions was counted as 1000000 on mps2-an386$"):
        read(monkeypatch, loop=1_600_000)
    with pytest.raises(VerificationError, match=r"^'model.o' of the library keeps 0 \+ 4 bytes that change$"):
        read(monkeypatch, bss=4)
    with pytest.raises(VerificationError, match=r"^the program printed something else on mps2-an386:\n$"):
        boards._read("", M4, Path())


def test_missing_programs_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.boards.shutil.which", lambda name: None if name != "make" else name)
    with pytest.raises(MissingExtraError) as caught:
        run((), tmp_path, boards=[M4], progress=Progress())
    assert caught.value.message == "there is no arm-none-eabi-gcc, qemu-system-arm here"
    assert caught.value.hint == "apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm"


def test_continuous_integration_installs_these_packages() -> None:
    listed = (Path(__file__).parents[2] / ".ci" / "run").read_text().split()
    assert not [
        name for packages in PROGRAMS.values() for name in packages.split() if name not in " ".join(listed).replace('"', " ").split()
    ]


def test_an_unknown_core(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["cortex-m", "--cores", "cortex-m4,cortex-m5", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: no board has the core 'cortex-m5'\n  known: cortex-m4, cortex-m7, cortex-m55\n"


def test_multiplications_are_those_of_all_outputs() -> None:
    b = GraphBuilder(0, (3, 8, 8))
    x = b.conv(b.conv("image", 4, stride=(2, 2), padding=(0, 0, 1, 1)), 4, groups=4)
    assert multiplications(b.head(x, 5)) == 16 * 4 * 27 + 16 * 4 * 9 + 5 * 4


def test_rows_compare_with_the_simple_kernels() -> None:
    counted: dict[str, Any] = {"by_kernel": {}, "stack_bytes": 300, "code_bytes": 2000, "constant_bytes": 7000, "codes": 4}
    runs = [
        {"core": core, "kernels": variant.label, "arena_bytes": 5000, "instructions": n, **counted}
        for core in ("cortex-m4", "cortex-m7")
        for variant, n in zip(VARIANTS[:2], (8_000_000, 2_000_000), strict=True)
    ]
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in rows_of({"net": "x", "multiplications": 1_000_000, "runs": runs})]
    assert [(row["core"], row["M instructions"], row["of simple"], row["per multiplication"]) for row in rows] == [
        ("cortex-m4", 8.0, 1.0, 8.0), ("cortex-m4", 2.0, 0.25, 2.0), ("cortex-m7", 8.0, 1.0, 8.0), ("cortex-m7", 2.0, 0.25, 2.0),
    ]  # fmt: skip
    assert [rows[0][name] for name in ("flash kB", "RAM kB", "arena kB", "stack kB")] == [9.0, 5.3, 5.0, 0.3]


@pytest.mark.cc
@pytest.mark.slow
def test_the_suite_writes_both_tables(tmp_path: Path) -> None:
    need(*PROGRAMS)
    file = run((Case("edgeft_micro", 32, 1),), tmp_path, boards=[M4], progress=Progress())
    bundles, kernels = read_tables(json.loads(file.read_text()), file.name)
    assert [bundles.suite, kernels.suite] == ["cortex-m-bundles", "cortex-m-kernels"]
    assert [row[2] for row in bundles.rows] == [variant.label for variant in VARIANTS]
    assert {row[2] for row in kernels.rows} > {"conv2d", "conv2d_packed", "dwconv2d_packed"}
