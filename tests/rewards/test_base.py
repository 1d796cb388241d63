"""Valid results of a reward, and the refusal of all others."""

from asyncio import CancelledError
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from hostile import HOSTILE, is_clean
from rlgf.errors import ConfigError, GuideError, RewardError
from rlgf.rewards.base import probe_reward, score
from rlgf.types import Prompt

PROMPTS, TEXTS = [Prompt("a", ("b",)), Prompt("c")], ["x", "y"]


def scored(returned: Any) -> list[float]:
    return score(lambda prompts, texts: returned, PROMPTS, TEXTS)


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5], (1, 0.5), iter([1, 0.5]), (value for value in (1, 0.5)), {"a": 1, "b": 0.5}.values(), np.array([1, 0.5]),
        np.array([1, 0.5], dtype=np.float16), torch.tensor([1, 0.5]), torch.tensor([1, 0.5], dtype=torch.bfloat16),
        [torch.tensor(1), torch.tensor(0.5)], [np.float32(1), np.float64(0.5)], [np.int8(1), Fraction(1, 2)],
        torch.tensor([1.0, 0.5], requires_grad=True),
    ],
)  # fmt: skip
def test_a_number_for_each_completion_is_taken_whatever_holds_it(returned: Any) -> None:
    values = scored(returned)
    assert values == [1.0, 0.5]
    assert all(type(value) is float for value in values)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"x": 1.0, "y": 0.5}, r"returned a dict for 2 completions: it must return a list of numbers"),
        ({1.0: "x", 2.0: "y"}, r"returned a dict for 2 completions"),
        ({1.0, 2.0}, r"returned a set for 2 completions"),
        ("12", r"returned a str for 2 completions"),
        (b"12", r"returned a bytes for 2 completions"),
        (None, r"returned nothing for 2 completions"),
        (0.5, r"returned a float for 2 completions"),
        (torch.tensor(0.5), r"returned a Tensor for 2 completions"),
        (object(), r"returned an object for 2 completions"),
        ([0.5], r"returned 1 numbers for 2 completions"),
        ([10**400, 0.5], r"completion 'x' is a number of about 400 digits: it must be a finite number"),
        ([0.5, -(10**5000)], r"completion 'y' is a number of about 5,000 digits"),
        ([[0.5], [1.0]], r"completion 'x' is \[0\.5\]"),
        (torch.tensor([[0.5], [1.0]]), r"completion 'x' is \[0\.5\]"),
        ([torch.tensor([0.5]), torch.tensor([1.0])], r"completion 'x' is tensor\(\[0\.5"),
        (["0.5", "1"], r"completion 'x' is '0\.5'"),
        ([True, False], r"completion 'x' is True"),
        (torch.tensor([True, False]), r"completion 'x' is True"),
        ([np.True_, np.False_], r"completion 'x' is "),
        ([None, 0.5], r"completion 'x' is None"),
        ([1j, 0.5], r"completion 'x' is 1j"),
        ([Decimal(1), 0.5], r"completion 'x' is Decimal"),
        ([float("nan"), 0.5], r"completion 'x' is nan"),
        (np.array([np.inf, 0.5]), r"completion 'x' is inf"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_one_sentence(returned: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        scored(returned)
    assert len(str(caught.value)) < 300


def fails(error: BaseException) -> Callable[..., Any]:
    def reward(prompts: Any, texts: Any) -> list[float]:
        raise error

    return reward


@pytest.mark.parametrize(
    "error",
    [SystemExit(0), SystemExit(), SystemExit("done"), ValueError("no"), CancelledError()],
    ids=repr,
)
def test_a_reward_that_ends_the_program_or_fails_is_an_error(error: BaseException) -> None:
    for reward in (fails(error), lambda *_: (fails(error)(1, 2) for _ in TEXTS)):  # at once, and while it is read
        with pytest.raises(RewardError, match=rf"the reward failed on 2 completions \({type(error).__name__}") as caught:
            score(reward, PROMPTS, TEXTS)
        assert caught.value.exit_code == 3
    with pytest.raises(ConfigError, match="probe: the reward failed"):
        probe_reward(fails(error), PROMPTS)


def test_a_reward_that_changes_its_arguments_changes_nothing_else() -> None:
    def reward(prompts: Any, texts: Any) -> list[float]:
        numbers = [float(len(text)) for text in texts]
        prompts.clear()
        texts[:] = ["another"]
        return numbers

    prompts, texts = list(PROMPTS), list(TEXTS)
    assert score(reward, prompts, texts) == [float(len(text)) for text in TEXTS]
    assert (prompts, texts) == (list(PROMPTS), list(TEXTS))


def test_ctrl_c_and_errors_of_ours_pass() -> None:
    with pytest.raises(KeyboardInterrupt):
        score(fails(KeyboardInterrupt()), PROMPTS, TEXTS)
    with pytest.raises(GuideError, match=r"^mine$"):
        score(fails(GuideError("mine")), PROMPTS, TEXTS)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_completions_and_messages_are_shown_clean(text: str) -> None:
    for reward in (lambda prompts, texts: [text] * 2, fails(ValueError(text)), lambda prompts, texts: {text: 1}):
        with pytest.raises(RewardError) as caught:
            score(reward, PROMPTS, [text, text])
        assert is_clean(str(caught.value))
        assert len(str(caught.value)) < 400
