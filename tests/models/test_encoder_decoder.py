"""Encoder–decoders: sampling, the forward pass, and restarts from any prefix."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration, T5Model

from helpers import WAYS_TO_ATTEND, let_it_attend, with_fast
from rlgf.generation import kv_decoder
from rlgf.generation.base import SampledCompletions
from rlgf.generation.decoder import sample_completions
from rlgf.models import padding_free
from rlgf.models.forward import backbone_states, iter_logits, micro_batches, pad_rows, token_logits
from rlgf.models.language_model import Backbone, LanguageModel
from rlgf.models.loading import wrap_model
from rlgf.randomness import Purpose, uniform_rows
from rlgf.types import SamplingParams

SOURCES = [[5, 9, 12, 3, 7, 20], [11, 4], [2, 30, 4], [8, 8, 8, 8, 8, 8, 8, 8, 8], [5, 9, 12, 3, 7, 20]]
BEGUN: list[list[int]] = [[], [6, 7, 8, 9, 10], [22], [3, 17], []]
GREEDY = SamplingParams(greedy=True)
RESTRICTED = SamplingParams(temperature=0.8, top_k=5, top_p=0.9)


def tiny(kind: str, tokenizer: Any) -> LanguageModel:
    torch.manual_seed(5)
    shape = {"vocab_size": len(tokenizer), "d_model": 32, "pad_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    model: Any
    if kind == "t5":
        config = T5Config(
            **shape, d_kv=16, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0,
            relative_attention_num_buckets=8, relative_attention_max_distance=12,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
    else:
        config = BartConfig(
            **shape, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0, forced_eos_token_id=None,
        )  # fmt: skip
        model = BartForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.generation_config.forced_eos_token_id = None
    return wrap_model(model.eval(), tokenizer, kind)


@pytest.fixture(scope="module", params=["t5", "bart"])
def model(request: pytest.FixtureRequest, word_tokenizer: Any) -> LanguageModel:
    return tiny(request.param, word_tokenizer)


def write(
    model: LanguageModel, sources: Sequence[Sequence[int]], begun: Sequence[Sequence[int]], sampling: SamplingParams,
    most: int = 8,
    minimum: int = 0,
) -> SampledCompletions:  # fmt: skip
    starts = [len(prefix) for prefix in begun]
    draws = uniform_rows(0, Purpose.POLICY_TOKEN, range(len(begun)), most, starts)
    return sample_completions(model, begun, [most] * len(begun), [minimum] * len(begun), draws, sampling, encoder_ids=sources)


def rows_of(written: SampledCompletions) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(written.tokens, written.lengths.tolist())]


def test_t5_is_read_as_lines_and_bart_as_padded_rows(word_tokenizer: Any):
    assert padding_free.is_enabled(tiny("t5", word_tokenizer).model)
    assert not padding_free.is_enabled(tiny("bart", word_tokenizer).model)


@pytest.mark.parametrize("minimum", [0, 5])
def test_greedily_it_writes_what_generate_writes_restarted_or_not(model: LanguageModel, minimum: int):
    written = rows_of(write(model, SOURCES, BEGUN, GREEDY, minimum=minimum))
    for source, begun, mine in zip(SOURCES, BEGUN, written):
        theirs = model.model.generate(
            input_ids=torch.tensor([source]), attention_mask=torch.ones(1, len(source), dtype=torch.int64),
            decoder_input_ids=torch.tensor([[0, *begun]]), max_new_tokens=8, min_new_tokens=minimum, do_sample=False,
            num_beams=1,
        )  # fmt: skip
        assert mine == theirs[0, 1 + len(begun) :].tolist()


@pytest.mark.parametrize("sampling", with_fast([SamplingParams(), RESTRICTED], RESTRICTED))
def test_neighbours_and_shared_sources_change_nothing(model: LanguageModel, sampling: SamplingParams):
    together = rows_of(write(model, SOURCES, BEGUN, sampling))
    for row, mine in enumerate(together):
        starts = [len(BEGUN[row])]
        draws = uniform_rows(0, Purpose.POLICY_TOKEN, [row], 8, starts)
        alone = sample_completions(model, [BEGUN[row]], [8], [0], draws, sampling, encoder_ids=[SOURCES[row]])
        assert rows_of(alone) == [mine]


@pytest.mark.integration
def test_how_many_are_read_at_once_changes_nothing(model: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    together = write(model, SOURCES, BEGUN, SamplingParams())
    for most in (1, 20):
        monkeypatch.setattr(kv_decoder, "PREFILL_TOKENS", most)
        apart = write(model, SOURCES, BEGUN, SamplingParams())
        assert rows_of(apart) == rows_of(together)
        torch.testing.assert_close(apart.log_probs, together.log_probs, rtol=0, atol=1e-5)


def test_log_probs_are_those_of_a_full_forward(model: LanguageModel):
    written = write(model, SOURCES, BEGUN, SamplingParams(), minimum=8)
    rows = [[*source, *begun, *text] for source, begun, text in zip(SOURCES, BEGUN, rows_of(written))]
    ids, starts = pad_rows(rows), torch.tensor([len(source) for source in SOURCES])
    begun = starts + torch.tensor([len(prefix) for prefix in BEGUN])
    selected = torch.arange(ids.shape[1]) >= begun[:, None]
    selected &= torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    found = torch.zeros(ids.shape)
    for batch, logits, _ in iter_logits(model, ids, starts, selected, 40, "fp32"):
        found[batch.token_index] = logits.log_softmax(1).gather(1, ids[batch.token_index][:, None]).squeeze(1)
    theirs = torch.cat([row[row != 0] for row in found])
    assert torch.allclose(torch.cat(list(written.full_log_probs)), theirs, atol=2e-5)


def whole(model: Any, source: Sequence[int], response: Sequence[int]) -> Any:
    """Run transformers' own forward pass on one text."""
    decoder = torch.tensor([[0, *response[:-1]]])
    return model(input_ids=torch.tensor([source]), decoder_input_ids=decoder)


@pytest.mark.parametrize("way", WAYS_TO_ATTEND)
@pytest.mark.parametrize("begun", with_fast([0, 1], 1))  # tokens of a response that nobody asks about
def test_the_forward_pass_is_that_of_the_model_with_gradients(
    model: LanguageModel, begun: int, way: str, monkeypatch: pytest.MonkeyPatch
):
    let_it_attend(way, monkeypatch)
    responses = [[6, 7, 8], [9], [10, 11, 12, 13, 14], [15, 16], [1, 2]]
    ids = pad_rows([[*source, *response] for source, response in zip(SOURCES, responses)])
    starts = torch.tensor([len(source) for source in SOURCES])
    selected = (torch.arange(ids.shape[1]) >= starts[:, None] + begun) & (ids > 0)
    mine, theirs = copy.deepcopy(model.model), copy.deepcopy(model.model)
    theirs.set_attn_implementation("sdpa")
    loss = torch.zeros(())
    for batch in micro_batches(mine, ids, starts, selected, 1000):
        logits, _ = token_logits(Backbone(mine), batch)
        loss = loss - logits.log_softmax(1).gather(1, ids[batch.token_index][:, None]).sum()
    other = torch.zeros(())
    for source, response in zip(SOURCES, responses):
        logits = whole(theirs, source, response).logits[0, begun:]
        other = other - logits.log_softmax(1).gather(1, torch.tensor(response[begun:], dtype=torch.int64)[:, None]).sum()
    assert float(loss.detach()) == pytest.approx(float(other.detach()), rel=1e-5)
    loss.backward()
    other.backward()
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert torch.allclose(a.grad, b.grad, atol=2e-5 * max(1.0, float(b.grad.abs().max()))), name


def test_a_trunk_without_a_head_is_read_alike(word_tokenizer: Any):
    config = tiny("t5", word_tokenizer).model.config
    config._attn_implementation = "sdpa"
    trunk: Any = padding_free.enable(T5Model(config)).eval()
    ids = pad_rows([[*SOURCES[0], 6, 7, 8], [*SOURCES[1], 9, 10, 11, 12]])
    starts = torch.tensor([6, 2])
    selected = torch.zeros(ids.shape, dtype=torch.bool)
    selected[0, 6:9] = selected[1, 5] = True
    (batch,) = micro_batches(trunk, ids, starts, selected, 1000)
    states = backbone_states(Backbone(trunk), batch)
    trunk.set_attn_implementation("sdpa")
    first = whole(trunk, SOURCES[0], [6, 7, 8]).last_hidden_state[0]
    second = whole(trunk, SOURCES[1], [9, 10, 11, 12]).last_hidden_state[0]
    assert torch.allclose(states, torch.cat([first, second[3:]]), atol=1e-5)


def test_beam_search_is_that_of_transformers(model: LanguageModel):
    sampling = SamplingParams(num_beams=3)
    assert sampling.describe() == "beam search, 3 beams"
    written = rows_of(write(model, SOURCES, [[]] * 5, sampling, most=6, minimum=2))
    for source, mine in zip(SOURCES, written):
        theirs = model.model.generate(
            input_ids=torch.tensor([source]), num_beams=3, do_sample=False, max_new_tokens=6, min_new_tokens=2, pad_token_id=0
        )[0, 1:].tolist()
        assert mine == (theirs[: theirs.index(0) + 1] if 0 in theirs else theirs)
