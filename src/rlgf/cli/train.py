"""Commands that train: `rlgf train` and the single stages."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rlgf.algorithms.registry import ALGORITHMS
from rlgf.cli.options import (
    COMMAND_LINE,
    Alpha,
    Beta,
    Data,
    DryRun,
    GuideSpec,
    Iterations,
    Offline,
    Out,
    Overrides,
    Policy,
    Recipe,
    Seed,
    SftFrom,
    Stages,
    complete_algorithm,
    read_typed_config,
)
from rlgf.errors import ConfigError
from rlgf.untrusted_text import as_file_name


def train(
    recipe_or_yaml: Recipe,
    overrides: Overrides = None,
    algorithm: Annotated[str | None, typer.Option(help=", ".join(ALGORITHMS), autocompletion=complete_algorithm)] = None,
    beta: Beta = None,
    alpha: Alpha = None,
    guide: GuideSpec = None,
    policy: Policy = None,
    sft_from: SftFrom = None,
    data: Data = None,
    iterations: Iterations = None,
    seed: Seed = None,
    out: Out = None,
    stages: Stages = None,
    offline: Offline = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also profile iterations: RUN/profile/ gets a Chrome trace.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Go on with other settings, data, code or libraries than the run began with."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the run that is in --out first; its stages stay.")
    ] = False,
    dry_run: DryRun = False,
    no_baselines: Annotated[bool, typer.Option("--no-baselines", hidden=True)] = False,
) -> None:
    """Train one run: build or reuse the stages, train, evaluate.

    Re-running the same command resumes from the last checkpoint; --overwrite begins again.
    """
    given = read_typed_config(
        recipe_or_yaml, overrides, algorithm=algorithm, beta=beta, alpha=alpha, guide=guide, policy=policy,
        sft_from=sft_from, data=data, iterations=iterations, seed=seed, offline=offline,
    )  # fmt: skip
    config = given.config
    if profile:
        from rlgf.config.loading import override

        config = override(config, [("runtime.profile", True)], COMMAND_LINE)
    from rlgf.cli import console, terminal
    from rlgf.config import unread
    from rlgf.pipeline import preflight
    from rlgf.pipeline.prepare import try_run
    from rlgf.pipeline.resolve import resolve
    from rlgf.pipeline.run import train_run
    from rlgf.pipeline.stage_cache import StageCache
    from rlgf.reports.report import write_run_report
    from rlgf.runs.directory import RunDirectory, read_results
    from rlgf.runs.recorder import clear_run

    console.configure_runtime(config, announce=False)
    target = out or Path("runs") / as_file_name(f"{config.recipe}-{config.algorithm.name}-seed{config.seed}")
    if overwrite and not dry_run:
        preflight.check_to_train(resolve(config))  # nothing is removed for a run that cannot be trained
        unread.require_read(given.typed, [config])
        if removed := clear_run(target):
            console.report(f"{target}: removed the run that was there ({removed})")
    directory = RunDirectory(target, config, accept_changes, lambda line: console.report(f"warning: {line}"))
    if dry_run:
        run = resolve(config)
        preflight.check_to_train(run)
        unread.require_read(given.typed, [config])
        console.print_plan(config, run.algorithm)
        console.print_unread(config)
        directory.check_identity()
        directory.check_available()
        console.print_trial(try_run(run, console.report))
        return
    directory.check_identity()
    if directory.results is not None:
        console.report(f"{target} is finished: these are its results. For a new run choose another --out.")
    else:
        watch = console.ProgressReporter(may_draw=config.guide.spec != "human")
        try:
            run = resolve(config)
            preflight.check_to_train(run)
            unread.require_read(given.typed, [config])
            cache = StageCache(stages or target / "stages", terminal.report_reuse_once())
            train_run(run, directory, cache, watch, not no_baselines)
        finally:
            watch.close()
    results = read_results(target / "results.json")
    console.print_metrics({name: float("nan") if v is None else v for name, v in results["evaluation"].items()})
    console.print_summary(results)
    files = [] if no_baselines else write_run_report(target)  # a comparison draws all of its runs
    shown = ", ".join(["policy/", "results.json", "metrics.jsonl", *files])
    console.report(f"{target}: {shown}; see completions with `rlgf samples {target}`")


def _stage(
    name: str, source: str, overrides: list[str] | None, data: str | None, seed: int | None, out: Path | None,
    stages: Path | None, sft_from: str | None = None, policy: str | None = None,
) -> None:  # fmt: skip
    given = read_typed_config(source, overrides, policy=policy, sft_from=sft_from, data=data, seed=seed)
    config = given.config
    from rlgf.cli import console
    from rlgf.config import unread
    from rlgf.pipeline import preflight, reward_model_stage
    from rlgf.pipeline import stages as making
    from rlgf.pipeline.resolve import resolve
    from rlgf.pipeline.stage_cache import StageCache
    from rlgf.runs.directory import require_writable

    unread.require_read_by_stage(given.typed, name)
    run = resolve(config)
    preflight.check(run)
    console.configure_runtime(config)
    target = out or Path("runs") / as_file_name(f"{run.recipe}-{name}")
    cache = StageCache(stages or target.parent / "stages", console.report)
    require_writable(target.parent)
    if name == "pretrain":
        folder = making.pretrain_stage(run.policy.base, cache, target)
    elif name == "sft":
        if not run.policy.sft.training.is_enabled:
            raise ConfigError("sft.steps and sft.epochs are 0: nothing would be trained. Set one of them.")
        if run.policy.path:
            raise ConfigError(f"policy={run.policy.path} skips the sft stage: give --sft-from {run.policy.path}.")
        folder = making.fine_tune_stage(run.policy.sft, cache, target)
    elif run.reward.uses_preferences:
        reward_model_stage.load_pairs(run.reward.preferences, cache)
        folder = reward_model_stage.preference_stage(run.reward.preferences, cache, at=target)
    else:
        folder = making.reward_stage(run.reward, cache, target)
    metrics = json.loads((folder / "stage.json").read_text())["metrics"]
    console.print_metrics(metrics)
    console.report(f"{folder} is ready")


def pretrain(
    recipe_or_yaml: Recipe, overrides: Overrides = None, data: Data = None, seed: Seed = None, out: Out = None,
    stages: Stages = None,
) -> None:  # fmt: skip
    """Train a small language model on the task's raw text."""
    _stage("pretrain", recipe_or_yaml, overrides, data, seed, out, stages)


def sft(
    recipe_or_yaml: Recipe, overrides: Overrides = None, sft_from: SftFrom = None, data: Data = None, seed: Seed = None,
    out: Out = None, stages: Stages = None,
) -> None:  # fmt: skip
    """Fine-tune a model on the task's targets; give the result as `--policy`."""
    _stage("sft", recipe_or_yaml, overrides, data, seed, out, stages, sft_from)


def reward(
    recipe_or_yaml: Recipe, overrides: Overrides = None, policy: Policy = None, sft_from: SftFrom = None, data: Data = None,
    seed: Seed = None, out: Out = None, stages: Stages = None,
) -> None:  # fmt: skip
    """Train the reward: an n-gram classifier, or a reward model on preference pairs.

    Give the result as reward.path.
    """
    _stage("reward", recipe_or_yaml, overrides, data, seed, out, stages, sft_from, policy)


def merge(
    folder: Annotated[Path, typer.Argument(help="A folder with an adapter, such as a run's policy/.")],
    out: Annotated[Path, typer.Option(help="Folder for the merged model.")],
) -> None:
    """Merge an adapter into its base weights, and write the full model."""
    from rlgf.cli import terminal

    terminal.announce_loading()
    from rlgf.cli import console
    from rlgf.pipeline import build_models

    console.quiet()
    build_models.merge(str(folder), out)
    console.report(f"{out} is ready")
