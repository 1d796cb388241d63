"""Commands that train: `rlgf train` and the single stages."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rlgf.algorithms import guided
from rlgf.cli.options import (
    COMMAND_LINE,
    Alpha,
    Beta,
    Data,
    DryRun,
    GuideSpec,
    InterruptedRunError,
    Iterations,
    Offline,
    Out,
    Overrides,
    Policy,
    Recipe,
    Seed,
    Stages,
    read_config,
)
from rlgf.config.loading import override
from rlgf.errors import ConfigError


def train(
    recipe_or_yaml: Recipe,
    overrides: Overrides = None,
    algorithm: Annotated[str | None, typer.Option(help=", ".join(guided.ALGORITHMS))] = None,
    beta: Beta = None,
    alpha: Alpha = None,
    guide: GuideSpec = None,
    policy: Policy = None,
    data: Data = None,
    iterations: Iterations = None,
    seed: Seed = None,
    out: Out = None,
    stages: Stages = None,
    offline: Offline = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also profile iterations: RUN/profile/ gets a Chrome trace.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Train one run: build or reuse the stages, train, evaluate.

    Re-running the same command resumes from the last checkpoint.
    """
    config = read_config(
        recipe_or_yaml, overrides, algorithm=algorithm, beta=beta, alpha=alpha, guide=guide, policy=policy, data=data,
        iterations=iterations, seed=seed, offline=offline,
    )  # fmt: skip
    if profile:
        config = override(config, [("runtime.profile", True)], COMMAND_LINE)
    from rlgf.cli import console, terminal
    from rlgf.pipeline import preflight, run
    from rlgf.runs.directory import RunDirectory

    console.configure_runtime(config)
    if dry_run:
        console.print_plan(config, preflight.check_to_train(config))
        return
    target = out or Path("runs") / f"{config.recipe}-{config.algorithm.name}-seed{config.seed}"
    directory = RunDirectory(target, config)
    if directory.results is not None:
        console.report(f"{target} is finished: these are its results. For a new run choose another --out.")
    else:
        watch = console.ProgressReporter(may_draw=config.guide.spec != "human")
        try:
            run.train(config, target, stages, terminal.report_reuse_once(), watch)
        except KeyboardInterrupt:
            raise InterruptedRunError(directory.resume_hint(config)) from None
        finally:
            watch.close()
    results = json.loads((target / "results.json").read_text())
    console.print_metrics({name: float("nan") if v is None else v for name, v in results["evaluation"].items()})
    console.report(
        f"{target}: policy/, results.json, metrics.jsonl, rollouts.jsonl; see completions with `rlgf samples {target}`"
    )


def _stage(name: str, source: str, overrides: list[str] | None, policy: str | None, data: str | None, seed: int | None,
           out: Path | None, stages: Path | None) -> None:  # fmt: skip
    config = read_config(source, overrides, policy=policy, data=data, seed=seed)
    from rlgf.cli import console
    from rlgf.pipeline import preflight
    from rlgf.pipeline import stages as making
    from rlgf.runs.directory import require_writable

    preflight.check(config)
    console.configure_runtime(config)
    target = out or Path("runs") / f"{config.recipe}-{name}"
    stage_folder = stages or target.parent / "stages"
    require_writable(target.parent)
    make: dict[str, Any] = {"pretrain": making.pretrain_stage, "sft": making.sft_stage, "reward": making.reward_stage}
    if "preferences" in config.reward.names:
        from rlgf.pipeline.reward_model_stage import load_pairs, preference_stage

        if name == "reward":
            load_pairs(config, stage_folder, console.report)
        make["reward"] = lambda config, stage_folder, report, target: preference_stage(
            config, stage_folder, report, "reward", target
        )
    if name == "sft" and not (config.sft.steps or config.sft.epochs):
        raise ConfigError("sft.steps and sft.epochs are 0: nothing would be trained. Set one of them.")
    if name == "sft" and policy:
        raise ConfigError("--policy skips the sft stage: give model.path=... to fine-tune that model.")
    folder = make[name](config, stage_folder, console.report, target)
    metrics = json.loads((Path(folder) / "stage.json").read_text())["metrics"]
    console.print_metrics(metrics)
    console.report(f"{folder} is ready")


def pretrain(
    recipe_or_yaml: Recipe, overrides: Overrides = None, data: Data = None, seed: Seed = None, out: Out = None,
    stages: Stages = None,
) -> None:  # fmt: skip
    """Train a small language model on the task's raw text."""
    _stage("pretrain", recipe_or_yaml, overrides, None, data, seed, out, stages)


def sft(
    recipe_or_yaml: Recipe, overrides: Overrides = None, data: Data = None, seed: Seed = None, out: Out = None,
    stages: Stages = None,
) -> None:  # fmt: skip
    """Fine-tune a model on the task's targets; give the result as `--policy`."""
    _stage("sft", recipe_or_yaml, overrides, None, data, seed, out, stages)


def reward(
    recipe_or_yaml: Recipe, overrides: Overrides = None, data: Data = None, seed: Seed = None, out: Out = None,
    stages: Stages = None,
) -> None:  # fmt: skip
    """Train the reward: an n-gram classifier, or a reward model on preference pairs.

    Give the result as reward.path.
    """
    _stage("reward", recipe_or_yaml, overrides, None, data, seed, out, stages)


def merge(
    folder: Annotated[Path, typer.Argument(help="A folder with an adapter, such as a run's policy/.")],
    out: Annotated[Path, typer.Option(help="Folder for the merged model.")],
) -> None:
    """Merge an adapter into its base weights, and write the full model."""
    from rlgf.cli import console
    from rlgf.pipeline import build_models

    console.quiet()
    build_models.merge(str(folder), out)
    console.report(f"{out} is ready")
