"""Commands that inspect and download: `rlgf list`, `show`, `samples`, `env`, `download`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlgf.algorithms.base import Algorithm
from rlgf.algorithms.registry import ALGORITHMS
from rlgf.cli.options import COMMAND_LINE, Alpha, Beta, alpha_change, beta_changes, check_writable, emit
from rlgf.errors import ConfigError, DataError, unknown
from rlgf.untrusted_text import describe_failure


def download(
    what: Annotated[str, typer.Argument(help="'spice': the jars of CoreNLP 3.6.0 (GPL-3.0), about 390 MB.")],
    source: Annotated[
        str | None,
        typer.Option("--from", help="A Maven repository's URL, or a folder; default: `mvn` and Maven Central."),
    ] = None,
) -> None:
    """Download files that no Python package provides into the cache folder.

    They are verified by checksum.
    """
    if what != "spice":
        raise unknown("download", what, ["spice"])
    from rlgf.cli import terminal
    from rlgf.text_metrics import jars

    folder = jars.fetch(source, terminal.report)
    terminal.report(f"{folder}: SPICE has its jars")


SHOWN = {"iteration", "index", "prompt", "spans", "switch_position", "ended_with_eos", "score"}
"""The entries of a completion that `rlgf samples` shows."""


def samples(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    iteration: Annotated[int | None, typer.Option(help="Iteration, counted from 0; default: the last one logged.")] = None,
    count: Annotated[int, typer.Option(help="Number of completions.", min=1)] = 5,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="Completions of the final evaluation, by the policy alone.")
    ] = False,
) -> None:
    """Print completions of a run, each span colored and bracketed by its origin."""
    from rlgf.cli import terminal
    from rlgf.runs.logs import read_rows

    path = run / ("evaluation.jsonl" if evaluation else "rollouts.jsonl")
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: {run} is not a run, or has no completions yet.")
    found = read_rows(path, lambda line: terminal.report(f"warning: {line}"), needs_check=False)
    rows = [row for row in found if row.keys() >= SHOWN]
    if len(rows) < len(found):
        terminal.report(f"warning: {path}: {len(found) - len(rows):,} lines of another form are left out")
    try:
        known = sorted({row["iteration"] for row in rows})
        if not known:
            raise ConfigError(f"{path} holds no completions yet.")
        chosen = known[-1] if iteration is None else iteration
        if chosen not in known:
            raise ConfigError(f"{run} has no iteration {chosen}: it has {known[0]} to {known[-1]}.")
        from rlgf.cli import console

        for row in [row for row in rows if row["iteration"] == chosen][:count]:
            console.print_rollout(row)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} has a line that is no completion of a run ({describe_failure(error)}): remove it.") from error


def show(
    what: Annotated[str, typer.Argument(help="An algorithm, a recipe, or 'config'.")],
    iterations: Annotated[int, typer.Option(help="Number of iterations to show.", min=1, max=100_000)] = 40,
    alpha: Alpha = None,
    beta: Beta = None,
    seed: Annotated[int, typer.Option(help="Seed of lols with mix=iteration.", min=0, max=2**63 - 1)] = 0,
) -> None:
    """Draw an algorithm's phases over training, or print a recipe or the default config."""
    if what not in ALGORITHMS:
        _show_config(what)
        return
    from rlgf.cli.terminal import print_algorithm
    from rlgf.randomness import Purpose, uniforms

    uniform_numbers = [float(uniforms(seed, Purpose.PHASE, number, 1)[0]) for number in range(iterations)]
    print_algorithm(_algorithm(what, alpha, beta), iterations, uniform_numbers)


def _show_config(what: str) -> None:
    """Print a recipe or, for 'config', the default config, as YAML."""
    from rlgf.cli import terminal
    from rlgf.config.loading import dump
    from rlgf.config.recipes import RECIPES, recipe
    from rlgf.config.schema import Config

    if what != "config" and what not in RECIPES:
        raise unknown("algorithm or recipe", what, [*ALGORITHMS, *RECIPES, "config"])
    terminal.write_block(dump(Config() if what == "config" else recipe(what)))


def _algorithm(name: str, alpha: float | None, beta: float | None) -> Algorithm:
    """Return an algorithm with the values of `--alpha` and `--beta`, otherwise its defaults."""
    if alpha is None and beta is None:  # the config's classes are slow to import
        return ALGORITHMS[name]().build()
    from rlgf.config.loading import override
    from rlgf.config.schema import Config

    changes: list[tuple[str, Any]] = [("algorithm.name", name)]
    if beta is not None:
        changes += beta_changes(beta)
    if alpha is not None:
        changes.append(alpha_change(name, alpha))
    return override(Config(), changes, COMMAND_LINE).algorithm.build()


def list_() -> None:
    """List the recipes, tasks, algorithms, guides and metrics."""
    from rlgf.cli import terminal
    from rlgf.config.recipes import RECIPES
    from rlgf.tasks.registry import TASKS
    from rlgf.text_metrics.as_rewards import TEXT_FUNCTIONS
    from rlgf.text_metrics.score import DESCRIPTIONS

    sections: dict[str, dict[str, str]] = {
        "recipes": {name: (make.__doc__ or "").split("\n")[0] for name, make in RECIPES.items()},
        "tasks": {name: (sys.modules[kind.build.__module__].__doc__ or "").split("\n")[0] for name, kind in TASKS.items()},
        "algorithms": {
            name: f"{built.title}: {built.summary}"
            for name, built in ((name, options().build()) for name, options in ALGORITHMS.items())
        },
        "guides": {
            "sft": "the policy's starting point, sampled as guide.sampling says",
            "trained": "a model of its own, trained here (guide.model, guide.sft)",
            "model:PATH": "a Hub name or local folder, in this process, with any tokenizer",
            "run:DIR": "the policy that another run has trained",
            "server:MODEL@URL": "any OpenAI-compatible server; the key from $OPENAI_API_KEY (docs/guides.md)",
            "human": "you, at the terminal",
            "references": "the dataset's references; can start completions (ppo_pp), not continue them",
            "FILE.py:name": "a function from requests to completions; also python:module:name",
        },
        "metrics as rewards": {name: (make.__doc__ or "").split("\n")[0] for name, make in TEXT_FUNCTIONS.items()},
        "metrics of rlgf score": DESCRIPTIONS,
    }
    for title, items in sections.items():
        terminal.write(title)
        for name, text in items.items():
            terminal.write(f"  {name:22}{text}")


def env(
    json_out: Annotated[
        Path | None,
        typer.Option("--json", help="Also write it to this file; -: print JSON instead.", metavar="FILE"),
    ] = None,
) -> None:
    """Print versions, processor, devices, kernels and Java, for a bug report.

    It holds no secrets, and no names of users, hosts or folders.
    """
    from rlgf.cli import terminal

    if json_out:
        check_writable(json_out)
    terminal.announce_loading()
    from rlgf.runs.machine import describe_environment

    found = describe_environment()
    emit(found, json_out, lambda: _print_environment(found))


def _print_environment(found: dict[str, Any]) -> None:
    """Print one line per version, device and other entry of `describe_environment`."""
    from rlgf.cli import terminal

    lines = {name: text or "not installed" for name, text in found["versions"].items()}
    lines["cuda"] = found["versions"]["cuda"] or "not in this torch"
    lines |= {name: str(found[name]) for name in ("platform", "processor", "cores", "threads")}
    lines["devices"] = ", ".join(f"{device['name']} ({device['memory_gib']:g} GiB)" for device in found["devices"])
    lines |= {"kernels": found["kernels"], "java": found["java"], "SPICE jars": found["spice_jars"]}
    lines["offline"] = ", ".join(name for name, is_set in found["offline"].items() if is_set) or "no"
    for name, text in lines.items():
        terminal.write(f"{name:13} {text}")
