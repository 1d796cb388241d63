"""Preparation of a run's components: all checks, stages and models."""

import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rlgf.config.objects import as_config, check_options
from rlgf.config.schema import Config
from rlgf.config.specs import GuideKind
from rlgf.data.hub import is_local_name, path_exists
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
from rlgf.rewards.build import check_reward_columns, is_model, scorers_in
from rlgf.rewards.classifier import SequenceClassifier
from rlgf.runs.directory import RunDirectory
from rlgf.runs.failures import as_sentences
from rlgf.runs.progress import write_line
from rlgf.supervised.examples import TargetExamples
from rlgf.tasks.base import Task
from rlgf.trainer import Components
from rlgf.types import RewardFunction
from rlgf.untrusted_text import escape_reports

NUM_PROBE_PROMPTS = 4  # prompts on which a reward is tested before training
QUICK_BYTES = 1_500_000_000  # of a reward model that a trial loads


@dataclass
class Trial:
    """The result of a dry run: the checks made, and those left out."""

    done: list[str] = field(default_factory=list[str])
    left_out: list[str] = field(default_factory=list[str])


@as_sentences()
def prepare(config: Config | Mapping[str, Any] | str, stages: Path | str, report: Report | None = None) -> Components:
    """Build or reuse every stage and return the components of a trainer.

    Args:
        config: the config of the run, the name of a recipe, or a dict, as of `rlgf.train`.
        stages: the folder in which stages (pretraining, SFT, reward, guide) are kept and found.
        report: called with each line of progress; None: they are written to standard error.

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
    check_options(folders={"stages": stages}, callbacks={"report": report}, flags={})
    run = resolve(as_config(config))
    check_to_train(run)
    return prepare_run(run, StageCache(Path(stages), escape_reports(report or write_line)))


def prepare_run(run: ResolvedRun, cache: StageCache, directory: RunDirectory | None = None) -> Components:
    """Build or reuse every stage of a checked run; return a trainer's components.

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
    longest = check_lengths(codec, context, task, run.task)
    check_data(run, task, cache)
    if note := unlearned_targets(run, task):
        cache.report(note)
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
    """Raise if a reward fails on an empty or long completion; report what it truncates."""
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


def report_warnings(report: Report) -> Report:
    """Return a reporter of warnings alone."""
    return lambda line: report(line) if line.startswith("warning") else None


def try_run(run: ResolvedRun, report: Report) -> Trial:
    """Make the checks of a run that take under a minute; nothing is kept.

    The data is read, the reward and an external guide are called on a few prompts. Raises
    `ConfigError` or `DataError` if the run cannot be trained.
    """
    trial = Trial()
    with tempfile.TemporaryDirectory() as folder:
        cache = StageCache(Path(folder), report_warnings(report))
        codec, context = starting_codec(run.policy.tokenizer, run.policy.base.shape.max_length, cache)
        check_models(run, codec.tokenizer, context)
        task = prepare_prompts(run.task, codec.tokenizer, report)
        longest = check_lengths(codec, context, task, run.task)
        check_data(run, task, cache)
        if note := unlearned_targets(run, task):
            report(note)
        sizes = " / ".join(f"{len(prompts):,}" for prompts in (task.train, task.validation, task.test))
        trial.done.append(f"{sizes} train, validation and test prompts, with completions of at most {longest:,} tokens")
        _try_reward(run, codec, task, cache, trial)
        _try_guide(run, codec, task, longest, cache, trial)
    judge = run.judge.spec
    if judge is not None:
        trial.left_out.append("the judge") if run.judge.reward_name else trial.done.append(f"the judge {judge.text} answers")
    trial.left_out.append("loading the models, their memory, and training")
    return trial


def _try_reward(run: ResolvedRun, codec: Codec, task: Task, cache: StageCache, trial: Trial) -> None:
    """Call the reward on a few prompts if it needs no training and little loading."""
    names = run.reward.config.names
    trained = [name for name in names if name in ("ngram", "preferences")]
    large = [name for name in names if is_model(name) and not _is_quick(name)]
    if trained or run.reward.shares_policy_weights:
        trial.left_out.append(f"the reward {', '.join(trained or names)}, which is made when the run begins")
    elif large:
        trial.left_out.append(f"the reward {', '.join(large)}, which takes long to load")
    else:
        check_reward(prepare_reward(run.reward, task, {}), task, codec, run.trainer.task.max_new_tokens, cache)
        trial.done.append(f"the reward {', '.join(names)} scores completions")


def _is_quick(name: str) -> bool:
    """Return whether a model is in a folder, and small."""
    folder = Path(name).expanduser()
    return path_exists(name) and sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < QUICK_BYTES


def _try_guide(run: ResolvedRun, codec: Codec, task: Task, longest: int, cache: StageCache, trial: Trial) -> None:
    """Query a guide that is no model in this process on a few prompts."""
    plan, config = run.guide, run.trainer
    if not plan.is_needed:
        return
    offline = plan.config.endpoint.offline
    if plan.spec.kind == GuideKind.HUMAN or (plan.spec.kind == GuideKind.SERVER and offline):
        trial.left_out.append(f"the guide {plan.spec.text}")
        return
    guide = build_external_guide(plan, run.algorithm, run.policy.tokenizer, codec.tokenizer, longest, cache)
    if guide is None:
        trial.left_out.append(f"completions of the guide {plan.spec.text}")
        return
    probe_guide(guide, run.algorithm, codec, task, config.task, config.seed)
    trial.done.append(f"the guide {plan.spec.text} completes prompts")


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


def unlearned_targets(run: ResolvedRun, task: Task) -> str | None:
    """Return a note if the data has completions that no stage trains on."""
    policy = run.policy
    targets = sum(bool(prompt.sft_targets) for prompt in (task.demonstrations or task.train))
    if policy.has_sft or not targets or run.trainer.ppo.mle_coefficient or run.distill.config.num_completions:
        return None
    if policy.path is None:
        return f"note: sft.epochs and sft.steps are 0, so the {targets:,} completions in the data are not learned"
    return (
        f"note: the run starts from {policy.path} as it is, and the {targets:,} completions in the data are not learned: "
        f"--sft-from {policy.path} fine-tunes on them first"
    )


def output_perplexity_model(run: ResolvedRun, reference: LanguageModel, cache: StageCache) -> LanguageModel | None:
    """Return the model before SFT for output perplexity; None if off or unknown."""
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


def with_test_data(plan: TaskPlan, data: str, tokenizer: Any, report: Report) -> Task:
    """Return the task with other data as its test split.

    All rows of a single file are measured. The other splits stay those of the run's data, if that
    is still there.
    """
    if not plan.definition.needs_data:
        raise ConfigError(f"task '{plan.name}' generates its own data: leave out --data.")
    options = plan.config.options
    if "all_rows_test" in {field.name for field in fields(plan.definition.options)}:
        options = {**options, "all_rows_test": True}
    other = TaskPlan(replace(plan.config, data=data, options=options), plan.definition)
    measured = prepare_prompts(other, tokenizer, report)
    own = plan.config.data
    if own is not None and is_local_name(own) and not path_exists(own):
        report(f"{own}, the data of the run, is no longer there")
        return measured
    task = prepare_prompts(plan, tokenizer, no_report)
    return replace(task, test=measured.test, extra_test_splits=measured.extra_test_splits)


def prepare_prompts(plan: TaskPlan, tokenizer: Any, report: Report) -> Task:
    """Build the task's prompts, and report dropped rows and warnings."""
    task = plan.definition.build(plan.config, tokenizer)
    for reason, count in task.dropped_rows.items():
        report(f"task {task.name}: {count:,} {reason}, dropped")
    for remark, count in task.warnings.items():
        report(f"task {task.name}: {count:,} {remark}")
    return task
