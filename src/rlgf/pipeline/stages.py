"""The stages before RL: tokenizer, language model, SFT, sentiment reward, guide, distillation.

A stage is a folder named by a fingerprint of all its inputs. If the folder exists, the stage is
reused; if any input differs, the name differs. A folder appears only when it is complete.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlgf.config.flatten import to_dict
from rlgf.config.schema import Config
from rlgf.config.sections import GUIDE_CONNECTION_FIELDS, GuideConfig, ModelConfig, SupervisedConfig, TaskConfig, TrainingConfig
from rlgf.errors import ConfigError
from rlgf.generation.openai.client import without_address
from rlgf.guides.local import guide_model_path
from rlgf.models import lora
from rlgf.models.language_model import SFT, LanguageModel
from rlgf.models.loading import load_language_model, load_tokenizer, new_language_model
from rlgf.pipeline.stage_cache import Report, build_at, build_stage, source_fingerprint
from rlgf.rewards.ngram import train_ngram
from rlgf.supervised.examples import SENTINELS, Example, TargetExamples, check_example_lengths, corrupt_spans, split_into_blocks
from rlgf.supervised.loop import fit
from rlgf.tasks.registry import task_definition

TOKENIZER_TEXTS = 8_000
END = "<|endoftext|>"


def tokenizer_for(config: Config, task: TaskConfig, shape: ModelConfig, stages: Path, report: Report) -> tuple[Any, Any]:
    """Return the tokenizer and its fingerprint, before any model is built."""
    if shape.path:
        return load_tokenizer(shape.path), source_fingerprint(shape.path)
    kind = task_definition(task)
    if kind.tokenizer:
        return kind.tokenizer(task), f"{task.name} words"
    if not shape.vocabulary or kind.raw_texts is None:
        raise ConfigError(
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
    """Train a byte-level BPE tokenizer.

    It has one special token for BOS, EOS and padding, and sentinels for span corruption.
    """
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
    """Return whether the model before SFT is known.

    It is not if `policy` is given without model.path.
    """
    return not config.policy or bool(config.model.path)


@dataclass(frozen=True)
class Base:
    """A model that supervised fine-tuning starts from, not loaded yet."""

    fingerprint: Any  # of the model, for the fingerprints of stages
    load: Callable[..., LanguageModel]  # args: load_in_4bit, share_weights_with


def load_base_model(
    config: Config, stages: Path, report: Report, share_weights_with: LanguageModel | None = None
) -> LanguageModel:
    """Return the model before SFT: loaded, pretrained on raw text, or new.

    If it is the base weights of `beside`, these are returned, without any adapter. Raises
    `ConfigError` if the model before SFT is unknown.
    """
    if not base_is_known(config):
        raise ConfigError(
            f"zero-shot is the model before SFT, and '{config.policy}' does not say which one that was: give model.path, or "
            "leave zero_shot out of evaluation.baselines."
        )
    base = _base(config, config.model, config.seed, stages, report)
    return base.load(config.lora.load_in_4bit, share_weights_with)


def _base(config: Config, shape: ModelConfig, run_seed: int, stages: Path, report: Report) -> Base:
    if shape.path:
        return Base(source_fingerprint(shape.path), partial(load_language_model, shape.path, config.runtime.device))
    # A guide trained here has the policy's tokenizer.
    if config.policy:
        tokenizer, token_mark = load_tokenizer(config.policy), source_fingerprint(config.policy)
    else:
        tokenizer, token_mark = tokenizer_for(config, config.task, config.model, stages, report)
    seed = run_seed if config.pretrain.seed is None else config.pretrain.seed
    if not _is_enabled(config.pretrain):
        mark = {"new": to_dict(shape), "tokenizer": token_mark, "seed": seed}
        return Base(mark, lambda *_: new_language_model(shape, tokenizer, seed))
    folder = pretrain_stage(config, stages, report, shape=shape)
    return Base(folder.name, partial(load_language_model, str(folder), config.runtime.device))


def _is_enabled(config: TrainingConfig) -> bool:
    return bool(config.steps or config.epochs)


def task_source(task: TaskConfig) -> dict[str, Any]:
    """Return the identity of a task's data: its name, options and data fingerprint."""
    return {"name": task.name, "options": task.options, "data": source_fingerprint(task.data)}


def pretrain_stage(
    config: Config, stages: Path, report: Report, at: Path | None = None, shape: ModelConfig | None = None
) -> Path:
    """Pretrain a small language model on the task's raw text, and return its folder.

    It has the policy's shape unless `shape` is given.
    """
    task, shape = config.task, shape or config.model
    raw_texts = task_definition(task).raw_texts
    if raw_texts is None:
        raise ConfigError(
            f"task '{task.name}' has no raw text to train a language model on: set pretrain.steps=0 and pretrain.epochs=0."
        )
    if shape.path:
        raise ConfigError(f"model.path is '{shape.path}', a trained model: remove it to train one, or skip the lm stage.")
    tokenizer, token_mark = tokenizer_for(config, task, config.model, stages, report)
    seed = config.seed if config.pretrain.seed is None else config.pretrain.seed
    ingredients = {
        "shape": to_dict(shape), "tokenizer": token_mark, "pretrain": to_dict(config.pretrain), "seed": seed,
        "task": task_source(task),
    }  # fmt: skip

    def build(folder: Path) -> dict[str, float]:
        model = new_language_model(shape, tokenizer, seed)
        texts = raw_texts(task, config.pretrain.max_examples)
        examples = (
            corrupt_spans(texts, model, seed)
            if model.codec.is_encoder_decoder
            else split_into_blocks(texts, model, shape.max_length)
        )
        measured = fit(model, examples, config.pretrain, seed, min(config.runtime.micro_batch_tokens, 1024), report)
        model.save(folder)
        return measured

    if at:
        return build_at(at, "pretrain", ingredients, build, report)
    return build_stage(stages, "pretrain", ingredients, build, report)


def sft_stage(config: Config, stages: Path, report: Report, at: Path | None = None) -> Path | str:
    """Return the policy's starting model, a folder or Hub name.

    It is `policy` if given, the base model fine-tuned on targets, or the base model.
    """
    if config.policy:
        return config.policy
    if not _is_enabled(config.sft) and config.model.path:
        return config.model.path
    return _sft(config, config.task, config.model, config.sft, "sft", stages, report, at)


def guide_identity(guide: GuideConfig) -> dict[str, Any]:
    """Return the settings that determine a guide's completions.

    They are all that differ from their defaults, without the connection settings.
    """

    def settings(config: GuideConfig) -> dict[str, Any]:
        values = to_dict(config)
        endpoint = {f"endpoint.{name}": value for name, value in values.pop("endpoint").items()}
        return {**values, **endpoint, "spec": without_address(config.spec)}

    default = settings(GuideConfig())
    chosen = {name: v for name, v in settings(guide).items() if v != default[name] and name not in GUIDE_CONNECTION_FIELDS}
    # without the section, as before there was one: stages made then are found
    return {name.removeprefix("endpoint."): value for name, value in chosen.items()}


def guide_task(config: Config) -> TaskConfig:
    """Return the task whose demonstrations the guide 'trained' is fine-tuned on."""
    task = config.task
    return TaskConfig(task.name, task.data, task.max_new_tokens, task.min_new_tokens, {**task.options, **config.guide.options})


def guide_stage(config: Config, stages: Path, report: Report) -> Path | str:
    """Fine-tune the guide 'trained', a separate model, on separate demonstrations."""
    return _sft(config, guide_task(config), config.guide.model, config.guide.sft, "guide", stages, report, None)


def _sft(
    config: Config, task: TaskConfig, shape: ModelConfig, training: SupervisedConfig, name: str, stages: Path,
    report: Report, at: Path | None,
) -> Path:  # fmt: skip
    # The guide's weights and batches must differ from the policy's.
    seed = (config.seed if training.seed is None else training.seed) + (1_000_003 if name == "guide" else 0)
    base = _base(config, shape, seed, stages, report)
    ingredients = {
        "base": base.fingerprint, "sft": to_dict(training), "seed": seed, "task": task_source(task),
        "budget": task.max_new_tokens,
        **_lora_inputs(config),
    }  # fmt: skip

    def build(folder: Path) -> dict[str, float]:
        model = base.load(config.lora.load_in_4bit and config.lora.in_sft)
        built = task_definition(task).build(task, model.tokenizer)
        if built.demonstrations is not None:
            built = dataclasses.replace(built, train=built.demonstrations)
        trained = with_adapter(config, model, seed)
        examples = TargetExamples(built, model, task.max_new_tokens, training.max_examples)
        cut = check_example_lengths(examples, model, task)
        measured = fit(trained, examples, training, seed, config.runtime.micro_batch_tokens, report)
        trained.save(folder)
        return measured | {"targets_truncated": cut}

    if at:
        return build_at(at, name, ingredients, build, report)
    return build_stage(stages, name, ingredients, build, report)


def _lora_inputs(config: Config) -> dict[str, Any]:
    """Return the additional inputs of a supervised stage that trains an adapter."""
    return {"lora": to_dict(config.lora)} if config.lora.in_sft else {}


def with_adapter(config: Config, model: LanguageModel, seed: int) -> LanguageModel:
    """Return the model with a new SFT adapter if configured, otherwise unchanged."""
    if not config.lora.in_sft or model.adapter is not None:
        return model
    lora.add(model.model, SFT, config.lora, seed)
    return replace(model, adapter=SFT)


def reward_stage(config: Config, stages: Path, report: Report, at: Path | None = None) -> Path:
    """Train the small n-gram sentiment classifier on the task's labeled texts."""
    labelled = task_definition(config.task).labeled_texts
    if labelled is None:
        raise ConfigError(
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


def distill_stage(config: Config, start: str, write: Callable[[int], list[Example]], stages: Path, report: Report) -> Path:
    """Fine-tune the policy on `distill.num_completions` completions of the guide.

    `write` generates that many examples.
    """
    seed = config.seed if config.distill.seed is None else config.distill.seed
    in_4bit = config.lora.load_in_4bit and (config.lora.in_sft or lora.is_adapter_folder(start))
    ingredients = {
        "start": Path(start).name if Path(start).parent == stages else source_fingerprint(start),
        "guide": guide_identity(config.guide),
        "guide_files": source_fingerprint(guide_model_path(config.guide.spec) or without_address(config.guide.spec)),
        "distill": to_dict(config.distill), "seed": seed, "texts_seed": config.seed, "task": task_source(config.task),
        "budget": [config.task.min_new_tokens, config.task.max_new_tokens], **_lora_inputs(config),
        **({"in_4bit": True} if in_4bit else {}),
    }  # fmt: skip

    def build(folder: Path) -> dict[str, float]:
        model = with_adapter(config, load_language_model(start, config.runtime.device, in_4bit), seed)
        measured = fit(
            model, write(config.distill.num_completions), config.distill, seed, config.runtime.micro_batch_tokens, report
        )
        model.save(folder)
        return measured

    return build_stage(stages, "distill", ingredients, build, report)
