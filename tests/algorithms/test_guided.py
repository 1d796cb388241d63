"""The algorithms as data: switch rules, schedules, errors, and identities between algorithms."""

import ast
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rlgf
from helpers import parsed
from rlgf.algorithms import guided
from rlgf.algorithms.base import Algorithm, PhaseWeight, constant_schedule, single_phase
from rlgf.algorithms.registry import ALGORITHMS, aggrevated, d2lols, lols, ppo, ppo_pp
from rlgf.algorithms.switch_position import Phase, SwitchRule, sample_switch
from rlgf.bounds import declared_numbers
from rlgf.errors import ConfigError
from rlgf.types import GUIDE, POLICY, Origin

COINS = (0.0, 0.25, 0.5, 0.75, 1 - 2**-53)
ITERATIONS = (0, 1, 7, 10**6)
LAST_UNIFORM = 1 - 2**-53
HORIZON = 6


def law(rule: SwitchRule, rollin: Origin, length: int, horizon: int = HORIZON) -> dict[int, float]:
    """The probability of each switch point: the uniform is walked in equal steps that divide every length."""
    steps = 60 * 7  # a multiple of 1 … 7
    counts = Counter(sample_switch(rule, rollin, length, horizon, (step + 0.5) / steps) for step in range(steps))
    return {h: counts[h] / steps for h in sorted(counts)}


def equal_chances(first: int, last: int) -> dict[int, float]:
    count = last - first + 1
    return {h: pytest.approx(1 / count) for h in range(first, last + 1)}


def pieces(algorithm: Algorithm, iteration: int, coin: float) -> list[tuple[Phase, float, float, float]]:
    """Describe an iteration without phase numbers."""
    return [
        (algorithm.phases[share.phase], share.fraction, share.policy_weight, share.guide_weight)
        for share in algorithm.schedule(iteration, coin)
    ]


# the switch point


@pytest.mark.parametrize("length", [1, 2, 5, 7])
def test_a_guide_rollin_switches_uniformly_from_0_to_one_before_its_end(length: int) -> None:
    assert law("uniform", GUIDE, length) == equal_chances(0, length - 1)


@pytest.mark.parametrize("length", [1, 2, 5, 7])
def test_a_policy_rollin_switches_uniformly_from_1_to_its_end(length: int) -> None:
    assert law("uniform", POLICY, length) == equal_chances(1, length)


@pytest.mark.parametrize("rollin", [POLICY, GUIDE])
@pytest.mark.parametrize("length", [2, 3, 7])
def test_the_papers_rule_is_uniform_from_1_to_one_before_the_end(rollin: Origin, length: int) -> None:
    assert law("paper", rollin, length) == equal_chances(1, length - 1)


@pytest.mark.parametrize("rollin", [POLICY, GUIDE])
@pytest.mark.parametrize("length", [0, 1])
def test_the_papers_rule_starts_at_0_where_there_is_nothing_between(rollin: Origin, length: int) -> None:
    assert law("paper", rollin, length) == {0: 1.0}


def test_the_horizon_rule_is_uniform_from_1_to_the_horizon() -> None:
    assert law("horizon", POLICY, HORIZON) == equal_chances(1, HORIZON)


def test_the_horizon_rule_is_clipped_to_the_length() -> None:
    assert law("horizon", POLICY, 2) == {1: pytest.approx(1 / 6), 2: pytest.approx(5 / 6)}


@pytest.mark.parametrize(("rule", "rollin"), [("uniform", GUIDE), ("uniform", POLICY), ("paper", GUIDE), ("horizon", POLICY)])
def test_an_empty_rollin_switches_at_0(rule: SwitchRule, rollin: Origin) -> None:
    assert law(rule, rollin, 0) == {0: 1.0}


@given(st.sampled_from(["uniform", "paper", "horizon"]), st.booleans(), st.integers(1, 5000), st.integers(0, 5000))
def test_the_edges_of_the_uniform_reach_the_ends_of_the_range_and_no_further(
    rule: SwitchRule, guide: bool, length: int, more: int
) -> None:
    rollin, horizon = GUIDE if guide else POLICY, length + more
    lowest, highest = (sample_switch(rule, rollin, length, horizon, uniform) for uniform in (0.0, LAST_UNIFORM))
    if rule == "uniform":
        assert (lowest, highest) == ((0, length - 1) if guide else (1, length))
    elif rule == "paper":
        assert (lowest, highest) == ((1, length - 1) if length > 1 else (0, 0))
    else:
        assert (lowest, highest) == (1, length)


# what is refused


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan"), "much", True])
def test_a_beta_that_is_no_probability_is_refused(beta: Any) -> None:
    refused: dict[str, Callable[[], object]] = {
        "beta": lambda: ppo_pp(beta),
        "beta_guide": lambda: lols(beta_guide=beta),
        "beta_policy": lambda: d2lols(beta_policy=beta),
    }
    for name, construct in refused.items():
        with pytest.raises(ConfigError, match=rf"^{name} is .*, but must be (at (least 0|most 1)|a finite number|a number)\.$"):
            construct()
    with pytest.raises(ConfigError, match=r"^beta is .*, but must be (at (least 0|most 1)|a finite number|a number)\.$"):
        aggrevated(beta)
    with pytest.raises(ConfigError, match=r"^beta is .*, but must be (at (least 0|most 1)|a finite number|a number)\.$"):
        Phase(GUIDE, POLICY, beta)


def test_every_numeric_option_has_a_bound() -> None:
    numbers = [(kind, name) for kind in ALGORITHMS.values() for name in declared_numbers(kind)]
    assert len(numbers) == 13
    for kind, name in numbers:
        with pytest.raises(ConfigError, match=f"^{name} is -1"):
            kind(**{name: -1})


def test_every_choice_is_checked() -> None:
    for kind in ALGORITHMS.values():
        for field in fields(kind):
            if field.name not in declared_numbers(kind):
                with pytest.raises(ConfigError, match=f"^{field.name} is 'none', which is unknown"):
                    kind(**{field.name: "none"})


def test_the_horizon_rule_is_refused_for_a_guide_rollin() -> None:
    with pytest.raises(ConfigError, match="switch is 'horizon', which is a rule for policy rollins"):
        ppo_pp(0.5, "horizon")
    with pytest.raises(ConfigError, match="switch_guide is 'horizon', which is a rule for policy rollins"):
        lols(0.5, 0.5, 0.5, switch_guide="horizon")
    assert aggrevated(0.5, switch="horizon").build().phases[0].switch == "horizon"


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_a_mixing_weight_that_is_no_probability_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"^mixing_weight is .*, but must be (at (least 0|most 1)|a finite number)\.$"):
        lols(0.5, 0.5, alpha)


def test_a_switch_iteration_that_counts_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^switch_iteration is -1, but must be at least 0\.$"):
        d2lols(0.5, 0.5, -1)


def test_an_unknown_mix_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="mix is 'advantages', which is unknown: did you mean 'advantage'"):
        lols(0.5, 0.5, 0.5, mix="advantages")  # type: ignore[arg-type]


def test_the_public_names_are_the_classes_of_options() -> None:
    assert {
        "ppo": rlgf.ppo, "ppo_pp": rlgf.ppo_pp, "aggrevated": rlgf.aggrevated, "lols": rlgf.lols, "d2lols": rlgf.d2lols,
        "grpo": rlgf.grpo, "rloo": rlgf.rloo, "guided_grpo": rlgf.guided_grpo,
    } == ALGORITHMS  # fmt: skip
    assert rlgf.ppo_pp(beta=0.5) == guided.PPOPlusPlus(0.5, "uniform")
    assert {name: (kind.name, kind().build().name, kind().build().title) for name, kind in ALGORITHMS.items()} == {
        name: (name, name, kind.title) for name, kind in ALGORITHMS.items()
    }


# the members


def test_ppo_is_the_policy_alone() -> None:
    assert ppo().build().phases == (Phase(None, POLICY, 0.0),)
    assert ppo().build().schedule(3, 0.5) == (PhaseWeight(0, 1.0, 1.0, 0.0),)


def test_ppo_pp_is_a_guide_rollin_and_a_policy_rollout() -> None:
    assert ppo_pp(0.2).build().phases == (Phase(GUIDE, POLICY, 0.2, "uniform"),)
    assert ppo_pp(0.2, "paper").build().phases == (Phase(GUIDE, POLICY, 0.2, "paper"),)
    assert ppo_pp(0.2).build().schedule(3, 0.5) == (PhaseWeight(0, 1.0, 1.0, 0.0),)


def test_aggrevated_is_a_policy_rollin_and_a_guide_rollout() -> None:
    assert aggrevated(0.8).build().phases == (Phase(POLICY, GUIDE, 0.8, "uniform"),)
    assert aggrevated(0.8).build().schedule(3, 0.5) == (PhaseWeight(0, 1.0, 0.0, 1.0),)
    assert aggrevated(0.8).build().credit == "gae"
    assert aggrevated(0.8, "td").build().credit == "td"


def test_lols_by_advantage_has_both_halves_in_every_iteration_with_mixed_weights() -> None:
    algorithm = lols(0.2, 0.8, 0.75).build()
    assert algorithm.phases == (Phase(GUIDE, POLICY, 0.2), Phase(POLICY, GUIDE, 0.8))
    for iteration in ITERATIONS:
        for coin in COINS:
            assert algorithm.schedule(iteration, coin) == (PhaseWeight(0, 0.5, 0.75, 0.25), PhaseWeight(1, 0.5, 0.75, 0.25))


def test_lols_by_iteration_is_ppo_pp_with_probability_alpha() -> None:
    algorithm = lols(0.2, 0.8, 0.75, mix="iteration").build()
    for iteration in ITERATIONS:
        for coin in (0.0, 0.5, 0.75 - 2**-53):
            assert pieces(algorithm, iteration, coin) == pieces(ppo_pp(0.2).build(), iteration, coin)
        for coin in (0.75, 0.9, LAST_UNIFORM):
            assert pieces(algorithm, iteration, coin) == pieces(aggrevated(0.8).build(), iteration, coin)


def test_d2lols_is_aggrevated_for_alpha_iterations_and_then_ppo_pp() -> None:
    algorithm = d2lols(0.2, 0.8, 3).build()
    for coin in COINS:
        for iteration in (0, 1, 2):
            assert pieces(algorithm, iteration, coin) == pieces(aggrevated(0.8).build(), iteration, coin)
        for iteration in (3, 4, 100):
            assert pieces(algorithm, iteration, coin) == pieces(ppo_pp(0.2).build(), iteration, coin)


def test_fractions_of_an_iteration_add_up_to_the_whole() -> None:
    for algorithm in (
        ppo().build(),
        ppo_pp(0.2).build(),
        aggrevated(0.8).build(),
        lols(0.2, 0.8, 0.3).build(),
        d2lols(0.2, 0.8, 2).build(),
    ):
        for iteration in ITERATIONS:
            for coin in COINS:
                shares = algorithm.schedule(iteration, coin)
                assert sum(share.fraction for share in shares) == 1.0
                assert all(share.policy_weight + share.guide_weight == pytest.approx(1.0) for share in shares)


def test_each_member_names_the_critics_it_needs() -> None:
    assert ppo().build().critics == ppo_pp(0.2).build().critics == (POLICY,)
    assert aggrevated(0.8).build().critics == (GUIDE,)
    assert lols(0.2, 0.8, 0.5).build().critics == d2lols(0.2, 0.8, 5).build().critics == (POLICY, GUIDE)


def test_each_member_says_what_it_asks_of_a_guide() -> None:
    asked = {
        algorithm.name: (algorithm.needs_guide_rollin, algorithm.needs_guide_rollout)
        for algorithm in (
            ppo().build(),
            ppo_pp(0.2).build(),
            aggrevated(0.8).build(),
            lols(0.2, 0.8, 0.5).build(),
            d2lols(0.2, 0.8, 5).build(),
            *(ALGORITHMS[name]().build() for name in ("grpo", "rloo", "guided_grpo")),
        )
    }
    assert asked == {
        "ppo": (False, False),
        "ppo_pp": (True, False),
        "aggrevated": (False, True),
        "lols": (True, True),
        "d2lols": (True, True),
        "grpo": (False, False),
        "rloo": (False, False),
        "guided_grpo": (True, False),
    }
    assert tuple(asked) == tuple(ALGORITHMS)
    assert not ppo_pp(0.0).build().needs_guide_rollin


# identities


def test_lols_by_iteration_at_its_ends_is_ppo_pp_and_aggrevated() -> None:
    for credit in ("gae", "td", "switch"):
        ones, zeros = (lols(0.2, 0.8, alpha, "iteration", credit, "paper", "horizon").build() for alpha in (1.0, 0.0))
        assert zeros.credit == aggrevated(0.8, credit).build().credit
        for iteration in ITERATIONS:
            for coin in COINS:
                assert pieces(ones, iteration, coin) == pieces(ppo_pp(0.2, "paper").build(), iteration, coin)
                expected = pieces(aggrevated(0.8, credit, "horizon").build(), iteration, coin)
                assert pieces(zeros, iteration, coin) == expected


def test_d2lols_that_never_switches_is_aggrevated_and_that_starts_switched_is_ppo_pp() -> None:
    for iteration in (0, 1, 39):
        for coin in COINS:
            assert pieces(d2lols(0.2, 0.8, 40).build(), iteration, coin) == pieces(aggrevated(0.8).build(), iteration, coin)
            assert pieces(d2lols(0.2, 0.8, 0).build(), iteration, coin) == pieces(ppo_pp(0.2).build(), iteration, coin)


def test_ppo_pp_without_a_rollin_shares_its_iterations_as_ppo_does() -> None:
    assert ppo_pp(0.0).build().phases[0].rollout == ppo().build().phases[0].rollout
    assert ppo_pp(0.0).build().phases[0].beta == ppo().build().phases[0].beta == 0.0
    assert ppo_pp(0.0).build().schedule(5, 0.5) == ppo().build().schedule(5, 0.5)
    assert ppo_pp(0.0).build().credit == ppo().build().credit


def test_lols_by_advantage_with_alpha_1_is_not_ppo_pp() -> None:
    assert len(lols(0.2, 0.8, 1.0).build().schedule(0, 0.0)) == 2  # it also trains the AggreVaTeD texts, with A^π


def test_own_weighs_the_finishers_advantage_alone() -> None:
    assert single_phase(3, POLICY) == PhaseWeight(3, 1.0, 1.0, 0.0)
    assert single_phase(4, GUIDE, 0.25) == PhaseWeight(4, 0.25, 0.0, 1.0)
    assert constant_schedule(single_phase(0, POLICY))(9, 0.9) == (single_phase(0, POLICY),)


def test_the_family_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ppo_pp().beta = 0.5  # type: ignore[misc]


def test_the_family_imports_no_model_no_guide_and_no_task() -> None:
    imported: set[str] = set()
    for name in ("base", "baselines", "grouped", "guided", "registry", "switch_position"):
        path = Path(guided.__file__).with_name(f"{name}.py")
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
    assert imported == {
        "collections.abc", "dataclasses", "difflib", "math", "typing", "rlgf.algorithms.base", "rlgf.algorithms.baselines",
        "rlgf.algorithms.grouped", "rlgf.algorithms.guided", "rlgf.algorithms.switch_position", "rlgf.bounds", "rlgf.errors",
        "rlgf.types",
    }  # fmt: skip
