"""The pipeline of a run: checks, stages, training, evaluation, saving."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from rlgf.config.flatten import to_dict
from rlgf.config.loading import override
from rlgf.config.schema import Config
from rlgf.errors import ConfigError
from rlgf.evaluation.chat_judge import probe_judge
from rlgf.evaluation.evaluate import EvaluationContext, evaluate_policy
from rlgf.generation.decoder import LocalSampler
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
from rlgf.pipeline.preflight import check, check_base, check_lengths, judge_names
from rlgf.pipeline.prepare import prepare, prepare_prompts
from rlgf.pipeline.stage_cache import Report, no_report
from rlgf.pipeline.stages import load_base_model, sft_stage
from rlgf.rewards.build import check_reward_names
from rlgf.rl.experience import ForwardConfig
from rlgf.rl.rollout import RolloutConfig
from rlgf.runs.directory import RunDirectory, require_space, require_writable
from rlgf.runs.recorder import RunRecorder
from rlgf.trainer import Components, Progress, Trainer


def disk_needed(parts: Components) -> int:
    """Return the bytes of the final models and of the checkpoints.

    A checkpoint has weights and two moments; a new one is written next to the last.
    """
    trained = sum(value.numel() for value in parts.models.policy.trainable_parameters())
    trained += sum(value.numel() for critic in parts.models.critics.values() for value in critic.trainable_parameters())
    return 4 * (2 * 3 * trained + trained) + 50_000_000


def train(
    config: Config,
    out: Path | str,
    stages: Path | str | None = None,
    report: Report = no_report,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Trainer:
    """Train and evaluate one run in the folder `out`, and return its trainer.

    The trained policy is `trainer.components.models.policy` and, on disk, `out/policy`.

    Args:
        config: the config of the run.
        out: the folder of the run; resumes from a checkpoint in it, or reuses a finished run.
        stages: the folder in which stages are kept and found; None: `out/stages`.
        report: called with each line of progress.
        on_progress: called after each iteration, with its metrics (docs/metrics.md).

    Raises:
        ConfigError: the run cannot be trained, or `out` has a run with other settings.
        DataError: the task's data cannot be used.
        TrainingError: a guide or a reward failed; a checkpoint is written first.

    Example:
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> trainer = rlgf.train(config, out="runs/mine", stages="runs/stages")
        >>> metrics, rollout, scores = trainer.evaluate(trainer.components.task.test)
        >>> len(scores), 0 <= metrics["pass_rate"] <= 1
        (4, True)
    """
    out = Path(out)
    directory = RunDirectory(out, config)
    check(config)
    shelf = Path(stages) if stages else out / "stages"
    require_writable(out)
    require_space(out, 50_000_000)
    require_writable(shelf, "--stages")
    parts = prepare(config, shelf, report, directory)
    require_space(out, disk_needed(parts))
    trainer = Trainer(parts)
    directory.create(config)
    with (
        RunRecorder(trainer, directory, config.runtime, to_dict(config)) as recorder,
        closing(trainer.iterate(recorder.run_step)) as iterations,
    ):
        for progress in iterations:
            recorder.write(progress.metrics, progress.experience)
            on_progress(progress)
    if directory.results is None:
        parts.models.policy.save(out / "policy")
        for origin, critic in parts.models.critics.items():
            critic.save(out / f"critic-{origin.name.lower()}")
        directory.finish(final_results(trainer, directory))
    return trainer


def guide_evaluation_config(config: Config) -> Config:
    """Return the config with an algorithm that uses all of the guide's capabilities.

    With it, `prepare` builds the guide.
    """
    guide = config.guide
    able = guide.spec != "references" and not guide.spec.startswith("python:") and guide.continuation != "none"
    return override(config, [("algorithm.name", "aggrevated" if able else "ppo_pp"), ("distill.num_completions", 0)])


def evaluate_guide_on_test(config: Config, stages: Path, report: Report) -> dict[str, Any]:
    """Evaluate the config's guide on the test split.

    Returns 'evaluation', 'evaluations' and 'judge', as `evaluate_policy_on_test`.
    """
    parts = prepare(override(guide_evaluation_config(config), [("evaluation.baselines", ["guide"])]), stages, report)
    row = evaluate_baselines(parts, stages, report)["guide"]
    measured = {key: row[key] for key in ("evaluation", "evaluations") if key in row}
    return {**measured, **({"judge": parts.judge.name} if parts.judge else {})}


def evaluate_policy_on_test(
    config: Config, policy: str | None, stages: Path, report: Report, zero_shot: bool = False
) -> dict[str, Any]:
    """Evaluate a policy on the test split, without RL training.

    `policy` is a folder or Hub name; None is the SFT stage or, with `zero_shot`, the model before
    SFT. Returns 'evaluation' (metrics), 'evaluations' (those of the task's extra splits, if any)
    and the entries of `extra_results`.
    """
    check(config)
    codec, _ = starting_codec(config, stages, report)
    if policy and load_tokenizer(policy).get_vocab() != codec.tokenizer.get_vocab():
        raise ConfigError(
            f"the policy '{policy}' has another vocabulary than the model that its texts are compared with (KL needs the same "
            "one): name that model's recipe or YAML file, or its starting point with model.path=PATH."
        )
    check_base(config, codec.tokenizer)
    check_reward_names((*config.reward.names, *judge_names(config)))
    task = prepare_prompts(config, codec.tokenizer, report)
    check_final_evaluation(task, config)
    probe_judge(config.judge, task.test, stages, report)
    start = sft_stage(config, stages, report)
    made, in_4bit, device = train_rewards(config, stages, report), config.lora.load_in_4bit, config.runtime.device
    reference = language_model = load_language_model(str(start), device, in_4bit).freeze()
    if policy:
        in_4bit = in_4bit and lora.is_adapter_folder(policy)
        language_model = load_language_model(policy, device, in_4bit, reference, POLICY_ADAPTER).freeze()
    if zero_shot:
        language_model = load_base_model(config, stages, report, reference).freeze()
    check_lengths(language_model.codec, language_model.max_length, task, config)
    reward = prepare_reward(config, task, made, reference)
    forward_config = ForwardConfig(config.sampling, config.ppo, config.runtime.micro_batch_tokens, config.runtime.precision)
    general = load_pre_sft_model(config, reference, stages, report)
    judge = prepare_judge(config, made, stages, report, reference)
    judges = EvaluationContext(task, reward, reference, general, forward_config, config.evaluation, judge)
    rollout_config = RolloutConfig(
        language_model, LocalSampler(language_model, config.runtime.precision), None,
        config.evaluation.sampling or config.sampling, config.task.max_new_tokens, config.task.min_new_tokens, config.seed,
    )  # fmt: skip
    splits = final_prompts(task, config)
    found = {split: evaluate_policy(rollout_config, part, judges, config.evaluation.seed)[0] for split, part in splits.items()}
    return {**as_results(found), **extra_results(config, rollout_config, splits["test"], judges)}
