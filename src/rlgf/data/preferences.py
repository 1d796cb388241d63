"""Preference pairs: loaded, cleaned and split by post.

A pair is a prompt and two responses, one of which was preferred. The prompt is a column of its own,
or implicit: the common beginning of two whole dialogues.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlgf.data.chat import PromptBuilder, normalize_whitespace
from rlgf.data.conversations.messages import (
    Reply,
    TemplateInputs,
    content_of,
    is_conversation,
    read_conversation,
    reply_of,
    text_of,
    transcript,
)
from rlgf.data.datasets import held_out_keys, places_of
from rlgf.errors import DataError, list_columns
from rlgf.randomness import Purpose, permutation
from rlgf.types import Prompt

TURN = "\n\nAssistant:"  # responses begin after the last one that two dialogues share


@dataclass(frozen=True)
class Pair:
    """A prompt with its chosen (preferred) and its rejected response."""

    prompt: Prompt
    chosen: str
    rejected: str
    group: str  # subject of the prompt: pairs of one group are never in two splits


@dataclass(frozen=True)
class Pairs:
    """The training and test pairs of a reward model, and counts of dropped rows."""

    train: Sequence[Pair]
    test: Sequence[Pair]  # empty if the data has none: a fifth of the posts is held out then
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Columns:
    """The names of the columns of preference pairs."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


def read_pairs(
    rows: Sequence[Mapping[str, Any]], where: str, prompt_builder: PromptBuilder, min_words: int, columns: Columns,
    post: Callable[[Mapping[str, Any]], str] | None = None,
    inputs_of: Callable[[Mapping[str, Any], str], TemplateInputs] = lambda row, place: TemplateInputs(),
) -> tuple[list[Pair], Counter[str]]:  # fmt: skip
    """Return the pairs of rows, and the counts of dropped rows by reason.

    Dropped are pairs with identical responses, pairs with a response under `min_words` words,
    pairs whose dialogues have no common prompt, and pairs whose conversation has too many tokens
    for `prompt_builder`. `post` maps a row to its subject; by default that is the prompt.
    `inputs_of` returns what else a row gives its chat template.
    """
    dropped: Counter[str] = Counter()
    kept: list[tuple[int, Any, Reply, Reply]] = []
    places = [f"{where}, {place}" for place in places_of(rows)]
    for number, (row, place) in enumerate(zip(rows, places), 1):
        parts = parts_of(row, columns, place)
        if parts is None:
            dropped["pairs with no common prompt"] += 1
            continue
        prompt, chosen, rejected = parts
        texts = text_of(chosen), text_of(rejected)
        if texts[0].strip() == texts[1].strip():
            dropped["pairs with identical responses"] += 1
        elif min(len(text.split()) for text in texts) < min_words:
            dropped[f"pairs with a response under {min_words} words"] += 1
        else:
            kept.append((number, prompt, chosen, rejected))
    prompts = prompt_builder(
        [prompt for _, prompt, _, _ in kept],
        [places[number - 1] for number, *_ in kept],
        [inputs_of(rows[number - 1], places[number - 1]) for number, *_ in kept],
    )
    pairs: list[Pair] = []
    for (number, value, chosen, rejected), prompt in zip(kept, prompts):
        if prompt is None:
            dropped[f"pairs whose conversation has over {prompt_builder.limit} tokens"] += 1
            continue
        about = post(rows[number - 1]) if post else _asked(value)
        first, second = (prompt_builder.response(prompt, reply, places[number - 1]) for reply in (chosen, rejected))
        pairs.append(Pair(prompt, first, second, normalize_whitespace(about)))
    return pairs, dropped


def parts_of(row: Mapping[str, Any], columns: Columns, place: str) -> tuple[Any, Reply, Reply] | None:
    """Return prompt, chosen and rejected response of a row.

    Returns None if the two dialogues have no common prompt. Raises `ConfigError` for a missing
    column or a value of the wrong type.
    """
    for name in (columns.chosen, columns.rejected):
        if name not in row:
            raise DataError(
                f"{place}: there is no column '{name}'; it has {list_columns(row)}: name the columns of pairs with "
                "task.options.chosen_column and task.options.rejected_column."
            )
    chosen, rejected, prompt = (
        read_conversation(row.get(name), place) for name in (columns.chosen, columns.rejected, columns.prompt)
    )
    dialogues = is_conversation(chosen) and is_conversation(rejected) and min(len(chosen), len(rejected)) > 1
    if prompt is not None and not dialogues:
        return prompt, reply_of(chosen, place), reply_of(rejected, place)
    if dialogues:
        return _from_conversations(chosen, rejected, place)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise DataError(
            f"{place}: '{columns.chosen}' and '{columns.rejected}' must be two strings or two conversations; "
            f"responses alone need a column '{columns.prompt}'."
        )
    shared = next((place for place, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    end = chosen[:shared].rfind(TURN)
    if end < 0:
        return None
    end += len(TURN)
    return chosen[:end], chosen[end:], rejected[end:]


def _from_conversations(chosen: Sequence[Any], rejected: Sequence[Any], place: str) -> tuple[Any, Reply, Reply] | None:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    ends = chosen[shared:], rejected[shared:]
    if not shared or any(len(end) != 1 or end[0].get("role") != "assistant" for end in ends):
        return None
    if not all(isinstance(content_of(end[0]), str) for end in ends):
        return None
    return list(chosen[:shared]), reply_of(ends[0][0], place), reply_of(ends[1][0], place)


def _asked(prompt: Any) -> str:
    return transcript(prompt) if is_conversation(prompt) else str(prompt)


def split_for_role(pairs: Pairs, parts: int, part: int) -> Pairs:
    """Return the part of the pairs for one role; parts share no posts.

    All parts have the same test pairs, about other posts. Without a test split a fifth of the posts
    is held out; with one, its pairs about training posts are dropped. Raises `ConfigError` if there
    are too few posts.
    """
    dropped, train, test = dict(pairs.dropped), list(pairs.train), list(pairs.test)
    if test:
        trained = {pair.group for pair in train}
        test = [pair for pair in test if pair.group not in trained]
        if len(test) < len(pairs.test):
            dropped["held-out pairs about posts of the training pairs"] = len(pairs.test) - len(test)
    else:
        out = held_out_keys([pair.group for pair in train])
        test = [pair for pair, held in zip(train, out) if held]
        train = [pair for pair, held in zip(train, out) if not held]
    posts = list(dict.fromkeys(pair.group for pair in train))
    if len(posts) < parts or not test:
        raise DataError(
            f"the usable preference pairs are about {len(posts)} posts to train on and {len({pair.group for pair in test})} to "
            "measure on: more are needed, better hundreds."
        )
    kept_posts = {posts[place] for place in permutation(0, Purpose.TASK, 4, len(posts))[part::parts]}
    return Pairs([pair for pair in train if pair.group in kept_posts], test, dropped)


def length_baseline(pairs: Sequence[Pair]) -> float:
    """Return the accuracy of preferring the longer response (characters; ties count half)."""
    return pairwise_accuracy([len(pair.chosen.strip()) for pair in pairs], [len(pair.rejected.strip()) for pair in pairs])


def pairwise_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Return the share of pairs whose chosen response has the higher number.

    Ties count half; without pairs the result is NaN.
    """
    wins = [(first > second) + 0.5 * (first == second) for first, second in zip(chosen, rejected)]
    return sum(wins) / len(wins) if wins else math.nan
