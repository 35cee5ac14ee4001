"""Worker processes: the same views as in this process, in the same order, and an end that is said."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeft.errors import EdgeftError
from edgeft.evaluation import generating
from edgeft.evaluation.corruptions import ALL, corrupt
from edgeft.evaluation.generating import Generators, generators, serve, worker_count
from edgeft.evaluation.recording import Chosen, Output, Recorder, View
from edgeft.evaluation.rendering import render
from edgeft.evaluation.suite import Settings, Subject, evaluate_subjects
from edgeft.progress import Progress
from edgeft.runner import Images
from tests import tiny
from tests.unit.test_evaluation_suite import ChannelMeans

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 24, 24), dtype=np.uint8)
INDICES = np.array([3, 0, 9, 2**33, 7])


def test_workers_make_the_same_views_whatever_the_thread() -> None:
    with generators(2) as workers:
        assert workers is not None
        for name in ALL:
            for level in (1, 5):
                np.testing.assert_array_equal(workers.corrupt(IMAGES, name, level, INDICES, 4), corrupt(IMAGES, name, level, INDICES, 4))
    with generators(0) as none:
        assert none is None


def test_blurs_of_large_images_are_the_same_in_a_worker() -> None:
    large = np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), dtype=np.uint8)
    with generators(1) as workers:
        assert workers is not None
        for name in ("gaussian_blur", "glass_blur", "elastic_transform"):
            np.testing.assert_array_equal(workers.corrupt(large, name, 3, INDICES[:1], 0), corrupt(large, name, 3, INDICES[:1], 0))


def test_records_are_the_same_with_workers(tmp_path: Path) -> None:
    chosen, output = Chosen.of(tiny.DATA.id_test, None, 0, tiny.PREPROCESSING), Output("m", "d", ChannelMeans("").logits)
    views = [View("fog", 1), View("snow", 3), View("shift", 2)]
    found = []
    with generators(2) as workers:
        for number, made_by in enumerate((None, workers)):
            recorder = Recorder(tmp_path / str(number), tiny.PREPROCESSING, batch=7, seed=0, workers=made_by)
            recorder.record([output], chosen, views, lambda *_: None)
            assert recorder.n_computed == 90
            found.append([np.asarray(recorder.load(output, chosen, view)) for view in views])
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


def test_the_report_names_its_speed_and_is_the_same(tmp_path: Path) -> None:
    def evaluated(folder: str, workers: int) -> Any:
        settings = Settings(("fog",), severities=(2,), batch=16, workers=workers)
        subject = Subject("float", "f" * 64, ChannelMeans("exact"))
        return evaluate_subjects(
            [subject], tiny.DATA, tiny.PREPROCESSING, settings, run="r", cache=tmp_path / folder, progress=Progress(False)
        )

    alone, helped = evaluated("a", 0), evaluated("b", 2)
    assert alone == helped
    assert (alone.speed.workers, helped.speed.workers) == (0, 2)
    assert alone.speed.views == 30 + 30 + 37 + 30 + 8 * 30, "id, dim, val, fog, eight shifts; clean ones once"
    assert helped.to_json()["speed"]["views_per_s"] == pytest.approx(helped.speed.views / helped.speed.seconds)
    assert "speed: 367 answers in " in render(helped)
    assert "(corruptions made by 2 processes)" in render(helped)
    assert "speed" not in render(evaluated("a", 0)), "everything was known"


def test_workers_start_when_needed_and_end() -> None:
    workers = Generators(2)
    assert workers._workers == []
    workers.corrupt(IMAGES, "fog", 1, INDICES, 0)
    assert len(workers._workers) == 1
    workers.close()
    assert workers._workers[0].poll() is not None


def test_a_worker_that_died_is_said() -> None:
    with generators(1) as workers:
        assert workers is not None
        workers.corrupt(IMAGES, "fog", 1, INDICES, 0)
        workers._workers[0].kill()
        workers._workers[0].wait()
        with pytest.raises(EdgeftError) as caught:
            workers.corrupt(IMAGES, "fog", 1, INDICES, 0)
        assert caught.value.message == "a process that makes corruptions ended (code -9)"


def test_short_evaluations_start_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert worker_count(generating.MIN_VIEWS - 1) == 0
    assert worker_count(generating.MIN_VIEWS) == 6


def test_the_protocol() -> None:
    about = {"corruption": "contrast", "severity": 5, "seed": 0, "shape": IMAGES.shape}
    one = json.dumps(about).encode() + b"\n" + IMAGES.tobytes() + INDICES.tobytes()
    answers = io.BytesIO()
    serve(io.BytesIO(2 * one), answers)
    view: Images = corrupt(IMAGES, "contrast", 5, INDICES)
    assert answers.getvalue() == 2 * view.tobytes()
    with pytest.raises(EOFError):
        serve(io.BytesIO(one[:500]), io.BytesIO())
