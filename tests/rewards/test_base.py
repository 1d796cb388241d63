"""Checked calls of rewards."""

import numpy as np
import pytest
import torch

from rlgf.errors import TrainingError
from rlgf.rewards.base import score


def test_rewards_may_be_numbers_of_numpy_and_torch():
    for values in (np.array([0.5, 1.0]), torch.tensor([0.5, 1.0]), [np.float32(0.5), np.int64(1)], (0.5, 1)):
        assert score(lambda prompts, texts, values=values: values, [], ["a", "b"]) == [0.5, 1.0]
    with pytest.raises(TrainingError):
        score(lambda prompts, texts: [True, False], [], ["a", "b"])
