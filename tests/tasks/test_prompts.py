"""Your own data: formats, columns, splits, references, conversations; and what is refused or counted."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlgf.cli import app
from rlgf.config.sections import TaskConfig
from rlgf.data.datasets import held_out_keys
from rlgf.errors import INPUT_ERRORS
from rlgf.pipeline.stages import train_tokenizer
from rlgf.tasks import prompts
from rlgf.tasks.base import Task
from rlgf.tasks.registry import TASKS, task_definition

Rows = Sequence[Mapping[str, Any]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the film was a great joy and its cast moved me"] * 3, 300)


def write(path: Path, rows: Rows) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def task_of(source: Path, tokenizer: Any, **options: Any) -> Task:
    return prompts.build(TaskConfig("prompts", str(source), options=options), tokenizer)


def all_prompts(task: Task) -> list[Any]:
    return [*task.train, *task.validation, *task.test]


ROWS: Rows = [{"prompt": f"count to {number}:", "completion": f" {number}", "goal": number} for number in range(20)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.parquet", "rows.json"])
def test_every_format_gives_the_same_prompts(tmp_path: Path, tokenizer: Any, name: str):
    path = tmp_path / name
    if name == "rows.csv":
        path.write_text("prompt,completion,goal\n" + "".join(f"{r['prompt']},{r['completion']},{r['goal']}\n" for r in ROWS))
    elif name == "rows.parquet":
        import pandas

        pandas.DataFrame(ROWS).to_parquet(path)
    elif name == "rows.json":
        path.write_text(json.dumps(ROWS))
    else:
        write(path, ROWS)
    task = task_of(path, tokenizer)
    assert (len(task.train), len(task.validation), len(task.test)) == (16, 2, 2)
    assert sorted(prompt.columns["goal"] for prompt in all_prompts(task)) == list(range(20))
    for prompt in all_prompts(task):
        assert prompt.text == f"count to {prompt.columns['goal']}:"
        assert prompt.references == prompt.sft_targets == (f" {prompt.columns['goal']}",)
        assert prompt.columns == {"goal": prompt.columns["goal"]}


def test_a_cell_that_says_na_is_a_word_and_an_empty_one_no_reference(tmp_path: Path, tokenizer: Any):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,references\n" + "".join(f"ask {n},{'' if n == 3 else 'NA'}\n" for n in range(10)))
    task = task_of(path, tokenizer)
    assert task.dropped_rows == {prompts.EMPTY: 1}
    assert [prompt.references for prompt in all_prompts(task)].count(("NA",)) == 9


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "rows.csv, split train, holds no rows"),
        ("prompt,references\n", "rows.csv, split train, holds no rows"),
        ('prompt,references\n"a,b\n', r"rows.csv, line 2: the quotation marks of a cell do not match"),
    ],
)
def test_a_table_that_holds_nothing_or_is_broken_says_so(content: str, words: str, tmp_path: Path, tokenizer: Any):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(INPUT_ERRORS, match=words):
        task_of(path, tokenizer)


def test_a_folder_of_splits_is_taken_as_it_is(tmp_path: Path, tokenizer: Any):
    write(tmp_path / "train.jsonl", ROWS[:10])
    write(tmp_path / "dev.jsonl", ROWS[10:14])
    write(tmp_path / "test.jsonl.gz", ROWS[14:])
    task = task_of(tmp_path, tokenizer)
    assert [prompt.columns["goal"] for prompt in task.validation] == [10, 11, 12, 13]
    assert [prompt.columns["goal"] for prompt in task.test] == [14, 15, 16, 17, 18, 19]


def test_one_held_out_split_serves_for_validation_and_test(tmp_path: Path, tokenizer: Any):
    write(tmp_path / "mine.jsonl", ROWS[:10])
    write(tmp_path / "yours.jsonl", ROWS[10:])
    with pytest.raises(INPUT_ERRORS, match="has the splits mine, yours, none of them 'train'"):
        task_of(tmp_path, tokenizer)
    with pytest.raises(INPUT_ERRORS, match="test_split is 'theirs'"):
        task_of(tmp_path, tokenizer, train_split="mine", test_split="theirs")
    task = task_of(tmp_path, tokenizer, train_split="mine", test_split="yours")
    assert (len(task.train), len(task.validation), len(task.test)) == (10, 5, 5)
    assert sorted(prompt.columns["goal"] for prompt in [*task.validation, *task.test]) == list(range(10, 20))


def test_of_one_split_a_fifth_is_held_out_and_equal_prompts_stay_together(tmp_path: Path, tokenizer: Any):
    rows = [{"prompt": f"ask {number % 10}", "place": number} for number in range(50)]
    task = task_of(write(tmp_path / "rows.jsonl", rows), tokenizer)
    texts = {prompt.text for prompt in task.train}
    assert (len(texts), len(task.train)) == (8, 40)  # every row is asked, as often as it is there
    assert not texts & {prompt.text for prompt in [*task.validation, *task.test]}


def test_no_prompt_is_in_both_halves_of_what_is_held_out(tmp_path: Path, tokenizer: Any):
    rows = [{"prompt": f"ask {number % 20}", "place": number} for number in range(100)]
    task = task_of(write(tmp_path / "rows.jsonl", rows), tokenizer)
    assert (len(task.validation), len(task.test)) == (10, 10)
    assert {prompt.text for prompt in task.validation}.isdisjoint(prompt.text for prompt in task.test)


def test_the_fifth_that_is_held_out_is_a_matter_of_keys():
    keys = ["a", "b", "a", "c", "d", "e", "a"]
    held = held_out_keys(keys)
    assert len({key for key, out in zip(keys, held) if out}) == 1
    assert held[0] == held[2] == held[6]
    assert held == held_out_keys(keys)


def test_held_out_prompts_that_are_trained_on_are_left_out_and_counted(tmp_path: Path, tokenizer: Any):
    write(tmp_path / "train.jsonl", ROWS[:10])
    write(tmp_path / "test.jsonl", ROWS[8:16])
    task = task_of(tmp_path, tokenizer)
    assert task.dropped_rows == {prompts.IN_TRAINING: 2}
    assert len(task.validation) + len(task.test) == 6
    write(tmp_path / "test.jsonl", ROWS[:10])
    with pytest.raises(INPUT_ERRORS, match="10 training, 0 validation and 0 test prompts"):
        task_of(tmp_path, tokenizer)


def test_references_may_be_one_several_or_none(tmp_path: Path, tokenizer: Any):
    rows = [
        {"prompt": "one", "references": " a"}, {"prompt": "several", "references": [" a", " b", " a"]}, {"prompt": "none"},
        {"prompt": "null", "references": None}, {"prompt": "empty", "references": ["", " c", "  ", None]},
        {"prompt": "both", "references": [" a", " b"], "completion": " c"},
    ]  # fmt: skip
    task = task_of(write(tmp_path / "rows.jsonl", rows), tokenizer)
    found = {prompt.text: (prompt.references, prompt.sft_targets) for prompt in all_prompts(task)}
    assert found == {
        "one": ((" a",), (" a",)), "several": ((" a", " b"), (" a", " b", " a")), "none": ((), ()), "null": ((), ()),
        "empty": ((" c",), (" c",)), "both": ((" c", " a", " b"), (" c",)),
    }  # fmt: skip
    assert task.dropped_rows == {prompts.EMPTY: 3}


def test_columns_may_have_other_names(tmp_path: Path, tokenizer: Any):
    rows = [{"question": f"ask {number}", "answer": f" {number}", "prompt": "a column like any other"} for number in range(8)]
    path = write(tmp_path / "rows.jsonl", rows)
    task = task_of(path, tokenizer, prompt_column="question", completion_column="answer")
    assert {prompt.columns["prompt"] for prompt in task.train} == {"a column like any other"}
    assert all(prompt.sft_targets == (prompt.text.removeprefix("ask"),) for prompt in task.train)
    with pytest.raises(INPUT_ERRORS, match="line 1: there is no 'asked'; the row has answer, prompt, question"):
        task_of(path, tokenizer, prompt_column="asked")


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_conversations_and_texts_may_stand_side_by_side(tmp_path: Path, tokenizer: Any):
    rows = [
        {"prompt": [said("user", f"ask {n}")], "completion": [said("assistant", f"it is {n}")], "references": ["yes", "no"]}
        for n in range(8)
    ] + [{"prompt": "plain", "completion": " text"}]
    task = task_of(write(tmp_path / "rows.jsonl", rows), tokenizer, chat_template=CHAT)
    found = {prompt.text: prompt for prompt in all_prompts(task)}
    assert found["<user>ask 3</><assistant>"].sft_targets == ("it is 3",)
    assert found["<user>ask 3</><assistant>"].references == ("it is 3", "yes", "no")
    assert found["<user>ask 3</><assistant>"].messages == (said("user", "ask 3"),)
    assert found["plain"].messages is None


def test_a_completion_of_several_turns_is_refused(tmp_path: Path, tokenizer: Any):
    rows = [{"prompt": "ask", "completion": [said("assistant", "a"), said("user", "b")]}]
    with pytest.raises(INPUT_ERRORS, match="line 1: a response must be a string or one assistant message"):
        task_of(write(tmp_path / "rows.jsonl", rows), tokenizer)


def test_of_preference_rows_the_chosen_side_is_the_target(tmp_path: Path, tokenizer: Any):
    rows = [{"prompt": f"ask {n}", "chosen": " yes", "rejected": " no"} for n in range(6)]
    rows += [
        {"chosen": f"\n\nHuman: {n}?\n\nAssistant: yes", "rejected": f"\n\nHuman: {n}?\n\nAssistant: no"} for n in range(6)
    ]
    task = task_of(write(tmp_path / "rows.jsonl", rows), tokenizer)
    assert {prompt.sft_targets for prompt in all_prompts(task)} == {(" yes",)}
    assert {prompt.text for prompt in all_prompts(task)} >= {"ask 0", "\n\nHuman: 5?\n\nAssistant:"}
    assert all(prompt.columns["rejected"].endswith(" no") for prompt in all_prompts(task))


def test_raw_texts_are_those_of_the_training_split(tmp_path: Path, tokenizer: Any):
    path = write(tmp_path / "rows.jsonl", [*ROWS, {"prompt": [said("user", "ask")], "completion": "well"}])
    texts = set(prompts.raw_texts(TaskConfig("prompts", str(path), options={"suffix": "!"}), 0))
    task = task_of(path, tokenizer, suffix="!", chat_template=CHAT)
    plain = {prompt.text + prompt.sft_targets[0] for prompt in task.train if prompt.messages is None}
    assert texts - {"ask\nwell"} == plain
    assert "count to 3:! 3" in texts | {p.text + p.sft_targets[0] for p in [*task.validation, *task.test]}


def test_prompts_are_cut_and_it_is_said_how_many(tmp_path: Path, word_tokenizer: Any):
    rows = [{"prompt": "review of : plot cast music script sound"}, *({"prompt": f"review of : plot {n}"} for n in range(8))]
    task = task_of(write(tmp_path / "rows.jsonl", rows), word_tokenizer, prompt_tokens=6, suffix=" =>")
    assert {len(prompt.text.split()) for prompt in all_prompts(task)} == {6}
    assert task.warnings == {"prompts truncated to 6 tokens": 1}


def test_what_cannot_be_read_is_refused(tmp_path: Path, tokenizer: Any):
    with pytest.raises(INPUT_ERRORS, match="needs data"):
        prompts.build(TaskConfig("prompts"), tokenizer)
    with pytest.raises(INPUT_ERRORS, match="holds no rows"):
        task_of(write(tmp_path / "rows.jsonl", []), tokenizer)
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(INPUT_ERRORS, match=r"broken\.parquet' cannot be loaded"):
        task_of(tmp_path / "broken.parquet", tokenizer)
    with pytest.raises(INPUT_ERRORS, match="prompt_tokens is -1"):
        task_of(write(tmp_path / "rows.jsonl", ROWS), tokenizer, prompt_tokens=-1)
    with pytest.raises(INPUT_ERRORS, match="truncation"):
        task_of(write(tmp_path / "rows.jsonl", ROWS), tokenizer, truncation="middle")


REWARD = """
def reward(prompts, texts):
    return [-abs(len(text) - prompt.columns["goal"]) for prompt, text in zip(prompts, texts)]
"""
OWN = """
from rlgf.tasks.base import Task, TaskDefinition
from dataclasses import dataclass
from rlgf.types import Prompt

@dataclass(frozen=True)
class Options:
    highest: int = 30

def build(config, tokenizer):
    prompts = [Prompt(f"count to {n}:", (f" {n}",), (f" {n}",)) for n in range(config.options.get("highest", 30))]
    return Task(config.name, prompts[6:], prompts[:3], prompts[3:6], reward=lambda prompts, texts: [len(t) for t in texts])

TASK = TaskDefinition(build, Options, raw_texts=lambda config, most: [f"count to {n}: {n}" for n in range(30)])
"""


def run(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["rlgf", *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    shown = capsys.readouterr()
    return int(stopped.value.code or 0), shown.out, shown.err


def test_own_data_is_validated_with_a_reward_that_sees_its_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [*ROWS, {**ROWS[0], "goal": 7}])
    (tmp_path / "counting_reward.py").write_text(REWARD)
    arguments = ["check", "task", "prompts", "--data", "rows.jsonl", "reward.path=python:counting_reward:reward"]
    code, out, _ = run([*arguments, "model.vocabulary=300"], monkeypatch, capsys)
    assert code == 0
    assert "targets, each a continuation of its prompt" in out
    assert "the reward is pure" in out
    assert "training prompts repeat an earlier one" in out


@pytest.mark.parametrize(
    ("reward", "words"),
    [("rouge1", "training prompts: 'rouge1' as a reward needs a reference to compare a completion with for every prompt, and"),
     ("concept_coverage", "'concept_coverage' as a reward needs concepts in column 'concepts' for every prompt, and")],
)  # fmt: skip
def test_a_metric_as_reward_needs_what_it_reads_of_every_prompt(
    reward: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [*ROWS[:-1], {**ROWS[-1], "completion": ""}])
    small = "pretrain.steps=0 sft.steps=1 model.layers=1 model.width=16 model.heads=2 model.vocabulary=300"
    for command in ("train", "check task"):
        arguments = [*command.split(), "prompts", "--data", "rows.jsonl", f"reward.path={reward}", *small.split()]
        code, out, err = run(arguments, monkeypatch, capsys)
        assert code == 2
        assert words in " ".join((out + err).split())
        assert not list(tmp_path.rglob("sft-*"))
    arguments = ["evaluate", "prompts", "--baseline", "sft", "--prompts", "1", *arguments[3:]]  # test prompts have references
    code, _, err = run(arguments, monkeypatch, capsys)
    assert (code == 0) == (reward == "rouge1"), err


def test_a_task_of_the_users_own_is_one_short_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counting_task.py").write_text(OWN)
    code, out, err = run(
        ["check", "task", "python:counting_task:TASK", "model.vocabulary=300", "reward.path=task"], monkeypatch, capsys
    )
    assert (code, "24 / 3 / 3 train, validation and test prompts" in out) == (0, True), err
    code, _, err = run(
        ["check", "task", "python:counting_task:TASK", "model.vocabulary=300", "task.options.mots=4"], monkeypatch, capsys
    )
    assert (code, "'task.options.mots': choose from: task.options.highest" in " ".join(err.split())) == (2, True), err
    with pytest.raises(INPUT_ERRORS, match=r"must be a rlgf\.tasks\.base\.TaskDefinition"):
        task_definition(TaskConfig("python:counting_task:build"))


def test_prompts_and_tldr_are_among_the_tasks():
    assert TASKS["prompts"] is prompts.TASK
    assert "tldr" in TASKS


def test_demonstrations_that_the_model_cannot_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [{"prompt": f"{number} " + "word " * 40, "completion": " yes"} for number in range(10)])
    small = "pretrain.steps=0 sft.steps=1 model.layers=1 model.width=16 model.heads=2 model.max_length=20 model.vocabulary=300"
    small += " task.max_new_tokens=4"
    code, _, err = run(["sft", "prompts", "--data", "rows.jsonl", "runtime.threads=1", *small.split()], monkeypatch, capsys)
    assert code == 2
    assert "demonstration 1: prompt and target have" in " ".join(err.split())
    assert "but the model's context is 20: shorten the prompts" in " ".join(err.split())
    assert not list((tmp_path / "runs").glob("prompts-sft*"))


def test_a_hub_dataset_is_read_with_its_splits_and_its_subset(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, **options: Any) -> Any:
        asked.append((path, options))
        parts = {"train": ROWS[:12], "validation": ROWS[12:16], "test": ROWS[16:]}
        return datasets.DatasetDict({split: datasets.Dataset.from_list([*map(dict, rows)]) for split, rows in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    task = prompts.build(TaskConfig("prompts", "someone/counting", options={"subset": "small"}), tokenizer)
    assert asked == [("someone/counting", {"name": "small"})]
    assert [prompt.columns["goal"] for prompt in task.test] == [16, 17, 18, 19]
    assert (len(task.train), len(task.validation)) == (12, 4)
    assert task.train[3].sft_targets == (" 3",)


def test_parts_of_a_split_in_parquet_files_are_read_as_a_hub_dataset_is(tmp_path: Path, tokenizer: Any):
    import pandas

    (tmp_path / "data").mkdir()
    for split, part, rows in (("train", 0, ROWS[:6]), ("train", 1, ROWS[6:12]), ("test", 0, ROWS[12:])):
        count = 2 if split == "train" else 1
        pandas.DataFrame(rows).to_parquet(tmp_path / "data" / f"{split}-{part:05}-of-{count:05}.parquet")
    task = task_of(tmp_path / "data", tokenizer)
    assert [prompt.columns["goal"] for prompt in task.train] == list(range(12))
    assert len(task.validation) + len(task.test) == 8


def test_what_a_template_opens_replies_with_is_known_of_every_prompt(tmp_path: Path, tokenizer: Any):
    opens = "{% if m.role == 'assistant' %}<think></think>{% endif %}"
    thinking = CHAT.replace("{{ m.content }}", opens + "{{ m.content }}")
    rows = [{"prompt": [said("user", f"ask {n}")], "completion": [said("assistant", f"say {n}")]} for n in range(20)]
    task = task_of(write(tmp_path / "rows.jsonl", rows), tokenizer, chat_template=thinking)
    for prompt in task.train:
        assert prompt.reply_prefix == "<think></think>"
        assert prompt.references[0].startswith("<think></think>say ")
        assert prompt.strip_reply_prefix(prompt.references[0]).startswith("say ")


TALKS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content or '' }}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def calling(number: int) -> dict[str, Any]:
    name = ("city", "zone")[number % 2]
    function = {"name": f"look_{name}", "arguments": {name: f"{number}"}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    target = {"role": "assistant", "content": "yes", "reasoning_content": "why"} if number % 2 else said("assistant", "no")
    tools = [{"name": function["name"], "parameters": {"properties": {name: {"type": "string"}}}}]
    return {"prompt": [said("user", f"{number}?"), call, said("tool", "rain")], "completion": [target], "tools": tools}


def test_rows_with_tools_and_thoughts_are_the_same_from_json_lines_and_parquet(tmp_path: Path, tokenizer: Any):
    import datasets

    rows = [calling(number) for number in range(8)]
    write(tmp_path / "rows.jsonl", rows)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    csv = "prompt,completion,tools\n"
    for row in rows:
        cells = [json.dumps(row[name]).replace('"', '""') for name in ("prompt", "completion", "tools")]
        csv += ",".join(f'"{cell}"' for cell in cells) + "\n"
    (tmp_path / "rows.csv").write_text(csv)
    found: list[list[Any]] = []
    for name in ("rows.jsonl", "rows.parquet", "rows.csv"):
        task = task_of(tmp_path / name, tokenizer, chat_template=TALKS)
        found.append(sorted((prompt.text, prompt.sft_targets) for prompt in all_prompts(task)))
    assert found[0] == found[1] == found[2]
    expected = (
        '[{"name": "look_zone", "parameters": {"properties": {"zone": {"type": "string"}}}}]'
        '<user>1?</><assistant>{"name": "look_zone", "arguments": {"zone": "1"}}</><tool>rain</><assistant>'
    )
    assert (expected, ("whyyes",)) in found[0]


def test_what_a_template_ignores_or_asks_for_is_said(tmp_path: Path, tokenizer: Any):
    rows = [{"prompt": [said("user", f"ask {n}")], "tools": [{"name": "look"}]} for n in range(8)]
    task = task_of(write(tmp_path / "rows.jsonl", rows), tokenizer, chat_template=CHAT + "{{ strftime_now('%Y') }}")
    assert task.warnings == {
        "conversations whose tools (column 'tools') the chat template ignores": 8,
        "conversations with the date 2024-07-26 in place of today's": 8,
    }
    assert all(prompt.text.endswith("<assistant>2024") for prompt in all_prompts(task))
    with pytest.raises(INPUT_ERRORS, match=r"rows\.jsonl, split train, line 1: 'tools' is .* must be a list of tools"):
        task_of(write(tmp_path / "rows.jsonl", [{**rows[0], "tools": "hammer"}]), tokenizer, chat_template=CHAT)


def test_thoughts_after_a_plain_prompt_are_refused(tmp_path: Path, tokenizer: Any):
    rows = [{"prompt": "ask", "completion": {"role": "assistant", "content": "a", "reasoning": "b"}}] * 8
    with pytest.raises(INPUT_ERRORS, match="line 1: a response with thoughts or tool calls of their own needs a prompt"):
        task_of(write(tmp_path / "rows.jsonl", rows), tokenizer)
