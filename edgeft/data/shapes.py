"""The embedded dataset `shapes`: twenty fine-grained outlines in a narrow domain, and six shifted test sets.

It is a constructed demonstration of feature distortion, not evidence about photographs. The bundled backbone was
pretrained on other outlines under all the factors that the shifted sets vary; training data here shows one narrow
domain, so fine-tuning can forget what it does not see. Only pictures are drawn here, nothing is read or downloaded.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from edgeft.data import Dataset, Split, SplitKind
from edgeft.data.shapes_render import (
    FAMILIES,
    FOURIER,
    PARAMETERS,
    SIZE,
    Domain,
    Floats,
    Scenes,
    Templates,
    render,
    rotation_distance,
    sample,
)
from edgeft.errors import ConfigError

GENERATOR_VERSION = 1
"""Part of every random key: a change of the generator that alters pixels raises it, and old images are never mixed in."""

BASES, VARIANTS = 4, 5
CLASSES = BASES * VARIANTS
PRETRAINING_CLASSES = 100
CHUNK = 20
"""Images drawn from one random key and rendered together; few enough that the working arrays stay in cache."""

VARIANT_SPREAD = 0.085
"""Strength of the perturbation that makes a variant from its base; siblings stay 0.9 times this apart."""

PRETRAINING = Domain(
    rotation=0.7,
    shift=0.22,
    size=(0.38, 0.65),
    log_aspect=0.18,
    gap=(0.25, 0.7),
    background_saturation=(0.0, 1.0),
    figure_saturation=(0.0, 1.0),
    noise=(0.0, 0.12),
    light=(0.0, 0.4),
    jitter=0.12,
    outline=0.4,
    inverted=0.5,
    clutter=0.3,
    plain_background=2 / 7,
    plain_figure=2 / 7,
    texture=(0.05, 0.3),
)
TRAINING = Domain(
    rotation=0.2,
    shift=0.08,
    size=(0.42, 0.60),
    log_aspect=0.12,
    gap=(0.40, 0.55),
    background_saturation=(0.6, 0.9),
    figure_saturation=(0.0, 0.05),
    noise=(0.0, 0.02),
    light=(0.0, 0.05),
    jitter=0.13,
    cue=0.9,
)
_NO_CUE = replace(TRAINING, cue=0.0)
_PARTS: tuple[tuple[str, SplitKind, int, Domain, str], ...] = (
    ("train", "train", 100, TRAINING, ""),
    ("val", "val", 500, TRAINING, ""),
    ("id", "id", 1000, TRAINING, ""),
    ("cue", "ood", 1000, _NO_CUE, "in-support: the background hue no longer follows the class"),
    (
        "palette",
        "ood",
        1000,
        replace(_NO_CUE, background_saturation=(0.0, 1.0), figure_saturation=(0.5, 1.0), noise=(0.05, 0.12), light=(0.0, 0.4)),
        "out-of-support: coloured figures, any background saturation, noise and uneven light",
    ),
    ("invert", "ood", 1000, replace(_NO_CUE, inverted=1.0), "out-of-support: dark figures on light ground"),
    ("outline", "ood", 1000, replace(_NO_CUE, outline=1.0), "out-of-support: figures drawn as a stroke instead of filled"),
    (
        "texture",
        "ood",
        1000,
        replace(_NO_CUE, plain_background=0.0, plain_figure=1 / 6, texture=(0.12, 0.3)),
        "out-of-support: stripes, checks or block noise on the ground and mostly on the figure",
    ),
    (
        "sketch",
        "ood",
        1000,
        replace(_NO_CUE, outline=1.0, inverted=0.5, plain_background=0.0, texture=(0.05, 0.15)),
        "out-of-support: strokes, half of them dark on light, on faintly textured ground",
    ),
)
# Second entry of a random key, so that no two uses share a stream; splits take their position in _PARTS.
_LABELS, _DOWNSTREAM, _PRETRAINING, _STREAM = 100, 200, 201, 202


class RenderedImages:
    """Images of one split, rendered a chunk at a time when first asked for and then kept.

    Every chunk has its own random key, so an image depends on (generator version, seed, split, index) and on nothing
    that was asked before. Bytes are equal on one machine and numpy; another processor may round a last bit differently.
    """

    def __init__(self, key: tuple[int, ...], domain: Domain, templates: Templates, labels: NDArray[np.int64]) -> None:
        self._key, self._domain, self._templates, self._labels = key, domain, templates, labels
        self._chunks: dict[int, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, index: int) -> NDArray[np.uint8]:
        """RGB bytes of one image, [48, 48, 3]. The array is the kept one and cannot be written to."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number, offset = divmod(index, CHUNK)
        if number not in self._chunks:
            rng = np.random.default_rng((GENERATOR_VERSION, *self._key, number))
            labels = self._labels[number * CHUNK : (number + 1) * CHUNK]
            chunk = render(_scenes(self._domain, self._templates, labels, rng), rng)
            chunk.flags.writeable = False
            self._chunks[number] = chunk
        image: NDArray[np.uint8] = self._chunks[number][offset]
        return image


def load(seed: int = 0) -> Dataset:
    """Twenty classes drawn for this seed, with 5 training images each; seeds share no class and no image.

    Few images are where keeping pretrained features matters most: fitted to more of them (20 of each class), full fine-tuning is a
    little better in distribution than LP-FT, and still worse under shift.
    """
    if seed < 0:
        raise ConfigError(f"dataset 'shapes' cannot use seed {seed}", "use a seed of 0 or more")
    templates = downstream_templates(seed)
    splits = [_split(seed, position, templates) for position in range(len(_PARTS))]
    return Dataset(
        name="shapes",
        classes=tuple(f"base{base}-variant{variant}" for base in range(BASES) for variant in range(VARIANTS)),
        train=splits[0],
        val=splits[1],
        id_test=splits[2],
        ood=tuple(splits[3:]),
        size=SIZE,
        augment="none",
        notes=("shapes is a constructed demonstration: its backbone saw the shifted factors in pretraining, with other classes",),
    )


def background_hues(labels: NDArray[np.int64], cue: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Background hue of each image in turns: its class's own with probability `cue`, else that of a class at random."""
    shown = np.where(rng.random(len(labels)) < cue, labels, rng.integers(0, CLASSES, len(labels)))
    return (shown + rng.uniform(-0.25, 0.25, len(labels))) / CLASSES


def pretraining_stream(seed: int, batch: int, steps: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Fresh images [batch, 48, 48, 3] and labels [batch] of the 100 pretraining classes in all domains; none repeats."""
    templates = pretraining_templates()
    for step in range(steps):
        rng = np.random.default_rng((GENERATOR_VERSION, seed, _STREAM, step))
        labels = rng.integers(0, PRETRAINING_CLASSES, batch)
        yield render(sample(PRETRAINING, templates, labels, rng.random(batch), rng), rng), labels


@cache
def pretraining_templates() -> Templates:
    """The 100 pretraining classes, the same for every seed: none near a circle, none near another."""
    rng = np.random.default_rng((GENERATOR_VERSION, 0, _PRETRAINING))
    families: list[int] = []
    rows: list[Floats] = []
    means: list[Floats] = []
    while len(rows) < PRETRAINING_CLASSES:
        family = int(rng.integers(0, len(FAMILIES)))
        row = _DRAWS[family](rng)
        mean = _mean(family, row)
        if mean.std() < 0.12 or (means and rotation_distance(mean, np.stack(means), 22).min() < 0.16):
            continue
        families.append(family)
        rows.append(row)
        means.append(mean)
    return Templates(np.array(families), np.stack(rows))


def _split(seed: int, position: int, templates: Templates) -> Split:
    name, kind, n, domain, note = _PARTS[position]
    order = np.random.default_rng((GENERATOR_VERSION, seed, _LABELS + position)).permutation(n)
    labels = (order % CLASSES).astype(np.int64)
    return Split(name, kind, RenderedImages((seed, position), domain, templates, labels), labels, note)


def _scenes(domain: Domain, templates: Templates, labels: NDArray[np.int64], rng: np.random.Generator) -> Scenes:
    return sample(domain, templates, labels, background_hues(labels, domain.cue, rng), rng)


@cache
def downstream_templates(seed: int) -> Templates:
    """Variants of random bases: distinct from their siblings, and from every pretraining class."""
    rng = np.random.default_rng((GENERATOR_VERSION, seed, _DOWNSTREAM))
    known = pretraining_templates().means()
    rows: list[Floats] = []
    for _ in range(BASES):
        base = _draw_coefficients(rng)
        siblings: list[Floats] = []
        while len(siblings) < VARIANTS:
            row = _polar(base + _draw_variation(rng))
            mean = _mean(FOURIER, row)
            near_sibling = siblings and rotation_distance(mean, np.stack(siblings), 17).min() <= 0.9 * VARIANT_SPREAD
            if near_sibling or rotation_distance(mean, known, 22).min() < 0.05:
                continue
            siblings.append(mean)
            rows.append(row)
    return Templates(np.full(CLASSES, FOURIER), np.stack(rows))


def _mean(family: int, row: Floats) -> Floats:
    """The template of one class without deviation, [ANGLES]."""
    mean: Floats = Templates(np.array([family]), row[None]).means()[0]
    return mean


def _row(*values: float) -> Floats:
    return np.pad(np.array(values, np.float32), (0, PARAMETERS - len(values)))


def _draw_superformula(rng: np.random.Generator) -> Floats:
    n1, n2, n3 = np.exp(rng.uniform((-0.7, -0.3, -0.3), (1.5, 1.8, 1.8)))
    return _row(int(rng.integers(2, 9)), n1, n2, n3)


def _draw_fourier(rng: np.random.Generator) -> Floats:
    return _polar(_draw_coefficients(rng))


def _draw_star(rng: np.random.Generator) -> Floats:
    a, s, b, p = rng.uniform((0.15, -1.5, 0.0, 0.0), (0.5, 1.5, 0.25, 2 * np.pi))
    return _row(int(rng.integers(3, 9)), a, s, b, p)


_DRAWS = (_draw_superformula, _draw_fourier, _draw_star)  # in the order of FAMILIES


def _draw_coefficients(rng: np.random.Generator) -> NDArray[np.complex128]:
    """Coefficients of orders 1 to 6 of a random outline whose radius deviates by 0.28 RMS."""
    orders = np.arange(1, 7)
    amplitude = rng.standard_normal(6) / orders**0.7
    amplitude[0] *= 0.3  # order 1 mostly shifts the shape
    amplitude *= 0.28 / np.sqrt(np.sum(amplitude**2) / 2)
    return np.asarray(amplitude * np.exp(-1j * rng.uniform(0, 2 * np.pi, 6)), np.complex128)


def _draw_variation(rng: np.random.Generator) -> NDArray[np.complex128]:
    """What a variant adds to the coefficients of its base."""
    step = (rng.standard_normal(6) + 1j * rng.standard_normal(6)) / np.arange(1, 7) ** 0.5
    step[0] *= 0.3
    return np.asarray(VARIANT_SPREAD * step, np.complex128)


def _polar(coefficients: NDArray[np.complex128]) -> Floats:
    """Parameter row of the Fourier family: amplitudes, then phases."""
    return np.concatenate([np.abs(coefficients), -np.angle(coefficients)]).astype(np.float32)
