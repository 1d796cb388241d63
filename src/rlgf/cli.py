"""The command line: `rlgf train`, `compare`, `evaluate`, `score` and more (`rlgf --help`).

Libraries that take seconds to import are imported inside the commands, so that `--help` and a mistyped key answer at once.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rlgf import __version__, algorithms
from rlgf.config import FREE, Config, dump, from_dict, override, parse_assignment, read_yaml
from rlgf.display import visible
from rlgf.errors import RunError, UserError, unknown
from rlgf.recipes import RECIPES, recipe
from rlgf.recipes import controls as recipe_controls

COMMAND_LINE = "command line"  # where a mistake was made, for its error
BASELINES = ("zero_shot", "sft", "guide")
INTERRUPTED = 130  # what typer makes of Ctrl-C


class InterruptedRunError(Exception):
    """Ctrl-C while a run was trained; says what the same command will do."""


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Reinforcement learning from guided feedback: a policy and a guide take turns writing; the policy learns to win.",
    epilog="Start with: rlgf compare quickstart --out runs/quickstart",
)

Recipe = Annotated[str, typer.Argument(help="A recipe (`rlgf list`) or a YAML file.", metavar="RECIPE_OR_YAML")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Any other field, as section.field=value (`rlgf show config` lists them).")
]
Out = Annotated[Path | None, typer.Option(help="The folder to write to.", metavar="DIR")]
Stages = Annotated[Path | None, typer.Option(help="Where stages are kept and found. Default: OUT/stages.", metavar="DIR")]
Data = Annotated[str | None, typer.Option(help="The task's data: Hub name, local folder or .jsonl[.gz] file.")]
Policy = Annotated[str | None, typer.Option(help="Start from this model (Hub name or folder), skipping lm and sft.")]
GuideSpec = Annotated[
    str | None,
    typer.Option(
        "--guide", help="sft, trained, model:PATH, run:DIR, server:MODEL@URL, human, references or python:module:name."
    ),
]
Offline = Annotated[bool, typer.Option("--offline", help="Answers of a guide outside this process from the cache alone.")]
Seed = Annotated[int | None, typer.Option(help="All randomness follows from it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the whole plan and exit.")]
Iterations = Annotated[int | None, typer.Option(help="Iterations of writing and learning.")]
Beta = Annotated[float | None, typer.Option(help="Probability of a rollin, in every phase.")]
Alpha = Annotated[float | None, typer.Option(help="lols: weight of A^π; d2lols: iterations of AggreVaTeD before PPO++.")]


def read_config(
    source: str,
    overrides: list[str] | None = None,
    *,
    algorithm: str | None = None,
    beta: float | None = None,
    alpha: float | None = None,
    guide: str | None = None,
    policy: str | None = None,
    data: str | None = None,
    iterations: int | None = None,
    seed: int | None = None,
    offline: bool = False,
) -> Config:
    """A recipe or a YAML file (over the recipe it names), changed by flags and assignments."""
    if source in RECIPES:
        config = recipe(source)
    elif source.endswith((".yaml", ".yml")) or Path(source).is_file():
        config = from_yaml(Path(source))
    else:
        raise unknown("recipe", source, RECIPES)
    if algorithm is not None and algorithm not in algorithms.NAMES:
        raise unknown("algorithm", algorithm, algorithms.NAMES)
    name = algorithm or config.algorithm.name
    changes: list[tuple[str, Any]] = [
        (key, value)
        for key, value in {
            "algorithm.name": algorithm,
            "algorithm.beta_guide": beta,
            "algorithm.beta_policy": beta,
            "guide.spec": guide,
            "policy": policy,
            "task.data": data,
            "ppo.iterations": iterations,
            "seed": seed,
            "guide.offline": offline or None,
        }.items()
        if value is not None
    ]
    if alpha is not None:
        changes.append(alpha_change(name, alpha))
    changes += [parse_assignment(text) for text in overrides or []]
    return override(config, changes, COMMAND_LINE)


def from_yaml(path: Path) -> Config:
    """A YAML file: a whole config, or changes to the recipe that its key `recipe` names."""
    values = read_yaml(path)
    base = values.get("recipe")
    if base not in RECIPES:
        return from_dict(values, str(path))
    flat: list[tuple[str, Any]] = []

    def walk(mapping: dict[str, Any], prefix: str) -> None:
        for key, value in mapping.items():
            free = f"{prefix}{key}" in FREE
            if isinstance(value, dict) and not free:
                walk(value, f"{prefix}{key}.")  # pyright: ignore[reportUnknownArgumentType]
            else:
                flat.append((f"{prefix}{key}", value))

    walk(values, "")
    return override(recipe(base), flat, str(path))


def alpha_change(name: str, alpha: float) -> tuple[str, Any]:
    """Which field `--alpha` means for an algorithm."""
    if name == "lols":
        return "algorithm.mixing_weight", alpha
    if name == "d2lols":
        if alpha != alpha // 1:
            raise UserError(f"--alpha is {alpha:g}, but for d2lols it counts iterations: give a whole number.")
        return "algorithm.switch_iteration", int(alpha)
    raise UserError(f"--alpha means nothing to {name}: it belongs to lols and d2lols.")


@app.command()
def train(
    recipe_or_yaml: Recipe,
    overrides: Overrides = None,
    algorithm: Annotated[str | None, typer.Option(help=", ".join(algorithms.NAMES))] = None,
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
        bool, typer.Option("--profile", help="Also say where the time of an iteration goes: RUN/profile/ has a chrome trace.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """One run: make or reuse the stages, train, evaluate. Continues from its last checkpoint."""
    config = read_config(
        recipe_or_yaml, overrides, algorithm=algorithm, beta=beta, alpha=alpha, guide=guide, policy=policy, data=data,
        iterations=iterations, seed=seed, offline=offline,
    )  # fmt: skip
    if profile:
        config = override(config, [("runtime.profile", True)], COMMAND_LINE)
    from rlgf import console, pipeline, refusals, terminal
    from rlgf.runs import RunDirectory

    console.set_up_machine(config)
    if dry_run:
        console.print_plan(config, refusals.check_to_train(config))
        return
    target = out or Path("runs") / f"{config.recipe}-{config.algorithm.name}-seed{config.seed}"
    directory = RunDirectory(target, config)
    if directory.results is not None:
        console.report(f"{target} is finished: these are its results. For a new run choose another --out.")
    else:
        watch = console.Watch(may_draw=config.guide.spec != "human")
        try:
            pipeline.train(config, target, stages, terminal.once(), watch)
        except KeyboardInterrupt:
            raise InterruptedRunError(directory.outlook(config)) from None
        finally:
            watch.close()
    results = json.loads((target / "results.json").read_text())
    console.print_metrics({name: float("nan") if v is None else v for name, v in results["evaluation"].items()})
    console.report(f"{target}: policy/, results.json, metrics.jsonl, rollouts.jsonl; see texts with `rlgf write {target}`")


@app.command()
def compare(
    recipe_or_yaml: Recipe,
    overrides: Overrides = None,
    algorithms_: Annotated[str, typer.Option("--algorithms", help="Comma-separated; default: all.")] = "",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0",
    jobs: Annotated[int, typer.Option(help="Runs at a time, each in a process of its own, sharing the cores.")] = 1,
    controls: Annotated[bool, typer.Option(help="Whether the recipe's control runs are made too.")] = True,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="Every algorithm again with each value of a setting, as kl.coefficient=0,0.01; may be repeated."),
    ] = None,
    dry_run: DryRun = False,
    guide: GuideSpec = None,
    policy: Policy = None,
    data: Data = None,
    iterations: Iterations = None,
    out: Out = None,
) -> None:
    """Several algorithms and their baselines: tables, figures, texts side by side; finished runs are reused."""
    config = read_config(recipe_or_yaml, overrides, guide=guide, policy=policy, data=data, iterations=iterations)
    names = [name.strip() for name in algorithms_.split(",") if name.strip()] or list(algorithms.NAMES)
    for name in names:
        if name not in algorithms.NAMES:
            raise unknown("algorithm", name, algorithms.NAMES)
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds is '{seeds}', but must be whole numbers with commas between them.") from None
    from rlgf import compare as comparing
    from rlgf import console, entries, refusals, terminal
    from rlgf.report import written_in

    refusals.check_to_train(config)
    console.set_up_machine(config)
    target = out or Path("runs") / config.recipe
    varied = entries.read_varied(config, vary or [])
    rows = entries.entries(config, names, recipe_controls(config) if controls else {}, varied)
    if dry_run:
        for row in rows:
            planned = override(config, [*row.changes.items(), ("seed", numbers[0])])
            console.print_plan(planned, refusals.check_to_train(planned), row.title)
        console.report(f"{len(rows)} rows, each with seeds {seeds} (runs at a time: {jobs}), and the baselines, in {target}")
        return
    watch = console.Watch(may_draw=config.guide.spec != "human")
    try:
        results = comparing.compare(config, rows, numbers, target, jobs, terminal.once(), watch)
    finally:
        watch.close()
    console.print_comparison(results)
    console.report(f"{target}: {', '.join(written_in(target))}, results.json, runs/ ({results['seconds_of_this_call']:.0f} s)")


@app.command()
def report(
    comparison: Annotated[Path, typer.Argument(help="A comparison's folder, with its results.json.", metavar="DIR")],
    out: Annotated[Path | None, typer.Option(help="Where to write instead of there.", metavar="DIR")] = None,
) -> None:
    """Draw a comparison's tables, figures and texts side by side again, from its results.json alone."""
    from rlgf import terminal
    from rlgf.data import read_json
    from rlgf.report import write_report, written_in

    path = comparison / "results.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the folder of a finished `rlgf compare`.")
    results = read_json(path)
    if "rows" not in results:
        raise UserError(f"{comparison} is a single run, and has nothing to compare: give the folder of a `rlgf compare`.")
    target = out or comparison
    write_report(results, target)
    terminal.report(f"{target}: {', '.join(written_in(target))}")


def _stage(name: str, source: str, overrides: list[str] | None, policy: str | None, data: str | None, seed: int | None,
           out: Path | None, stages: Path | None) -> None:  # fmt: skip
    config = read_config(source, overrides, policy=policy, data=data, seed=seed)
    from rlgf import console, refusals
    from rlgf import stages as making
    from rlgf.runs import require_writable

    refusals.check(config)
    console.set_up_machine(config)
    target = out or Path("runs") / f"{config.recipe}-{name}"
    shelf = stages or target.parent / "stages"
    require_writable(target.parent)
    make: dict[str, Any] = {"lm": making.lm_stage, "sft": making.sft_stage, "reward": making.reward_stage}
    if "preferences" in config.reward.names:
        from rlgf.preference_stage import preference_stage, try_pairs

        if name == "reward":
            try_pairs(config, shelf, console.report)
        make["reward"] = lambda config, shelf, report, target: preference_stage(config, shelf, report, "reward", target)
    if name == "sft" and not (config.sft.steps or config.sft.epochs):
        raise UserError("sft.steps and sft.epochs are 0: nothing would be trained. Set one of them.")
    if name == "sft" and policy:
        raise UserError("--policy skips the sft stage: give model.path=... to fine-tune that model.")
    folder = make[name](config, shelf, console.report, target)
    measured = json.loads((Path(folder) / "stage.json").read_text())["measured"]
    console.print_metrics(measured)
    console.report(f"{folder} is ready")


@app.command()
def lm(
    recipe_or_yaml: Recipe, overrides: Overrides = None, data: Data = None, seed: Seed = None, out: Out = None,
    stages: Stages = None,
) -> None:  # fmt: skip
    """Train a small language model on the task's raw text."""
    _stage("lm", recipe_or_yaml, overrides, None, data, seed, out, stages)


@app.command()
def sft(
    recipe_or_yaml: Recipe, overrides: Overrides = None, data: Data = None, seed: Seed = None, out: Out = None,
    stages: Stages = None,
) -> None:  # fmt: skip
    """Supervised fine-tuning on the task's targets; the result is what `--policy` takes."""
    _stage("sft", recipe_or_yaml, overrides, None, data, seed, out, stages)


@app.command()
def reward(
    recipe_or_yaml: Recipe, overrides: Overrides = None, data: Data = None, seed: Seed = None, out: Out = None,
    stages: Stages = None,
) -> None:  # fmt: skip
    """Train the reward: the n-gram classifier, or a reward model on preference pairs; the result is what reward.path takes."""
    _stage("reward", recipe_or_yaml, overrides, None, data, seed, out, stages)


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="A folder with an adapter, such as a run's policy/.")],
    out: Annotated[Path, typer.Option(help="Folder for the whole model.")],
) -> None:
    """Write the model that an adapter makes of its base weights, as a whole model of its own."""
    from rlgf import console, pipeline

    console.quiet()
    pipeline.merge(str(folder), out)
    console.report(f"{out} is ready")


@app.command()
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
        typer.Option(min=1, help="Also write this many texts for each prompt and keep the one the reward likes best."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Who compares with references: preferences, model:PATH or server:MODEL@URL.")
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
    """Fresh texts by a policy alone on held-out prompts, measured; or by a baseline of a run or recipe."""
    if baseline is not None and baseline not in BASELINES:
        raise unknown("baseline", baseline, BASELINES)
    if baseline is not None and policy is not None:
        raise UserError("--baseline and --policy both say whose texts are measured: give one of them.")
    if baseline == "guide" and best_of is not None:
        raise UserError("--best-of keeps the best texts of a policy, and a guide is none: leave it out.")
    folder = Path(run_or_recipe)
    is_run = (folder / "config.yaml").is_file()
    if not is_run and run_or_recipe not in RECIPES and not folder.is_file():
        hint = f"give one of those in {folder / 'runs'}" if (folder / "runs").is_dir() else "see `rlgf list`"
        raise UserError(f"{run_or_recipe} is neither a run (it has no config.yaml) nor a recipe: {hint}.")
    config = read_config(str(folder / "config.yaml") if is_run else run_or_recipe, overrides, data=data)
    if prompts is not None:
        config = override(config, [("evaluation.final_prompts", prompts)], COMMAND_LINE)
    if best_of is not None:
        config = override(config, [("evaluation.best_of", best_of)], COMMAND_LINE)
    if judge is not None:
        config = override(config, [("judge.spec", judge)], COMMAND_LINE)
    chosen = policy or (str(folder / "policy") if is_run and baseline is None else None)
    if is_run and chosen and policy is None and not (folder / "policy").is_dir():
        raise UserError(
            f"{folder} has no policy/ yet: finish the run with `rlgf train {folder / 'config.yaml'} --out {folder}`."
        )
    from rlgf import console, pipeline, terminal

    if json_out:
        _check_writable(json_out)
    console.set_up_machine(config)
    shelf = stages or default_stages(folder) if is_run else stages or Path("runs") / "stages"
    report = terminal.once()
    if baseline == "guide":
        found = pipeline.evaluate_guide_at(config, shelf, report)
    else:
        found = pipeline.evaluate_policy_at(config, chosen, shelf, report, zero_shot=baseline == "zero_shot")
    values = {**found["evaluation"], **{key: value for key, value in found.items() if key != "evaluation"}}
    _deliver(values, json_out, lambda: console.print_evaluation(found))


def default_stages(run: Path) -> Path:
    """Where a run's stages are: in its own folder, or in that of the comparison it belongs to."""
    own, shared = run / "stages", run.parent.parent / "stages"
    return shared if shared.is_dir() and not own.is_dir() else own


@app.command()
def score(
    file: Annotated[str, typer.Argument(help="JSON lines, plain or gzip; - is standard input.", metavar="FILE")],
    metrics: Annotated[
        str, typer.Option(help="Groups or keys with commas between them (`rlgf list`).")
    ] = "bleu,rouge,meteor,cider,distinct",
    json_out: Annotated[
        Path | None,
        typer.Option("--json", help="Also write all values to this file; -: print them instead.", metavar="FILE"),
    ] = None,
    stem: Annotated[bool, typer.Option("--stem", help="Porter stems for rouge1, rouge2, rougeL, rougeLsum.")] = False,
    bertscore_model: Annotated[str, typer.Option(help="Its encoder, a Hub name or a folder.")] = "roberta-large",
    bertscore_layers: Annotated[int | None, typer.Option(help="Which layer is compared; known for usual models.")] = None,
) -> None:
    """Score the texts of a file: each line has a `prediction` and its `references`, both raw text."""
    from rlgf import terminal
    from rlgf.scoring import score as scoring

    keys = scoring.choose(metrics)
    if json_out:
        _check_writable(json_out)
    lines = scoring.read_lines(file, keys)
    options = scoring.Options(stem, bertscore_model, bertscore_layers)
    scores = scoring.score(lines, keys, options, terminal.report)
    for warning in scores.warnings:
        terminal.report(f"warning: {warning}")

    def show() -> None:
        terminal.print_table([f"{len(lines):,} line{'s' * (len(lines) > 1)}", "score", "shown as"], scoring.table(scores))
        if scoring.SCALES.keys() & scores.corpus.keys():
            terminal.report("× 100 and × 10 are for people: functions and --json have 0 to 1, CIDEr-D 0 to 10.")

    _deliver(scoring.document(file, scores, options, len(lines)), json_out, show)


STANDARD_OUTPUT = Path("-")


def _deliver(found: dict[str, Any], json_out: Path | None, show: Callable[[], None]) -> None:
    """Show what was found, and write it for programs; `--json -` prints it for them, and then no table."""
    if json_out == STANDARD_OUTPUT:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    show()
    if json_out:
        from rlgf.data import write_json

        write_json(json_out, found)


def _check_writable(path: Path) -> None:
    """Find out before the work that its results cannot be written."""
    if path == STANDARD_OUTPUT:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: give --json a file in a folder of yours.")


@app.command()
def fetch(
    what: Annotated[str, typer.Argument(help="'spice': the jars of CoreNLP 3.6.0 (GPL-3.0), about 390 MB.")],
    source: Annotated[
        str | None,
        typer.Option("--from", help="A Maven repository's address, or a folder; default: `mvn` asks Maven Central."),
    ] = None,
) -> None:
    """Bring what no Python package brings into the cache folder, checked by its sums."""
    if what != "spice":
        raise unknown("thing to fetch", what, ["spice"])
    from rlgf import terminal
    from rlgf.scoring import jars

    folder = jars.fetch(source, terminal.report)
    terminal.report(f"{folder}: SPICE has its jars")


@app.command()
def write(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    iteration: Annotated[
        int | None, typer.Option(help="Which iteration, from 0 on; default: the last that was logged.")
    ] = None,
    count: Annotated[int, typer.Option(help="How many texts.")] = 5,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="Texts of the final evaluation, by the policy alone.")
    ] = False,
) -> None:
    """Print texts of a run, every token in the colour of its author and in brackets that name it."""
    from rlgf.runs import read_complete_lines

    path = run / ("evaluation.jsonl" if evaluation else "rollouts.jsonl")
    if not path.is_file():
        raise UserError(f"{path} does not exist: {run} is no run, or has not written any texts yet.")
    rows = read_complete_lines(path)
    known = sorted({row["iteration"] for row in rows})
    if not known:
        raise UserError(f"{path} holds no texts yet.")
    wanted = known[-1] if iteration is None else iteration
    if wanted not in known:
        raise UserError(f"{run} has no iteration {wanted}: it has {known[0]} to {known[-1]}.")
    from rlgf import console

    for row in [row for row in rows if row["iteration"] == wanted][:count]:
        console.print_rollout(row)


@app.command()
def show(
    what: Annotated[str, typer.Argument(help="An algorithm, a recipe, or 'config'.")],
    iterations: Annotated[int, typer.Option(help="Length of the training that is drawn.")] = 40,
    alpha: Alpha = None,
    beta: Beta = None,
    seed: Annotated[int, typer.Option(help="Draws the coins of lols mixed by iteration.")] = 0,
) -> None:
    """Draw an algorithm's phases over training, or print a recipe or every config key with its default."""
    if what == "config":
        defaults = dump(Config())
        typer.echo(defaults, nl=False)
        return
    if what in RECIPES:
        typer.echo(dump(recipe(what)), nl=False)
        return
    if what not in algorithms.NAMES:
        raise unknown("algorithm or recipe", what, [*algorithms.NAMES, *RECIPES, "config"])
    if iterations < 1:
        raise UserError(f"--iterations is {iterations}, but must be at least 1.")
    changes: list[tuple[str, Any]] = [("algorithm.name", what)]
    if beta is not None:
        changes += [("algorithm.beta_guide", beta), ("algorithm.beta_policy", beta)]
    if alpha is not None:
        changes.append(alpha_change(what, alpha))
    config = override(Config(), changes, COMMAND_LINE)
    from rlgf import console
    from rlgf.randomness import Purpose, uniforms

    coins = [float(uniforms(seed, Purpose.PHASE_COIN, number, 1)[0]) for number in range(iterations)]
    console.print_algorithm(config.algorithm.build(), iterations, coins)


check_app = typer.Typer(no_args_is_help=True, help="Validate a part before training with it.")
app.add_typer(check_app, name="check")


@check_app.command("guide")
def check_guide(
    spec: Annotated[str, typer.Argument(help="A guide, such as server:MODEL@URL.")],
    overrides: Overrides = None,
    prompt: Annotated[str, typer.Option(help="What it shall continue.")] = "The film begins in a quiet town where",
    prefix: Annotated[
        str, typer.Option(help="What another has written of the continuation.")
    ] = " nothing ever happens. One day",
    max_tokens: Annotated[int, typer.Option(help="Tokens of a sample.", min=1)] = 48,
    recipe_or_yaml: Annotated[
        str, typer.Option("--recipe", help="Whose guide settings and task's instruction to use.", metavar="RECIPE_OR_YAML")
    ] = "imdb-small",
) -> None:
    """Ask a guide: what works, with a sample, how long it takes, what a thousand texts cost, which algorithms it serves."""
    changes = ["task.min_new_tokens=0", f"task.max_new_tokens={max_tokens}", *(overrides or [])]
    config = read_config(recipe_or_yaml, changes, guide=spec)
    from rlgf import check, console

    console.quiet()
    findings = check.check_guide(config, prompt, prefix, Path("runs") / "stages", console.report)
    _print_findings(findings)
    if not any(finding.level == "ok" for finding in findings):
        raise UserError("this guide cannot be used: mend what is marked ERROR.")


@check_app.command("task")
def check_task(
    name: Annotated[str, typer.Argument(help="A task, a recipe, a YAML file, or your own as python:module:KIND.")],
    overrides: Overrides = None,
    data: Data = None,
    policy: Policy = None,
    stages: Stages = None,
) -> None:
    """Look at a task without a model: rewards finite, pure and not constant; targets continue their prompts and score well."""
    homes = {"embedded": "quickstart"}  # a task's name stands for the recipe with its numbers
    source = "prompts" if name.startswith("python:") else homes.get(name, name)
    if source not in RECIPES and not Path(source).is_file():
        raise unknown("task or recipe", name, [*RECIPES, *homes])
    named = [f"task.name={name}"] if name.startswith("python:") else []
    config = read_config(source, [*named, *(overrides or [])], data=data)
    if policy:
        config = override(config, [("model.path", policy)])
    from rlgf import check, console

    console.set_up_machine(config)
    try:
        findings = check.check_task(config, stages or Path("runs") / "stages", console.report)
    except UserError as error:
        small = f"{source}-small"
        if small not in RECIPES or config.model.path is None or "tokenizer" not in str(error):
            raise
        raise UserError(f"{error} Or check '{small}', the same task with a tokenizer that is made here.") from None
    _print_findings(findings)
    if any(finding.level == "error" for finding in findings):
        raise UserError(f"task '{config.task.name}' cannot be trained as it is: mend what is marked ERROR.")


def _print_findings(findings: Sequence[Any]) -> None:
    for finding in findings:
        mark = {"ok": "  ok     ", "warning": "  WARNING", "error": "  ERROR  "}[finding.level]
        typer.echo(f"{mark} {visible(finding.text)}")


@app.command("list")
def list_() -> None:
    """What there is to choose from: recipes, tasks, algorithms, guides, metrics."""
    from rlgf.scoring.functions import TEXT_FUNCTIONS
    from rlgf.scoring.score import ABOUT
    from rlgf.tasks import TASKS

    sections: dict[str, dict[str, str]] = {
        "recipes": {name: (make.__doc__ or "").split("\n")[0] for name, make in RECIPES.items()},
        "tasks": {name: (sys.modules[kind.build.__module__].__doc__ or "").split("\n")[0] for name, kind in TASKS.items()},
        "algorithms": {},
        "guides": {
            "sft": "the policy's starting point, sampled as guide.decoding says",
            "trained": "a model of its own, trained here (guide.model, guide.sft)",
            "model:PATH": "a Hub name or local folder, in this process, with any tokenizer",
            "run:DIR": "the policy that another run has trained",
            "server:MODEL@URL": "any OpenAI-compatible server; the key from $OPENAI_API_KEY (docs/guides.md)",
            "human": "you, at the terminal",
            "references": "the dataset's references; can begin texts (ppo_pp), not finish them",
            "python:module:name": "a function from requests to texts",
        },
        "metrics as rewards": {name: (make.__doc__ or "").split("\n")[0] for name, make in TEXT_FUNCTIONS.items()},
        "metrics of rlgf score": ABOUT,
    }
    for name in algorithms.NAMES:
        built = override(Config(), [("algorithm.name", name)]).algorithm.build()
        sections["algorithms"][name] = f"{built.title}: {built.summary}"
    for title, items in sections.items():
        typer.echo(title)
        for name, text in items.items():
            typer.echo(f"  {name:22}{text}")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Nothing happens before the commands."""


def main() -> None:
    """Entry point: errors that are ours are one sentence, with exit code 2 (asked wrongly) or 3 (failed while running)."""
    # Threads that wait shall sleep, not spin: as fast where the machine is free, twice as fast where it is shared. Read by
    # OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except UserError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 3)
    except InterruptedRunError as error:
        _fail(f"interrupted; {error}", INTERRUPTED)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _fail("interrupted; what is finished is kept, and the same command goes on from there.", INTERRUPTED)
        raise


def _fail(message: str, code: int) -> None:
    from rlgf import terminal

    terminal.fail(message)
    sys.exit(code)


if __name__ == "__main__":
    main()
