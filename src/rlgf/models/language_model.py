"""Language models: a transformers model with its tokenizer and derived settings."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlgf.data.tokenization import Codec
from rlgf.models import lora
from rlgf.models.forward import is_encoder_decoder

VALUE_HEAD = "value_head.safetensors"
POLICY_ADAPTER, SFT = "policy", "sft"  # adapter names: the trained one, and the one from SFT


@dataclass(frozen=True)
class LanguageModel:
    """A language model with its tokenizer, and the settings that follow from both."""

    model: Any  # a PreTrainedModel with a language-model head
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    max_length: int  # tokens of prompt and completion; of an encoder–decoder, of each
    vocab_size: int
    adapter: str | None = None  # the adapter of this model; None: the base weights alone
    # embeddings without a token, never sampled; None: there are none
    absent_ids: Tensor | None = field(default=None, compare=False)

    @property
    def eos_token_id(self) -> int:
        """Return the EOS token that is appended to targets and finished guide completions."""
        return self.eos_token_ids[0]

    @property
    def codec(self) -> Codec:
        """Return the codec that converts text to this model's tokens and back."""
        return Codec(self.tokenizer, is_encoder_decoder(self.model))

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return self.model.device

    @cached_property
    def head_to_body(self) -> float:
        """Return the number of parameters of the head over that of all others."""
        head = sum(parameter.numel() for parameter in self.model.get_output_embeddings().parameters())
        return head / max(1, sum(parameter.numel() for parameter in self.model.parameters()) - head)

    def activate(self) -> AbstractContextManager[None]:
        """Activate this model, of those that share its weights, within the block."""
        return lora.activate(self.model, self.adapter)

    def backbone(self) -> "Backbone":
        """Return the model without its head."""
        return Backbone(self.model.base_model, self.adapter, self.model)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters to train: those of the adapter, or all."""
        return list(self.model.parameters()) if self.adapter is None else lora.trainable_parameters(self.model, self.adapter)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the values of the trainable parameters, for a checkpoint."""
        return self.model.state_dict() if self.adapter is None else lora.trainable_state(self.model, self.adapter)

    def load_trainable_state(self, values: Mapping[str, Tensor]) -> None:
        """Set the trainable parameters to the values of a checkpoint."""
        if self.adapter is None:
            self.model.load_state_dict(values)
        else:
            lora.load_trainable_state(self.model, self.adapter, values)

    def freeze(self) -> "LanguageModel":
        """Freeze this model and return it; adapters on it may still be trained."""
        self.model.requires_grad_(False).eval()
        return self

    def frozen_copy(self) -> "LanguageModel":
        """Return a copy that will not be trained.

        A model with adapters is returned as it is: only the adapters of the policy and the critics
        are trained.
        """
        if lora.has_adapters(self.model):
            return self
        copied = copy.deepcopy(self.model).requires_grad_(False).eval()
        return replace(self, model=copied)

    def save(self, folder: Path) -> None:
        """Write the tokenizer and the model (or its adapter alone) for `from_pretrained`."""
        if self.adapter is None:
            self.model.save_pretrained(folder)
        else:
            lora.save(self.model, self.adapter, folder)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Backbone:
    """A critic's model without a head: a separate one, or an adapter on another's weights."""

    model: Any
    adapter: str | None = None
    owner: Any = None  # the model that carries the adapters, if `model` is a part of it
    absent_ids: Tensor | None = None  # has no meaning without a head

    def activate(self) -> AbstractContextManager[None]:
        """Activate this backbone on its shared weights within the block."""
        return lora.activate(self.model, self.adapter, self.owner)
