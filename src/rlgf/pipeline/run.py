"""The pipeline of a run: checks, stages, training, evaluation, saving."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from rlgf.algorithms.registry import ALGORITHMS
from rlgf.config.base import to_dict
from rlgf.config.objects import as_config, check_options, config_of_objects, given_keys
from rlgf.config.schema import Config
from rlgf.config.specs import GuideKind
from rlgf.data.checksums import fingerprint
from rlgf.errors import ConfigError, restored_state, unknown
from rlgf.evaluation.chat_judge import probe_judge
from rlgf.evaluation.evaluate import EvaluationContext, evaluate_policy
from rlgf.generation.decoder import LocalSampler
from rlgf.interrupts import handle_signals
from rlgf.kernels import dispatch
from rlgf.models import lora
from rlgf.models.language_model import POLICY_ADAPTER
from rlgf.models.loading import load_language_model, load_tokenizer
from rlgf.pipeline.build_models import load_pre_sft_model, starting_codec
from rlgf.pipeline.build_rewards import prepare_judge, prepare_reward, train_rewards
from rlgf.pipeline.final_evaluation import (
    as_results,
    check_final_evaluation,
    evaluate_baselines,
    extra_results,
    final_prompts,
    final_results,
)
from rlgf.pipeline.preflight import check, check_base, check_lengths, check_rewards, check_to_train
from rlgf.pipeline.prepare import output_perplexity_model, prepare_prompts, prepare_run, with_test_data
from rlgf.pipeline.resolve import ResolvedRun, resolve
from rlgf.pipeline.stage_cache import Report, StageCache, no_report
from rlgf.pipeline.stages import starting_model
from rlgf.reports.report import finish_report
from rlgf.rewards.weighted_sum import sum_of_rewards
from rlgf.rl.experience import ForwardConfig
from rlgf.rl.rollout import RolloutConfig
from rlgf.runs.directory import RunDirectory, read_results, require_writable
from rlgf.runs.failures import as_sentences, require_space
from rlgf.runs.machine import describe_runtime
from rlgf.runs.progress import ProgressLines, write_line
from rlgf.runs.recorder import RunRecorder
from rlgf.trainer import Components, Progress, Trainer
from rlgf.untrusted_text import escape_reports

BASELINES = ("zero_shot", "sft", "guide")


def no_progress(progress: Progress) -> None:
    """Ignore the progress."""


def disk_needed(parts: Components) -> int:
    """Return the bytes of the final models and of the checkpoints.

    A checkpoint has weights and two moments; a new one is written next to those that are kept.
    """
    trained = sum(value.numel() for value in parts.models.policy.trainable_parameters())
    trained += sum(value.numel() for critic in parts.models.critics.values() for value in critic.trainable_parameters())
    checkpoints = parts.config.runtime.keep_checkpoints + 1
    return 4 * (checkpoints * 3 * trained + 2 * trained) + 50_000_000


@as_sentences()
def train(
    config: Config | Mapping[str, Any] | str | None = None,
    out: Path | str | None = None,
    stages: Path | str | None = None,
    report: Report | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    prompts: Any = None,
    reward: Any = None,
    guide: Any = None,
    algorithm: Any = None,
    settings: Mapping[str, Any] | None = None,
    identity: str | None = None,
    accept_changes: bool = False,
    progress: bool = True,
) -> Trainer:
    """Train and evaluate one run in the folder `out`, and return its trainer.

    A call has a config, objects in place of its parts, or both; without a config it needs a model,
    prompts and a reward. A fifth of the prompts is held out.

    In the main thread, SIGINT, SIGTERM, SIGHUP and SIGUSR1 are handled until the call ends; then
    the handlers before are restored. The first signal raises `Interrupted`, with a checkpoint: at
    once while completions are collected, otherwise when the iteration (in a stage, the step) is
    done, or `runtime.grace_seconds` later without a checkpoint. A second signal raises it at once.
    In other threads, signals are as before the call.

    Args:
        config: the config of the run, the name of a recipe, or a dict of dotted or nested keys,
            whose key 'recipe' names the recipe that it changes.
        out: the folder of the run; resumes from a checkpoint in it, or reuses a finished run.
        stages: the folder in which stages are kept and found; None: `out/stages`.
        report: called with each line of progress; None: they are written to standard error.
        on_progress: called after each iteration, with its metrics (docs/metrics.md).
        model: Hub name or folder, or a loaded transformers model, which is copied to `stages`.
        tokenizer: the tokenizer of a loaded model.
        prompts: texts, conversations, `Prompt` objects or rows (docs/own-data.md), as a list, a
            `datasets.Dataset` or a table of pandas, or the name of a file.
        reward: a function from prompts and completions to one number each, a `reward.path`, a list
            of functions (their sum) or a dict from them to weights.
        guide: a `Guide`, a function from requests to completions, a loaded transformers model, or a
            `guide.spec`.
        algorithm: such as `rlgf.lols()`; by default `ppo_pp` with a guide and `ppo` without.
        settings: config values by dotted key, over those of `rlgf.config.objects.SETTINGS`.
        identity: names the version of objects without source, such as a lambda or a loaded client;
            with another one `out` is another run. Without, they must be the same in each call.
        accept_changes: go on with other settings, data, code or libraries than the run began with;
            they are recorded in `out/identity.json`.
        progress: whether lines of progress are written where `report` is None.

    Returns:
        The trainer; the trained policy is `trainer.components.models.policy`, on disk `out/policy`.

    Raises:
        ConfigError: the run cannot be trained, or `out` has another run.
        DataError: the task's data cannot be used.
        TrainingError: a guide or a reward failed, after a checkpoint was written; or a file cannot
            be written, or memory ran out.
        Interrupted: a signal arrived.

    Example:
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> trainer = rlgf.train(config, out="runs/mine", stages="runs/stages")
        >>> metrics, rollout, scores = trainer.evaluate(trainer.components.task.test)
        >>> len(scores), 0 <= metrics["pass_rate"] <= 1
        (4, True)
    """
    if out is None:
        raise ConfigError("rlgf.train needs a folder for the run: give out=.")
    check_options(
        folders={"out": out, "stages": stages},
        callbacks={"report": report, "on_progress": on_progress},
        flags={"accept_changes": accept_changes, "progress": progress},
        settings=settings, identity=identity,
    )  # fmt: skip
    given_config = None if config is None else as_config(config)
    out = Path(out)
    lines = report or (write_line if progress else no_report)
    report = escape_reports(lines)
    reward = sum_of_rewards(reward) if isinstance(reward, list | tuple | dict) else reward
    cache = StageCache(Path(stages) if stages else out / "stages", report)
    objects: dict[str, Any] = {
        "model": model, "tokenizer": tokenizer, "prompts": prompts, "reward": reward, "guide": guide, "algorithm": algorithm,
    }  # fmt: skip
    run_config, passed = config_of_objects(
        cache.folder, **objects, settings=settings or {}, identity=identity, base=given_config, base_keys=given_keys(config)
    )
    directory = RunDirectory(out, run_config, accept_changes, lambda line: report(f"warning: {line}"))
    for name in passed.unverifiable() if identity is None and (out / "config.yaml").is_file() else ():
        report(f"warning: {out} is resumed, and its {name} has no source to compare: it must be the same as before")
    run = resolve(run_config, passed)
    check_to_train(run, unwritten=[str(file.path) for file in passed.files])
    if passed.files:
        require_writable(cache.folder, "--stages")
        passed.write_files()
    trainer = train_run(run, directory, cache, on_progress or (ProgressLines(report) if progress else no_progress))
    for line in finish_report(directory.folder, read_results(directory.folder / "results.json")):
        report(line)
    return trainer


@as_sentences()
def train_run(
    run: ResolvedRun, directory: RunDirectory, cache: StageCache, on_progress: Callable[[Progress], None] = no_progress,
    with_baselines: bool = True,
) -> Trainer:  # fmt: skip
    """Train and evaluate a checked run in a directory, and return its trainer.

    The rewards of its starting model and guide are in the results unless a comparison has them.
    Raises `ConfigError` if another process trains it, and `Interrupted` after a signal.
    """
    runtime = run.trainer.runtime
    where = describe_runtime(runtime.device, runtime.precision)
    cache.report(f"{run.algorithm.title} on {run.task.name}, seed {run.trainer.seed}: {where}")
    directory.check_identity()
    require_writable(directory.folder)
    with handle_signals(run.trainer.runtime.grace_seconds, cache.report), directory.locked():
        try:
            return _train_locked(run, directory, cache, on_progress, with_baselines)
        except KeyboardInterrupt as error:
            raise directory.interruption(error) from None


def _train_locked(
    run: ResolvedRun, directory: RunDirectory, cache: StageCache, on_progress: Callable[[Progress], None],
    with_baselines: bool,
) -> Trainer:  # fmt: skip
    """Train and evaluate a run that no other process trains."""
    require_space(directory.folder, 50_000_000)
    require_writable(cache.folder, "--stages")
    parts = prepare_run(run, cache, directory)
    require_space(directory.folder, disk_needed(parts))
    trainer = Trainer(parts)
    directory.create(run.config)
    with (
        RunRecorder(trainer, directory, run.trainer.runtime, to_dict(run.config)) as recorder,
        closing(trainer.iterate(recorder.run_step)) as iterations,
    ):
        if trainer.iteration:
            reached = f"{trainer.iteration:,} of {trainer.num_iterations:,} iterations"
            cache.report(f"{directory.folder}: goes on after {reached}")
        for progress in iterations:
            recorder.write(progress.metrics, progress.experience)
            for warning in progress.warnings:
                cache.report(f"warning: {warning}")
            with restored_state():
                on_progress(progress)
    if directory.results is None:
        directory.save_model("policy", parts.models.policy.save)
        for origin, critic in parts.models.critics.items():
            directory.save_model(f"critic-{origin.name.lower()}", critic.save)
        directory.finish(final_results(trainer, directory, run, with_baselines))
    return trainer


def for_guide_evaluation(run: ResolvedRun) -> ResolvedRun:
    """Return the run with an algorithm that uses all of the guide's capabilities.

    With it, `prepare_run` builds the guide, and distills nothing.
    """
    guide, distill = run.guide, run.distill
    able = guide.spec.kind not in (GuideKind.REFERENCES, GuideKind.PYTHON) and guide.config.continuation != "none"
    return dataclasses.replace(
        run,
        algorithm=ALGORITHMS["aggrevated" if able else "ppo_pp"]().build(),
        guide=dataclasses.replace(guide, is_needed=True, run_key=fingerprint({"guide_evaluation": guide.run_key})),
        distill=dataclasses.replace(distill, config=dataclasses.replace(distill.config, num_completions=0)),
    )


@as_sentences()
def evaluate(
    config: Config | Mapping[str, Any] | str,
    policy: Path | str | None = None,
    stages: Path | str = "runs/stages",
    report: Report | None = None,
    baseline: Literal["zero_shot", "sft", "guide"] | None = None,
    test_data: str | None = None,
) -> dict[str, Any]:
    """Evaluate a policy or a baseline on the test split, without training it by RL.

    New completions are sampled from it alone.

    Args:
        config: the config of the run, or of runs to compare with.
        policy: a folder or Hub name; None: the baseline.
        stages: the folder in which stages are kept and found.
        report: called with each line of progress; None: they are written to standard error.
        baseline: 'zero_shot', the model before SFT; 'sft' (by default), the policy's starting
            model; 'guide'.
        test_data: other data to measure on; of a single file of one's own rows, all of it.

    Returns:
        'evaluation': the metrics (docs/metrics.md); 'evaluations': those of the task's other
        splits, if it has any; 'judge', 'best_of' and 'output_perplexity_model', if configured.

    Raises:
        ConfigError: both a policy and a baseline are given, or they cannot be evaluated.
        TrainingError: the guide, the reward or the judge failed.

    Example:
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> rlgf.evaluate(config, stages="runs/stages")["evaluation"]["completions"]
        4.0
    """
    check_options(folders={"policy": policy, "stages": stages}, callbacks={"report": report}, flags={})
    if baseline is not None and baseline not in BASELINES:
        raise unknown("baseline", baseline, BASELINES)
    if policy is not None and baseline is not None:
        raise ConfigError("policy and baseline both name what is evaluated: give one of them.")
    run, cache = resolve(as_config(config)), StageCache(Path(stages), escape_reports(report or write_line))
    dispatch.select(run.trainer.runtime.kernels)
    if baseline == "guide":
        return evaluate_guide_on_test(run, cache, test_data)
    zero_shot = baseline == "zero_shot"
    return evaluate_policy_on_test(run, None if policy is None else str(policy), cache, zero_shot, test_data)


def evaluate_guide_on_test(run: ResolvedRun, cache: StageCache, test_data: str | None = None) -> dict[str, Any]:
    """Evaluate the guide of a run on the test split.

    Returns 'evaluation', 'evaluations' and 'judge', as `evaluate_policy_on_test`.
    """
    run = for_guide_evaluation(run)
    evaluation = dataclasses.replace(run.trainer.evaluation, baselines=("guide",))
    run = dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, evaluation=evaluation))
    check_to_train(run)
    parts = prepare_run(run, cache)
    if test_data is not None:
        tokenizer = parts.models.policy.tokenizer
        parts = dataclasses.replace(parts, task=with_test_data(run.task, test_data, tokenizer, cache.report))
    row = evaluate_baselines(parts, run.policy, cache)["guide"]
    metrics = {key: row[key] for key in ("evaluation", "evaluations") if key in row}
    return {**metrics, **({"judge": parts.judge.name} if parts.judge else {})}


def evaluate_policy_on_test(
    run: ResolvedRun, policy: str | None, cache: StageCache, zero_shot: bool = False, test_data: str | None = None
) -> dict[str, Any]:
    """Evaluate a policy on the test split, without RL training.

    `policy` is a folder or Hub name; None is the SFT stage or, with `zero_shot`, the model before
    SFT. Returns 'evaluation' (metrics), 'evaluations' (those of the task's extra splits, if any)
    and the entries of `extra_results`.
    """
    check(run)
    settings = run.trainer
    codec, _ = starting_codec(run.policy.tokenizer, run.policy.base.shape.max_length, cache)
    if policy and load_tokenizer(policy).get_vocab() != codec.tokenizer.get_vocab():
        raise ConfigError(
            f"the policy '{policy}' has another vocabulary than the model that its completions are compared with (KL needs the "
            "same one): name that model's recipe or YAML file, or its starting point with model.path=PATH."
        )
    check_base(run.policy, settings.evaluation, codec.tokenizer)
    check_rewards(run.reward, run.judge)
    task = (
        prepare_prompts(run.task, codec.tokenizer, cache.report)
        if test_data is None
        else with_test_data(run.task, test_data, codec.tokenizer, cache.report)
    )
    check_final_evaluation(task, settings.evaluation, settings.reward, run.judge.spec is not None)
    probe_judge(run.judge.config, task.test, cache.folder, cache.report)
    start, folders = starting_model(run.policy, cache), train_rewards(run.reward, run.judge, cache)
    in_4bit, device = run.policy.lora.load_in_4bit, settings.runtime.device
    reference = language_model = load_language_model(start, device, in_4bit).freeze()
    if policy:
        in_4bit = in_4bit and lora.is_adapter_folder(policy)
        language_model = load_language_model(policy, device, in_4bit, reference, POLICY_ADAPTER).freeze()
    if zero_shot:
        language_model = load_pre_sft_model(run.policy, reference, cache)
    check_lengths(language_model.codec, language_model.max_length, task, run.task)
    reward = prepare_reward(run.reward, task, folders, reference)
    precision = settings.runtime.precision
    forward_config = ForwardConfig(settings.sampling, settings.ppo, settings.runtime.micro_batch_tokens, precision)
    judge, pre_sft = prepare_judge(run.judge, folders, cache, reference), output_perplexity_model(run, reference, cache)
    context = EvaluationContext(task, reward, reference, pre_sft, forward_config, settings.evaluation, judge)
    rollout_config = RolloutConfig(
        language_model, LocalSampler(language_model, precision), None, settings.evaluation.sampling or settings.sampling,
        settings.task.max_new_tokens, settings.task.min_new_tokens, settings.seed,
    )  # fmt: skip
    splits, seed = final_prompts(task, settings.evaluation), settings.evaluation.seed
    found = {split: evaluate_policy(rollout_config, part, context, seed)[0] for split, part in splits.items()}
    extra = extra_results(settings, run.policy.base, rollout_config, splits["test"], context)
    return {**as_results(found), **extra}
