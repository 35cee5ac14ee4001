"""Paired differences as the tables of the suites show them."""

from collections.abc import Sequence

from edgeft.evaluation.paired import Pair, difference

__all__ = ["Pair", "difference", "text"]


def text(pairs: Sequence[Pair]) -> str:
    """As tables show it: "-0.4 [-1.1, 0.3]"."""
    mean, low, high = difference(pairs)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
