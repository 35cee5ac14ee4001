"""The embedded dataset: splits, labels, the hue cue, and the same bytes however they are asked for."""

import colorsys

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeft.data import Dataset, Split
from edgeft.data.shapes import (
    CLASSES,
    PRETRAINING_CLASSES,
    background_hues,
    downstream_templates,
    load,
    pretraining_stream,
    pretraining_templates,
)
from edgeft.data.shapes_render import normalise, rotation_distance
from edgeft.errors import ConfigError

OOD = ("cue", "palette", "invert", "outline", "texture", "sketch")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load(0)


def stack(split: Split, indices: list[int]) -> NDArray[np.uint8]:
    """Images at these indices, [n, 48, 48, 3]."""
    return np.stack([split.images.image(index) for index in indices])


def class_average(dataset: Dataset, label: int) -> NDArray[np.float64]:
    """Mean over the images of one class in the set without a hue cue, [48, 48]."""
    split = next(split for split in dataset.ood if split.name == "cue")
    return np.asarray(stack(split, np.flatnonzero(split.labels == label).tolist()).mean(axis=(0, 3)))


def shown_class(image: NDArray[np.uint8]) -> float:
    """The class, not rounded, whose hue the upper border of an image shows."""
    red, green, blue = (image[:2].mean(axis=(0, 1)) / 255).tolist()
    return colorsys.rgb_to_hsv(red, green, blue)[0] * CLASSES


def cue_share(split: Split, n: int = 300) -> float:
    """Share of the first images whose background shows about the hue of their class."""
    off = np.array([shown_class(split.images.image(index)) - split.labels[index] for index in range(min(n, len(split)))])
    return float(np.mean(np.abs((off + CLASSES / 2) % CLASSES - CLASSES / 2) < 0.75))


def test_splits_have_the_documented_sizes(dataset: Dataset) -> None:
    assert dataset.name == "shapes"
    assert dataset.size == 48
    assert dataset.augment == "none"
    assert (len(dataset.train), len(dataset.val), len(dataset.id_test)) == (100, 500, 1000)
    assert tuple(split.name for split in dataset.ood) == OOD
    assert all(len(split) == len(split.images) == 1000 for split in dataset.ood)
    assert [split.kind for split in dataset.tests] == ["id"] + ["ood"] * 6


def test_classes_are_named_by_base_and_variant(dataset: Dataset) -> None:
    assert len(dataset.classes) == len(set(dataset.classes)) == CLASSES == 20
    assert dataset.classes[0] == "base0-variant0"
    assert dataset.classes[-1] == "base3-variant4"


def test_every_shift_says_whether_training_supports_it(dataset: Dataset) -> None:
    notes = {split.name: split.note for split in dataset.ood}
    assert notes["cue"].startswith("in-support: ")
    assert all(notes[name].startswith("out-of-support: ") for name in OOD[1:])


def test_labels_are_balanced_and_shuffled(dataset: Dataset) -> None:
    for split in (dataset.train, dataset.val, *dataset.tests):
        assert np.bincount(split.labels).tolist() == [len(split) // CLASSES] * CLASSES
        assert np.any(np.diff(split.labels) < 0)


def test_an_image_does_not_depend_on_what_was_asked_before() -> None:
    forward, backward = load(3), load(3)
    for left, right in zip((forward.train, *forward.tests), (backward.train, *backward.tests), strict=True):
        chosen = [len(left) - 1, 0, 7, 63, 19, 20, 8]
        np.testing.assert_array_equal(stack(left, sorted(chosen)), stack(right, sorted(chosen, reverse=True))[::-1])
        np.testing.assert_array_equal(left.labels, right.labels)


def test_images_are_bytes_that_cannot_be_changed_by_accident(dataset: Dataset) -> None:
    image = dataset.train.images.image(0)
    assert image.shape == (48, 48, 3)
    assert image.dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0, 0] = 0


@pytest.mark.parametrize("index", [-1, 100])
def test_an_index_outside_the_split_is_refused(dataset: Dataset, index: int) -> None:
    with pytest.raises(IndexError, match=f"image {index} of 100"):
        dataset.train.images.image(index)


def test_images_of_different_splits_and_indices_differ(dataset: Dataset) -> None:
    first = [split.images.image(index).tobytes() for split in (dataset.train, dataset.val, *dataset.tests) for index in (0, 1, 20)]
    assert len(set(first)) == len(first)


def test_seeds_draw_other_classes_and_other_images() -> None:
    a, b = load(0), load(1)
    assert not np.array_equal(a.train.labels, b.train.labels)
    assert not np.array_equal(class_average(a, 0), class_average(b, 0))
    gaps = [np.abs(class_average(a, label) - class_average(b, label)).max() for label in range(0, CLASSES, 5)]
    assert min(gaps) > 40  # grey levels of 255: other outlines, not other noise


def test_a_negative_seed_is_a_user_error() -> None:
    with pytest.raises(ConfigError) as caught:
        load(-1)
    assert caught.value.message == "dataset 'shapes' cannot use seed -1"
    assert caught.value.hint == "use a seed of 0 or more"


@pytest.mark.parametrize(("cue", "share"), [(0.9, 0.905), (0.0, 0.05)])
def test_a_class_shows_its_hue_as_often_as_asked(cue: float, share: float) -> None:
    labels = np.arange(40_000) % CLASSES
    hues = background_hues(labels, cue, np.random.default_rng(0))
    own = np.abs((hues * CLASSES - labels + CLASSES / 2) % CLASSES - CLASSES / 2) < 0.5
    assert own.mean() == pytest.approx(share, abs=0.005)


def test_the_background_gives_the_class_away_in_distribution_only(dataset: Dataset) -> None:
    for split in (dataset.train, dataset.val, dataset.id_test):
        assert 0.8 < cue_share(split) <= 0.98, split.name
    for name, split in zip(OOD, dataset.ood, strict=True):
        if name in ("cue", "invert", "outline"):  # the others change the colour of the border
            assert cue_share(split) < 0.15, name


def test_downstream_classes_keep_their_distance() -> None:
    known = pretraining_templates().means()
    for seed in range(3):
        classes = downstream_templates(seed).means()
        assert min(rotation_distance(mean, known, 22).min() for mean in classes) >= 0.05
        for label, mean in enumerate(classes):
            siblings = [other for other in range(label - label % 5, label - label % 5 + 5) if other != label]
            assert rotation_distance(mean, classes[siblings], 17).min() > 0.9 * 0.085


def test_pretraining_classes_are_neither_circles_nor_alike() -> None:
    means = pretraining_templates().means()
    assert means.shape == (PRETRAINING_CLASSES, 256)
    assert means.std(axis=1).min() >= 0.12
    assert min(rotation_distance(means[k], means[:k], 22).min() for k in range(1, len(means))) >= 0.16


def test_the_pretraining_stream_is_repeatable_and_never_repeats_an_image() -> None:
    first, again = (list(pretraining_stream(5, 8, 3)) for _ in range(2))
    for (images, labels), (same_images, same_labels) in zip(first, again, strict=True):
        np.testing.assert_array_equal(images, same_images)
        np.testing.assert_array_equal(labels, same_labels)
        assert images.shape == (8, 48, 48, 3)
    assert len({image.tobytes() for images, _ in first for image in images}) == 24


def test_normalised_templates_are_positive_and_bounded() -> None:
    spiky = np.ones((1, 256), np.float32)
    spiky[0, :4] = (-3, 0, 40, 9)
    radii = normalise(spiky)
    assert radii.min() > 0
    assert radii.max() <= 1.6 + 1e-6
    np.testing.assert_allclose(np.sqrt((normalise(np.full((1, 256), 7, np.float32)) ** 2).mean()), 1, rtol=1e-6)
