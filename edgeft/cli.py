"""The command line: flags to a configuration, results to stdout, errors to exit codes; nothing else.

Everything that needs torch is imported inside the verb that uses it. Other verbs are in `cli_measure` and `cli_report`.
"""

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import edgeft.cli_measure
import edgeft.cli_report
from edgeft.cli_app import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNABLE, Global, Json, Run, app, as_json, is_main_process, progress
from edgeft.errors import ConfigError, EdgeftError

if TYPE_CHECKING:
    from edgeft.config import Config

ORDER = (
    "train-quantize", "export", "verify", "predict", "show", "evaluate", "bench", "diagnose", "robustness", "reprobe", "sweep",
    "list", "doctor", "selfcheck",
)  # fmt: skip
"""Verbs as the help shows them; the modules beside this one register theirs when they are imported."""
assert set(ORDER) > {*edgeft.cli_measure.VERBS, *edgeft.cli_report.VERBS}

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
UsageError: Any = typer.BadParameter.__base__
"""Base of typer's complaints about the command line; typer itself exports only its children."""

__all__ = ["app", "main"]


@app.command("train-quantize")
def train_quantize(
    method: Annotated[str | None, typer.Option(help="fine-tuning method: lp, ft, lpft (edgeft list methods)")] = None,
    backbone: Annotated[str | None, typer.Option(help="timm model name (edgeft list backbones)")] = None,
    weights: Annotated[Path | None, typer.Option(help="checkpoint, .safetensors or weights-only .pth")] = None,
    pretrained: Annotated[bool | None, typer.Option("--pretrained", help="take timm's pretrained weights (downloads)")] = None,
    data: Annotated[str | None, typer.Option(help="'shapes' (embedded) or a folder with one sub-folder per class")] = None,
    ood: Annotated[list[str] | None, typer.Option(metavar="[NAME=]DIR", help="shifted test set; may be repeated")] = None,
    out: Annotated[Path | None, typer.Option(help="run directory; default: runs/<data>-<method>-<seed>")] = None,
    profile: Annotated[str | None, typer.Option(help="activation storage: u8 (CPUs) or s8 (TensorRT)")] = None,
    recipe: Annotated[str | None, typer.Option(help="f8net-tiny, f8net-finetune or f8net-conventional (edgeft list recipes)")] = None,
    loss: Annotated[str | None, typer.Option(help="loss of QAT: labels, or distill (to the float net, no labels)")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any keys of the configuration")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any key, e.g. quant.format=grid; may be repeated")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="seed of splits, order, augmentation and heads")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the run in --out where it was stopped")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check data, backbone and settings, say what would be done, do nothing")
    ] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="print every key with its value as TOML and exit")] = False,
    json_: Json = False,
) -> None:
    """Fine-tune and quantize a backbone.

    Accuracy is measured in and out of distribution, in float and in fixed point. With no options: LP-FT of the bundled
    backbone on the embedded data set, offline, a few minutes on two CPU cores.

    Example: edgeft train-quantize --backbone mobilenetv2_100 --pretrained --data photos/ --ood sketch=sketches/ --out runs/mbv2
    """
    from edgeft.config import build_config, to_toml

    flags = {
        "train.method": method, "model.backbone": backbone, "model.weights": weights, "model.pretrained": pretrained,
        "data.source": data, "data.ood": ood or None, "out": out, "quant.profile": profile, "quant.recipe": recipe, "quant.loss": loss,
        "seed": seed, "device": device,
    }  # fmt: skip
    resolved = build_config(config, flags, set_)
    if print_config:
        print(as_json(resolved.model_dump(mode="json")) if json_ else to_toml(resolved))
    elif dry_run:
        _print_plan(resolved, json_)
    else:
        _train(resolved, resume, json_)


def _print_plan(config: "Config", json_: bool) -> None:
    from edgeft import pipeline

    lines = pipeline.plan(config)
    print(as_json({"plan": lines}) if json_ else "\n".join(lines))


def _train(config: "Config", resume: bool, json_: bool) -> None:
    from edgeft import pipeline
    from edgeft.report import render
    from edgeft.show import one_line, to_json

    artifact = pipeline.train_quantize(config, resume=resume, progress=progress())
    if is_main_process():
        print(as_json(to_json(artifact)) if json_ else f"{render(artifact.report())}\nwrote {one_line(artifact)}")


@app.command()
def export(
    run: Run = None,
    target: Annotated[
        list[str] | None, typer.Option(help="what to export to (edgeft list targets); may be repeated; default: onnx")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="where to write; default: RUN/export, one folder for each target")] = None,
    no_evaluate: Annotated[bool, typer.Option("--no-evaluate", help="verify, but do not measure accuracy on the data set again")] = False,
    json_: Json = False,
) -> None:
    """Export a run and verify it.

    The exported model must give the same integers as the run, code for code; otherwise the exit code is 1.

    Example: edgeft export runs/mbv2 --target onnx --out build/mbv2
    """
    from edgeft.artifact import latest_run
    from edgeft.export import TARGETS

    targets = target or ["onnx"]
    for name in targets:
        TARGETS.entry(name)
    from edgeft import exporting

    results = exporting.export(run or latest_run(), targets, out, evaluate=not no_evaluate, progress=progress())
    if json_:
        print(as_json([{"target": result.target, "path": str(result.path), **result.summary} for result in results]))
    else:
        print("\n".join(line for result in results for line in result.lines))


@app.command()
def show(
    run: Run = None,
    formats: Annotated[bool, typer.Option("--formats", help="the number format of every layer as well")] = False,
    saturation: Annotated[bool, typer.Option("--saturation", help="what saturates in and out of distribution as well")] = False,
    json_: Json = False,
) -> None:
    """Show a run: what it is and how accurate.

    Every file is checked against its hash first.
    """
    from edgeft import show as words
    from edgeft.artifact import Artifact, latest_run

    artifact = Artifact.load(run or latest_run())
    if json_:
        print(as_json(words.to_json(artifact)))
        return
    parts = [words.describe(artifact)]
    parts += [words.formats(artifact)] if formats else []
    parts += [words.saturation(artifact)] if saturation else []
    print("\n\n".join(parts))


_LISTS = {
    "methods": "edgeft.methods:METHODS",
    "recipes": "edgeft.quant.recipes:RECIPES",
    "quantizers": "edgeft.quant:QUANTIZERS",
    "targets": "edgeft.export:TARGETS",
    "datasets": "edgeft.data:DATASETS",
    "backbones": "edgeft.quant:BACKBONES",
}


@app.command("list")
def list_(what: Annotated[str, typer.Argument(metavar="|".join(_LISTS))], json_: Json = False) -> None:
    """List what can be chosen."""
    import importlib

    from edgeft.registry import Registry, nearest

    if what not in _LISTS:
        close = nearest(what, list(_LISTS), n=1)
        raise ConfigError(f"cannot list '{what}'", f"known: {', '.join(_LISTS)}" + (f"\ndid you mean: {close[0]}" if close else ""))
    module, _, attribute = _LISTS[what].partition(":")
    registry: Registry = getattr(importlib.import_module(module), attribute)
    entries = list(registry)
    if json_:
        print(as_json([{"name": entry.name, "summary": entry.summary, "extra": entry.extra} for entry in entries]))
        return
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        print(f"{entry.name:{width}}  {entry.summary}" + (f"  (needs pip install 'edgeft[{entry.extra}]')" if entry.extra else ""))


@app.command()
def doctor(json_: Json = False) -> None:
    """Say what this machine offers.

    Versions, devices, CPU flags that matter, ONNX Runtime providers, compilers, TensorRT, and extras that are missing.
    """
    from edgeft.doctor import examine, render

    found = examine()
    print(as_json(found) if json_ else render(found))
    if found["problems"]:
        raise typer.Exit(EXIT_FAILED)


app.registered_commands.sort(key=lambda verb: ORDER.index(verb.name or getattr(verb.callback, "__name__", "")))


def _fail(message: str, hint: str = "") -> None:
    print(f"error: {message}", file=sys.stderr)
    for line in hint.splitlines():
        print(f"  {line.strip()}", file=sys.stderr)


def _explain(error: EdgeftError | OSError) -> int:
    if isinstance(error, EdgeftError):
        _fail(error.message, error.hint)
        return error.exit_code
    where = f" ('{error.filename}')" if error.filename else ""
    if error.errno in OUT_OF_SPACE:
        _fail(f"no space left on the device{where}", "free some space, then repeat the command (train-quantize: with --resume)")
    else:
        _fail(f"{error.strerror or error}{where}", "edgeft --debug ... shows where")
    return EXIT_UNABLE


def _explain_usage(error: Any) -> int:
    similar = getattr(error, "possibilities", None)
    message = error.message if similar else error.format_message()
    verb = error.ctx.command_path if error.ctx else "edgeft"
    _fail(" ".join(message.split()), (f"did you mean: {similar[0]}\n" if similar else "") + f"{verb} --help")
    return EXIT_UNABLE


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 success, 1 checked and failed, 2 could not be done, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    options = Global()
    try:
        code = app(args=arguments, prog_name="edgeft", standalone_mode=False, obj=options)
    except UsageError as error:
        return _explain_usage(error)
    except (EdgeftError, OSError) as error:
        if options.debug:
            raise
        return _explain(error)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        _fail("interrupted", "continue with the same command and --resume" if "train-quantize" in arguments else "")
    return code or 0
