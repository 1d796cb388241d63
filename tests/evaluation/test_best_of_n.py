"""Best of N: the kept completion, the dependence of samples on seeds, and the commands."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from helpers import END, tiny_model, word_reward
from rlgf.errors import ConfigError
from rlgf.evaluation.best_of_n import MAX_SAMPLES, best_of, concatenate, select
from rlgf.generation.decoder import LocalSampler
from rlgf.randomness import Purpose, uniforms
from rlgf.rl.rollout import RolloutConfig
from rlgf.types import Prompt, SamplingParams

PROMPTS = [Prompt("review of : plot cast =>"), Prompt("review of : music =>"), Prompt("review of : script sound story =>")]


def rollout_config(**changes: object) -> RolloutConfig:
    values = {"sampling": SamplingParams(), "max_new_tokens": 5, "min_new_tokens": 0, "seed": 3, **changes}
    policy = tiny_model()
    return RolloutConfig(policy, LocalSampler(policy), None, **values)  # pyright: ignore


def test_of_the_texts_of_a_prompt_the_best_is_kept_and_of_equal_ones_the_first():
    seen: list[tuple[str, str]] = []

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        seen.extend((prompt.text, text) for prompt, text in zip(prompts, texts))
        return word_reward(prompts, texts)

    rollout, scores = best_of(rollout_config(), PROMPTS, reward, 4, 0)
    assert [prompt.text for prompt in rollout.prompts] == [prompt.text for prompt in PROMPTS]
    for prompt, text, value in zip(PROMPTS, rollout.completions, scores):
        mine = [written for asked, written in seen if asked == prompt.text]
        values = word_reward([prompt] * 4, mine)
        assert value == max(values)
        assert text == mine[values.index(max(values))]


def test_a_draw_is_a_function_of_seed_prompt_and_sample():
    alone = [best_of(rollout_config(), PROMPTS, word_reward, 1, 0)[0].completions[0]]
    more, scores = best_of(rollout_config(), PROMPTS, word_reward, 8, 0)
    again, same = best_of(rollout_config(seed=99), PROMPTS, word_reward, 8, 0)  # the run's own seed plays no part
    assert (more.completions, scores) == (again.completions, same)
    assert best_of(rollout_config(), PROMPTS, word_reward, 8, 1)[0].completions != more.completions
    assert best_of(rollout_config(), PROMPTS[:1], word_reward, 1, 0)[0].completions == alone
    best = [best_of(rollout_config(), PROMPTS, word_reward, samples, 0)[1] for samples in (1, 2, 4, 8)]
    for fewer, several in pairwise(best):  # what fewer samples found is among those of more
        assert all(a <= b for a, b in zip(fewer, several))


def test_the_first_token_is_drawn_by_the_number_of_prompt_and_sample():
    policy = tiny_model()
    with torch.no_grad():
        ids = torch.tensor([policy.codec.prompt(PROMPTS[1])])
        cumulative = policy.model(ids).logits[0, -1].double().softmax(0).cumsum(0)
    drawn = [
        int(torch.searchsorted(cumulative, uniforms(0, Purpose.BEST_OF_TOKEN, 1 * MAX_SAMPLES + sample, 1)[0]))
        for sample in range(3)
    ]
    seen: list[str] = []

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        seen.extend(text for prompt, text in zip(prompts, texts) if prompt is PROMPTS[1])
        return [0.0] * len(texts)

    best_of(rollout_config(max_new_tokens=1), PROMPTS, reward, 3, 0)
    words = [policy.tokenizer.decode([token]) if token != END else "" for token in drawn]
    assert [text.strip() for text in seen] == words


def test_more_prompts_than_are_written_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch):
    whole = best_of(rollout_config(), PROMPTS, word_reward, 4, 0)
    monkeypatch.setattr("rlgf.evaluation.best_of_n.MAX_ROWS", 4)
    parts = best_of(rollout_config(), PROMPTS, word_reward, 4, 0)
    assert whole[0].completions == parts[0].completions
    assert whole[1] == parts[1]
    for name in ("ids", "origin", "ended_with_eos", "index", "group"):
        assert torch.equal(getattr(whole[0], name), getattr(parts[0], name)), name


def test_rows_are_selected_and_joined_with_all_that_belongs_to_them():
    rollout, _ = best_of(rollout_config(), PROMPTS, word_reward, 1, 0)
    back = concatenate([select(rollout, [0]), select(rollout, [1, 2])])
    assert back.completions == rollout.completions
    assert torch.equal(back.ids, rollout.ids)
    assert torch.equal(back.lengths, rollout.lengths)


def test_what_cannot_be_drawn_several_times_is_refused():
    with pytest.raises(ConfigError, match="needs stochastic sampling"):
        best_of(rollout_config(sampling=SamplingParams(greedy=True)), PROMPTS, word_reward, 4, 0)
    with pytest.raises(ConfigError, match="choose a number from 1 to 65,536"):
        best_of(rollout_config(), PROMPTS, word_reward, 0, 0)
