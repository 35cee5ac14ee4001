"""Fixtures of all tests: seeds, a tiny image folder, a C compiler, and real images where they are."""

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

# Nets in tests are tiny: a second thread costs more than it gives, many times more on a busy machine. Set before numpy and torch load.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COMPILERS = ("cc", "gcc", "clang")

ImageFolder = Callable[..., Path]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random state; torch is seeded by what uses it, so that light tests need not import it."""
    random.seed(0)
    # The legacy global state: libraries under test may draw from it.
    np.random.seed(0)


def draw_folder(
    root: Path, classes: Sequence[str] = ("blue", "green", "red"), *, n: int = 6, size: tuple[int, int] = (20, 16), shift: int = 0
) -> Path:
    """Write a class-per-folder tree and return its root.

    A class is a colour, an image is that colour plus noise: learnable by the smallest net. `shift` is added to every byte.
    """
    rng = np.random.default_rng(len(root.name))
    for index, label in enumerate(classes):
        folder = root / label
        folder.mkdir(parents=True)
        for number in range(n):
            pixels = rng.integers(0, 60, (size[1], size[0], 3))
            pixels[..., index % 3] += 150
            Image.fromarray(np.clip(pixels + shift, 0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> ImageFolder:
    """Maker of class-per-folder trees under the test's folder: image_folder("name", classes, n=..., size=..., shift=...)."""
    return lambda name, *arguments, **options: draw_folder(tmp_path / name, *arguments, **options)


@pytest.fixture
def compiler() -> str:
    """Path of a C compiler. Skips, loudly, where there is none."""
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no C compiler: looked for {', '.join(COMPILERS)}")
    return found


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real image packs and weights: $EDGEFT_DATA, or shared/data beside the checkout. Skips where there is none."""
    folder = Path(os.environ.get("EDGEFT_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images: '{folder}' is not a folder (set EDGEFT_DATA)")
    return folder
