"""The stages before RL: tokenizer, language model, SFT, sentiment reward, guide, distillation.

A stage is a folder named by a fingerprint of all its inputs. If the folder exists, the stage is
reused; if any input differs, the name differs. A folder appears only when it is complete.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlgf.config.base import to_dict
from rlgf.config.sections import GUIDE_CONNECTION_FIELDS, GuideConfig, PolicyLoraConfig, TaskConfig
from rlgf.data.checksums import content_identity
from rlgf.errors import ConfigError
from rlgf.generation.openai.client import without_address
from rlgf.models import lora
from rlgf.models.language_model import SFT, LanguageModel
from rlgf.models.loading import load_language_model, load_tokenizer, new_language_model
from rlgf.pipeline.resolve import BasePlan, DistillPlan, FineTuningPlan, GuidePlan, PolicyPlan, RewardPlan, TokenizerPlan
from rlgf.pipeline.stage_cache import StageCache
from rlgf.rewards.ngram import train_ngram
from rlgf.runs.identity import with_contents
from rlgf.runs.steps import StepStore
from rlgf.supervised.examples import SENTINELS, Example, TargetExamples, check_example_lengths, corrupt_spans, split_into_blocks
from rlgf.supervised.loop import fit

TOKENIZER_TEXTS = 8_000
END = "<|endoftext|>"


def prepare_tokenizer(plan: TokenizerPlan, cache: StageCache) -> tuple[Any, Any]:
    """Return a tokenizer and its fingerprint, before any model is built.

    It is that of a model, the task's own, or one trained here on the task's raw text.
    """
    if plan.path:
        return load_tokenizer(plan.path), content_identity(plan.path)
    definition, task = plan.task.definition, plan.task.config
    if definition.tokenizer:
        return definition.tokenizer(task), f"{task.name} words"
    if not plan.vocabulary or definition.raw_texts is None:
        raise ConfigError(
            f"task '{task.name}' has no tokenizer of its own: give --policy or model.path, or set model.vocabulary."
        )
    raw_texts, sentinels = definition.raw_texts, SENTINELS if plan.architecture == "t5" else ()
    inputs = {"vocabulary": plan.vocabulary, "texts": TOKENIZER_TEXTS, "task": task_source(task)}
    inputs |= {"sentinels": len(sentinels)} if sentinels else {}

    def build(folder: Path) -> dict[str, Any]:
        train_tokenizer(raw_texts(task, TOKENIZER_TEXTS), plan.vocabulary, sentinels).save_pretrained(folder)
        return {}

    folder = cache.build("tokenizer", inputs, build)
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


def load_base_model(
    plan: BasePlan, cache: StageCache, in_4bit: bool = False, share_weights_with: LanguageModel | None = None
) -> LanguageModel:
    """Return a model before SFT: loaded, pretrained on raw text, or new.

    If it is the base weights of `share_weights_with`, these are returned, without any adapter.
    """
    path = plan.shape.path or (str(pretrain_stage(plan, cache)) if plan.is_pretrained_here else None)
    if path is not None:
        return load_language_model(path, plan.machine.device, in_4bit, share_weights_with)
    return new_language_model(plan.shape, prepare_tokenizer(plan.tokenizer, cache)[0], plan.new_seed)


def _base_identity(plan: BasePlan, cache: StageCache) -> Any:
    """Return the identity of a model before SFT, for the fingerprints of later stages."""
    if plan.shape.path:
        return content_identity(plan.shape.path)
    if plan.is_pretrained_here:
        return pretrain_stage(plan, cache).name
    return {"new": to_dict(plan.shape), "tokenizer": prepare_tokenizer(plan.tokenizer, cache)[1], "seed": plan.new_seed}


def task_source(task: TaskConfig) -> dict[str, Any]:
    """Return the identity of a task's data: its name, options, their files and the data."""
    found = {"name": task.name, "options": task.options, "data": content_identity(task.data)}
    contents = with_contents({f"task.options.{name}": value for name, value in task.options.items()})
    files = {key: content for key, content in contents.items() if key.startswith("content of ")}
    return {**found, "files": files} if files else found


def pretrain_stage(plan: BasePlan, cache: StageCache, at: Path | None = None) -> Path:
    """Pretrain a small language model on the task's raw text, and return its folder."""
    task, shape, seed = plan.task.config, plan.shape, plan.pretrain_seed
    raw_texts = plan.task.definition.raw_texts
    if raw_texts is None:
        raise ConfigError(
            f"task '{task.name}' has no raw text to train a language model on: set pretrain.steps=0 and pretrain.epochs=0."
        )
    if shape.path:
        raise ConfigError(f"model.path is '{shape.path}', a trained model: remove it to train one, or skip the pretrain stage.")
    tokenizer, tokenizer_identity = prepare_tokenizer(plan.tokenizer, cache)
    inputs = {
        "shape": to_dict(shape), "tokenizer": tokenizer_identity, "pretrain": to_dict(plan.pretrain), "seed": seed,
        "task": task_source(task),
    }  # fmt: skip

    def build(folder: Path) -> dict[str, float]:
        model = new_language_model(shape, tokenizer, seed)
        texts = raw_texts(task, plan.pretrain.max_examples)
        examples = (
            corrupt_spans(texts, model, seed)
            if model.codec.is_encoder_decoder
            else split_into_blocks(texts, model, shape.max_length)
        )
        with StepStore(folder, cache.report) as store:
            metrics = fit(model, examples, plan.pretrain, seed, min(plan.machine.micro_batch_tokens, 1024), cache.report, store)
            model.save(folder)
        return metrics

    return cache.build("pretrain", inputs, build, at)


def starting_model(plan: PolicyPlan, cache: StageCache) -> str:
    """Return the policy's starting model, a folder or Hub name.

    It is the given policy, the base model fine-tuned on targets, or the base model.
    """
    if plan.path:
        return plan.path
    if not plan.sft.training.is_enabled and plan.base.shape.path:
        return plan.base.shape.path
    return str(fine_tune_stage(plan.sft, cache))


def fine_tune_stage(plan: FineTuningPlan, cache: StageCache, at: Path | None = None) -> Path:
    """Fine-tune a base model on a task's demonstrations, and return its folder."""
    task, training = plan.task.config, plan.training
    inputs = {
        "base": _base_identity(plan.base, cache), "sft": to_dict(training), "seed": plan.seed, "task": task_source(task),
        "budget": task.max_new_tokens, **_lora_inputs(plan.lora),
    }  # fmt: skip

    def build(folder: Path) -> dict[str, float]:
        model = load_base_model(plan.base, cache, plan.lora.load_in_4bit and plan.lora.in_sft)
        built = plan.task.definition.build(task, model.tokenizer)
        if built.demonstrations is not None:
            built = dataclasses.replace(built, train=built.demonstrations)
        trained = with_adapter(plan.lora, model, plan.seed)
        examples = TargetExamples(built, model, task.max_new_tokens, training.max_examples)
        truncated = check_example_lengths(examples, model, task)
        with StepStore(folder, cache.report) as store:
            metrics = fit(trained, examples, training, plan.seed, plan.base.machine.micro_batch_tokens, cache.report, store)
            trained.save(folder)
        return metrics | {"targets_truncated": truncated}

    return cache.build(plan.name, inputs, build, at)


def _lora_inputs(config: PolicyLoraConfig) -> dict[str, Any]:
    """Return the additional inputs of a supervised stage that trains an adapter."""
    return {"lora": to_dict(config)} if config.in_sft else {}


def with_adapter(config: PolicyLoraConfig, model: LanguageModel, seed: int) -> LanguageModel:
    """Return the model with a new SFT adapter if configured, otherwise unchanged."""
    if not config.in_sft or model.adapter is not None:
        return model
    lora.add(model.model, SFT, config, seed)
    return dataclasses.replace(model, adapter=SFT)


def reward_stage(plan: RewardPlan, cache: StageCache, at: Path | None = None) -> Path:
    """Train the small n-gram sentiment classifier on the task's labeled texts."""
    task, reward = plan.task.config, plan.config
    labeled_texts = plan.task.definition.labeled_texts
    if labeled_texts is None:
        raise ConfigError(
            f"task '{task.name}' has no labeled texts to train a sentiment reward on; from pairs a reward model is "
            "trained: set reward.path=preferences."
        )
    inputs = {"epochs": reward.epochs, "seed": reward.seed, "task": task_source(task)}

    def build(folder: Path) -> dict[str, float]:
        train, test = labeled_texts(task, "train"), labeled_texts(task, "test")
        with StepStore(folder, cache.report) as store:
            return train_ngram(folder, train, test, reward.epochs, reward.seed, cache.report, store)

    return cache.build("reward", inputs, build, at)


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
    # without the section's name, so that fingerprints of existing stages stay valid
    return {name.removeprefix("endpoint."): value for name, value in chosen.items()}


def distill_stage(
    plan: DistillPlan, guide: GuidePlan, start: str, sample: Callable[[int], list[Example]], cache: StageCache
) -> Path:
    """Fine-tune the policy on `distill.num_completions` completions of the guide.

    `sample` returns that many examples.
    """
    in_4bit = plan.lora.load_in_4bit and (plan.lora.in_sft or lora.is_adapter_folder(start))
    task = plan.task.config
    inputs = {
        "start": cache.identity(start),
        "guide": guide_identity(guide.config),
        "guide_files": guide.content_identity(),
        "distill": to_dict(plan.config), "seed": plan.seed, "texts_seed": plan.sampling_seed, "task": task_source(task),
        "budget": [task.min_new_tokens, task.max_new_tokens], **_lora_inputs(plan.lora),
        **({"in_4bit": True} if in_4bit else {}),
    }  # fmt: skip

    def build(folder: Path) -> dict[str, float]:
        model = with_adapter(plan.lora, load_language_model(start, plan.machine.device, in_4bit), plan.seed)
        examples = sample(plan.config.num_completions)
        with StepStore(folder, cache.report) as store:
            metrics = fit(model, examples, plan.config, plan.seed, plan.machine.micro_batch_tokens, cache.report, store)
            model.save(folder)
        return metrics

    return cache.build("distill", inputs, build)
