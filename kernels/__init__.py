"""The C sources of edgeft: freestanding C99, found through the package and not through the file system's layout."""

from importlib.resources import as_file, files
from pathlib import Path


def include_dir() -> Path:
    """Directory for the compiler's -I. The package is installed unpacked, so it stays valid."""
    return _root() / "include"


def source(name: str) -> Path:
    """The file of a kernel: source("conv2d.c") holds edgeft_conv2d."""
    return _root() / "src" / name


def sources() -> list[Path]:
    """Every C file and header, sorted by name."""
    return sorted(_root().rglob("*.[ch]"))


def _root() -> Path:
    with as_file(files("edgeft.kernels")) as path:
        return path
