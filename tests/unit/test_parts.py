"""Effective robustness on parts of the shifted images, against shares set by hand."""

import numpy as np
import pytest

from edgeft.diagnosis.parts import part_robustness, render

SHARES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9)


def hits(share: float, n: int) -> np.ndarray:
    return np.arange(n) < round(share * n)


def both(ref: float, inside: float, outside: float) -> tuple[np.ndarray, np.ndarray]:
    """400 reference images, 200 in support, 200 out of it."""
    return hits(ref, 400), np.concatenate([hits(inside, 200), hits(outside, 200)])


OUTSIDE = np.arange(400) >= 200


def test_robustness_is_that_of_the_part() -> None:
    baselines = {f"b{share}": both(share, share - 0.05, share - 0.3) for share in SHARES}
    found = part_robustness(baselines, {"pretrained": both(0.75, 0.7, 0.65)}, OUTSIDE)
    shifted, inside, outside = found
    assert [part.n for part in found] == [400, 200, 200]
    assert inside.found is not None
    assert outside.found is not None
    assert shifted.found is not None
    assert inside.found.models[0].effective == pytest.approx(0.0, abs=0.03)
    assert outside.found.models[0].effective == pytest.approx(0.2, abs=0.03)
    assert outside.found.models[0].verdict == "above"
    assert shifted.found.models[0].effective == pytest.approx(0.1, abs=0.03)
    text = "\n".join(render(found))
    assert "out of support" in text
    assert f"{100 * outside.found.models[0].effective:+.1f} [" in text


def test_a_part_without_a_line_says_why() -> None:
    baselines = {f"b{share}": both(share, share - 0.05, share - 0.3) for share in SHARES}
    none_outside = part_robustness(baselines, {"m": both(0.7, 0.6, 0.5)}, np.zeros(400, bool))
    assert (none_outside[2].n, none_outside[2].why) == (0, "no labelled images")
    few = part_robustness(dict(list(baselines.items())[:3]), {"m": both(0.7, 0.6, 0.5)}, OUTSIDE)
    assert few[1].found is None
    assert few[1].why.startswith("a line of baselines needs at least 5 models, found 3")
    assert few[1].to_json()["models"] == []
    assert "found 3" in "\n".join(render(few))
