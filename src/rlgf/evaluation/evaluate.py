"""Evaluation: rewards and metrics of new completions by one origin alone.

It is the same for a policy, the SFT model and a guide.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlgf.algorithms.base import Algorithm
from rlgf.algorithms.guided import PPO, guide_only
from rlgf.config.base import read_options
from rlgf.config.sections import EvaluationConfig
from rlgf.errors import ConfigError, TrainingError, user_code
from rlgf.evaluation.intervals import FEW
from rlgf.evaluation.model_metrics import kl_to_reference, perplexity, token_perplexity
from rlgf.evaluation.win_rate import PairJudge, win_rate
from rlgf.models.language_model import LanguageModel
from rlgf.randomness import Purpose
from rlgf.rewards.base import continuation_only, mean_of, score
from rlgf.rewards.reward_model import RewardModel
from rlgf.rl.experience import ForwardConfig
from rlgf.rl.rollout import RolloutConfig, collect_rollout
from rlgf.rl.tensors import Rollout
from rlgf.tasks.base import Task
from rlgf.text_metrics.as_rewards import reference_texts, strip_reply_prefixes
from rlgf.text_metrics.concepts import concepts_in
from rlgf.text_metrics.diversity import distinct
from rlgf.text_metrics.rouge import KEYS as ROUGE
from rlgf.text_metrics.rouge import count_lost, lost_sentence
from rlgf.text_metrics.score import Line, Options, build_scorers, reference_metrics, resolve_metric_names
from rlgf.text_metrics.score import score as score_lines
from rlgf.types import Prompt, RewardFunction


@dataclass(frozen=True)
class EvaluationContext:
    """The task, reward, models and judge of an evaluation."""

    task: Task
    reward: RewardFunction
    reference: LanguageModel
    pre_sft_model: LanguageModel | None  # for output perplexity
    forward_config: ForwardConfig
    final: EvaluationConfig | None = None  # adds text metrics and sampling; None: not a final one
    judge: PairJudge | None = None  # compares completions with references, if final


def evaluate_policy(
    rollout_config: RolloutConfig, prompts: Sequence[Prompt], context: EvaluationContext, seed: int
) -> tuple[dict[str, float], Rollout, list[float]]:
    """Evaluate completions that the policy samples alone.

    Returns the metrics (keys: docs/metrics.md), the rollout and the scores of its completions.
    """
    rollout_config = dataclasses.replace(rollout_config, seed=seed, token_purpose=Purpose.EVALUATION_TOKEN)
    rollout, metrics, scores = _collect_and_score(rollout_config, PPO().build(), prompts, context)
    metrics["kl"], metrics["kl_k1"] = kl_to_reference(rollout, rollout_config.policy, context.reference, context.forward_config)
    metrics["perplexity"] = perplexity(rollout_config.policy, prompts, rollout_config.max_new_tokens, context.forward_config)
    if context.final is not None and context.final.also_sampled:
        sampled_config = dataclasses.replace(rollout_config, sampling=context.forward_config.sampling)
        sampled = collect_rollout(sampled_config, PPO().build(), PPO().build().schedule(0, 0.0), prompts, range(len(prompts)))
        values = torch.tensor(score(context.reward, sampled.prompts, sampled.completions), dtype=torch.float64)
        metrics |= {"score_sampled": float(values.mean()), "score_sampled_standard_error": standard_error(values)}
    return metrics, rollout, scores


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of `values`."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def evaluate_guide(
    rollout_config: RolloutConfig, prompts: Sequence[Prompt], context: EvaluationContext, seed: int
) -> tuple[dict[str, float], Rollout, list[float]]:
    """Evaluate completions of a guide alone, as `evaluate_policy` does.

    A guide is a black box: the metrics have no KL and no perplexity of its own.
    """
    rollout, metrics, scores = _collect_and_score(
        dataclasses.replace(rollout_config, seed=seed), guide_only(), prompts, context
    )
    return metrics, rollout, scores


def score_alone(
    rollout_config: RolloutConfig, algorithm: Algorithm, prompts: Sequence[Prompt], context: EvaluationContext, seed: int
) -> dict[str, float]:
    """Return the reward of completions by one origin alone, without the other metrics."""
    rollout_config = dataclasses.replace(rollout_config, seed=seed, token_purpose=Purpose.EVALUATION_TOKEN)
    rollout = collect_rollout(rollout_config, algorithm, algorithm.schedule(0, 0.0), prompts, range(len(prompts)))
    values = torch.tensor(score(context.reward, rollout.prompts, rollout.completions), dtype=torch.float64)
    metrics = {
        "score": float(values.mean()), "score_standard_error": standard_error(values), "completions": float(len(values)),
    }  # fmt: skip
    threshold = context.task.pass_threshold
    return metrics if threshold is None else {**metrics, "pass_rate": float((values >= threshold).double().mean())}


def _collect_and_score(
    rollout_config: RolloutConfig, algorithm: Algorithm, prompts: Sequence[Prompt], context: EvaluationContext
) -> tuple[Rollout, dict[str, float], list[float]]:
    rollout = collect_rollout(rollout_config, algorithm, algorithm.schedule(0, 0.0), prompts, range(len(prompts)))
    scores = score(context.reward, rollout.prompts, rollout.completions)
    return rollout, compute_metrics(rollout, scores, context), scores


def compute_metrics(rollout: Rollout, scores: Sequence[float], context: EvaluationContext) -> dict[str, float]:
    """Compute the metrics of scored completions of any origin."""
    prompts = rollout.prompts  # excludes those of failed guide rows
    values = torch.tensor(scores, dtype=torch.float64)
    metrics = {
        "score": float(values.mean()),
        "score_standard_error": standard_error(values),
        "completion_length": float(rollout.completion_mask.sum(1).double().mean()),
        "ended_with_eos": float(rollout.ended_with_eos.double().mean()),
        "distinct_2": distinct(strip_reply_prefixes(prompts, rollout.completions)),
        "completions": float(len(scores)),
    }
    if context.task.pass_threshold is not None:
        metrics["pass_rate"] = float((values >= context.task.pass_threshold).double().mean())
    continuation_reward = continuation_only(context.reward)
    if continuation_reward is not None:
        metrics["score_continuation"] = float(torch.tensor(score(continuation_reward, prompts, rollout.completions)).mean())
    if isinstance(context.reward, RewardModel):  # its scores have no absolute zero
        metrics["score_minus_reference"] = mean_reward_gain(context.reward, prompts, scores)
    metrics |= text_metrics(context, prompts, rollout.completions)
    if context.judge is not None:
        metrics |= win_rate(context.judge, prompts, rollout.completions)
    if context.pre_sft_model is not None:
        metrics["output_perplexity"] = token_perplexity(
            context.pre_sft_model, rollout.ids, rollout.prompt_lengths, rollout.completion_mask, context.forward_config
        )
    return metrics


def mean_reward_gain(reward: RewardFunction, prompts: Sequence[Prompt], scores: Sequence[float]) -> float:
    """Return the mean difference between completions' and first references' scores.

    Prompts without references are ignored; with no references the mean is nan.
    """
    rows = [(prompt, value) for prompt, value in zip(prompts, scores) if prompt.references]
    references = score(reward, [prompt for prompt, _ in rows], [prompt.references[0] for prompt, _ in rows])
    return mean_of([value - base for (_, value), base in zip(rows, references)]) if rows else math.nan


def text_metrics_of(config: EvaluationConfig) -> tuple[list[str], Options]:
    """Return the keys of a config's text metrics, and their options.

    Raises `ConfigError` for unknown metrics and options.
    """
    options = read_options(config.metric_options, Options, "text metrics", "evaluation.metric_options.")
    return resolve_metric_names(",".join(config.metrics)), options


def check_text_metrics(config: EvaluationConfig, prompts: Sequence[Prompt]) -> None:
    """Raise, before any training, for text metrics that cannot be computed.

    Either these prompts lack what a metric needs, or it is unavailable.
    """
    if not config.metrics:
        return
    keys, options = text_metrics_of(config)
    groups = [_line(prompt, "", keys).references for prompt in prompts]
    build_scorers(keys, options)
    lost = count_lost([""] * len(groups), groups, options.rouge_tokenizer) if set(keys).intersection(ROUGE) else 0
    if lost:
        fix = "set evaluation.metric_options.rouge_tokenizer=unicode, or leave ROUGE out of evaluation.metrics"
        raise ConfigError(lost_sentence(lost, len(groups), fix))


def _line(prompt: Prompt, text: str, keys: Sequence[str]) -> Line:
    """Return a text as input of `rlgf score`, with the prompt's references and concepts."""
    text, references = prompt.strip_reply_prefix(text), tuple(reference_texts(prompt))
    needing_references = reference_metrics(keys)
    if needing_references and not references:
        raise ConfigError(
            f"evaluation.metrics has {', '.join(needing_references)}, but the prompt {prompt.text[:60]!r} has no "
            "reference to compare a "
            "completion with: leave these out, or give every held-out prompt references."
        )
    if "concept_coverage" not in keys:
        return Line(text, references)
    try:
        return Line(text, references, concepts_in(prompt.columns.get("concepts")))
    except ValueError as error:
        raise ConfigError(
            f"evaluation.metrics has concept_coverage, but column 'concepts' of the prompt {prompt.text[:60]!r} does not fit "
            f"({error}): leave it out, or fix the column."
        ) from None


def text_metrics(context: EvaluationContext, prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, float]:
    """Compute the text metrics of all completions, and their means per group.

    Groups are those of the task, if it has any. The scale is coco-caption's; keys are those of
    docs/scoring.md, followed by `_GROUP` for a group.
    """
    if context.final is None or not context.final.metrics:
        return {}
    keys, options = text_metrics_of(context.final)
    line_scores = score_lines([_line(prompt, text, keys) for prompt, text in zip(prompts, texts)], keys, options)
    metrics = {key: float("nan") if value is None else value for key, value in line_scores.corpus.items()}
    if 1 < len(prompts) < FEW:
        errors = {key: standard_error(torch.tensor(v, dtype=torch.float64)) for key, v in line_scores.per_line.items()}
        metrics |= {f"{key}_standard_error": error for key, error in errors.items()}
    if context.task.group is not None:
        with user_code("the task's grouping of prompts failed", TrainingError):
            groups = [str(context.task.group(prompt)) for prompt in prompts]
        for name in sorted(set(groups)):
            for key, values in line_scores.per_line.items():
                metrics[f"{key}_{name}"] = mean_of([v for v, group in zip(values, groups) if group == name])
    return metrics
