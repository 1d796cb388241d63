"""Commands that check a guide or a task before training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rlgf.cli.options import Data, Overrides, Policy, Stages, read_config
from rlgf.errors import INPUT_ERRORS, ConfigError, unknown


def check_guide(
    spec: Annotated[str, typer.Argument(help="A guide, such as server:MODEL@URL.")],
    overrides: Overrides = None,
    data: Data = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue. Default: a held-out prompt of --data, otherwise an example.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Prefix of the continuation. Default: that of a reference, otherwise an example.")
    ] = None,
    policy: Policy = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a sample.", min=1)] = 48,
    recipe_or_yaml: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Recipe or config with the guide's settings and the task. Default: prompts with --data, otherwise imdb-small.",
            metavar="RECIPE_OR_YAML",
        ),
    ] = None,
) -> None:
    """Test a guide: capabilities, samples, latency, cost, and the algorithms it supports.

    With --data it is asked with a row of it. The cost is that of a thousand completions.
    """
    recipe = recipe_or_yaml or ("prompts" if data else "imdb-small")
    changes = ["task.min_new_tokens=0", f"task.max_new_tokens={max_tokens}", *(overrides or [])]
    config = read_config(recipe, changes, guide=spec, data=data, policy=policy)
    from rlgf.cli import console, diagnose

    console.quiet()
    has_data = config.task.data is not None
    findings = diagnose.check_guide(config, prompt, prefix, Path("runs") / "stages", console.report, has_data)
    _print_findings(findings)
    if not any(finding.level == "ok" for finding in findings):
        raise ConfigError("this guide cannot be used: fix what is marked ERROR.")


def check_task(
    name: Annotated[str, typer.Argument(help="A task, a recipe, a YAML file, or your own as python:module:TASK.")],
    overrides: Overrides = None,
    data: Data = None,
    policy: Policy = None,
    stages: Stages = None,
) -> None:
    """Check the prompts, targets and reward of a task, without a policy.

    Rewards must be finite, pure and not constant. Targets must continue their prompts, and should
    score well.
    """
    from rlgf.config.loading import override
    from rlgf.config.recipes import RECIPES
    from rlgf.config.specs import complete_spec

    name = complete_spec(name)
    homes = {"toy_reviews": "quickstart"}  # a task name selects the recipe with its settings
    source = "prompts" if name.startswith("python:") else homes.get(name, name)
    if source not in RECIPES and not Path(source).is_file():
        raise unknown("task or recipe", name, [*RECIPES, *homes])
    named = [f"task.name={name}"] if name.startswith("python:") else []
    config = read_config(source, [*named, *(overrides or [])], data=data)
    if policy:
        config = override(config, [("model.path", policy)])
    from rlgf.cli import console, task_checks

    console.configure_runtime(config)
    try:
        findings = task_checks.check_task(config, stages or Path("runs") / "stages", console.report)
    except INPUT_ERRORS as error:
        small = f"{source}-small"
        if small not in RECIPES or config.model.path is None or "tokenizer" not in str(error):
            raise
        raise ConfigError(f"{error} Or check '{small}', the same task with a tokenizer trained here.") from None
    _print_findings(findings)
    if any(finding.level == "error" for finding in findings):
        raise ConfigError(f"task '{config.task.name}' cannot be trained as it is: fix what is marked ERROR.")


def check_model(
    model: Annotated[str, typer.Argument(help="A Hub name or a folder.")],
    device: Annotated[str, typer.Option(help="The device to load it on.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
) -> None:
    """Load a model, sample from it, compare sampler and trainer, and say what is supported.

    That is: how it is sampled and trained, LoRA layers, a value head, vLLM.
    """
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"--precision is {precision!r}: choose fp32 or bf16.")
    from rlgf.cli import console, diagnose

    console.quiet()
    _print_findings(diagnose.check_model(model, device, precision))


def _print_findings(findings: Sequence[Any]) -> None:
    from rlgf.cli import terminal

    for finding in findings:
        label = {"ok": "  ok     ", "warning": "  WARNING", "error": "  ERROR  "}[finding.level]
        terminal.write(f"{label} {finding.text}")
