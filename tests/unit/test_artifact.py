"""Artifacts: written whole or not at all, checked on opening, and every refusal names what is wrong."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeft import artifact as module
from edgeft.artifact import Arrays, Artifact, atomic_write, claim_run, is_finished, latest_run, write_artifact
from edgeft.errors import ArtifactError
from edgeft.report import EvalReport, ModelResult, SplitResult

REPORT = EvalReport((ModelResult("float", (SplitResult("id", "id", 10, 9),)),))
CONFIG = {"seed": 0, "out": "somewhere", "train": {"method": "lpft", "lr": [0.1]}, "model": {"args": {}}}


def write(path: Path, **changes: Any) -> Artifact:
    arguments: dict[str, Any] = {
        "kind": "quantized",
        "config": CONFIG,
        "seed": 3,
        "preprocessing": {"size": 48},
        "classes": ("cat", "dog"),
        "arrays": {"samples.safetensors": {"images": np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2), "labels": np.array([1])}},
        "documents": {"report.json": REPORT.to_json(), "formats.json": {"conv": "s8.5"}},
    }
    return write_artifact(path, **(arguments | changes))


def test_round_trip(tmp_path: Path) -> None:
    written = write(tmp_path / "run", parent="abc")
    read = Artifact.load(tmp_path / "run")
    assert read.manifest == written.manifest
    assert read.digest == written.digest
    assert (read.manifest.kind, read.manifest.seed, read.manifest.classes, read.manifest.parent) == ("quantized", 3, ("cat", "dog"), "abc")
    assert read.report() == REPORT
    assert read.formats() == {"conv": "s8.5"}
    np.testing.assert_array_equal(read.samples()["images"], np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2))
    assert read.size_bytes == sum((tmp_path / "run" / name).stat().st_size for name in read.manifest.files)
    assert {"python", "numpy"} <= set(read.manifest.versions)


def test_scalars_and_strided_arrays_keep_shape_and_values(tmp_path: Path) -> None:
    arrays: Arrays = {"scalar": np.array(2.5, np.float32), "strided": np.arange(12).reshape(3, 4)[:, ::2].T}
    found = write(tmp_path / "run", arrays={"weights.safetensors": arrays}).arrays("weights.safetensors")
    for name, expected in arrays.items():
        assert found[name].shape == expected.shape
        np.testing.assert_array_equal(found[name], expected)


def test_an_edited_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "run")
    file = tmp_path / "run" / "formats.json"
    file.write_bytes(file.read_bytes().replace(b"s8.5", b"s8.6"))
    with pytest.raises(ArtifactError) as caught:
        Artifact.load(tmp_path / "run")
    assert caught.value.message == f"'{file}' was changed after it was written: its hash is not the one in the manifest"
    assert caught.value.hint == "restore the file, or make the artifact again"


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "run")
    file = tmp_path / "run" / "samples.safetensors"
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ArtifactError) as caught:
        Artifact.load(tmp_path / "run")
    assert caught.value.message == f"'{file}' has 20 bytes, its manifest says {whole}: it was truncated or changed"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    with pytest.raises(ArtifactError) as caught:
        Artifact.load(tmp_path / "run")
    assert caught.value.message == f"'{tmp_path}/run/report.json' is missing"


def test_a_truncated_manifest_is_named(tmp_path: Path) -> None:
    write(tmp_path / "run")
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:40])
    with pytest.raises(ArtifactError, match=r"manifest\.json' is truncated or is not JSON"):
        Artifact.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 7}, "'{file}' has schema 7, this version reads 1"),
        ({"kind": "other"}, "'{file}' is of kind 'other'; known: finetuned, quantized, exported"),
        ({"extra": 1}, "'{file}' has missing or unknown keys: 'extra'"),
        ({"files": {"../x": "0"}, "file_bytes": {"../x": 1}}, "the manifest of '{run}' names '../x', which lies outside of it"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run = tmp_path / "run"
    write(run)
    file = run / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ArtifactError) as caught:
        Artifact.load(run)
    assert caught.value.message == message.format(file=file, run=run)


def test_unfinished_foreign_and_absent_directories(tmp_path: Path) -> None:
    claim_run(tmp_path / "run", CONFIG, resume=False)
    (tmp_path / "foreign").mkdir()
    for name, message, hint in [
        ("run", "the run in '{}' is not finished", "repeat its train-quantize command with --resume"),
        ("foreign", "'{}' is not an edgeft run: it has no manifest.json", "give the directory that train-quantize wrote"),
        ("absent", "there is no run at '{}'", "edgeft train-quantize makes one"),
    ]:
        with pytest.raises(ArtifactError) as caught:
            Artifact.load(tmp_path / name)
        assert caught.value.message == message.format(tmp_path / name)
        assert caught.value.hint == hint


def test_a_file_the_artifact_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        write(tmp_path / "run", kind="finetuned").graph()
    assert caught.value.message == f"the finetuned artifact '{tmp_path}/run' has no file 'graph.json'"


def test_existing_files_are_part_of_the_artifact(tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    out.mkdir()
    (out / "model.onnx").write_bytes(b"model")
    write(out, kind="exported", existing=("model.onnx",))
    Artifact.load(out)
    (out / "model.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"model\.onnx' was changed"):
        Artifact.load(out)


def test_a_full_disk_keeps_the_old_file_and_leaves_no_partial_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "last.safetensors"
    atomic_write(file, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError) as caught:
        atomic_write(file, b"new")
    assert caught.value.message == f"no space left on the device while writing '{file}'"
    assert caught.value.hint == "free some space, then repeat the command with --resume"
    assert file.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.safetensors"]


def test_a_write_killed_before_its_end_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run")

    def killed(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "atomic_write", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "run")
    assert not is_finished(tmp_path / "run")


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write(tmp_path / "run", documents={"report.json": {"top1": float("nan")}})


def test_claim_makes_the_run_and_its_work_directory(tmp_path: Path) -> None:
    work = claim_run(tmp_path / "deep" / "run", CONFIG, resume=False)
    assert work == tmp_path / "deep" / "run" / "work"
    assert work.is_dir()
    assert json.loads((work.parent / "run.json").read_text()) == {key: value for key, value in CONFIG.items() if key != "out"}


@pytest.mark.parametrize("finished", [False, True])
def test_claim_refuses_a_directory_with_a_run(tmp_path: Path, finished: bool) -> None:
    claim_run(tmp_path, CONFIG, resume=False)
    if finished:
        write(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        claim_run(tmp_path, CONFIG, resume=False)
    assert caught.value.message == f"'{tmp_path}' already holds {'a finished run' if finished else 'an unfinished run'}"
    assert caught.value.hint == "continue it with --resume, or choose another directory with --out"


def test_claim_resumes_the_same_configuration(tmp_path: Path) -> None:
    claim_run(tmp_path / "run", CONFIG, resume=True)
    assert claim_run(tmp_path / "run", CONFIG | {"out": "elsewhere"}, resume=True) == tmp_path / "run" / "work"


def test_claim_names_the_keys_that_changed(tmp_path: Path) -> None:
    claim_run(tmp_path, CONFIG, resume=False)
    changed = {"seed": 1, "train": {"method": "lpft", "lr": [0.1]}, "model": {"args": {"pad_type": "same"}}}
    with pytest.raises(ArtifactError) as caught:
        claim_run(tmp_path, changed, resume=True)
    assert caught.value.message == (
        f"'{tmp_path}' was started with another configuration:\n  model.args.pad_type: was None, now 'same'\n  seed: was 0, now 1"
    )


@pytest.mark.parametrize("resume", [False, True])
def test_claim_refuses_foreign_files(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError) as caught:
        claim_run(tmp_path, CONFIG, resume=resume)
    assert caught.value.message == f"'{tmp_path}' is not empty and is not a run: it holds 'notes.txt'"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_claim_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ArtifactError, match="is a file, not a directory"):
        claim_run(tmp_path / "run", CONFIG, resume=False)


def test_claim_takes_over_a_directory_left_by_a_kill_before_the_first_file(tmp_path: Path) -> None:
    (tmp_path / ".run.json.partial").write_bytes(b"{")
    claim_run(tmp_path, CONFIG, resume=False)


def test_latest_run_is_the_newest_finished_one(tmp_path: Path) -> None:
    for when, name in enumerate(["b", "a"]):
        write(tmp_path / name)
        os.utime(tmp_path / name / "manifest.json", (when, when))
    claim_run(tmp_path / "c", CONFIG, resume=False)
    assert latest_run(tmp_path) == tmp_path / "a"


def test_latest_run_without_runs(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        latest_run(tmp_path / "runs")
    assert caught.value.message == f"there is no finished run in '{tmp_path}/runs'"
    assert caught.value.hint == "edgeft train-quantize --method lpft makes one"
