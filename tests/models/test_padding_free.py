"""The packed forward pass equals that of padded rows: logits, states, losses and gradients."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import WAYS_TO_ATTEND, asked, let_it_attend
from rlgf.models import padding_free
from rlgf.models.forward import backbone_states, micro_batches, pad_rows, token_logits
from rlgf.models.language_model import LanguageModel
from rlgf.models.loading import load_language_model

TEXTS = [[5, 9, 12, 7, 20, 33, 2, 4], [8, 8, 3], [40, 2, 19, 11, 30], [1, 6]]
ROWS = torch.tensor([0, 0, 0, 1, 2, 2, 3])
COLUMNS = torch.tensor([2, 3, 7, 1, 3, 4, 1])


def plain(tiny_model: LanguageModel) -> LanguageModel:
    """The same model, read as padded rows."""
    model = copy.deepcopy(tiny_model.model)
    model.set_attn_implementation("sdpa")
    return LanguageModel(model, tiny_model.tokenizer, tiny_model.eos_token_ids, tiny_model.max_length, tiny_model.vocab_size)


def test_both_architectures_are_read_as_lines(tiny_model: LanguageModel):
    assert padding_free.is_enabled(tiny_model.model)
    assert padding_free.is_enabled(tiny_model.frozen_copy().model)
    assert not padding_free.is_enabled(plain(tiny_model).model)


@pytest.mark.parametrize("way", WAYS_TO_ATTEND)
def test_logits_states_and_gradients_equal_those_of_padded_rows(
    tiny_model: LanguageModel, way: str, monkeypatch: pytest.MonkeyPatch
):
    let_it_attend(way, monkeypatch)
    results = []
    mine = LanguageModel(
        copy.deepcopy(tiny_model.model),
        tiny_model.tokenizer,
        tiny_model.eos_token_ids,
        tiny_model.max_length,
        tiny_model.vocab_size,
    )
    for language_model in (mine, plain(tiny_model)):
        language_model.model.requires_grad_(True)
        logits, hidden = token_logits(language_model, asked(pad_rows(TEXTS), ROWS, COLUMNS))
        loss = -logits.log_softmax(1)[torch.arange(7), pad_rows(TEXTS)[ROWS, COLUMNS]].mean() + hidden.square().mean()
        loss.backward()
        gradients = {name: value.grad.clone() for name, value in language_model.model.named_parameters()}
        results.append((logits.detach(), hidden.detach(), float(loss.detach()), gradients))
    (logits, hidden, loss, gradients), (other_logits, other_hidden, other_loss, other_gradients) = results
    assert torch.allclose(logits, other_logits, atol=1e-5)
    assert torch.allclose(hidden, other_hidden, atol=1e-5)
    assert loss == pytest.approx(other_loss, rel=1e-6)
    for name, gradient in gradients.items():
        scale = float(other_gradients[name].abs().max())
        assert torch.allclose(gradient, other_gradients[name], atol=1e-5 * max(scale, 1e-3)), name


def test_bf16_is_read_and_learnt_from_whatever_precision_positions_leave(tiny_model: LanguageModel):
    results = []
    mine = LanguageModel(
        copy.deepcopy(tiny_model.model),
        tiny_model.tokenizer,
        tiny_model.eos_token_ids,
        tiny_model.max_length,
        tiny_model.vocab_size,
    )
    for language_model, precision in ((mine, "bf16"), (plain(tiny_model), "fp32")):
        language_model.model.requires_grad_(True)
        logits, _ = token_logits(language_model, asked(pad_rows(TEXTS), ROWS, COLUMNS), precision)
        loss = -logits.log_softmax(1)[torch.arange(7), pad_rows(TEXTS)[ROWS, COLUMNS]].mean()
        loss.backward()
        norm = torch.stack([value.grad.norm() for value in language_model.model.parameters()]).norm()
        results.append((float(loss.detach()), float(norm)))
    assert results[0] == pytest.approx(results[1], rel=0.02)


def test_a_trunk_is_read_alike(tiny_model: LanguageModel):
    other = plain(tiny_model)
    mine, theirs = (backbone_states(m.backbone(), asked(pad_rows(TEXTS), ROWS, COLUMNS)) for m in (tiny_model, other))
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_the_line_holds_only_what_is_read(tiny_model: LanguageModel):
    selected = torch.zeros(pad_rows(TEXTS).shape, dtype=torch.bool)
    selected[torch.tensor([0, 2, 2]), torch.tensor([3, 1, 2])] = True
    batches = list(micro_batches(tiny_model.model, pad_rows(TEXTS), torch.zeros(4, dtype=torch.int64), selected, 100))
    lines = batches[0].packed
    assert len(batches) == 1
    assert lines.decoder.ids[:, :5].tolist() == [[5, 9, 12, 40, 2]]
    assert lines.decoder.positions[:, :5].tolist() == [[0, 1, 2, 0, 1]]
    assert lines.selected.tolist() == [2, 3, 4]


@pytest.mark.parametrize(("lengths", "filled"), [([3, 2], 16), ([16, 16], 32), ([16, 15], 32), ([16, 1], 32), ([32, 16], 48)])
def test_what_fills_a_line_up_stands_where_nothing_is_read(lengths: list[int], filled: int):
    line = padding_free.pack(torch.arange(1, 2 * max(lengths) + 1).view(2, -1), torch.tensor(lengths), torch.device("cpu"))
    tokens = sum(lengths)
    assert line.ids.shape == line.positions.shape == (1, filled)
    assert int(line.token_index.max()) < tokens
    assert len(line.padded_index) == filled
    assert set(line.padded_index[tokens:].tolist()) <= set(line.padding.tolist())


def test_a_text_as_long_as_the_context_is_read_however_long_that_is(new_tiny_model: Callable[..., LanguageModel]):
    model = new_tiny_model("gpt2", max_length=20)
    ids = torch.arange(21).expand(3, -1)
    selected = (torch.arange(21) == 20).expand(3, -1).clone()
    (batch,) = micro_batches(model.model, ids, torch.ones(3, dtype=torch.int64), selected, 100)
    logits, _ = token_logits(model, batch)
    assert torch.allclose(logits[0], model.model(ids[:1, :20]).logits[0, 19], atol=1e-5)


def test_the_last_block_feeds_forward_asked_states_alone(tiny_model: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    base = tiny_model.model.base_model
    blocks = next(child for child in base.children() if isinstance(child, torch.nn.ModuleList))
    seen: list[int] = []
    handles = [block.mlp.register_forward_hook(lambda m, i, output: seen.append(output.shape[1])) for block in blocks]
    token_logits(tiny_model, asked(pad_rows(TEXTS), ROWS, COLUMNS))
    for handle in handles:
        handle.remove()
    assert set(seen[:-1]) <= {16}  # thirteen tokens, filled up
    assert seen[-1] == 7


def test_outside_of_a_line_the_model_is_itself_and_is_saved_as_itself(tiny_model: LanguageModel, tmp_path: Path):
    ids = torch.tensor(TEXTS[:1])
    assert torch.equal(tiny_model.model(input_ids=ids).logits, plain(tiny_model).model(input_ids=ids).logits)
    tiny_model.save(tmp_path)
    assert padding_free.ATTENTION_NAME not in json.dumps(
        json.loads((tmp_path / "config.json").read_text()).get("_attn_implementation", "")
    )
    assert padding_free.is_enabled(load_language_model(str(tmp_path)).model)
