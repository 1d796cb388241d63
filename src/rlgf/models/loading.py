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
from rlgf.models import configs, lora, padding_free
from rlgf.models.input_probe import probe_input_format
from rlgf.models.language_model import SFT, VALUE_HEAD, LanguageModel

TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "tekken", "spiece", "sentencepiece", "bpe")


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of a Hub name or folder."""
    return from_pretrained(AutoTokenizer, path, "tokenizer")


def max_length_of(path: str) -> int:
    """Return the maximum number of tokens of a model, from its config alone."""
    config = _config(path)
    opening = configs.opening_of(config, _generation_config(path)) if config.is_encoder_decoder else ()
    return _max_length(config, opening)


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


def _max_length(config: Any, opening: tuple[int, ...]) -> int:
    """Return the maximum length of a model, minus one for a forced first token."""
    return configs.max_length(config) - max(0, len(opening) - 1)


def load_language_model(
    path: str, device: str = "cpu", in_4bit: bool = False, share_weights_with: LanguageModel | None = None, name: str = SFT
) -> LanguageModel:
    """Load a causal or encoder–decoder model from a Hub name or folder, in fp32.

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
        return replace(
            share_weights_with, adapter=own, tokenizer=tokenizer, eos_token_ids=load_eos_token_ids(path, tokenizer),
            absent_ids=absent_ids(tokenizer, share_weights_with.vocab_size),
        )  # fmt: skip
    base = lora.base_of(path) if adapted else path
    model = from_pretrained(
        _auto_class(_config(path), path),
        base,
        "language model",
        dtype=torch.float32,
        **(quantization_config_4bit(device) if in_4bit else {}),
    )
    loaded = wrap_model(model if in_4bit else model.to(device), load_tokenizer(path), path)
    if not adapted:
        return loaded
    lora.load(loaded.model, path, name)
    return replace(loaded, adapter=name)


def _auto_class(config: Any, path: str) -> Any:
    """Return the `Auto` class that loads a language model with a config.

    Some decoders that also take sound are listed among the encoder–decoders.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
    from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING as PAIRS

    pairs = type(config) in PAIRS and (config.is_encoder_decoder or type(config) not in CAUSAL)
    if not pairs and type(config) not in CAUSAL:
        raise ConfigError(
            f"'{path}' is a model of type '{config.model_type}', which transformers has as neither a causal model nor an "
            "encoder–decoder: choose another model (docs/models.md)."
        )
    return AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM


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
    vocabulary = configs.vocabulary_size(model.config, model)
    _check_vocabulary(tokenizer, vocabulary, name)
    ends = _eos_token_ids(tokenizer, model.generation_config, model.config, name)
    opening = configs.opening_of(model.config, model.generation_config)
    if model.config.is_encoder_decoder:
        if not opening:
            raise ConfigError(
                f"model '{name}' is an encoder–decoder without a first token of its output: set decoder_start_token_id in its "
                "config.json."
            )
        configs.set_decoder_opening(model, opening)
    model = use_fast_paths(model)
    return LanguageModel(
        model, tokenizer, ends, _max_length(model.config, opening), vocabulary, absent_ids=absent_ids(tokenizer, vocabulary)
    )


def absent_ids(tokenizer: Any, vocabulary: int) -> torch.Tensor | None:
    """Return the ids of embeddings without a token, or None if there are none.

    Models pad their vocabulary to a round number; nothing is known about these embeddings.
    """
    if len(tokenizer) >= vocabulary:
        return None
    present = set(tokenizer.get_vocab().values())
    missing = [id for id in range(vocabulary) if id not in present]
    return torch.tensor(missing) if missing else None


def _generation_config(path: str) -> Any:
    """Load the generation config of a model or an adapter's base, if there is one."""
    try:
        return GenerationConfig.from_pretrained(lora.base_of(path) if lora.is_adapter_folder(path) else path)
    except OSError:
        return None


def load_eos_token_ids(path: str, tokenizer: Any) -> tuple[int, ...]:
    """Return the EOS tokens of a model, from its configs alone.

    They are those that `load_language_model` finds.
    """
    return _eos_token_ids(tokenizer, _generation_config(path), _config(path), path)


def _eos_token_ids(tokenizer: Any, generation: Any, config: Any, name: str) -> tuple[int, ...]:
    ends: list[int] = []
    own = getattr(config, "eos_token_id", None) or getattr(configs.text_config(config), "eos_token_id", None)
    for configured in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None), own):
        for end in configured if isinstance(configured, list) else [configured]:
            # GPT-2's default id exceeds a small vocabulary
            if end is not None and 0 <= end < configs.vocabulary_size(config) and end not in ends:
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
    """Enable faster layers and packed rows in a model, with unchanged results; return it.

    See `kernels.dispatch`, `padding_free` and `input_probe`. Raises ConfigError for a model that is
    not causal.
    """
    if not dispatch.is_off():
        model = padding_free.enable(dispatch.replace_modules(model))
    # of a classifier on a causal model, the states are used; others are evaluated as they are
    is_classifier = "SequenceClassification" in type(model).__name__
    if is_classifier and not (hasattr(model, "score") and not model.config.is_encoder_decoder):
        return model
    probe_input_format(getattr(model, model.base_model_prefix) if is_classifier else model)
    return model


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
