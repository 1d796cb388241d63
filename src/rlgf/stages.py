"""What is made before reinforcement learning: tokenizer, language model, SFT, sentiment reward, guide, distillation.

A stage is a folder named after a fingerprint of everything it was made from. Where the folder is, the stage is reused; where
anything differs, the name differs. A folder appears only when it is complete.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, overload

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlgf import adapters
from rlgf.config import GUIDE_REACHING, Config, GuideConfig, ModelConfig, SupervisedConfig, TaskConfig, to_dict
from rlgf.data import read_json, write_json
from rlgf.denoising import corrupt
from rlgf.errors import UserError
from rlgf.guides.local import guide_model_path
from rlgf.guides.server import without_address
from rlgf.models import SFT, LanguageModel, load_language_model, load_tokenizer, new_language_model
from rlgf.ngram import train_ngram
from rlgf.supervised import Example, fit
from rlgf.tasks import Task, task_kind

Report = Callable[[str], None]
TOKENIZER_TEXTS = 8_000
END = "<|endoftext|>"
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(16))  # of span corruption, in T5's spelling


def fingerprint(ingredients: Mapping[str, Any]) -> str:
    """A short hash of everything a stage is made from."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True, default=str).encode()).hexdigest()[:12]


def source_fingerprint(source: str | None) -> Any:
    """What identifies data or a model: name and content of every file of a local folder, otherwise its name.

    Files over 256 MB are told apart by size and time instead of being read.
    """
    path = Path(source).expanduser() if source else None
    if path is None or not path.exists():
        return source
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(file.name, _content_mark(file)) for file in files]


def _content_mark(file: Path) -> str:
    status = file.stat()
    if status.st_size > 2**28:
        return f"{status.st_size} {status.st_mtime_ns}"
    return _content_hash(str(file), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _content_hash(file: str, size: int, time: int) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def build_stage(
    folder: Path, name: str, ingredients: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]], report: Report
) -> Path:
    """The folder of a stage, made by `build` (which returns what it measured) unless it is already there."""
    return build_at(folder / f"{name}-{fingerprint(ingredients)}", name, ingredients, build, report)


def build_at(
    target: Path, name: str, ingredients: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]], report: Report
) -> Path:
    """A stage in exactly this folder; a folder that holds anything else is refused."""
    mark = fingerprint(ingredients)
    record = target / "stage.json"
    if record.is_file():
        if read_json(record).get("fingerprint") != mark:
            raise UserError(f"{target} holds a stage made from other settings: choose another --out or remove it.")
        report(f"{name}: reusing {target.name}")
        return target
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty and holds no '{name}' stage: choose another --out.")
    target.parent.mkdir(parents=True, exist_ok=True)
    report(f"{name}: making {target.name}")
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}-"))
    try:
        measured = build(scratch)
        write_json(
            scratch / "stage.json",
            {
                "stage": name,
                "fingerprint": mark,
                "made_from": json.loads(json.dumps(ingredients, default=str)),
                "measured": measured,
            },
        )
        if target.exists():
            target.rmdir()
        os.chmod(scratch, 0o755)
        os.rename(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return target


def tokenizer_for(config: Config, task: TaskConfig, shape: ModelConfig, stages: Path, report: Report) -> tuple[Any, Any]:
    """The tokenizer before any model is made, and its fingerprint."""
    if shape.path:
        return load_tokenizer(shape.path), source_fingerprint(shape.path)
    kind = task_kind(task)
    if kind.tokenizer:
        return kind.tokenizer(task), f"{task.name} words"
    if not shape.vocabulary or kind.raw_texts is None:
        raise UserError(
            f"task '{task.name}' has no tokenizer of its own: give --policy or model.path, or set model.vocabulary."
        )
    ingredients = {"vocabulary": shape.vocabulary, "texts": TOKENIZER_TEXTS, "task": task_source(task)}
    ingredients |= {"sentinels": len(SENTINELS)} if shape.architecture == "t5" else {}

    def build(folder: Path) -> dict[str, Any]:
        assert kind.raw_texts
        sentinels = SENTINELS if shape.architecture == "t5" else ()
        train_tokenizer(kind.raw_texts(task, TOKENIZER_TEXTS), shape.vocabulary, sentinels).save_pretrained(folder)
        return {}

    folder = build_stage(stages, "tokenizer", ingredients, build, report)
    return load_tokenizer(str(folder)), folder.name


def train_tokenizer(texts: list[str], vocabulary: int, sentinels: Sequence[str] = ()) -> Any:
    """A byte-level BPE tokenizer, with one special token that opens, ends and pads, and sentinels for span corruption."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=vocabulary, special_tokens=[END, *sentinels], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, extra_special_tokens=list(sentinels)
    )


def base_is_known(config: Config) -> bool:
    """Whether it is known which model was there before SFT: a policy that was given does not say."""
    return not config.policy or bool(config.model.path)


@dataclass(frozen=True)
class Base:
    """A model that supervised fine-tuning starts from, not loaded yet."""

    mark: Any  # what identifies it
    load: Callable[..., LanguageModel]  # given whether in 4 bits, and a loaded model whose base weights it may share


def base_model(config: Config, stages: Path, report: Report, beside: LanguageModel | None = None) -> LanguageModel:
    """The model before SFT: loaded, or trained on raw text, or new. Of a given policy it is not known.

    Where it is the base weights of `beside`, it is these, without any adapter.
    """
    if not base_is_known(config):
        raise UserError(
            f"zero-shot is the model before SFT, and '{config.policy}' does not say which one that was: give model.path, or "
            "leave zero_shot out of evaluation.baselines."
        )
    base = _base(config, config.model, config.seed, stages, report)
    return base.load(config.adapter.load_in_4bit, beside)


def _base(config: Config, shape: ModelConfig, run_seed: int, stages: Path, report: Report) -> Base:
    if shape.path:
        return Base(source_fingerprint(shape.path), partial(load_language_model, shape.path, config.runtime.device))
    # A guide made here speaks the policy's tokens.
    if config.policy:
        tokenizer, token_mark = load_tokenizer(config.policy), source_fingerprint(config.policy)
    else:
        tokenizer, token_mark = tokenizer_for(config, config.task, config.model, stages, report)
    seed = run_seed if config.lm.seed is None else config.lm.seed
    if not _asked_for(config.lm):
        mark = {"new": to_dict(shape), "tokenizer": token_mark, "seed": seed}
        return Base(mark, lambda *_: new_language_model(shape, tokenizer, seed))
    folder = lm_stage(config, stages, report, shape=shape)
    return Base(folder.name, partial(load_language_model, str(folder), config.runtime.device))


def _asked_for(config: SupervisedConfig) -> bool:
    return bool(config.steps or config.epochs)


def task_source(task: TaskConfig) -> dict[str, Any]:
    """What identifies a task's texts: its name, its options and its data."""
    return {"name": task.name, "options": task.options, "data": source_fingerprint(task.data)}


def lm_stage(config: Config, stages: Path, report: Report, at: Path | None = None, shape: ModelConfig | None = None) -> Path:
    """A small language model trained on the task's raw text, of the policy's shape unless another is given."""
    task, shape = config.task, shape or config.model
    raw_texts = task_kind(task).raw_texts
    if raw_texts is None:
        raise UserError(f"task '{task.name}' has no raw text to train a language model on: set lm.steps=0 and lm.epochs=0.")
    if shape.path:
        raise UserError(f"model.path is '{shape.path}', a trained model: remove it to train one, or skip the lm stage.")
    tokenizer, token_mark = tokenizer_for(config, task, config.model, stages, report)
    seed = config.seed if config.lm.seed is None else config.lm.seed
    ingredients = {
        "shape": to_dict(shape), "tokenizer": token_mark, "lm": to_dict(config.lm), "seed": seed, "task": task_source(task),
    }  # fmt: skip

    def build(folder: Path) -> dict[str, float]:
        model = new_language_model(shape, tokenizer, seed)
        texts = raw_texts(task, config.lm.texts)
        examples = corrupted(texts, model, seed) if model.codec.alone else blocks(texts, model, shape.context)
        measured = fit(model, examples, config.lm, seed, min(config.runtime.micro_batch_tokens, 1024), report)
        model.save(folder)
        return measured

    if at:
        return build_at(at, "lm", ingredients, build, report)
    return build_stage(stages, "lm", ingredients, build, report)


def blocks(texts: Sequence[str], model: LanguageModel, size: int) -> list[Example]:
    """Texts one behind the other, an end token after each, in blocks of `size` tokens."""
    stream: list[int] = []
    for ids in model.tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        stream += [*ids, model.end_id]
    examples = [Example(stream[at : at + size], 1) for at in range(0, len(stream) - size + 1, size)]
    if not examples:
        raise UserError(f"the raw text has {len(stream)} tokens, fewer than one block of model.context = {size}.")
    return examples


def corrupted(texts: Sequence[str], model: LanguageModel, seed: int) -> list[Example]:
    """Texts with spans of tokens left out, to be filled in: `denoising.corrupt`, drawn anew for each text."""
    sentinels = [int(model.tokenizer.convert_tokens_to_ids(token) or 0) for token in SENTINELS]
    if len(set(sentinels)) < len(SENTINELS) or model.tokenizer.convert_ids_to_tokens(sentinels) != list(SENTINELS):
        raise UserError(f"span corruption needs the tokens {SENTINELS[0]} to {SENTINELS[-1]} in the tokenizer: train one here.")
    examples: list[Example] = []
    for place, ids in enumerate(model.tokenizer(list(texts), add_special_tokens=False)["input_ids"]):
        if len(ids) > 1:
            source, target = corrupt(ids, sentinels, seed, place)
            source = [*source, model.end_id]
            examples.append(Example([*source, *target, model.end_id], len(source)))
    if not examples:
        raise UserError("the raw text holds no text of two tokens or more to train on.")
    return examples


class TargetExamples(Sequence[Example]):
    """Every target of a task's training prompts as tokens to learn, encoded when it is asked for."""

    def __init__(self, task: Task, model: LanguageModel, budget: int, most: int = 0) -> None:
        pairs = [(prompt, target) for prompt in task.train for target in prompt.targets]
        self.pairs, self.model, self.budget = pairs[:most] if most else pairs, model, budget
        if not pairs:
            raise UserError(f"task '{task.name}' has no targets: SFT and the MLE term need at least one.")

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | Sequence[Example]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        prompt, target = self.pairs[place]
        before = self.model.codec.prompt(prompt)
        after = self.model.codec.target(target, self.model.end_id, self.budget)
        return Example([*before, *after], len(before), cut=after[-1] != self.model.end_id)


def checked(examples: Sequence[Example], model: LanguageModel, task: TaskConfig) -> int:
    """Refuse examples that are longer than the model reads; how many were cut at the budget of a response."""
    cut = 0
    for number, example in enumerate(examples, 1):
        length = example.start if model.codec.alone else len(example.ids)
        if length > model.context:
            raise UserError(
                f"task '{task.name}', demonstration {number}: prompt and target have {length} tokens, but the model reads "
                f"{model.context}: shorten the prompts or task.max_new_tokens, or raise model.context."
            )
        cut += example.cut
    return cut


def sft_stage(config: Config, stages: Path, report: Report, at: Path | None = None) -> Path | str:
    """The policy's starting point: `policy` if one is given, the base model fine-tuned on targets, or the base model."""
    if config.policy:
        return config.policy
    if not _asked_for(config.sft) and config.model.path:
        return config.model.path
    return _sft(config, config.task, config.model, config.sft, "sft", stages, report, at)


def guide_writing(guide: GuideConfig) -> dict[str, Any]:
    """What decides about a guide's texts: all that is not at its default, without how it is reached."""
    default, values = to_dict(GuideConfig()), to_dict(guide)
    values["spec"] = without_address(guide.spec)
    return {name: v for name, v in values.items() if v != default[name] and name not in GUIDE_REACHING}


def guide_task(config: Config) -> TaskConfig:
    """The task whose demonstrations the guide 'trained' learns from."""
    task = config.task
    return TaskConfig(task.name, task.data, task.max_new_tokens, task.min_new_tokens, {**task.options, **config.guide.options})


def guide_stage(config: Config, stages: Path, report: Report) -> Path | str:
    """The guide 'trained': a model of its own, fine-tuned on demonstrations of its own."""
    return _sft(config, guide_task(config), config.guide.model, config.guide.sft, "guide", stages, report, None)


def _sft(
    config: Config, task: TaskConfig, shape: ModelConfig, training: SupervisedConfig, name: str, stages: Path,
    report: Report, at: Path | None,
) -> Path:  # fmt: skip
    # A guide is another model than the policy: it draws its weights and its batches from another seed.
    seed = (config.seed if training.seed is None else training.seed) + (1_000_003 if name == "guide" else 0)
    base = _base(config, shape, seed, stages, report)
    ingredients = {
        "base": base.mark, "sft": to_dict(training), "seed": seed, "task": task_source(task), "budget": task.max_new_tokens,
        **_adapter_ingredients(config),
    }  # fmt: skip

    def build(folder: Path) -> dict[str, float]:
        model = base.load(config.adapter.load_in_4bit and config.adapter.in_sft)
        built = task_kind(task).build(task, model.tokenizer)
        if built.demonstrations is not None:
            built = dataclasses.replace(built, train=built.demonstrations)
        trained = with_adapter(config, model, seed)
        examples = TargetExamples(built, model, task.max_new_tokens, training.texts)
        cut = checked(examples, model, task)
        measured = fit(trained, examples, training, seed, config.runtime.micro_batch_tokens, report)
        trained.save(folder)
        return measured | {"targets_cut": cut}

    if at:
        return build_at(at, name, ingredients, build, report)
    return build_stage(stages, name, ingredients, build, report)


def _adapter_ingredients(config: Config) -> dict[str, Any]:
    """What a supervised stage is made from besides, where it trains an adapter."""
    return {"adapter": to_dict(config.adapter)} if config.adapter.in_sft else {}


def with_adapter(config: Config, model: LanguageModel, seed: int) -> LanguageModel:
    """The model as supervised fine-tuning trains it: with a new adapter, where that is asked for, otherwise as it is."""
    if not config.adapter.in_sft or model.adapter is not None:
        return model
    adapters.add(model.model, SFT, config.adapter, seed)
    return replace(model, adapter=SFT)


def reward_stage(config: Config, stages: Path, report: Report, at: Path | None = None) -> Path:
    """The small n-gram sentiment classifier, trained on the task's labelled texts."""
    labelled = task_kind(config.task).labelled_texts
    if labelled is None:
        raise UserError(
            f"task '{config.task.name}' has no labelled texts to train a sentiment reward on; from pairs a reward model is "
            "trained: set reward.path=preferences."
        )
    task = config.task
    ingredients = {"epochs": config.reward.epochs, "seed": config.reward.seed, "task": task_source(task)}

    def build(folder: Path) -> dict[str, float]:
        train, test = labelled(task, "train"), labelled(task, "test")
        return train_ngram(folder, train, test, config.reward.epochs, config.reward.seed, report)

    if at:
        return build_at(at, "reward", ingredients, build, report)
    return build_stage(stages, "reward", ingredients, build, report)


def distil_stage(config: Config, start: str, write: Callable[[int], list[Example]], stages: Path, report: Report) -> Path:
    """The policy fine-tuned on `distil.texts` texts that the guide writes (`write`)."""
    seed = config.seed if config.distil.seed is None else config.distil.seed
    in_4bit = config.adapter.load_in_4bit and (config.adapter.in_sft or adapters.is_adapter_folder(start))
    ingredients = {
        "start": Path(start).name if Path(start).parent == stages else source_fingerprint(start),
        "guide": guide_writing(config.guide),
        "guide_files": source_fingerprint(guide_model_path(config.guide.spec) or without_address(config.guide.spec)),
        "distil": to_dict(config.distil), "seed": seed, "texts_seed": config.seed, "task": task_source(config.task),
        "budget": [config.task.min_new_tokens, config.task.max_new_tokens], **_adapter_ingredients(config),
        **({"in_4bit": True} if in_4bit else {}),
    }  # fmt: skip

    def build(folder: Path) -> dict[str, float]:
        model = with_adapter(config, load_language_model(start, config.runtime.device, in_4bit), seed)
        measured = fit(model, write(config.distil.texts), config.distil, seed, config.runtime.micro_batch_tokens, report)
        model.save(folder)
        return measured

    return build_stage(stages, "distil", ingredients, build, report)
