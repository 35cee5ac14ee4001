"""The repository's own rules: who imports whom, what is packaged, what the README promises, how long things are."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from edgeft.cli import app

ROOT = Path(__file__).resolve().parent.parent
SOURCE_DIRS = ("edgeft", "export", "kernels", "tests", "benchmarks")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

LEVELS = {
    "edgeft": 0, "edgeft.errors": 0, "edgeft.registry": 0, "edgeft.fixedpoint": 0, "edgeft.report": 0, "edgeft.progress": 0,
    "edgeft.ops": 0, "edgeft.bounds": 0, "edgeft.opcheck": 0,
    "edgeft.graph": 1, "edgeft.quant.formats": 1, "edgeft.artifact": 1, "edgeft.config": 1, "edgeft.runner": 1, "edgeft.data": 1,
    "edgeft.methods": 1, "edgeft.quant": 1, "edgeft.quant.calibration": 1, "edgeft.quant.tracing": 1, "edgeft.quant.backbones": 1,
    "edgeft.quant.recipes": 1, "edgeft.show": 1, "edgeft.show_formats": 1, "edgeft.show_saturation": 1,
    "edgeft.bench": 1, "edgeft.bench.numbers": 1, "edgeft.bench.timing": 1, "edgeft.bench.machine": 2, "edgeft.bench.store": 2,
    "edgeft.bench.results": 2, "edgeft.bench.text": 2, "edgeft.bench.plots": 2, "edgeft.bench.page": 2,
    "edgeft.bench.opening": 4, "edgeft.bench.memory": 4, "edgeft.bench.peers": 4, "edgeft.bench.scoring": 4,
    "edgeft.bench.candidates": 4, "edgeft.bench.measuring": 4, "edgeft.benching": 4,
    "edgeft.interpret": 2, "edgeft.kernels": 2, "edgeft.doctor": 2,
    "edgeft.selfcheck": 2, "edgeft.diagnosis": 0, "edgeft.diagnosis.intervals": 1, "edgeft.diagnosis.effective": 1,
    "edgeft.diagnosis.points": 1, "edgeft.diagnosis.quantization": 1, "edgeft.diagnosis.effective_text": 1, "edgeft.diagnosis.report": 1,
    "edgeft.diagnosis.parts": 1, "edgeft.diagnosis.family": 4, "edgeft.diagnosing": 4,
    "edgeft.evaluation": 0, "edgeft.evaluation.metrics": 1, "edgeft.evaluation.paired": 1, "edgeft.evaluation.calibration": 1,
    "edgeft.evaluation.detection": 1, "edgeft.evaluation.filters": 1, "edgeft.evaluation.weather": 1, "edgeft.evaluation.corruptions": 1,
    "edgeft.evaluation.labelmaps": 1, "edgeft.evaluation.movement": 1, "edgeft.evaluation.saturating": 1, "edgeft.evaluation.streams": 1,
    "edgeft.evaluation.results": 1, "edgeft.evaluation.rendering": 1, "edgeft.evaluating": 4,
    "edgeft.exporting": 4, "edgeft.sweeping": 4, "edgeft.verifying": 4, "edgeft.pipeline": 4, "edgeft.predicting": 4,
    "edgeft.reprobing": 4,
    "edgeft.cli": 5, "edgeft.cli_app": 5, "edgeft.cli_measure": 5, "edgeft.cli_report": 5, "edgeft.__main__": 5,
}  # fmt: skip
OTHERS = 3
"""Level of edgeft.export.* and of every module of the training half."""
HEAVY = {"torch", "torchvision", "timm", "brevitas", "accelerate"}
RUNTIMES = {"onnx", "onnxruntime", "openvino", "tensorrt"}


def python_files(*folders: str) -> list[Path]:
    # rglob does not follow the links edgeft/export and edgeft/kernels, so that every file comes once.
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def module_name(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("export", "kernels"):
        parts.insert(0, "edgeft")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGE_FILES = python_files("edgeft", "export", "kernels")
MODULES = {module_name(file): ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE_FILES}


def only_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST, *, top_only: bool = False) -> Iterator[str]:
    """Names of imported modules ("a.b" also for `from a import b` when a.b is a module of ours), without those for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (full if (full := f"{node.module}.{alias.name}") in MODULES else str(node.module) for alias in node.names)
        elif not only_types(node) and not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, top_only=top_only)


def level(module: str) -> int:
    return LEVELS.get(module, OTHERS)


def ours(module: str) -> bool:
    return module == "edgeft" or module.startswith("edgeft.")


def exporting_half(module: str) -> bool:
    return f"{module}.".startswith("edgeft.export.")


def test_every_module_was_found() -> None:
    assert {"edgeft.cli", "edgeft.export", "edgeft.kernels", "edgeft.quant.formats"} <= MODULES.keys()
    assert len(MODULES) == len(PACKAGE_FILES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_only(module: str) -> None:
    upward = [name for name in imports(MODULES[module]) if ours(name) and level(name) > level(module)]
    assert not upward, f"{module} (level {level(module)}) imports from above: {upward}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_export_and_training_do_not_import_each_other(module: str) -> None:
    if level(module) != OTHERS:
        return
    half = exporting_half(module)
    sideways = [name for name in imports(MODULES[module]) if ours(name) and level(name) == OTHERS and exporting_half(name) != half]
    assert not sideways, f"{module} imports from the other half: {sideways}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_packages_stay_in_their_place(module: str) -> None:
    tree = MODULES[module]
    packages = {name.partition(".")[0] for name in imports(tree)}
    at_import = {name.partition(".")[0] for name in imports(tree, top_only=True)}
    if exporting_half(module) or (level(module) < OTHERS and module != "edgeft.doctor"):
        assert not packages & HEAVY
    if level(module) > OTHERS or module == "edgeft.doctor":
        assert not at_import & (HEAVY | RUNTIMES) or level(module) == 4
    if module != "edgeft.quant.brevitas_bridge" and module != "edgeft.doctor":
        assert "brevitas" not in packages
    if not exporting_half(module) and module != "edgeft.doctor":
        assert not packages & RUNTIMES


def test_light_modules_and_help_do_not_load_torch() -> None:
    light = [name for name in MODULES if level(name) < OTHERS or exporting_half(name)]
    code = f"import importlib, sys\nfor name in {light!r}: importlib.import_module(name)\n"
    code += "from edgeft.cli import main\nassert main(['--help']) == 0 and main(['train-quantize', '--help']) == 0\n"
    code += f"print('loaded:', sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize("file", python_files(*SOURCE_DIRS), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_are_absolute_and_lengths_are_bounded(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert str(node.module).partition(".")[0] not in ("export", "kernels")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


def test_the_package_list_is_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(module_name(file) for file in PACKAGE_FILES if file.name == "__init__.py")
    for package, folder in settings["package-dir"].items():
        link = ROOT / package.replace(".", "/")
        if link.is_symlink():
            assert link.readlink() == Path("..") / folder


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def readme_commands(program: str) -> list[list[str]]:
    text = "".join(blocks("sh")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True)) and words[0] == program]


def test_every_edgeft_command_of_the_readme_parses() -> None:
    commands = readme_commands("edgeft")
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    assert {words[1] for words in commands} == set(verbs)
    for words in commands:
        verbs[words[1]].make_context(words[1], words[2:])


def test_every_make_command_of_the_readme_runs_in_continuous_integration() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    ci = "".join((ROOT / name).read_text(encoding="utf-8") for name in (".ci/run", ".github/workflows/ci.yml"))
    commands = [words[1] for words in readme_commands("make")]
    assert {"demo", "test"} <= set(commands) <= set(targets)
    for name in ("demo", "test"):
        assert f"make {name}" in ci


def test_python_of_the_readme_compiles_and_names_what_exists() -> None:
    import edgeft

    for block in blocks("python"):
        names = {
            node.attr for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "edgeft"
        }
        assert names <= set(edgeft.__all__)
