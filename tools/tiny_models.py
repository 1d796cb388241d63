"""Tiny models with random weights of every architecture of the installed transformers.

`tiny_model(name, seq2seq)` shrinks the default config of a model type: every size that it knows by
name, in nested configs too. Where sizes depend on each other, `SHAPES` has those that fit.
"""

import copy
from typing import Any

import torch

VOCABULARY = 96
ABSENT = 4  # embeddings that the tokenizer has no token for
SPECIAL = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": 2}
MAX_PARAMETERS = 8_000_000
NOISE = 0.05  # added to all weights, so that no layer is without effect

WIDTH = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "n_embed": 32, "emb_dim": 32, "embed_dim": 32,
    "embedding_size": 32,
    "intermediate_size": 64, "n_inner": 64, "d_ff": 64, "ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "ffn_hidden_size": 64, "dff": 64, "d_inner": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "expert_dim": 32, "intermediate_size_mlp": 64,
    "dense_intermediate_size": 64, "moe_latent_size": 32, "word_embed_proj_dim": 32, "hidden_dim": 64, "lru_width": 32,
    "attention_hidden_size": 32, "expert_ffn_hidden_size": 32, "adapter_in_dim": 32, "adapter_input_size": 32,
    "adapter_out_dim": 32,
    "zero_expert_num": 0, "moe_shared_intermediate_size": 32,
    "moe_ffn_hidden_size": 32, "mlp_hidden_size": 64, "feed_forward_proj_dim": 64, "block_ff_dim": 64, "adapter_size": 8,
}  # fmt: skip
DEPTH = {
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_decoder_layers": 2, "decoder_layers": 2,
    "encoder_layers": 2, "num_encoder_layers": 2, "num_nextn_predict_layers": 0, "num_mem_blocks": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1, "num_kv_shared_layers": 0, "n_dense_layers": 1, "num_mtp_layers": 0,
}  # fmt: skip
HEADS = {
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "num_key_value_heads": 2,
    "num_kv_heads": 2, "head_dim": 8, "d_kv": 8, "rotary_dim": 4, "attention_head_dim": 8, "global_head_dim": 8,
    "num_global_key_value_heads": 2, "kv_channels": 8, "d_head": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 8, "swa_v_head_dim": 8, "dim_head": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "o_lora_rank": 16,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64, "o_groups": 1, "indexer_num_heads": 2, "indexer_head_dim": 8,
}  # fmt: skip
LENGTHS = {
    "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128, "n_ctx": 128, "max_source_positions": 128,
    "max_target_positions": 128, "seq_length": 128, "sliding_window": 64, "attention_window_size": 64, "window_size": 64,
    "local_attention": 64, "num_buckets": 8, "relative_attention_num_buckets": 8, "attention_chunk_size": 64,
    "context_length": 128,
    "max_length": 20, "chunk_size": 8, "mamba_chunk_size": 8, "local_radius": 8, "global_block_size": 4, "block_size": 8,
    "num_random_blocks": 1, "max_window_layers": 2, "original_max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "moe_num_experts": 2, "num_experts_per_tok": 1, "moe_k": 1,
    "top_k_experts": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1, "moe_topk": 1,
    "num_experts_per_token": 1, "expert_capacity": 64, "moe_layer_freq": 1, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "moe_num_shared_experts": 1, "moe_top_k": 1,
    "num_experts_per_group": 2, "topk": 1,
}  # fmt: skip
STATES = {
    "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_dt_rank": 4, "mamba_head_dim": 8, "mamba_num_heads": 8, "ssm_state_size": 8, "n_groups": 1, "mamba_d_ssm": 64,
    "mamba_ngroups": 1, "n_mamba_heads": 2, "time_step_rank": 4, "conv_kernel": 4, "mamba_headdim": 8,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "use_mamba_kernels": False, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_heads": 4, "linear_head_dim": 8, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": None,
    "qk_dim_factor": 0.5, "v_dim_factor": 1.0,
}  # fmt: skip
# of parts that read images or sound, which have no tokens here
OTHER = {
    "pronunciation_vocab_size": 96, "shape_vocab_size": 96, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    "encoder_hash_byte_group_vocab": 96, "encoder_hash_byte_group_nb_functions": 1, "bottleneck_dim": 32,
    "image_size": 32, "patch_size": 16, "num_channels": 3, "depth": 2, "out_hidden_size": 32,
}  # fmt: skip
SIZES: dict[str, Any] = WIDTH | DEPTH | HEADS | LENGTHS | EXPERTS | STATES | OTHER

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "attn_layer_types")
REMOVE = object()  # of a name in `SHAPES`: not set at all

SHAPES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1},
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "head_dim": 16, "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4,
        "layer_types": ["indexed_attention", "sliding_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"moe_topk": 2, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"], "num_hidden_layers": 4},
    "prophetnet": {"num_hidden_layers": REMOVE},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"], "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64, "indexer_compress_ratio": 4, "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2, "ple_layer_ids": [1],
        "ple_embed_dim": 32,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_hidden_layers": REMOVE, "attention_head_size": 8,
        "feed_forward_size": 64, "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 2,
    },
    "xlm": {"causal": True},
    "xlnet": {"max_position_embeddings": REMOVE},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attention_hidden_size": REMOVE, "head_dim": REMOVE},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "attention_head_dim": REMOVE,
        "head_dim": REMOVE, "attention_hidden_size": REMOVE,
        "n_mamba_heads": 8, "mamba_headdim": 8,
    },
}  # fmt: skip
"""What a model type needs beside, or instead of, the sizes by name."""


PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}


def shrunk(config: Any, drop: tuple[str, ...] = (), with_nones: bool = False) -> dict[str, Any]:
    """Return the arguments of a small config of the same kind as a default one.

    `with_nones` sets sizes too that the default leaves open.
    """
    known = {name: value for name, value in SIZES.items() if name not in drop and _is_set(config, name, with_nones)}
    if "kv_lora_rank" in known:
        known["num_key_value_heads"] = known.get("num_attention_heads", HEADS["num_attention_heads"])
    for name, value in vars(config).items():
        if hasattr(type(value), "model_type") and hasattr(type(value), "to_dict"):
            inner = {**value.to_dict(), **shrunk(value, drop, with_nones), **_special(value)}
            for removed in ("layer_types", "mlp_layer_types", "rope_scaling", "per_layer_config", "layer_overrides"):
                inner.pop(removed, None)
            known[name] = {**inner, **_layer_types(value), **_shape(value.model_type, inner)}
    return {**known, **_layer_types(config)}


def _shape(kind: str, known: dict[str, Any]) -> dict[str, Any]:
    wanted = SHAPES.get(kind, {})
    removed = {name for name, value in wanted.items() if value is REMOVE}
    if {"num_hidden_layers", *LAYER_KINDS} & set(wanted):  # one may be an alias of another
        removed |= set(LAYER_KINDS)
    for name in removed:
        known.pop(name, None)
    return copy.deepcopy({name: value for name, value in wanted.items() if value is not REMOVE})


def _is_set(config: Any, name: str, with_nones: bool) -> bool:
    if _follows(config, name):
        return False
    try:
        return getattr(config, name) is not None or with_nones
    except NotImplementedError:
        return False
    except AttributeError as error:
        return "per-layer attribute" in str(error)
    except Exception:  # a setting that differs by layer
        return True


def _follows(config: Any, name: str) -> bool:
    """Return whether a setting is a property that follows from others."""
    named = getattr(type(config), "attribute_map", {}).get(name, name)
    return getattr(getattr(type(config), named, None), "fset", True) is None


def _special(config: Any) -> dict[str, Any]:
    size = {"vocab_size": VOCABULARY} if hasattr(config, "vocab_size") else {}
    return size | {name: value for name, value in SPECIAL.items() if hasattr(config, name)}


def _layer_types(config: Any) -> dict[str, Any]:
    """Return two layers, of two kinds if the model has several."""
    found: dict[str, Any] = {}
    for name in LAYER_KINDS:
        if _follows(config, name):
            continue
        kinds = getattr(config, name, None)
        if isinstance(kinds, list | tuple) and kinds and isinstance(kinds[0], str):
            distinct = list(dict.fromkeys(kinds))
            found[name] = (distinct * 2)[:2]
    return found


def tiny_config(name: str, seq2seq: bool, vocabulary: int, drop: tuple[str, ...], options: dict[str, Any]) -> Any:
    """Return the config of a tiny model of a type; `options`: with_nones, rope."""
    from transformers import AutoConfig

    special = SPECIAL | {"vocab_size": vocabulary} | ({"decoder_start_token_id": 2} if seq2seq else {})
    known = shrunk(AutoConfig.for_model(name), drop, bool(options.get("with_nones")))
    arguments = {**known, **special, **({"rope_parameters": ROPE} if options.get("rope") else {})}
    arguments |= _shape(name, arguments)
    config = AutoConfig.for_model(name, **arguments)
    if not seq2seq and hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


VARIANTS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    ((), {}), (("head_dim",), {}), (("head_dim", "num_key_value_heads"), {}), ((), {"with_nones": True}), ((), {"rope": True}),
    (("intermediate_size",), {}), (("head_dim",), {"rope": True, "with_nones": True}),
)  # fmt: skip
"""Sizes that are not shrunk, and options, which are tried in this order until the model runs."""


def tiny_model(name: str, seq2seq: bool, vocabulary: int = VOCABULARY, seed: int = 0) -> Any:
    """Return a tiny model of a type, on the CPU, which transformers itself can evaluate.

    If there is none, it may be one that it cannot; if none can be made, raises the first error.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto: Any = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    first: Exception | None = None
    made: Any = None
    for drop, options in VARIANTS:
        try:
            config = tiny_config(name, seq2seq, vocabulary, drop, options)
            require_few_parameters(auto, config)
            torch.manual_seed(seed)
            if name in PARTS:  # the class is listed for a config that holds that of its own
                model = auto._model_mapping[type(config)](getattr(config, PARTS[name])).eval()
            else:
                model = auto.from_config(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point():
                        parameter.add_(NOISE * torch.randn_like(parameter))
        except Exception as error:  # configs of transformers raise anything
            first = first or error
            continue
        made = model if made is None else made
        try:
            ids = torch.tensor([[5, 6, 7, 8]])
            with torch.no_grad():
                model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
        except Exception:  # sizes that do not fit together
            continue
        return model
    if made is None:
        assert first is not None
        raise first
    return made


def require_few_parameters(auto: Any, config: Any) -> None:
    """Raise `ValueError` for a model that a config does not make tiny, before it takes its time.

    A model that cannot be made without numbers is counted by none.
    """
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    except Exception:  # of its own initialization; it is made with numbers
        return
    if size > MAX_PARAMETERS:
        raise ValueError(f"it has {size:,} parameters")


def tiny_tokenizer() -> Any:
    """Return a byte-level tokenizer without merges: every token is one letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(number) for number in range(33, 33 + VOCABULARY - ABSENT - len(SPECIAL))]
    names = ["<eos>", "<pad>", "<bos>", *letters]
    made = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(names)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")


def architectures() -> list[tuple[str, bool]]:
    """Return all model types of language models, and whether they are encoder–decoders."""
    from transformers.models.auto import modeling_auto as listed

    pairs = listed.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return [(name, False) for name in listed.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES] + [(name, True) for name in pairs]
