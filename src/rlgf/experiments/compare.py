"""A comparison of several runs with the same task, prompts, completions used and evaluation.

Finished runs and stages are reused.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlgf.config.variants import ComparisonPlan, Variant
from rlgf.data.checksums import DamagedError, fingerprint, read_checked_json, write_checked_json
from rlgf.data.files import json_safe, write_json
from rlgf.data.lock import FolderLock
from rlgf.errors import ConfigError
from rlgf.experiments.processes import run_in_processes
from rlgf.pipeline.final_evaluation import evaluate_baselines
from rlgf.pipeline.preflight import check, check_to_train
from rlgf.pipeline.prepare import prepare_run
from rlgf.pipeline.resolve import ResolvedRun, resolve
from rlgf.pipeline.run import for_guide_evaluation, no_progress, train_run
from rlgf.pipeline.stage_cache import Report, StageCache, no_report
from rlgf.reports.report import write_report
from rlgf.runs.directory import RunDirectory, identifying_settings, read_results, require_writable
from rlgf.runs.failures import as_sentences
from rlgf.runs.identity import with_contents
from rlgf.trainer import Progress
from rlgf.types import FORMAT_VERSION
from rlgf.untrusted_text import as_file_name


@as_sentences()
def compare(
    plan: ComparisonPlan,
    out: Path,
    jobs: int = 1,
    report: Report = no_report,
    on_progress: Callable[[Progress], None] = no_progress,
) -> dict[str, Any]:
    """Run or reuse every row with every seed, and return the results.

    Runs are in subfolders of `out`; `results.json` and its report are written there. With `jobs`
    > 1, that many runs are executed at a time, each in a separate process.
    """
    check_target(out)

    def warn(line: str) -> None:
        report(f"warning: {line}")

    cache = StageCache(out / "stages", report)
    began = time.monotonic()
    folders = {(key, seed): out / "runs" / as_file_name(f"{key}-seed{seed}") for key, seed in plan.configs}
    directories = {place: RunDirectory(folders[place], config, warn=warn) for place, config in plan.configs.items()}
    runs = {place: resolve(config) for place, config in plan.configs.items()}
    waiting = [place for place in runs if directories[place].results is None]
    for directory in directories.values():  # also of finished runs: a comparison never mixes two inputs
        directory.check_identity()
    for place, run in runs.items():  # fail early: check all runs before any work
        (check_to_train if place in waiting else check)(run)
    require_writable(out)
    with FolderLock(out, "compares runs in", warn).held():
        baselines = [_baselines(resolve(config), out, cache) for config in plan.baselines.values()]
        for place in runs:
            if place not in waiting:
                report(f"{place[0]} seed {place[1]}: reusing {folders[place].name}")
        if jobs > 1:
            run_in_processes([(runs[place], directories[place]) for place in waiting], cache, jobs)
        else:
            for place in waiting:
                report(f"{place[0]} seed {place[1]}")
                train_run(runs[place], directories[place], cache, on_progress, with_baselines=False)
        return _write_results(plan, directories, baselines, out, time.monotonic() - began)


def check_target(out: Path) -> None:
    """Raise `ConfigError` if a folder cannot hold a comparison."""
    if (out / "config.yaml").exists():
        raise ConfigError(f"{out} holds a single run: choose another --out for a comparison.")


def _baselines(run: ResolvedRun, out: Path, cache: StageCache) -> dict[str, Any]:
    """Return the baselines of one seed, evaluated once.

    Any algorithm that queries the guide can prepare them.
    """
    identity = fingerprint({"run": with_contents(identifying_settings(run.config))})
    path = out / "baselines" / f"seed{run.trainer.seed}.json"
    try:
        found = read_checked_json(path) if path.is_file() else {}
    except DamagedError as error:
        cache.report(f"warning: {error}: the baselines are evaluated again")
        found = {}
    if found.get("fingerprint") == identity:
        return found["rows"]
    run = for_guide_evaluation(run)
    check_to_train(run)
    rows = evaluate_baselines(prepare_run(run, cache), run.policy, cache)
    write_checked_json(path, json_safe({"fingerprint": identity, "rows": rows}))
    return rows


def _write_results(
    plan: ComparisonPlan, directories: Mapping[tuple[str, int], RunDirectory], baselines: Sequence[Mapping[str, Any]],
    out: Path, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Collect the results of all runs, write them with their report, and return them."""
    table: list[dict[str, Any]] = []
    for key in baselines[0]:
        table += _rows(key, [baseline[key] for baseline in baselines], [])
    for row in plan.rows:
        found = [read_results(directories[row.key, seed].folder / "results.json") for seed in plan.seeds]
        curves = [_curve(directories[row.key, seed].read_metrics()) for seed in plan.seeds]
        table += _rows(row.key, [{**result, "title": row.title} for result in found], curves, row)
    first = read_results(directories[plan.rows[0].key, plan.seeds[0]].folder / "results.json")
    results = {
        "format_version": FORMAT_VERSION,
        "recipe": plan.recipe,
        "seeds": list(plan.seeds),
        "task": plan.task,
        "evaluation_prompts": plan.evaluation_prompts,
        "rows": table,
        **({"varied": dict(plan.varied)} if plan.varied else {}),
        "machine": first["machine"],
        **{key: first[key] for key in ("judge", "output_perplexity_model") if key in first},
        "seconds_of_this_call": seconds,
    }
    results = json_safe(results)  # a report redrawn from the file must be the same
    write_json(out / "results.json", results)
    write_report(results, out)
    return results


def _rows(
    key: str, results: Sequence[Mapping[str, Any]], curves: Sequence[Sequence[Mapping[str, Any]]], entry: Variant | None = None
) -> list[dict[str, Any]]:
    """Return the row of one policy and, if there was one, its best-of-n row."""
    rows = [_row(key, results, curves)]
    if entry is not None and entry.algorithm:
        rows[0]["algorithm"] = entry.algorithm
    if all("best_of" in result for result in results):
        title = f"{results[0]['title']}, best of {results[0]['best_of']['samples']}"
        best = [{"completions_used": result["completions_used"], **result["best_of"], "title": title} for result in results]
        rows.append(_row(f"{key}_best_of", best, []))
    if entry is not None and entry.varied:
        rows = [{**row, "varied": dict(entry.varied)} for row in rows]
    return rows


def _row(key: str, results: Sequence[Mapping[str, Any]], curves: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    splits, first = results[0].get("evaluations", {}), results[0]
    return {
        "key": key,
        "title": first["title"],
        "sampling": first["sampling"],
        "completions_used": first["completions_used"],
        "metrics": _columns([result["evaluation"] for result in results]),
        **(
            {"splits": {split: _columns([result["evaluations"][split] for result in results]) for split in splits}}
            if splits
            else {}
        ),
        "training_seconds": [result.get("training_seconds") for result in results],
        "curves": [list(curve) for curve in curves],
        **({"examples": first["examples"]} if "examples" in first else {}),
    }


def _columns(evaluations: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return each metric's values, one per seed."""
    return {name: [evaluation[name] for evaluation in evaluations] for name in evaluations[0]}


def _curve(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the evaluations on the validation split during training."""
    return [
        {**row["evaluation"], "iteration": row["iteration"] + 1, "completions": row["completions"]}
        for row in metrics
        if "evaluation" in row
    ]
