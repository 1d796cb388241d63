"""A comparison of several runs with the same task, prompts, completions used and evaluation.

Finished runs and stages are reused.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlgf.config.loading import dump, override
from rlgf.config.schema import Config
from rlgf.data.files import json_safe, read_complete_lines, read_json, write_json
from rlgf.errors import ConfigError, TrainingError
from rlgf.experiments.report import write_report
from rlgf.experiments.variants import Variant, numeric_setting
from rlgf.pipeline.final_evaluation import evaluate_baselines
from rlgf.pipeline.preflight import check
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.run import Report, guide_evaluation_config, train
from rlgf.pipeline.stage_cache import fingerprint, no_report
from rlgf.runs.directory import RunDirectory, require_writable
from rlgf.trainer import Progress
from rlgf.types import FORMAT_VERSION


def compare(
    config: Config,
    rows: Sequence[Variant],
    seeds: Sequence[int],
    out: Path,
    jobs: int = 1,
    report: Report = no_report,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Run or reuse every row with every seed, and return the results.

    Runs are in subfolders of `out`; `results.json` and its report are written there. With `jobs`
    > 1, that many runs are executed at a time, each in a separate process.
    """
    if not rows or not seeds:
        raise ConfigError("nothing to compare: give at least one algorithm and one seed.")
    if (out / "config.yaml").exists():
        raise ConfigError(f"{out} holds a single run: choose another --out for a comparison.")
    stages = out / "stages"
    started = time.monotonic()
    configs = {(row.key, seed): override(config, [*row.changes.items(), ("seed", seed)]) for row in rows for seed in seeds}
    folders = {(key, seed): out / "runs" / f"{key}-seed{seed}" for key, seed in configs}
    for place, changed in configs.items():  # fail early: check all runs before any work
        RunDirectory(folders[place], changed)
        check(changed)
    require_writable(out)
    baselines = [_baselines(override(config, [("seed", seed)]), out, stages, report) for seed in seeds]
    waiting = [place for place in configs if not (folders[place] / "results.json").is_file()]
    for place in configs:
        if place not in waiting:
            report(f"{place[0]} seed {place[1]}: reusing {folders[place].name}")
    if jobs > 1:
        _run_in_processes([(configs[place], folders[place]) for place in waiting], stages, jobs, report)
    else:
        for key, seed in waiting:
            report(f"{key} seed {seed}")
            train(configs[key, seed], folders[key, seed], stages, report, watch)
    return _write_results(config, rows, seeds, folders, baselines, out, time.monotonic() - started)


def _baselines(config: Config, out: Path, stages: Path, report: Report) -> dict[str, Any]:
    """Return the baselines of one seed, evaluated once.

    Any algorithm that queries the guide can prepare them.
    """
    guide_config = guide_evaluation_config(config)
    key = fingerprint({"config": dump(override(guide_config, [("runtime.threads", 0)]))})
    path = out / "baselines" / f"seed{config.seed}.json"
    if path.is_file() and read_json(path).get("fingerprint") == key:
        return read_json(path)["rows"]
    rows = evaluate_baselines(prepare(guide_config, stages, report), stages, report)
    write_json(path, json_safe({"fingerprint": key, "rows": rows}))
    return rows


def _run_in_processes(runs: Sequence[tuple[Config, Path]], stages: Path, jobs: int, report: Report) -> None:
    """Run each config in a separate process, `jobs` at a time.

    The cores are divided among them. Raises `TrainingError` if a run fails.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    waiting, running = list(runs), dict[Path, subprocess.Popen[str]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                config, folder = waiting.pop(0)
                RunDirectory(folder, config).create(config)
                command = [sys.executable, "-m", "rlgf", "train", str(folder / "config.yaml"), "--out", str(folder)]
                command += ["--stages", str(stages), f"runtime.threads={threads}"]
                log = (folder / "log.txt").open("w")
                running[folder] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
                log.close()
                report(f"started {folder.name}")
            time.sleep(0.2)
            for folder, process in list(running.items()):
                if process.poll() is not None:
                    del running[folder]
                    if process.returncode:
                        tail = (folder / "log.txt").read_text().strip().splitlines()[-1:]
                        raise TrainingError(f"{folder.name} ended with exit code {process.returncode}: {' '.join(tail)}")
                    report(f"finished {folder.name} ({len(waiting) + len(running)} to go)")
    finally:
        for process in running.values():
            process.terminate()


def _write_results(
    config: Config, rows: Sequence[Variant], seeds: Sequence[int], folders: Mapping[tuple[str, int], Path],
    baselines: Sequence[Mapping[str, Any]], out: Path, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    table: list[dict[str, Any]] = []
    for key in baselines[0]:
        table += _rows(key, [baseline[key] for baseline in baselines], [])
    settings = dict.fromkeys(setting for row in rows for setting in row.varied or {})
    for row in rows:
        found = [read_json(folders[row.key, seed] / "results.json") for seed in seeds]
        curves = [_curve(folders[row.key, seed] / "metrics.jsonl") for seed in seeds]
        table += _rows(row.key, [{**result, "title": row.title} for result in found], curves, row)
    first = read_json(folders[rows[0].key, seeds[0]] / "results.json")
    results = {
        "format_version": FORMAT_VERSION,
        "recipe": config.recipe,
        "seeds": list(seeds),
        "task": config.task.name,
        "evaluation_prompts": config.evaluation.final_prompts,
        "rows": table,
        **({"varied": {setting: numeric_setting(config, setting) for setting in settings}} if settings else {}),
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


def _curve(path: Path) -> list[dict[str, Any]]:
    """Return the evaluations on the validation split during training."""
    return [
        {**row["evaluation"], "iteration": row["iteration"] + 1, "completions": row["completions"]}
        for row in read_complete_lines(path)
        if "evaluation" in row
    ]
