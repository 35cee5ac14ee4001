"""Shares of saturated and vanished values, against counting by hand."""

import numpy as np
import pytest
import torch

from edgeft.data.preprocess import Preprocessing
from edgeft.quant.formats import activation_format
from edgeft.quant.saturation import Counts, count, saturation
from tests.nets import bytes_of, calibrated, depthwise_net, prepared, randomise, residual_net
from tests.tiny import DATA

P = Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)


def test_codes_past_the_ends_and_values_that_become_zero() -> None:
    counts = Counts()
    signed = activation_format("u8", relu=False, frac=4)  # codes -128 ... 127, steps of 1/16
    x = torch.tensor([127.5, 127.49, 200.0, -128.5, -128.51, -300.0, 0.5, -0.5, 0.51, 0.0]) / 16
    counts.add(x, 4, signed.min_code, signed.max_code, relu=False)
    # Ties go to even: 127.5 becomes 128, past the top; -128.5 becomes -128, inside; +-0.5 becomes 0.
    assert counts == Counts(n=10, top=2, bottom=2, nonzero=9, vanished=2)
    counts.add(x, 4, 0, 127, relu=True)
    assert counts == Counts(n=20, top=4, bottom=2, nonzero=14, vanished=3)
    assert counts.to_json() == {"top": 4 / 20, "bottom": 2 / 20, "underflow": 3 / 14}
    assert Counts().to_json() == {"top": 0.0, "bottom": 0.0, "underflow": 0.0}


@pytest.mark.parametrize("build", [residual_net, depthwise_net])
def test_counts_agree_with_the_codes_of_the_graph(build: object) -> None:
    net = calibrated(prepared(randomise(build())), rounding="nearest")  # type: ignore[operator]
    images = bytes_of(40)
    found = count(net, images)
    assert list(found) == [point.name for point in net.points]
    with torch.inference_mode():
        values = dict(net.tensors(torch.from_numpy(images)))
    for point in net.points:
        fmt, counts = net.format(point.name), found[point.name]
        codes = values[point.name] * 2.0**fmt.frac
        assert counts.n == codes.numel()
        # Every saturated value has the end code; so may others.
        assert counts.top <= int((codes == fmt.max_code).sum())
        assert counts.bottom <= int((codes == fmt.min_code).sum())
        assert counts.n - counts.nonzero + counts.vanished == int((codes == 0).sum())
        assert counts.bottom == 0 or not point.relu


def test_too_fine_a_format_saturates_and_too_coarse_a_one_underflows() -> None:
    net = calibrated(prepared(randomise(residual_net())), rounding="nearest", fit_ranges=False)
    name = next(point.name for point in net.points if point.group is None and point.relu)
    shares = {}
    for change in (-6, 0, 6):
        start = {point.name: net.frac(point.name) for point in net.points}
        net.set_fracs(start | {name: start[name] + change})
        shares[change] = count(net, bytes_of(16))[name].to_json()
        net.set_fracs(start)
    assert shares[6]["top"] > 0.2 > shares[0]["top"]
    assert shares[-6]["underflow"] > 0.5 > shares[0]["underflow"]


def test_document_covers_every_split_and_knows_clips() -> None:
    net = calibrated(prepared(randomise(depthwise_net())), rounding="nearest")
    seen: list[int] = []
    document = saturation(net, DATA, P, 12, 0, lambda n, _: seen.append(n))
    assert document["images"] == {"id": 12, "ood:dim": 12}
    assert seen == [12, 12]
    assert set(document["tensors"]) == {point.name for point in net.points}
    clips = {name: entry["clip"] for name, entry in document["tensors"].items()}
    assert any(clips.values())
    assert not all(clips.values())
    for name, entry in document["tensors"].items():
        assert entry["format"] == str(net.format(name))
        assert set(entry["splits"]) == {"id", "ood:dim"}
        assert all(0 <= share <= 1 for shares in entry["splits"].values() for share in shares.values())
    assert document == saturation(net, DATA, P, 12, 0, lambda *_: None)
    assert np.isfinite([entry["splits"]["id"]["top"] for entry in document["tensors"].values()]).all()
