"""Metrics against other people's numbers and against enumeration; evaluation; rewards and guides at their doors."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlgf import guides
from rlgf.config import EvaluationConfig, PPOConfig, TaskConfig
from rlgf.errors import RunError
from rlgf.evaluate import Judges, evaluate_guide, evaluate_policy
from rlgf.experience import Reading
from rlgf.forward import padded
from rlgf.guides import FunctionGuide, ModelGuide, Request, Text
from rlgf.metrics import kl_to_reference, perplexity, token_perplexity
from rlgf.models import LanguageModel
from rlgf.rewards import continuation_only, whole_text, with_what_it_reads
from rlgf.rollout import Writing
from rlgf.tasks import Task, embedded
from rlgf.types import Decoding, Prompt

READING = Reading(Decoding(), PPOConfig(), 64)


def test_perplexity_is_that_of_the_models_own_loss(tiny_model: LanguageModel):
    plot = Prompt("review of : plot =>", (" great plot", " dull dull plot"))
    prompts = [plot, Prompt("review of : cast plot =>", (" dull cast fresh plot",))]
    total, count = 0.0, 0
    for asked, reference in [(prompt, reference) for prompt in prompts for reference in prompt.references]:
        before = tiny_model.tokenizer(asked.text)["input_ids"]
        after = [*tiny_model.tokenizer(reference)["input_ids"], tiny_model.end_id]
        labels = torch.tensor([[-100] * len(before) + after])
        loss = tiny_model.model(input_ids=torch.tensor([before + after]), labels=labels).loss
        total, count = total + float(loss) * len(after), count + len(after)
    assert perplexity(tiny_model, prompts, 16, READING) == pytest.approx(math.exp(total / count), rel=1e-5)
    assert math.isnan(perplexity(tiny_model, [Prompt("review")], 16, READING))
    assert math.isnan(
        token_perplexity(tiny_model, padded([[1, 2]]), torch.tensor([0]), torch.zeros((1, 2), dtype=torch.bool), READING)
    )


def task(tiny: LanguageModel) -> Task:
    options = {"slots": 2, "train_prompts": 4, "held_out_prompts": 12}
    return embedded.build(TaskConfig(max_new_tokens=5, options=options), tiny.tokenizer)


def test_exact_kl_is_the_sum_over_states_and_vocabulary(tiny_models: dict[str, LanguageModel]):
    policy, reference = tiny_models["gpt2"], tiny_models["llama"]
    judges = Judges(task(policy), embedded.reward, reference, None, READING)
    writing = Writing(policy, None, Decoding(), 5, 0, 0)
    metrics, rollout, scores = evaluate_policy(writing, judges.task.test, judges, 3)
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
    again = evaluate_policy(writing, judges.task.test, judges, 3)[0]
    assert again == metrics


def test_texts_drawn_as_in_training_are_scored_beside_those_that_were_searched_for(tiny_models: dict[str, LanguageModel]):
    policy = tiny_models["gpt2"]

    def letters(prompts: Any, texts: Any) -> list[float]:
        return [float(len(text)) for text in texts]

    judges = Judges(task(policy), letters, policy, None, READING, EvaluationConfig(drawn=True))
    searching, drawing = (Writing(policy, None, decoding, 5, 0, 0) for decoding in (Decoding(greedy=True), Decoding()))
    searched = evaluate_policy(searching, judges.task.test, judges, 3)[0]
    drawn = evaluate_policy(drawing, judges.task.test, replace(judges, final=None), 3)[0]
    assert searched["score_drawn"] == drawn["score"] != searched["score"]
    assert searched["score_drawn_standard_error"] == drawn["score_standard_error"]
    assert "score_drawn" not in drawn


def test_a_guide_is_evaluated_as_a_black_box(tiny_models: dict[str, LanguageModel]):
    policy = tiny_models["gpt2"]
    judges = Judges(task(policy), embedded.reward, policy, policy, READING)

    def perfect(requests: Any) -> list[str]:
        return [" ".join(f"great {aspect}" for aspect in request.prompt.columns["aspects"]) for request in requests]

    writing = Writing(policy, FunctionGuide(perfect), Decoding(), 5, 0, 0)
    metrics, _, _ = evaluate_guide(writing, judges.task.test, judges, 0)
    assert metrics["pass_rate"] == 1.0
    assert metrics["finished"] == 1.0
    assert metrics["length"] == 5.0  # four words and the end token
    assert "kl" not in metrics
    assert metrics["output_perplexity"] > 1


def test_a_whole_text_reward_reads_the_prompt_and_its_judge_can_read_without():
    def judge(prompts: Any, texts: Any) -> list[float]:
        return [float(len(text)) for text in texts]

    reward = whole_text(judge)
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
    assert list(with_what_it_reads(columns_too)(prompts, ["", ""])) == [1.0, 3.0]
    assert list(with_what_it_reads(all_of_it)(prompts, ["", ""])) == [3.0, 3.0]
    assert with_what_it_reads(embedded.reward) is embedded.reward


def request(prompt: str = "review of : plot =>", prefix: tuple[int, ...] = (), budget: int = 4, index: int = 0) -> Request:
    return Request(Prompt(prompt), [3, 4, 5], "", list(prefix), budget, 0, index, 7)


def test_a_model_guides_text_depends_on_seed_trajectory_and_position_alone(tiny_model: LanguageModel):
    guide = ModelGuide(tiny_model, Decoding())
    together = guide.complete([request(index=index) for index in range(5)])
    alone = guide.complete([request(index=3)])
    assert together[3] == alone[0]
    first = list(together[3].ids or ())
    rest = guide.complete([request(prefix=tuple(first[:2]), budget=2, index=3)])[0]
    assert list(rest.ids or ()) == first[2:]


@pytest.mark.parametrize("answer", [[Text(None, True)], [Text("", True, ["x"])], [3], "text", [Text("", False)]])  # type: ignore[list-item,arg-type]
def test_an_unusable_answer_of_a_guide_is_refused(answer: Any):
    with pytest.raises(RunError):
        guides.ask(FunctionGuide(lambda requests: answer), [request()])
