"""Commands that evaluate: `rlgf evaluate` and `rlgf score`."""

from pathlib import Path
from typing import Annotated

import typer

from rlgf.cli.options import (
    BASELINES,
    COMMAND_LINE,
    Data,
    Overrides,
    Policy,
    Stages,
    check_writable,
    default_stages,
    emit,
    read_config,
)
from rlgf.errors import ConfigError, unknown

ROUGE_TOKENIZERS = ("latin", "unicode")

ALL_PROMPTS = 10**9  # more than any file has


def evaluate(
    run_or_recipe: Annotated[str, typer.Argument(help="A run's folder, or a recipe or YAML file with --policy.")],
    overrides: Overrides = None,
    policy: Policy = None,
    data: Data = None,
    prompts: Annotated[
        int | None, typer.Option(help="Held-out prompts, of the test split and of others that the task reports.")
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(min=1, help="Also sample this many completions per prompt and keep the one with the highest reward."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Judge that compares with references: preferences, model:PATH or server:MODEL@URL.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Instead of a policy: zero_shot (the model before SFT), sft or guide.")
    ] = None,
    stages: Stages = None,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", help="Also write the metrics to this file; -: print them instead.", metavar="FILE"),
    ] = None,
) -> None:
    """Evaluate a policy, or a baseline of a run or recipe, on held-out prompts.

    New completions are sampled from the policy alone. With --data a run is measured on all rows of
    another file.
    """
    from rlgf.config.loading import override
    from rlgf.config.recipes import RECIPES

    if baseline is not None and baseline not in BASELINES:
        raise unknown("baseline", baseline, BASELINES)
    if baseline is not None and policy is not None:
        raise ConfigError("--baseline and --policy both choose the model to evaluate: give one of them.")
    if baseline == "guide" and best_of is not None:
        raise ConfigError("--best-of selects completions of a policy, and --baseline=guide has none: leave it out.")
    folder = Path(run_or_recipe)
    is_run = (folder / "config.yaml").is_file()
    if not is_run and run_or_recipe not in RECIPES and not folder.is_file():
        hint = f"give one of those in {folder / 'runs'}" if (folder / "runs").is_dir() else "see `rlgf list`"
        raise ConfigError(f"{run_or_recipe} is neither a run (it has no config.yaml) nor a recipe: {hint}.")
    test_data = data if is_run else None
    config = read_config(str(folder / "config.yaml") if is_run else run_or_recipe, overrides, data=None if is_run else data)
    if test_data is not None and prompts is None:
        prompts = ALL_PROMPTS
    if prompts is not None:
        config = override(config, [("evaluation.final_prompts", prompts)], COMMAND_LINE)
    if best_of is not None:
        config = override(config, [("evaluation.best_of", best_of)], COMMAND_LINE)
    if judge is not None:
        config = override(config, [("judge.spec", judge)], COMMAND_LINE)
    chosen = policy or (str(folder / "policy") if is_run and baseline is None else None)
    if is_run and chosen and policy is None and not (folder / "policy").is_dir():
        raise ConfigError(
            f"{folder} has no policy/ yet: finish the run with `rlgf train {folder / 'config.yaml'} --out {folder}`."
        )
    from rlgf.cli import console, terminal
    from rlgf.pipeline import run
    from rlgf.runs.directory import verify_run

    if is_run:
        verify_run(folder)
    if json_out:
        check_writable(json_out)
    console.configure_runtime(config)
    stage_folder = stages or default_stages(folder) if is_run else stages or Path("runs") / "stages"
    results = run.evaluate(config, chosen, stage_folder, terminal.report_reuse_once(), baseline, test_data)
    values = {**results["evaluation"], **{key: value for key, value in results.items() if key != "evaluation"}}
    emit(values, json_out, lambda: console.print_evaluation(results))


def score(
    file: Annotated[str, typer.Argument(help="JSON lines, plain or gzip; - is standard input.", metavar="FILE")],
    metrics: Annotated[
        str, typer.Option(help="Comma-separated groups or keys (`rlgf list`).")
    ] = "bleu,rouge,meteor,cider,distinct",
    json_out: Annotated[
        Path | None,
        typer.Option("--json", help="Also write all values to this file; -: print them instead.", metavar="FILE"),
    ] = None,
    stem: Annotated[bool, typer.Option("--stem", help="Porter stems for rouge1, rouge2, rougeL, rougeLsum.")] = False,
    rouge_tokenizer: Annotated[
        str, typer.Option(help="Words of rouge1 to rougeLsum: latin (a to z and digits, as published) or unicode.")
    ] = "latin",
    bertscore_model: Annotated[str, typer.Option(help="Encoder, a Hub name or a folder.")] = "roberta-large",
    bertscore_layers: Annotated[int | None, typer.Option(help="Layer to compare; common models have a default.", min=1)] = None,
) -> None:
    """Score the predictions of a file with text metrics.

    Each line has a `prediction` and its `references`, both raw text.
    """
    from rlgf.cli import terminal
    from rlgf.text_metrics import score as scoring

    keys = scoring.resolve_metric_names(metrics)
    if json_out:
        check_writable(json_out)
    lines = scoring.read_lines(file, keys)
    if rouge_tokenizer not in ROUGE_TOKENIZERS:
        raise unknown("tokenizer of ROUGE", rouge_tokenizer, ROUGE_TOKENIZERS)
    options = scoring.Options(stem, "unicode" if rouge_tokenizer == "unicode" else "latin", bertscore_model, bertscore_layers)
    scores = scoring.score(lines, keys, options, terminal.report)
    for warning in scores.warnings:
        terminal.report(f"warning: {warning}")

    def show() -> None:
        terminal.print_table([f"{len(lines):,} line{'s' * (len(lines) > 1)}", "score", "shown as"], scoring.table(scores))
        if scoring.SCALES.keys() & scores.corpus.keys():
            terminal.report("× 100 and × 10 apply to this table only: functions and --json return 0 to 1, CIDEr-D 0 to 10.")

    emit(scoring.document(file, scores, options, len(lines)), json_out, show)
