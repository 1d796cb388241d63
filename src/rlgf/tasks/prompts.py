"""Your own data: rows with a prompt and optional references, completion or preference pair.

JSON lines, CSV, Parquet, a folder of these or a Hub dataset; prompts are plain text or
conversations. See docs/own-data.md.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from rlgf.bounds import Flag, LengthOrZero
from rlgf.config.sections import TaskConfig
from rlgf.data.chat import PromptBuilder, with_separator
from rlgf.data.conversations.messages import (
    Reply,
    TemplateInputs,
    is_conversation,
    read_conversation,
    read_tools,
    reply_of,
    text_of,
    transcript,
)
from rlgf.data.conversations.template import DATE, read_template
from rlgf.data.datasets import describe_source, held_out_keys, places_of, read_splits
from rlgf.data.preferences import Columns, Pairs, parts_of, read_pairs
from rlgf.data.tables.text import Rows
from rlgf.errors import ConfigError, DataError, list_columns
from rlgf.randomness import Purpose, permutation
from rlgf.tasks.base import Task, TaskDefinition, task_options
from rlgf.types import Prompt

# usual names of the held-out splits
HELD_OUT_SPLITS = {"validation": ("validation", "valid", "val", "dev", "eval"), "test": ("test",)}
EMPTY = "references that are empty"
USUAL_PROMPT_COLUMNS = ("question", "instruction", "query", "input", "inputs", "text", "problem", "post", "document", "article")
TEMPLATE_KWARGS = "chat_template_kwargs"  # column with a row's own variables of the template, as TRL names it
IN_TRAINING = "held-out prompts that are training prompts too"


@dataclass(frozen=True)
class Options:
    """The names of columns and splits, and the format of prompts."""

    prompt_column: str = "prompt"  # a text, or a list of messages with role and content
    references_column: str = "references"  # a text or a list of texts
    completion_column: str = "completion"  # a text, or one message by the assistant
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    messages_column: str = "messages"  # of rows without a prompt: its last reply is the target
    tools_column: str = "tools"  # of conversations: a list of JSON schemas, for the chat template
    subset: str | None = None  # of a Hub dataset with several
    train_split: str | None = None  # None: 'train', or the only one there is
    validation_split: str | None = None  # None: found by name, or half of the held-out rows
    test_split: str | None = None
    prompt_tokens: LengthOrZero = 0  # maximum tokens of a prompt; 0: no limit
    truncation: Literal["right", "left"] = "right"  # end at which longer ones are truncated
    suffix: str = ""  # end of every plain prompt, never truncated
    separator: str = ""  # before responses to plain prompts; " " for most models
    chat_template: str | None = None  # Jinja, or its file; None: the tokenizer's own
    # variables of the chat template, such as enable_thinking; a column of this name adds more
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    encoding: str | None = None  # of CSV and JSON files that are not UTF-8, such as cp1252
    all_rows_test: Flag = False  # measure every row: what `rlgf evaluate RUN --data FILE` does
    # a classifier as reward scores prompt + completion (a reward model always does)
    scores_full_text: Flag = False


@dataclass(frozen=True)
class Row:
    """A row of the data whose prompt is still a text or a conversation."""

    prompt: Any
    references: list[Reply]
    targets: list[Reply]
    columns: Mapping[str, Any]
    place: str  # file, split and line, for error messages
    inputs: TemplateInputs


def build(config: TaskConfig, tokenizer: Any) -> Task:
    """Build the task with a prompt for each row.

    The completion or the chosen response is its target; without one every reference is a target.
    """
    options: Options = task_options(config, Options)
    dropped_rows: dict[str, int] = {}
    splits = split_rows(config, options, dropped_rows)
    builder = build_prompt_builder(options, tokenizer)
    train, *held_out = (_prompts(splits[name], builder) for name in ("train", "validation", "test"))
    train_texts = {prompt.text for prompt in train}
    for place, prompts in enumerate(held_out):
        held_out[place] = [prompt for prompt in prompts if options.all_rows_test or prompt.text not in train_texts]
        if len(held_out[place]) < len(prompts):
            dropped_rows[IN_TRAINING] = dropped_rows.get(IN_TRAINING, 0) + len(prompts) - len(held_out[place])
    validation, test = held_out
    if not (train and validation and test):
        raise DataError(
            f"{describe_source(_source(config))} leaves {len(train)} training, {len(validation)} validation and {len(test)} "
            "test prompts: each split needs at least one, and no training prompt may be held out."
        )
    if builder.num_too_long:
        dropped_rows[f"conversations of over {options.prompt_tokens} tokens"] = builder.num_too_long
    return Task(
        config.name,
        train,
        validation,
        test,
        scores_full_text=options.scores_full_text,
        dropped_rows=dropped_rows,
        warnings=_warnings(options, builder, [*train, *validation, *test]),
    )


def _warnings(options: Options, builder: PromptBuilder, prompts: Sequence[Prompt]) -> dict[str, int]:
    """Return warnings of truncated or changed prompts, with counts."""
    talks = sum(prompt.messages is not None for prompt in prompts)
    found = {
        f"prompts truncated to {options.prompt_tokens} tokens": builder.num_truncated,
        f"conversations whose tools (column '{options.tools_column}') the chat template ignores": builder.num_tools_ignored,
        f"conversations with the date {DATE:%Y-%m-%d} in place of today's": talks if builder.chat.asks_for_date else 0,
    }
    return {change: count for change, count in found.items() if count}


def build_prompt_builder(options: Options, tokenizer: Any) -> PromptBuilder:
    """Return the builder of prompts that these options describe."""
    template = read_template(options.chat_template)
    return PromptBuilder(
        tokenizer, options.prompt_tokens, options.truncation, options.suffix, template, options.separator,
        template_variables=options.chat_template_kwargs,
    )  # fmt: skip


def preference_pairs(config: TaskConfig, tokenizer: Any, min_words: int) -> Pairs:
    """Load the preference pairs of the training split, and of the held-out split if any."""
    options: Options = task_options(config, Options)
    return load_pairs(config, options, build_prompt_builder(options, tokenizer), min_words)


def load_pairs(config: TaskConfig, options: Options, builder: PromptBuilder, min_words: int) -> Pairs:
    """Load the preference pairs in the data of `config`, with prompts from `builder`."""
    columns = Columns(options.prompt_column, options.chosen_column, options.rejected_column)
    splits = _splits(config, options)
    found = {
        name: read_pairs(
            rows, f"{config.data}, split {name}", builder, min_words, columns,
            inputs_of=lambda row, place: _inputs(options, row, row.get(columns.prompt), place),
        )
        for name, rows in splits.items()
    }  # fmt: skip
    train, dropped = found["train"]
    if not train:
        why = "; ".join(f"{count:,} {reason}" for reason, count in dropped.items())
        raise DataError(f"{config.data} holds no usable preference pair ({why}): see preferences.min_words.")
    held_out = next((found[name] for name in ("test", "validation") if name in found), None)
    test, dropped = (held_out[0], dropped + held_out[1]) if held_out else ([], dropped)
    return Pairs(train, test, dict(dropped))


def _source(config: TaskConfig) -> str:
    if config.data is None:
        raise ConfigError(
            f"task '{config.name}' needs data: give --data with a file (JSON lines, CSV, Parquet), a folder or a Hub name."
        )
    return config.data


def _splits(config: TaskConfig, options: Options) -> dict[str, Rows]:
    """Load the rows of 'train', and of 'validation' and 'test' if they exist."""
    source = _source(config)
    texts = (options.prompt_column, options.references_column, options.completion_column, options.tools_column, TEMPLATE_KWARGS)
    texts = (*texts, options.chosen_column, options.rejected_column)
    found = read_splits(source, options.subset, texts, options.encoding)
    chosen = {"train": options.train_split, "validation": options.validation_split, "test": options.test_split}
    for name, wanted in chosen.items():
        if wanted is not None and wanted not in found:
            raise ConfigError(
                f"task.options.{name}_split is '{wanted}', but {source} has the splits {', '.join(sorted(found))}: name one."
            )
    only = next(iter(found)) if len(found) == 1 else "train"
    names = {"train": chosen["train"] or only}
    if names["train"] not in found:
        raise DataError(
            f"{source} has the splits {', '.join(sorted(found))}, none of them 'train': name one with task.options.train_split."
        )
    for name, usual_names in HELD_OUT_SPLITS.items():
        name_found = chosen[name] or next((one for one in usual_names if one in found), None)
        if name_found is not None and name_found != names["train"]:
            names[name] = name_found
    rows = {name: found[place]() for name, place in names.items()}
    for name, part in rows.items():
        if not part:
            raise DataError(f"{source}, split {names[name]}, holds no rows: give a dataset with at least one.")
    return rows


def split_rows(config: TaskConfig, options: Options, dropped_rows: dict[str, int]) -> dict[str, list[Row]]:
    """Return the rows of training, validation and test.

    If the data has one split, a fifth of it is held out. If one split is held out, its halves are
    validation and test. Rows with equal prompts stay together.
    """
    found = {
        name: [
            _row(options, row, f"{config.data}, split {name}, {place}", dropped_rows)
            for place, row in zip(places_of(rows), rows)
        ]
        for name, rows in _splits(config, options).items()
    }
    rows = {name: [row for row in part if row is not None] for name, part in found.items()}
    if options.all_rows_test:
        whole = rows["train"] if len(rows) == 1 else rows.get("test", rows.get("validation", rows["train"]))
        return dict.fromkeys(("train", "validation", "test"), whole)
    if len(rows) == 3:
        return rows
    train, rest = rows["train"], [row for name in HELD_OUT_SPLITS for row in rows.get(name, [])]
    if len(rows) == 1:
        is_held_out = held_out_keys([_key(row) for row in train])
        rest = [row for row, held_out in zip(train, is_held_out) if held_out]
        train = [row for row, held_out in zip(train, is_held_out) if not held_out]
    groups: dict[str, list[Row]] = {}
    for row in rest:
        groups.setdefault(_key(row), []).append(row)
    listed = list(groups.values())
    shuffled = [listed[place] for place in permutation(0, Purpose.TASK, 0, len(listed))]
    halves = shuffled[: len(shuffled) // 2], shuffled[len(shuffled) // 2 :]
    validation, test = ([row for group in half for row in group] for half in halves)
    return {"train": train, "validation": validation, "test": test}


def _key(row: Row) -> str:
    """Return a key that equal prompts share."""
    return json.dumps(row.prompt, sort_keys=True)


def _row(options: Options, row: Mapping[str, Any], place: str, dropped_rows: dict[str, int]) -> Row | None:
    """Parse a row; drop it (None, counted) if its dialogues share no prompt."""
    own = {
        options.prompt_column, options.references_column, options.completion_column, options.chosen_column,
        options.messages_column,
    }  # fmt: skip
    columns = {name: value for name, value in row.items() if name not in own}
    prompt, chosen = read_conversation(row.get(options.prompt_column), place), None
    if row.get(options.chosen_column) is not None:
        parts = parts_of(row, Columns(options.prompt_column, options.chosen_column, options.rejected_column), place)
        if parts is None:
            dropped_rows["pairs with no common prompt"] = dropped_rows.get("pairs with no common prompt", 0) + 1
            return None
        prompt, chosen, _ = parts
    completion = row.get(options.completion_column)
    if prompt is None:
        prompt, completion = _of_messages(options, row, completion, place)
    targets = [text for text in (completion, chosen) if text is not None][:1]
    references = _listed(row.get(options.references_column))
    replies = [[reply_of(reply, place) for reply in part] for part in (targets, references)]
    kept = [[reply for reply in part if text_of(reply).strip()] for part in replies]
    empty = sum(map(len, replies)) - sum(map(len, kept))
    if empty:
        dropped_rows[EMPTY] = dropped_rows.get(EMPTY, 0) + empty
    targets, references = kept
    distinct: dict[str, Reply] = {}
    for reply in (*targets, *references):
        distinct.setdefault(json.dumps(reply, sort_keys=True, default=str), reply)
    inputs = _inputs(options, row, prompt, place)
    return Row(prompt, list(distinct.values()), targets or references, columns, place, inputs)


def _of_messages(options: Options, row: Mapping[str, Any], completion: Any, place: str) -> tuple[Any, Any]:
    """Return prompt and completion of a row whose conversation ends with a reply.

    Raises `DataError` for a row that has neither a prompt nor messages.
    """
    messages = read_conversation(row.get(options.messages_column), place)
    if not is_conversation(messages):
        raise DataError(f"{place}: {_missing_prompt(options, row)}.")
    if completion is None and len(messages) > 1 and messages[-1].get("role") == "assistant":
        return messages[:-1], messages[-1]
    return messages, completion


def _missing_prompt(options: Options, row: Mapping[str, Any]) -> str:
    """Return an error text for a missing prompt, with the setting that fixes it."""
    name, others = options.prompt_column, [column for column in row if column != options.prompt_column]
    if name in row:
        return f"'{name}' is null: remove the row, or give it a prompt"
    usual = [column for column in others if column.lower() in USUAL_PROMPT_COLUMNS]
    setting = f"task.options.prompt_column={usual[0]}" if usual else "task.options.prompt_column to one of them"
    return f"there is no '{name}'; the row has {list_columns(row)}: set {setting}"


def _inputs(options: Options, row: Mapping[str, Any], prompt: Any, place: str) -> TemplateInputs:
    """Return the chat-template inputs of a row, other than its messages."""
    if prompt is not None and not is_conversation(prompt):
        return TemplateInputs()
    variables = row.get(TEMPLATE_KWARGS) or {}
    if not isinstance(variables, Mapping):
        raise DataError(f"{place}: '{TEMPLATE_KWARGS}' must be a mapping of the chat template's variables to values.")
    tools = read_tools(row.get(options.tools_column), options.tools_column, place)
    return TemplateInputs(tools, cast("Mapping[str, Any]", variables))


def _listed(value: Any) -> list[Any]:
    """Return references as a list: none, one (also a conversation) or several."""
    if value is None:
        return []
    if not isinstance(value, list) or is_conversation(value):
        return [value]
    # empty references are dropped and counted later
    return ["" if each is None else each for each in cast("list[Any]", value)]


def _prompts(rows: Sequence[Row], builder: PromptBuilder) -> list[Prompt]:
    built = builder([row.prompt for row in rows], [row.place for row in rows], [row.inputs for row in rows])
    return [_with_texts(prompt, row, builder) for prompt, row in zip(built, rows) if prompt is not None]


def _with_texts(prompt: Prompt, row: Row, builder: PromptBuilder) -> Prompt:
    references, targets = (
        tuple(builder.response(prompt, reply, row.place) for reply in replies) for replies in (row.references, row.targets)
    )
    return replace(prompt, references=references, sft_targets=targets, columns=row.columns)


def raw_texts(config: TaskConfig, max_texts: int) -> list[str]:
    """Return shuffled training prompts with their first target, at most `max_texts` (0: all)."""
    options: Options = task_options(config, Options)
    rows = split_rows(config, options, {})["train"]
    order = permutation(0, Purpose.TASK, 1, len(rows))
    return [_raw(rows[place], options) for place in (order[:max_texts] if max_texts else order)]


def _raw(row: Row, options: Options) -> str:
    target = text_of(row.targets[0]) if row.targets else ""
    if is_conversation(row.prompt):
        return f"{transcript(row.prompt)}\n{target}"
    return str(row.prompt).removesuffix(options.suffix) + options.suffix + with_separator(options.separator, target)


TASK = TaskDefinition(
    build, Options, raw_texts=raw_texts, preference_pairs=preference_pairs, needs_data=True, has_builtin_reward=False
)
