"""Terminal output: progress, tables, plans, and completions colored by origin.

Data goes to standard output, everything else to standard error. Model output is untrusted:
control characters are escaped, and it is not parsed as markup.
"""

import ctypes
import math
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rlgf.algorithms.base import Algorithm
from rlgf.cli.terminal import Part, describe_baseline, describe_phases, escape_log_lines, log, out, print_table, report, write
from rlgf.config.schema import Config
from rlgf.config.unread import describe_unread
from rlgf.errors import INPUT_ERRORS
from rlgf.interrupts import set_grace
from rlgf.kernels import dispatch
from rlgf.models import lora
from rlgf.models.loading import count_parameters, from_pretrained, shape_config
from rlgf.pipeline.preflight import training_warnings
from rlgf.pipeline.prepare import Trial
from rlgf.reports.report import summary_lines
from rlgf.reports.tables import table_rows
from rlgf.runs.machine import choose_device, choose_num_threads, describe_runtime
from rlgf.runs.progress import ProgressLines, Step, with_interval
from rlgf.types import POLICY

STYLES = {"policy": "bold blue", "guide": "bold dark_orange"}


def configure_runtime(config: Config, announce: bool = True) -> None:
    """Set up threads, kernels, memory allocation and library logging.

    `runtime.threads` = 0 uses OMP_NUM_THREADS, or all cores. `announce` prints the device,
    precision and threads, for commands that do not print them themselves.
    """
    set_grace(config.runtime.grace_seconds)
    torch.set_num_threads(choose_num_threads(config.runtime.threads)[0])
    dispatch.select(config.runtime.kernels)
    device = choose_device(config.runtime.device)
    if announce:
        report(f"runs on {describe_runtime(device, config.runtime.precision)}")
    if config.runtime.kernels == "auto" and device == "cpu" and (reason := dispatch.unavailable_reason()):
        report(f"no C kernels ({reason}): torch computes the same, a little slower")
    keep_freed_memory()
    quiet()


def keep_freed_memory() -> None:
    """Let glibc reuse freed tensor memory instead of returning it to the system.

    Allocating it again would cost one page fault per 4 KiB.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_threshold, max_threshold = -1, -3, 2**31 - 1
        libc.mallopt(trim_threshold, max_threshold)
        libc.mallopt(mmap_threshold, max_threshold)


def quiet() -> None:
    """Turn off the progress bars and notices of libraries, and escape what they log."""
    import datasets
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    escape_log_lines()


class ProgressReporter(ProgressLines):
    """A progress display: a bar in a terminal, otherwise a line every few seconds."""

    def __init__(self, every_seconds: float = 10.0, may_draw: bool = True) -> None:
        super().__init__(report, every_seconds)
        self.may_draw = may_draw  # a bar would overwrite typed input
        self.bar: Progress | None = None
        self.task: Any = None

    def __call__(self, step: Step) -> None:
        """Show the progress after one more iteration."""
        line = self.describe(step)
        if "profile" in step.metrics:
            report(profile_summary(step.metrics))
        if log.is_terminal and self.may_draw:
            self._show_bar(step, line)
        else:
            self.show(step, line)

    def _show_bar(self, step: Step, line: str) -> None:
        if self.bar is None:
            columns = [
                TextColumn("{task.completed}/{task.total} iterations"),
                BarColumn(),
                TextColumn("{task.description}", markup=False),
            ]
            self.bar = Progress(*columns, TimeRemainingColumn(), console=log)
            self.bar.start()
            self.task = self.bar.add_task(line, total=step.iterations)
        self.bar.update(self.task, completed=step.iteration, description=line, total=step.iterations)
        if step.iteration == step.iterations:
            self.close()

    def close(self) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def profile_summary(metrics: Mapping[str, Any]) -> str:
    """Summarize an iteration's time by stage and by profiled operation."""
    stages = {name: metrics[f"seconds_{name}"] for name in ("rollout", "experience", "update")}
    ordered = sorted(stages, key=lambda name: -stages[name])
    shares = ", ".join(f"{name} {stages[name]:.2f} s ({stages[name] / metrics['seconds']:.0%})" for name in ordered)
    operations = ", ".join(f"{name} {share:.0%}" for name, share in metrics["profile"].items())
    return f"profile of iteration {metrics['iteration']}: {shares}; most of it in {operations}"


def print_comparison(results: Mapping[str, Any]) -> None:
    """Print the table of a comparison."""
    headings, rows = table_rows(results)
    print_table(headings, rows)


def print_metrics(metrics: Mapping[str, float]) -> None:
    """Print names and values of metrics."""
    print_table(["metric", "value"], [[name, with_interval(name, metrics)] for name in metrics])


def print_evaluation(found: Mapping[str, Any]) -> None:
    """Print the metrics of all splits and of best-of-n, and the judge's name."""
    columns: dict[str, Mapping[str, float]] = {"test": found["evaluation"], **found.get("evaluations", {})}
    if "best_of" in found:
        columns[f"best of {found['best_of']['samples']}"] = found["best_of"]["evaluation"]
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(with_interval(name, column) if name in column else "–" for column in columns.values())] for name in names]
    print_table(["metric", *columns], rows)
    if "judge" in found:
        refused = sum(column.get("judge_refused", 0) for column in columns.values())
        left_out = f"; {refused:,.0f} questions refused and left out" if refused else ""
        report(f"win rate against the references, by {found['judge']}{left_out}")


def print_rollout(row: Mapping[str, Any], to: Console = out, soft_wrap: bool = True) -> None:
    """Print a prompt and its completion, each span colored and bracketed by origin."""
    score = row["score"] if isinstance(row["score"], int | float) else math.nan
    head = f"iteration {row['iteration']} · completion {row['index']} · reward {score:.3f}"
    write((f"{head} · switch at token {row['switch_position']}", "dim"), to=to, soft_wrap=False)
    line: list[Part] = [(row["prompt"], "dim")]
    for span in row["spans"]:
        style = STYLES.get(span["origin"], "")
        line += [(f" [{span['origin']}:", style), (span["text"], style), ("]", style)]
    if row["ended_with_eos"]:
        line.append((" ■", "dim"))
    write(*line, to=to, soft_wrap=soft_wrap)
    write(to=to)


def print_plan(config: Config, algorithm: Algorithm, title: str = "") -> None:
    """Print the plan of a run: phases, models, completions, tokens, memory.

    `title` names the row of a comparison.
    """
    ppo, task = config.ppo, config.task
    write((f"{config.recipe}: {title or algorithm.title} on {task.name}, seed {config.seed}", "bold"), soft_wrap=False)
    for number, line in enumerate(describe_phases(algorithm)):
        write(f"  phase {number}: {line}", soft_wrap=False)
    guide = config.guide.spec if algorithm.needs_guide or config.distill.num_completions else "not queried"
    if guide in ("sft", "trained") or guide.startswith("model:"):
        guide += f" ({config.guide.sampling.describe()})"
    size, known = _parameters(config)
    critics = [describe_baseline(algorithm, origin) for origin in algorithm.critics]
    baseline = f"{' and '.join(critics)} ({config.critic.kind})" if critics else describe_baseline(algorithm, POLICY)
    steps = ppo.epochs * -(-ppo.completions_per_iteration // ppo.minibatch_size)
    vocabulary = config.model.vocabulary or 0
    memory = _bytes_per_parameter(config, algorithm) * size + 12 * config.runtime.micro_batch_tokens * max(vocabulary, 64)
    lines = {
        "data": task.data or "built by the task",
        "start": _start(config),
        "parameters": f"{size:,}" if known else "unknown until it is loaded",
        "adapters": _adapters(config),
        "baseline": baseline,
        "guide": guide,
        "reward": " + ".join(f"{weight:g} {name}" for name, weight in config.reward.weights.items()) or config.reward.path,
        "sampling": config.sampling.describe(),
        "iterations": f"{ppo.iterations} of {ppo.completions_per_iteration} completions; {steps} optimizer steps each",
        "step size": _learning_rates(config),
        "tokens": f"at most {ppo.completions_per_iteration * task.max_new_tokens:,} generated in an iteration",
        "distilled": f"{config.distill.num_completions:,} completions by the guide, before that"
        if config.distill.num_completions
        else "",
        "in all": f"{ppo.iterations * ppo.completions_per_iteration + config.distill.num_completions:,} completions",
        "device": f"{choose_device(config.runtime.device)}, {config.runtime.precision}",
        "threads": "{} ({})".format(*choose_num_threads(config.runtime.threads)),
        "memory": f"about {memory / 1e6 + 450:,.0f} MB with libraries" if known else "unknown until the model is loaded",
    }
    for name, value in lines.items():
        if value:
            write(f"  {name:12}{value}")
    for caution in training_warnings(algorithm):
        write(f"  warning: {caution}")


def print_summary(results: Mapping[str, Any]) -> None:
    """Print the reward before and after training, and the guide's, with 95 % intervals."""
    line, *warnings = summary_lines(results)
    write(line, soft_wrap=False)
    for warning in warnings:
        report(warning)


def print_trial(trial: Trial) -> None:
    """Print the checks that a dry run made, and those that it left out."""
    for words in trial.done:
        write(f"  checked     {words}")
    for words in trial.left_out:
        write(f"  not tried   {words}")


def print_unread(config: Config) -> None:
    """Print the settings of a config that its run does not read, and why."""
    for line in describe_unread(config):
        write(f"  not read    {line}")


def _start(config: Config) -> str:
    """Return the model that a run starts from, and whether it is fine-tuned first."""
    if config.policy:
        return f"{config.policy}, as it is"
    fine_tuned = "fine-tuned on the data's completions" if config.sft.is_enabled else "as it is"
    return f"{config.model.path}, {fine_tuned}" if config.model.path else f"new {config.model.architecture}, trained here"


def _learning_rates(config: Config) -> str:
    """Return the learning rates of the models that have an optimizer of their own."""
    critics = f", {config.critic.learning_rate:g} for critics" if config.critic.kind != "value_head" else ""
    return f"learning rate {config.ppo.learning_rate:g} for the policy{critics}"


def _adapters(config: Config) -> str:
    lora_config = config.lora
    if not lora_config.rank:
        return ""
    trained, bits = (
        "SFT and policy" if lora_config.in_sft else "policy",
        ", base weights in 4 bits" if lora_config.load_in_4bit else "",
    )
    return f"{trained}, rank {lora_config.rank}, alpha {lora_config.alpha:g}{bits}"


def _bytes_per_parameter(config: Config, algorithm: Algorithm) -> float:
    """Return the bytes per policy parameter of a run's models.

    Gradients and moments are included for models that are trained in full.
    """
    spec, whole = config.guide.spec, 4.0
    critics = len(algorithm.critics) if config.critic.kind == "separate" else 0
    own_guide = algorithm.needs_guide and (spec == "trained" or spec.startswith(("model:", "run:")))
    if config.lora.rank:  # one shared copy of the base weights; adapters are small
        return (0.5 if config.lora.load_in_4bit else whole) + 4 * whole * critics + whole * own_guide
    return 4 * whole * (1 + critics) + whole * (1 + own_guide + bool(config.evaluation.output_perplexity))


def _parameters(config: Config) -> tuple[int, bool]:
    """Return the policy's number of parameters from its config, and whether it is known."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    path = config.policy or config.model.path
    try:
        if path:
            base = lora.base_of(path) if lora.is_adapter_folder(path) else path
            model_config: Any = from_pretrained(AutoConfig, base, "model config")
        else:
            model_config = shape_config(config.model, config.model.vocabulary or 64)
        with torch.device("meta"):
            auto = AutoModelForSeq2SeqLM if model_config.is_encoder_decoder else AutoModelForCausalLM
            return count_parameters(auto.from_config(model_config)), True
    except (*INPUT_ERRORS, OSError, ValueError):
        return 0, False
