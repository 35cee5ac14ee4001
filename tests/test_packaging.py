"""The wheel and the sdist hold everything and work away from the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "edgeft/py.typed",
    "edgeft/fixedpoint.md",
    "edgeft/data/__init__.py",
    "edgeft/methods/__init__.py",
    "edgeft/quant/__init__.py",
    "edgeft/export/__init__.py",
    "edgeft/kernels/__init__.py",
    "edgeft/kernels/include/edgeft_kernels.h",
    "edgeft/kernels/src/conv2d.c",
    "edgeft/export/templates/main.c",
    "edgeft/export/templates/Makefile.in",
    "edgeft/micro/__init__.py",
)
PROBE = """
from importlib.resources import files
import edgeft, edgeft.export, edgeft.kernels
for package in (edgeft, edgeft.export, edgeft.kernels):
    print(package.__file__)
print([entry.name for entry in files("edgeft.micro").iterdir() if entry.name.endswith(".safetensors")])
from edgeft.cli import main
raise SystemExit(main(["list", "targets"]))
"""


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_wheel_and_sdist_work_away_from_the_checkout(tmp_path: Path) -> None:
    dist, site = tmp_path / "dist", tmp_path / "site"
    # Without a target, `build` makes the sdist from the checkout and the wheel from the sdist: both are checked at once.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(ROOT), cwd=tmp_path)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert set(NEEDED) <= set(names)
    assert [name for name in names if name.startswith("edgeft/micro/") and name.endswith(".safetensors")]
    assert not [name for name in names if not name.startswith(("edgeft/", "edgeft-"))]
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert {"export/__init__.py", "kernels/__init__.py", "edgeft/cli.py", "LICENSE", "README.md", "pyproject.toml"} <= members

    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    out = run(sys.executable, "-c", PROBE, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}).splitlines()
    assert out[:3] == [str(site / "edgeft" / part) for part in ("__init__.py", "export/__init__.py", "kernels/__init__.py")]
    assert "safetensors" in out[3]
    assert any(line.startswith("onnx ") for line in out[4:])
