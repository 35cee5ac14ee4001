"""Random streams of many images at once: the same as numpy.random.default_rng((..., index)), in a third of the time.

Seeding takes longer than drawing the numbers of a small image. Here the hash of numpy.random.SeedSequence (M. E. O'Neill's seed_seq_fe,
https://www.pcg-random.org/posts/developing-a-seed_seq-alternative.html) is computed for all images together.
"""

from collections.abc import Sequence

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

Words = NDArray[np.uint32]

_POOL, _STATE_WORDS, _SHIFT = 4, 8, np.uint32(16)
_INIT_A, _MULT_A, _INIT_B, _MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
_MIX_L, _MIX_R = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_MASK = 0xFFFFFFFF


class _Known(ISeedSequence):
    """A seed sequence whose state is known already; it is asked once, by the bit generator that is made of it."""

    def __init__(self, state: NDArray[np.uint64]) -> None:
        self._state = state

    def generate_state(self, n_words: int, dtype: object = np.uint32) -> NDArray[np.uint64]:
        """The state."""
        assert (n_words, dtype) == (len(self._state), np.uint64), "PCG64 asks for this"
        return self._state


def streams(key: Sequence[int], indices: Sequence[int] | NDArray[np.int64]) -> list[np.random.Generator]:
    """default_rng((*key, index)) for every index; all numbers are at least 0."""
    numbers = np.asarray(indices, np.int64)
    if numbers.size and int(numbers.max()) > _MASK:  # such an index has two words
        return [np.random.default_rng((*key, int(index))) for index in numbers]
    entropy = [np.full(len(numbers), word, np.uint32) for number in key for word in _words(number)] + [numbers.astype(np.uint32)]
    states = _states(_pool(entropy))
    return [np.random.Generator(np.random.PCG64(_Known(state))) for state in states]  # type: ignore[arg-type]


def _words(number: int) -> list[int]:
    """A number in words of 32 bits, the lowest first."""
    words = [number & _MASK]
    while number := number >> 32:
        words.append(number & _MASK)
    return words


class _Hash:
    """SeedSequence's hash of words, whose constant changes with every use."""

    def __init__(self, constant: int, factor: int) -> None:
        self._constant, self._factor = constant, factor

    def __call__(self, words: Words) -> Words:
        mixed = words ^ np.uint32(self._constant)
        self._constant = self._constant * self._factor & _MASK
        mixed *= np.uint32(self._constant)
        hashed: Words = mixed ^ (mixed >> _SHIFT)
        return hashed


def _mixed(left: Words, right: Words) -> Words:
    found = _MIX_L * left - _MIX_R * right
    mixed: Words = found ^ (found >> _SHIFT)
    return mixed


def _pool(entropy: list[Words]) -> list[Words]:
    """SeedSequence.mix_entropy."""
    hashed = _Hash(_INIT_A, _MULT_A)
    nothing = np.zeros_like(entropy[0])
    pool = [hashed(entropy[place] if place < len(entropy) else nothing) for place in range(_POOL)]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = _mixed(pool[target], hashed(pool[source]))
    for words in entropy[_POOL:]:
        pool = [_mixed(old, hashed(words)) for old in pool]
    return pool


def _states(pool: list[Words]) -> NDArray[np.uint64]:
    """SeedSequence.generate_state of four 64-bit words, [n, 4]."""
    hashed = _Hash(_INIT_B, _MULT_B)
    words = [hashed(pool[place % _POOL]).astype(np.uint64) for place in range(_STATE_WORDS)]
    return np.stack([low | high << np.uint64(32) for low, high in zip(words[::2], words[1::2], strict=True)], axis=1)
