"""python -m benchmarks SUITE: measure one suite and write its result file; torch is loaded only by the suite that runs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.tables import RESULTS
from edgeft.errors import EdgeftError
from edgeft.progress import Progress

app = typer.Typer(
    name="benchmarks",
    help="Measure one suite and write its result file; `make tables` then renders it. Protocol: benchmarks/README.md.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

Out = Annotated[Path, typer.Option(help="folder of the result file", show_default="benchmarks/results")]
Backbone = Annotated[str | None, typer.Option(help="timm name; default: edgeft_micro, mobilenetv2_100 and resnet18, one after the other")]
Size = Annotated[int | None, typer.Option(min=8, help="input size in pixels, with --backbone; default: 128")]
Threads = Annotated[int, typer.Option(min=1, help="threads of the libraries that are timed")]


@app.command("shapes-methods")
def shapes_methods(
    seeds: Annotated[str, typer.Option(help="seeds, separated by commas")] = "40,41,42,43,44",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any key of the configuration; may be repeated")
    ] = None,
    out: Out = RESULTS,
) -> None:
    """Accuracy of LP, FT and LP-FT in float on the embedded data set, in and out of distribution, paired by seed."""
    numbers = _whole(seeds, "--seeds")
    from benchmarks.shapes_methods import run

    _done(run(numbers, out, sets=set_ or [], progress=Progress()))


@app.command("runs")
def runs(
    named: Annotated[list[str], typer.Argument(metavar="METHOD[:MODEL]=RUN...", help="finished runs and their names in the table")],
    name: Annotated[str, typer.Option(help="name of the result, e.g. pacs")],
    title: Annotated[str, typer.Option(help="title of the table")],
    out: Out = RESULTS,
) -> None:
    """Tabulate finished runs with their exports: accuracy of the float, the fixed-point and the exported models."""
    from benchmarks.runs import parse, run

    _done(run(name, title, [parse(text) for text in named], out))


@app.command("ptq")
def ptq(
    named: Annotated[list[str], typer.Argument(metavar="NET=FILE...", help="nets and their weights as NumPy archives")],
    calibration: Annotated[Path, typer.Option(help="image pack: three fifths to draw calibration images from, the rest is scored")],
    scored: Annotated[list[Path] | None, typer.Option(help="another image pack that is scored; may be repeated")] = None,
    variants: Annotated[
        list[str] | None, typer.Option("--variant", help="part of a variant's name, e.g. 'u8 per channel'; default: all")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="times that calibration images are drawn")] = 3,
    n_scored: Annotated[int | None, typer.Option(min=1, help="scored images of each pack; default: all")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="keys of the section quant")] = None,
    records: Annotated[Path | None, typer.Option(help="folder that keeps each measurement, to go on later")] = None,
    threads: Threads = 1,
    out: Out = RESULTS,
) -> None:
    """Accuracy of pretrained ImageNet nets by calibration alone, beside ONNX Runtime's static quantization."""
    _limit(threads)
    from benchmarks.ptq import VARIANTS, run
    from benchmarks.runs import parse
    from edgeft.config import build_config

    quant = build_config(sets=set_ or []).quant
    chosen = [v for v in VARIANTS if not variants or any(part in f"{v.label} per {v.granularity}" for part in variants)]
    nets = [parse(text)[:2] for text in named]
    _done(run(nets, out, calibration=calibration, scored=scored or [], quant=quant, draws=range(draws), variants=chosen,
              n_scored=n_scored, records=records, progress=Progress()))  # fmt: skip


@app.command("qat")
def qat(
    named: Annotated[list[str], typer.Argument(metavar="NAME=RUN...", help="finished runs and their names in the table")],
    variants: Annotated[
        list[str] | None, typer.Option("--variant", help="part of a variant's name, e.g. 'per channel'; default: all")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any key of the runs' configuration")] = None,
    records: Annotated[Path | None, typer.Option(help="folder that keeps each variant's predictions, to go on later")] = None,
    threads: Threads = 1,
    out: Out = RESULTS,
) -> None:
    """Accuracy after short quantized training, in and out of distribution, against float and against stock int8 training."""
    _limit(threads)
    import benchmarks.resnet20  # noqa: F401 - registers its backbone, which a run may have
    from benchmarks.qat import VARIANTS, run
    from benchmarks.runs import parse

    chosen = [variant for variant in VARIANTS if not variants or any(part in variant.name for part in variants)]
    _done(run([parse(text) for text in named], out, sets=set_ or [], variants=chosen, records=records, progress=Progress()))


@app.command("edge-cpu")
def edge_cpu(
    named: Annotated[list[str], typer.Argument(metavar="NAME=DIR,SHIFTED...", help="data sets: image folder, shifted test folders")],
    records: Annotated[Path, typer.Option(help="folder that keeps each finished cell, to go on later")],
    weights: Annotated[Path | None, typer.Option(help="ImageNet weights, .safetensors; default: timm's own, from its hub")] = None,
    seeds: Annotated[str, typer.Option(help="seeds, separated by commas")] = "0,1,2",
    only: Annotated[
        list[str] | None, typer.Option(metavar="WORDS", help="measure only cells with these words, e.g. 'PACS float', 'lpft 0', latency")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="measure these cells again, although they are recorded")] = False,
    rounds: Annotated[int, typer.Option(min=2, help="interleaved rounds of the latency")] = 30,
    calls: Annotated[int, typer.Option(min=1, help="timed calls per model and round")] = 20,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="any key of the configuration, or NAME:KEY=VALUE for one data set"),
    ] = None,
    threads: Threads = 1,
    out: Out = RESULTS,
) -> None:
    """All fine-tuning methods in float and in every 8-bit form, over seeds, in and out of distribution, and their latency."""
    _limit(threads)
    from benchmarks.edge_cpu import DataSet, Grid, run
    from edgeft.bench.measuring import Plan

    grid = Grid(tuple(map(DataSet.parse, named)), tuple(_whole(seeds, "--seeds")), weights, tuple(set_ or []))
    _done(run(grid, records, out, only=only or [], again=again, plan=Plan(rounds, calls), progress=Progress()))


@app.command("edgeft", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def edgeft(context: typer.Context) -> None:
    """The product's own command line with the suites' extra backbones: python -m benchmarks edgeft train-quantize --backbone ..."""
    import benchmarks.resnet20  # noqa: F401 - registers its backbone
    from edgeft.cli import main as product

    raise typer.Exit(product(context.args))


@app.command("train-throughput")
def train_throughput(
    backbone: Backbone = None,
    size: Size = None,
    batch: Annotated[int | None, typer.Option(min=1, help="images per step, with --backbone; default: 32")] = None,
    steps: Annotated[int, typer.Option(min=10, help="timed steps per round; formats are updated in every tenth")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 5,
    threads: Threads = 1,
    out: Out = RESULTS,
) -> None:
    """Speed and memory of float fine-tuning against a bare PyTorch loop, and of QAT against float."""
    _limit(threads)
    from benchmarks.nets import chosen
    from benchmarks.throughput import run

    _done(run(chosen(backbone, size, batch), out, n_rounds=rounds, n_steps=steps, threads=threads, progress=Progress()))


@app.command("qat-step")
def qat_step(
    backbone: Annotated[str | None, typer.Option(help="timm name; default: mobilenetv2_100 and resnet18, each at 64 and 128 px")] = None,
    size: Size = None,
    batch: Annotated[int | None, typer.Option(min=1, help="images per step, with --backbone; default: 32")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=250, help="interleaved rounds of one step of each variant")] = 9,
    out: Out = RESULTS,
) -> None:
    """Time of a quantization-aware training step against the float step of the same net, and against stock Brevitas; one thread."""
    _limit(1)
    from benchmarks.nets import chosen
    from benchmarks.qat_step import CASES, run

    cases = chosen(backbone, size, batch) if backbone or size or batch else CASES
    _done(run(cases, out, n_rounds=rounds, progress=Progress()))


@app.command("ort-latency")
def ort_latency(
    backbone: Backbone = None,
    size: Size = None,
    runs: Annotated[list[Path] | None, typer.Option("--run", help="a finished run instead of random weights; may be repeated")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="interleaved rounds")] = 30,
    calls: Annotated[int, typer.Option(min=1, help="timed calls per model and round")] = 20,
    threads: Threads = 1,
    out: Out = RESULTS,
) -> None:
    """Latency of the exported ONNX file against ONNX Runtime's float32 and its static quantization of the same net."""
    _limit(threads)
    from functools import partial

    from benchmarks.latency import random_subject, run, run_subject
    from benchmarks.nets import chosen

    subjects = [partial(run_subject, path) for path in runs] if runs else [partial(random_subject, case) for case in chosen(backbone, size)]
    _done(run(subjects, out, n_rounds=rounds, n_calls=calls, threads=threads, progress=Progress()))


@app.command("cpu-latency")
def cpu_latency(
    backbone: Annotated[
        str | None, typer.Option(help="timm name; default: mobilenetv2_100, mobilenetv1_100, resnet18 and resnet50, one after the other")
    ] = None,
    size: Annotated[int, typer.Option(min=8, help="input size in pixels")] = 224,
    rounds: Annotated[int, typer.Option(min=2, help="interleaved rounds")] = 40,
    calls: Annotated[int, typer.Option(min=1, help="timed calls per model and round")] = 5,
    out: Out = RESULTS,
) -> None:
    """Latency of the C bundle, by each compiler at hand, against OpenVINO and ONNX Runtime on the same integers."""
    _limit(1)
    from benchmarks.cpu_latency import NETS, run

    _done(run(NETS if backbone is None else (backbone,), size, out, n_rounds=rounds, n_calls=calls, progress=Progress()))


@app.command("cortex-m")
def cortex_m(
    cores: Annotated[str, typer.Option(help="cores, separated by commas")] = "cortex-m4,cortex-m7,cortex-m55",
    backbone: Annotated[str | None, typer.Option(help="timm name; default: edgeft_micro at 48 px and MobileNetV1 0.25 at 128 px")] = None,
    size: Size = None,
    out: Out = RESULTS,
) -> None:
    """Instructions, flash and RAM of the C bundle on Cortex-M, played by QEMU: simple, portable and DSP kernels."""
    _limit(1)
    from benchmarks.boards import boards_of
    from benchmarks.cortex_m import CASES, run
    from benchmarks.nets import chosen

    cases = CASES if backbone is None else chosen(backbone, size)
    _done(run(cases, out, boards=boards_of(cores.split(",")), progress=Progress()))


@app.command("targets")
def targets(
    backbone: Annotated[str | None, typer.Option(help="timm name; default: edgeft_micro, mobilenetv2_100, resnet18 and resnet50")] = None,
    size: Size = None,
    n: Annotated[int, typer.Option("--n", min=1, help="images for every file")] = 1000,
    target: Annotated[str | None, typer.Option(help="one target, in a result file of its own; default: all")] = None,
    threads: Threads = 1,
    out: Out = RESULTS,
) -> None:
    """Every export target on nets of realistic size: code for code in every runtime, and the kernels that TensorRT's builder chooses."""
    _limit(threads)
    from benchmarks.nets import chosen
    from benchmarks.targets import CASES, run

    _done(run(CASES if backbone is None else chosen(backbone, size), out, n=n, only=target, progress=Progress()))


@app.command("gpu-check")
def gpu_check(
    parts: Annotated[list[str] | None, typer.Argument(help="runs, exact, kernels, steps; default: all")] = None,
    records: Annotated[
        Path | None, typer.Option(help="folder that keeps each part's measurements; the last part completes the result")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds of training steps")] = 7,
    steps: Annotated[int, typer.Option(min=1, help="steps of a round; formats are updated in every tenth")] = 10,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any key of the runs' configuration")] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the suite out")] = "cuda",
    out: Out = RESULTS,
) -> None:
    """Integers, resumption, rounding kernels and training speed on a GPU."""
    import torch

    from benchmarks.gpu import Settings, run

    file = run(parts or [], out, records, Settings(torch.device(device), rounds, steps, tuple(set_ or []), Progress()))
    if file is None:
        print(f"parts are missing in '{records}'")
    else:
        _done(file)


def _whole(text: str, option: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"'{text}' is not a list of whole numbers", param_hint=option) from error


def _limit(threads: int) -> None:
    """Before torch is loaded: its thread pool is as large as this for good, and idle threads of a larger one disturb what is timed."""
    os.environ["OMP_NUM_THREADS"] = str(threads)


def _done(file: Path) -> None:
    print(f"wrote {file}; render it with: make tables")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 measured, 1 a check before the measurement failed, 2 could not be done."""
    try:
        app(args=argv, prog_name="python -m benchmarks")
    except EdgeftError as error:
        print(f"error: {error.message}", file=sys.stderr)
        for line in error.hint.splitlines():
            print(f"  {line.strip()}", file=sys.stderr)
        return error.exit_code
    except SystemExit as done:
        return int(done.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
