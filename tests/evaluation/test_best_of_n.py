"""Best of N: the kept completion, the dependence of samples on seeds, and the commands."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from helpers import END, SMALL, small, tiny_model, word_reward
from rlgf.cli import app
from rlgf.config.sections import ModelConfig
from rlgf.config.variants import build_variants, plan_comparison
from rlgf.errors import ConfigError
from rlgf.evaluation.best_of_n import MAX_SAMPLES, best_of, concatenate, select
from rlgf.experiments.compare import compare
from rlgf.generation.decoder import LocalSampler
from rlgf.models.loading import new_language_model
from rlgf.pipeline.build_models import load_pre_sft_model
from rlgf.pipeline.resolve import resolve
from rlgf.pipeline.run import evaluate_policy_on_test, train
from rlgf.pipeline.stage_cache import StageCache, no_report
from rlgf.pipeline.stages import train_tokenizer
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


def test_a_run_is_evaluated_with_the_best_of_several_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    train(small(("evaluation.sampling", {"greedy": True}), ("runtime.threads", 1)), tmp_path / "run")
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["rlgf", "evaluate", str(tmp_path / "run"), "--best-of", "3", "--json", str(out)])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 0
    assert "best of 3" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["best_of"]["samples"] == 3
    assert found["best_of"]["sampling"] == "full softmax"  # greedily it would be the same text three times
    assert found["best_of"]["evaluation"]["completions"] == found["completions"] == 8


def test_a_comparison_has_a_row_for_the_best_of_each(tmp_path: Path):
    config = small(("evaluation.best_of", 2))
    results = compare(plan_comparison(config, build_variants(config, ["ppo"], {}), [0]), tmp_path)
    assert [row["key"] for row in results["rows"]] == ["sft", "sft_best_of", "guide", "ppo", "ppo_best_of"]
    assert [row["title"] for row in results["rows"]][1::3] == ["SFT, best of 2", "PPO, best of 2"]
    assert "| PPO, best of 2 |" in (tmp_path / "table.md").read_text()
    assert dict(SMALL)["evaluation.final_prompts"] == results["rows"][1]["metrics"]["completions"][0]


def evaluated(arguments: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["rlgf", "evaluate", *arguments, "--json", str(out)])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 0
    return json.loads(out.read_text())


def test_a_policy_of_another_vocabulary_is_refused_before_anything_is_trained(tmp_path: Path):
    folder = tmp_path / "model"
    new_language_model(ModelConfig(layers=1, width=8, heads=1), train_tokenizer(["other words"] * 9, 260), 0).save(folder)
    with pytest.raises(ConfigError, match="has another vocabulary"):
        evaluate_policy_on_test(resolve(small()), str(folder), StageCache(tmp_path / "stages", no_report))
    assert not (tmp_path / "stages").exists()


def test_a_baseline_is_a_command_and_says_what_a_comparison_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = small(("evaluation.baselines", ["zero_shot", "sft", "guide"]), ("runtime.threads", 1))
    rows = {
        row["key"]: row
        for row in compare(plan_comparison(config, build_variants(config, ["ppo"], {}), [0]), tmp_path / "all")["rows"]
    }
    run = tmp_path / "all" / "runs" / "ppo-seed0"
    for name in ("zero_shot", "sft", "guide"):
        found = evaluated([str(run), "--baseline", name], tmp_path, monkeypatch)
        assert {key: [value] for key, value in found.items()} == rows[name]["metrics"], name
    assert rows["zero_shot"]["metrics"]["perplexity"] != rows["sft"]["metrics"]["perplexity"]
    found = evaluated([str(run), "--baseline", "zero_shot", "--best-of", "2"], tmp_path, monkeypatch)
    assert found["best_of"]["samples"] == 2  # pyright: ignore


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--baseline", "oracle"], "unknown baseline 'oracle'"),
        (["--baseline", "sft", "--policy", "somewhere"], "both choose the model to evaluate"),
        (["--baseline", "guide", "--best-of", "2"], "--baseline=guide has none"),
    ],
)
def test_baselines_that_cannot_be_are_refused(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["rlgf", "evaluate", "quickstart", *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_zero_shot_is_refused_where_only_the_policy_is_given(tmp_path: Path):
    config = small(("policy", "somewhere"))
    with pytest.raises(ConfigError, match="does not say which one that was"):
        load_pre_sft_model(resolve(config).policy, tiny_model(), StageCache(tmp_path, no_report))
