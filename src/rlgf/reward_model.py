"""Reward models: sequence classifiers of one label that say how good a response to a prompt is, and their training on pairs.

A reward model reads text, so it may have any tokenizer: the prompt, the response, and an end token, behind which the score is
read. Bradley and Terry: one response is preferred to another with probability σ(difference of their scores).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from rlgf import adapters
from rlgf.config import PreferenceConfig
from rlgf.errors import UserError
from rlgf.forward import group_by_length, is_encoder_decoder, micro_batch, padded, trunk_states
from rlgf.models import LanguageModel, Trunk, four_bits, from_pretrained, load_tokenizer, speed_up
from rlgf.ops import preference_loss
from rlgf.packing import is_enabled
from rlgf.preferences import Pair, Pairs, agreement, longer_rule
from rlgf.prompting import Chat
from rlgf.scoring.extras import need
from rlgf.supervised import optimise
from rlgf.tokens import Codec, encode_continuation
from rlgf.types import Prompt

PADDING = "<|pad|>"
REWARD_ADAPTER = "reward"
ENDING = 8  # tokens at the end of a prompt that are never cut off: `TL;DR:`, or whose turn it is


@dataclass(frozen=True)
class Shared:
    """A reward model in the form of an adapter on the weights that a policy's adapters are on, and a head."""

    trunk: Trunk
    score: nn.Linear

    @property
    def config(self) -> Any:
        """That of the base model."""
        return self.trunk.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.trunk.model.device


class TooLongError(ValueError):
    """A response that a reward model cannot read whole."""


@dataclass
class RewardModel:
    """Scores texts. `reward(prompts, texts)` is a reward like any other; `scores` is what training differentiates.

    The score is that of the state after the last token, as transformers' classifiers on causal models have it; of other
    classifiers it is what they make of prompt and response as a pair of texts. Where the prompt is a conversation and this
    model's tokenizer has a chat template, it reads the conversation. A text that is too long loses what stands before the last
    tokens of its prompt, nothing of its response, and is counted in `texts_cut`.
    """

    model: Any  # a sequence classifier with one label, perhaps with LoRA adapters on it, or a `Shared`
    tokenizer: Any
    name: str
    token_budget: int = 2048
    precision: str = "fp32"
    grown: bool = False  # whether it has more embeddings than the model that it started from
    texts_cut: int = 0

    @property
    def classifier(self) -> Any:
        """The transformers model, without what adapters put around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def reads_states(self) -> bool:
        """Whether its score is a linear function of one state of a causal model."""
        return hasattr(self.classifier, "score") and not is_encoder_decoder(self.classifier)

    @property
    def limit(self) -> int:
        """Most tokens of a text."""
        length = getattr(self.classifier.config, "max_position_embeddings", None) or 10**9
        return min(int(length), int(self.tokenizer.model_max_length or 10**9))

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """One score for each text that answers its prompt."""
        rows = self.encode(prompts, texts)
        scores = torch.zeros(len(rows))
        with torch.no_grad():
            for members, values in self._batches(rows):
                scores[members] = values.float().cpu()
        return scores.tolist()

    def encode(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[list[int]]:
        """The tokens of prompt, response and what closes them; a response that is too long by itself is a `TooLongError`."""
        if not self.reads_states:
            return [self._as_pair(prompt.text, text) for prompt, text in zip(prompts, texts)]
        chat, end = Chat(self.tokenizer), [int(self.tokenizer.eos_token_id)]
        plain = [Prompt(prompt.text) for prompt in prompts if prompt.messages is None]
        before = iter(Codec(self.tokenizer).prompts(plain))
        rows: list[list[int]] = []
        for prompt, text in zip(prompts, texts):
            if prompt.messages is None:
                rows.append(self._fitted(next(before), [*encode_continuation(self.tokenizer, text), *end]))
            elif chat.available:
                rows.append(self._fitted(*self._as_conversation(chat, prompt, text)))
            else:
                rows.append(self._fitted(self._bare(prompt.text), [*self._bare(text), *end]))
        return rows

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _as_conversation(self, chat: Chat, prompt: Prompt, text: str) -> tuple[list[int], list[int]]:
        assert prompt.messages is not None
        messages = list(prompt.messages)
        before = chat.prompt(messages, "the prompt")
        said = chat.content(messages, prompt.said(text))
        if messages[-1]["role"] == "assistant":
            messages.pop()
        whole = chat.whole([*messages, {"role": "assistant", "content": said}], "the prompt")
        start = len(before) if whole.startswith(before) else 0
        return self._bare(whole[:start]), self._bare(whole[start:])

    def _as_pair(self, prompt: str, text: str) -> list[int]:
        """Prompt and response as a pair of texts, as the tokenizer joins those."""
        ids = list(self.tokenizer(prompt, text)["input_ids"])
        if len(ids) <= self.limit:
            return ids
        if len(ids) - len(self._bare(prompt)) > self.limit:
            raise self._too_long(len(ids) - len(self._bare(prompt)))
        self.texts_cut += 1
        return list(self.tokenizer(prompt, text, truncation="only_first", max_length=self.limit)["input_ids"])

    def _fitted(self, prompt: list[int], rest: list[int]) -> list[int]:
        room = self.limit - len(rest)
        if room < 0:
            raise self._too_long(len(rest))
        if len(prompt) > room:
            self.texts_cut += 1
            end = min(room, ENDING)
            prompt = [*prompt[: room - end], *prompt[len(prompt) - end :]]
        return [*prompt, *rest]

    def fits(self, pair: Pair) -> bool:
        """Whether both responses of a pair can be read whole."""
        cut = self.texts_cut
        try:
            self.encode([pair.prompt, pair.prompt], [pair.chosen, pair.rejected])
        except TooLongError:
            return False
        finally:
            self.texts_cut = cut
        return True

    def _too_long(self, tokens: int) -> TooLongError:
        return TooLongError(f"a response has {tokens} tokens, but the reward model '{self.name}' reads {self.limit}")

    def scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Scores of texts in tokens, [texts], all at once and with a gradient."""
        lengths = torch.tensor([len(row) for row in rows])
        if not self.reads_states:
            ids = padded(rows, int(self.tokenizer.pad_token_id or 0))
            inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
            if "token_type_ids" in self.tokenizer.model_input_names:  # 1 behind what closes the first of the two texts
                ends = (ids == self.tokenizer.sep_token_id).long()
                inputs["token_type_ids"] = ((ends.cumsum(1) - ends) > 0).long() * inputs["attention_mask"]
            device = self.classifier.device
            return self.model(**{name: value.to(device) for name, value in inputs.items()}).logits[:, 0]
        ids, selected = _behind(rows, lengths)
        batch = micro_batch(self._trunk, torch.arange(len(rows)), ids, torch.ones(len(rows), dtype=torch.int64), selected)
        return self.classifier.score(trunk_states(self._reader, batch, self.precision).float())[:, 0]

    @property
    def _reader(self) -> Trunk:
        classifier = self.classifier
        if isinstance(classifier, Shared):
            return classifier.trunk
        return Trunk(getattr(classifier, classifier.base_model_prefix))

    @property
    def _trunk(self) -> Any:
        return self._reader.model

    def _batches(self, rows: Sequence[Sequence[int]]) -> Any:
        """Micro-batches of texts with their scores."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        for members in group_by_length(lengths, self.token_budget, self.reads_states and is_enabled(self._trunk)):
            yield members, self.scores([rows[place] for place in members.tolist()])

    def save(self, folder: Path) -> None:
        """Write model (or adapters and head) and tokenizer as `from_pretrained` of transformers (or PEFT) reads them."""
        embeddings = {} if self.classifier is self.model else {"save_embedding_layers": self.grown}
        self.model.save_pretrained(folder, **embeddings)
        self.tokenizer.save_pretrained(folder)


def _behind(rows: Sequence[Sequence[int]], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Texts with one more column, and that column of each asked about: the state before it is the one after the text."""
    ids = padded([[*row, 0] for row in rows])
    return ids, torch.arange(ids.shape[1]) == lengths[:, None]


def is_reward_model(path: str) -> bool:
    """Whether a Hub name or folder holds a sequence classifier of one label, or adapters for one, from its config alone."""
    if adapters.is_adapter_folder(path):
        return adapters.classifies(path)
    config = from_pretrained(AutoConfig, path, "reward model")
    classifies = any("SequenceClassification" in str(name) for name in config.architectures or [])
    return classifies and int(config.num_labels) == 1


def refuse_language_models(path: str) -> None:
    """Refuse an adapter that has no head of a reward model: one would be drawn at random."""
    if adapters.is_adapter_folder(path) and not adapters.classifies(path):
        raise UserError(f"'{path}' holds an adapter of a language model: give the folder of a reward model.")


def load_reward_model(
    path: str, device: str = "cpu", token_budget: int = 2048, precision: str = "fp32", backbone: LanguageModel | None = None
) -> RewardModel:
    """A reward model of a Hub name or folder, to score with.

    Adapters are put on the `backbone`, where they were trained for its base weights; otherwise merged into a copy of theirs.
    """
    refuse_language_models(path)
    if backbone is not None and adapters.is_adapter_folder(path) and adapters.rests_on(path, backbone.model):
        return _on_backbone(Path(path).expanduser(), backbone, token_budget, precision)
    if adapters.is_adapter_folder(path):
        tokenizer = load_tokenizer(path)
        model = _load_adapters(Path(path).expanduser(), len(tokenizer))
    else:
        model = from_pretrained(AutoModelForSequenceClassification, path, "reward model", dtype=torch.float32)
        tokenizer = load_tokenizer(path)
    if int(model.config.num_labels) != 1:
        raise UserError(f"'{path}' is a classifier of {model.config.num_labels} labels: a reward model has one.")
    reward = RewardModel(speed_up(model).to(device).requires_grad_(False).eval(), tokenizer, path, token_budget, precision)
    if reward.reads_states and tokenizer.eos_token_id is None:
        raise UserError(f"reward model '{path}' has no end token: set eos_token in its tokenizer_config.json.")
    return reward


def _on_backbone(folder: Path, backbone: LanguageModel, token_budget: int, precision: str) -> RewardModel:
    name = adapters.free_name(backbone.model, REWARD_ADAPTER)
    weight = adapters.load_layers(backbone.model, folder, name)["score.weight"]
    score = nn.Linear(weight.shape[1], 1, bias=False).to(backbone.device)
    score.load_state_dict({"weight": weight})
    trunk = Trunk(backbone.model.base_model, name, backbone.model)
    model = Shared(trunk, score.requires_grad_(False))
    return RewardModel(model, load_tokenizer(str(folder)), str(folder), token_budget, precision)


def _load_adapters(folder: Path, vocabulary: int) -> Any:
    """Adapters and head, merged into the model that they were made for: where that was, or beside them if both were moved."""
    need("a reward model with LoRA adapters", "lora", "peft")
    from peft import PeftConfig, PeftModel

    base = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    beside = folder.parent / Path(base).name
    if Path(base).is_absolute() and not Path(base).exists() and beside.is_dir():
        base = str(beside)
    model = from_pretrained(
        AutoModelForSequenceClassification, base, f"base of the adapters in '{folder}'", num_labels=1, dtype=torch.float32
    )
    if vocabulary > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(vocabulary)
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def new_reward_model(path: str, config: PreferenceConfig, seed: int, device: str = "cpu", in_4bit: bool = False) -> RewardModel:
    """A reward model to be trained: a language model with a new head, or a reward model as it is, and adapters if asked for.

    `in_4bit` is for weights that only adapters are trained on; the head stays whole.

    The head starts with standard deviation 1 / √(width + 1). Source: Huang et al. 2024 (2403.17031), detail on the reward head.
    """
    tokenizer, goes_on = load_tokenizer(path), is_reward_model(path)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model '{path}' has no end token, behind which a score could be read: set eos_token in its tokenizer.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = four_bits(device) if in_4bit else {}
        model = from_pretrained(
            AutoModelForSequenceClassification, path, "language model", num_labels=1, dtype=torch.float32, **options
        )
        if model.config.is_encoder_decoder and not goes_on:
            raise UserError(f"'{path}' is an encoder–decoder, and a reward model reads a text at once: give a causal model.")
        if hasattr(model, "score") and not goes_on:
            nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.score.in_features + 1))
        grown = _add_padding(model, tokenizer)
        model = speed_up(model)
        if config.lora_rank:
            model = _with_adapters(model, config)
    return RewardModel(model if in_4bit else model.to(device), tokenizer, path, grown=grown)


def _add_padding(model: Any, tokenizer: Any) -> bool:
    """A padding token that is not the end token: transformers reads the score at the last token that is no padding.

    Returns whether the model's embeddings had to grow.
    """
    grown = False
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        unknown = tokenizer.unk_token
        if unknown and tokenizer.unk_token_id != tokenizer.eos_token_id:
            tokenizer.pad_token = unknown
        else:
            tokenizer.add_special_tokens({"pad_token": PADDING})
            grown = len(tokenizer) > int(model.config.vocab_size)
            if grown:
                model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    return grown


def _with_adapters(model: Any, config: PreferenceConfig) -> Any:
    """The model with LoRA adapters to train in its stead, and its head."""
    need("LoRA adapters", "lora", "peft")
    from peft import LoraConfig, TaskType, get_peft_model

    base = Path(model.config.name_or_path)
    if base.is_dir():
        model.config.name_or_path = model.name_or_path = str(base.resolve())  # found again from any working directory
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_modules) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )  # fmt: skip
    try:
        with adapters.quiet_peft():
            return get_peft_model(model, lora)
    except ValueError as error:
        modules = list(config.lora_modules)
        raise UserError(f"preferences.lora_modules are {modules}, which peft refuses ({error}): name others.") from None


def train_reward_model(
    reward: RewardModel, pairs: Pairs, config: PreferenceConfig, seed: int, token_budget: int,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:  # fmt: skip
    """Train in place on pairs; returns what was measured before and after, on pairs about other posts.

    `accuracy` is the share of held-out pairs in which the preferred response scores higher, `longer_rule` the same of the rule
    that the longer one is better, `prefers_longer` how often the model says what that rule says.
    """
    training = config.training
    rows = _encoded(reward, pairs.train)
    cut, reward.texts_cut = reward.texts_cut, 0
    examples = list(range(len(pairs.train)))

    def backward(batch: Sequence[int]) -> tuple[float, int]:
        return pairs_backward(reward, [rows[place] for place in batch], token_budget), len(batch)

    reward.precision = training.precision
    parameters = [parameter for parameter in reward.model.parameters() if parameter.requires_grad]
    fitted = optimise(reward.model, parameters, examples, training, seed, backward, report, "pairs")
    chosen, rejected = (_side(reward, pairs.test, side) for side in ("chosen", "rejected"))
    accuracy, count = agreement(chosen, rejected), len(pairs.test)
    longer = [len(pair.chosen.strip()) - len(pair.rejected.strip()) for pair in pairs.test]
    same = [(a - b) * sign > 0 for a, b, sign in zip(chosen, rejected, longer) if sign]
    return {
        **fitted,
        "accuracy": accuracy,
        "accuracy_standard_error": math.sqrt(accuracy * (1 - accuracy) / count),
        "longer_rule": longer_rule(pairs.test),
        "prefers_longer": sum(same) / max(1, len(same)),
        "margin": sum(a - b for a, b in zip(chosen, rejected)) / count,
        "held_out_pairs": count,
        "held_out_posts": len({pair.post for pair in pairs.test}),
        "trained_pairs": len(pairs.train),
        "trained_posts": len({pair.post for pair in pairs.train}),
        "texts_cut": cut,
        "held_out_texts_cut": reward.texts_cut,
    }


def _encoded(reward: RewardModel, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    prompts = [pair.prompt for pair in pairs]
    sides = (reward.encode(prompts, [pair.chosen for pair in pairs]), reward.encode(prompts, [pair.rejected for pair in pairs]))
    return list(zip(*sides))


def _side(reward: RewardModel, pairs: Sequence[Pair], side: str) -> list[float]:
    return reward([pair.prompt for pair in pairs], [getattr(pair, side) for pair in pairs])


def pairs_backward(reward: RewardModel, pairs: Sequence[tuple[list[int], list[int]]], token_budget: int) -> float:
    """Add the gradient of the mean preference loss over pairs of texts in tokens; returns the mean.

    The two sides of a pair are in one micro-batch, since the loss is about their difference.
    """
    lengths = torch.tensor([max(len(chosen), len(rejected)) for chosen, rejected in pairs])
    total = 0.0
    for group in group_by_length(lengths, max(1, token_budget // 2), in_line=False):
        members = [pairs[place] for place in group.tolist()]
        scores = reward.scores([row for side in zip(*members) for row in side])
        chosen, rejected = scores.split(len(members))
        loss = preference_loss(chosen, rejected).sum() / len(pairs)
        loss.backward()
        total += float(loss.detach())
    return total
