"""The whole suite on tiny Runners: what it says, what it keeps, what it computes again, and what it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgeft.data import NO_LABEL, Dataset, Split
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import ArtifactError, ConfigError, DataError, TrainingError
from edgeft.evaluation import recording, suite
from edgeft.evaluation.corruptions import MAIN, corrupt
from edgeft.evaluation.metrics import Share
from edgeft.evaluation.recording import Chosen, Output, Recorder, View
from edgeft.evaluation.rendering import render
from edgeft.evaluation.results import EvaluationReport
from edgeft.evaluation.sets import TestSet
from edgeft.evaluation.suite import Settings, Subject, evaluate_subjects
from edgeft.progress import Progress
from edgeft.runner import Images, Logits
from tests import tiny

QUIET = Progress(False)
P = tiny.PREPROCESSING
FEW = ("impulse_noise", "fog", "saturate")


class ChannelMeans:
    """Scores are channel means, in the classes' order (blue, green, red); `coarse` rounds them, as fixed point does."""

    def __init__(self, name: str, coarse: float = 0.0) -> None:
        self.name, self.coarse, self.n_images = name, coarse, 0

    def features(self, images: Images) -> NDArray[np.float32]:
        found: NDArray[np.float32] = images.mean(axis=(2, 3), dtype=np.float64).astype(np.float32)
        return found

    def logits(self, images: Images) -> Logits:
        self.n_images += len(images)
        scores: Logits = self.features(images) / np.float32(4)
        return np.round(scores / np.float32(self.coarse)) * np.float32(self.coarse) if self.coarse else scores


def subjects(*, with_features: bool = True) -> list[Subject]:
    exact, coarse = ChannelMeans("exact"), ChannelMeans("coarse", 0.5)
    return [Subject("float", "f" * 64, exact, exact.features if with_features else None), Subject("int8", "f" * 64, coarse)]


def evaluated(cache: Path, given: list[Subject], dataset: Dataset = tiny.DATA, p: Preprocessing = P, **options: Any) -> EvaluationReport:
    settings = options.pop("settings", Settings(FEW, severities=(1, 5), batch=16))
    return evaluate_subjects(given, dataset, p, settings, run="runs/tiny", cache=cache, progress=QUIET, **options)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> EvaluationReport:
    groups = {"dim": tuple("even" if index % 2 == 0 else "odd" for index in range(30))}
    unknown = Split("far", "ood", tiny.split("far", "ood", 40, 9).images, np.full(40, NO_LABEL, np.int64))
    return evaluated(tmp_path_factory.mktemp("cache"), subjects(), extra=[TestSet(unknown)], groups=groups)


def top(scores: Callable[[Images], Logits], split: Split, change: Callable[[Images], Images] = lambda images: images) -> NDArray[np.int64]:
    images = np.stack([split.images.image(index).transpose(2, 0, 1) for index in range(len(split))])
    answers: NDArray[np.int64] = scores(change(images)).argmax(axis=1)
    return answers


def test_accuracy_is_that_of_the_definitions(report: EvaluationReport) -> None:
    exact, coarse = report.models
    answers, others = top(ChannelMeans("").logits, tiny.DATA.id_test), top(ChannelMeans("", 0.5).logits, tiny.DATA.id_test)
    right, also = answers == tiny.DATA.id_test.labels, others == tiny.DATA.id_test.labels
    assert (exact.sets[0].name, exact.sets[0].top1, exact.sets[0].top5) == ("id", Share(30, int(right.sum())), None)
    assert coarse.sets[0].top1 == Share(30, int(also.sum()))
    assert exact.sets[0].against is None
    against = coarse.sets[0].against
    assert against is not None
    assert (against.flips.flipped, against.flips.negative) == (int((answers != others).sum()), int((right & ~also).sum()))
    assert against.top1.points == pytest.approx(100 * (also.mean() - right.mean()))
    assert against.top1.low <= against.top1.points <= against.top1.high
    assert [found.name for found in exact.sets] == ["id", "dim"], "images of other classes have no accuracy"
    assert exact.mean_ood == exact.sets[1].top1.value


def test_corruptions_are_those_of_the_generator(report: EvaluationReport) -> None:
    exact, coarse = report.models
    assert [found.corruption for found in exact.corruptions] == list(FEW)
    split = tiny.DATA.id_test
    for found in exact.corruptions:
        for level in (1, 5):
            name = found.corruption
            answers = top(ChannelMeans("").logits, split, lambda images, n=name, s=level: corrupt(images, n, s, range(30)))  # type: ignore[misc]
            assert found.severities[level] == Share(30, int((answers == split.labels).sum()))
    costs = {found.corruption: found.cost for found in coarse.corruptions}
    for found, base in zip(coarse.corruptions, exact.corruptions, strict=True):
        cost = costs[found.corruption]
        assert cost is not None
        assert cost.points == pytest.approx(100 * (base.error - found.error))
    main = [found.error for found in coarse.corruptions if found.corruption in MAIN]
    assert coarse.mean_corruption_error == pytest.approx(sum(main) / 2)
    lost = sorted((cost.points, name) for name, cost in costs.items() if cost and cost.points < 0)
    assert [found.corruption for found in coarse.worst()] == [name for _, name in lost[:3]]
    assert lost, "the example has something to show"
    assert report.corruptions.startswith("a subset: 3 of the 19 common corruptions (edgeft's own) impulse_noise, fog, saturate;")


def test_everything_else_is_there(report: EvaluationReport) -> None:
    exact, coarse = report.models
    assert exact.temperature is not None
    assert coarse.temperature is not None
    assert exact.temperature != coarse.temperature, "fitted to each model"
    assert not exact.temperature_at_bound
    assert not any("bound" in note for note in report.notes)
    found = exact.sets[0]
    assert found.calibrated is not None
    assert found.calibrated != found.calibration
    assert exact.sets[1].groups.keys() == {"even", "odd"}
    assert exact.sets[1].worst_group is not None
    assert exact.sets[0].worst_group is None
    assert [(one.name, one.kind, one.n_id, one.n_ood) for one in exact.detection] == [
        ("dim", "shifted", 30, 30),
        ("far", "other classes", 30, 40),
    ]
    assert exact.detection[0].auroc.keys() == {"msp", "energy", "mahalanobis"}
    assert coarse.detection[0].fpr95.keys() == {"msp", "energy"}
    assert [one.pixels for one in coarse.shifts] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(one.same.n == 30 for one in coarse.shifts)
    assert exact.resizes == ()
    assert "resize filters not measured: the images come in the network's size" in report.notes


def test_the_report_is_json_and_text(report: EvaluationReport) -> None:
    tree = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert tree["schema"] == 1
    assert tree["models"][1]["worst_corruptions"] == [found.corruption for found in report.models[1].worst()]
    assert tree["models"][0]["sets"][0]["top1"].keys() == {"n", "correct", "value", "interval"}
    assert tree["models"][0]["corruptions"][0]["severities"].keys() == {"1", "5"}
    text = render(report)
    for part in ("run runs/tiny", "ood:dim", "worst group", "costs most on ", "mahalanobis", "saturate (extra)", "other classes", "FPR@95"):
        assert part in text
    assert "CIFAR-10-C" not in text
    assert "ImageNet-C" not in text
    assert max(map(len, text.splitlines())) < 200


def test_too_few_images_are_said(tmp_path: Path) -> None:
    found = evaluated(tmp_path, subjects(), settings=Settings(n=12))
    assert found.models[0].sets[0].top1.n == 12
    assert "set 'id': n = 12 is too small for a 95 % interval that says much (*: fewer than 30)" in found.notes
    assert "*" in render(found)
    assert found.models[0].corruptions == ()
    assert found.corruptions == "none"


def test_a_model_alone_is_compared_with_nothing(tmp_path: Path) -> None:
    found = evaluated(tmp_path, subjects(with_features=False)[:1])
    assert found.models[0].sets[0].against is None
    assert found.models[0].corruptions[0].cost is None
    assert found.models[0].worst() == ()
    render(found)


def test_answers_restricted_to_a_mask(tmp_path: Path) -> None:
    both = tiny.split("two", "ood", 40, 5, n_classes=2)
    (free, restricted) = (
        evaluated(tmp_path, subjects()[:1], extra=[TestSet(both, valid)], settings=Settings()).models[0].sets[-1]
        for valid in (None, np.array([0, 1]))
    )
    assert (free.permitted_answers, restricted.permitted_answers) == (3, 2)
    assert restricted.top1.correct > free.top1.correct
    answers = top(lambda images: ChannelMeans("").logits(images)[:, :2], both)
    assert restricted.top1.correct == int((answers == both.labels).sum())


def test_resize_filters(tmp_path: Path) -> None:
    p = replace(P, size=12, crop_pct=0.9)
    found = evaluated(tmp_path, subjects(), p=p, settings=Settings())
    assert [one.filter for one in found.models[0].resizes] == ["bilinear", "bicubic", "nearest", "box"]
    assert all(one.top1.n == one.flips.n == 30 for one in found.models[0].resizes)
    by_name = {one.filter: one.flips.flipped for one in found.models[0].resizes}
    assert by_name["bilinear"] <= by_name["nearest"]


# Recording


def test_a_second_evaluation_computes_nothing(tmp_path: Path) -> None:
    first, second = subjects(), subjects()
    before = evaluated(tmp_path, first)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert before == evaluated(tmp_path, second)
    assert [subject.runner.n_images for subject in second] == [0, 0]  # type: ignore[attr-defined]
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert all(path.suffix == ".npy" for path in files)
    third = subjects()
    evaluated(tmp_path, third, settings=Settings(("fog", "snow"), severities=(1, 5), batch=16))
    assert [subject.runner.n_images for subject in third] == [60, 60], "snow only"  # type: ignore[attr-defined]


def test_what_makes_other_logits_makes_other_files(tmp_path: Path) -> None:
    chosen = Chosen.of(tiny.DATA.id_test, None, 0, P)
    recorder = Recorder(tmp_path, P, batch=16, seed=0)
    base = Output("float", "a" * 64, ChannelMeans("").logits)
    view = View("fog", 2)
    fewer, dim = Chosen.of(tiny.DATA.id_test, 20, 0, P), Chosen.of(tiny.DATA.ood[0], None, 0, P)
    others = Chosen.of(tiny.split("id", "id", 30, 99), None, 0, P)
    paths = [
        recorder.path(base, chosen, view), recorder.path(replace(base, digest="b" * 64), chosen, view),
        recorder.path(replace(base, name="int8"), chosen, view), recorder.path(base, chosen, View("fog", 3)),
        recorder.path(base, chosen, View()), recorder.path(base, dim, view), recorder.path(base, fewer, view),
        recorder.path(base, others, view), Recorder(tmp_path, P, batch=16, seed=1).path(base, chosen, view),
    ]  # fmt: skip
    assert len(set(paths)) == len(paths)
    assert Recorder(tmp_path, P, batch=7, seed=0).path(base, chosen, view) == paths[0]


def test_a_smaller_n_is_part_of_a_larger_one_with_the_same_views() -> None:
    few, many = (Chosen.of(tiny.DATA.id_test, n, 3, P) for n in (8, 20))
    assert set(few.indices) < set(many.indices)
    images = [np.stack([one.split.images.image(i).transpose(2, 0, 1) for i in range(len(one))]) for one in (few, many)]
    found, whole = (View("snow", 4).apply(given, one.indices, 0) for given, one in zip(images, (few, many), strict=True))
    np.testing.assert_array_equal(found, whole[np.isin(many.indices, few.indices)])


def test_views_arrive_in_order_whatever_the_batch(tmp_path: Path) -> None:
    scores = []
    for batch in (4, 13):
        recorder = Recorder(tmp_path / str(batch), P, batch=batch, seed=0)
        output, chosen = Output("m", "d", ChannelMeans("").logits), Chosen.of(tiny.DATA.id_test, None, 0, P)
        views = [View("fog", 1), View("fog", 5), View("shift", 3)]
        recorder.record([output], chosen, views, lambda *_: None)
        scores.append([recorder.load(output, chosen, view) for view in views])
    for first, second in zip(*scores, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_stopped_evaluation_leaves_no_half_file_and_goes_on(tmp_path: Path) -> None:
    class Stopping(ChannelMeans):
        def logits(self, images: Images) -> Logits:
            if self.n_images >= 100:
                raise KeyboardInterrupt
            return super().logits(images)

    broken = Stopping("exact")
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path, [Subject("float", "f" * 64, broken)])
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    assert all(path.suffix == ".npy" and len(np.load(path)) in (30, 37) for path in kept)
    again = subjects(with_features=False)[:1]
    report = evaluated(tmp_path, again)
    assert report == evaluated(tmp_path / "fresh", subjects(with_features=False)[:1])
    whole = ChannelMeans("exact")
    evaluated(tmp_path / "other", [Subject("float", "f" * 64, whole)])
    assert again[0].runner.n_images < whole.n_images  # type: ignore[attr-defined]


def test_damaged_files_are_computed_again(tmp_path: Path) -> None:
    before = evaluated(tmp_path, subjects())
    files = sorted(path for path in tmp_path.rglob("*.npy"))
    files[0].write_bytes(files[0].read_bytes()[:-4])
    files[1].write_bytes(b"")
    assert before == evaluated(tmp_path, subjects())


def test_memory_does_not_hold_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []
    original = recording.View.apply

    def counted(self: View, images: Images, indices: NDArray[np.int64], seed: int) -> Images:
        waiting.append(len(images))
        return original(self, images, indices, seed)

    monkeypatch.setattr(recording.View, "apply", counted)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    split = tiny.split("id", "id", 300, 1)
    seen = 0

    def call(images: Images) -> Logits:
        nonlocal seen
        seen += len(images)
        assert sum(waiting) - seen <= 4 * 10, "views are made a few batches ahead, not all at once"
        return np.zeros((len(images), 3), np.float32)

    Recorder(tmp_path, P, batch=10, seed=0).record(
        [Output("m", "d", call)], Chosen.of(split, None, 0, P), [View("fog", 1)], lambda *_: None
    )
    assert seen == 300


# Errors


def test_what_is_refused(tmp_path: Path) -> None:
    empty = replace(tiny.DATA, ood=(tiny.split("none", "ood", 0, 1),))
    with pytest.raises(DataError) as caught:
        evaluated(tmp_path, subjects(), empty)
    assert caught.value.message == "split 'none' has no images"
    for settings, message in (
        ({"severities": (0, 1)}, r"severities \[0, 1\] cannot"),
        ({"severities": ()}, r"\[\] cannot"),
        ({"n": 0}, "n = 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Settings(**settings)
    broken = Subject("broken", "d", ChannelMeans("broken"))
    broken.runner.logits = lambda images: np.full((len(images), 3), np.nan, np.float32)  # type: ignore[method-assign]
    with pytest.raises(TrainingError) as failed:
        evaluated(tmp_path, [broken])
    assert failed.value.message == "'broken' gives scores that are not finite on split 'id'"
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write the predictions"):
        evaluated(tmp_path / "file", subjects())


def test_without_validation_images_there_is_no_temperature(tmp_path: Path) -> None:
    found = evaluated(tmp_path, subjects(), replace(tiny.DATA, val=tiny.split("val", "val", 0, 1)), settings=Settings())
    assert found.models[0].temperature is None
    assert found.models[0].sets[0].calibrated is None
    assert "no validation images: no temperature was fitted" in found.notes
    render(found)


def test_a_temperature_at_the_bound_of_its_search_is_flagged(tmp_path: Path) -> None:
    class Knowing(ChannelMeans):
        """Right on every image: its score is the label, which the order of the images tells."""

        def logits(self, images: Images) -> Logits:
            first = self.n_images
            self.n_images += len(images)
            scores: Logits = np.eye(3, dtype=np.float32)[(first + np.arange(len(images))) % 3]
            return scores

    val = replace(tiny.DATA, val=tiny.split("val", "val", 36, 2), id_test=tiny.split("id", "id", 36, 3), ood=())
    found = evaluated(tmp_path, [Subject("knowing", "d", Knowing("knowing"))], val, settings=Settings(batch=12))
    (model,) = found.models
    assert model.temperature_at_bound
    assert found.to_json()["models"][0]["temperature_at_bound"] is True
    (note,) = [line for line in found.notes if "ended at the bound" in line]
    assert note.startswith("the temperature of 'knowing' ended at the bound 0.006738 of its search")
    assert "0.01 (bound)" in render(found)


def test_the_net_of_tiny_goes_through(tmp_path: Path) -> None:
    net = tiny.TinyNet(n_classes=3).eval()

    class Net:
        name = "net"

        @torch.inference_mode()
        def logits(self, images: Images) -> Logits:
            found: Logits = net(torch.from_numpy(images)).numpy()
            return found

    found = evaluated(tmp_path, [Subject("net", "d", Net())], settings=Settings(("glass_blur",), (2,), n=10))
    assert found.models[0].corruptions[0].severities[2].n == 10


def test_top_five_where_there_are_more_classes(tmp_path: Path) -> None:
    class Many(ChannelMeans):
        def logits(self, images: Images) -> Logits:
            return np.concatenate([super().logits(images), np.zeros((len(images), 4), np.float32)], axis=1)

    names = replace(tiny.DATA, classes=tuple("abcdefg"))
    found = evaluated(tmp_path, [Subject("many", "d", Many("many"))], names, settings=Settings()).models[0].sets[0]
    assert found.top5 is not None
    assert found.top5.correct >= found.top1.correct
    assert suite.TOP == 5
