"""Evaluation: fresh texts by one author alone, scored and measured; the same for a policy, the SFT model and a guide."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlgf.algorithms import Algorithm, guide_alone, ppo
from rlgf.config import EvaluationConfig, read_options
from rlgf.errors import UserError
from rlgf.experience import Reading
from rlgf.judge import PairJudge, win_rate
from rlgf.metrics import kl_to_reference, perplexity, token_perplexity
from rlgf.models import LanguageModel
from rlgf.randomness import Purpose
from rlgf.reward_model import RewardModel
from rlgf.rewards import continuation_only, score
from rlgf.rollout import Writing, collect
from rlgf.scoring.concepts import concepts_in
from rlgf.scoring.diversity import distinct
from rlgf.scoring.functions import said, said_references
from rlgf.scoring.score import Line, Options, choose, read_references, tools
from rlgf.scoring.score import score as score_lines
from rlgf.tasks import Task, TextFunction
from rlgf.types import Prompt, Rollout


@dataclass(frozen=True)
class Judges:
    """Everything an evaluation is measured with."""

    task: Task
    reward: TextFunction
    reference: LanguageModel
    general: LanguageModel | None  # for output-perplexity: the model before SFT
    reading: Reading
    final: EvaluationConfig | None = None  # what a final evaluation adds: text metrics, drawn texts; None: it is not one
    judge: PairJudge | None = None  # who compares texts with references, in final evaluations


def evaluate_policy(
    writing: Writing, prompts: Sequence[Prompt], judges: Judges, seed: int
) -> tuple[dict[str, float], Rollout, list[float]]:
    """Metrics of texts that the policy writes alone (keys: docs/metrics.md), the texts, and their scores."""
    writing = dataclasses.replace(writing, seed=seed, token_purpose=Purpose.EVALUATION_TOKEN)
    rollout, metrics, scores = _written(writing, ppo(), prompts, judges)
    metrics["kl"], metrics["kl_k1"] = kl_to_reference(rollout, writing.policy, judges.reference, judges.reading)
    metrics["perplexity"] = perplexity(writing.policy, prompts, writing.horizon, judges.reading)
    if judges.final is not None and judges.final.drawn:
        drawing = dataclasses.replace(writing, decoding=judges.reading.decoding)
        drawn = collect(drawing, ppo(), ppo().plan(0, 0.0), prompts, range(len(prompts)))
        values = torch.tensor(score(judges.reward, drawn.prompts, drawn.texts), dtype=torch.float64)
        metrics |= {"score_drawn": float(values.mean()), "score_drawn_standard_error": standard_error(values)}
    return metrics, rollout, scores


def standard_error(values: Tensor) -> float:
    """That of the mean of `values`."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def evaluate_guide(
    writing: Writing, prompts: Sequence[Prompt], judges: Judges, seed: int
) -> tuple[dict[str, float], Rollout, list[float]]:
    """The same of a guide, which is a black box: no KL and no perplexity of its own."""
    rollout, metrics, scores = _written(dataclasses.replace(writing, seed=seed), guide_alone(), prompts, judges)
    return metrics, rollout, scores


def _written(
    writing: Writing, algorithm: Algorithm, prompts: Sequence[Prompt], judges: Judges
) -> tuple[Rollout, dict[str, float], list[float]]:
    rollout = collect(writing, algorithm, algorithm.plan(0, 0.0), prompts, range(len(prompts)))
    scores = score(judges.reward, rollout.prompts, rollout.texts)
    return rollout, measured(rollout, scores, judges), scores


def measured(rollout: Rollout, scores: Sequence[float], judges: Judges) -> dict[str, float]:
    """Metrics of texts that are written and scored, whoever wrote them."""
    prompts = rollout.prompts  # without those of texts that the guide gave up
    values = torch.tensor(scores, dtype=torch.float64)
    metrics = {
        "score": float(values.mean()),
        "score_standard_error": standard_error(values),
        "length": float(rollout.written.sum(1).double().mean()),
        "finished": float(rollout.finished.double().mean()),
        "distinct_2": distinct(said(prompts, rollout.texts)),
        "texts": float(len(scores)),
    }
    if judges.task.pass_mark is not None:
        metrics["pass_rate"] = float((values >= judges.task.pass_mark).double().mean())
    alone = continuation_only(judges.reward)
    if alone is not None:
        metrics["score_continuation"] = float(torch.tensor(score(alone, prompts, rollout.texts)).mean())
    if isinstance(judges.reward, RewardModel):  # whose scores have no zero of their own
        metrics["score_minus_reference"] = above_references(judges.reward, prompts, scores)
    metrics |= text_metrics(judges, prompts, rollout.texts)
    if judges.judge is not None:
        metrics |= win_rate(judges.judge, prompts, rollout.texts)
    if judges.general is not None:
        metrics["output_perplexity"] = token_perplexity(
            judges.general, rollout.ids, rollout.prompt_lengths, rollout.written, judges.reading
        )
    return metrics


def above_references(reward: TextFunction, prompts: Sequence[Prompt], scores: Sequence[float]) -> float:
    """The mean of how much higher texts score than their prompts' first references; not a number where there are none."""
    rows = [(prompt, value) for prompt, value in zip(prompts, scores) if prompt.references]
    references = score(reward, [prompt for prompt, _ in rows], [prompt.references[0] for prompt, _ in rows])
    return statistics.fmean(value - base for (_, value), base in zip(rows, references)) if rows else math.nan


def text_metrics_of(config: EvaluationConfig) -> tuple[list[str], Options]:
    """The keys of the text metrics that a config asks for, and their options; `UserError` for what there is not."""
    options = read_options(config.metric_options, Options, "text metrics", "evaluation.metric_options.")
    return choose(",".join(config.metrics)), options


def check_text_metrics(config: EvaluationConfig, prompts: Sequence[Prompt]) -> None:
    """Refuse, before anything is trained, text metrics that cannot be had of texts for these prompts, or at all."""
    if not config.metrics:
        return
    keys, options = text_metrics_of(config)
    for prompt in prompts:
        _line(prompt, "", keys)
    tools(keys, options)


def _line(prompt: Prompt, text: str, keys: Sequence[str]) -> Line:
    """A text as `rlgf score` takes it, with what these metrics read of its prompt."""
    text, references = prompt.said(text), tuple(said_references(prompt))
    comparing = read_references(keys)
    if comparing and not references:
        raise UserError(
            f"evaluation.metrics has {', '.join(comparing)}, but the prompt {prompt.text[:60]!r} has no reference to compare a "
            "text with: leave these out, or give every held-out prompt references."
        )
    if "concept_coverage" not in keys:
        return Line(text, references)
    try:
        return Line(text, references, concepts_in(prompt.columns.get("concepts")))
    except ValueError as error:
        raise UserError(
            f"evaluation.metrics has concept_coverage, but column 'concepts' of the prompt {prompt.text[:60]!r} is not for it "
            f"({error}): leave it out, or mend the column."
        ) from None


def text_metrics(judges: Judges, prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, float]:
    """The judges' text metrics of all texts together, and, where the task tells prompts apart, the mean for each group.

    On coco-caption's scale; keys as in docs/scoring.md, with `_GROUP` behind them for a group.
    """
    if judges.final is None or not judges.final.metrics:
        return {}
    keys, options = text_metrics_of(judges.final)
    found = score_lines([_line(prompt, text, keys) for prompt, text in zip(prompts, texts)], keys, options)
    metrics = {key: float("nan") if value is None else value for key, value in found.corpus.items()}
    if judges.task.group is not None:
        groups = [judges.task.group(prompt) for prompt in prompts]
        for name in sorted(set(groups)):
            for key, values in found.per_line.items():
                metrics[f"{key}_{name}"] = statistics.fmean(v for v, group in zip(values, groups) if group == name)
    return metrics
