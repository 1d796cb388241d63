"""Preparation of a run's components: all checks, stages and models."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlgf.config.schema import Config
from rlgf.errors import ConfigError
from rlgf.evaluation.chat_judge import probe_judge
from rlgf.guides.base import Guide, TracksUsage
from rlgf.kernels import dispatch
from rlgf.models.loading import load_language_model
from rlgf.pipeline.build_guide import build_external_guide, build_model_guide, guide_examples
from rlgf.pipeline.build_models import build_models, load_pre_sft_model, starting_codec
from rlgf.pipeline.build_rewards import prepare_judge, prepare_reward, shares_policy_weights, train_rewards
from rlgf.pipeline.final_evaluation import check_final_evaluation
from rlgf.pipeline.preflight import (
    check_lengths,
    check_models,
    check_to_train,
    judge_names,
    needs_guide,
    probe_guide,
    training_warnings,
)
from rlgf.pipeline.reward_model_stage import load_pairs
from rlgf.pipeline.stage_cache import Report, no_report
from rlgf.pipeline.stages import distill_stage, sft_stage
from rlgf.rewards.base import probe_reward
from rlgf.rewards.build import check_reward_columns
from rlgf.runs.directory import RunDirectory
from rlgf.supervised.examples import TargetExamples
from rlgf.tasks.base import Task
from rlgf.tasks.registry import task_definition
from rlgf.trainer import Components

NUM_PROBE_PROMPTS = 4  # prompts on which a reward is tested before training


def prepare(config: Config, stages: Path, report: Report = no_report, directory: RunDirectory | None = None) -> Components:
    """Build or reuse every stage and return the components of a trainer.

    Args:
        config: the config of the run.
        stages: the folder in which stages (pretraining, SFT, reward, guide) are kept and found.
        report: called with each line of progress.
        directory: stores the guide's usage in distillation, so that the guide's limits include it.

    Raises:
        ConfigError: the run cannot be trained.
        DataError: the task's data cannot be used.
        TrainingError: the guide, the reward or the judge fails when it is tried.

    Example:
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> components = rlgf.prepare(config, Path("runs/stages"))
        >>> components.algorithm.title, components.task.name
        ('PPO++', 'toy_reviews')
    """
    algorithm = check_to_train(config)
    dispatch.select(config.runtime.kernels)
    for warning in training_warnings(algorithm):
        report(f"warning: {warning}")
    wanted = needs_guide(algorithm) or config.distill.num_completions > 0
    # Fail early: all checks that need no model run before one is trained.
    codec, context = starting_codec(config, stages, report)
    check_models(config, codec.tokenizer, context)
    task = prepare_prompts(config, codec.tokenizer, report)
    longest = check_lengths(codec, context, task, config)
    check_final_evaluation(task, config)
    check_reward_columns(config.reward, "training", task.train)
    check_reward_columns(config.reward, "validation", task.validation[: max(NUM_PROBE_PROMPTS, config.evaluation.prompts)])
    if "preferences" in (*config.reward.names, config.judge.spec):
        load_pairs(config, stages, report)
    probe_judge(config.judge, task.test, stages, report)
    if config.reward.subtract_reference and not all(prompt.references for prompt in task.train):
        raise ConfigError(f"reward.subtract_reference needs a reference for every prompt, which task '{task.name}' has not.")
    made = train_rewards(config, stages, report)  # before other models need memory
    reward = None if shares_policy_weights(config, config.reward.names) else prepare_reward(config, task, made)
    judge = None if shares_policy_weights(config, judge_names(config)) else prepare_judge(config, made, stages, report)
    if reward is not None:
        probe_reward(reward, task.validation[:NUM_PROBE_PROMPTS])
    guide = build_external_guide(config, algorithm, codec.tokenizer, longest, stages, report) if wanted else None
    if guide is not None:
        probe_guide(guide, algorithm, codec, task, config)
    start = str(sft_stage(config, stages, report))
    reference = load_language_model(start, config.runtime.device, config.lora.load_in_4bit).freeze()
    if wanted and guide is None:
        guide = build_model_guide(config, reference, stages, report)
        probe_guide(guide, algorithm, codec, task, config)
    policy_path = start
    if config.distill.num_completions:
        assert guide is not None
        chosen = guide
        with _track_guide_usage(guide, directory, config):
            policy_path = str(
                distill_stage(
                    config, start, lambda count: guide_examples(config, reference, chosen, task, count), stages, report
                )
            )
    models = build_models(config, algorithm, reference, start, policy_path)
    if reward is None:
        reward = prepare_reward(config, task, made, models.policy)
        probe_reward(reward, task.validation[:NUM_PROBE_PROMPTS])
    judge = judge or prepare_judge(config, made, stages, report, models.policy)
    targets = TargetExamples(task, models.policy, config.task.max_new_tokens) if config.ppo.mle_coefficient else []
    if isinstance(guide, TracksUsage):
        guide.pop_metrics()  # queries until here belong to no iteration
    general = load_pre_sft_model(config, reference, stages, report)
    return Components(config, algorithm, task, reward, models, guide, targets, general, judge)


@contextmanager
def _track_guide_usage(guide: Guide, directory: RunDirectory | None, config: Config) -> Generator[None]:
    """Store the guide's usage within the block in the run's total usage.

    It is stored even if the block raises.
    """
    if directory is None or not isinstance(guide, TracksUsage):
        yield
        return
    guide.load_state(directory.load_guide_usage())
    before = guide.state()
    try:
        yield
    finally:
        if guide.state() != before:
            directory.create(config)
            directory.save_guide_usage(guide.state())


def prepare_prompts(config: Config, tokenizer: Any, report: Report) -> Task:
    """Build the task's prompts, and report dropped rows and warnings."""
    task = task_definition(config.task).build(config.task, tokenizer)
    for reason, count in task.dropped_rows.items():
        report(f"task {task.name}: {count:,} {reason}, left out")
    for remark, count in task.warnings.items():
        report(f"task {task.name}: {count:,} {remark}")
    return task
