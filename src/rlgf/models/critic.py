"""Critics: a value head on a separate model, on the policy, or on an adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
)

from rlgf.config.sections import LoraConfig
from rlgf.data.checksums import verify_folder
from rlgf.errors import ConfigError
from rlgf.models import lora
from rlgf.models.configs import decoder_opening, set_decoder_opening, vocabulary_size
from rlgf.models.forward import MicroBatch, backbone_states, head_width, is_encoder_decoder, state_width
from rlgf.models.language_model import SFT, VALUE_HEAD, Backbone, LanguageModel
from rlgf.models.loading import from_pretrained, use_fast_paths


class Critic(nn.Module):
    """A critic: a linear value head on the hidden states of a backbone.

    The backbone is a separate model, an adapter on the policy's weights, or None if the hidden
    states are the policy's. The head starts at zero weight, so the first value of every state is
    `initial_value`.
    """

    def __init__(self, backbone: Backbone | None, width: int, initial_value: float) -> None:
        super().__init__()
        self.backbone = backbone
        if backbone is not None and backbone.adapter is None:
            # registered so that its parameters are trained and saved as the critic's
            self.add_module("model", backbone.model)
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, initial_value)

    def forward(self, batch: MicroBatch, precision: str, hidden: Tensor | None = None) -> Tensor:
        """Compute the values of the states before the selected tokens, [selected].

        `hidden` [selected, width] are the policy's hidden states there, if the critic shares its
        backbone.
        """
        if self.backbone is not None:
            hidden = backbone_states(self.backbone, batch, precision)
        assert hidden is not None
        return self.head(hidden.float()).squeeze(-1)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the critic's parameters, including those of its adapter."""
        own = list(self.parameters())
        if self.backbone is not None and self.backbone.adapter is not None:
            own += lora.trainable_parameters(self.backbone.owner, self.backbone.adapter)
        return own

    def trainable_state(self) -> dict[str, Any]:
        """Return the values of the trainable parameters, for a checkpoint."""
        found: dict[str, Any] = {"own": self.state_dict()}
        if self.backbone is not None and self.backbone.adapter is not None:
            found["adapter"] = lora.trainable_state(self.backbone.owner, self.backbone.adapter)
        return found

    def load_trainable_state(self, values: Mapping[str, Any]) -> None:
        """Set the trainable parameters to those of a checkpoint or of another such critic."""
        self.load_state_dict(values["own"])
        if self.backbone is not None and self.backbone.adapter is not None:
            lora.load_trainable_state(self.backbone.owner, self.backbone.adapter, values["adapter"])

    def save(self, folder: Path) -> None:
        """Write the backbone and the value head to a folder for `critic.path`.

        Of a backbone that is an adapter, only the adapter is written; of the policy as backbone,
        nothing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.backbone is not None and self.backbone.adapter is not None:
            lora.save(self.backbone.owner, self.backbone.adapter, folder)
        elif self.backbone is not None:
            self.backbone.model.save_pretrained(folder)
        save_file({name: value.contiguous() for name, value in self.head.state_dict().items()}, folder / VALUE_HEAD)

    def load_value_head(self, path: str | None) -> "Critic":
        """Load the value head from the folder `path`, if any, and return this critic."""
        if path is not None and (file := Path(path).expanduser() / VALUE_HEAD).is_file():
            verify_folder(path)
            self.head.load_state_dict(load_file(file))
        return self


def new_critic(kind: str, path: str, policy: LanguageModel, initial_value: float) -> Critic:
    """Return a critic for `policy` with a backbone of its own or the policy's.

    `kind` is 'separate', with a backbone loaded from `path` (a reward model will do), or
    'value_head', a head on the policy.
    """
    if kind == "value_head":
        return Critic(None, head_width(policy), initial_value).load_value_head(path).to(policy.device)
    model: Any = from_pretrained(AutoModel, path, "critic", dtype=torch.float32)
    if is_encoder_decoder(model):
        set_decoder_opening(model, decoder_opening(policy.model))
    vocabulary = vocabulary_size(model.config)
    # a reward model may have an additional padding token
    if vocabulary not in (policy.vocab_size, policy.vocab_size + 1):
        raise ConfigError(
            f"critic.path '{path}' has {vocabulary} embeddings and the policy {policy.vocab_size}: "
            "a critic runs on the policy's tokens, so choose one with the same tokenizer."
        )
    backbone = Backbone(use_fast_paths(model).eval())
    return Critic(backbone, state_width(backbone), initial_value).load_value_head(path).to(policy.device)


def require_lora_critic(path: str) -> None:
    """Raise if a `critic.path` holds no adapter where one is needed."""
    if not lora.is_adapter_folder(path):
        raise ConfigError(f"critic.path '{path}' holds no adapter, which critic.kind=lora needs: use critic.kind=separate.")


def new_lora_critic(
    name: str, policy: LanguageModel, initial_value: float, config: LoraConfig, seed: int, path: str | None = None
) -> Critic:
    """Return a critic that is an adapter on the policy's base weights and a head.

    Both are loaded from `path`, or new. A new adapter starts as a copy of the adapter from SFT, if
    there is one.
    """
    if path is not None:
        require_lora_critic(path)
        verify_folder(path)
        lora.load(policy.model, path, name)
    elif SFT in lora.adapter_names(policy.model):
        lora.clone(policy.model, SFT, name)
    else:
        lora.add(policy.model, name, config, seed)
    backbone = Backbone(policy.model.base_model, name, policy.model)
    return Critic(backbone, state_width(backbone), initial_value).load_value_head(path).to(policy.device)
