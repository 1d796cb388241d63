"""Commands for several runs: `rlgf compare` and `rlgf report`."""

from pathlib import Path
from typing import Annotated

import typer

from rlgf.algorithms.registry import ALGORITHMS
from rlgf.cli.options import Data, DryRun, GuideSpec, Iterations, Out, Overrides, Policy, Recipe, SftFrom, read_typed_config
from rlgf.errors import ConfigError, DataError, unknown
from rlgf.untrusted_text import as_file_name, describe_failure, shorten


def compare(
    recipe_or_yaml: Recipe,
    overrides: Overrides = None,
    algorithms_: Annotated[str, typer.Option("--algorithms", help="Comma-separated; default: all.")] = "",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0",
    jobs: Annotated[
        int, typer.Option(help="Runs at a time, each in a process of its own, sharing the cores.", min=1, max=1024)
    ] = 1,
    controls: Annotated[bool, typer.Option(help="Also run the recipe's control runs.")] = True,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="Every algorithm again with each value of a setting, as kl.coefficient=0,0.01; may be repeated."),
    ] = None,
    dry_run: DryRun = False,
    guide: GuideSpec = None,
    policy: Policy = None,
    sft_from: SftFrom = None,
    data: Data = None,
    iterations: Iterations = None,
    out: Out = None,
) -> None:
    """Compare several algorithms and their baselines: tables, figures, completions side by side.

    Finished runs are reused.
    """
    given = read_typed_config(
        recipe_or_yaml, overrides, guide=guide, policy=policy, sft_from=sft_from, data=data, iterations=iterations
    )
    config = given.config
    names = list(dict.fromkeys(name.strip() for name in algorithms_.split(",") if name.strip()))
    names = names or [name for name, options in ALGORITHMS.items() if options().build().baseline is None]
    for name in names:
        if name not in ALGORITHMS:
            raise unknown("algorithm", name, ALGORITHMS)
    try:
        numbers = list(dict.fromkeys(int(seed) for seed in seeds.split(",")))
        if not all(0 <= number < 2**63 for number in numbers):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--seeds is '{shorten(seeds, 60)}', but must be whole numbers from 0 to 2^63 - 1 separated by commas."
        ) from None
    from rlgf.cli import console, terminal
    from rlgf.config import unread, variants
    from rlgf.config.base import to_dict
    from rlgf.config.loading import override
    from rlgf.config.recipes import controls as recipe_controls
    from rlgf.experiments import compare as comparing
    from rlgf.pipeline.preflight import check_to_train
    from rlgf.pipeline.prepare import try_run
    from rlgf.pipeline.resolve import resolve
    from rlgf.reports.report import report_files

    target = out or Path("runs") / as_file_name(config.recipe)
    comparing.check_target(target)
    check_to_train(resolve(config))
    console.configure_runtime(config)
    varied = variants.parse_vary(config, vary or [])
    rows = variants.build_variants(config, names, recipe_controls(config) if controls else {}, varied)
    settings = [*given.typed, *(unread.TypedSetting(key, (key,), "--vary") for key in varied)]
    unread.require_read_in_comparison(settings, config, [override(config, [*row.changes.items()]) for row in rows])
    if dry_run:
        tried: set[str] = set()
        for row in rows:
            planned = override(config, [*row.changes.items(), ("seed", numbers[0])])
            run = resolve(planned)
            check_to_train(run)
            console.print_plan(planned, run.algorithm, row.title)
            parts = [to_dict(planned)[part] for part in ("policy", "task", "model", "reward", "preferences", "judge", "guide")]
            key = repr((*parts, run.guide.is_needed, run.algorithm.needs_guide_rollout))
            if key not in tried:  # most rows have the same data, reward and guide
                console.print_trial(try_run(run, terminal.report))
            tried.add(key)
        console.report(f"{len(rows)} rows, each with seeds {seeds} (runs at a time: {jobs}), and the baselines, in {target}")
        return
    plan = variants.plan_comparison(config, rows, numbers)
    watch = console.ProgressReporter(may_draw=config.guide.spec != "human")
    try:
        results = comparing.compare(plan, target, jobs, terminal.report_reuse_once(), watch)
    finally:
        watch.close()
    console.print_comparison(results)
    console.report(
        f"{target}: {', '.join(report_files(target))}, results.json, runs/ ({results['seconds_of_this_call']:.0f} s)"
    )


def report(
    comparison: Annotated[
        Path, typer.Argument(help="The folder of a comparison or of a run, with its results.json.", metavar="DIR")
    ],
    out: Annotated[Path | None, typer.Option(help="Where to write instead of there.", metavar="DIR")] = None,
) -> None:
    """Redraw the tables, figures and completions of a comparison, or of a single run.

    Those of a comparison are made from its results.json alone.
    """
    from rlgf.cli import terminal
    from rlgf.data.files import read_json, require_format
    from rlgf.reports.report import report_files, write_report, write_run_report

    path = comparison / "results.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give the folder of a finished `rlgf compare` or `rlgf train`.")
    results, target = read_json(path), out or comparison
    try:
        require_format(results, path)
        if "rows" not in results:
            write_run_report(comparison, target)
        else:
            write_report(results, target)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DataError(f"{path} holds no results of `rlgf compare` ({describe_failure(error)}): make them again.") from error
    terminal.report(f"{target}: {', '.join(report_files(target))}")
