"""TL;DR: summarize a Reddit post as its author would.

Source: Stiennon et al. 2020; the paper, section 6 and appendix C.2.

The data is a folder of posts and comparisons, whose posts are split here, or a Hub dataset with
splits of its own.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlgf.bounds import LengthOrZero, PositiveInt, Probability
from rlgf.config.sections import TaskConfig
from rlgf.data.chat import PromptBuilder
from rlgf.data.datasets import held_out_keys, read_rows, read_splits
from rlgf.data.preferences import Columns, Pairs, read_pairs
from rlgf.errors import ConfigError, DataError
from rlgf.randomness import Purpose, permutation
from rlgf.tasks import prompts
from rlgf.tasks.base import Task, TaskDefinition, task_options
from rlgf.types import Prompt

ENDING = "TL;DR:"  # of every prompt, never truncated
POSTS, COMPARISONS, MORE_TEXT = "sft_posts", "comparisons", "tldrhq_train"  # files of the folder
# letters and digits: no two of the 3,194 posts of the folder begin with the same ones, except
# versions of one post
POST_KEY_LENGTH = 80
# options of the task prompts for CarperAI's dataset
HUB_OPTIONS = {"completion_column": "label", "suffix": f"\n{ENDING}", "separator": " "}
SHARED = "posts with a summary that are reserved for the reward models"


@dataclass(frozen=True)
class Options:
    """The length of prompts and the split of posts.

    Counts are of posts, and apply to a folder only.
    """

    prompt_tokens: LengthOrZero = 500  # maximum, with `TL;DR:`; longer posts are truncated on the right
    test_posts: PositiveInt = 256
    validation_posts: PositiveInt = 128
    sft_share: Probability = 0.5  # of the other posts with a summary: for SFT; the rest is for RL
    comparisons: str | None = None  # preference pairs for a Hub dataset


def build(config: TaskConfig, tokenizer: Any) -> Task:
    """Build the task: posts are prompts, their authors' summaries references and targets."""
    options: Options = task_options(config, Options)
    if not _is_folder(config):
        own = {**HUB_OPTIONS, "prompt_tokens": options.prompt_tokens, "validation_split": "valid"}
        return prompts.build(TaskConfig(config.name, _source(config), config.max_new_tokens, options=own), tokenizer)
    builder = PromptBuilder(tokenizer, options.prompt_tokens, suffix=f"\n\n{ENDING}")
    parts = {name: _prompts(rows, builder, str(config.data)) for name, rows in _split_posts(config, options).items()}
    warnings = {SHARED: len(_rows(config, POSTS)) - sum(map(len, parts.values()))}
    warnings |= {f"prompts truncated to {options.prompt_tokens} tokens": builder.num_truncated} if builder.num_truncated else {}
    return Task(
        config.name, parts["train"], parts["validation"], parts["test"], demonstrations=parts["sft"], warnings=warnings
    )  # fmt: skip


def _source(config: TaskConfig) -> str:
    if config.data is None:
        raise ConfigError(
            f"task 'tldr' needs data: give --data with a folder that holds {POSTS} and {COMPARISONS} as .jsonl[.gz], or a Hub "
            "name."
        )
    return config.data


def _file(config: TaskConfig, name: str) -> Path | None:
    folder = Path(_source(config)).expanduser()
    return next((file for end in ("jsonl", "jsonl.gz") if (file := folder / f"{name}.{end}").is_file()), None)


def _is_folder(config: TaskConfig) -> bool:
    """Return whether the data is a folder of posts and comparisons.

    Raises `ConfigError` if only one of the two files exists.
    """
    found = {name: _file(config, name) for name in (POSTS, COMPARISONS)}
    if any(found.values()) and not all(found.values()):
        missing = next(name for name, file in found.items() if file is None)
        raise DataError(f"{config.data} holds no {missing}.jsonl[.gz]: TL;DR needs {POSTS} and {COMPARISONS}.")
    return all(found.values())


def _rows(config: TaskConfig, name: str) -> list[dict[str, Any]]:
    return _read(_source(config), name)


@lru_cache(maxsize=4)
def _read(source: str, name: str) -> list[dict[str, Any]]:
    columns = {POSTS: ("subreddit", "title", "post", "reference"), MORE_TEXT: ("post", "summary")}
    return read_rows(source, name, columns.get(name, ("subreddit", "title", "post", "chosen", "rejected")))


def _split_posts(config: TaskConfig, options: Options) -> dict[str, list[dict[str, Any]]]:
    """Split the distinct posts with a summary into test, validation, SFT and train.

    Posts with comparisons are left to the reward models.
    """
    compared = {post_key(row["post"]) for row in _rows(config, COMPARISONS)}
    distinct = {post_key(row["post"]): row for row in reversed(_rows(config, POSTS))}
    posts = [row for post, row in reversed(distinct.items()) if post not in compared]
    order = permutation(0, Purpose.TASK, 5, len(posts)).tolist()
    num_held_out = options.test_posts + options.validation_posts
    sft = num_held_out + round(options.sft_share * max(0, len(posts) - num_held_out))
    edges = {"test": (0, options.test_posts), "validation": (options.test_posts, num_held_out), "sft": (num_held_out, sft)}
    parts = {name: [posts[i] for i in order[start:end]] for name, (start, end) in {**edges, "train": (sft, None)}.items()}
    for name, part in parts.items():
        if not part:
            raise DataError(
                f"{config.data}: no post is left for {name} of {len(posts)}: lower task.options.test_posts or validation_posts "
                "and choose a sft_share between 0 and 1."
            )
    return parts


def post_key(post: str) -> str:
    """Return the first `POST_KEY_LENGTH` letters and digits of a post, which identify it.

    Some posts are in the data twice, edited at the end.
    """
    return "".join(re.findall(r"[^\W_]", post.lower()))[:POST_KEY_LENGTH]


def format_post(row: Mapping[str, Any]) -> str:
    """Format a post in the standard way, without the final `TL;DR:`."""
    return f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: {row['post']}"


def _summary(text: str) -> str:
    """Return a summary as it follows `TL;DR:`, after one space."""
    return " " + text.strip().removeprefix(ENDING).strip()


def _prompts(rows: Sequence[Mapping[str, Any]], builder: PromptBuilder, where: str) -> list[Prompt]:
    built = builder([format_post(row) for row in rows], [f"{where}, post {str(row['title'])[:40]!r}" for row in rows])
    found: list[Prompt] = []
    for row, prompt in zip(rows, built):
        assert prompt is not None  # None stands for long conversations only
        texts = (_summary(row["reference"]),) if row["reference"].strip() else ()
        columns = {name: value for name, value in row.items() if name not in ("query", "reference", "post")}
        found.append(Prompt(prompt.text, texts, texts, columns=columns))
    return found


def preference_pairs(config: TaskConfig, tokenizer: Any, min_words: int) -> Pairs:
    """Load human comparisons of two summaries of a post."""
    options: Options = task_options(config, Options)
    if _is_folder(config):
        builder = PromptBuilder(tokenizer, options.prompt_tokens, suffix=f"\n\n{ENDING}")
        pairs, dropped = read_pairs(
            [_comparison(row, format_post(row)) for row in _rows(config, COMPARISONS)], f"{config.data}, {COMPARISONS}",
            builder, min_words, Columns(), lambda row: post_key(row["post"]),
        )  # fmt: skip
        held_out = _held_out_posts(config)
        train, test = ([pair for pair in pairs if (pair.group in held_out) == side] for side in (False, True))
        return Pairs(train, test, dict(dropped))
    if options.comparisons is None:
        raise ConfigError(
            "a reward model for TL;DR needs pairs: give task.options.comparisons with a Hub name, or preferences.data."
        )
    builder = PromptBuilder(tokenizer, options.prompt_tokens, suffix=f"\n{ENDING}")
    splits, found = read_splits(options.comparisons), dict[str, list[Any]]()
    total: dict[str, int] = {}
    for name in ("train", "test"):
        rows = [_comparison(row, row["prompt"].partition(ENDING)[0].rstrip()) for row in splits[name]()]
        found[name], dropped = read_pairs(rows, f"{options.comparisons}, split {name}", builder, min_words, Columns())
        total |= {reason: total.get(reason, 0) + count for reason, count in dropped.items()}
    return Pairs(found["train"], found["test"], total)


def _held_out_posts(config: TaskConfig) -> set[str]:
    """Return the keys of a fifth of the compared posts, held out from training."""
    posts = [post_key(row["post"]) for row in _rows(config, COMPARISONS)]
    return {post for post, held_out in zip(posts, held_out_keys(posts)) if held_out}


def _comparison(row: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    return {**row, "prompt": prompt, "chosen": _summary(row["chosen"]), "rejected": _summary(row["rejected"])}


def raw_texts(config: TaskConfig, max_texts: int) -> list[str]:
    """Return shuffled texts for pretraining, at most `max_texts` (0: all).

    Posts of SFT and RL with their summaries, posts of the reward models' training pairs without,
    and the other posts of the folder. Validation, test and the held-out pairs are excluded.
    """
    options: Options = task_options(config, Options)
    if not _is_folder(config):
        return prompts.raw_texts(TaskConfig(config.name, _source(config), options=HUB_OPTIONS), max_texts)
    shares = _split_posts(config, options)
    texts = [f"{format_post(row)}\n\n{ENDING}{_summary(row['reference'])}" for name in ("sft", "train") for row in shares[name]]
    held_out = _held_out_posts(config)
    texts += dict.fromkeys(format_post(row) for row in _rows(config, COMPARISONS) if post_key(row["post"]) not in held_out)
    if _file(config, MORE_TEXT):
        texts += [f"POST: {row['post']}\n\n{ENDING} {row['summary']}" for row in _rows(config, MORE_TEXT)]
    order = permutation(0, Purpose.TASK, 1, len(texts))
    return [texts[place] for place in (order[:max_texts] if max_texts else order)]


INSTRUCTION = (
    "Below is a post from Reddit. Write its TL;DR: what its author would say in one or two sentences, in the same voice, at "
    "most 35 words. Write only the summary, without quotation marks and without 'TL;DR'.\n\n{text}"
)

TASK = TaskDefinition(
    build, Options, raw_texts=raw_texts, preference_pairs=preference_pairs, needs_data=True, has_builtin_reward=False,
    instruction=INSTRUCTION,
)  # fmt: skip
