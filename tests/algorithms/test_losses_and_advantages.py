"""Losses and advantages: numbers checked by hand, and properties for all inputs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlgf import distributed
from rlgf.algorithms import losses
from rlgf.algorithms.advantages import explained_variance, gae, moments, place_at_end, td_errors, whiten
from rlgf.models.log_probs import SampledSupport, mask_ids, token_log_probs

LOG_2, LOG_3 = math.log(2), math.log(3)


def mask(*rows: str) -> Tensor:
    """Rows of '1' and '0' as a boolean tensor."""
    return torch.tensor([[letter == "1" for letter in row] for row in rows])


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def same(found: Tensor, expected: object, tolerance: float = 1e-6) -> None:
    expected = expected if isinstance(expected, Tensor) else torch.tensor(expected)
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)


# token weights


def test_a_constant_weighs_every_token_of_every_row_alike() -> None:
    weights = losses.token_weights(mask("110", "100", "000"), "constant", max_new_tokens=4)
    same(weights, [[1 / 12, 1 / 12, 0], [1 / 12, 0, 0], [0, 0, 0]])
    assert losses.weight_total(mask("110", "000"), "constant", 4) == 8
    assert losses.weight_total(mask("000", "000"), "constant", 4) == 0


def test_token_mean_weighs_tokens_alike() -> None:
    same(losses.token_weights(mask("110", "100")), [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]])


def test_sequence_mean_weighs_texts_alike_and_their_tokens_alike() -> None:
    same(losses.token_weights(mask("110", "100"), "sequence_mean"), [[0.25, 0.25, 0], [0.5, 0, 0]])


def test_a_text_without_a_selected_token_does_not_count_as_a_text() -> None:
    same(losses.token_weights(mask("110", "000"), "sequence_mean"), [[0.5, 0.5, 0], [0, 0, 0]])


def test_weights_take_a_total_counted_elsewhere() -> None:
    same(losses.token_weights(mask("110", "100"), total=6), [[1 / 6, 1 / 6, 0], [1 / 6, 0, 0]])
    same(losses.token_weights(mask("110", "100"), "sequence_mean", total=4), [[1 / 8, 1 / 8, 0], [1 / 4, 0, 0]])


def test_weight_total_counts_tokens_or_texts() -> None:
    assert losses.weight_total(mask("110", "100", "000"), "token_mean") == 3
    assert losses.weight_total(mask("110", "100", "000"), "sequence_mean") == 2


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown aggregation 'sum'"):
        losses.token_weights(mask("1"), "sum")


# rewards and advantages


def test_place_at_end_puts_each_value_at_the_last_selected_column() -> None:
    placed = place_at_end(torch.tensor([5.0, 7.0, 9.0, 4.0]), mask("110", "011", "000", "100"))
    same(placed, [[0, 5, 0], [0, 0, 7], [0, 0, 0], [4, 0, 0]])


def test_td_errors_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.75]])
    # 0 + ½·¼ − ½, 0 + ½·¾ − ¼, 1 + 0 − ¾
    same(td_errors(rewards, values, mask("111"), gamma=0.5), [[-0.375, 0.125, 0.25]])


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.75]])
    # A_2 = .25, A_1 = .125 + ¼·.25, A_0 = −.375 + ¼·.1875
    same(gae(rewards, values, mask("111"), gamma=0.5, gae_lambda=0.5), [[-0.328125, 0.1875, 0.25]])


def test_gae_sees_only_the_selected_run() -> None:
    rewards, values = torch.tensor([[9.0, 0.0, 1.0, 9.0]]), torch.tensor([[9.0, 0.5, 0.25, 9.0]])
    # δ_1 = 0 + .25 − .5, δ_2 = 1 + 0 − .25
    same(td_errors(rewards, values, mask("0110"), gamma=1.0), [[0, -0.25, 0.75, 0]])
    same(gae(rewards, values, mask("0110"), gamma=1.0, gae_lambda=1.0), [[0, 0.5, 0.75, 0]])


def test_gae_with_lambda_0_is_the_td_error_and_with_1_the_return_minus_the_value() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[10.0, 20.0, 40.0]])
    same(gae(rewards, values, mask("111"), 1.0, 0.0), td_errors(rewards, values, mask("111"), 1.0))
    same(gae(rewards, values, mask("111"), 1.0, 1.0), [[7 - 10, 6 - 20, 4 - 40]])


# whitening


def test_moments_are_count_sum_and_sum_of_squares_of_the_selected() -> None:
    assert moments(torch.tensor([[1.0, 3.0, 100.0]]), mask("110")) == distributed.Moments(2.0, 4.0, 10.0)


def test_whiten_shifts_to_mean_0_and_scales_to_variance_1() -> None:
    same(whiten(torch.tensor([[1.0, 3.0, 100.0]]), mask("110")), [[-1, 1, 0]])


def test_whiten_takes_moments_over_all_processes() -> None:
    # here 5 and 7, in another process 1 and 3: mean 4, variance 5
    over = distributed.Moments(4.0, 16.0, 84.0)
    same(whiten(torch.tensor([[5.0, 7.0]]), mask("11"), over), [[1 / 5**0.5, 3 / 5**0.5]])


def test_whitening_one_value_or_equal_values_gives_zero() -> None:
    same(whiten(torch.tensor([[4.0, 8.0]]), mask("10")), [[0, 0]])
    same(whiten(torch.tensor([[4.0, 4.0]]), mask("11")), [[0, 0]])


# losses


def test_ppo_loss_clips_only_what_would_gain_from_leaving() -> None:
    log_probs = torch.tensor([LOG_2, LOG_2, -LOG_2, -LOG_2])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, ratio = losses.ppo_loss(log_probs, torch.zeros(4), advantages, torch.full((4,), 0.25), clip_range=0.2)
    same(ratio, [2, 2, 0.5, 0.5])
    same(loss, -(1.2 - 2.0 + 0.5 - 0.8) / 4)


def test_an_asymmetric_clip_lets_ratios_rise_further_than_fall() -> None:
    log_probs, advantages = logs(1.25, 1.4, 0.7, 0.7), torch.tensor([1.0, 1.0, -1.0, 1.0])
    loss, _ = losses.ppo_loss(log_probs, torch.zeros(4), advantages, torch.ones(4), clip_range=0.2, clip_range_high=0.28)
    same(loss, -(1.25 + 1.28 - 0.8 + 0.7))


def test_a_dual_clip_bounds_what_a_negative_advantage_pays() -> None:
    log_probs, advantages = logs(5.0, 2.0, 5.0), torch.tensor([-1.0, -1.0, 1.0])
    loss, _ = losses.ppo_loss(log_probs, torch.zeros(3), advantages, torch.ones(3), clip_range=0.2, dual_clip=3.0)
    same(loss, -(-3.0 - 2.0 + 1.2))


def test_the_ratio_of_a_sequence_is_the_mean_or_the_sum_of_its_logarithms() -> None:
    log_ratio, rows = torch.tensor([LOG_2, 0.0, LOG_3, LOG_2]), torch.tensor([7, 7, 2, 7])
    same(losses.importance_ratio(log_ratio, rows, "token"), [2, 1, 3, 2])
    same(losses.importance_ratio(log_ratio, rows, "sequence"), [4 ** (1 / 3), 4 ** (1 / 3), 3, 4 ** (1 / 3)])
    same(losses.importance_ratio(log_ratio, rows, "sequence_sum"), [4, 4, 3, 4])
    assert losses.importance_ratio(torch.zeros(0), torch.zeros(0, dtype=torch.int64), "sequence").numel() == 0
    with pytest.raises(ValueError, match="unknown level 'row'"):
        losses.importance_ratio(log_ratio, rows, "row")


def test_every_token_of_a_sequence_ratio_has_a_gradient() -> None:
    log_probs = torch.tensor([LOG_2, 0.0, 0.0], requires_grad=True)
    ratio = losses.importance_ratio(log_probs, torch.tensor([0, 0, 1]), "sequence_sum")
    losses.ppo_loss(log_probs, torch.zeros(3), torch.tensor([1.0, 1.0, 1.0]), torch.ones(3), 2.0, ratio=ratio)[0].backward()
    assert log_probs.grad is not None
    same(log_probs.grad, [-4, -4, -1])  # both tokens of the first row move both copies of its ratio


def test_cispo_keeps_the_gradient_of_a_token_whose_weight_is_clipped() -> None:
    log_probs = torch.tensor([LOG_3, LOG_3, -LOG_2], requires_grad=True)
    ratio = losses.importance_ratio(log_probs, torch.arange(3), "token")
    loss = losses.cispo_loss(log_probs, torch.tensor([1.0, -2.0, 1.0]), torch.full((3,), 0.5), ratio, clip_range_high=1.0)
    loss.backward()
    same(loss.detach(), -(2 * LOG_3 - 4 * LOG_3 - 0.5 * LOG_2) / 2)
    assert log_probs.grad is not None
    same(log_probs.grad, [-1, 2, -0.25])


def test_ppo_gradient_at_ratio_1_is_minus_the_weighted_advantage_and_zero_where_clipped() -> None:
    log_probs = torch.tensor([0.0, LOG_2], requires_grad=True)
    loss, _ = losses.ppo_loss(log_probs, torch.zeros(2), torch.tensor([3.0, 1.0]), torch.tensor([0.5, 0.5]), clip_range=0.2)
    loss.backward()
    assert log_probs.grad is not None
    same(log_probs.grad, [-1.5, 0.0])


def test_value_loss_is_the_larger_of_clipped_and_unclipped_half_squared_error() -> None:
    values, old, returns = torch.tensor([1.0, 0.0]), torch.zeros(2), torch.ones(2)
    loss, clipped = losses.value_loss(values, old, returns, torch.tensor([0.5, 0.5]), clip_range=0.2)
    same(loss, 0.5 * (0.5 * 0.64 + 0.5 * 1.0))  # the first may only have moved to .2, which is .8 away
    assert clipped.tolist() == [True, False]


def test_value_loss_without_a_clip_is_half_the_squared_error() -> None:
    loss, clipped = losses.value_loss(
        torch.tensor([1.0, 0.0]), torch.zeros(2), torch.ones(2), torch.tensor([0.5, 0.5]), clip_range=None
    )
    same(loss, 0.25)
    assert clipped.tolist() == [False, False]


def test_kl_k1_is_the_log_ratio() -> None:
    same(losses.kl_k1(logs(0.5, 0.25), logs(0.25, 0.25)), [LOG_2, 0])


def test_kl_loss_k2_is_half_the_squared_log_ratio() -> None:
    loss = losses.kl_loss(logs(0.5, 0.25), logs(0.25, 0.25), torch.ones(2), torch.tensor([0.5, 0.5]), "k2")
    same(loss, 0.25 * LOG_2**2)


def test_kl_loss_k3_is_weighted_by_the_ratio() -> None:
    # d = log ¼ − log ½ = −log 2: exp(d) − d − 1 = log 2 − ½, twice
    loss = losses.kl_loss(logs(0.5, 0.25), logs(0.25, 0.25), torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0]), "k3")
    same(loss, 2 * LOG_2 - 1)


def test_an_unknown_kl_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown estimator 'k4'"):
        losses.kl_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.ones(1), "k4")


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_expected_gradient_of_a_kl_loss_on_policy_is_that_of_the_exact_kl(estimator: str) -> None:
    logits = torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[0.1, 0.2, -0.4]], dtype=torch.float64)
    log_policy = logits.log_softmax(1)[0]
    (exact,) = torch.autograd.grad((log_policy.exp() * (log_policy - reference.log_softmax(1)[0])).sum(), logits)
    log_policy = logits.log_softmax(1)[0]
    probabilities = log_policy.exp().detach()  # of drawing each token: the weight of its term in the expectation
    ratio = (log_policy - log_policy.detach()).exp()
    loss = losses.kl_loss(log_policy, reference.log_softmax(1)[0], ratio, probabilities, estimator)
    (found,) = torch.autograd.grad(loss, logits)
    same(found, exact, 1e-12)


def test_the_preference_loss_by_hand() -> None:
    loss = losses.preference_loss(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([1.0, 2.0, -1.0]))
    # −log σ(0), −log σ(−2), −log σ(4)
    assert loss.tolist() == pytest.approx([0.693147, 2.126928, 0.018150], abs=1e-6)


def test_the_gradient_of_the_preference_loss_pulls_the_two_sides_apart_and_no_more() -> None:
    chosen, rejected = torch.tensor([0.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    losses.preference_loss(chosen, rejected).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == (-0.5, 0.5)


# distributions

PROBABILITIES = (0.5, 0.25, 0.125, 0.125)


def test_token_log_probs_over_the_whole_vocabulary() -> None:
    logits = logs(*PROBABILITIES).repeat(2, 1) + 3.0  # a constant changes nothing
    same(token_log_probs(logits, torch.tensor([1, 3])), logs(0.25, 0.125))


def test_token_log_probs_are_tempered() -> None:
    # squares: 16/64, 4/64, 1/64, 1/64 over 22/64
    same(token_log_probs(logs(*PROBABILITIES)[None], torch.tensor([0]), temperature=0.5), logs(16 / 22))


def test_token_log_probs_over_a_support() -> None:
    support = SampledSupport(torch.tensor([2, 3]), torch.tensor([0, 1, 1, 2, 3]))
    found = token_log_probs(logs(*PROBABILITIES).repeat(2, 1), torch.tensor([1, 1]), support=support)
    same(found, logs(1 / 3, 1 / 2))


def test_token_log_probs_leave_out_forbidden_ids_where_they_are_forbidden() -> None:
    found = token_log_probs(
        logs(*PROBABILITIES).repeat(2, 1),
        torch.tensor([1, 1]),
        1.0,
        None,
        torch.tensor([True, False]),
        torch.tensor([0]),
    )
    same(found, logs(0.5, 0.25))


def test_a_token_with_an_empty_support_uses_the_vocabulary_without_what_is_forbidden() -> None:
    support = SampledSupport(torch.tensor([2, 0, 0]), torch.tensor([1, 2]))
    forbidden, ids = torch.tensor([True, True, False]), torch.tensor([0, 3])
    logits = logs(*PROBABILITIES).repeat(3, 1)
    found = token_log_probs(logits, torch.tensor([1, 1, 1]), 1.0, support, forbidden, ids)
    same(found, logs(2 / 3, 2 / 3, 1 / 4))


def test_a_tempered_support_is_tempered_before_it_is_summed() -> None:
    support = SampledSupport(torch.tensor([2]), torch.tensor([0, 1]))
    same(token_log_probs(logs(*PROBABILITIES)[None], torch.tensor([1]), 0.5, support), logs(1 / 5))


def test_gradients_through_a_mixed_support_are_finite_and_stay_inside_it() -> None:
    logits = logs(*PROBABILITIES).repeat(2, 1).requires_grad_()
    support = SampledSupport(torch.tensor([2, 0]), torch.tensor([0, 1]))
    token_log_probs(logits, torch.tensor([1, 1]), support=support).sum().backward()
    assert logits.grad is not None
    same(logits.grad, [[-2 / 3, 2 / 3, 0, 0], [-0.5, 0.75, -0.125, -0.125]])


def test_without_ids_blocks_ids_in_the_named_rows_only() -> None:
    found = mask_ids(torch.zeros(2, 3), torch.tensor([True, False]), torch.tensor([0, 2]))
    assert found.tolist() == [[-math.inf, 0, -math.inf], [0, 0, 0]]


def test_exact_kl_by_hand() -> None:
    policy, reference = logs(0.5, 0.5)[None], logs(0.25, 0.75)[None]
    same(losses.exact_kl(policy, reference), [0.5 * LOG_2 + 0.5 * (LOG_2 - LOG_3)])
    same(losses.exact_kl(policy + 7, policy), [0.0])


def test_exact_kl_leaves_out_ids_without_a_token() -> None:
    absent = torch.tensor([[-math.inf]])
    policy, reference = (torch.cat([part[None], absent], 1) for part in (logs(0.5, 0.5), logs(0.25, 0.75)))
    same(losses.exact_kl(policy, reference), [0.5 * LOG_2 + 0.5 * (LOG_2 - LOG_3)])


def test_explained_variance_by_hand() -> None:
    returns = torch.tensor([0.0, 2.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.tensor([1.0, 1.0]), returns) == 0.0
    assert explained_variance(torch.tensor([0.0, 1.0]), returns) == pytest.approx(0.75)
    assert explained_variance(torch.tensor([2.0, 0.0]), returns) == pytest.approx(-3.0)


def test_explained_variance_is_0_where_it_is_undefined() -> None:
    assert explained_variance(torch.zeros(0), torch.zeros(0)) == 0.0
    assert explained_variance(torch.zeros(1), torch.ones(1)) == 0.0
    assert explained_variance(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0])) == 0.0


# properties

AGGREGATIONS = st.sampled_from(["token_mean", "sequence_mean"])


@st.composite
def selections(draw: st.DrawFn) -> Tensor:
    """A mask of any shape and pattern, empty rows included."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    return torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows)))


@st.composite
def runs(draw: st.DrawFn) -> Tensor:
    """A mask whose rows each hold one contiguous run, perhaps an empty one."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    edges = [sorted((draw(st.integers(0, width)), draw(st.integers(0, width)))) for _ in range(rows)]
    columns = torch.arange(width)
    return torch.stack([(columns >= first) & (columns < last) for first, last in edges])


def noise(selected: Tensor, seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(selected.shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def with_padding(values: Tensor, columns: int) -> Tensor:
    """Extra columns on the right: not selected if a mask, otherwise filled with something that would be noticed."""
    fill = torch.zeros if values.dtype == torch.bool else torch.ones
    return torch.cat([values, fill((values.shape[0], columns), dtype=values.dtype) * 7], 1).to(values.dtype)


@given(selections(), AGGREGATIONS)
def test_weights_sum_to_1_or_to_0_where_nothing_is_selected(selected: Tensor, aggregation: str) -> None:
    weights = losses.token_weights(selected, aggregation)
    assert float(weights.sum()) == pytest.approx(1.0 if bool(selected.any()) else 0.0, abs=1e-6)
    assert bool((weights[~selected] == 0).all())
    assert bool((weights[selected] > 0).all())


@given(selections(), AGGREGATIONS, st.integers(0, 5), st.integers(0, 10**6))
def test_micro_batches_with_a_global_total_add_up_to_the_whole(selected: Tensor, aggregation: str, cut: int, seed: int) -> None:
    log_probs, old, advantages, returns = noise(selected, seed, 4)
    total = losses.weight_total(selected, aggregation)

    def all_losses(rows: slice, weights: Tensor) -> Tensor:
        chosen = selected[rows]
        picked = [values[rows][chosen] for values in (log_probs, old, advantages, returns)]
        flat, weight = picked[:3], weights[chosen]
        return torch.stack(
            [
                losses.ppo_loss(*flat, weight, 0.2)[0],
                losses.value_loss(picked[0], picked[1], picked[3], weight, 0.2)[0],
                losses.kl_loss(picked[0], picked[1], torch.ones_like(picked[0]), weight, "k2"),
                losses.kl_loss(picked[0], picked[1], torch.ones_like(picked[0]), weight, "k3"),
            ]
        )

    whole = all_losses(slice(None), losses.token_weights(selected, aggregation))
    parts = [slice(0, cut), slice(cut, None)]
    summed = [all_losses(part, losses.token_weights(selected[part], aggregation, total)) for part in parts]
    same(torch.stack(summed).sum(0), whole)


@given(runs(), st.integers(1, 3), st.integers(0, 10**6))
def test_padding_changes_nothing(selected: Tensor, columns: int, seed: int) -> None:
    rewards, values = noise(selected, seed, 2)
    wide_selected, wide_rewards, wide_values = (with_padding(each, columns) for each in (selected, rewards, values))
    pairs = [
        (
            td_errors(rewards, values, selected, 0.9),
            td_errors(wide_rewards, wide_values, wide_selected, 0.9),
        ),
        (
            gae(rewards, values, selected, 0.9, 0.8),
            gae(wide_rewards, wide_values, wide_selected, 0.9, 0.8),
        ),
        (whiten(values, selected), whiten(wide_values, wide_selected)),
        (place_at_end(rewards[:, 0], selected), place_at_end(rewards[:, 0], wide_selected)),
        (losses.token_weights(selected), losses.token_weights(wide_selected)),
        (losses.token_weights(selected, "sequence_mean"), losses.token_weights(wide_selected, "sequence_mean")),
    ]
    for narrow, wide in pairs:
        same(wide[:, : selected.shape[1]], narrow, 1e-12)
        assert bool((wide[:, selected.shape[1] :] == 0).all())


@given(runs(), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_gae_is_the_discounted_sum_of_td_errors(selected: Tensor, gamma: float, lam: float, seed: int) -> None:
    rewards, values = noise(selected, seed, 2)
    deltas = td_errors(rewards, values, selected, gamma)
    expected = torch.zeros_like(deltas)
    for row, column in selected.nonzero().tolist():
        following = torch.arange(selected.shape[1] - column, dtype=torch.float64)
        expected[row, column] = (deltas[row, column:] * (gamma * lam) ** following).sum()
    same(gae(rewards, values, selected, gamma, lam), expected, 1e-9)


@given(selections(), st.integers(0, 10**6), st.floats(-100, 100), st.floats(0.1, 100))
def test_whitened_values_have_mean_0_and_variance_1_and_forget_shift_and_scale(
    selected: Tensor, seed: int, shift: float, scale: float
) -> None:
    (values,) = noise(selected, seed, 1)
    whitened = whiten(values, selected)
    assert bool((whitened[~selected] == 0).all())
    if int(selected.sum()) > 1:
        assert float(whitened[selected].mean()) == pytest.approx(0, abs=1e-6)
        variance = float(values[selected].var(correction=0))
        assert float(whitened[selected].square().mean()) == pytest.approx(variance / (variance + 1e-8), abs=1e-6)
        if variance > 0.01:
            same(whiten(values * scale + shift, selected), whitened, 1e-3)


@given(selections(), st.integers(0, 10**6))
def test_moments_of_parts_add_up(selected: Tensor, seed: int) -> None:
    (values,) = noise(selected, seed, 1)
    whole = moments(values, selected)
    parts = [moments(values[rows], selected[rows]) for rows in (slice(0, 2), slice(2, None))]
    assert whole.count == sum(part.count for part in parts)
    assert whole.total == pytest.approx(sum(part.total for part in parts), abs=1e-9)
    assert whole.squares == pytest.approx(sum(part.squares for part in parts), abs=1e-9)


@given(st.integers(1, 4), st.integers(1, 5), AGGREGATIONS, st.integers(0, 10**6))
def test_an_empty_selection_gives_zero_loss_and_zero_gradient(rows: int, width: int, aggregation: str, seed: int) -> None:
    nothing = torch.zeros((rows, width), dtype=torch.bool)
    old, advantages, returns = noise(nothing, seed, 3)
    for pick in (lambda values: values, lambda values: values[nothing]):  # masked by weights, or selected beforehand
        weights = pick(losses.token_weights(nothing, aggregation))
        parameter = torch.ones((rows, width), dtype=torch.float64, requires_grad=True)
        log_probs = pick(parameter)
        ratio = (log_probs - pick(old)).exp()
        found = [
            losses.ppo_loss(log_probs, pick(old), pick(advantages), weights, 0.2)[0],
            losses.value_loss(log_probs, pick(old), pick(returns), weights, 0.2)[0],
            losses.value_loss(log_probs, pick(old), pick(returns), weights, None)[0],
            losses.kl_loss(log_probs, pick(old), ratio, weights, "k2"),
            losses.kl_loss(log_probs, pick(old), ratio, weights, "k3"),
        ]
        for loss in found:
            assert float(loss.detach()) == 0.0
            (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
            assert bool((gradient == 0).all())
    assert bool((whiten(old, nothing) == 0).all())
    assert bool((gae(old, returns, nothing, 1.0, 0.95) == 0).all())
    assert bool((place_at_end(old[:, 0], nothing) == 0).all())
    assert token_log_probs(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10**6), st.floats(0.3, 3))
def test_log_probs_over_the_whole_vocabulary_equal_those_over_a_support_that_holds_it(
    rows: int, vocabulary: int, seed: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((rows, vocabulary), generator=generator, dtype=torch.float64)
    tokens = torch.randint(vocabulary, (rows,), generator=generator)
    whole = token_log_probs(logits, tokens, temperature)
    same(whole, (logits / temperature).log_softmax(1).gather(1, tokens[:, None]).squeeze(1), 1e-12)
    support = SampledSupport(torch.full((rows,), vocabulary), torch.arange(vocabulary).repeat(rows))
    same(token_log_probs(logits, tokens, temperature, support), whole, 1e-12)


@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10**6))
def test_exact_kl_is_never_negative_and_zero_for_equals(rows: int, vocabulary: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    policy, reference = (torch.randn((rows, vocabulary), generator=generator) for _ in range(2))
    assert bool((losses.exact_kl(policy, reference) >= -1e-6).all())
    same(losses.exact_kl(policy, policy), torch.zeros(rows))


@pytest.mark.parametrize("height", [-20.0, 0.0, 3.0, 15.0, 25.0, 60.0])
def test_a_forbidden_token_however_likely_leaves_the_others_their_due(height: float) -> None:
    logits = torch.linspace(-1, 1, 50).repeat(2, 1)
    logits[:, 7] = height
    logits = logits.requires_grad_()
    tokens, forbidden = torch.tensor([3, 3]), torch.tensor([True, False])
    found = token_log_probs(logits, tokens, forbidden=forbidden, forbidden_ids=torch.tensor([7]))
    expected = mask_ids(logits, forbidden, torch.tensor([7])).log_softmax(1)[:, 3]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    (mine,) = torch.autograd.grad(found.sum(), logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    assert torch.allclose(mine, theirs, atol=1e-6)
