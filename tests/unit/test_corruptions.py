"""Corruptions: repeatable image by image, graded, and what their definitions say."""

import io

import numpy as np
import pytest
from PIL import Image

from edgeft.errors import ConfigError
from edgeft.evaluation import corruptions
from edgeft.evaluation.corruptions import ALL, EXTRA, MAIN, NOT_RANDOM, SUBSET, corrupt, glass_blur, selected
from edgeft.evaluation.filters import disk_blur, distance_to, inside, motion_blurred, plasma, smooth, window, zoomed
from edgeft.evaluation.shifts import translated
from edgeft.evaluation.streams import streams
from edgeft.runner import Images

RNG = np.random.default_rng
# Published parameters of these are not graded by strength, or mix two effects.
NOT_GRADED = {"elastic_transform", "saturate", "glass_blur", "frost", "fog", "spatter"}


def pictures(n: int, side: int) -> Images:
    """Coloured gradients with a bright disk and some noise: every corruption has something to work on."""
    rng, row, column = RNG(side), *np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side), indexing="ij")
    found = np.empty((n, 3, side, side), np.uint8)
    for index in range(n):
        a, b, c = rng.random(3)
        disk = (row - 0.2 - 0.6 * a) ** 2 + (column - 0.2 - 0.6 * b) ** 2 < 0.06
        planes = np.stack([row * a, column * b, (row + column) * c / 2]) + 0.4 * disk + 0.05 * rng.normal(size=(3, side, side))
        found[index] = (255 * planes.clip(0, 1)).astype(np.uint8)
    return found


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("side", [17, 70])
def test_a_view_depends_on_corruption_severity_seed_and_index_alone(name: str, side: int) -> None:
    images = pictures(5, side)
    before = images.copy()
    found = corrupt(images, name, 3, range(10, 15), seed=1)
    assert found.dtype == np.uint8
    assert found.shape == images.shape
    np.testing.assert_array_equal(images, before)
    assert (found != images).any(axis=(1, 2, 3)).all()
    for place in (0, 3):
        np.testing.assert_array_equal(corrupt(images[place : place + 1], name, 3, [10 + place], seed=1)[0], found[place])
    same = corrupt(np.repeat(images[:1], 2, axis=0), name, 3, [7, 8])
    others = corrupt(np.repeat(images[:1], 2, axis=0), name, 3, [7, 8], seed=2)
    random = name not in NOT_RANDOM
    assert (same[0] != same[1]).any() == random
    assert (same != others).any() == random


@pytest.mark.parametrize("side", [32, 96])
def test_strength_grows_with_severity(side: int) -> None:
    images = pictures(12, side)
    for name in ALL:
        changes = [float(np.abs(corrupt(images, name, level, range(12)).astype(int) - images).mean()) for level in corruptions.SEVERITIES]
        if name not in NOT_GRADED:
            assert changes == sorted(changes), name
        assert changes[0] > 0.2, name


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 8, 5), (0, 3, 16, 16), (1, 3, 20, 66)])
def test_images_of_any_shape(shape: tuple[int, ...]) -> None:
    images = RNG(0).integers(0, 256, shape, dtype=np.uint8)
    for name in ALL:
        for severity in (1, 5):
            assert corrupt(images, name, severity, range(len(images))).shape == shape


def test_black_white_and_grey_stay_in_range() -> None:
    images = np.stack([np.full((3, 16, 16), level, np.uint8) for level in (0, 130, 255)])
    for name in ALL:
        found = corrupt(images, name, 5, range(3))
        assert found.dtype == np.uint8
    np.testing.assert_array_equal(corrupt(images, "brightness", 4, range(3)).max(axis=(1, 2, 3)), [51, 181, 255])
    np.testing.assert_array_equal(corrupt(images, "contrast", 5, range(3)), images)


def test_small_and_large_images_have_their_own_parameters() -> None:
    small, large = (np.full((1, 3, side, side), 100, np.uint8) for side in (64, 65))
    for images, sigma in ((small, 0.1), (large, 0.38)):
        noise = corrupt(images, "gaussian_noise", 5, [0]).astype(float) / 255 - 100 / 255
        expected = RNG(1).normal(100 / 255, sigma, 100_000).clip(0, 1).std()
        assert noise.std() == pytest.approx(expected, rel=0.03)


def test_colour_changes_in_hsv() -> None:
    image = np.array([[[200]], [[100]], [[50]]], np.uint8)[None]
    np.testing.assert_array_equal(corrupt(image, "brightness", 5, [0])[0, :, 0, 0], [255, 128, 64])
    np.testing.assert_array_equal(corrupt(image, "brightness", 1, [0])[0, :, 0, 0], [213, 106, 53])
    np.testing.assert_array_equal(corrupt(image, "saturate", 1, [0])[0, :, 0, 0], [200, 170, 155])
    np.testing.assert_array_equal(corrupt(image, "saturate", 3, [0])[0, :, 0, 0], [200, 67, 0])


def test_impulses_are_black_and_white_at_the_published_rate() -> None:
    images = np.full((8, 3, 64, 64), 128, np.uint8)
    found = corrupt(images, "impulse_noise", 5, range(8))
    assert set(np.unique(found)) == {0, 128, 255}
    assert (found != 128).mean() == pytest.approx(0.07, abs=0.003)
    assert (found == 0).sum() == pytest.approx((found == 255).sum(), rel=0.1)


def test_jpeg_is_pillows() -> None:
    images = pictures(1, 32)
    file = io.BytesIO()
    Image.fromarray(images[0].transpose(1, 2, 0).copy()).save(file, "JPEG", quality=40)
    np.testing.assert_array_equal(corrupt(images, "jpeg_compression", 5, [0])[0].transpose(1, 2, 0), np.asarray(Image.open(file)))


def test_glass_moves_pixels_as_the_sequential_definition_does() -> None:
    side, reach, rounds = 24, 2, 2
    x = RNG(0).random((2, 3, side, side), dtype=np.float32)
    found = glass_blur(x, [RNG(1), RNG(2)], 1e-9, reach, rounds)
    for image, seed, moved in zip(x.copy(), (1, 2), found, strict=True):
        rng = RNG(seed)
        for _ in range(rounds):
            steps = range(side - reach, reach, -1)
            moves = rng.integers(-reach, reach, (2, len(steps), len(steps)))
            for i, row in enumerate(steps):
                for j, column in enumerate(steps):
                    a, b = (row, column), (row + moves[0, i, j], column + moves[1, i, j])
                    image[:, *a], image[:, *b] = image[:, *b].copy(), image[:, *a].copy()
        np.testing.assert_array_equal(moved, image)


# Filters


def test_borders() -> None:
    index = np.arange(-4, 8)
    assert inside(index, 4, "edge").tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 3]
    assert inside(index, 4, "mirror").tolist() == [2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]
    assert inside(index, 4, "reflect").tolist() == [3, 2, 1, 0, 0, 1, 2, 3, 3, 2, 1, 0]


def test_smoothing_is_a_gaussian() -> None:
    point = np.zeros((1, 41, 41), np.float32)
    point[0, 20, 20] = 1
    found = smooth(point, 2.0)
    radius = np.arange(-8, 9)
    kernel = np.exp(-(radius**2) / 8)
    np.testing.assert_allclose(found[0, 12:29, 12:29], np.outer(kernel, kernel) / kernel.sum() ** 2, atol=1e-7)
    np.testing.assert_allclose(smooth(np.ones((1, 5, 9), np.float32), 30.0), 1, rtol=1e-5)


@pytest.mark.parametrize("radius", [0.3, 1.0, 1.5, 4, 10])
def test_the_disk_is_the_mean_over_a_disk(radius: float) -> None:
    point = np.zeros((1, 1, 41, 41), np.uint8)
    point[..., 20, 20] = 255
    found = disk_blur(point, radius, 1e-3)[0, 0]
    offset = np.arange(-20, 21)
    disk = offset[:, None] ** 2 + offset**2 <= radius**2
    np.testing.assert_allclose(found, disk / disk.sum(), atol=1e-6)
    np.testing.assert_allclose(disk_blur(np.full((1, 1, 6, 9), 51, np.uint8), radius, 0.5), 0.2, rtol=1e-5)


def test_zooming_keeps_a_ramp_a_ramp() -> None:
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32), (1, 32, 32))
    np.testing.assert_array_equal(zoomed(ramp, 1.0), ramp)
    steps = np.diff(zoomed(ramp, 2.0)[0, 5])
    np.testing.assert_allclose(steps, 15 / 31, rtol=1e-4)


def test_motion_is_half_a_gaussian_along_its_direction() -> None:
    point = np.zeros((1, 21, 21), np.float32)
    point[0, 10, 10] = 1
    found = motion_blurred(point, 3, 2.0, [0.0])[0]
    weights = np.exp(-(np.arange(7) ** 2) / 8)
    np.testing.assert_allclose(found[10, 4:11][::-1], weights / weights.sum(), rtol=1e-5)
    assert found.sum() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(motion_blurred(point, 3, 2.0, [90.0])[0], found.T, atol=1e-7)


def test_plasma_fills_the_unit_interval_and_tiles() -> None:
    found = plasma([RNG(0), RNG(1)], 48, 2.0)
    assert found.shape == (2, 48, 48)
    whole = plasma([RNG(0)], 64, 2.0)[0]
    assert (whole.min(), whole.max()) == (0.0, 1.0)
    inner, seam = np.abs(np.diff(whole, axis=0)).mean(), np.abs(whole[0] - whole[-1]).mean()
    assert seam < 2 * inner
    rough = plasma([RNG(0)], 64, 1.3)[0]
    assert np.abs(np.diff(rough, axis=0)).mean() > 2 * inner


def test_distances_are_euclidean_up_to_the_limit() -> None:
    mask = RNG(0).random((2, 20, 31)) < 0.01
    mask[:, 3, 4] = True
    places = [np.argwhere(one) for one in mask]
    grid = np.stack(np.meshgrid(np.arange(20), np.arange(31), indexing="ij"), axis=-1)
    exact = np.stack([np.sqrt(((grid[:, :, None] - one) ** 2).sum(-1)).min(-1) for one in places])
    np.testing.assert_allclose(distance_to(mask, 6), exact.clip(max=6), rtol=1e-6)


def test_enlargements_that_are_one_to_whole_pixels_are_one() -> None:
    planes = RNG(0).random((2, 3, 32, 32), dtype=np.float32)
    factors = [1 + 0.01 * step for step in range(30)]
    windows = [window(32, factor) for factor in factors]
    assert len(set(windows)) < len(factors)
    for factor, here in zip(factors, windows, strict=True):
        np.testing.assert_array_equal(zoomed(planes, factor), zoomed(planes, factors[windows.index(here)]))
    np.testing.assert_array_equal(zoomed(planes, 1.0), planes)


@pytest.mark.parametrize("key", [(0,), (3, 123456789, 5), (2**40 + 7, 1, 2), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("indices", [[0, 1, 77, 2**32 - 1], [5, 2**32, 2**40]])
def test_streams_are_those_of_numpy(key: tuple[int, ...], indices: list[int]) -> None:
    for stream, index in zip(streams(key, indices), indices, strict=True):
        np.testing.assert_array_equal(stream.integers(0, 2**62, 8), RNG((*key, index)).integers(0, 2**62, 8))


def test_what_is_said_not_to_be_random_is_not() -> None:
    images = np.repeat(pictures(1, 24), 2, axis=0)
    for name in ALL:
        first, second = corrupt(images, name, 3, [0, 1])
        assert np.array_equal(first, second) == (name in NOT_RANDOM), name


# Names and shifts


def test_selections() -> None:
    assert (len(MAIN), len(EXTRA), len(ALL)) == (15, 4, 19)
    assert selected("none") == ()
    assert selected("all") == ALL
    assert set(selected("subset")) == set(SUBSET) < set(MAIN)
    assert selected(["fog", "snow", "fog"]) == ("snow", "fog"), "in the usual order, once"
    assert selected("fog") == ("fog",)


def test_unknown_corruptions_and_severities() -> None:
    with pytest.raises(ConfigError) as caught:
        selected(["fog", "gausian_noise"])
    assert caught.value.message == "unknown corruption 'gausian_noise'"
    assert caught.value.hint.startswith("known: none, subset, all, or of gaussian_noise, shot_noise,")
    assert caught.value.hint.endswith("did you mean: gaussian_noise, gaussian_blur, shot_noise")
    with pytest.raises(ConfigError, match="severity 6 of corruption 'fog'"):
        corrupt(pictures(1, 16), "fog", 6, [0])


def test_translation_repeats_the_edge_and_takes_all_directions() -> None:
    image = np.arange(25, dtype=np.uint8).reshape(5, 5)
    images = np.broadcast_to(image, (8, 3, 5, 5))
    found = translated(images, 1, range(8))
    np.testing.assert_array_equal(found[0, 0], image[:, [0, 0, 1, 2, 3]])
    np.testing.assert_array_equal(found[6, 2], image[[1, 2, 3, 4, 4]])
    assert len({one.tobytes() for one in found}) == 8
    np.testing.assert_array_equal(translated(images[:1], 8, [0])[0, 0], np.repeat(image[:, :1], 5, axis=1))
