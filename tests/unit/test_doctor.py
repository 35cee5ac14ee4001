"""doctor: what it reads, what it compares with, and how it words what is missing."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from edgeft import doctor

PYPROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~ \[]", text)[0] for text in requirements}


def test_lists_are_those_of_the_package() -> None:
    assert set(doctor.REQUIRED) == names(PYPROJECT["project"]["dependencies"])
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert {extra: set(packages) for extra, packages in doctor.EXTRAS.items()} == {extra: names(found) for extra, found in extras.items()}


def test_cpu_flags_are_whole_words() -> None:
    flags = doctor.cpu_flags("flags : fpu avx2 avx512_vnni_not\n")
    assert flags is not None
    assert [name for name, has in flags.items() if has] == ["avx2"]
    arm = doctor.cpu_flags("Features : fp asimd asimddp i8mm")
    assert arm is not None
    assert [name for name, has in arm.items() if has] == ["neon_dotprod", "neon_i8mm"]
    assert doctor.cpu_flags("") is None


def test_this_machine() -> None:
    found = doctor.examine()
    assert found["problems"] == []
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["devices"][0].startswith("cpu (")
    assert "CPUExecutionProvider" in found["onnxruntime_providers"]
    text = doctor.render(found)
    assert found["platform"] in text
    for extra, command in found["missing_extras"].items():
        assert f"extra '{extra}'" in text
        assert command == f"pip install 'edgeft[{extra}]'"


def test_a_missing_requirement_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("torch", "onnxruntime") else installed(name))
    found = doctor.examine()
    assert found["problems"] == ["the required package 'onnxruntime' is not installed", "the required package 'torch' is not installed"]
    assert (found["devices"], found["onnxruntime_providers"]) == ([], [])
    assert "problem" in doctor.render(found)


def test_a_machine_without_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = doctor.examine()
    assert found["compilers"] == {}
    assert "none of cc, gcc, clang" in doctor.render(found)
