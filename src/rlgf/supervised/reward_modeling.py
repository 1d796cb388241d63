"""Reward modeling: the training of reward models on pairs of completions."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from rlgf.algorithms.losses import preference_loss
from rlgf.config.sections import LoraConfig, PreferenceConfig
from rlgf.data.preferences import Pair, Pairs, length_baseline, pairwise_accuracy
from rlgf.errors import ConfigError
from rlgf.interrupts import Steps
from rlgf.models import lora
from rlgf.models.configs import vocabulary_size
from rlgf.models.forward import group_by_length
from rlgf.models.loading import from_pretrained, load_tokenizer, quantization_config_4bit, use_fast_paths
from rlgf.rewards.reward_model import PADDING, RewardModel, is_reward_model
from rlgf.supervised.loop import training_loop
from rlgf.text_metrics.optional import require_extra


def new_reward_model(path: str, config: PreferenceConfig, seed: int, device: str = "cpu", in_4bit: bool = False) -> RewardModel:
    """Load a model to train as a reward model.

    It is a language model with a new head, or a reward model with its own head, and has LoRA
    adapters if `config.lora.rank` is not 0. `in_4bit` is for weights on which only adapters are
    trained; the head is not quantized.

    A new head is initialized with standard deviation 1 / √(width + 1). Source: Huang et al. 2024
    (2403.17031), detail on the reward head.
    """
    tokenizer, is_trained = load_tokenizer(path), is_reward_model(path)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model '{path}' has no EOS token, after which the score is computed: set eos_token in its tokenizer."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = quantization_config_4bit(device) if in_4bit else {}
        model = from_pretrained(
            AutoModelForSequenceClassification, path, "language model", num_labels=1, dtype=torch.float32, **options
        )
        if model.config.is_encoder_decoder and not is_trained:
            raise ConfigError(f"'{path}' is an encoder–decoder, and reward models must be causal: give a causal model.")
        if hasattr(model, "score") and not is_trained:
            nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
        resized = _add_padding(model, tokenizer)
        model = use_fast_paths(model)
        if config.lora.rank:
            model = _with_adapters(model, config.lora)
    return RewardModel(model if in_4bit else model.to(device), tokenizer, path, embeddings_resized=resized)


def _add_padding(model: Any, tokenizer: Any) -> bool:
    """Set a padding token other than the EOS token.

    transformers takes the score at the last token that is not padding. Returns whether the model's
    embeddings were resized.
    """
    resized = False
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        unknown = tokenizer.unk_token
        if unknown and tokenizer.unk_token_id != tokenizer.eos_token_id:
            tokenizer.pad_token = unknown
        else:
            tokenizer.add_special_tokens({"pad_token": PADDING})
            resized = len(tokenizer) > vocabulary_size(model.config)
            if resized:
                model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    return resized


def _with_adapters(model: Any, config: LoraConfig) -> Any:
    """Return the model with trainable LoRA adapters and head, its other weights frozen."""
    require_extra("LoRA adapters", "lora", "peft")
    import peft

    base = Path(model.config.name_or_path)
    if base.is_dir():
        # valid in any working directory
        model.config.name_or_path = model.name_or_path = str(base.resolve())
    lora_config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS, r=config.rank, lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout, target_modules=list(config.target_modules) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )  # fmt: skip
    try:
        with lora.quiet_peft():
            return peft.get_peft_model(model, lora_config)
    except ValueError as error:
        modules = list(config.target_modules)
        raise ConfigError(
            f"preferences.lora.target_modules are {modules}, which peft rejects ({error}): choose others."
        ) from None


def train_reward_model(
    reward: RewardModel, pairs: Pairs, config: PreferenceConfig, seed: int, token_budget: int,
    report: Callable[[str], None] = lambda line: None, store: Steps | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train a reward model in place on pairs.

    Returns the metrics of training and those on held-out pairs, which are about other posts.
    `accuracy` is the fraction of held-out pairs in which the preferred completion scores higher,
    `length_baseline` the accuracy of preferring the longer completion, and
    `length_baseline_agreement` the fraction in which the model agrees with that rule.
    """
    training = config.training
    rows = _encoded(reward, pairs.train)
    num_truncated, reward.num_truncated = reward.num_truncated, 0
    examples = list(range(len(pairs.train)))

    def backward(batch: Sequence[int]) -> tuple[float, int]:
        return pairs_backward(reward, [rows[place] for place in batch], token_budget), len(batch)

    def show(place: int) -> str:
        return pairs.train[place].chosen

    reward.precision = training.precision
    parameters = [parameter for parameter in reward.model.parameters() if parameter.requires_grad]
    fitted = training_loop(reward.model, parameters, examples, training, seed, backward, report, "pairs", show, store)
    chosen, rejected = (_side(reward, pairs.test, side) for side in ("chosen", "rejected"))
    accuracy, count = pairwise_accuracy(chosen, rejected), len(pairs.test)
    length_differences = [len(pair.chosen.strip()) - len(pair.rejected.strip()) for pair in pairs.test]
    same = [(a - b) * sign > 0 for a, b, sign in zip(chosen, rejected, length_differences) if sign]
    return {
        **fitted,
        "accuracy": accuracy,
        "accuracy_standard_error": math.sqrt(accuracy * (1 - accuracy) / count),
        "length_baseline": length_baseline(pairs.test),
        "length_baseline_agreement": sum(same) / max(1, len(same)),
        "margin": sum(a - b for a, b in zip(chosen, rejected)) / count,
        "held_out_pairs": count,
        "held_out_posts": len({pair.group for pair in pairs.test}),
        "trained_pairs": len(pairs.train),
        "trained_posts": len({pair.group for pair in pairs.train}),
        "completions_truncated": num_truncated,
        "held_out_completions_truncated": reward.num_truncated,
    }


def _encoded(reward: RewardModel, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    prompts = [pair.prompt for pair in pairs]
    sides = (reward.encode(prompts, [pair.chosen for pair in pairs]), reward.encode(prompts, [pair.rejected for pair in pairs]))
    return list(zip(*sides))


def _side(reward: RewardModel, pairs: Sequence[Pair], side: str) -> list[float]:
    return reward([pair.prompt for pair in pairs], [getattr(pair, side) for pair in pairs])


def pairs_backward(reward: RewardModel, pairs: Sequence[tuple[list[int], list[int]]], token_budget: int) -> float:
    """Add the gradient of the mean preference loss over tokenized pairs.

    Both completions of a pair are in one micro-batch, since the loss depends on the difference of
    their scores. Returns the mean loss.
    """
    lengths = torch.tensor([max(len(chosen), len(rejected)) for chosen, rejected in pairs])
    total = 0.0
    for group in group_by_length(lengths, max(1, token_budget // 2), packed=False):
        members = [pairs[place] for place in group.tolist()]
        scores = reward.scores([row for side in zip(*members) for row in side])
        chosen, rejected = scores.split(len(members))
        loss = preference_loss(chosen, rejected).sum() / len(pairs)
        loss.backward()
        total += float(loss.detach())
    return total
