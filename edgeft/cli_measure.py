"""Verbs that look at what is there: predict, verify, and what measures and compares.

Everything that needs torch is imported inside the verb that uses it.
"""

from pathlib import Path
from typing import Annotated

import typer

from edgeft.cli_app import EXIT_FAILED, Json, app, as_json, progress
from edgeft.errors import MissingExtraError

VERBS = ("predict", "verify", "sweep")
"""What this module adds to the command line."""


@app.command()
def predict(
    export: Annotated[Path, typer.Argument(metavar="EXPORT", help="directory of an export, or of a run that has one")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="image files, or folders: every image in them")],
    top: Annotated[int, typer.Option(min=1, help="print this many classes of each image, the most probable first")] = 1,
    json_: Json = False,
) -> None:
    """Classify images with an exported model.

    Images may have any size and kind: they are prepared as those of training and evaluation were.

    Example: edgeft predict runs/mbv2 cat.jpg holiday/ --top 3
    """
    from edgeft.predicting import image_files, load

    predictor = load(export)
    files = [str(file) for file in image_files(images, progress())]
    found = list(zip(files, predictor.predict(files).top(top), strict=True))
    if json_:
        print(as_json([{"path": file, "classes": [{"label": name, "probability": p} for name, p in best]} for file, best in found]))
        return
    width = max(map(len, files))
    for file, best in found:
        print(f"{file:{width}}  {', '.join(f'{name} {100 * p:.1f} %' for name, p in best)}")


@app.command()
def verify(
    path: Annotated[Path | None, typer.Argument(metavar="[RUN|EXPORT]", help="default: the latest finished run in runs/")] = None,
    target: Annotated[list[str] | None, typer.Option(help="only the export to this target; may be repeated; default: all")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="images: golden ones, adversarial ones, the rest random")] = 1000,
    seed: Annotated[int | None, typer.Option(help="seed of the random images; default: a new one, which is printed")] = None,
    json_: Json = False,
) -> None:
    """Compare exports with the interpreter, code for code.

    In every runtime that is installed. The exit code is 1 when a single code of any layer differs.

    Example: edgeft verify runs/mbv2 --target onnx --n 200
    """
    from edgeft import verifying
    from edgeft.artifact import latest_run

    found = verifying.verify(path or latest_run(), target or (), n=n, seed=seed, progress=progress())
    print(as_json(found.to_json()) if json_ else "\n".join(found.lines()))
    if not found.exact:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def sweep(
    grid: Annotated[list[str], typer.Option(metavar="KEY=V,V,...", help="an axis: a key and its values; may be repeated")],
    out: Annotated[Path, typer.Option(help="folder of the sweep: one run directory for each combination, the queue, the table")],
    config: Annotated[Path | None, typer.Option(help="TOML file with the keys that all runs share")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a key that all runs share; may be repeated")] = None,
    target: Annotated[list[str] | None, typer.Option(help="export every run to this target; may be repeated")] = None,
    workers: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    gpu: Annotated[list[str] | None, typer.Option("--gpu", help="GPU for the workers to take in turn; may be repeated")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="run again what failed")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check every combination, list them, run nothing")] = False,
    json_: Json = False,
) -> None:
    """Run every combination of some keys.

    An interrupted sweep goes on with the same command; the same command on another machine that shares the folder joins in. A run that
    fails is a row of the table; the exit code is then 1.

    Example: edgeft sweep --grid train.method=ft,lpft --grid seed=0,1,2 --target onnx --out sweeps/methods
    """
    try:
        from edgeft import sweeping
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"sweep needs the package '{error.name}'", "pip install 'edgeft[sweep]'") from error

    configs = sweeping.grid(grid, config, {}, set_ or [], out)
    if dry_run:
        print(as_json(list(configs)) if json_ else "\n".join(configs))
        return
    found = sweeping.sweep(configs, out, targets=target or (), workers=workers, retry=retry, devices=gpu or (), progress=progress())
    print(as_json(found.to_json()) if json_ else found.text())
    if not found.complete:
        raise typer.Exit(EXIT_FAILED)
