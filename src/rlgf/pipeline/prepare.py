"""Preparation of a run's components: all checks, stages and models."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlgf.config.schema import Config
from rlgf.data.tokenization import Codec
from rlgf.errors import ConfigError
from rlgf.evaluation.chat_judge import probe_judge
from rlgf.generation.decoding_path import slower_path_note
from rlgf.guides.base import Guide, TracksUsage
from rlgf.kernels import dispatch
from rlgf.models.language_model import LanguageModel
from rlgf.models.loading import load_language_model
from rlgf.pipeline.build_guide import build_external_guide, build_model_guide, guide_examples
from rlgf.pipeline.build_models import build_models, load_pre_sft_model, starting_codec
from rlgf.pipeline.build_rewards import prepare_judge, prepare_reward, train_rewards
from rlgf.pipeline.final_evaluation import check_final_evaluation
from rlgf.pipeline.preflight import check_lengths, check_models, check_to_train, probe_guide, training_warnings
from rlgf.pipeline.resolve import ResolvedRun, TaskPlan, resolve
from rlgf.pipeline.reward_model_stage import load_pairs
from rlgf.pipeline.stage_cache import Report, StageCache, no_report
from rlgf.pipeline.stages import distill_stage, starting_model
from rlgf.rewards.base import probe_reward
from rlgf.rewards.build import check_reward_columns, scorers_in
from rlgf.rewards.classifier import SequenceClassifier
from rlgf.runs.directory import RunDirectory
from rlgf.runs.failures import as_sentences
from rlgf.supervised.examples import TargetExamples
from rlgf.tasks.base import Task
from rlgf.trainer import Components
from rlgf.types import RewardFunction
from rlgf.untrusted_text import escape_reports

NUM_PROBE_PROMPTS = 4  # prompts on which a reward is tested before training


@as_sentences()
def prepare(config: Config, stages: Path, report: Report = no_report) -> Components:
    """Build or reuse every stage and return the components of a trainer.

    Args:
        config: the config of the run.
        stages: the folder in which stages (pretraining, SFT, reward, guide) are kept and found.
        report: called with each line of progress.

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
    run = resolve(config)
    check_to_train(run)
    return prepare_run(run, StageCache(stages, escape_reports(report)))


def prepare_run(run: ResolvedRun, cache: StageCache, directory: RunDirectory | None = None) -> Components:
    """Build or reuse every stage of a checked run and return the components of a trainer.

    The guide's usage in distillation is stored in `directory`, so that the guide's limits include
    it. Raises `ConfigError` if the run cannot be trained.
    """
    config, algorithm = run.trainer, run.algorithm
    dispatch.select(config.runtime.kernels)
    for warning in training_warnings(algorithm):
        cache.report(f"warning: {warning}")
    # Fail early: all checks that need no model run before one is trained.
    codec, context = starting_codec(run.policy.tokenizer, run.policy.base.shape.max_length, cache)
    check_models(run, codec.tokenizer, context)
    task = prepare_prompts(run.task, codec.tokenizer, cache.report)
    longest = check_lengths(codec, context, task, config.task.max_new_tokens)
    check_data(run, task, cache)
    folders = train_rewards(run.reward, run.judge, cache)  # before other models need memory
    reward = None if run.reward.shares_policy_weights else prepare_reward(run.reward, task, folders)
    judge = None if run.judge.shares_policy_weights else prepare_judge(run.judge, folders, cache)
    if reward is not None:
        check_reward(reward, task, codec, config.task.max_new_tokens, cache)
    guide: Guide | None = None
    if run.guide.is_needed:
        guide = build_external_guide(run.guide, algorithm, run.policy.tokenizer, codec.tokenizer, longest, cache)
    if guide is not None:
        probe_guide(guide, algorithm, codec, task, config.task, config.seed)
    start = starting_model(run.policy, cache)
    reference = load_language_model(start, config.runtime.device, run.policy.lora.load_in_4bit).freeze()
    if run.guide.is_needed and guide is None:
        guide = build_model_guide(run.guide, reference, cache)
        probe_guide(guide, algorithm, codec, task, config.task, config.seed)
    policy_path = start
    if run.distill.config.num_completions:
        assert guide is not None
        policy_path = _distill(run, start, reference, guide, task, cache, directory)
    models = build_models(run.policy, algorithm, reference, start, policy_path)
    if note := slower_path_note(models.policy):
        cache.report(note)
    if reward is None:
        reward = prepare_reward(run.reward, task, folders, models.policy)
        check_reward(reward, task, codec, config.task.max_new_tokens, cache)
    judge = judge or prepare_judge(run.judge, folders, cache, models.policy)
    targets = TargetExamples(task, models.policy, config.task.max_new_tokens) if config.ppo.mle_coefficient else []
    if isinstance(guide, TracksUsage):
        guide.pop_metrics()  # queries until here belong to no iteration
    return Components(
        config, algorithm, task, reward, models, guide, targets, output_perplexity_model(run, reference, cache), judge
    )


def check_reward(reward: RewardFunction, task: Task, codec: Codec, max_new_tokens: int, cache: StageCache) -> None:
    """Raise if a reward fails on an empty or a long completion; report what it truncates."""
    prompts = task.validation[:NUM_PROBE_PROMPTS]
    words = (prompts[0].references[0] if prompts[0].references else prompts[0].text).strip() or "a text"
    repeated = codec.response(" ".join([words] * (max_new_tokens + 1)))[:max_new_tokens]
    probe_reward(reward, prompts, codec.decode([codec.prompt(prompts[0])], [repeated])[0])
    for scorer in scorers_in(reward):
        if isinstance(scorer, SequenceClassifier):
            cache.report(f"reward: {scorer.describe()}")
        if getattr(scorer, "num_truncated", 0):
            name = getattr(scorer, "path", None) or getattr(scorer, "name", "the reward")
            cache.report(
                f"warning: inputs of '{name}' can exceed its context of {scorer.max_length} tokens: it scores what fits, and "
                "nothing of the rest."
            )


def check_data(run: ResolvedRun, task: Task, cache: StageCache) -> None:
    """Raise if prompts or pairs lack what the reward, the judge or an evaluation needs."""
    config = run.trainer
    check_final_evaluation(task, config.evaluation, config.reward, run.judge.spec is not None)
    check_reward_columns(config.reward, "training", task.train)
    check_reward_columns(config.reward, "validation", task.validation[: max(NUM_PROBE_PROMPTS, config.evaluation.prompts)])
    if run.reward.uses_preferences or run.judge.uses_preferences:
        load_pairs(run.reward.preferences, cache)
    probe_judge(run.judge.config, task.test, cache.folder, cache.report)
    if config.reward.subtract_reference and not all(prompt.references for prompt in task.train):
        raise ConfigError(
            f"reward.subtract_reference needs a reference for every prompt, and task '{task.name}' has none: set it to false."
        )


def output_perplexity_model(run: ResolvedRun, reference: LanguageModel, cache: StageCache) -> LanguageModel | None:
    """Return the model before SFT, or None if output perplexity is off or the model unknown."""
    wanted = run.trainer.evaluation.output_perplexity and run.policy.base_is_known
    return load_pre_sft_model(run.policy, reference, cache) if wanted else None


def _distill(
    run: ResolvedRun, start: str, reference: LanguageModel, guide: Guide, task: Task, cache: StageCache,
    directory: RunDirectory | None,
) -> str:  # fmt: skip
    """Fine-tune the policy on completions of the guide, and return its folder."""

    def sample(count: int) -> Any:
        return guide_examples(run.trainer, reference, guide, task, count)

    with _track_guide_usage(guide, directory, run):
        return str(distill_stage(run.distill, run.guide, start, sample, cache))


@contextmanager
def _track_guide_usage(guide: Guide, directory: RunDirectory | None, run: ResolvedRun) -> Generator[None]:
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
            directory.create(run.config)
            directory.save_guide_usage(guide.state())


def prepare_prompts(plan: TaskPlan, tokenizer: Any, report: Report) -> Task:
    """Build the task's prompts, and report dropped rows and warnings."""
    task = plan.definition.build(plan.config, tokenizer)
    for reason, count in task.dropped_rows.items():
        report(f"task {task.name}: {count:,} {reason}, dropped")
    for remark, count in task.warnings.items():
        report(f"task {task.name}: {count:,} {remark}")
    return task
