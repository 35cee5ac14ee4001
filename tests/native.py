"""Compile C for a test."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from edgeft import kernels

STRICT = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror")


def compile_shared(source: str, directory: Path) -> ctypes.CDLL:
    """A shared object of `source` with edgeft's headers and strict warnings. Skips the test when there is no compiler."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("NOT TESTED: the C sources, because there is no cc, gcc or clang")
    file, library = directory / "test.c", directory / "test.so"
    file.write_text(source)
    command = [compiler, *STRICT, "-shared", "-fPIC", f"-I{kernels.include_dir()}", str(file), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))
