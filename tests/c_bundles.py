"""Write C bundles of graphs, and build and run them as a firmware engineer would."""

import shutil
import subprocess
from pathlib import Path

import pytest

from edgeft.export.c_bundle import write_bundle
from edgeft.graph import IntegerGraph
from tests.graphs import random_images

COMPILERS = ("gcc", "clang")


def write(graph: IntegerGraph, folder: Path, n: int = 4) -> Path:
    """A bundle that replays random images."""
    write_bundle(graph, random_images(graph, n), folder)
    return folder


def need(*programs: str) -> None:
    """Skip, loudly, where a program is missing."""
    missing = [each for each in programs if shutil.which(each) is None]
    if missing:
        pytest.skip(f"NOT TESTED: there is no {', '.join(missing)}")


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints. Fails the test when its exit status is not 0."""
    done = subprocess.run([str(each) for each in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout
