"""What a finished run says of itself: the final evaluation, that of its baselines, and the machine."""

import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rlgf.best_of import evaluate_best_of
from rlgf.config import Config
from rlgf.errors import UserError
from rlgf.evaluate import Judges, check_text_metrics, evaluate_guide, evaluate_policy
from rlgf.experience import Reading
from rlgf.guides import ModelGuide
from rlgf.kernels import native
from rlgf.rewards import check_reads
from rlgf.rollout import Writing
from rlgf.runs import RunDirectory, read_complete_lines, rollout_rows
from rlgf.stages import Report, base_model
from rlgf.tasks import Task
from rlgf.trainer import Parts, Trainer
from rlgf.types import Decoding, Prompt, Rollout

Evaluated = tuple[dict[str, float], Rollout, list[float]]  # metrics, texts, scores
EXAMPLES = 8  # texts of the test split that results keep, to be read side by side


def examples(rollout: Rollout, scores: Sequence[float]) -> list[dict[str, Any]]:
    """The first texts of a final evaluation, as results keep them."""
    shown = zip(rollout.prompts[:EXAMPLES], rollout.texts, scores)
    return [{"prompt": prompt.text, "text": text, "score": value} for prompt, text, value in shown]


def final_results(trainer: Trainer, directory: RunDirectory) -> dict[str, Any]:
    """The final evaluation on the test split and what else the task reports; texts go to `evaluation[-SPLIT].jsonl`."""
    config, codec = trainer.config, trainer.parts.models.policy.codec
    judges = dataclasses.replace(trainer.judges, final=config.evaluation, judge=trainer.parts.judge)
    found: dict[str, dict[str, float]] = {}
    shown: list[dict[str, Any]] = []
    splits = final_prompts(trainer.parts.task, config)
    for split, prompts in splits.items():
        found[split], rollout, scores = trainer.evaluate(prompts, final=True)
        path = directory.folder / ("evaluation.jsonl" if split == "test" else f"evaluation-{split}.jsonl")
        path.unlink(missing_ok=True)
        directory.log(path.name, rollout_rows(rollout, scores, config.ppo.iterations, codec))
        shown = shown or examples(rollout, scores)
    return {
        "algorithm": config.algorithm.name,
        "title": trainer.parts.algorithm.title,
        "recipe": config.recipe,
        "seed": config.seed,
        "texts_used": config.ppo.iterations * config.ppo.texts_per_iteration + config.distil.texts,
        "decoding": (config.evaluation.decoding or config.decoding).describe(),
        **as_results(found),
        "examples": shown,
        **extras(config, trainer.writing, splits["test"], judges),
        "token_budget": trainer.reading.token_budget,
        "training_seconds": sum(row["seconds"] for row in read_complete_lines(directory.folder / "metrics.jsonl")),
        "machine": machine(),
    }


def final_prompts(task: Task, config: Config) -> dict[str, Sequence[Prompt]]:
    """The prompts of final evaluations: those of the test split, and of the others that the task reports."""
    return {split: prompts[: config.evaluation.final_prompts] for split, prompts in {"test": task.test, **task.finals}.items()}


def check_finals(task: Task, config: Config) -> None:
    """Refuse, before anything is trained, a final evaluation that could not be made."""
    splits = final_prompts(task, config)
    check_text_metrics(config.evaluation, [prompt for part in splits.values() for prompt in part])
    for split, prompts in splits.items():
        check_reads(config.reward, split, prompts)
        if config.judge.spec and not any(prompt.references for prompt in prompts):
            raise UserError(
                f"the judge compares texts with references, and no {split} prompt of task '{task.name}' has one: leave out "
                "--judge, or give held-out prompts references."
            )


def as_results(found: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Metrics of each split as `results.json` has them: those of the test split first."""
    others = {split: metrics for split, metrics in found.items() if split != "test"}
    return {"evaluation": found["test"], **({"evaluations": others} if others else {})}


def extras(config: Config, writing: Writing, prompts: Sequence[Prompt], judges: Judges) -> dict[str, Any]:
    """What a final evaluation may say besides its metrics: who judged, and what the best of several texts come to."""
    found: dict[str, Any] = {"judge": judges.judge.name} if judges.judge else {}
    if judges.general is not None:
        found["output_perplexity_model"] = config.model.path or "a model trained here on the task's raw text"
    samples = config.evaluation.best_of
    if samples:
        writing = dataclasses.replace(writing, decoding=sampling(config))
        metrics, _, _ = evaluate_best_of(writing, prompts, judges, samples, config.evaluation.seed)
        found["best_of"] = {"samples": samples, "decoding": sampling(config).describe(), "evaluation": metrics}
    return found


def sampling(config: Config) -> Decoding:
    """How several texts are written for one prompt: as in evaluations, unless that writes the same text every time."""
    decoding = config.evaluation.decoding
    return config.decoding if decoding is None or decoding.greedy or decoding.beams > 1 else decoding


def evaluate_baselines(parts: Parts, stages: Path, report: Report) -> dict[str, dict[str, Any]]:
    """The final evaluation of `evaluation.baselines`, on the same prompts as every run."""
    config, seed = parts.config, parts.config.evaluation.seed
    reading = Reading(config.decoding, config.ppo, config.runtime.micro_batch_tokens, config.runtime.precision)
    judges = Judges(parts.task, parts.reward, parts.models.reference, parts.general, reading, config.evaluation, parts.judge)
    decoding = config.evaluation.decoding or config.decoding
    writing = Writing(
        parts.models.reference, parts.guide, decoding, config.task.max_new_tokens, config.task.min_new_tokens,
        config.seed, config.runtime.precision,
    )  # fmt: skip

    def row(title: str, how: str, evaluate: Callable[[Sequence[Prompt]], Evaluated]) -> dict[str, Any]:
        found = {split: evaluate(prompts) for split, prompts in final_prompts(parts.task, config).items()}
        metrics = as_results({split: measured for split, (measured, _, _) in found.items()})
        return {"title": title, "decoding": how, **metrics, "examples": examples(*found["test"][1:]), "texts_used": 0}

    found: dict[str, dict[str, Any]] = {}
    if "zero_shot" in config.evaluation.baselines:
        before = dataclasses.replace(writing, policy=base_model(config, stages, report, parts.models.reference))
        found["zero_shot"] = row("zero-shot", decoding.describe(), lambda p: evaluate_policy(before, p, judges, seed))
    if "sft" in config.evaluation.baselines:
        found["sft"] = row("SFT", decoding.describe(), lambda p: evaluate_policy(writing, p, judges, seed))
        found["sft"] |= extras(config, writing, final_prompts(parts.task, config)["test"], judges)
    if "guide" in config.evaluation.baselines and parts.guide is not None:
        how = config.guide.decoding.describe() if isinstance(parts.guide, ModelGuide) else "its own"
        found["guide"] = row("guide", how, lambda p: evaluate_guide(writing, p, judges, seed))
    return found


def machine() -> dict[str, Any]:
    """What a number was measured on."""
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "compiled": native.describe(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("rlgf", "torch", "transformers")},
    }
