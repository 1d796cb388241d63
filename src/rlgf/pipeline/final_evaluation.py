"""The final evaluation of a run and of its baselines."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from rlgf.algorithms.guided import guide_only
from rlgf.algorithms.registry import ALGORITHMS
from rlgf.config.schema import TrainerConfig
from rlgf.config.sections import EvaluationConfig, RewardConfig
from rlgf.config.specs import GuideKind
from rlgf.errors import ConfigError, TrainingError
from rlgf.evaluation.best_of_n import evaluate_best_of
from rlgf.evaluation.evaluate import EvaluationContext, check_text_metrics, evaluate_guide, evaluate_policy, score_alone
from rlgf.generation.decoder import LocalSampler
from rlgf.guides.local import ModelGuide
from rlgf.pipeline.build_models import load_pre_sft_model
from rlgf.pipeline.resolve import BasePlan, PolicyPlan, ResolvedRun
from rlgf.pipeline.stage_cache import StageCache
from rlgf.rewards.build import check_reward_columns
from rlgf.rl.experience import ForwardConfig
from rlgf.rl.rollout import RolloutConfig
from rlgf.rl.tensors import Rollout
from rlgf.runs.directory import RunDirectory
from rlgf.runs.machine import describe_machine
from rlgf.runs.recorder import evaluation_rows
from rlgf.tasks.base import Task
from rlgf.trainer import Components, Trainer
from rlgf.types import Prompt, SamplingParams
from rlgf.untrusted_text import as_file_name

Evaluated = tuple[dict[str, float], Rollout, list[float]]  # metrics, rollout, scores
START = "start"  # the row of the starting model where this run did no SFT
NOT_ASKED_AGAIN = (GuideKind.SERVER, GuideKind.HUMAN)  # guides whose answers cost money or time
EXAMPLES = 8  # completions of the test split stored in the results


def examples(rollout: Rollout, scores: Sequence[float]) -> list[dict[str, Any]]:
    """Return the first completions of a final evaluation, as stored in the results."""
    shown = zip(rollout.prompts[:EXAMPLES], rollout.completions, scores)
    return [{"prompt": prompt.text, "text": text, "score": value} for prompt, text, value in shown]


def final_results(trainer: Trainer, directory: RunDirectory, run: ResolvedRun, with_baselines: bool = True) -> dict[str, Any]:
    """Return the final evaluation on the test split and the task's extra splits.

    The result also has the rewards of the starting model and the guide (`with_baselines`), and the
    run's settings, time and machine. Completions are written to `evaluation[-SPLIT].jsonl`.
    """
    config, codec = trainer.config, trainer.components.models.policy.codec
    context = dataclasses.replace(trainer.evaluation_context, final=config.evaluation, judge=trainer.components.judge)
    found: dict[str, dict[str, float]] = {}
    shown: list[dict[str, Any]] = []
    splits = final_prompts(trainer.components.task, config.evaluation)
    for split, prompts in splits.items():
        found[split], rollout, scores = trainer.evaluate(prompts, final=True)
        path = directory.folder / ("evaluation.jsonl" if split == "test" else f"evaluation-{as_file_name(split)}.jsonl")
        path.unlink(missing_ok=True)
        directory.log(path.name, evaluation_rows(rollout, scores, config.ppo.iterations, codec))
        shown = shown or examples(rollout, scores)
    return {
        "algorithm": run.algorithm.name,
        "title": run.algorithm.title,
        "recipe": run.recipe,
        "seed": config.seed,
        "completions_used": config.ppo.iterations * config.ppo.completions_per_iteration + run.distill.config.num_completions,
        "sampling": (config.evaluation.sampling or config.sampling).describe(),
        **as_results(found),
        **({"baselines": score_baselines(trainer, run, splits["test"])} if with_baselines else {}),
        "examples": shown,
        **extra_results(config, run.policy.base, trainer.rollout_config, splits["test"], context),
        "token_budget": trainer.forward_config.token_budget,
        "training_seconds": sum(row["seconds"] for row in directory.read_metrics()),
        "machine": describe_machine(config.runtime.device),
    }


def score_baselines(trainer: Trainer, run: ResolvedRun, prompts: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
    """Return the rewards of the starting model and the guide on the evaluation's prompts.

    A guide on a server and a person are not asked again; a guide that fails is left out.
    """
    config, parts = trainer.config, trainer.components
    reference, found = parts.models.reference, dict[str, dict[str, Any]]()
    sampling, seed = config.evaluation.sampling or config.sampling, config.evaluation.seed
    settings = dataclasses.replace(trainer.rollout_config, sampling=sampling)
    if "sft" in config.evaluation.baselines:
        start = dataclasses.replace(settings, policy=reference, sampler=LocalSampler(reference, config.runtime.precision))
        metrics = score_alone(start, ALGORITHMS["ppo"]().build(), prompts, trainer.evaluation_context, seed)
        found["sft"] = {"title": "SFT" if run.policy.has_sft else START, **metrics}
    if "guide" in config.evaluation.baselines and parts.guide is not None and run.guide.spec.kind not in NOT_ASKED_AGAIN:
        with suppress(TrainingError):
            metrics = score_alone(settings, guide_only(), prompts, trainer.evaluation_context, seed)
            found["guide"] = {"title": "guide", **metrics}
    return found


def final_prompts(task: Task, evaluation: EvaluationConfig) -> dict[str, Sequence[Prompt]]:
    """Return the prompts of the final evaluation for each split.

    Splits are 'test' and the task's `extra_test_splits`.
    """
    splits = {"test": task.test, **task.extra_test_splits}
    return {split: prompts[: evaluation.final_prompts] for split, prompts in splits.items()}


def check_final_evaluation(task: Task, evaluation: EvaluationConfig, reward: RewardConfig, has_judge: bool) -> None:
    """Raise `ConfigError` if the final evaluation cannot be computed.

    Called before anything is trained.
    """
    splits = final_prompts(task, evaluation)
    check_text_metrics(evaluation, [prompt for part in splits.values() for prompt in part])
    for split, prompts in splits.items():
        check_reward_columns(reward, split, prompts)
        if has_judge and not any(prompt.references for prompt in prompts):
            raise ConfigError(
                f"the judge compares completions with references, and no {split} prompt of task '{task.name}' has one: leave "
                "out --judge, or give held-out prompts references."
            )


def as_results(found: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the metrics of all splits as stored in `results.json`.

    'evaluation' has those of the test split, 'evaluations' those of other splits, if any.
    """
    others = {split: metrics for split, metrics in found.items() if split != "test"}
    return {"evaluation": found["test"], **({"evaluations": others} if others else {})}


def extra_results(
    config: TrainerConfig, base: BasePlan, rollout_config: RolloutConfig, prompts: Sequence[Prompt],
    context: EvaluationContext,
) -> dict[str, Any]:  # fmt: skip
    """Return the judge's name, the output-perplexity model and best-of-n metrics.

    Each is included only if it is configured.
    """
    found: dict[str, Any] = {"judge": context.judge.name} if context.judge else {}
    if context.pre_sft_model is not None:
        found["output_perplexity_model"] = base.shape.path or "a model trained here on the task's raw text"
    samples = config.evaluation.best_of
    if samples:
        sampling = best_of_n_sampling(config)
        metrics, _, _ = evaluate_best_of(
            dataclasses.replace(rollout_config, sampling=sampling), prompts, context, samples, config.evaluation.seed
        )
        found["best_of"] = {"samples": samples, "sampling": sampling.describe(), "evaluation": metrics}
    return found


def best_of_n_sampling(config: TrainerConfig) -> SamplingParams:
    """Return the sampling parameters of best-of-n.

    They are those of evaluations, unless these always return the same completion (greedy, beams).
    """
    sampling = config.evaluation.sampling
    return config.sampling if sampling is None or sampling.greedy or sampling.num_beams > 1 else sampling


def evaluate_baselines(parts: Components, policy: PolicyPlan, cache: StageCache) -> dict[str, dict[str, Any]]:
    """Return the final evaluations of `evaluation.baselines`, on the prompts of every run."""
    config, seed = parts.config, parts.config.evaluation.seed
    precision = config.runtime.precision
    forward_config = ForwardConfig(config.sampling, config.ppo, config.runtime.micro_batch_tokens, precision)
    context = EvaluationContext(
        parts.task, parts.reward, parts.models.reference, parts.pre_sft_model, forward_config, config.evaluation, parts.judge
    )
    sampling = config.evaluation.sampling or config.sampling
    rollout_config = RolloutConfig(
        parts.models.reference, LocalSampler(parts.models.reference, precision), parts.guide, sampling,
        config.task.max_new_tokens, config.task.min_new_tokens, config.seed,
    )  # fmt: skip

    def row(title: str, how: str, evaluate: Callable[[Sequence[Prompt]], Evaluated]) -> dict[str, Any]:
        found = {split: evaluate(prompts) for split, prompts in final_prompts(parts.task, config.evaluation).items()}
        metrics = as_results({split: measured for split, (measured, _, _) in found.items()})
        return {"title": title, "sampling": how, **metrics, "examples": examples(*found["test"][1:]), "completions_used": 0}

    found: dict[str, dict[str, Any]] = {}
    if "zero_shot" in config.evaluation.baselines:
        base = load_pre_sft_model(policy, parts.models.reference, cache)
        before = dataclasses.replace(rollout_config, policy=base, sampler=LocalSampler(base, precision))
        found["zero_shot"] = row("zero-shot", sampling.describe(), lambda p: evaluate_policy(before, p, context, seed))
    if "sft" in config.evaluation.baselines:
        title = "SFT" if policy.has_sft else START
        found["sft"] = row(title, sampling.describe(), lambda p: evaluate_policy(rollout_config, p, context, seed))
        found["sft"] |= extra_results(
            config, policy.base, rollout_config, final_prompts(parts.task, config.evaluation)["test"], context
        )
    if "guide" in config.evaluation.baselines and parts.guide is not None:
        how = parts.guide.sampling.describe() if isinstance(parts.guide, ModelGuide) else "its own"
        found["guide"] = row("guide", how, lambda p: evaluate_guide(rollout_config, p, context, seed))
    return found
