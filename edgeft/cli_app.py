"""The command line's frame: the application, options that verbs share, and how results and progress are printed."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edgeft.progress import Progress

EXIT_FAILED, EXIT_UNABLE, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="edgeft",
    help="Fine-tune a timm backbone, train it for 8-bit fixed-point arithmetic, export it exactly, measure it in and out of distribution.",
    epilog="Both lines run as they stand, offline: edgeft train-quantize --method lpft, then edgeft export --target onnx.",
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


@dataclass
class Global:
    """Options before the verb."""

    debug: bool = False


def _version(given: bool) -> None:
    if given:
        from edgeft import __version__

        print(f"edgeft {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")] = False,
) -> None:
    context.obj.debug = debug


Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Run = Annotated[Path | None, typer.Argument(metavar="[RUN]", help="run directory; default: the latest finished one in runs/")]


def as_json(tree: Any) -> str:
    """A result for machines."""
    return json.dumps(tree, indent=1)


def is_main_process() -> bool:
    """Whether this process prints: of several under a launcher, one."""
    return os.environ.get("RANK", "0") == "0"


def progress() -> "Progress":
    """Progress on stderr."""
    from edgeft.progress import Progress

    return Progress(enabled=is_main_process())
