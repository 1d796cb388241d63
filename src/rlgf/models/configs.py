"""Properties of a model, whichever way its transformers config spells them.

A config may nest that of its language model (`text_config`), and name its sizes otherwise.
"""

import sys
from typing import Any

UNLIMITED = 10**9  # the maximum length of a model without one
VOCABULARY_NAMES = ("vocab_size", "n_words", "tgt_vocab_size", "n_tokens", "vocabulary_size")
LENGTH_NAMES = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_seq_length", "max_sequence_length", "seq_length",
    "n_ctx", "max_target_positions",
)  # fmt: skip
LAYER_NAMES = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")


def text_config(config: Any) -> Any:
    """Return the config of the language model inside a model's config, or the config itself."""
    nested = getattr(config, "get_text_config", None)
    return config if nested is None else nested(decoder=True)


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    for source in (config, text_config(config)):
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def vocabulary_size(config: Any, model: Any = None) -> int:
    """Return the number of embeddings of a model.

    If `model` is given and has an output layer, they are that layer's.
    """
    head = None if model is None else getattr(model, "get_output_embeddings", lambda: None)()
    size = getattr(head, "out_features", None) or getattr(head, "num_embeddings", None)
    return int(size or _first(config, VOCABULARY_NAMES) or 0)


def first_position(config: Any) -> int:
    """Return the index of the first token's position embedding: 0, or 1 after the padding's.

    RoBERTa and its relatives count from there, so a model with 514 of them holds 512 tokens.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    inner = text_config(config)
    if not hasattr(inner, "max_position_embeddings") or getattr(inner, "pad_token_id", None) is None:
        return 0
    try:
        kind: Any = MODEL_MAPPING.get(type(inner), None)
    except ValueError:  # transformers names a class that it does not have
        return 0
    if kind is None:
        return 0
    kind = kind[0] if isinstance(kind, tuple) else kind
    counting = (
        value
        for name, value in vars(sys.modules[kind.__module__]).items()
        if name.endswith("Embeddings") and isinstance(value, type) and value.__module__ == kind.__module__
    )
    counts = any(hasattr(value, "create_position_ids_from_input_ids") for value in counting)
    return int(inner.pad_token_id) + 1 if counts else 0


def max_length(config: Any) -> int:
    """Return the maximum number of tokens of a model, `UNLIMITED` if its config has none."""
    # T5's positions are relative; its `n_positions` says what it was trained on
    relative = hasattr(text_config(config), "relative_attention_num_buckets")
    length = _first(config, LENGTH_NAMES[:1] if relative else LENGTH_NAMES)
    return UNLIMITED if length is None else max(1, length - first_position(config))


def num_decoder_layers(config: Any) -> int:
    """Return the number of layers with a cache, for encoder–decoders those of the decoder."""
    return _first(config, LAYER_NAMES) or 0


def model_type(model: Any) -> str:
    """Return the type of a model as its config names it, such as 'llama'."""
    return str(getattr(getattr(model, "config", None), "model_type", "unknown"))


def decoder_opening(model: Any) -> tuple[int, ...]:
    """Return the tokens that open the output of an encoder–decoder's decoder.

    They are the start token, and the token that the model forces after it (BART, mBART, NLLB).
    """
    known = getattr(model, "_rlgf_decoder_opening", None)
    return known or opening_of(model.config, getattr(model, "generation_config", None)) or (0,)


def set_decoder_opening(model: Any, opening: tuple[int, ...]) -> None:
    """Set the tokens that open the decoder's output, for a model and its backbone."""
    for module in {id(part): part for part in (model, getattr(model, "base_model", model))}.values():
        module._rlgf_decoder_opening = opening


def opening_of(config: Any, generation: Any) -> tuple[int, ...]:
    """Return the opening of a decoder's output from the configs of a model.

    Empty for a causal model.
    """
    if not getattr(config, "is_encoder_decoder", False):
        return ()
    starts = (getattr(source, "decoder_start_token_id", None) for source in (config, text_config(config), generation))
    start = next((value for value in starts if value is not None), None)
    if start is None:
        return ()
    forced = getattr(generation, "forced_bos_token_id", None)
    if forced is None:
        forced = getattr(config, "forced_bos_token_id", None)
    return (int(start),) if forced is None or int(forced) < 0 else (int(start), int(forced))
