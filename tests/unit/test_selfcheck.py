"""The linear experiment of the LP-FT paper gives its orderings, quickly, and says where they end."""

import json
import time

import pytest

from edgeft.errors import ConfigError
from edgeft.selfcheck import Claim, SelfCheck, render, selfcheck


@pytest.fixture(scope="module")
def check() -> SelfCheck:
    return selfcheck()


def test_the_paper_s_orderings_hold_in_every_seed(check: SelfCheck) -> None:
    assert check.passed
    assert len(check.seeds) == 20
    for lp, ft, lpft in zip(check.good.lp.ood, check.good.ft.ood, check.good.lpft.ood, strict=True):
        assert lpft < lp < ft
        assert lpft < 0.5 * ft
    for lp, ft, lpft in zip(check.good.lp.id, check.good.ft.id, check.good.lpft.id, strict=True):
        assert max(ft, lpft) < 1e-6 < lp


def test_with_bad_features_only_the_probe_is_sure_to_be_beaten(check: SelfCheck) -> None:
    assert all(lpft <= lp for lp, lpft in zip(check.bad.lp.ood, check.bad.lpft.ood, strict=True))
    unsure = [claim for claim in check.claims if not claim.required]
    assert all(claim.n_holds < claim.n_seeds for claim in unsure), "were they sure, they would be no limits"
    assert all(claim.passed for claim in unsure)


def test_it_takes_less_than_two_seconds() -> None:
    start = time.process_time()
    selfcheck()
    assert time.process_time() - start < 2


def test_a_seed_gives_the_same_errors_in_any_company(check: SelfCheck) -> None:
    alone = selfcheck([7])
    assert alone.good.ft.ood[0] == pytest.approx(check.good.ft.ood[7], rel=1e-9)
    assert alone.bad.lpft.ood[0] == pytest.approx(check.bad.lpft.ood[7], rel=1e-9)


def test_text_shows_errors_statements_and_limits(check: SelfCheck) -> None:
    text = render(check)
    assert "good features (error 0.1)" in text
    assert "ok     20/20  out of distribution, LP-FT is better than both: LP-FT < LP < FT" in text
    assert "limit  18/20  LP-FT < FT is no longer sure" in text
    assert "\npassed\n" in text
    assert "does not say that LP-FT wins on your" in text


def test_a_required_statement_that_fails_is_shown_as_such(check: SelfCheck) -> None:
    broken = Claim("LP < FT", 19, 20, required=True)
    failed = SelfCheck(check.seeds, type(check.good)(0.1, check.good.lp, check.good.ft, check.good.lpft, (broken,)), check.bad)
    assert not failed.passed
    assert "FAILED 19/20  LP < FT" in render(failed)
    assert "FAILED: a statement" in render(failed)


def test_json_has_every_error(check: SelfCheck) -> None:
    tree = json.loads(json.dumps(check.to_json(), allow_nan=False))
    assert tree["passed"] is True
    assert tree["experiments"][0]["methods"]["lpft"]["ood"] == list(check.good.lpft.ood)
    assert tree["experiments"][1]["claims"][0]["n_holds"] == 20


@pytest.mark.parametrize("seeds", [(), (3, -1)])
def test_seeds_that_cannot_be_used_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        selfcheck(seeds)
    assert caught.value.message == f"selfcheck needs seeds of 0 or more, at least one; given: {', '.join(map(str, seeds)) or 'none'}"
