"""Verbs about accuracy under shift and latency: evaluate, bench, diagnose, robustness, reprobe, selfcheck.

Everything that needs torch is imported inside the verb that uses it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from edgeft.cli_app import EXIT_FAILED, Json, app, as_json, progress
from edgeft.errors import ConfigError

VERBS = ("evaluate", "bench", "diagnose", "robustness", "reprobe", "selfcheck")
"""What this module adds to the command line."""


@app.command()
def evaluate(
    path: Annotated[Path | None, typer.Argument(metavar="[RUN|EXPORT]", help="default: the latest finished run in runs/")] = None,
    corruptions: Annotated[str, typer.Option(help="none, subset, all, or names separated by commas; of the ID test set")] = "none",
    severity: Annotated[list[int] | None, typer.Option(min=1, max=5, help="severity of corruptions; may be repeated; default: all")] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="at most so many images of each set; default: all")] = None,
    ood: Annotated[list[str] | None, typer.Option(metavar="NAME=DIR", help="another test set; may be repeated")] = None,
    map_: Annotated[
        list[str] | None, typer.Option("--map", metavar="NAME=FILE", help="what the classes of a set mean here; may be repeated")
    ] = None,
    mask: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="the classes that a set has, one per line; may be repeated")
    ] = None,
    groups: Annotated[list[str] | None, typer.Option(metavar="NAME=CSV", help="file and group of a set's images; may be repeated")] = None,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps logits, so that the next time is fast")] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="processes that make corruptions; default: one per CPU for long evaluations, else none")
    ] = None,
    json_: Json = False,
) -> None:
    """Evaluate a run or an export in and out of distribution.

    Accuracy, calibration, flips against the float model, detection of shifted images, groups, common corruptions, what quantization
    costs in each, how far fine-tuning moved the features, and which layers saturate out of distribution.

    Example: edgeft evaluate runs/mbv2 --corruptions subset --severity 3 --cache cache/
    """
    from edgeft import evaluating
    from edgeft.artifact import latest_run
    from edgeft.evaluation.rendering import render

    chosen = corruptions if corruptions in ("none", "subset", "all") else tuple(corruptions.split(","))
    more = {"severities": tuple(severity)} if severity else {}
    found = evaluating.evaluate(
        path or latest_run(), corruptions=chosen, n=n, sets=_named(ood, "--ood"), maps=_named(map_, "--map"),
        masks=_named(mask, "--mask"), groups=_named(groups, "--groups"), cache=cache, workers=workers, progress=progress(), **more,
    )  # fmt: skip
    print(as_json(found.to_json()) if json_ else render(found))


@app.command()
def bench(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN...]", help="runs or folders of sweeps; default: the latest run")
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="may be repeated; default: all that there are")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="threads; may be repeated; default: 1")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="images at a time; may be repeated; default: 1")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 10,
    calls: Annotated[int, typer.Option(min=1, help="timed calls of each model in a round")] = 20,
    out: Annotated[Path, typer.Option(help="folder of the report; an interrupted bench goes on there")] = Path("bench"),
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, help="exit with 1 when a fixed-point model is more points below float, ID or mean OOD"),
    ] = None,
    json_: Json = False,
) -> None:
    """Measure latency, size, memory and accuracy of runs in every backend.

    Writes results.txt, results.json, results.csv, plots, and report.html, one page that needs no network. Every fixed-point model is
    compared with the interpreter before it is timed.

    Example: edgeft bench runs/lp runs/lpft --threads 1 --threads 2 --max-drop 0.5 --out build/bench
    """
    from edgeft import benching
    from edgeft.artifact import latest_run
    from edgeft.bench.text import table

    report = benching.bench(
        _runs(runs) if runs else [latest_run()], backends=backend or (), threads=threads or (1,), batches=batch or (1,), rounds=rounds,
        calls=calls, out=out, max_drop=max_drop, progress=progress(),
    )  # fmt: skip
    print(as_json(report.to_json()) if json_ else f"{table(report)}\nwrote {out / 'report.html'}")
    if not report.passed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def diagnose(
    shift: Annotated[str, typer.Option(metavar="DIR", help="images that may have shifted, or a shifted split of the run")],
    ref: Annotated[Path | None, typer.Option(metavar="DIR", help="images as they should be; default: the run's ID test images")] = None,
    run: Annotated[Path | None, typer.Option(help="run that gives features and predictions; default: the bundled backbone's")] = None,
    backbone: Annotated[str | None, typer.Option(help="without a run: timm model whose frozen features are looked at")] = None,
    weights: Annotated[Path | None, typer.Option(help="its checkpoint; default: timm's pretrained weights (downloads)")] = None,
    baselines: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="run with kept epochs (train.keep_checkpoints), for effective robustness on both parts"),
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the folds")] = 0,
    json_: Json = False,
) -> None:
    """Say how images differ from a reference: new support, or the same looking different.

    Example: edgeft diagnose --ref photos/test --shift newcamera/ --run runs/mbv2
    """
    from edgeft import diagnosing
    from edgeft.config import ModelConfig
    from edgeft.diagnosis.report import render

    if weights is not None and backbone is None:
        raise ConfigError("--weights are those of a backbone, and none was named", "give --backbone as well")
    model = None if backbone is None else ModelConfig(backbone=backbone, weights=weights, pretrained=weights is None)
    found = diagnosing.diagnose(
        ref, Path(shift) if Path(shift).exists() else shift, run=run, backbone=model, baselines=baselines, seed=seed, progress=progress(),
    )  # fmt: skip
    print(as_json(found.to_json()) if json_ else render(found))


@app.command()
def robustness(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="[RUN...]", help="runs whose models are held against the line")] = None,
    baselines: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV|RUN",
            help="models of the line: name, id, ood[, n_id, n_ood], or the kept epochs of a run; default: the runs' float ones",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="the shifted split that is meant, where runs have several")] = None,
    json_: Json = False,
) -> None:
    """Effective robustness: accuracy under shift beyond what accuracy in distribution makes one expect.

    In probit space, against a family of baselines; without one, the fixed-point models of the runs against the line of their float models.

    Example: edgeft robustness runs/lp runs/lpft --baselines scratch.csv --split sketch
    """
    from edgeft import diagnosing
    from edgeft.diagnosis.effective_text import render, render_quantization

    if baselines is None:
        effect = diagnosing.quantization_robustness(runs or (), ood=split)
        print(as_json(effect.to_json()) if json_ else render_quantization(effect))
        return
    found = diagnosing.effective_robustness(baselines, runs or (), ood=split, progress=progress())
    print(as_json(found.to_json()) if json_ else render(found))


@app.command()
def reprobe(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="finished run")],
    target: Annotated[Path, typer.Option(metavar="DIR", help="a few labelled images of the target, a folder per class")],
    out: Annotated[Path | None, typer.Option(help="new run directory; default: RUN-reprobed")] = None,
    json_: Json = False,
) -> None:
    """Fit a run's head to a few images of the target.

    Only the last layer changes; the integer backbone stays as it is.

    Example: edgeft reprobe runs/mbv2 --target few/ --out runs/mbv2-target
    """
    from edgeft import reprobing

    found = reprobing.reprobe(run, target, out, progress=progress())
    print(as_json({"path": str(found.artifact.path), **found.record}) if json_ else "\n".join(found.lines()))


@app.command()
def selfcheck(json_: Json = False) -> None:
    """Run the two-layer experiment of the LP-FT paper.

    It shows, in two seconds, how full fine-tuning distorts good features and LP-FT does not. The exit code is 1 when a statement that
    must hold does not.
    """
    from edgeft.selfcheck import render
    from edgeft.selfcheck import selfcheck as check

    found = check()
    print(as_json(found.to_json()) if json_ else render(found))
    if not found.passed:
        raise typer.Exit(EXIT_FAILED)


def _named(texts: Sequence[str] | None, option: str) -> dict[str, Path]:
    """NAME=PATH options as a dictionary."""
    found = {}
    for text in texts or ():
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"{option} '{text}' is not of the form NAME=PATH")
        found[name] = Path(path)
    return found


def _runs(paths: Sequence[Path]) -> list[Path]:
    """Runs as they are, and the finished runs of folders of sweeps."""
    from edgeft.artifact import runs_of_sweep

    return [run for path in paths for run in (runs_of_sweep(path) or [path])]
