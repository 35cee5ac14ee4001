"""Build a C bundle for the machine at hand: the compiler that is there, and a shared library that goes when the process does."""

import atexit
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

from edgeft.errors import MissingExtraError, UnsupportedError

COMPILERS = ("cc", "gcc", "clang")
BASE_FLAGS = ("-std=c99", "-O3")
NATIVE_FLAGS = ("-march=native", "-mcpu=native")
"""How compilers are told to use all of this processor; the first one that is understood is taken."""
KEEP_LOOPS = "-fno-tree-loop-distribute-patterns"
_SHOWN_LINES = 5


@dataclass(frozen=True)
class Compiler:
    """A C compiler: its path, how reports call it ("gcc 12.2"), the flags that it is given and the instructions that kernels then use."""

    path: str
    name: str
    flags: tuple[str, ...]
    instructions: str

    @property
    def text(self) -> str:
        """Compiler, and the flags and instructions that decide about speed, as a report shows them."""
        flags = " ".join(flag for flag in self.flags if flag.startswith(("-O", "-m")))
        return f"{self.name} {flags} ({self.instructions})"


def find_compiler(names: Sequence[str] = COMPILERS, more: tuple[str, ...] | None = None) -> Compiler:
    """The first of some compilers that is installed, for the machine at hand, or with the flags `more` instead of those that say so.

    Raises MissingExtraError naming what to install.
    """
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        raise MissingExtraError(f"there is no C compiler here: looked for {', '.join(names)}", "apt-get install gcc libc6-dev")
    return _describe(path, more)


def build(folder: Path, sources: Sequence[str], compiler: Compiler, *, traced: bool = False) -> Path:
    """The bundle in `folder` as a shared library; `traced` adds edgeft_run_traced, which shows every tensor.

    Every text is compiled once per process for the same compiler and flags, kernels once for all bundles. Raises UnsupportedError when the
    compiler refuses one.
    """
    with as_file(files("edgeft.export") / "templates") as templates:
        objects = [_object(folder / name, folder, compiler, ("-include", str(templates / "trace.h")) * traced) for name in sources]
        if traced:
            objects.append(_object(templates / "trace.c", folder, compiler))
    library = objects[0].parent / f"{_digest(*(each.name for each in objects))}.so"
    if not library.is_file():
        _call([compiler.path, "-shared", *map(str, objects), "-o", str(library)], compiler, folder)
    return library


def _object(source: Path, folder: Path, compiler: Compiler, more: Sequence[str] = ()) -> Path:
    """A compiled file of a bundle, named after all that it is made of."""
    own = [folder / "model.h", folder / "weights.h"] if source.parent.name != "kernels" else []
    texts = [path.read_bytes() for path in (source, *own, *sorted(folder.glob("kernels/*.h")))]
    found = _objects() / f"{_digest(repr(compiler), *more, *texts)}.o"
    if not found.is_file():
        command = [compiler.path, *compiler.flags, "-fPIC", f"-I{folder}", *more, "-c", str(source), "-o", str(found)]
        _call(command, compiler, folder)
    return found


def _digest(*parts: str | bytes) -> str:
    text = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        text.update(len(data).to_bytes(8, "big") + data)
    return text.hexdigest()


def _call(command: Sequence[str], compiler: Compiler, folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shown = "\n".join(done.stderr.splitlines()[:_SHOWN_LINES])
        raise UnsupportedError(f"{compiler.name} does not compile the bundle '{folder}':\n{shown}", f"the command was: {' '.join(command)}")


@cache
def _describe(path: str, more: tuple[str, ...] | None) -> Compiler:
    """Read what a compiler is from the macros it defines: its name may be cc."""
    done = _preprocess(path, "-dM")
    macros = dict(re.findall(r"^#define (__\w+__) (\d+)$", done.stdout, re.MULTILINE))
    kind = "clang" if "__clang_major__" in macros else "gcc"
    keys = ("__clang_major__", "__clang_minor__") if kind == "clang" else ("__GNUC__", "__GNUC_MINOR__")
    version = ".".join(macros.get(key, "?") for key in keys)
    machine = [flag for flag in NATIVE_FLAGS if _preprocess(path, flag).returncode == 0][:1] if more is None else more
    keep = [KEEP_LOOPS] if _preprocess(path, "-Werror", KEEP_LOOPS).returncode == 0 else []
    flags = (*BASE_FLAGS, *machine, "-ffreestanding", *keep)
    return Compiler(path, f"{kind} {version}", flags, _instructions(path, flags))


def _instructions(path: str, flags: Sequence[str]) -> str:
    """What kernels/include/edgeft_vector.h chooses for these flags: fast kernels, or portable ones where it has none."""
    with as_file(files("edgeft.kernels") / "include") as folder:
        command = [path, *flags, "-dM", "-E", str(folder / "edgeft_vector.h")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r'^#define EDGEFT_ISA "(.*)"$', done.stdout, re.MULTILINE)
    return f"{found[1]} kernels" if found else "kernels unknown"


def _preprocess(path: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([path, *flags, "-E", "-x", "c", "/dev/null"], capture_output=True, text=True, check=False)


@cache
def _objects() -> Path:
    """A folder of this process and this user alone: nobody else can put a library there."""
    folder = tempfile.mkdtemp(prefix="edgeft-c-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
