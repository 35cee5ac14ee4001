"""The table of proven backbones: a few small ones again each time, all of them in the slow tier."""

import pytest
import timm

from edgeft.errors import UnsupportedError
from edgeft.quant.backbones import proven_backbones
from tests.backbones.prove import family_of, prove

TABLE = {row.name: row for row in proven_backbones()}
SMALL = (
    "test_resnet", "test_efficientnet", "test_byobnet", "test_nfnet", "mobilenetv3_small_050", "ghostnet_050", "repghostnet_050",
    "starnet_s050", "res2next50",
)  # fmt: skip
"""Residual, depthwise, tables, gates, concatenation, slices, weight standardisation, reparameterisation, products."""


def test_table_is_broad_and_names_models_of_timm() -> None:
    assert len(TABLE) >= 250
    assert len({row.family for row in TABLE.values()}) >= 25
    assert set(TABLE) <= set(timm.list_models())
    assert all(family_of(row.name) == row.family and row.layers < row.operators for row in TABLE.values())


@pytest.mark.parametrize("name", SMALL)
def test_small_backbone_lowers(name: str) -> None:
    assert prove(name, TABLE[name].pixels) == TABLE[name]


def test_backbone_with_softmax_attention_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"layer 'stages.0.0.attn.softmax' \(operation softmax\) has no fixed-point form"):
        prove("gcresnext26ts", 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TABLE))
def test_backbone_lowers(name: str) -> None:
    assert prove(name, TABLE[name].pixels) == TABLE[name]
