"""Loading and creation of Hugging Face language models, causal ones and encoder–decoders."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from rlgf.config.sections import ModelConfig
from rlgf.data.checksums import verify_folder
from rlgf.data.hub import hub_is_reachable, load_failure_reason
from rlgf.data.tokenization import Codec
from rlgf.errors import ConfigError
from rlgf.kernels import dispatch
from rlgf.models import lora, padding_free
from rlgf.models.language_model import SFT, VALUE_HEAD, LanguageModel

TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "tekken", "spiece", "sentencepiece", "bpe")


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of a Hub name or folder."""
    return from_pretrained(AutoTokenizer, path, "tokenizer")


def max_length_of(path: str) -> int:
    """Return the maximum number of tokens of a model, from its config alone."""
    return _max_length(_config(path))


def has_encoder(path: str) -> bool:
    """Return whether a model is an encoder–decoder, from its config alone."""
    return bool(_config(path).is_encoder_decoder)


def _config(path: str) -> Any:
    """Load the config of a model, or of the base model of an adapter."""
    base = lora.base_of(path) if lora.is_adapter_folder(path) else path
    return from_pretrained(AutoConfig, base, "model config")


def load_codec(path: str) -> Codec:
    """Load the codec of a Hub name or folder, without its model."""
    return Codec(load_tokenizer(path), has_encoder(path))


def _max_length(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", 0) or 10**9)


def load_language_model(
    path: str, device: str = "cpu", in_4bit: bool = False, share_weights_with: LanguageModel | None = None, name: str = SFT
) -> LanguageModel:
    """Load a causal model or an encoder–decoder from a Hub name or folder, in fp32.

    No remote code is run. An adapter folder gives its base model with that adapter, called `name`.
    `in_4bit` is for base weights that are not trained. If `share_weights_with`, a loaded model
    whose base weights are not trained, has the same base weights, these are shared.
    """
    adapted = lora.is_adapter_folder(path)
    if adapted:
        require_language_model(path)
    shares = share_weights_with is not None and lora.has_same_base(path, share_weights_with.model)
    if share_weights_with is not None and shares and (not adapted or lora.is_pure_lora(path)):
        tokenizer, own = load_tokenizer(path), None
        _check_vocabulary(tokenizer, share_weights_with.vocab_size, path)
        if adapted:
            lora.load(share_weights_with.model, path, own := lora.unique_name(share_weights_with.model, name))
        return replace(share_weights_with, adapter=own, tokenizer=tokenizer, eos_token_ids=load_eos_token_ids(path, tokenizer))
    base = lora.base_of(path) if adapted else path
    auto = AutoModelForSeq2SeqLM if has_encoder(path) else AutoModelForCausalLM
    model = from_pretrained(
        auto, base, "language model", dtype=torch.float32, **(quantization_config_4bit(device) if in_4bit else {})
    )
    loaded = wrap_model(model if in_4bit else model.to(device), load_tokenizer(path), path)
    if not adapted:
        return loaded
    lora.load(loaded.model, path, name)
    return replace(loaded, adapter=name)


def require_language_model(folder: str) -> None:
    """Raise if a folder holds the adapter of a critic or a reward model."""
    if (Path(folder).expanduser() / VALUE_HEAD).is_file() or lora.is_sequence_classifier(folder):
        raise ConfigError(
            f"{folder} holds the adapter of a critic or a reward model, which would lose its head in a language model: give "
            "the folder of a policy."
        )


def _check_vocabulary(tokenizer: Any, vocabulary: int, name: str) -> None:
    if len(tokenizer) > vocabulary:
        raise ConfigError(f"model '{name}' has {vocabulary} embeddings, but its tokenizer has {len(tokenizer)} tokens.")


def quantization_config_4bit(device: str) -> dict[str, Any]:
    """Return the options of `from_pretrained` for weights in 4 bits, as in QLoRA (2305.14314)."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ConfigError("lora.load_in_4bit needs bitsandbytes: pip install 'rlgf[4bit]'.")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": config, "device_map": device}


def wrap_model(model: Any, tokenizer: Any, name: str) -> LanguageModel:
    """Return model and tokenizer with their EOS tokens and maximum length.

    Raises ConfigError if the model has no EOS token, or too few embeddings for the tokenizer.
    """
    vocabulary = int(model.config.vocab_size)
    _check_vocabulary(tokenizer, vocabulary, name)
    ends = _eos_token_ids(tokenizer, model.generation_config, model.config, name)
    return LanguageModel(use_fast_paths(model), tokenizer, ends, _max_length(model.config), vocabulary)


def load_eos_token_ids(path: str, tokenizer: Any) -> tuple[int, ...]:
    """Return the EOS tokens of a model, from its configs alone.

    They are those that `load_language_model` finds.
    """
    config = _config(path)
    try:
        generation: Any = GenerationConfig.from_pretrained(lora.base_of(path) if lora.is_adapter_folder(path) else path)
    except OSError:  # the model has no generation config
        generation = None
    return _eos_token_ids(tokenizer, generation, config, path)


def _eos_token_ids(tokenizer: Any, generation: Any, config: Any, name: str) -> tuple[int, ...]:
    ends: list[int] = []
    for configured in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None), config.eos_token_id):
        for end in configured if isinstance(configured, list) else [configured]:
            # GPT-2's default id exceeds a small vocabulary
            if end is not None and end < int(config.vocab_size) and end not in ends:
                ends.append(end)
    if not ends:
        raise ConfigError(
            f"model '{name}' has no EOS token: set eos_token in its tokenizer_config.json or eos_token_id in its config.json."
        )
    return tuple(ends)


def shape_config(shape: ModelConfig, vocabulary: int) -> Any:
    """Return the transformers config of a new model of this shape."""
    if shape.architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, n_positions=shape.max_length,
            initializer_range=shape.init_std, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    if shape.architecture == "t5":
        return T5Config(
            vocab_size=vocabulary, d_model=shape.width, d_kv=shape.width // shape.heads, d_ff=4 * shape.width,
            num_layers=shape.layers, num_heads=shape.heads, dropout_rate=0.0,
            # they are tied all the same, but not scaled down
            tie_word_embeddings=False,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=vocabulary, num_hidden_layers=shape.layers, hidden_size=shape.width, intermediate_size=4 * shape.width,
        num_attention_heads=shape.heads, max_position_embeddings=shape.max_length, initializer_range=shape.init_std,
        tie_word_embeddings=True,
    )  # fmt: skip


def new_language_model(shape: ModelConfig, tokenizer: Any, seed: int) -> LanguageModel:
    """Create a model of this shape with random weights, a pure function of the seed."""
    config = shape_config(shape, len(tokenizer))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if config.is_encoder_decoder:
        config.pad_token_id = config.decoder_start_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model: Any = auto.from_config(config).eval()
    # transformers initializes embeddings for Adafactor's relative steps, too wide for Adam's
    if config.is_encoder_decoder:
        nn.init.normal_(model.shared.weight, std=shape.width**-0.5, generator=torch.Generator().manual_seed(seed))
    return wrap_model(model, tokenizer, "new model")


def use_fast_paths(model: Any) -> Any:
    """Enable faster layers and packed rows in a model, with the same results, and return it.

    See `kernels.dispatch` and `padding_free`.
    """
    return model if dispatch.is_off() else padding_free.enable(dispatch.replace_modules(model))


def from_pretrained(auto: Any, path: str, kind: str, **options: Any) -> Any:
    """Load a Hub name or folder by an `Auto` class; no remote code is run.

    `kind` names the object in the error. Raises ConfigError if it cannot be loaded, and DataError
    for a folder that differs from its manifest.
    """
    verify_folder(path)
    if auto is AutoTokenizer and Path(path).expanduser().is_dir():
        _require_tokenizer_files(Path(path).expanduser())
    local = Path(path).expanduser().exists() or not hub_is_reachable()
    try:
        return auto.from_pretrained(path, trust_remote_code=False, local_files_only=local, **options)
    except Exception as error:  # the Hub, the disk and the config parser raise many types
        reason = load_failure_reason(path, error)
        raise ConfigError(f"no {kind} can be loaded from '{path}' ({reason}): give a Hub name or a local folder.") from None


def _require_tokenizer_files(folder: Path) -> None:
    """Raise for a folder without tokenizer files; transformers would make an empty one."""
    if not any(file.name.startswith(TOKENIZER_FILES) or file.suffix in (".model", ".tiktoken") for file in folder.iterdir()):
        raise ConfigError(
            f"{folder} holds no tokenizer files (such as tokenizer.json): save the tokenizer next to the model, with "
            f"tokenizer.save_pretrained('{folder}')."
        )


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
