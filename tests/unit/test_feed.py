from dataclasses import replace

import numpy as np
import pytest

from edgeft.data.mixing import joined, selected
from edgeft.errors import ConfigError
from edgeft.feed import balanced_order, epoch_steps, share, split_share
from tests.tiny import DATA


def test_steps_hold_every_image_once_and_differ_by_one() -> None:
    steps = epoch_steps(50, 8, 1, seed=1)
    assert sorted(index for step in steps for part in step for index in part) == list(range(50))
    assert {len(step[0]) for step in steps} == {7, 8}
    assert len(steps) == 7
    assert steps == epoch_steps(50, 8, 1, seed=1)
    assert steps != epoch_steps(50, 8, 1, seed=2)


def test_processes_share_a_step_without_overlap() -> None:
    whole, parts = epoch_steps(50, 8, 1, seed=1), epoch_steps(50, 8, 4, seed=1)
    mine = [share(parts, process, accumulate=2) for process in range(2)]
    for number, step in enumerate(whole):
        assert step[0] == [index for process in mine for part in process[2 * number : 2 * number + 2] for index in part]


def test_a_step_that_cannot_be_split_is_an_error() -> None:
    with pytest.raises(ConfigError, match="a step of 2 images cannot be split over 3 processes and micro-batches"):
        epoch_steps(5, 3, 3, seed=0)


def test_shares_of_a_split_cover_it_exactly() -> None:
    parts = [split_share(DATA.val, process, 4) for process in range(4)]
    assert sum(map(len, parts)) == len(DATA.val)
    assert parts[1].labels.tolist() == DATA.val.labels[1::4].tolist()
    assert np.array_equal(parts[1].images.image(2), DATA.val.images.image(9))


def test_balanced_draws_every_class_equally_often_and_all_its_images() -> None:
    labels = np.array([0] * 30 + [1] * 6 + [2] * 5)
    order = balanced_order(labels, seed=1)
    assert len(order) == len(labels)
    assert sorted(np.bincount(labels[order])) == [13, 14, 14]
    assert set(order[labels[order] > 0]) == set(range(30, 41)), "a rare class shows all its images before one comes again"
    draws = np.bincount(order, minlength=41)
    assert draws[:30].max() == 1
    assert {*draws[30:]} <= {2, 3}
    assert np.array_equal(order, balanced_order(labels, seed=1))
    assert not np.array_equal(order, balanced_order(labels, seed=2))
    steps = epoch_steps(41, 8, 1, seed=1, strata=labels)
    assert [index for step in steps for index in step[0]] == order.tolist()


def test_more_classes_than_draws_of_each() -> None:
    assert sorted(balanced_order(np.arange(7), seed=0)) == list(range(7))


def test_strata_are_classes_or_groups_within_them() -> None:
    labels = np.array([0, 1, 0, 1, 1])
    plain = replace(DATA.train, labels=labels)
    grouped = replace(plain, groups=np.array([5, 5, 6, 6, 5]))
    assert plain.strata.tolist() == [0, 1, 0, 1, 1]
    assert grouped.strata.tolist() == [0, 2, 1, 3, 2]
    chosen = selected(grouped, np.array([3, 0]))
    assert chosen.groups is not None
    assert chosen.groups.tolist() == [6, 5]
    assert joined(grouped, plain).groups is None
