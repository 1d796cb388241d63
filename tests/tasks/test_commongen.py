"""CommonGen, and its needs: encoder–decoders, sums of text metrics, further splits."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlgf.config.loading import override
from rlgf.config.recipes import recipe
from rlgf.config.schema import Config
from rlgf.config.sections import EvaluationConfig, ModelConfig, PPOConfig, RewardConfig, SupervisedConfig, TaskConfig
from rlgf.errors import INPUT_ERRORS
from rlgf.evaluation.evaluate import EvaluationContext, check_text_metrics, text_metrics
from rlgf.pipeline import stages
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.resolve import resolve
from rlgf.pipeline.stage_cache import StageCache
from rlgf.reports.tables import columns_of, markdown
from rlgf.rewards.build import build_reward
from rlgf.rewards.weighted_sum import WeightedSum, score_components
from rlgf.supervised.examples import SENTINELS, TargetExamples, corrupt_spans
from rlgf.tasks import commongen
from rlgf.tasks.base import Task
from rlgf.text_metrics.as_rewards import TermSum
from rlgf.text_metrics.concepts import concepts_in
from rlgf.trainer import Trainer
from rlgf.types import Prompt

ROWS = [
    {"concepts": ["dog", "frisbee", "catch"], "targets": ["A dog  catches a frisbee.", "The dog will catch the frisbee ."]},
    {"concepts": ["ski", "mountain", "man", "snow"], "targets": ["A man skis down a mountain in the snow."]},
    {"concepts": ["cat", "sleep", "bed"], "targets": ["A cat sleeps on a bed."]},
]


def data(folder: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def t5_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages of the small encoder–decoder, made once: their names do not depend on the place of the data."""
    return tmp_path_factory.mktemp("stages")


def task_config(source: str, **options: Any) -> TaskConfig:
    return TaskConfig("commongen", source, max_new_tokens=20, min_new_tokens=5, options=options)


def test_a_prompt_names_the_concepts_and_every_reference_is_a_target(tmp_path: Path):
    task = commongen.build(task_config(data(tmp_path)), None)
    first = task.train[0]
    assert first.text == "generate a sentence with: dog frisbee catch."
    assert first.references == first.sft_targets == ("A dog catches a frisbee.", "The dog will catch the frisbee .")
    assert [commongen.difficulty(prompt) for prompt in task.train] == ["easy", "hard", "easy"]
    assert list(task.extra_test_splits) == ["validation"]
    assert task.reward is None


def test_the_hubs_form_of_the_data_is_grouped_by_concepts(tmp_path: Path):
    pairs = [{"concepts": row["concepts"], "target": text} for row in ROWS for text in row["targets"]]
    task = commongen.build(task_config(data(tmp_path, pairs)), None)
    assert [len(prompt.references) for prompt in task.train] == [2, 1, 1]


def test_a_test_split_whose_references_are_kept_back_is_not_reported(tmp_path: Path):
    source = data(tmp_path, [{"concepts": row["concepts"], "target": row["targets"][0]} for row in ROWS])
    hidden = [{"concepts": row["concepts"], "target": ""} for row in ROWS]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hidden))
    task = commongen.build(task_config(source), None)
    assert task.test == task.validation
    assert not task.extra_test_splits
    assert task.warnings == {"test prompts have no references: only validation is reported": 3}
    hidden[0]["target"] = "A dog catches a frisbee."  # some, but not all
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hidden))
    with pytest.raises(INPUT_ERRORS, match="split test, row 2: 'targets' \\(or 'target'\\) must hold at least one string"):
        commongen.build(task_config(source), None)


def test_concept_sets_are_held_out_from_training_for_evaluations(tmp_path: Path):
    task = commongen.build(task_config(data(tmp_path), held_out=1), None)
    assert len(task.train) == 2
    assert len(task.validation) == 1
    assert task.validation[0] not in task.train
    assert len(task.extra_test_splits["validation"]) == 3
    assert not task.warnings
    with pytest.raises(INPUT_ERRORS, match="held_out is 3, but there are 3"):
        commongen.build(task_config(data(tmp_path), held_out=3), None)


def test_no_sentence_of_concept_sets_held_out_is_trained_on(tmp_path: Path):
    shared = ROWS[0]["targets"][0]
    source = data(tmp_path, [*ROWS, *({"concepts": [f"word{i}", "dog"], "targets": [shared]} for i in range(3))])
    config = task_config(source, held_out=2)  # of six, four of which share a sentence: at least one of those stays behind
    task = commongen.build(config, None)
    held = {text for prompt in task.validation for text in prompt.references}
    trained = {text for prompt in task.train for text in prompt.references}
    assert trained
    assert trained.isdisjoint(held)
    assert set(commongen.raw_texts(config, 0)) == trained
    left_out = 6 - len(task.train) - len(task.validation)
    assert task.warnings == {"training prompts share a sentence with held-out ones, and are dropped": left_out}
    with pytest.raises(INPUT_ERRORS, match="held_out is 1: every other training prompt shares a sentence with them"):
        commongen.build(task_config(data(tmp_path, [ROWS[0]] * 3), held_out=1), None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"concepts": [], "targets": ["a"]}, "row 1: the prompt is empty"),
        ({"concepts": ["dog"], "targets": []}, r"'targets' \(or 'target'\) must hold at least one string"),
        ({"concepts": ["dog"], "targets": [" "]}, "none of them empty"),
        ({"concepts": ["dog"]}, "must hold at least one string"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tmp_path: Path, row: dict[str, Any], message: str):
    with pytest.raises(INPUT_ERRORS, match=message):
        commongen.build(task_config(data(tmp_path, [row])), None)


@pytest.mark.integration
def test_an_encoder_decoder_learns_spans_then_every_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stages, "TOKENIZER_TEXTS", 10)
    few = SupervisedConfig(steps=2, batch_size=2)
    config = Config(
        task=task_config(data(tmp_path)), pretrain=few, sft=few,
        model=ModelConfig(architecture="t5", layers=1, width=16, heads=2, max_length=32, vocabulary=300),
    )  # fmt: skip
    folder = stages.fine_tune_stage(resolve(config).policy.sft, StageCache(tmp_path / "stages", lambda line: None))
    from rlgf.models.loading import load_language_model

    model = load_language_model(str(folder))
    assert model.codec.is_encoder_decoder
    assert model.tokenizer.convert_ids_to_tokens([1, 2]) == list(SENTINELS[:2])
    examples = TargetExamples(commongen.build(config.task, model.tokenizer), model, 20)
    assert len(examples) == 4
    assert model.codec.decode([[]], [examples[1].ids[examples[1].start :]]) == ["The dog will catch the frisbee ."]
    spans = corrupt_spans(["A dog catches a frisbee in the park."], model, 0)
    assert spans[0].ids[spans[0].start - 1] == spans[0].ids[-1] == model.eos_token_id


CRITICS: list[list[tuple[str, Any]]] = [
    [], [("critic.kind", "value_head")], [("lora.rank", 2), ("critic.kind", "lora")],
    [("lora.rank", 2), ("critic.kind", "value_head")],
]  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("algorithm", ["ppo", "d2lols"])
@pytest.mark.parametrize("critic", CRITICS)
def test_an_encoder_decoder_learns_with_every_kind_of_critic(
    algorithm: str, critic: list[tuple[str, Any]], t5_stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stages, "TOKENIZER_TEXTS", 10)
    few = SupervisedConfig(steps=2, batch_size=2)
    config = Config(
        task=task_config(data(tmp_path)), pretrain=few, sft=few,
        reward=RewardConfig(path="length_penalty", options={"length_penalty": {"maximum": 1}}),
        model=ModelConfig(architecture="t5", layers=1, width=16, heads=2, max_length=64, vocabulary=300),
        ppo=PPOConfig(iterations=1, completions_per_iteration=4, minibatch_size=2, epochs=1),
    )  # fmt: skip
    config = override(config, [("algorithm.name", algorithm), *critic])
    trainer = Trainer(prepare(config, t5_stages, lambda line: None))
    metrics, _ = trainer.step(0)
    assert math.isfinite(metrics["policy_loss"])
    assert metrics["critic_grad_norm" if not critic or critic[-1][1] != "value_head" else "policy_grad_norm"] > 0
    assert math.isfinite(metrics["value_loss"])


def task(**values: Any) -> Task:
    prompts = [commongen._prompt(row["concepts"], row["targets"]) for row in ROWS]
    return Task("commongen", prompts, prompts, prompts, **values)


def test_rewards_are_added_with_their_weights_and_each_is_known():
    weights = {"length_penalty": 0.5, "repetition_penalty": 2.0}
    config = RewardConfig(weights=weights, options={"length_penalty": {"maximum": 2}, "repetition_penalty": {"order": 1}})
    reward = build_reward(config, task(), {})
    assert isinstance(reward, WeightedSum)
    texts = ["a b c d", "a a", ""]
    first, second = score_components(reward, [(task().train, texts), (task().train[:1], ["a a"])])
    assert first[1] == {"length_penalty": [-2.0, 0.0, 0.0], "repetition_penalty": [0.0, -0.5, 0.0]}
    assert first[0] == reward(task().train, texts) == [-1.0, -1.0, 0.0]
    assert second == ([-1.0], {"length_penalty": [0.0], "repetition_penalty": [-0.5]})
    (alone,) = score_components(lambda prompts, texts: [1.0] * len(texts), [(task().train, ["a"] * 3)])
    assert alone == ([1.0] * 3, {})


def test_the_terms_of_a_sum_within_a_sum_are_known_too():
    inner = TermSum(
        {"one": (1.0, lambda prompts, texts: [1.0] * len(texts)), "two": (0.5, lambda prompts, texts: [4.0] * len(texts))}
    )
    reward = WeightedSum({"both": (2.0, inner), "three": (1.0, lambda prompts, texts: [0.25] * len(texts))})
    ((values, parts),) = score_components(reward, [(task().train[:1], ["a"])])
    assert values == reward(task().train[:1], ["a"]) == [6.25]
    assert parts == {"both": [3.0], "both/one": [1.0], "both/two": [4.0], "three": [0.25]}


def test_what_reads_with_the_policys_weights_is_asked_first_and_the_rest_when_they_are_free(monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []

    def term(name: str) -> Any:
        def reward(prompts: Any, texts: Any) -> list[float]:
            events.append(name)
            return [1.0] * len(texts)

        reward.shares = name.startswith("own")  # pyright: ignore[reportFunctionMemberAccess]
        return reward

    monkeypatch.setattr("rlgf.rewards.weighted_sum.uses_policy_weights", lambda reward: getattr(reward, "shares", False))
    batches = [(task().train[:1], ["a"])] * 2
    reward = WeightedSum({name: (1.0, term(name)) for name in ("slow", "own", "slower")})
    score_components(reward, batches, lambda: events.append("free"))
    assert events[:3] == ["own", "own", "free"]
    assert [event for event in events if event != "free"][2:] == ["slow", "slow", "slower", "slower"]
    events.clear()
    score_components(term("own"), batches, lambda: events.append("free"))
    assert events == ["own", "own", "free"]
    events.clear()
    score_components(term("slow"), batches, lambda: events.append("free"))
    assert events[0] == "free"


def test_a_text_metric_that_there_is_not_is_refused():
    with pytest.raises(INPUT_ERRORS, match="unknown reward 'spidr': did you mean 'spider'"):
        build_reward(RewardConfig(path="spidr"), task(), {})
    with pytest.raises(INPUT_ERRORS, match=r"length_penalty.*maximum"):
        build_reward(RewardConfig(path="length_penalty"), task(), {})


@pytest.mark.parametrize(
    ("prompt", "metrics", "words"),
    [
        (
            Prompt("no one answers"),
            ("distinct_1", "rouge1", "bleu_4"),
            "bleu_4, rouge1, but the prompt 'no one answers'",
        ),
        (Prompt("blank", (" ",)), ("rouge1",), "has no reference"),
        (Prompt("none", ("a",)), ("concept_coverage",), r"column 'concepts' of the prompt 'none'.*None holds no concepts"),
        (Prompt("empty", columns={"concepts": []}), ("concept_coverage",), "holds no concepts"),
        (Prompt("numbers", columns={"concepts": [1]}), ("concept_coverage",), "holds something else"),
    ],
)
def test_text_metrics_that_prompts_are_not_made_for_are_refused(prompt: Prompt, metrics: tuple[str, ...], words: str):
    with pytest.raises(INPUT_ERRORS, match=words):
        check_text_metrics(EvaluationConfig(metrics=metrics), [prompt])
    check_text_metrics(EvaluationConfig(metrics=("distinct_1",)), [prompt])


def test_one_text_is_one_concept_not_its_letters():
    assert concepts_in("ski lift") == ("ski lift",)
    assert concepts_in(["ski", "lift"]) == ("ski", "lift")


def test_options_of_a_final_evaluations_text_metrics():
    prompts, texts = [Prompt("", ("dogs run",))], ["dog running"]
    judges = EvaluationContext(task(), lambda p, t: [0.0] * len(t), None, None, None)
    found = [
        text_metrics(replace(judges, final=EvaluationConfig(metrics=("rouge1",), metric_options=options)), prompts, texts)
        for options in ({}, {"stemming": True})
    ]
    assert found == [{"rouge1": 0.0}, {"rouge1": 1.0}]
    with pytest.raises(INPUT_ERRORS, match=r"did you mean 'evaluation\.metric_options\.stemming'"):
        check_text_metrics(EvaluationConfig(metrics=("rouge1",), metric_options={"steming": True}), prompts)
    with pytest.raises(INPUT_ERRORS, match=r"evaluation\.metric_options\.stemming is 'often', but must be true or false"):
        check_text_metrics(EvaluationConfig(metrics=("rouge1",), metric_options={"stemming": "often"}), prompts)


def test_weights_and_options_that_no_reward_can_have_are_refused():
    with pytest.raises(INPUT_ERRORS, match=r"reward\.weights\.bleu_4 is nan"):
        override(Config(), [("reward.weights", {"bleu_4": float("nan")})])
    with pytest.raises(INPUT_ERRORS, match=r"unknown reward in reward\.options 'rouge2'"):
        override(Config(), [("reward.path", "rouge1"), ("reward.options", {"rouge2": {"stemming": True}})])


def test_a_final_evaluation_tells_groups_apart():
    final = EvaluationConfig(metrics=("rouge1", "distinct_1"))
    judges = EvaluationContext(task(group=commongen.difficulty), lambda p, t: [0.0] * len(t), None, None, None, final)
    texts = ["A dog catches a frisbee.", "A man", "Nothing here"]
    found = text_metrics(judges, judges.task.test, texts)
    assert found["rouge1_hard"] == pytest.approx(2 * (1 * 2 / 9) / (1 + 2 / 9))  # two of nine words, both right
    assert found["rouge1_easy"] == pytest.approx((1 + 0) / 2)
    assert found["rouge1"] == pytest.approx((2 * found["rouge1_easy"] + found["rouge1_hard"]) / 3)
    assert "distinct_1_easy" not in found


def test_tables_have_the_fields_scales_and_a_part_for_each_split():
    row = {
        "key": "ppo", "title": "PPO", "sampling": "greedy", "completions_used": 10,
        "metrics": {"bleu_4": [0.17, 0.2], "cider_d": [1.691, 1.691], "cider_d_hard": [1.0, 1.0], "completions": [3.0] * 2},
        "splits": {
            "validation": {"cider_d": [1.0, 1.2], "cider_d_easy": [2, 2], "cider_d_hard": [0.5, 0.5], "completions": [2.0] * 2}
        },
    }  # fmt: skip
    names = ("processor", "cpu_capability", "threads", "device", "python", "torch", "transformers", "rlgf")
    versions = dict.fromkeys(names, "-")
    results = {"recipe": "r", "seeds": [0, 1], "rows": [row], "machine": versions}
    assert columns_of(results) == ["bleu_4", "cider_d"]  # one group alone is the whole split
    assert columns_of(results, "validation") == ["cider_d", "cider_d_easy", "cider_d_hard"]
    text = markdown(results)
    assert "| PPO | 18.50 ± 1.50 | 16.91 ± 0.00 | 10 |" in text
    assert "| PPO | 11.00 ± 1.00 | 20.00 ± 0.00 | 5.00 ± 0.00 | 10 |" in text
    assert "3 prompts of test and 2 prompts of validation" in text


def test_the_recipe_is_complete():
    config = recipe("commongen-small")
    assert override(config, [("reward.weights", {"cider_d": 1.0})]).reward.weights == {"cider_d": 1.0}
    assert config.evaluation.sampling is not None
    assert config.evaluation.sampling.num_beams == 5
