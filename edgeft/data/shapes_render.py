"""Draws closed shapes given by a radius over the angle: radial templates, the factors of a scene, and pixels.

Numpy only, vectorised over a batch, no supersampling: the gap between a pixel and the outline, made an approximate
distance by the slope of the outline, gives the coverage of the pixel directly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Range = tuple[float, float]

SIZE = 48
"""Height and width of an image in pixels; image coordinates run from -1 to 1."""
HALF = SIZE / 2
ANGLES = 256
"""Samples of a radial template over the full turn."""
PARAMETERS = 12
"""Width of a parameter row: six amplitudes and six phases for the widest family."""

_THETA = (np.arange(ANGLES) * (2 * np.pi / ANGLES)).astype(np.float32)
_ORDERS = np.arange(1, 7, dtype=np.float32)
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_AXIS = ((np.arange(SIZE) + 0.5) / HALF - 1).astype(np.float32)
_Y, _X = (axis[None] for axis in np.meshgrid(_AXIS, _AXIS, indexing="ij"))
_TEXTURES = 5


@dataclass(frozen=True)
class Domain:
    """Distribution of everything but the class. Lengths are in image coordinates (half the image is 1), angles in radians.

    A single number is the half-width of a uniform distribution around zero or a probability; a pair is a uniform range.
    `cue` is the probability that the background hue is the class's own; otherwise it is that of a random class.
    """

    rotation: float
    shift: float
    size: Range
    log_aspect: float
    gap: Range
    background_saturation: Range
    figure_saturation: Range
    noise: Range
    light: Range
    jitter: float
    cue: float = 0.0
    outline: float = 0.0
    inverted: float = 0.0
    clutter: float = 0.0
    plain_background: float = 1.0
    plain_figure: float = 1.0
    texture: Range = (0.0, 0.0)


@dataclass(frozen=True)
class Scenes:
    """Drawn factors of n images: everything `render` needs but the noise. Arrays have n rows; colours are RGB in 0..1."""

    radii: Floats
    rotation: Floats
    shift: Floats
    size: Floats
    log_aspect: Floats
    stroke: Floats
    background: Floats
    figure: Floats
    background_texture: NDArray[np.int64]
    figure_texture: NDArray[np.int64]
    texture: Floats
    light: Floats
    noise: Floats
    clutter: NDArray[np.bool_]


@dataclass(frozen=True)
class Templates:
    """Shape classes: `families` [k] indexes `FAMILIES`, `parameters` [k, PARAMETERS] is what that family reads."""

    families: NDArray[np.int64]
    parameters: Floats

    def radii(self, labels: NDArray[np.int64], jitter: float, rng: np.random.Generator) -> Floats:
        """One radial template per label, [n, ANGLES], each with its own in-class deviation of strength `jitter`."""
        families, parameters = self.families[labels], self.parameters[labels]
        radii = np.empty((len(labels), ANGLES), np.float32)
        for number, family in enumerate(FAMILIES):
            chosen = families == number
            radii[chosen] = family(parameters[chosen], jitter, rng)
        return normalise(radii * _warp(len(labels), jitter, rng))

    def means(self) -> Floats:
        """The templates without deviation, [k, ANGLES]."""
        return self.radii(np.arange(len(self.families)), 0.0, np.random.default_rng(0))


def normalise(radii: Floats) -> Floats:
    """Give every template RMS radius 1 or less, positive and bounded, so that size is a property of the scene alone."""
    radii = np.maximum(radii, 0.05)
    radii = np.clip(radii / radii.mean(axis=1, keepdims=True), 0.12, 2.2)
    radii = radii / np.sqrt(np.mean(radii**2, axis=1, keepdims=True))
    fitted: Floats = radii * np.minimum(1.0, 1.6 / radii.max(axis=1, keepdims=True))
    return fitted


def rotation_distance(template: Floats, others: Floats, degrees: float) -> Floats:
    """RMS difference [k] of a template [ANGLES] and each of `others` [k, ANGLES], least over rotations up to `degrees`."""
    reach = int(degrees / 360 * ANGLES)
    turned = np.stack([np.roll(template, step) for step in range(-reach, reach + 1)])
    gaps = np.sqrt(np.mean((turned[:, None] - others[None]) ** 2, axis=2))
    return np.asarray(gaps.min(axis=0), np.float32)


def sample(domain: Domain, templates: Templates, labels: NDArray[np.int64], hues: NDArray[np.float64], rng: np.random.Generator) -> Scenes:
    """Draw the factors of one scene per label; `hues` [n] in turns is the hue of the background."""
    n = len(labels)

    def uniform(bounds: Range, *shape: int) -> Floats:
        return rng.uniform(*bounds, (n, *shape)).astype(np.float32)

    gap = uniform(domain.gap)
    dark = uniform((0.0, 1.0)) * (0.9 - gap) + 0.05
    bright = dark + gap
    inverted = rng.random(n) < domain.inverted
    stroke = np.where(rng.random(n) < domain.outline, uniform((1.0, 1.8)), 0.0)
    return Scenes(
        radii=templates.radii(labels, domain.jitter, rng),
        rotation=uniform((-domain.rotation, domain.rotation)),
        shift=uniform((-domain.shift, domain.shift), 2),
        size=uniform(domain.size),
        log_aspect=uniform((-domain.log_aspect, domain.log_aspect)),
        stroke=stroke.astype(np.float32),
        background=_colour(hues, uniform(domain.background_saturation), np.where(inverted, bright, dark)),
        figure=_colour(rng.random(n), uniform(domain.figure_saturation), np.where(inverted, dark, bright)),
        background_texture=_texture_kinds(n, domain.plain_background, rng),
        figure_texture=_texture_kinds(n, domain.plain_figure, rng),
        texture=uniform(domain.texture),
        light=uniform(domain.light),
        noise=uniform(domain.noise),
        clutter=rng.random(n) < domain.clutter,
    )


def render(scenes: Scenes, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Pixels of n scenes, RGB, [n, SIZE, SIZE, 3]."""
    ground = _painted(scenes.background, scenes.background_texture, scenes.texture, rng)
    _draw_lines(ground, scenes.clutter, rng)
    pixels = _painted(scenes.figure, scenes.figure_texture, scenes.texture, rng)
    # In place from here on: fresh arrays of this size cost more than the arithmetic.
    pixels -= ground
    pixels *= _coverage(scenes)[:, None]
    pixels += ground
    toward = _column(rng.uniform(0, 2 * np.pi, len(scenes.light)))
    pixels *= (1 + _column(scenes.light) * (np.cos(toward) * _X + np.sin(toward) * _Y))[:, None]
    noise = rng.standard_normal(out=ground, dtype=np.float32)
    noise *= scenes.noise[:, None, None, None]
    pixels += noise
    pixels *= 255
    np.rint(pixels, out=pixels)
    np.clip(pixels, 0, 255, out=pixels)
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(0, 2, 3, 1))


def _superformula(parameters: Floats, jitter: float, rng: np.random.Generator) -> Floats:
    """Gielis' superformula. Parameters: m, n1, n2, n3."""
    m = parameters[:, 0:1]
    factor = np.clip(_deviation(parameters[:, 1:4], jitter, rng), 0.4, 2.0)
    n1, n2, n3 = np.split(parameters[:, 1:4] * factor, 3, axis=1)
    quarter = m * _THETA / 4
    total = np.abs(np.cos(quarter)) ** n2 + np.abs(np.sin(quarter)) ** n3
    return np.asarray(total ** (-1 / n1), np.float32)


def _fourier(parameters: Floats, jitter: float, rng: np.random.Generator) -> Floats:
    """Sum of six harmonics. Parameters: amplitudes of orders 1 to 6, then their phases."""
    amplitude = parameters[:, :6] * _deviation(parameters[:, :6], jitter, rng)
    phase = parameters[:, 6:] + jitter * rng.standard_normal((len(parameters), 6), np.float32)
    return _harmonics(amplitude, phase, _ORDERS)


def _star(parameters: Floats, jitter: float, rng: np.random.Generator) -> Floats:
    """Stars and gears. Parameters: teeth k, depth a, log steepness s, offset b, direction p of the offset."""
    k = parameters[:, 0:1]
    a, b = np.split(parameters[:, [1, 3]] * _deviation(parameters[:, :2], jitter, rng), 2, axis=1)
    s, p = np.split(parameters[:, [2, 4]] + jitter * rng.standard_normal((len(k), 2), np.float32), 2, axis=1)
    steepness = np.exp(s)
    teeth = np.tanh(steepness * np.cos(k * _THETA)) / np.tanh(steepness)
    return np.asarray(1 + a * teeth + b * np.cos(_THETA - p), np.float32)


Family = Callable[[Floats, float, np.random.Generator], Floats]
FAMILIES: tuple[Family, ...] = (_superformula, _fourier, _star)
FOURIER = FAMILIES.index(_fourier)


def _deviation(like: Floats, jitter: float, rng: np.random.Generator) -> Floats:
    """Random factors around one, in the shape of `like`."""
    return 1 + np.float32(jitter) * rng.standard_normal(like.shape, np.float32)


def _warp(n: int, jitter: float, rng: np.random.Generator) -> Floats:
    """A smooth factor around one over the angle, [n, ANGLES]: in-class deviation that no family's parameters can express."""
    amplitude = 0.25 * jitter * rng.standard_normal((n, 4), np.float32)
    return _harmonics(amplitude, rng.uniform(0, 2 * np.pi, (n, 4)).astype(np.float32), _ORDERS[1:5])


def _harmonics(amplitude: Floats, phase: Floats, orders: Floats) -> Floats:
    """1 + sum of amplitude cos(order theta - phase), [n, ANGLES], for [n, k] amplitudes and phases."""
    turns = orders[:, None] * _THETA
    radii: Floats = 1 + (amplitude * np.cos(phase)) @ np.cos(turns) + (amplitude * np.sin(phase)) @ np.sin(turns)
    return radii


def _texture_kinds(n: int, plain: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Texture of each image, [n]: 0 for none with probability `plain`, else 1 to 5 with equal chances."""
    return np.where(rng.random(n) < plain, 0, rng.integers(1, _TEXTURES + 1, n))


def _colour(hue: NDArray[np.float64], saturation: Floats, luminance: NDArray[np.float32]) -> Floats:
    """RGB [n, 3] of HSV colours at full value, brought to a luminance as far as a gain of 1.6 and clipping allow."""
    sector = (hue[:, None] * 6 + np.array([5.0, 3.0, 1.0])) % 6
    rgb = 1 - saturation[:, None] * np.clip(np.minimum(sector, 4 - sector), 0, 1)
    gain = np.minimum(luminance / (rgb @ _LUMA), 1.6)
    return np.asarray(np.minimum(rgb * gain[:, None], 1), np.float32)


def _column(values: NDArray[np.floating]) -> Floats:
    """Per-image values [n] as [n, 1, 1] for broadcasting over pixels."""
    return values.astype(np.float32)[:, None, None]


def _painted(colour: Floats, texture: NDArray[np.int64], amplitude: Floats, rng: np.random.Generator) -> Floats:
    """Flat colours [n, 3] with their textures, [n, 3, SIZE, SIZE]."""
    patterns = _textures(texture, rng)
    patterns *= _column(amplitude)
    return patterns[:, None] + colour[:, :, None, None]


def _coverage(scenes: Scenes) -> Floats:
    """Share of each pixel inside the figure (or its stroke), [n, SIZE, SIZE]."""
    x, y = _X - scenes.shift[:, 0, None, None], _Y - scenes.shift[:, 1, None, None]
    cos, sin = np.cos(_column(scenes.rotation)), np.sin(_column(scenes.rotation))
    width = _column(scenes.size * np.exp(scenes.log_aspect / 2))
    height = _column(scenes.size * np.exp(-scenes.log_aspect / 2))
    u, v = (cos * x + sin * y) / width, (cos * y - sin * x) / height
    turn = np.arctan2(v, u) * np.float32(ANGLES / (2 * np.pi)) + ANGLES
    below = np.floor(turn)
    between = turn - below
    first = below.astype(np.int32) % ANGLES
    row = (np.arange(len(u), dtype=np.int32) * ANGLES)[:, None, None]
    low, high = row + first, row + (first + 1) % ANGLES
    slope = np.gradient(np.pad(scenes.radii, ((0, 0), (1, 1)), mode="wrap"), 2 * np.pi / ANGLES, axis=1)[:, 1:-1]
    steep = (1 / np.sqrt(1 + (slope / scenes.radii) ** 2)).astype(np.float32)
    outline = scenes.radii.take(low) * (1 - between) + scenes.radii.take(high) * between
    inside = (outline - np.sqrt(u * u + v * v)) * steep.take(low) * _column(scenes.size * HALF)
    stroke = _column(scenes.stroke)
    inside = np.where(stroke > 0, stroke - np.abs(inside), inside)
    return np.asarray(np.clip(0.5 + inside, 0, 1), np.float32)


def _textures(kinds: NDArray[np.int64], rng: np.random.Generator) -> Floats:
    """Patterns in -1..1, [n, SIZE, SIZE], zero where the kind is 0.

    Kinds: 1 sine stripes, 2 hard stripes, 3 checkerboard, 4 and 5 noise in blocks of 4 and 8 pixels.
    """
    patterns = np.zeros((len(kinds), SIZE, SIZE), np.float32)
    waves = np.flatnonzero((kinds >= 1) & (kinds <= 3))
    frequency, angle = _column(rng.uniform(6, 18, len(waves))), _column(rng.uniform(0, 2 * np.pi, len(waves)))
    phase, second = _column(rng.uniform(0, 2 * np.pi, len(waves))), _column(rng.uniform(0, 2 * np.pi, len(waves)))
    along = np.sin(frequency * (np.cos(angle) * _X + np.sin(angle) * _Y) + phase)
    kind = kinds[waves]
    board = kind == 3
    across = np.sin(frequency * (np.cos(angle) * _Y - np.sin(angle) * _X) + second)[board]
    along[board] *= across
    patterns[waves] = np.where((kind == 1)[:, None, None], along, np.sign(along))
    for number, block in ((4, 4), (5, 8)):
        chosen = np.flatnonzero(kinds == number)
        cells = rng.uniform(-1, 1, (len(chosen), SIZE // block, SIZE // block)).astype(np.float32)
        patterns[chosen] = cells.repeat(block, axis=1).repeat(block, axis=2)
    return patterns


def _draw_lines(ground: Floats, where: NDArray[np.bool_], rng: np.random.Generator) -> None:
    """Draw one straight line, two pixels wide and of a random colour, into each chosen background [n, 3, SIZE, SIZE]."""
    chosen = np.flatnonzero(where)
    angle, offset = _column(rng.uniform(0, np.pi, len(chosen))), _column(rng.uniform(-0.9, 0.9, len(chosen)))
    gap = np.abs(np.cos(angle) * _X + np.sin(angle) * _Y - offset) * HALF
    ink = np.clip(1.5 - gap, 0, 1)[:, None]
    colour = rng.random((len(chosen), 3, 1, 1), np.float32)
    ground[chosen] += ink * (colour - ground[chosen])
