"""Resizing, cropping and random views: against Pillow, against their own definition, and repeatable."""

import json
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from edgeft.data.preprocess import CROP_AREA, CROP_RATIO, Preprocessing, _random_box, augment, mirror, prepare, shrink
from edgeft.errors import ArtifactError, ConfigError


def preprocessing(size: int, crop_pct: float = 1.0, interpolation: Literal["bilinear", "bicubic"] = "bicubic") -> Preprocessing:
    return Preprocessing(size, crop_pct, interpolation, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """Coarse noise, so that interpolation and position both show."""
    coarse = np.random.default_rng(1).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def test_json_and_back_exactly() -> None:
    p = preprocessing(224, 0.875, "bilinear")
    assert Preprocessing.from_json(json.loads(json.dumps(p.to_json()))) == p


def test_json_with_other_keys() -> None:
    tree = preprocessing(8).to_json() | {"extra": 1}
    del tree["std"]
    with pytest.raises(ArtifactError) as caught:
        Preprocessing.from_json(tree)
    assert caught.value.message == (
        "preprocessing record has the keys ['crop_pct', 'extra', 'interpolation', 'mean', 'size']; "
        "needed are ['crop_pct', 'interpolation', 'mean', 'size', 'std']"
    )


@pytest.mark.parametrize("wrong", [{"size": 0}, {"crop_pct": 0.0}, {"crop_pct": 1.1}, {"std": (0.0, 1.0, 1.0)}, {"interpolation": "area"}])
def test_impossible_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Preprocessing(**{**preprocessing(8).__dict__, **wrong})


@pytest.mark.parametrize(("size", "crop_pct", "side"), [(224, 0.875, 256), (128, 0.875, 146), (224, 0.9, 248), (48, 1.0, 48)])
def test_resize_side_is_timms(size: int, crop_pct: float, side: int) -> None:
    assert preprocessing(size, crop_pct).resize_side == side


def test_an_image_of_the_right_size_is_untouched() -> None:
    image = picture(48, 48)
    np.testing.assert_array_equal(prepare(image, preprocessing(48)), image.transpose(2, 0, 1))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(128, 128), (100, 171), (171, 100), (40, 30), (220, 300)])
def test_prepare_is_pillows_resize_and_centre_crop(height: int, width: int, interpolation: Literal["bilinear", "bicubic"]) -> None:
    image, p = picture(height, width), preprocessing(56, 0.875, interpolation)
    short = min(height, width)
    resized = Image.fromarray(image).resize((64 * width // short, 64 * height // short), Image.Resampling[interpolation.upper()])
    top, left = round((resized.height - 56) / 2), round((resized.width - 56) / 2)
    expected = np.array(resized)[top : top + 56, left : left + 56].transpose(2, 0, 1)
    found = prepare(image, p)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_crop_without_resize() -> None:
    image = picture(64, 64)
    np.testing.assert_array_equal(prepare(image, preprocessing(56, 0.875)), image[4:60, 4:60].transpose(2, 0, 1))


def test_tiny_images_are_enlarged() -> None:
    image = np.array([[[1, 20, 255]]], dtype=np.uint8)
    np.testing.assert_array_equal(prepare(image, preprocessing(32)), np.broadcast_to([[[1]], [[20]], [[255]]], (3, 32, 32)))


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (2, 900)])
def test_long_strips_stay_small_and_central(shape: tuple[int, int]) -> None:
    image = np.zeros((*shape, 3), dtype=np.uint8)
    height, width = shape
    image[height // 2 - min(8, height // 2) : height // 2 + 8, width // 2 - min(8, width // 2) : width // 2 + 8] = 200
    assert shrink(image, preprocessing(32)).size <= 8 * min(shape) ** 2 * 3
    assert prepare(image, preprocessing(32)).min() == 200


@pytest.mark.parametrize("shape", [(400, 700), (131, 260), (64, 64), (127, 900), (5, 7)])
def test_shrinking_comes_first_and_once(shape: tuple[int, int]) -> None:
    image, p = picture(*shape), preprocessing(28, 0.875)
    small = shrink(image, p)
    assert min(small.shape[:2]) >= min(64, min(shape))
    assert min(small.shape[:2]) < 4 * 32
    assert shrink(small, p) is small
    np.testing.assert_array_equal(prepare(small, p), prepare(image, p))
    np.testing.assert_array_equal(augment(small, p, "crop-flip", (1, 2, 3)), augment(image, p, "crop-flip", (1, 2, 3)))


def test_shrinking_hardly_shows() -> None:
    image, p = picture(600, 600), preprocessing(64)
    direct = np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC))
    assert np.abs(prepare(image, p).astype(int) - direct.transpose(2, 0, 1)).mean() < 1


@pytest.mark.parametrize("kind", ["none", "flip", "crop-flip"])
def test_views_repeat_and_leave_global_generators_alone(kind: Literal["none", "flip", "crop-flip"]) -> None:
    image, p = picture(60, 80), preprocessing(32)
    before = torch.get_rng_state(), str(np.random.get_state())
    views = [augment(image, p, kind, (0, 3, i)) for i in range(8)]
    again = [augment(image, p, kind, (0, 3, i)) for i in range(8)]
    np.testing.assert_array_equal(views, again)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == str(np.random.get_state())
    assert all(view.shape == (3, 32, 32) and view.dtype == np.uint8 and view.flags.c_contiguous for view in views)


def test_every_part_of_the_seed_counts() -> None:
    image, p = picture(60, 80), preprocessing(32)
    views = {augment(image, p, "crop-flip", seed).tobytes() for seed in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(views) == 4


def test_flip_mirrors_the_prepared_image_half_of_the_time() -> None:
    image, p = picture(60, 80), preprocessing(32)
    prepared = prepare(image, p)
    mirrored = 0
    for i in range(200):
        view = augment(image, p, "flip", (0, 0, i))
        np.testing.assert_array_equal(view, mirror(prepared, "flip", (0, 0, i)))
        flipped = np.array_equal(view, prepared[:, :, ::-1])
        assert flipped or np.array_equal(view, prepared)
        mirrored += flipped
    assert 70 < mirrored < 130
    np.testing.assert_array_equal(augment(image, p, "none", (0, 0, 1)), prepared)


@pytest.mark.parametrize("shape", [(60, 80), (100, 90)])
def test_random_boxes_lie_inside_and_have_the_stated_area_and_shape(shape: tuple[int, int]) -> None:
    height, width = shape
    areas = []
    for seed in range(300):
        top, left, h, w = _random_box(height, width, np.random.default_rng(seed))
        assert min(top, left) >= 0
        assert top + h <= height
        assert left + w <= width
        assert CROP_RATIO[0] * 0.97 <= w / h <= CROP_RATIO[1] * 1.03
        areas.append(h * w / (height * width))
    assert min(areas) > CROP_AREA[0] - 0.02
    assert max(areas) > 0.85


@pytest.mark.parametrize(("shape", "box"), [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((1, 1), (0, 0, 1, 1))])
def test_where_no_box_fits_the_centre_is_taken(shape: tuple[int, int], box: tuple[int, ...]) -> None:
    assert _random_box(*shape, np.random.default_rng(0)) == box


def test_crops_show_what_they_cut() -> None:
    """Columns hold their own position, so that the view tells which columns it covers, and whether it is mirrored."""
    columns = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3))
    directions = set()
    for i in range(20):
        view = augment(np.ascontiguousarray(columns), preprocessing(50), "crop-flip", (0, 0, i))[0].astype(int)
        assert (view == view[0]).all()
        steps = np.diff(view[0])
        directions.add(int(np.sign(steps.sum())))
        covered = abs(int(view[0, -1]) - int(view[0, 0])) / 200
        assert 0.55 < covered <= 1
    assert directions == {-1, 1}
