"""Reward models: sequence classifiers of one label that score completions of prompts.

A reward model takes text, so it may have any tokenizer: the prompt, the completion, and an EOS
token, after which the score is computed. Model of Bradley and Terry: one completion is preferred to
another with probability σ(difference of their scores).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlgf.data.chat import inputs_of
from rlgf.data.conversations.template import OPENED_THOUGHTS, ChatTemplate
from rlgf.data.preferences import Pair
from rlgf.data.tokenization import Codec, encode_continuation
from rlgf.errors import ConfigError
from rlgf.models import lora
from rlgf.models.configs import UNLIMITED, max_length
from rlgf.models.forward import backbone_states, group_rows, input_format, is_encoder_decoder, micro_batch, pad_rows
from rlgf.models.language_model import Backbone, LanguageModel
from rlgf.models.loading import from_pretrained, load_tokenizer, use_fast_paths
from rlgf.text_metrics.optional import require_extra
from rlgf.types import Prompt

PADDING = "<|pad|>"
REWARD_ADAPTER = "reward"
# the last tokens of a prompt that are never removed: `TL;DR:`, or the role of the reply
KEPT_PROMPT_TOKENS = 8


@dataclass(frozen=True)
class AdapterRewardModel:
    """A reward model as an adapter and a head on the policy's base weights."""

    backbone: Backbone
    score: nn.Linear

    @property
    def config(self) -> Any:
        """Return the config of the base model."""
        return self.backbone.model.config

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.backbone.model.device


class TooLongError(ValueError):
    """A completion that is longer than a reward model's maximum length."""


@dataclass
class RewardModel:
    """A reward model with its tokenizer; calling it returns scores, as with any reward.

    `scores` is differentiable and used in training. The score is that of the state after the last
    token, as in transformers' classifiers on causal models; other classifiers score prompt and
    completion as a pair of texts. If the prompt is a conversation and the tokenizer of this model
    has a chat template, the conversation is rendered with it. If a text is too long, the tokens
    before the last ones of its prompt are removed, none of its completion, and it is counted in
    `num_truncated`. A completion that is too long alone is scored by its beginning, and counted.
    """

    model: Any  # a sequence classifier of one label, with or without LoRA, or AdapterRewardModel
    tokenizer: Any
    name: str
    token_budget: int = 2048
    precision: str = "fp32"
    embeddings_resized: bool = False  # true if it has more embeddings than its initial model
    num_truncated: int = 0

    @property
    def classifier(self) -> Any:
        """Return the transformers model without the wrapper of its adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def scores_last_state(self) -> bool:
        """Return whether the score is a linear function of one state of a causal model."""
        return hasattr(self.classifier, "score") and not is_encoder_decoder(self.classifier)

    @property
    def max_length(self) -> int:
        """Return the maximum length of prompt and completion, in tokens."""
        return min(max_length(self.classifier.config), int(self.tokenizer.model_max_length or UNLIMITED))

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Return the score of each completion given its prompt."""
        rows = self.encode(prompts, texts, shortens=True)
        scores = torch.zeros(len(rows))
        with torch.no_grad():
            for members, values in self._batches(rows):
                scores[members] = values.float().cpu()
        return scores.tolist()

    def encode(self, prompts: Sequence[Prompt], texts: Sequence[str], shortens: bool = False) -> list[list[int]]:
        """Return the tokens of prompt, completion and closing tokens.

        A completion that alone is longer than `max_length` is truncated if `shortens` is set, and
        raises `TooLongError` otherwise.
        """
        if not self.scores_last_state:
            return [self._as_pair(prompt.text, text, shortens) for prompt, text in zip(prompts, texts)]
        chat, end = ChatTemplate(self.tokenizer), [int(self.tokenizer.eos_token_id)]
        plain = [Prompt(prompt.text) for prompt in prompts if prompt.messages is None]
        before = iter(Codec(self.tokenizer).prompts(plain))
        rows: list[list[int]] = []
        for prompt, text in zip(prompts, texts):
            if prompt.messages is None:
                parts = next(before), [*encode_continuation(self.tokenizer, text), *end]
            elif chat.available:
                parts = self._as_conversation(chat, prompt, text)
            else:
                parts = self._encode_plain(prompt.text), [*self._encode_plain(text), *end]
            rows.append(self._truncate(*parts, shortens))
        return rows

    def _encode_plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _as_conversation(self, chat: ChatTemplate, prompt: Prompt, text: str) -> tuple[list[int], list[int]]:
        assert prompt.messages is not None
        messages, inputs = list(prompt.messages), inputs_of(prompt)
        before = chat.prompt(messages, "the prompt", inputs)
        content = chat.strip_opening(messages, prompt.strip_reply_prefix(text))
        if "</think>" in content and OPENED_THOUGHTS.search(prompt.text):  # the policy's prompt has opened them
            content = f"<think>\n{content}"
        if messages[-1]["role"] == "assistant":
            messages.pop()
        whole = chat.render_closed([*messages, {"role": "assistant", "content": content}], "the prompt", inputs)
        start = len(before) if whole.startswith(before) else 0
        return self._encode_plain(whole[:start]), self._encode_plain(whole[start:])

    def _as_pair(self, prompt: str, text: str, shortens: bool) -> list[int]:
        """Return the tokens of prompt and completion as the tokenizer encodes a pair of texts."""
        ids = list(self.tokenizer(prompt, text)["input_ids"])
        if len(ids) <= self.max_length:
            return ids
        if len(ids) - len(self._encode_plain(prompt)) > self.max_length:
            if not shortens:
                raise self._too_long(len(ids) - len(self._encode_plain(prompt)))
            self.num_truncated += 1
            return list(self.tokenizer(prompt, text, truncation=True, max_length=self.max_length)["input_ids"])
        self.num_truncated += 1
        return list(self.tokenizer(prompt, text, truncation="only_first", max_length=self.max_length)["input_ids"])

    def _truncate(self, prompt: list[int], rest: list[int], shortens: bool) -> list[int]:
        room = self.max_length - len(rest)
        if room < 0 and not shortens:
            raise self._too_long(len(rest))
        if room < 0:
            self.num_truncated += 1
            return [*rest[: self.max_length - 1], rest[-1]]
        if len(prompt) > room:
            self.num_truncated += 1
            end = min(room, KEPT_PROMPT_TOKENS)
            prompt = [*prompt[: room - end], *prompt[len(prompt) - end :]]
        return [*prompt, *rest]

    def can_encode(self, pair: Pair) -> bool:
        """Return whether both completions of a pair fit in `max_length`."""
        num_truncated = self.num_truncated
        try:
            self.encode([pair.prompt, pair.prompt], [pair.chosen, pair.rejected])
        except TooLongError:
            return False
        finally:
            self.num_truncated = num_truncated
        return True

    def _too_long(self, tokens: int) -> TooLongError:
        return TooLongError(
            f"a response has {tokens} tokens, but the context of the reward model '{self.name}' is {self.max_length}"
        )

    def scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Compute the scores of encoded texts in one batch, with gradients, [rows]."""
        lengths = torch.tensor([len(row) for row in rows])
        if not self.scores_last_state:
            ids = pad_rows(rows, int(self.tokenizer.pad_token_id or 0))
            inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
            # 1 after the separator that closes the first of the two texts
            if "token_type_ids" in self.tokenizer.model_input_names:
                ends = (ids == self.tokenizer.sep_token_id).long()
                inputs["token_type_ids"] = ((ends.cumsum(1) - ends) > 0).long() * inputs["attention_mask"]
            device = self.classifier.device
            return self.model(**{name: value.to(device) for name, value in inputs.items()}).logits[:, 0]
        kind = input_format(self._backbone_model).rows
        if len(rows) > 1 and (kind == "single" or (kind == "equal" and len(set(lengths.tolist())) > 1)):
            return torch.cat([self.scores([row]) for row in rows])
        ids, selected = _with_end_column(rows, lengths)
        batch = micro_batch(
            self._backbone_model, torch.arange(len(rows)), ids, torch.ones(len(rows), dtype=torch.int64), selected
        )
        return self.classifier.score(backbone_states(self._backbone, batch, self.precision).float())[:, 0]

    @property
    def _backbone(self) -> Backbone:
        classifier = self.classifier
        if isinstance(classifier, AdapterRewardModel):
            return classifier.backbone
        return Backbone(getattr(classifier, classifier.base_model_prefix))

    @property
    def _backbone_model(self) -> Any:
        return self._backbone.model

    def _batches(self, rows: Sequence[Sequence[int]]) -> Any:
        """Yield the row indices and the scores of each micro-batch."""
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        kind = input_format(self._backbone_model).rows if self.scores_last_state else "padded"
        for members in group_rows(kind, lengths, None, self.token_budget):
            yield members, self.scores([rows[place] for place in members.tolist()])

    def save(self, folder: Path) -> None:
        """Write model (or adapters and head) and tokenizer to a folder.

        `from_pretrained` of transformers (or PEFT) loads it.
        """
        embeddings = {} if self.classifier is self.model else {"save_embedding_layers": self.embeddings_resized}
        self.model.save_pretrained(folder, **embeddings)
        self.tokenizer.save_pretrained(folder)


def _with_end_column(rows: Sequence[Sequence[int]], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Append one column to padded rows and select the column after each row's last token.

    The forward pass returns the state before a selected column, which is that of the last token.
    Returns ids and selection, both [rows, width + 1].
    """
    ids = pad_rows([[*row, 0] for row in rows])
    return ids, torch.arange(ids.shape[1]) == lengths[:, None]


def is_reward_model(path: str) -> bool:
    """Return whether a Hub name or folder is a sequence classifier of one label.

    Adapters for one count too. Only the config is loaded.
    """
    if lora.is_adapter_folder(path):
        return lora.is_sequence_classifier(path)
    config = from_pretrained(AutoConfig, path, "reward model")
    is_classifier = any("SequenceClassification" in str(name) for name in config.architectures or [])
    return is_classifier and int(config.num_labels) == 1


def require_reward_model(path: str) -> None:
    """Raise `ConfigError` for an adapter without the head of a reward model.

    Its head would be initialized at random.
    """
    if lora.is_adapter_folder(path) and not lora.is_sequence_classifier(path):
        raise ConfigError(f"'{path}' holds an adapter of a language model: give the folder of a reward model.")


def load_reward_model(
    path: str, device: str = "cpu", token_budget: int = 2048, precision: str = "fp32", backbone: LanguageModel | None = None
) -> RewardModel:
    """Load a reward model from a Hub name or folder, for scoring.

    Adapters are loaded onto the `backbone` if they were trained for its base weights; otherwise
    they are merged into a copy of their own base model.
    """
    require_reward_model(path)
    if backbone is not None and lora.is_adapter_folder(path) and lora.has_same_base(path, backbone.model):
        return _on_backbone(Path(path).expanduser(), backbone, token_budget, precision)
    if lora.is_adapter_folder(path):
        tokenizer = load_tokenizer(path)
        model = _load_adapters(Path(path).expanduser(), len(tokenizer))
    else:
        model = from_pretrained(AutoModelForSequenceClassification, path, "reward model", dtype=torch.float32)
        tokenizer = load_tokenizer(path)
    if int(model.config.num_labels) != 1:
        raise ConfigError(f"'{path}' is a classifier of {model.config.num_labels} labels: a reward model has one.")
    reward = RewardModel(
        use_fast_paths(model).to(device).requires_grad_(False).eval(), tokenizer, path, token_budget, precision
    )
    if reward.scores_last_state and tokenizer.eos_token_id is None:
        raise ConfigError(f"reward model '{path}' has no EOS token: set eos_token in its tokenizer_config.json.")
    return reward


def _on_backbone(folder: Path, backbone: LanguageModel, token_budget: int, precision: str) -> RewardModel:
    name = lora.unique_name(backbone.model, REWARD_ADAPTER)
    weight = lora.load_layers(backbone.model, folder, name)["score.weight"]
    score = nn.Linear(weight.shape[1], 1, bias=False).to(backbone.device)
    score.load_state_dict({"weight": weight})
    states_model = Backbone(backbone.model.base_model, name, backbone.model)
    model = AdapterRewardModel(states_model, score.requires_grad_(False))
    return RewardModel(model, load_tokenizer(str(folder)), str(folder), token_budget, precision)


def _load_adapters(folder: Path, vocabulary: int) -> Any:
    """Load adapters and head, and merge them into their base model.

    If its recorded path does not exist, the base model is looked for next to the adapters.
    """
    require_extra("a reward model with LoRA adapters", "lora", "peft")
    from peft import PeftConfig, PeftModel

    base = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    sibling = folder.parent / Path(base).name
    if Path(base).is_absolute() and not Path(base).exists() and sibling.is_dir():
        base = str(sibling)
    model = from_pretrained(
        AutoModelForSequenceClassification, base, f"base of the adapters in '{folder}'", num_labels=1, dtype=torch.float32
    )
    if vocabulary > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(vocabulary)
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
