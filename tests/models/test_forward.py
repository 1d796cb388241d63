"""The forward pass that scoring and training share: selected tokens, padding and micro-batches."""

import pytest
import torch

from helpers import asked
from rlgf.models.forward import group_by_length, iter_logits, pad_rows, token_logits
from rlgf.models.language_model import LanguageModel

ROWS = [[5, 9, 12, 7, 20, 33], [8, 8, 3], [40, 2, 19, 11]]


def test_logits_are_those_of_the_whole_model_at_the_asked_tokens(tiny_model: LanguageModel):
    ids = pad_rows(ROWS)
    rows, columns = torch.tensor([0, 0, 1, 2]), torch.tensor([1, 5, 2, 3])
    logits, hidden = token_logits(tiny_model, asked(ids, rows, columns))
    whole = tiny_model.model(input_ids=ids).logits
    torch.testing.assert_close(logits, whole[rows, columns - 1], atol=5e-6, rtol=1e-5)
    assert hidden.shape[0] == 4


def test_padding_and_neighbours_change_no_logit(tiny_model: LanguageModel):
    together, _ = token_logits(
        tiny_model, asked(pad_rows([*ROWS, list(range(20))]), torch.tensor([1, 1]), torch.tensor([1, 2]))
    )
    alone, _ = token_logits(tiny_model, asked(pad_rows(ROWS[1:2]), torch.tensor([0, 0]), torch.tensor([1, 2])))
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("in_line", [True, False])
@pytest.mark.parametrize("budget", [1, 7, 12, 1000])
def test_groups_hold_every_row_once_and_keep_to_the_budget(budget: int, in_line: bool):
    lengths = torch.tensor([6, 3, 4, 6, 1, 2])
    groups = group_by_length(lengths, budget, in_line)
    assert sorted(torch.cat(groups).tolist()) == list(range(6))
    for group in groups:
        cost = int(lengths[group].sum()) if in_line else len(group) * int(lengths[group].max())
        assert len(group) == 1 or cost <= budget


@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_reading_visits_each_selected_token_once_whatever_the_budget(tiny_model: LanguageModel, budget: int):
    ids = pad_rows(ROWS)
    selected = torch.zeros(ids.shape, dtype=torch.bool)
    selected[0, 2:5] = selected[2, 3] = True
    seen = torch.zeros(ids.shape)
    for batch, logits, _ in iter_logits(tiny_model, ids, torch.zeros(3, dtype=torch.int64), selected, budget, "fp32"):
        seen[batch.token_index] += logits.log_softmax(1).gather(1, ids[batch.token_index][:, None]).squeeze(1)
    whole = tiny_model.model(input_ids=ids).logits.log_softmax(2)
    expected = torch.zeros(ids.shape)
    expected[:, 1:] = whole[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    assert torch.allclose(seen, expected * selected, atol=1e-5)
