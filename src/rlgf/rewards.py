"""Rewards: functions of (prompts, texts) to numbers, checked at the door."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from rlgf import adapters
from rlgf.config import RewardConfig
from rlgf.errors import RunError, UserError, unknown
from rlgf.models import LanguageModel, from_pretrained, load_tokenizer
from rlgf.ngram import NgramClassifier
from rlgf.plugins import load_object
from rlgf.reward_model import RewardModel, Shared, is_reward_model, load_reward_model, refuse_language_models
from rlgf.scoring.functions import TEXT_FUNCTIONS, Sum, build_text_function, check_read, said
from rlgf.tasks import Task, TextFunction
from rlgf.types import Prompt


class SequenceClassifier:
    """Probability of the positive class by a Hugging Face sequence classifier, of any tokenizer: it reads text."""

    def __init__(self, path: str, batch_size: int = 32) -> None:
        from transformers import AutoModelForSequenceClassification

        self.model: Any = from_pretrained(AutoModelForSequenceClassification, path, "sequence classifier").eval()
        self.tokenizer: Any = load_tokenizer(path)
        self.path, self.batch_size = path, batch_size
        self.positive = _positive_class(self.model.config, path)
        limits = [getattr(self.model.config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        self.limit = min(limit for limit in limits if limit)

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """One probability for each text; a text longer than the classifier reads is an error, not cut."""
        values: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(list(texts[start : start + self.batch_size]), padding=True, return_tensors="pt")
            if batch["input_ids"].shape[1] > self.limit:
                raise ValueError(f"a text has {batch['input_ids'].shape[1]} tokens, but '{self.path}' reads {self.limit}")
            with torch.no_grad():
                logits = self.model(**batch).logits
            chosen = logits.sigmoid()[:, 0] if logits.shape[1] == 1 else logits.softmax(1)[:, self.positive]
            values += chosen.tolist()
        return values


def _positive_class(config: Any, path: str) -> int:
    labels = {int(number): str(name).upper() for number, name in config.id2label.items()}
    for number, name in labels.items():
        if name in ("POSITIVE", "POS", "LABEL_1"):
            return number
    if len(labels) == 1:
        return 0
    raise UserError(f"classifier '{path}' has labels {sorted(labels.values())}: one must be named POSITIVE, POS or LABEL_1.")


def build_reward(
    config: RewardConfig, task: Task, made: Mapping[str, Path], device: str = "cpu", backbone: LanguageModel | None = None
) -> TextFunction:
    """The reward that `reward.path` names, or the sum that `reward.weights` does.

    `made` has the folders of the stages that 'ngram' and 'preferences' stand for, where they are asked for; a reward model
    that is an adapter goes onto the weights of `backbone`, where it was trained for them.
    """
    check_names(config.names)
    load = partial(load_reward_model, device=device, backbone=backbone)
    if config.weights:
        parts = {name: (weight, _build(name, config, task, made, load)) for name, weight in config.weights.items()}
        return WeightedSum(parts)
    return _build(config.path, config, task, made, load)


def _build(
    path: str, config: RewardConfig, task: Task, made: Mapping[str, Path], load: Callable[[str], TextFunction]
) -> TextFunction:
    """One reward by name; for a whole-text task a model is given prompt and continuation together."""
    if path == "task":
        if task.reward is None:
            raise no_rule(task.name)
        return task.reward
    if path.startswith("python:"):
        return with_what_it_reads(load_object(path, "reward"))
    if path in TEXT_FUNCTIONS:
        return build_text_function(path, task.train, config.options.get(path))
    folder = made.get(path) or Path(path).expanduser()
    judge: TextFunction
    place = str(made.get(path, path))
    if (folder / "ngram.json").is_file():
        judge = NgramClassifier.load(folder)
    elif adapters.is_adapter_folder(place) or is_reward_model(place):
        return load(place)
    else:
        judge = SequenceClassifier(place)
    return whole_text(judge) if task.whole_text else lambda prompts, texts: judge(prompts, said(prompts, texts))


def no_rule(task: str) -> UserError:
    """The error for a task whose reward somebody has to name."""
    return UserError(
        f"task '{task}' has no rule of its own: set reward.path to 'ngram', 'preferences', a metric, a classifier or a reward "
        "model, or 'python:module:name'."
    )


def check_names(names: Sequence[str]) -> None:
    """Refuse rewards that there are not, from their configs alone; those that are trained here come later."""
    for name in names:
        if name in ("task", "ngram", "preferences") or name in TEXT_FUNCTIONS or name.startswith("python:"):
            continue
        folder = Path(name).expanduser()
        if not folder.exists() and difflib.get_close_matches(name, TEXT_FUNCTIONS, n=1, cutoff=0.8):
            raise unknown("reward", name, TEXT_FUNCTIONS)
        refuse_language_models(name)
        if not (folder / "ngram.json").is_file():
            is_reward_model(name)  # which reads its config


def check_reads(config: RewardConfig, split: str, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts of a split without what a metric reads of them as a reward."""
    for name in config.names:
        if name in TEXT_FUNCTIONS:
            try:
                check_read(name, prompts, config.options.get(name) or {})
            except UserError as error:
                raise UserError(f"{split} prompts: {error}") from None


def with_what_it_reads(function: Callable[..., Any]) -> TextFunction:
    """A function of `prompts` and `texts`, which may also take `references` and `columns` by name: those of each prompt."""
    try:
        named = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in callables have none
        return function
    readers: dict[str, Callable[[Prompt], Any]] = {"references": lambda p: p.references, "columns": lambda p: p.columns}
    wanted = {name: read for name, read in readers.items() if name in named}
    if not wanted:
        return function

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> Sequence[float]:
        return function(prompts, texts, **{name: [read(prompt) for prompt in prompts] for name, read in wanted.items()})

    return reward


class WeightedSum(Sum):
    """Several rewards, each times its weight, added; each is checked by itself."""

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """The sum for each text."""
        return self.total({name: score(reward, prompts, texts) for name, (_, reward) in self.terms.items()})


Batch = tuple[Sequence[Prompt], Sequence[str]]


def nothing() -> None:
    """What is to be done where nothing is."""


def score_parts(
    reward: TextFunction, batches: Sequence[Batch], when_read: Callable[[], None] = nothing
) -> list[tuple[list[float], dict[str, list[float]]]]:
    """For each batch the reward of its texts, and, of a sum, what each of its terms says, `TERM/TERM` where that is a sum too.

    What reads with the policy's own weights comes first; once that is done, `when_read` is called.
    """
    if not isinstance(reward, Sum):
        if not shares_weights(reward):
            when_read()
        found = [(score(reward, *batch), dict[str, list[float]]()) for batch in batches]
        when_read()
        return found
    terms: list[dict[str, list[float]]] = [{} for _ in batches]
    parts: list[dict[str, list[float]]] = [{} for _ in batches]
    own = [name for name, (_, term) in reward.terms.items() if shares_weights(term)]
    for name in [*own, *(name for name in reward.terms if name not in own)]:
        if name not in own:
            when_read()
        for place, (values, inner) in enumerate(score_parts(reward.terms[name][1], batches)):
            terms[place][name] = values
            parts[place] |= {name: values, **{f"{name}/{part}": said for part, said in inner.items()}}
    when_read()
    totals = [reward.total({name: said[name] for name in reward.terms}) for said in terms]
    return [(score(lambda *_, total=total: total, *batch), said) for total, batch, said in zip(totals, batches, parts)]


def shares_weights(reward: TextFunction) -> bool:
    """Whether a reward reads with the policy's own weights, on which one adapter can be on at a time."""
    if isinstance(reward, Sum):
        return any(shares_weights(term) for _, term in reward.terms.values())
    return isinstance(reward, RewardModel) and isinstance(reward.model, Shared)


def whole_text(judge: TextFunction) -> TextFunction:
    """A judge that reads the prompt with its continuation."""

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> Sequence[float]:
        return judge(prompts, [prompt.text + text for prompt, text in zip(prompts, texts)])

    reward.judge = judge  # pyright: ignore[reportFunctionMemberAccess]
    return reward


def continuation_only(reward: TextFunction) -> TextFunction | None:
    """The judge of a whole-text reward, for reading the continuation alone; None where there is no such judge."""
    return getattr(reward, "judge", None)


def score(reward: TextFunction, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """Call a reward and refuse what is not one finite number for each text; every failure is a `RunError`."""
    try:
        answer: Any = reward(prompts, texts)
        values: list[Any] = list(answer.tolist() if hasattr(answer, "tolist") else answer)
    except RunError:
        raise
    except Exception as error:
        raise RunError(
            f"the reward failed on {len(texts)} texts ({type(error).__name__}: {error}): mend it and run again."
        ) from error
    if len(values) != len(texts):
        raise RunError(f"the reward gave {len(values)} numbers for {len(texts)} texts: it must give one each.")
    for value, text in zip(values, texts):
        if type(value) is bool or not isinstance(value, Real) or not math.isfinite(value):
            raise RunError(f"the reward of the text {text[:60]!r} is {value!r}: it must be a finite number.")
    return [float(value) for value in values]


def probe_reward(reward: TextFunction, prompts: Sequence[Prompt]) -> None:
    """Try a reward on a few texts before anything is trained."""
    texts = [prompt.references[0] if prompt.references else "a text" for prompt in prompts]
    try:
        score(reward, [*prompts, prompts[0]], [*texts, ""])
    except RunError as error:
        raise UserError(f"probe: {error}") from error.__cause__
