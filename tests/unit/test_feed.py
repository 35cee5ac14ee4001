import numpy as np
import pytest

from edgeft.errors import ConfigError
from edgeft.feed import epoch_steps, share, split_share
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
