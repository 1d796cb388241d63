"""Writing: prompts, an algorithm's shares and two authors become a `Rollout`.

Every text goes the same way, whatever the algorithm: a coin says whether it has a rollin, the rollin actor writes, the pen
changes hands at h, the rollout actor finishes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from rlgf.algorithms import Algorithm, Phase, Share, draw_switch
from rlgf.errors import RunError
from rlgf.forward import padded
from rlgf.guides import Guide, Request, Text, ask
from rlgf.models import LanguageModel
from rlgf.randomness import Purpose, permutation, uniform_rows, uniforms
from rlgf.sampling import Continuations, continue_prefixes, split_context
from rlgf.tokens import decode_continuations, well_formed, whole_characters
from rlgf.types import GUIDE, POLICY, Decoding, Origin, Prompt, Rollout, Support


@dataclass(frozen=True)
class Writing:
    """What stays the same over a run: who writes, how, and how long."""

    policy: LanguageModel
    guide: Guide | None
    decoding: Decoding  # the policy's
    horizon: int  # most response tokens
    minimum: int  # response tokens before which no end token may come
    seed: int
    precision: str = "fp32"
    token_purpose: Purpose = Purpose.POLICY_TOKEN


@dataclass
class _Row:
    """A text while it is being written."""

    prompt: Prompt
    prompt_ids: list[int]
    index: int
    phase: int
    finisher: Origin
    ids: list[int] = field(default_factory=list[int])
    origin: list[int] = field(default_factory=list[int])
    log_probs: list[float] = field(default_factory=list[float])
    full_log_probs: list[float] = field(default_factory=list[float])
    supports: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    switch: int = 0
    finished: bool = False
    guide_text: str | None = None
    given_up: bool = False  # the guide was asked for the part that is being written, and no text could be had


def choose_prompts(prompts: Sequence[Prompt], seed: int, indices: Sequence[int], samples_per_prompt: int) -> list[Prompt]:
    """The prompt of each trajectory: passes over the data in an order drawn anew for each, a prompt for each group."""
    orders: dict[int, list[int]] = {}
    chosen: list[Prompt] = []
    for index in indices:
        turn, place = divmod(index // samples_per_prompt, len(prompts))
        if turn not in orders:
            orders[turn] = permutation(seed, Purpose.PROMPT_ORDER, turn, len(prompts)).tolist()
        chosen.append(prompts[orders[turn][place]])
    return chosen


def split_texts(shares: Sequence[Share], texts: int) -> list[int]:
    """How many of an iteration's texts each share writes; they add up to `texts`."""
    edges = [0.0]
    for share in shares:
        edges.append(edges[-1] + share.fraction)
    counts = [round(edge * texts / edges[-1]) for edge in edges]
    return [after - before for before, after in pairwise(counts)]


def collect(
    writing: Writing, algorithm: Algorithm, shares: Sequence[Share], prompts: Sequence[Prompt], indices: Sequence[int],
    samples_per_prompt: int = 1,
) -> Rollout:  # fmt: skip
    """Write one text for each prompt. `indices` are the global trajectory indices, on which every draw depends."""
    rows = _new_rows(writing, algorithm, shares, prompts, indices)
    names = ("discarded_tokens", "switches_moved", "guide_requests", "guide_texts_cut", "guide_texts_changed")
    names += ("guide_rows_substituted", "guide_rows_dropped")
    counts: dict[str, int] = dict.fromkeys(names, 0)
    begun = [row for row in rows if _has_rollin(algorithm.phases[row.phase], row, writing.seed)]
    _roll_in(writing, algorithm, begun, counts)
    for author in (POLICY, GUIDE):
        open_rows = [row for row in rows if row.finisher == author and not row.finished and len(row.ids) < writing.horizon]
        _write(writing, author, open_rows, [writing.horizon] * len(open_rows), counts)
    rows = _without_guide(writing, rows, counts)
    return _as_rollout(writing, rows, samples_per_prompt, counts)


def _new_rows(
    writing: Writing, algorithm: Algorithm, shares: Sequence[Share], prompts: Sequence[Prompt], indices: Sequence[int]
) -> list[_Row]:
    """The texts of an iteration before anybody writes."""
    phases = [share.phase for share, count in zip(shares, split_texts(shares, len(prompts))) for _ in range(count)]
    encoded = writing.policy.codec.prompts(prompts)
    return [
        _Row(prompt, ids, index, phase, algorithm.phases[phase].rollout)
        for prompt, ids, index, phase in zip(prompts, encoded, indices, phases)
    ]


def rollin_requests(
    writing: Writing, algorithm: Algorithm, shares: Sequence[Share], prompts: Sequence[Prompt], indices: Sequence[int]
) -> list[Request]:
    """What `collect` will ask the guide to begin: known before anything is written, as it depends on no policy."""
    rows = _new_rows(writing, algorithm, shares, prompts, indices)
    rows = [row for row in rows if algorithm.phases[row.phase].rollin == GUIDE]
    begun = [row for row in rows if _has_rollin(algorithm.phases[row.phase], row, writing.seed)]
    ends = [_planned_switch(writing, algorithm.phases[row.phase], row, GUIDE) for row in begun]
    pairs = [(row, writing.horizon if end is None else end) for row, end in zip(begun, ends)]
    return _requests(writing, [(row, end) for row, end in pairs if end > 0])


def _without_guide(writing: Writing, rows: list[_Row], counts: dict[str, int]) -> list[_Row]:
    """Where the guide could not finish, the policy writes to the end, so that no state of the text is the guide's critic's.

    A text of which nothing was written yet would have been the guide's alone, and is dropped.
    """
    left = [row for row in rows if row.given_up and row.ids]
    _write(writing, POLICY, left, [writing.horizon] * len(left), counts)
    for row in left:
        row.switch = len(row.ids)
    kept = [row for row in rows if row.ids or not row.given_up]
    counts["guide_rows_substituted"] += len(left)
    counts["guide_rows_dropped"] += len(rows) - len(kept)
    if not kept:
        raise RunError("the guide gave none of an iteration's texts: mend it, or set guide.on_failure=wait.")
    return kept


def _has_rollin(phase: Phase, row: _Row, seed: int) -> bool:
    return phase.rollin is not None and uniforms(seed, Purpose.ROLLIN_COIN, row.index, 1)[0] < phase.beta


def _roll_in(writing: Writing, algorithm: Algorithm, rows: Sequence[_Row], counts: dict[str, int]) -> None:
    """Let the rollin actors write, and cut their texts at the switch point."""
    for author in (POLICY, GUIDE):
        members = [row for row in rows if algorithm.phases[row.phase].rollin == author]
        planned = [_planned_switch(writing, algorithm.phases[row.phase], row, author) for row in members]
        _write(writing, author, members, [writing.horizon if h is None else h for h in planned], counts)
        for row, h in zip(members, planned):
            phase = algorithm.phases[row.phase]
            if row.given_up:  # it has no rollin then: whoever finishes begins
                row.given_up = False
                counts["guide_rows_substituted"] += 1
                continue
            drawn = _switch(writing, phase, row, author, len(row.ids)) if h is None else min(h, len(row.ids))
            row.switch = _between_characters(writing, row, drawn)
            counts["switches_moved"] += row.switch < drawn
            _cut(row, row.switch, counts)


def _planned_switch(writing: Writing, phase: Phase, row: _Row, author: Origin) -> int | None:
    """The switch point, where it is known before the rollin is written, so that only h tokens need be.

    So it is where texts are exactly as long as the horizon and the author is held to that; and with the rule 'horizon', which
    asks for nothing but the horizon.
    """
    exact = author == POLICY or (writing.guide is not None and writing.guide.capabilities.exact_budget)
    if phase.switch == "horizon" or (exact and writing.minimum == writing.horizon):
        return _switch(writing, phase, row, author, writing.horizon)
    return None


def _switch(writing: Writing, phase: Phase, row: _Row, author: Origin, length: int) -> int:
    draw = float(uniforms(writing.seed, Purpose.SWITCH, row.index, 1)[0])
    return draw_switch(phase.switch, author, length, writing.horizon, draw)


def _between_characters(writing: Writing, row: _Row, switch: int) -> int:
    """The switch point, moved back (to 0 at most) where it falls inside a multi-byte character.

    The same for both authors, and for one who could go on by token ids: a prefix reads the same for whoever takes over. It
    looks at the prefix alone, so a switch that was planned moves as one that was drawn. At the horizon nobody takes over, and
    the text stays as long as it is.
    """
    return whole_characters(writing.policy.tokenizer, row.ids[:switch]) if switch < writing.horizon else switch


def _cut(row: _Row, length: int, counts: dict[str, int]) -> None:
    """Keep the first `length` response tokens."""
    if length < len(row.ids):
        counts["discarded_tokens"] += len(row.ids) - length
        row.finished = False
        for column in (row.ids, row.origin, row.log_probs, row.full_log_probs, row.supports):
            del column[length:]


def _write(writing: Writing, author: Origin, rows: Sequence[_Row], ends: Sequence[int], counts: dict[str, int]) -> None:
    """Let one author continue every row, to `ends[i]` response tokens at most."""
    pairs = [(row, end) for row, end in zip(rows, ends) if end > len(row.ids)]
    if not pairs:
        return
    if author == POLICY:
        _policy_writes(writing, pairs)
    else:
        _guide_writes(writing, pairs, counts)


def _policy_writes(writing: Writing, pairs: Sequence[tuple[_Row, int]]) -> None:
    budgets = [end - len(row.ids) for row, end in pairs]
    starts = [len(row.ids) for row, _ in pairs]
    sources, prefixes = split_context(writing.policy.model, [(row.prompt_ids, row.ids) for row, _ in pairs])
    written: Continuations = continue_prefixes(
        writing.policy,
        prefixes,
        budgets,
        [max(0, writing.minimum - start) for start in starts],
        uniform_rows(writing.seed, writing.token_purpose, [row.index for row, _ in pairs], max(budgets), starts),
        writing.decoding,
        writing.precision,
        sources,
    )
    parts: list[torch.Tensor] = []
    if written.support is not None:
        parts = list(written.support.ids.split(written.support.counts.flatten().tolist()))
    width = written.tokens.shape[1]
    for i, (row, _) in enumerate(pairs):
        length = int(written.lengths[i])
        row.ids += written.tokens[i, :length].tolist()
        row.origin += [POLICY] * length
        row.log_probs += written.log_probs[i, :length].tolist()
        row.full_log_probs += written.full_log_probs[i, :length].tolist()
        row.supports += parts[i * width : i * width + length] if parts else [torch.zeros(0, dtype=torch.int64)] * length
        row.finished = bool(written.finished[i])


def _guide_writes(writing: Writing, pairs: Sequence[tuple[_Row, int]], counts: dict[str, int]) -> None:
    assert writing.guide is not None
    requests = _requests(writing, pairs)
    counts["guide_requests"] += len(requests)
    answers = ask(writing.guide, requests)
    _keep_guide_texts(writing, [row for row, _ in pairs], answers, counts)
    for (row, end), answer in zip(pairs, answers):
        if answer.given_up:
            row.given_up = True
            continue
        ids, finished, cut = guide_ids(writing.policy, answer, end - len(row.ids), begun=bool(row.ids))
        counts["guide_texts_cut"] += cut
        row.ids += ids
        row.origin += [GUIDE] * len(ids)
        row.log_probs += [0.0] * len(ids)
        row.full_log_probs += [0.0] * len(ids)
        row.supports += [torch.zeros(0, dtype=torch.int64)] * len(ids)
        row.finished = finished


def _requests(writing: Writing, pairs: Sequence[tuple[_Row, int]]) -> list[Request]:
    """What the guide is asked, to continue each row up to `end` response tokens."""
    prefixes = writing.policy.codec.texts([row.prompt_ids for row, _ in pairs], [row.ids for row, _ in pairs])
    return [
        Request(
            row.prompt, row.prompt_ids, prefix, list(row.ids), end - len(row.ids),
            max(0, writing.minimum - len(row.ids)), row.index, writing.seed,
        )
        for (row, end), prefix in zip(pairs, prefixes)
    ]  # fmt: skip


def _keep_guide_texts(writing: Writing, rows: Sequence[_Row], answers: Sequence[Text], counts: dict[str, int]) -> None:
    """Keep the texts of a guide that writes text, and count those that the policy's tokenizer cannot write as they are."""
    codec = writing.policy.codec
    written = [(row, answer.text) for row, answer in zip(rows, answers) if answer.ids is None and not answer.given_up]
    if not written:
        return
    before = [row.ids if codec.alone else [*row.prompt_ids, *row.ids] for row, _ in written]
    ids = [codec.response(text, begun=bool(row.ids)) for row, text in written]
    back = decode_continuations(codec.tokenizer, before, ids)
    for (row, text), again in zip(written, back):
        row.guide_text = well_formed(text)
        counts["guide_texts_changed"] += again != text


def guide_ids(policy: LanguageModel, answer: Text, budget: int, begun: bool = False) -> tuple[list[int], bool, bool]:
    """A guide's text in policy tokens, whether it ends with an end token, and whether it was cut at the budget.

    `begun` says whether it goes on behind other words of the response.
    A finished text gets the policy's end token if there is room; one that was cut off does not. An end token that the guide
    itself writes ends the text: nothing follows it.
    """
    if answer.ids is not None:
        ids = list(answer.ids)
    else:
        ids = policy.codec.response(answer.text, begun)
        ids = [*ids, policy.end_id] if answer.finished and len(ids) < budget else ids
    if any(not 0 <= token < policy.vocabulary for token in ids):
        raise RunError(
            f"the guide wrote token ids outside the policy's vocabulary of {policy.vocabulary}: it must use its tokenizer."
        )
    whole = len(ids)
    ended = next((place + 1 for place, token in enumerate(ids) if token in policy.end_ids), len(ids))
    ids = ids[:ended]
    kept = ids[:budget]
    return kept, bool(kept) and kept[-1] in policy.end_ids, len(kept) < whole


def _as_rollout(writing: Writing, rows: Sequence[_Row], samples_per_prompt: int, counts: dict[str, int]) -> Rollout:
    prompts = [row.prompt_ids for row in rows]
    fronts = [[0.0] * len(prompt) for prompt in prompts]
    support = None
    if writing.decoding.truncates:
        sizes = padded([[*[0] * len(row.prompt_ids), *[len(part) for part in row.supports]] for row in rows])
        parts = [part for row in rows for part in row.supports]
        support = Support(sizes, torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64))
    counts["truncated_texts"] = sum(not row.finished for row in rows)
    return Rollout(
        prompts=[row.prompt for row in rows],
        texts=writing.policy.codec.texts(prompts, [row.ids for row in rows]),
        ids=padded([[*row.prompt_ids, *row.ids] for row in rows]),
        origin=padded([[*[int(Origin.PROMPT)] * len(row.prompt_ids), *row.origin] for row in rows]).to(torch.uint8),
        switch=torch.tensor([row.switch for row in rows]),
        finisher=torch.tensor([int(row.finisher) for row in rows], dtype=torch.uint8),
        phase=torch.tensor([row.phase for row in rows]),
        finished=torch.tensor([row.finished for row in rows]),
        index=torch.tensor([row.index for row in rows]),
        group=torch.tensor([row.index // samples_per_prompt for row in rows]),
        log_probs=_floats([[*front, *row.log_probs] for front, row in zip(fronts, rows)]),
        full_log_probs=_floats([[*front, *row.full_log_probs] for front, row in zip(fronts, rows)]),
        support=support,
        minimum=writing.minimum,
        counts=counts,
        guide_texts=[row.guide_text for row in rows],
    )


def _floats(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows]).view(len(rows), width)
