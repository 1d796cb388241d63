"""Model metrics against reference values and enumeration; checks of rewards and guides."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlgf.config.sections import EvaluationConfig, PPOConfig, TaskConfig
from rlgf.errors import TrainingError
from rlgf.evaluation.evaluate import EvaluationContext, evaluate_guide, evaluate_policy
from rlgf.evaluation.model_metrics import kl_to_reference, perplexity, token_perplexity
from rlgf.generation.decoder import LocalSampler
from rlgf.guides import base
from rlgf.guides.base import Completion, CompletionRequest
from rlgf.guides.local import FunctionGuide, ModelGuide
from rlgf.models.forward import pad_rows
from rlgf.models.language_model import LanguageModel
from rlgf.rewards.base import continuation_only, score_full_text
from rlgf.rewards.signatures import bind_columns
from rlgf.rl.experience import ForwardConfig
from rlgf.rl.rollout import RolloutConfig
from rlgf.tasks import toy_reviews
from rlgf.tasks.base import Task
from rlgf.types import Prompt, SamplingParams

READING = ForwardConfig(SamplingParams(), PPOConfig(), 64)


def test_perplexity_is_that_of_the_models_own_loss(tiny_model: LanguageModel):
    plot = Prompt("review of : plot =>", (" great plot", " dull dull plot"))
    prompts = [plot, Prompt("review of : cast plot =>", (" dull cast fresh plot",))]
    total, count = 0.0, 0
    for asked, reference in [(prompt, reference) for prompt in prompts for reference in prompt.references]:
        before = tiny_model.tokenizer(asked.text)["input_ids"]
        after = [*tiny_model.tokenizer(reference)["input_ids"], tiny_model.eos_token_id]
        labels = torch.tensor([[-100] * len(before) + after])
        loss = tiny_model.model(input_ids=torch.tensor([before + after]), labels=labels).loss
        total, count = total + float(loss) * len(after), count + len(after)
    assert perplexity(tiny_model, prompts, 16, READING) == pytest.approx(math.exp(total / count), rel=1e-5)
    assert math.isnan(perplexity(tiny_model, [Prompt("review")], 16, READING))
    assert math.isnan(
        token_perplexity(tiny_model, pad_rows([[1, 2]]), torch.tensor([0]), torch.zeros((1, 2), dtype=torch.bool), READING)
    )


def task(tiny: LanguageModel) -> Task:
    options = {"slots": 2, "train_prompts": 4, "held_out_prompts": 12}
    return toy_reviews.build(TaskConfig(max_new_tokens=5, options=options), tiny.tokenizer)


def test_exact_kl_is_the_sum_over_states_and_vocabulary(tiny_models: dict[str, LanguageModel]):
    policy, reference = tiny_models["gpt2"], tiny_models["llama"]
    judges = EvaluationContext(task(policy), toy_reviews.reward, reference, None, READING)
    rollout_config = RolloutConfig(policy, LocalSampler(policy), None, SamplingParams(), 5, 0, 0)
    metrics, rollout, scores = evaluate_policy(rollout_config, judges.task.test, judges, 3)
    exact = 0.0
    for row in range(12):
        length, start = int(rollout.lengths[row]), int(rollout.prompt_lengths[row])
        ids = rollout.ids[row : row + 1, :length]
        mine = policy.model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(1)
        theirs = reference.model(input_ids=ids).logits[0, start - 1 : -1].log_softmax(1)
        exact += float((mine.exp() * (mine - theirs)).sum())
    assert metrics["kl"] == pytest.approx(exact / 12, rel=1e-4)
    assert kl_to_reference(rollout, policy, policy, READING) == (0.0, 0.0)
    assert len(scores) == 12
    assert metrics["pass_rate"] == metrics["score"]
    again = evaluate_policy(rollout_config, judges.task.test, judges, 3)[0]
    assert again == metrics


def test_texts_drawn_as_in_training_are_scored_beside_those_that_were_searched_for(tiny_models: dict[str, LanguageModel]):
    policy = tiny_models["gpt2"]

    def letters(prompts: Any, texts: Any) -> list[float]:
        return [float(len(text)) for text in texts]

    judges = EvaluationContext(task(policy), letters, policy, None, READING, EvaluationConfig(also_sampled=True))
    searching, drawing = (
        RolloutConfig(policy, LocalSampler(policy), None, sampling, 5, 0, 0)
        for sampling in (SamplingParams(greedy=True), SamplingParams())
    )
    searched = evaluate_policy(searching, judges.task.test, judges, 3)[0]
    drawn = evaluate_policy(drawing, judges.task.test, replace(judges, final=None), 3)[0]
    assert searched["score_sampled"] == drawn["score"] != searched["score"]
    assert searched["score_sampled_standard_error"] == drawn["score_standard_error"]
    assert "score_sampled" not in drawn


def test_a_guide_is_evaluated_as_a_black_box(tiny_models: dict[str, LanguageModel]):
    policy = tiny_models["gpt2"]
    judges = EvaluationContext(task(policy), toy_reviews.reward, policy, policy, READING)

    def perfect(requests: Any) -> list[str]:
        return [" ".join(f"great {aspect}" for aspect in request.prompt.columns["aspects"]) for request in requests]

    rollout_config = RolloutConfig(policy, LocalSampler(policy), FunctionGuide(perfect), SamplingParams(), 5, 0, 0)
    metrics, _, _ = evaluate_guide(rollout_config, judges.task.test, judges, 0)
    assert metrics["pass_rate"] == 1.0
    assert metrics["ended_with_eos"] == 1.0
    assert metrics["completion_length"] == 5.0  # four words and the end token
    assert "kl" not in metrics
    assert metrics["output_perplexity"] > 1


def test_a_whole_text_reward_reads_the_prompt_and_its_judge_can_read_without():
    def judge(prompts: Any, texts: Any) -> list[float]:
        return [float(len(text)) for text in texts]

    reward = score_full_text(judge)
    assert list(reward([Prompt("abc")], [" de"])) == [6.0]
    alone = continuation_only(reward)
    assert alone is not None
    assert list(alone([Prompt("abc")], [" de"])) == [3.0]
    assert continuation_only(judge) is None


def test_a_reward_is_handed_references_and_columns_where_it_asks_for_them():
    def columns_too(prompts: Any, texts: Any, columns: Any) -> list[float]:
        return [row["count"] for row in columns]

    def all_of_it(prompts: Any, texts: Any, *, references: Any, columns: Any) -> list[float]:
        return [len(group) + row["count"] for group, row in zip(references, columns)]

    prompts = [Prompt("a", ("b", "c"), columns={"count": 1.0}), Prompt("d", columns={"count": 3.0})]
    assert list(bind_columns(columns_too)(prompts, ["", ""])) == [1.0, 3.0]
    assert list(bind_columns(all_of_it)(prompts, ["", ""])) == [3.0, 3.0]
    assert bind_columns(toy_reviews.reward) is toy_reviews.reward


def request(
    prompt: str = "review of : plot =>", prefix: tuple[int, ...] = (), budget: int = 4, index: int = 0
) -> CompletionRequest:
    return CompletionRequest(Prompt(prompt), [3, 4, 5], "", list(prefix), budget, 0, index, 7)


def test_a_model_guides_text_depends_on_seed_trajectory_and_position_alone(tiny_model: LanguageModel):
    guide = ModelGuide(tiny_model, SamplingParams())
    together = guide.complete([request(index=index) for index in range(5)])
    alone = guide.complete([request(index=3)])
    assert together[3] == alone[0]
    first = list(together[3].ids or ())
    rest = guide.complete([request(prefix=tuple(first[:2]), budget=2, index=3)])[0]
    assert list(rest.ids or ()) == first[2:]


@pytest.mark.parametrize(
    "answer", [[Completion(None, True)], [Completion("", True, ["x"])], [3], "text", [Completion("", False)]]
)  # type: ignore[list-item,arg-type]
def test_an_unusable_answer_of_a_guide_is_refused(answer: Any):
    with pytest.raises(TrainingError):
        base.query_guide(FunctionGuide(lambda requests: answer), [request()])
