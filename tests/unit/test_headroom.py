"""Images that formats must have room for, and formats that have it."""

from typing import Any

import numpy as np
import pytest
import torch

from edgeft.config import QuantConfig
from edgeft.data.preprocess import Preprocessing
from edgeft.errors import DataError
from edgeft.quant.calibration.calibrate import calibrate
from edgeft.quant.calibration.headroom import CORRUPTIONS, corrupt, corrupted, shifted_images
from edgeft.quant.control import FormatControl
from edgeft.quant.plan import IMAGE
from tests.nets import bytes_of, prepared, randomise, residual_net
from tests.tiny import DATA

P = Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)


def test_every_corruption_changes_the_image_and_repeats() -> None:
    images = bytes_of(2 * len(CORRUPTIONS) + 2)[2:]
    found = corrupted(images, seed=3)
    assert found.shape == images.shape
    assert found.dtype == np.uint8
    changed = (found != images).mean((1, 2, 3))
    assert all(share > 0.2 for share in changed), dict(zip(CORRUPTIONS * 2, changed, strict=True))
    assert np.array_equal(found, corrupted(images, seed=3))
    assert not np.array_equal(found, corrupted(images, seed=4))
    assert np.array_equal(found[:5], corrupted(images[:5], seed=3)), "an image's view depends on its place alone"


def test_corruptions_fit_the_smallest_images() -> None:
    for kind in CORRUPTIONS:
        assert corrupt(kind, torch.full((3, 1, 1), 7, dtype=torch.uint8), np.random.default_rng(0)).shape == (3, 1, 1)


def test_which_images_are_looked_at() -> None:
    assert shifted_images("none", DATA, P, 8, 0) is None
    found = shifted_images("augmented", DATA, P, 8, 0)
    assert found is not None
    assert found.shape == (8, 3, 16, 16)
    with pytest.raises(DataError, match="headroom target needs unlabelled images"):
        shifted_images("target", DATA, P, 8, 0)


def test_formats_hold_the_larger_of_both_statistics() -> None:
    images = bytes_of(12, seed=1)[2:]
    dim = (bytes_of(12, seed=3)[2:] // 8 + 112).astype(np.uint8)
    config = QuantConfig(rounding="nearest", equalize=False, fit_ranges=False)

    def fracs(*given: np.ndarray) -> dict[str, int]:
        net, _ = calibrate(prepared(randomise(residual_net())), torch.from_numpy(given[0]), config, lambda *_: None,
                           *(torch.from_numpy(more) for more in given[1:]))  # fmt: skip
        return {p.name: net.frac(p.name) for p in net.points if p.name != IMAGE}

    narrow, wide = fracs(dim), fracs(dim, images)
    assert all(wide[name] <= narrow[name] for name in narrow)
    assert any(wide[name] < narrow[name] for name in narrow)
    assert fracs(images, dim) == wide == fracs(images), "images that need less room change nothing"


def test_training_does_not_take_the_room_back() -> None:
    def end(headroom: Any) -> tuple[dict[str, int], dict[str, int]]:
        config = QuantConfig(format="std", rounding="nearest", headroom=headroom, update_every=1, sigma_momentum=0.0)
        images = torch.from_numpy(bytes_of(8, seed=1))
        net, sigmas = calibrate(prepared(randomise(residual_net())), images, config, lambda *_: None)
        net.set_fracs({p.name: net.frac(p.name) - 2 for p in net.points})
        start = {p.name: net.frac(p.name) for p in net.points}
        control = FormatControl(net, config, sigmas)
        for step in range(6):
            control.before_step(step, 100)
            net(images)
        return start, {p.name: net.frac(p.name) for p in net.points}

    start, after = end("augmented")
    assert after == start
    start, after = end("none")
    assert any(after[name] > start[name] for name in start)
