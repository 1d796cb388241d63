"""Models as people have them: padded vocabularies, forced first tokens, narrow embeddings, tied heads, RoBERTa's positions."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from helpers import WORDS
from rlgf.algorithms.guided import PPO
from rlgf.config.sections import LoraConfig, PPOConfig, TrainingConfig
from rlgf.errors import ConfigError
from rlgf.evaluation.model_metrics import kl_to_reference
from rlgf.generation.decoder import LocalSampler, sample_completions
from rlgf.models import lora
from rlgf.models.critic import new_critic, new_lora_critic
from rlgf.models.forward import backbone_states, micro_batches, token_logits
from rlgf.models.language_model import LanguageModel
from rlgf.models.loading import load_language_model, max_length_of, wrap_model
from rlgf.models.log_probs import entropy, token_log_probs
from rlgf.pipeline.build_models import merge
from rlgf.rewards.classifier import SequenceClassifier
from rlgf.rewards.reward_model import load_reward_model
from rlgf.rl.experience import ForwardConfig
from rlgf.rl.model_check import check_model
from rlgf.rl.rollout import RolloutConfig, collect_rollout
from rlgf.supervised.examples import Example
from rlgf.supervised.loop import fit
from rlgf.types import Prompt, SamplingParams

SIZE = len(WORDS)
LLAMA = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}  # fmt: skip
BART = {
    "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64, "dropout": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
PREFIXES = [[4, 5, 6], [7, 8], [9, 4, 5, 8, 6]]


def random_model(kind: str, vocabulary: int = SIZE, auto: Any = None, **shape: Any) -> Any:
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, eos_token_id=0, pad_token_id=1, bos_token_id=2, **shape)
    auto = auto or (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM)
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sampled(model: LanguageModel, sampling: SamplingParams, rows: int = 24, new: int = 10) -> Any:
    prefixes = [PREFIXES[row % len(PREFIXES)] for row in range(rows)]
    uniforms = np.random.default_rng(0).random((rows, new))
    sources = prefixes if model.codec.is_encoder_decoder else None
    starts: list[list[int]] = [[] for _ in range(rows)] if sources else prefixes
    return sample_completions(model, starts, [new] * rows, [0] * rows, uniforms, sampling, encoder_ids=sources)


# --- ids without a token ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def padded() -> LanguageModel:
    """A model most of whose embeddings have no token."""
    return wrap_model(random_model("llama", 4 * SIZE, **LLAMA), WORDS, "padded")


WAYS = {
    "all": SamplingParams(), "hot": SamplingParams(temperature=3.0), "top-k": SamplingParams(top_k=3 * SIZE),
    "top-p": SamplingParams(top_p=0.95), "greedy": SamplingParams(greedy=True), "beams": SamplingParams(num_beams=3),
}  # fmt: skip


@pytest.mark.parametrize("sampling", WAYS.values(), ids=WAYS)
def test_an_id_without_a_token_is_never_sampled(padded: LanguageModel, sampling: SamplingParams) -> None:
    found = sampled(padded, sampling)
    assert int(found.lengths.sum()) > 20
    assert int(found.tokens.max()) < SIZE


def test_it_is_left_out_of_both_softmaxes_and_has_no_gradient(padded: LanguageModel) -> None:
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    selected = torch.tensor([[False, True, True, True, True]])
    (batch,) = micro_batches(padded.model, ids, torch.ones(1, dtype=torch.int64), selected, 100)
    logits, _ = token_logits(padded, batch)
    assert bool((logits[:, SIZE:] == -torch.inf).all())
    assert float(entropy(logits.detach()).isfinite().all())
    values = token_log_probs(logits, ids[batch.token_index], inplace_backward=True)
    torch.testing.assert_close(values, logits[:, :SIZE].log_softmax(1).gather(1, ids[batch.token_index][:, None]).squeeze(1))
    values.sum().backward()
    gradient = padded.model.get_output_embeddings().weight.grad
    assert not bool(gradient[SIZE:].any())
    assert bool(gradient[:SIZE].any())
    padded.model.zero_grad()


def test_sampler_and_trainer_agree_without_it(padded: LanguageModel) -> None:
    report = check_model(wrap_model(random_model("llama", 4 * SIZE, **LLAMA), WORDS, "padded"))
    assert report.absent_ids == 3 * SIZE
    assert report.agreement.max_error < 1e-4


def test_the_exact_kl_leaves_them_out(padded: LanguageModel) -> None:
    reference = wrap_model(random_model("llama", 4 * SIZE, **LLAMA), WORDS, "padded")
    rollout_config = RolloutConfig(padded, LocalSampler(padded), None, SamplingParams(), 5, 0, 0)
    phases = PPO().build()
    rollout = collect_rollout(rollout_config, phases, phases.schedule(0, 0.0), [Prompt("a b")] * 4, range(4))
    exact, _ = kl_to_reference(rollout, padded, reference, ForwardConfig(SamplingParams(), PPOConfig(), 64))
    assert math.isfinite(exact)


def test_a_model_whose_tokenizer_has_all_of_its_ids_has_none_to_leave_out() -> None:
    assert wrap_model(random_model("llama", **LLAMA), WORDS, "whole").absent_ids is None


# --- forced first tokens ------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize(("kind", "forced"), [("bart", None), ("mbart", 7)])
def test_what_sft_taught_is_written_greedily_and_by_beams(kind: str, forced: int | None) -> None:
    made = random_model(kind, **BART)
    made.generation_config.forced_bos_token_id = forced
    model = wrap_model(made, WORDS, kind)
    examples = [Example([*source, 11, 12, 0], len(source)) for source in PREFIXES]
    fit(model, examples, TrainingConfig(steps=25, learning_rate=3e-2, batch_size=3), 0, 1000)
    for sampling in (SamplingParams(greedy=True), SamplingParams(num_beams=2)):
        assert sampled(model, sampling, 3, 4).tokens[:, :3].tolist() == [[11, 12, 0]] * 3


def test_the_forced_token_takes_a_position(tmp_path: Path) -> None:
    made = random_model("bart", **BART)
    made.generation_config.forced_bos_token_id = 2
    made.save_pretrained(tmp_path)
    WORDS.save_pretrained(tmp_path)
    model = load_language_model(str(tmp_path))
    assert model.max_length == max_length_of(str(tmp_path)) == 63
    assert sampled(model, SamplingParams(), 3, 63).lengths.max() <= 63


# --- embeddings narrower than the states --------------------------------------------------------------------------------


def test_every_critic_has_the_width_of_the_states(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
        "word_embed_proj_dim": 8, "do_layer_norm_before": False,
    }  # fmt: skip
    made = random_model("opt", **shape)
    made.save_pretrained(tmp_path)
    WORDS.save_pretrained(tmp_path)
    policy = load_language_model(str(tmp_path))
    ids, selected = torch.tensor([[4, 5, 6]]), torch.tensor([[False, True, True]])
    for kind in ("separate", "value_head"):
        critic = new_critic(kind, str(tmp_path), policy, 0.25)
        (batch,) = micro_batches(policy.model, ids, torch.ones(1, dtype=torch.int64), selected, 100)
        hidden = token_logits(policy, batch)[1] if kind == "value_head" else None
        assert critic(batch, "fp32", hidden).tolist() == [0.25, 0.25]
    adapted = new_lora_critic("critic", policy, 0.5, LoraConfig(rank=2), 0)
    assert adapted.backbone is not None
    assert adapted(batch, "fp32", None).tolist() == [0.5, 0.5]
    assert backbone_states(adapted.backbone, batch).shape == (2, 8)


# --- adapters on tied weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "target"),
    [
        ("llama", {**LLAMA, "tie_word_embeddings": True}, "lm_head"),
        ("llama", {**LLAMA, "tie_word_embeddings": True}, "embed_tokens"),
        ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}, "lm_head"),
    ],
)
def test_a_new_adapter_on_tied_weights_is_refused_by_the_name_of_its_layer(
    kind: str, shape: dict[str, Any], target: str
) -> None:
    model = random_model(kind, **shape)
    with pytest.raises(ConfigError, match=rf"lora\.target_modules names {target}, whose weights"):
        lora.add(model, "policy", LoraConfig(rank=2, target_modules=(target,)), 0)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_anothers_adapter_on_tied_weights_is_merged_into_untied_ones(
    target: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    import peft

    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    made = random_model("llama", **{**LLAMA, "tie_word_embeddings": True})
    made.save_pretrained(base)
    WORDS.save_pretrained(base)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
        adapted.save_pretrained(adapter)
        WORDS.save_pretrained(adapter)
        ids = torch.tensor([[4, 5, 6, 7]])
        with torch.no_grad():
            right = adapted.eval()(ids).logits
        merge(str(adapter), out)
        with torch.no_grad():
            found = AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


# --- positions that begin after those of the padding --------------------------------------------------------------------


@pytest.mark.parametrize("labels", [["NEGATIVE", "POSITIVE"], ["LABEL_0"]])
def test_a_model_with_34_positions_reads_32_tokens(labels: list[str], tmp_path: Path) -> None:
    shape = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "type_vocab_size": 1,
        "max_position_embeddings": 34, "num_labels": len(labels), "id2label": dict(enumerate(labels)),
        "label2id": {label: place for place, label in enumerate(labels)},
    }  # fmt: skip
    random_model("roberta", auto=AutoModelForSequenceClassification, **shape).save_pretrained(tmp_path)
    WORDS.save_pretrained(tmp_path)
    words = WORDS.convert_ids_to_tokens(list(range(4, 12)))
    reward: Any = SequenceClassifier(str(tmp_path)) if len(labels) > 1 else load_reward_model(str(tmp_path))
    assert reward.max_length == 32
    for tokens in (31, 32):
        text = next(
            text
            for count in range(1, 80)
            if len(WORDS(text := " ".join(words[place % 8] for place in range(count)))["input_ids"]) == tokens
        )
        found = reward([Prompt("")], [text])
        assert np.isfinite(found).all()
