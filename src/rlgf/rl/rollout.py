"""Generation of rollouts from prompts, an algorithm, a policy and a guide.

The steps are the same for every algorithm and row: a random number decides whether the row has a
rollin; the rollin origin generates it; it is truncated to the switch position h; the rollout origin
generates the rest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from rlgf.algorithms.base import Algorithm, PhaseWeight
from rlgf.algorithms.switch_position import Phase, sample_switch
from rlgf.data.tokenization import complete_utf8_prefix
from rlgf.errors import GuideError
from rlgf.generation.base import Sampler, SampleRequest
from rlgf.guides.base import CompletionRequest, Guide, query_guide
from rlgf.guides.encoding import encode_guide_completions
from rlgf.models.forward import pad_rows
from rlgf.models.language_model import LanguageModel
from rlgf.models.log_probs import SampledSupport
from rlgf.randomness import Purpose, permutation, uniforms
from rlgf.rl.tensors import Rollout
from rlgf.types import GUIDE, POLICY, Origin, Prompt, SamplingParams


@dataclass(frozen=True)
class RolloutConfig:
    """The settings of generation that stay the same during a run."""

    policy: LanguageModel
    sampler: Sampler  # of the policy's tokens
    guide: Guide | None
    sampling: SamplingParams  # of the policy
    max_new_tokens: int  # of a completion, in tokens
    min_new_tokens: int  # completion tokens before which EOS is forbidden
    seed: int
    token_purpose: Purpose = Purpose.POLICY_TOKEN


@dataclass
class _Row:
    """A row during generation."""

    prompt: Prompt
    prompt_ids: list[int]
    index: int
    phase: int
    rollout_by: Origin
    start_index: int  # decides rollin, switch position and guide text; shared by a group's rows
    ids: list[int] = field(default_factory=list[int])
    origin: list[int] = field(default_factory=list[int])
    log_probs: list[float] = field(default_factory=list[float])
    full_log_probs: list[float] = field(default_factory=list[float])
    supports: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    switch_position: int = 0
    ended_with_eos: bool = False
    guide_completion: str | None = None
    guide_failed: bool = False  # the query for the current part failed
    dropped: bool = False  # and the row is left out


def select_prompts(prompts: Sequence[Prompt], seed: int, indices: Sequence[int], samples_per_prompt: int) -> list[Prompt]:
    """Select the prompt of each trajectory index.

    Consecutive groups of `samples_per_prompt` indices take the next prompt of the current pass over
    the data; each pass has its own random order.
    """
    orders: dict[int, list[int]] = {}
    chosen: list[Prompt] = []
    for index in indices:
        turn, place = divmod(index // samples_per_prompt, len(prompts))
        if turn not in orders:
            orders[turn] = permutation(seed, Purpose.PROMPT_ORDER, turn, len(prompts)).tolist()
        chosen.append(prompts[orders[turn][place]])
    return chosen


def allocate_rows(phase_weights: Sequence[PhaseWeight], num_rows: int) -> list[int]:
    """Return the number of rows of each phase weight; the sum is `num_rows`."""
    edges = [0.0]
    for share in phase_weights:
        edges.append(edges[-1] + share.fraction)
    counts = [round(edge * num_rows / edges[-1]) for edge in edges]
    return [after - before for before, after in pairwise(counts)]


def collect_rollout(
    rollout_config: RolloutConfig, algorithm: Algorithm, phase_weights: Sequence[PhaseWeight], prompts: Sequence[Prompt],
    indices: Sequence[int],
    samples_per_prompt: int = 1,
) -> Rollout:  # fmt: skip
    """Generate one completion per prompt.

    Args:
        rollout_config: models and lengths.
        algorithm: its phases assign rollin and rollout origins.
        phase_weights: the phase weights of the iteration.
        prompts: one per row.
        indices: the global trajectory indices, one per row; all random numbers depend on them.
        samples_per_prompt: the number of consecutive indices that form a group.
    """
    rows = _new_rows(rollout_config, algorithm, phase_weights, prompts, indices, samples_per_prompt)
    names = ("discarded_tokens", "switches_moved", "guide_requests", "guide_completions_truncated", "guide_completions_changed")
    names += ("guide_rows_substituted", "guide_rows_dropped")
    counts: dict[str, int] = dict.fromkeys(names, 0)
    with_rollin = [row for row in rows if _has_rollin(algorithm.phases[row.phase], row, rollout_config.seed)]
    _roll_in(rollout_config, algorithm, with_rollin, counts)
    for origin in (POLICY, GUIDE):
        open_rows = [
            row
            for row in rows
            if row.rollout_by == origin and not row.ended_with_eos and len(row.ids) < rollout_config.max_new_tokens
            and not row.dropped
        ]  # fmt: skip
        _extend_rows(rollout_config, origin, open_rows, [rollout_config.max_new_tokens] * len(open_rows), counts)
    rows = _handle_failed_rows(rollout_config, rows, counts)
    return _as_rollout(rollout_config, rows, samples_per_prompt, counts)


def _new_rows(
    rollout_config: RolloutConfig,
    algorithm: Algorithm,
    phase_weights: Sequence[PhaseWeight],
    prompts: Sequence[Prompt],
    indices: Sequence[int],
    samples_per_prompt: int,
) -> list[_Row]:
    """Return the rows of an iteration, before any token is generated."""
    group = samples_per_prompt if algorithm.shares_start_states else 1
    phases = [
        share.phase for share, count in zip(phase_weights, allocate_rows(phase_weights, len(prompts))) for _ in range(count)
    ]
    encoded = rollout_config.policy.codec.prompts(prompts)
    return [
        _Row(prompt, ids, index, phase, algorithm.phases[phase].rollout, index // group * group)
        for prompt, ids, index, phase in zip(prompts, encoded, indices, phases)
    ]


def rollin_requests(
    rollout_config: RolloutConfig,
    algorithm: Algorithm,
    phase_weights: Sequence[PhaseWeight],
    prompts: Sequence[Prompt],
    indices: Sequence[int],
    samples_per_prompt: int = 1,
) -> list[CompletionRequest]:
    """Return the rollin requests that `collect_rollout` will send to the guide.

    They do not depend on the policy, so they can be sent ahead of the iteration.
    """
    rows = _new_rows(rollout_config, algorithm, phase_weights, prompts, indices, samples_per_prompt)
    rows = [leader for leader, _ in _by_start_state(row for row in rows if algorithm.phases[row.phase].rollin == GUIDE)]
    with_rollin = [row for row in rows if _has_rollin(algorithm.phases[row.phase], row, rollout_config.seed)]
    ends = [_known_switch(rollout_config, algorithm.phases[row.phase], row, GUIDE) for row in with_rollin]
    pairs = [(row, rollout_config.max_new_tokens if end is None else end) for row, end in zip(with_rollin, ends)]
    return _requests(rollout_config, [(row, end) for row, end in pairs if end > 0])


def _handle_failed_rows(rollout_config: RolloutConfig, rows: list[_Row], counts: dict[str, int]) -> list[_Row]:
    """Let the policy complete rows whose guide rollout failed; drop empty completions.

    The switch position moves to the end of such a row, so that the guide's critic trains on none of
    its states. A row without any token would have been generated by the guide only: it is dropped.
    """
    left = [row for row in rows if row.guide_failed and row.ids and not row.dropped]
    _extend_rows(rollout_config, POLICY, left, [rollout_config.max_new_tokens] * len(left), counts)
    for row in left:
        row.switch_position = len(row.ids)
    kept = [row for row in rows if not row.dropped and (row.ids or not row.guide_failed)]
    counts["guide_rows_substituted"] += len(left)
    counts["guide_rows_dropped"] += len({row.start_index for row in rows} - {row.start_index for row in kept})
    if not kept:
        raise GuideError("the guide returned no completion in an iteration: fix it, or set guide.on_failure=wait.")
    return kept


def _has_rollin(phase: Phase, row: _Row, seed: int) -> bool:
    """Sample whether a row has a rollin."""
    return phase.rollin is not None and uniforms(seed, Purpose.ROLLIN, row.start_index, 1)[0] < phase.beta


def _by_start_state(rows: Iterable[_Row]) -> list[tuple[_Row, list[_Row]]]:
    """Return the first row of each start state, with the other rows that share it."""
    groups: dict[int, tuple[_Row, list[_Row]]] = {}
    for row in rows:
        if row.start_index in groups:
            groups[row.start_index][1].append(row)
        else:
            groups[row.start_index] = row, []
    return list(groups.values())


def _roll_in(rollout_config: RolloutConfig, algorithm: Algorithm, rows: Sequence[_Row], counts: dict[str, int]) -> None:
    """Generate the rollins and truncate them to their switch positions.

    Rows that share a start state have one rollin, which is generated once.
    """
    for origin in (POLICY, GUIDE):
        groups = _by_start_state(row for row in rows if algorithm.phases[row.phase].rollin == origin)
        members = [leader for leader, _ in groups]
        planned = [_known_switch(rollout_config, algorithm.phases[row.phase], row, origin) for row in members]
        _extend_rows(
            rollout_config, origin, members, [rollout_config.max_new_tokens if h is None else h for h in planned], counts
        )
        for row, h in zip(members, planned):
            phase = algorithm.phases[row.phase]
            if row.dropped:
                continue
            if row.guide_failed:  # no rollin: the rollout starts at the prompt
                row.guide_failed = False
                counts["guide_rows_substituted"] += 1
                continue
            drawn = (
                _sample_switch_position(rollout_config, phase, row, origin, len(row.ids)) if h is None else min(h, len(row.ids))
            )
            row.switch_position = _snap_to_character(rollout_config, row, drawn)
            counts["switches_moved"] += row.switch_position < drawn
            _shorten(row, row.switch_position, counts)
        for leader, others in groups:
            for row in others:
                _copy_rollin(leader, row)


def _copy_rollin(leader: _Row, row: _Row) -> None:
    """Give a row the start state of the first row of its group."""
    for name in ("ids", "origin", "log_probs", "full_log_probs", "supports"):
        setattr(row, name, list(getattr(leader, name)))
    for name in ("switch_position", "ended_with_eos", "guide_completion", "dropped"):
        setattr(row, name, getattr(leader, name))


def _known_switch(rollout_config: RolloutConfig, phase: Phase, row: _Row, origin: Origin) -> int | None:
    """Return the switch position if it is known before the rollin, else None.

    Then only h rollin tokens need to be generated. It is known with the rule 'horizon', and if
    `min_new_tokens` equals `max_new_tokens` and the rollin origin respects them exactly.
    """
    exact = origin == POLICY or (rollout_config.guide is not None and rollout_config.guide.capabilities.exact_length)
    if phase.switch == "horizon" or (exact and rollout_config.min_new_tokens == rollout_config.max_new_tokens):
        return _sample_switch_position(rollout_config, phase, row, origin, rollout_config.max_new_tokens)
    return None


def _sample_switch_position(rollout_config: RolloutConfig, phase: Phase, row: _Row, origin: Origin, length: int) -> int:
    """Sample the switch position of a rollin of `length` tokens."""
    draw = float(uniforms(rollout_config.seed, Purpose.SWITCH, row.start_index, 1)[0])
    return sample_switch(phase.switch, origin, length, rollout_config.max_new_tokens, draw)


def _snap_to_character(rollout_config: RolloutConfig, row: _Row, switch_position: int) -> int:
    """Move a switch position back (to 0 at the lowest) out of a multi-byte character.

    This is done for guides that exchange text only: a character cut in two is no text. Policy and
    guides that take token ids continue inside a character, so there the law of the position stays
    exact. It depends on the prefix only, so a switch position known before the rollin moves like a
    sampled one. At `max_new_tokens` there is no rollout, and the length stays.
    """
    guide = rollout_config.guide
    if guide is None or guide.capabilities.takes_token_ids or switch_position >= rollout_config.max_new_tokens:
        return switch_position
    return complete_utf8_prefix(rollout_config.policy.tokenizer, row.ids[:switch_position])


def _shorten(row: _Row, length: int, counts: dict[str, int]) -> None:
    """Keep the first `length` completion tokens."""
    if length < len(row.ids):
        counts["discarded_tokens"] += len(row.ids) - length
        row.ended_with_eos = False
        for column in (row.ids, row.origin, row.log_probs, row.full_log_probs, row.supports):
            del column[length:]


def _extend_rows(
    rollout_config: RolloutConfig, origin: Origin, rows: Sequence[_Row], max_lengths: Sequence[int], counts: dict[str, int]
) -> None:
    """Extend row i to at most `max_lengths[i]` completion tokens, by policy or guide."""
    pairs = [(row, end) for row, end in zip(rows, max_lengths) if end > len(row.ids)]
    if not pairs:
        return
    if origin == POLICY:
        _sample_policy(rollout_config, pairs)
    else:
        _query_guide(rollout_config, pairs, counts)


def _sample_policy(rollout_config: RolloutConfig, pairs: Sequence[tuple[_Row, int]]) -> None:
    """Sample tokens from the policy, up to the given completion length of each row."""
    sampled = rollout_config.sampler.sample(
        [
            SampleRequest(
                row.prompt_ids, list(row.ids), end - len(row.ids), max(0, rollout_config.min_new_tokens - len(row.ids)),
                row.index, len(row.ids),
            )
            for row, end in pairs
        ],
        rollout_config.sampling,
        rollout_config.seed,
        rollout_config.token_purpose,
    )  # fmt: skip
    parts: list[torch.Tensor] = []
    if sampled.support is not None:
        parts = list(sampled.support.ids.split(sampled.support.counts.flatten().tolist()))
    width = sampled.tokens.shape[1]
    for i, (row, _) in enumerate(pairs):
        length = int(sampled.lengths[i])
        row.ids += sampled.tokens[i, :length].tolist()
        row.origin += [POLICY] * length
        row.log_probs += sampled.log_probs[i, :length].tolist()
        row.full_log_probs += sampled.full_log_probs[i, :length].tolist()
        row.supports += parts[i * width : i * width + length] if parts else [torch.zeros(0, dtype=torch.int64)] * length
        row.ended_with_eos = bool(sampled.ended_with_eos[i])


def _query_guide(rollout_config: RolloutConfig, pairs: Sequence[tuple[_Row, int]], counts: dict[str, int]) -> None:
    """Query the guide to continue each row, up to its given completion length."""
    assert rollout_config.guide is not None
    requests = _requests(rollout_config, pairs)
    counts["guide_requests"] += len(requests)
    returned = query_guide(rollout_config.guide, requests)
    completions = encode_guide_completions(rollout_config.policy, requests, returned)
    for (row, _), completion, one in zip(pairs, completions, returned):
        if completion is None:
            row.guide_failed, row.dropped = True, one.dropped
            continue
        counts["guide_completions_truncated"] += completion.truncated
        counts["guide_completions_changed"] += completion.changed
        row.ids += completion.ids
        row.origin += [GUIDE] * len(completion.ids)
        row.log_probs += [0.0] * len(completion.ids)
        row.full_log_probs += [0.0] * len(completion.ids)
        row.supports += [torch.zeros(0, dtype=torch.int64)] * len(completion.ids)
        row.ended_with_eos = completion.ended_with_eos
        if completion.text is not None:
            row.guide_completion = completion.text


def _requests(rollout_config: RolloutConfig, pairs: Sequence[tuple[_Row, int]]) -> list[CompletionRequest]:
    """Build the requests to continue each row up to its given completion length."""
    prefixes = rollout_config.policy.codec.decode([row.prompt_ids for row, _ in pairs], [row.ids for row, _ in pairs])
    return [
        CompletionRequest(
            row.prompt, row.prompt_ids, prefix, list(row.ids), end - len(row.ids),
            max(0, rollout_config.min_new_tokens - len(row.ids)), row.index, rollout_config.seed,
        )
        for (row, end), prefix in zip(pairs, prefixes)
    ]  # fmt: skip


def _as_rollout(
    rollout_config: RolloutConfig, rows: Sequence[_Row], samples_per_prompt: int, counts: dict[str, int]
) -> Rollout:
    """Build the rollout tensors of the completed rows."""
    prompts = [row.prompt_ids for row in rows]
    fronts = [[0.0] * len(prompt) for prompt in prompts]
    support = None
    if rollout_config.sampling.restricts_support:
        sizes = pad_rows([[*[0] * len(row.prompt_ids), *[len(part) for part in row.supports]] for row in rows])
        parts = [part for row in rows for part in row.supports]
        support = SampledSupport(sizes, torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64))
    counts["truncated_completions"] = sum(not row.ended_with_eos for row in rows)
    return Rollout(
        prompts=[row.prompt for row in rows],
        completions=rollout_config.policy.codec.decode(prompts, [row.ids for row in rows]),
        ids=pad_rows([[*row.prompt_ids, *row.ids] for row in rows]),
        origin=pad_rows([[*[int(Origin.PROMPT)] * len(row.prompt_ids), *row.origin] for row in rows]).to(torch.uint8),
        switch_position=torch.tensor([row.switch_position for row in rows]),
        rollout_by=torch.tensor([int(row.rollout_by) for row in rows], dtype=torch.uint8),
        phase=torch.tensor([row.phase for row in rows]),
        ended_with_eos=torch.tensor([row.ended_with_eos for row in rows]),
        index=torch.tensor([row.index for row in rows]),
        group=torch.tensor([row.index // samples_per_prompt for row in rows]),
        log_probs=_floats([[*front, *row.log_probs] for front, row in zip(fronts, rows)]),
        full_log_probs=_floats([[*front, *row.full_log_probs] for front, row in zip(fronts, rows)]),
        support=support,
        min_new_tokens=rollout_config.min_new_tokens,
        counters=counts,
        guide_completions=[row.guide_completion for row in rows],
    )


def _floats(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """Pad rows of floats on the right with zeros, [rows, width]."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows]).view(len(rows), width)
