"""Evaluation: counts per split, flips against float, and scores that are not finite."""

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeft.data import Dataset, Split, SplitKind
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import TrainingError
from edgeft.evaluate import evaluate, predictions
from edgeft.progress import Progress
from edgeft.runner import Images, Logits

QUIET = Progress(enabled=False)
SIZE = 8
PREPROCESSING = Preprocessing(SIZE, 1.0, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Levels:
    """Uniform grey images whose byte is their class."""

    def __init__(self, levels: list[int]) -> None:
        self._levels = levels

    def __len__(self) -> int:
        return len(self._levels)

    def image(self, index: int) -> NDArray[np.uint8]:
        return np.full((SIZE, SIZE, 3), self._levels[index], np.uint8)


class Reader:
    """Reads the class off the image, and adds `error` to it."""

    def __init__(self, name: str, error: int = 0) -> None:
        self.name, self._error = name, error

    def logits(self, images: Images) -> Logits:
        scores: Logits = np.eye(4, dtype=np.float32)[(images[:, 0, 0, 0].astype(int) + self._error) % 4]
        return scores


def split(name: str, kind: SplitKind, levels: list[int], labels: list[int]) -> Split:
    return Split(name, kind, Levels(levels), np.array(labels, np.int64))


@pytest.fixture
def dataset() -> Dataset:
    nothing = split("train", "train", [0], [0])
    return Dataset(
        "levels", ("a", "b", "c", "d"), nothing, nothing, split("id", "id", [0, 1, 2, 3, 1], [0, 1, 2, 3, 0]),
        (split("dark", "ood", [0, 1, 2], [0, 0, 0]), split("light", "ood", [3, 3], [3, 3])),
    )  # fmt: skip


def test_predictions_keep_the_order_over_batches(dataset: Dataset) -> None:
    told: list[tuple[int, str]] = []
    found = predictions(Reader("r"), dataset.id_test, PREPROCESSING, 2, lambda n, note: told.append((n, note)))
    np.testing.assert_array_equal(found, [0, 1, 2, 3, 1])
    assert told == [(2, "id"), (2, "id"), (1, "id")]


def test_counts_flips_and_mean(dataset: Dataset) -> None:
    exact, found = evaluate(Reader("float"), dataset, PREPROCESSING, batch=2, float_predictions=None, progress=QUIET)
    assert [(s.label, s.n, s.correct, s.flips) for s in exact.splits] == [
        ("id", 5, 4, None), ("ood:dark", 3, 1, None), ("ood:light", 2, 2, None),
    ]  # fmt: skip
    assert exact.mean_ood == pytest.approx((1 / 3 + 1) / 2)
    found["dark"][0] = 3
    again, _ = evaluate(Reader("again"), dataset, PREPROCESSING, float_predictions=found, progress=QUIET)
    assert [s.flips for s in again.splits] == [0, 1, 0]
    wrong, _ = evaluate(Reader("wrong", error=1), dataset, PREPROCESSING, float_predictions=found, progress=QUIET)
    assert [(s.correct, s.flips) for s in wrong.splits] == [(0, 5), (0, 3), (0, 2)]


def test_scores_that_are_not_finite_are_refused(dataset: Dataset) -> None:
    class Broken(Reader):
        def logits(self, images: Images) -> Logits:
            return np.full((len(images), 4), np.nan, np.float32)

    with pytest.raises(TrainingError) as caught:
        predictions(Broken("fixed point"), dataset.id_test, PREPROCESSING, 2, lambda n, note: None)
    assert caught.value.message == "'fixed point' gives scores that are not finite on split 'id'"
