import json
from dataclasses import dataclass

import pytest

from edgeft.fixedpoint import FixedPointFormat
from edgeft.quant.formats import MAX_SHIFT, FormatTable, Groups, LayerFormats, Point, activation_format, resolve, weight_format
from tests.nets import calibrated, depthwise_net, prepared, randomise, residual_net


def point(name: str, group: int | None = None, *, carried: bool = False, min_frac: int | None = None, shared: str | None = None) -> Point:
    return Point(name, activation_format("u8", relu=True, frac=0), True, min_frac, shared or name, group, carried)


def test_formats_by_profile() -> None:
    assert str(activation_format("u8", relu=True, frac=6)) == "u8.6"
    assert str(activation_format("u8", relu=False, frac=6)) == "s8.6"
    assert str(activation_format("s8", relu=True, frac=6)) == "s8.6"
    assert str(weight_format(9)) == "w8.9"


@pytest.mark.parametrize("signed", [False, True])
def test_largest_shift_saturates_whatever_float32_cannot_hold(signed: bool) -> None:
    high = FixedPointFormat(8, 0, signed=signed).max_code
    assert (2**24 + 1) / 2 ** MAX_SHIFT[signed] > high + 0.5
    assert 2**24 / 2 ** (MAX_SHIFT[signed] + 1) < high


def test_points_outside_of_groups_keep_their_proposals() -> None:
    assert resolve([point("a"), point("b")], {"a": 5, "b": -2}) == {"a": 5, "b": -2}


def test_carried_members_share_the_smallest_fraction() -> None:
    points = [
        point("stem", 0, carried=True),
        point("sum1", 0, carried=True),
        point("sum2", 0, carried=True),
        point("other", 1, carried=True),
    ]
    assert resolve(points, {"stem": 6, "sum1": 4, "sum2": 5, "other": 7}) == {"stem": 4, "sum1": 4, "sum2": 4, "other": 7}


@pytest.mark.parametrize(("own", "expected"), [(2, 2), (4, 4), (9, 4)])
def test_operands_may_be_coarser_but_never_finer(own: int, expected: int) -> None:
    points = [point("operand", 0), point("sum", 0, carried=True)]
    assert resolve(points, {"operand": own, "sum": 4}) == {"operand": expected, "sum": 4}


def test_clip_is_a_floor_of_its_own_tensor() -> None:
    assert resolve([point("a", min_frac=5)], {"a": 3}) == {"a": 5}
    assert resolve([point("a", min_frac=5)], {"a": 7}) == {"a": 7}


def test_clip_does_not_make_the_sums_around_it_saturate() -> None:
    points = [point("clipped", 0, min_frac=5), point("sum", 0, carried=True), point("plain", 0)]
    assert resolve(points, {"clipped": 3, "sum": 3, "plain": 6}) == {"clipped": 5, "sum": 3, "plain": 3}
    carried = [point("clipped", 0, carried=True, min_frac=5), point("sum", 0, carried=True)]
    assert resolve(carried, {"clipped": 7, "sum": 3}) == {"clipped": 5, "sum": 3}


@dataclass
class Node:
    name: str
    inputs: tuple[str, ...]


class Tie(Node):
    pass


def test_groups_tie_inputs_and_output() -> None:
    steps = [Node("a", ("image",)), Node("b", ("a",)), Tie("sum", ("a", "b")), Tie("pool", ("sum",)), Node("c", ("pool",))]
    groups = Groups.of(steps, Tie)
    assert sorted(map(sorted, groups.sets())) == [["a", "b", "pool", "sum"], ["c"], ["image"]]
    assert groups.find("a") == groups.find("pool") != groups.find("c")


def test_points_of_a_network() -> None:
    points = {p.name: p for p in calibrated(prepared(randomise(residual_net())), rounding="nearest").points}
    assert "1" not in points  # max-pooling only moves codes
    assert points["0.0"].carried  # read by a block and by its addition, through the pool
    assert points["0.0"].group == points["2.add"].group == points["2.right.1.0"].group is not None
    assert not points["2.right.1.0"].carried
    assert points["2.add"].relu
    assert points["2.add"].format.signed is False
    assert points["3.right.1.0"].format.signed is True
    assert points["4.add_2"].group not in (None, points["2.add"].group)
    assert points["2.right.0.0"].group is None


@pytest.mark.parametrize("profile", ["u8", "s8"])
def test_constraints_hold_in_a_calibrated_network(profile: str) -> None:
    for build in (residual_net, depthwise_net):
        net = calibrated(prepared(randomise(build()), profile), profile=profile, rounding="nearest")
        for p in net.points:
            if p.min_frac is not None:
                assert net.frac(p.name) >= p.min_frac
                assert net.format(p.name).max_code * 2.0**-p.min_frac == net.plan[p.name].clip
            if p.group is not None and p.min_frac is None:
                shared = {net.frac(q.name) for q in net.points if q.group == p.group and q.carried and q.min_frac is None}
                assert len(shared) == 1
                assert net.frac(p.name) <= shared.pop()


def test_layer_formats_as_json() -> None:
    layer = LayerFormats((weight_format(7), weight_format(9)), FixedPointFormat.parse("u8.5"), FixedPointFormat.parse("s8.4"), 0.25, 22)
    last = LayerFormats((weight_format(7),), FixedPointFormat.parse("u8.5"), None, 0.5, 23)
    table = FormatTable("std", "channel", {"a": layer, "b": last}, {"a": FixedPointFormat.parse("s8.4")}, {"a": 1.5})
    tree = json.loads(json.dumps(table.to_json()))
    assert tree == {
        "rule": "std",
        "granularity": "channel",
        "layers": {
            "a": {
                "weight": ["w8.7", "w8.9"],
                "input": "u8.5",
                "output": "s8.4",
                "weight_sigma": 0.25,
                "accumulator_frac": [12, 14],
                "accumulator_bits": 22,
            },
            "b": {
                "weight": ["w8.7"],
                "input": "u8.5",
                "output": "logits",
                "weight_sigma": 0.5,
                "accumulator_frac": [12],
                "accumulator_bits": 23,
            },
        },
        "activations": {"a": {"format": "s8.4", "sigma": 1.5}},
    }
    assert table.summary() == "weights frac 7 ... 9, activations frac 4 ... 4"
