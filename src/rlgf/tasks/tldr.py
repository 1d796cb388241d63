"""TL;DR: summarise a Reddit post as its author would. Source: Stiennon et al. 2020; the paper, section 6, C.2; tasks.md.

The data is a folder of posts and comparisons, whose posts are split here once, or a Hub dataset with splits of its own.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlgf.config import TaskConfig
from rlgf.data import held_out, read_rows, read_splits
from rlgf.errors import UserError
from rlgf.preferences import Columns, Pairs, read_pairs
from rlgf.prompting import PromptReader
from rlgf.randomness import Purpose, permutation
from rlgf.tasks import prompts
from rlgf.tasks.base import Task, TaskKind, task_options
from rlgf.types import Prompt

ENDING = "TL;DR:"  # of every prompt, never cut off
POSTS, COMPARISONS, MORE_TEXT = "sft_posts", "comparisons", "tldrhq_train"  # files of the folder
MARK = 80  # letters and digits: no two of the 3,194 posts of the folder share as many, but for versions of one
OF_HUB = {"completion_column": "label", "suffix": f"\n{ENDING}", "separator": " "}  # how CarperAI's dataset is read
SHARED = "posts with a summary that are left to the reward models"


@dataclass(frozen=True)
class Options:
    """How long prompts are, and how posts are shared out; the counts are of posts, and for a folder alone."""

    prompt_tokens: int = 500  # most, `TL;DR:` included; a longer post is cut on the right
    test_posts: int = 256
    validation_posts: int = 128
    sft_share: float = 0.5  # of the posts with a summary that are neither: for SFT; the rest is for reinforcement learning
    comparisons: str | None = None  # preference pairs for a Hub dataset


def build(config: TaskConfig, tokenizer: Any) -> Task:
    """Posts as prompts, their authors' summaries as references and targets."""
    options: Options = task_options(config, Options)
    if not _is_folder(config):
        own = {**OF_HUB, "prompt_tokens": options.prompt_tokens, "validation_split": "valid"}
        return prompts.build(TaskConfig(config.name, _source(config), config.max_new_tokens, options=own), tokenizer)
    reader = PromptReader(tokenizer, options.prompt_tokens, suffix=f"\n\n{ENDING}")
    parts = {name: _prompts(rows, reader, str(config.data)) for name, rows in _shares(config, options).items()}
    remarks = {SHARED: len(_rows(config, POSTS)) - sum(map(len, parts.values()))}
    remarks |= {f"prompts cut to {options.prompt_tokens} tokens": reader.cut} if reader.cut else {}
    return Task(
        config.name, parts["train"], parts["validation"], parts["test"], demonstrations=parts["sft"], remarks=remarks
    )  # fmt: skip


def _source(config: TaskConfig) -> str:
    if config.data is None:
        raise UserError(
            f"task 'tldr' needs data: give --data with a folder that holds {POSTS} and {COMPARISONS} as .jsonl[.gz], or a Hub "
            "name."
        )
    return config.data


def _file(config: TaskConfig, name: str) -> Path | None:
    folder = Path(_source(config)).expanduser()
    return next((file for end in ("jsonl", "jsonl.gz") if (file := folder / f"{name}.{end}").is_file()), None)


def _is_folder(config: TaskConfig) -> bool:
    """Whether the data is a folder of posts and comparisons."""
    found = {name: _file(config, name) for name in (POSTS, COMPARISONS)}
    if any(found.values()) and not all(found.values()):
        missing = next(name for name, file in found.items() if file is None)
        raise UserError(f"{config.data} holds no {missing}.jsonl[.gz]: TL;DR needs {POSTS} and {COMPARISONS}.")
    return all(found.values())


def _rows(config: TaskConfig, name: str) -> list[dict[str, Any]]:
    return _read(_source(config), name)


@lru_cache(maxsize=4)
def _read(source: str, name: str) -> list[dict[str, Any]]:
    columns = {POSTS: ("subreddit", "title", "post", "reference"), MORE_TEXT: ("post", "summary")}
    return read_rows(source, name, columns.get(name, ("subreddit", "title", "post", "chosen", "rejected")))


def _shares(config: TaskConfig, options: Options) -> dict[str, list[dict[str, Any]]]:
    """The posts that have a summary, once each, in four parts; those that are compared are left to the reward models."""
    compared = {mark(row["post"]) for row in _rows(config, COMPARISONS)}
    distinct = {mark(row["post"]): row for row in reversed(_rows(config, POSTS))}
    posts = [row for post, row in reversed(distinct.items()) if post not in compared]
    order = permutation(0, Purpose.TASK, 5, len(posts)).tolist()
    held = options.test_posts + options.validation_posts
    sft = held + round(options.sft_share * max(0, len(posts) - held))
    edges = {"test": (0, options.test_posts), "validation": (options.test_posts, held), "sft": (held, sft)}
    parts = {name: [posts[i] for i in order[start:end]] for name, (start, end) in {**edges, "train": (sft, None)}.items()}
    for name, part in parts.items():
        if not part:
            raise UserError(
                f"{config.data}: no post is left for {name} of {len(posts)}: lower task.options.test_posts or validation_posts "
                "and choose a sft_share between 0 and 1."
            )
    return parts


def mark(post: str) -> str:
    """What tells a post from others: how it begins, in letters and digits; some stand in the data twice, edited at the end."""
    return "".join(re.findall(r"[^\W_]", post.lower()))[:MARK]


def asked(row: Mapping[str, Any]) -> str:
    """A post in the standard format, up to and without `TL;DR:`."""
    return f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: {row['post']}"


def _summary(text: str) -> str:
    """A summary as it follows `TL;DR:`, behind one space."""
    return " " + text.strip().removeprefix(ENDING).strip()


def _prompts(rows: Sequence[Mapping[str, Any]], reader: PromptReader, where: str) -> list[Prompt]:
    made = reader([asked(row) for row in rows], [f"{where}, post {str(row['title'])[:40]!r}" for row in rows])
    found: list[Prompt] = []
    for row, prompt in zip(rows, made):
        assert prompt is not None  # only conversations can be
        texts = (_summary(row["reference"]),) if row["reference"].strip() else ()
        columns = {name: value for name, value in row.items() if name not in ("query", "reference", "post")}
        found.append(Prompt(prompt.text, texts, texts, columns=columns))
    return found


def preference_pairs(config: TaskConfig, tokenizer: Any, least_words: int) -> Pairs:
    """Human comparisons of two summaries of a post."""
    options: Options = task_options(config, Options)
    if _is_folder(config):
        reader = PromptReader(tokenizer, options.prompt_tokens, suffix=f"\n\n{ENDING}")
        pairs, dropped = read_pairs(
            [_compared(row, asked(row)) for row in _rows(config, COMPARISONS)], f"{config.data}, {COMPARISONS}", reader,
            least_words, Columns(), lambda row: mark(row["post"]),
        )  # fmt: skip
        out = _held_posts(config)
        train, test = ([pair for pair in pairs if (pair.post in out) == held] for held in (False, True))
        return Pairs(train, test, dict(dropped))
    if options.comparisons is None:
        raise UserError(
            "a reward model for TL;DR needs pairs: give task.options.comparisons with a Hub name, or preferences.data."
        )
    reader = PromptReader(tokenizer, options.prompt_tokens, suffix=f"\n{ENDING}")
    splits, found = read_splits(options.comparisons), dict[str, list[Any]]()
    total: dict[str, int] = {}
    for name in ("train", "test"):
        rows = [_compared(row, row["prompt"].partition(ENDING)[0].rstrip()) for row in splits[name]()]
        found[name], dropped = read_pairs(rows, f"{options.comparisons}, split {name}", reader, least_words, Columns())
        total |= {reason: total.get(reason, 0) + count for reason, count in dropped.items()}
    return Pairs(found["train"], found["test"], total)


def _held_posts(config: TaskConfig) -> set[str]:
    """A fifth of the posts that are compared: no reward model is trained on them, and no language model."""
    posts = [mark(row["post"]) for row in _rows(config, COMPARISONS)]
    return {post for post, held in zip(posts, held_out(posts)) if held}


def _compared(row: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    return {**row, "prompt": prompt, "chosen": _summary(row["chosen"]), "rejected": _summary(row["rejected"])}


def raw_texts(config: TaskConfig, most: int) -> list[str]:
    """Posts for the model before SFT: those of SFT and reinforcement learning with their summaries, those that reward models
    are trained on without; and whatever else the folder holds. None of validation or test, none of the held-out pairs."""
    options: Options = task_options(config, Options)
    if not _is_folder(config):
        return prompts.raw_texts(TaskConfig(config.name, _source(config), options=OF_HUB), most)
    shares = _shares(config, options)
    texts = [f"{asked(row)}\n\n{ENDING}{_summary(row['reference'])}" for name in ("sft", "train") for row in shares[name]]
    out = _held_posts(config)
    texts += dict.fromkeys(asked(row) for row in _rows(config, COMPARISONS) if mark(row["post"]) not in out)
    if _file(config, MORE_TEXT):
        texts += [f"POST: {row['post']}\n\n{ENDING} {row['summary']}" for row in _rows(config, MORE_TEXT)]
    order = permutation(0, Purpose.TASK, 1, len(texts))
    return [texts[place] for place in (order[:most] if most else order)]


INSTRUCTION = (
    "Below is a post from Reddit. Write its TL;DR: what its author would say in one or two sentences, in the same voice, at "
    "most 35 words. Write only the summary, without quotation marks and without 'TL;DR'.\n\n{text}"
)

KIND = TaskKind(
    build, Options, raw_texts=raw_texts, preference_pairs=preference_pairs, needs_data=True, has_rule=False,
    instruction=INSTRUCTION,
)  # fmt: skip
