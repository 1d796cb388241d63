"""Language models and critics on Hugging Face models, causal ones and encoder–decoders."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from rlgf import adapters, packing
from rlgf.config import AdapterConfig, ModelConfig
from rlgf.errors import UserError
from rlgf.forward import MicroBatch, is_encoder_decoder, trunk_states
from rlgf.hub import hub_answers, why_not
from rlgf.kernels import modules, native
from rlgf.tokens import Codec

VALUE_HEAD = "value_head.safetensors"
POLICY_ADAPTER, SFT = "policy", "sft"  # the names of adapters: the one that is trained, and the one that SFT left


@dataclass(frozen=True)
class LanguageModel:
    """A model that writes, with its tokenizer and what follows from both."""

    model: Any  # a PreTrainedModel with a language-model head
    tokenizer: Any
    end_ids: tuple[int, ...]
    context: int  # tokens of prompt and response together; of an encoder–decoder those of each
    vocabulary: int
    adapter: str | None = None  # which of the model's adapters it is, if there are any; None: the base without them

    @property
    def end_id(self) -> int:
        """The end token that is appended to targets and finished guide texts."""
        return self.end_ids[0]

    @property
    def codec(self) -> Codec:
        """Text to tokens and back, as this model takes and gives them."""
        return Codec(self.tokenizer, is_encoder_decoder(self.model))

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.device

    def active(self) -> AbstractContextManager[None]:
        """Within it the weights read as this model, whichever others share them."""
        return adapters.active(self.model, self.adapter)

    def trunk(self) -> "Trunk":
        """The model without its head."""
        return Trunk(self.model.base_model, self.adapter, self.model)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained when this model is: its adapter's parameters, or all."""
        return list(self.model.parameters()) if self.adapter is None else adapters.parameters(self.model, self.adapter)

    def weights(self) -> dict[str, Tensor]:
        """The values of what is trained, for a checkpoint."""
        return self.model.state_dict() if self.adapter is None else adapters.weights(self.model, self.adapter)

    def load_weights(self, values: Mapping[str, Tensor]) -> None:
        """Set what is trained to the values of a checkpoint."""
        if self.adapter is None:
            self.model.load_state_dict(values)
        else:
            adapters.load_weights(self.model, self.adapter, values)

    def fixed(self) -> "LanguageModel":
        """This model, from now on not trained; adapters on it may be."""
        self.model.requires_grad_(False).eval()
        return self

    def frozen(self) -> "LanguageModel":
        """A copy that will not be trained; a model among adapters is its own, as only the policy's and critics' are trained."""
        if adapters.has_adapters(self.model):
            return self
        twin = copy.deepcopy(self.model).requires_grad_(False).eval()
        return replace(self, model=twin)

    def save(self, folder: Path) -> None:
        """Write model (an adapter alone, where it is one) and tokenizer as `from_pretrained` reads them."""
        if self.adapter is None:
            self.model.save_pretrained(folder)
        else:
            adapters.save(self.model, self.adapter, folder)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Trunk:
    """A model without a head that a critic reads with: one of its own, or an adapter on another's weights."""

    model: Any
    adapter: str | None = None
    owner: Any = None  # the model that carries the adapters, where the trunk is a part of it

    def active(self) -> AbstractContextManager[None]:
        """Within it the weights read as this trunk."""
        return adapters.active(self.model, self.adapter, self.owner)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a Hub name or folder."""
    return from_pretrained(AutoTokenizer, path, "tokenizer")


def context_length(path: str) -> int:
    """Tokens a model reads at once, from its config alone."""
    return _context(_config(path))


def has_encoder(path: str) -> bool:
    """Whether a model is an encoder–decoder, from its config alone."""
    return bool(_config(path).is_encoder_decoder)


def _config(path: str) -> Any:
    """The config of a model, or of the base that an adapter belongs to."""
    base = adapters.base_of(path) if adapters.is_adapter_folder(path) else path
    return from_pretrained(AutoConfig, base, "model config")


def load_codec(path: str) -> Codec:
    """How a model of a Hub name or folder takes and gives text, before it is loaded."""
    return Codec(load_tokenizer(path), has_encoder(path))


def _context(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", 0) or 10**9)


def load_language_model(
    path: str, device: str = "cpu", in_4bit: bool = False, beside: LanguageModel | None = None, name: str = SFT
) -> LanguageModel:
    """A causal model or an encoder–decoder from a Hub name or folder, in fp32; no remote code is run.

    A folder with an adapter gives its base model reading with that adapter, called `name`. `in_4bit` is for base weights that
    are not trained. Where `beside`, a model that is loaded and whose base weights are not trained, has the same ones, those
    are shared.
    """
    adapted = adapters.is_adapter_folder(path)
    if adapted:
        refuse_other_heads(path)
    shares = beside is not None and adapters.rests_on(path, beside.model)
    if beside is not None and shares and (not adapted or adapters.has_layers_alone(path)):
        tokenizer, own = load_tokenizer(path), None
        _check_vocabulary(tokenizer, beside.vocabulary, path)
        if adapted:
            adapters.load(beside.model, path, own := adapters.free_name(beside.model, name))
        return replace(beside, adapter=own, tokenizer=tokenizer, end_ids=load_end_ids(path, tokenizer))
    base = adapters.base_of(path) if adapted else path
    auto = AutoModelForSeq2SeqLM if has_encoder(path) else AutoModelForCausalLM
    model = from_pretrained(auto, base, "language model", dtype=torch.float32, **(four_bits(device) if in_4bit else {}))
    loaded = bundle(model if in_4bit else model.to(device), load_tokenizer(path), path)
    if not adapted:
        return loaded
    adapters.load(loaded.model, path, name)
    return replace(loaded, adapter=name)


def refuse_other_heads(folder: str) -> None:
    """Refuse the adapter of a critic or a reward model where one of a language model is wanted."""
    if (Path(folder).expanduser() / VALUE_HEAD).is_file() or adapters.classifies(folder):
        raise UserError(
            f"{folder} holds the adapter of a critic or a reward model, which would lose its head in a language model: give "
            "the folder of a policy."
        )


def _check_vocabulary(tokenizer: Any, vocabulary: int, name: str) -> None:
    if len(tokenizer) > vocabulary:
        raise UserError(f"model '{name}' has {vocabulary} embeddings, but its tokenizer has {len(tokenizer)} tokens.")


def four_bits(device: str) -> dict[str, Any]:
    """The options with which `from_pretrained` loads weights in 4 bits, as QLoRA has them (2305.14314)."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise UserError("adapter.load_in_4bit needs bitsandbytes: pip install 'rlgf[4bit]'.")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": config, "device_map": device}


def bundle(model: Any, tokenizer: Any, name: str) -> LanguageModel:
    """Model and tokenizer with end tokens and context length worked out; raises where one is missing."""
    vocabulary = int(model.config.vocab_size)
    _check_vocabulary(tokenizer, vocabulary, name)
    ends = _end_ids(tokenizer, model.generation_config, model.config, name)
    return LanguageModel(speed_up(model), tokenizer, ends, _context(model.config), vocabulary)


def load_end_ids(path: str, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens of a model, from its configs alone: what `load_language_model` will find."""
    config = _config(path)
    try:
        generation: Any = GenerationConfig.from_pretrained(adapters.base_of(path) if adapters.is_adapter_folder(path) else path)
    except OSError:  # none is saved with it
        generation = None
    return _end_ids(tokenizer, generation, config, path)


def _end_ids(tokenizer: Any, generation: Any, config: Any, name: str) -> tuple[int, ...]:
    ends: list[int] = []
    for configured in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None), config.eos_token_id):
        for end in configured if isinstance(configured, list) else [configured]:
            # GPT-2's default id exceeds a small vocabulary
            if end is not None and end < int(config.vocab_size) and end not in ends:
                ends.append(end)
    if not ends:
        raise UserError(
            f"model '{name}' has no end token: set eos_token in its tokenizer_config.json or eos_token_id in its config.json."
        )
    return tuple(ends)


def shape_config(shape: ModelConfig, vocabulary: int) -> Any:
    """The transformers config of a new model of this shape."""
    if shape.architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, n_positions=shape.context,
            initializer_range=shape.initial_std, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    if shape.architecture == "t5":
        return T5Config(
            vocab_size=vocabulary, d_model=shape.width, d_kv=shape.width // shape.heads, d_ff=4 * shape.width,
            num_layers=shape.layers, num_heads=shape.heads, dropout_rate=0.0,
            tie_word_embeddings=False,  # pyright: ignore[reportCallIssue]  # they are tied all the same, but not scaled down
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=vocabulary, num_hidden_layers=shape.layers, hidden_size=shape.width, intermediate_size=4 * shape.width,
        num_attention_heads=shape.heads, max_position_embeddings=shape.context, initializer_range=shape.initial_std,
        tie_word_embeddings=True,
    )  # fmt: skip


def new_language_model(shape: ModelConfig, tokenizer: Any, seed: int) -> LanguageModel:
    """A model with random weights of the given shape, a pure function of the seed."""
    config = shape_config(shape, len(tokenizer))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if config.is_encoder_decoder:
        config.pad_token_id = config.decoder_start_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model: Any = auto.from_config(config).eval()
    if config.is_encoder_decoder:  # transformers draws embeddings for Adafactor's relative steps, too wide for Adam's
        nn.init.normal_(model.shared.weight, std=shape.width**-0.5, generator=torch.Generator().manual_seed(seed))
    return bundle(model, tokenizer, "new model")


_kernels = "auto"


def use_kernels(which: str) -> None:
    """Load models from now on with faster ways to the same numbers ('auto', or 'torch' without what a C compiler makes), or
    as transformers has them ('plain')."""
    global _kernels
    _kernels = which
    native.use(which == "auto")


def speed_up(model: Any) -> Any:
    """Faster ways to the same numbers: faster parts (`kernels`), texts in a line instead of padded rows (`packing`)."""
    if _kernels == "plain":
        return model
    modules.speed_up(model)
    return packing.enable(model)


def from_pretrained(auto: Any, path: str, kind: str, **options: Any) -> Any:
    """What an `Auto` class makes of a Hub name or folder; `kind` names it in the error. No remote code is run."""
    local = Path(path).expanduser().exists() or not hub_answers()
    try:
        return auto.from_pretrained(path, trust_remote_code=False, local_files_only=local, **options)
    except Exception as error:  # the Hub, the disk and the config parser fail in ways of their own; all mean the same
        reason = why_not(path, error)
        raise UserError(f"no {kind} can be loaded from '{path}' ({reason}): give a Hub name or a local folder.") from None


class Critic(nn.Module):
    """A value for every state: a linear head on the hidden states of a trunk.

    The trunk is a model of its own, an adapter on the policy's weights, or None where the hidden states are the policy's. The
    head starts at zero weight, so the first value of every state is `initial_value`.
    """

    def __init__(self, trunk: Trunk | None, width: int, initial_value: float) -> None:
        super().__init__()
        self.trunk = trunk
        if trunk is not None and trunk.adapter is None:
            self.add_module("model", trunk.model)  # its parameters are the critic's, its state is saved with the critic's
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, initial_value)

    def forward(self, batch: MicroBatch, precision: str, hidden: Tensor | None = None) -> Tensor:
        """Values [asked] of the states before the tokens asked about.

        `hidden` [asked, width] are the policy's states there, where its trunk is shared.
        """
        if self.trunk is not None:
            hidden = trunk_states(self.trunk, batch, precision)
        assert hidden is not None
        return self.head(hidden.float()).squeeze(-1)

    def trained(self) -> list[nn.Parameter]:
        """Its parameters, those of its adapter among them."""
        own = list(self.parameters())
        if self.trunk is not None and self.trunk.adapter is not None:
            own += adapters.parameters(self.trunk.owner, self.trunk.adapter)
        return own

    def weights(self) -> dict[str, Any]:
        """The values of what is trained, for a checkpoint."""
        found: dict[str, Any] = {"own": self.state_dict()}
        if self.trunk is not None and self.trunk.adapter is not None:
            found["adapter"] = adapters.weights(self.trunk.owner, self.trunk.adapter)
        return found

    def load_weights(self, values: Mapping[str, Any]) -> None:
        """Set what is trained to the values of a checkpoint, or of another critic of its kind."""
        self.load_state_dict(values["own"])
        if self.trunk is not None and self.trunk.adapter is not None:
            adapters.load_weights(self.trunk.owner, self.trunk.adapter, values["adapter"])

    def save(self, folder: Path) -> None:
        """Write its trunk (an adapter alone, where it is one; nothing, where it is the policy's) and its head.

        `critic.path` takes such a folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.trunk is not None and self.trunk.adapter is not None:
            adapters.save(self.trunk.owner, self.trunk.adapter, folder)
        elif self.trunk is not None:
            self.trunk.model.save_pretrained(folder)
        save_file({name: value.contiguous() for name, value in self.head.state_dict().items()}, folder / VALUE_HEAD)

    def with_head_of(self, path: str | None) -> "Critic":
        """This critic with the head that a saved one has, if `path` is one's folder."""
        if path is not None and (file := Path(path).expanduser() / VALUE_HEAD).is_file():
            self.head.load_state_dict(load_file(file))
        return self


def new_critic(kind: str, path: str, policy: LanguageModel, initial_value: float) -> Critic:
    """A critic for `policy`: 'separate', its trunk loaded from `path` (a reward model will do), or 'trunk', a head alone."""
    width = int(policy.model.get_output_embeddings().in_features)
    if kind == "trunk":
        return Critic(None, width, initial_value).with_head_of(path).to(policy.device)
    model = speed_up(from_pretrained(AutoModel, path, "critic", dtype=torch.float32)).eval()
    # a reward model may have a padding token more
    if int(model.config.vocab_size) not in (policy.vocabulary, policy.vocabulary + 1):
        raise UserError(
            f"critic.path '{path}' has {model.config.vocab_size} embeddings and the policy {policy.vocabulary}: "
            "a critic reads the policy's tokens, so choose one with the same tokenizer."
        )
    return Critic(Trunk(model), int(model.config.hidden_size), initial_value).with_head_of(path).to(policy.device)


def require_critic_adapter(path: str) -> None:
    """Refuse a `critic.path` that holds no adapter where one is needed."""
    if not adapters.is_adapter_folder(path):
        raise UserError(f"critic.path '{path}' holds no adapter, which critic.kind=adapter needs: use critic.kind=separate.")


def new_adapter_critic(
    name: str, policy: LanguageModel, initial_value: float, config: AdapterConfig, seed: int, path: str | None = None
) -> Critic:
    """A critic that is an adapter on the policy's base weights, and a head: that of `path`, or a new one.

    A new one begins as the adapter that SFT left, where there is one.
    """
    if path is not None:
        require_critic_adapter(path)
        adapters.load(policy.model, path, name)
    elif SFT in adapters.names(policy.model):
        adapters.copy_of(policy.model, SFT, name)
    else:
        adapters.add(policy.model, name, config, seed)
    width = int(policy.model.get_output_embeddings().in_features)
    critic = Critic(Trunk(policy.model.base_model, name, policy.model), width, initial_value)
    return critic.with_head_of(path).to(policy.device)


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
