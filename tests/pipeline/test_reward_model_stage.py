"""The stage of a reward model: pairs that it cannot score are left out."""

import dataclasses
from pathlib import Path

import pytest

from helpers import preference_pair
from rlgf.config.sections import PreferenceConfig
from rlgf.data.preferences import Pairs
from rlgf.errors import ConfigError
from rlgf.pipeline.reward_model_stage import drop_too_long
from rlgf.supervised.reward_modeling import new_reward_model


def test_pairs_with_a_response_that_cannot_be_read_whole_are_left_out_and_counted(causal_folder: Path):
    reward = new_reward_model(str(causal_folder), PreferenceConfig(), 0)
    long = dataclasses.replace(preference_pair(9), rejected=" ".join(["plot"] * 80))
    fine = [preference_pair(number) for number in range(4)]
    kept = drop_too_long(reward, Pairs([*fine, long], fine[:1], {"pairs with identical responses": 2}))
    assert (list(kept.train), list(kept.test)) == (fine, fine[:1])
    assert kept.dropped == {
        "pairs with identical responses": 2, "pairs with a response of more tokens than the reward model's context (48)": 1,
    }  # fmt: skip
    assert reward.num_truncated == 0
    with pytest.raises(ConfigError, match=r"1 pairs with a response .* leave none to train or evaluate on"):
        drop_too_long(reward, Pairs([long], fine))
