"""`rlgf.train` with a model, prompts, a reward and a guide instead of a config."""

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlgf
from helpers import tiny_model
from rlgf.cli import app
from rlgf.config.loading import from_dict, read_yaml
from rlgf.config.objects import config_of_objects, source_hash
from rlgf.guides.base import Capabilities, Completion, CompletionRequest
from rlgf.models.language_model import LanguageModel
from rlgf.pipeline.preflight import check_to_train
from rlgf.pipeline.resolve import resolve
from rlgf.rewards.weighted_sum import sum_of_rewards
from rlgf.types import Prompt

PROMPTS = [f"review of : {noun} =>" for noun in (
    "plot", "cast", "story", "music", "script", "sound", "acting", "camera", "ending", "pacing", "humour", "dialogue",
)]  # fmt: skip
SMALL = {
    "task.max_new_tokens": 4, "ppo.iterations": 2, "ppo.completions_per_iteration": 4, "ppo.minibatch_size": 4,
    "evaluation.every": 0, "evaluation.final_prompts": 2, "runtime.trackers": [], "evaluation.baselines": [],
}  # fmt: skip


def length(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def praise(requests: Sequence[CompletionRequest]) -> list[str]:
    return [" superb" for _ in requests]


class Praiser:
    """A guide of one's own."""

    capabilities = Capabilities(can_continue=True)

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        return [Completion(" superb", finished=True) for _ in requests]


class Uncapable:
    """A guide that does not say what it can do."""

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        return []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """This file is a module that can be imported by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[length.__module__])
        yield


@pytest.fixture(scope="module")
def call(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The arguments of a call that was made."""
    arguments: dict[str, Any] = {
        "model": model, "prompts": PROMPTS, "reward": length, "guide": praise, "algorithm": rlgf.ppo_pp(beta=0.5),
        "out": tmp_path_factory.mktemp("objects") / "run", "settings": SMALL,
    }  # fmt: skip
    assert rlgf.train(**arguments).components.algorithm.name == "ppo_pp"
    return arguments


def config_in(folder: Path) -> Any:
    return read_yaml(folder / "config.yaml")


@pytest.mark.integration
def test_a_model_prompts_a_reward_and_a_guide_are_trained_with(call: dict[str, Any]) -> None:
    assert (call["out"] / "policy" / "config.json").is_file()
    written = config_in(call["out"])
    assert written["algorithm"]["options"]["ppo_pp"]["beta"] == 0.5
    assert written["reward"]["source"] == source_hash(length)
    assert written["guide"]["source"] == source_hash(praise)
    assert written["reward"]["path"].endswith(f"{length.__module__}:length")
    texts = [json.loads(line)["prompt"] for line in Path(written["task"]["data"]).read_text().splitlines()]
    assert texts == PROMPTS


@pytest.mark.integration
def test_the_same_call_reuses_the_run_and_another_is_refused(call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert rlgf.train(**call).iteration == 2
    with pytest.raises(rlgf.ConfigError, match=r"another run \(ppo.epochs"):
        rlgf.train(**{**call, "settings": {**SMALL, "ppo.epochs": 3}})
    monkeypatch.setattr("rlgf.config.objects.source_hash", lambda function: "another")
    with pytest.raises(rlgf.ConfigError, match=r"another run \(reward\.source"):
        rlgf.train(**call)


@pytest.mark.integration
def test_a_lambda_a_guide_object_and_a_loaded_model_are_resumed_by_the_same_call_alone(tmp_path: Path) -> None:
    lines = list[str]()

    def train(loaded: LanguageModel) -> rlgf.Trainer:
        return rlgf.train(
            model=loaded.model, tokenizer=loaded.tokenizer, prompts=PROMPTS, guide=Praiser(), algorithm="aggrevated",
            reward=lambda prompts, texts: [1.0] * len(texts), settings={**SMALL, "critic.kind": "value_head"},
            out=tmp_path / "run", report=lines.append,
        )  # fmt: skip

    loaded = tiny_model()
    assert train(loaded).components.models.policy.model is not loaded.model  # a copy is trained
    assert not any("resumed" in line for line in lines)
    written = config_in(tmp_path / "run")
    assert written["reward"]["path"].startswith("passed:")
    assert written["reward"]["source"] is None
    assert written["guide"]["spec"].startswith("passed:")
    config = from_dict(written, "config.yaml")
    with pytest.raises(rlgf.ConfigError, match=r"reward.path is 'passed:.*resume with the same call"):
        check_to_train(resolve(config))
    train(tiny_model())
    for name in ("reward", "guide"):
        assert any(f"its {name} has no source to compare" in line for line in lines)


@pytest.mark.integration
@pytest.mark.usefixtures("drawn_report")
def test_a_run_from_python_leaves_its_curve_and_says_what_came_of_it(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, settings = tmp_path / "run", {**SMALL, "evaluation.baselines": ["sft"]}
    rlgf.train(model=model, prompts=PROMPTS, reward=length, out=out, settings=settings)
    shown = capsys.readouterr().err
    assert re.search(r"^reward on \d test prompts: start [\d.]+ \[.*\] → PPO [\d.]+ \[.*\] \(95 % intervals\)$", shown, re.M)
    assert "test prompts are few" in shown
    assert f"{out}: policy/, results.json, metrics.jsonl, table.md, texts.md, curves.png" in shown
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    (out / "curves.png").unlink()
    monkeypatch.setattr("sys.argv", ["rlgf", "report", str(out)])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert not stopped.value.code
    assert (out / "curves.png").is_file()


def test_a_recorded_function_that_changed_is_refused_from_the_file_too(model: str, tmp_path: Path) -> None:
    config, passed = config_of_objects(tmp_path, model, None, PROMPTS, "python:json:dumps", None, None, {})
    passed.write_files()
    changed = rlgf.override(config, [("reward.source", "other")])
    with pytest.raises(rlgf.ConfigError, match="the source of reward 'python:json:dumps' has changed"):
        rlgf.prepare(changed, tmp_path / "stages")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "needs model, prompts and reward; model is missing"),
        ({"prompts": None, "reward": None}, "prompts, reward is missing"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": "one"}, "at least one prompt"),
        ({"prompts": [3]}, "prompt 1 is a int"),
        ({"prompts": [{"text": "x"}]}, "prompt 1 has no key 'prompt'"),
        ({"prompts": [{"prompt": "x", "n": {1, 2}}]}, "cannot be written as JSON"),
        ({"model": 3}, "model is a int"),
        ({"tokenizer": 3}, "tokenizer= belongs to a loaded model"),
        ({"reward": 3}, "reward is a int"),
        ({"algorithm": rlgf.lols()}, "lols needs a guide"),
        ({"algorithm": rlgf.ppo(), "guide": praise}, "ppo uses no guide"),
        ({"guide": Uncapable()}, "has no capabilities"),
        ({"settings": {"reward.weights": {"task": 1.0}}}, "settings has reward.weights"),
        ({"settings": {"guide.spec": "references"}}, "settings has guide.spec"),
        ({"prompts": [Prompt("x", sft_targets=("y",))]}, "prompt 1 has sft_targets"),
        ({"config": 3}, "config is a int"),
        ({"config": "quikstart"}, "did you mean 'quickstart'"),
        ({"algorithm": "grpoo"}, "unknown algorithm 'grpoo'"),
        ({"algorithm": 3}, "unknown algorithm 'int'"),
        ({"settings": {"ppo.epoch": 3}}, "unknown key 'ppo.epoch': did you mean 'ppo.epochs'"),
        ({"out": None}, "give out="),
        ({"out": 3}, "out is 3, but must be a path"),
        ({"stages": ["a"]}, "stages is .*, but must be a path"),
        ({"settings": [1]}, "settings is .*, but must be a dict whose keys are text"),
        ({"settings": {1: 2}}, "settings is .*, but must be a dict whose keys are text"),
        ({"identity": ""}, "identity is .*, but must be text that is not empty"),
        ({"identity": math.nan}, "identity is nan, but must be text that is not empty"),
        ({"accept_changes": "no"}, "accept_changes is 'no', but must be true or false"),
        ({"progress": 3}, "progress is 3, but must be true or false"),
        ({"on_progress": 3}, "on_progress is 3, but must be a function"),
    ],
)
def test_what_cannot_be_trained_with_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    call: dict[str, Any] = {"model": "there", "prompts": PROMPTS, "reward": length, "out": tmp_path / "run", **change}
    with pytest.raises(rlgf.ConfigError, match=message):
        rlgf.train(**call)
    assert not (tmp_path / "run").exists()


def test_a_changed_tokenizer_makes_another_model_and_nothing_is_written_before_the_checks(tmp_path: Path) -> None:
    loaded = tiny_model()
    paths: list[str | None] = []
    for template in ("{{ 1 }}", "{{ 2 }}"):
        loaded.tokenizer.chat_template = template
        config, passed = config_of_objects(tmp_path / "stages", loaded.model, loaded.tokenizer, PROMPTS, length, None, None, {})
        paths.append(config.policy)
        assert not any(file.path.exists() for file in passed.files)
    assert paths[0] != paths[1]


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(rlgf.ConfigError, match="unknown baseline 'zeroshot'"):
        rlgf.evaluate(rlgf.Config(), baseline="zeroshot")  # type: ignore[arg-type]


def test_prompts_may_be_conversations_rows_and_prompt_objects(tmp_path: Path) -> None:
    prompts = [
        "text", [{"role": "user", "content": "hello"}], {"prompt": "row", "references": ["r"], "answer": 4},
        Prompt("object", references=("a",), columns={"answer": 5}),
    ]  # fmt: skip
    config, passed = config_of_objects(tmp_path, "there", None, prompts, length, None, None, {})
    passed.write_files()
    rows = [json.loads(line) for line in Path(str(config.task.data)).read_text().splitlines()]
    assert rows == [
        {"prompt": "text"}, {"prompt": [{"role": "user", "content": "hello"}]},
        {"prompt": "row", "references": ["r"], "answer": 4}, {"answer": 5, "prompt": "object", "references": ["a"]},
    ]  # fmt: skip
    assert yaml.safe_load(f"data: {config.task.data}")["data"] == config.task.data


def test_a_config_and_objects_go_together_and_dicts_are_configs(model: str, tmp_path: Path) -> None:
    settings = {**SMALL, "policy": model, "evaluation.output_perplexity": False}
    nested = {
        "recipe": "quickstart",
        "ppo": {"iterations": 1},
        "task.options": {"slots": 2, "train_prompts": 8, "held_out_prompts": 4},
        "task.min_new_tokens": 0,
    }
    trainer = rlgf.train(
        {**nested, **{key: value for key, value in settings.items() if key != "ppo.iterations"}},
        tmp_path / "run", reward=length, guide=praise, algorithm="ppo_pp",
    )  # fmt: skip
    config = trainer.config
    assert (config.ppo.iterations, config.task.name, trainer.components.algorithm.name) == (1, "toy_reviews", "ppo_pp")
    assert trainer.components.reward([Prompt("a")], ["four"]) == [4.0]


def test_override_takes_dicts_sections_and_functions() -> None:
    config = rlgf.override(
        rlgf.Config(),
        {"ppo": {"epochs": 7, "gamma": 0.5}, "seed": 3, "sampling": rlgf.SamplingParams(top_p=0.9), "reward.path": length},
    )  # fmt: skip
    assert (config.ppo.epochs, config.ppo.gamma, config.seed, config.sampling.top_p) == (7, 0.5, 3, 0.9)
    assert config.reward.path == f"python:{__name__}:length"
    with pytest.raises(rlgf.ConfigError, match=r"cannot be imported by its name: pass it to rlgf\.train"):
        rlgf.override(rlgf.Config(), {"reward.path": lambda prompts, texts: []})
    with pytest.raises(rlgf.ConfigError, match=r"did you mean 'ppo\.learning_rate'"):
        rlgf.override(rlgf.Config(), {"ppo": {"lr": 1}})


@pytest.mark.integration
def test_prompts_are_any_rows_and_rewards_any_number(model: str, tmp_path: Path) -> None:
    import datasets

    def half(completions: Sequence[str], **columns: Any) -> list[float]:
        return [0.5] * len(completions)

    rows = [{"prompt": text, "number": number} for number, text in enumerate(PROMPTS)]

    class Table:
        columns = ("prompt", "number")

        def to_dict(self, orient: str) -> list[dict[str, Any]]:
            return rows

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: list[str] = []
    for prompts in (rows, datasets.Dataset.from_list(rows), iter(rows), Table(), {"train": rows}):
        config, passed = config_of_objects(tmp_path, model, None, prompts, length, None, None, {})
        found.append(str(config.task.data))
        assert len(passed.files) == 1
    assert len(set(found)) == 1
    config, passed = config_of_objects(tmp_path, model, None, str(tmp_path / "rows.jsonl"), length, None, None, {})
    assert (config.task.data, passed.files) == (str(tmp_path / "rows.jsonl"), ())
    total = sum_of_rewards([length, half])
    assert total([Prompt("a")], ["four"]) == [4.5]
    assert sum_of_rewards({length: 2, half: 1.0})([Prompt("a")], ["four"]) == [8.5]
    assert sum_of_rewards([length]) is length
    with pytest.raises(rlgf.ConfigError, match=r"settings=\{'reward\.weights'"):
        sum_of_rewards([length, "rouge1"])


def test_a_loaded_model_is_a_guide(tmp_path: Path) -> None:
    guide = tiny_model(seed=3)
    config, passed = config_of_objects(tmp_path, "somewhere", guide.tokenizer, PROMPTS, length, guide.model, None, {})
    assert config.guide.spec.startswith(f"model:{tmp_path}/model-")
    assert config.policy == "somewhere"
    assert passed.guide is None
    assert len(passed.files) == 2


@pytest.mark.integration
def test_progress_is_shown_unless_it_is_not_wanted(
    call: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rlgf.train(**{**call, "out": tmp_path / "shown"})
    shown = capsys.readouterr().err
    assert "PPO++ on prompts, seed 0: cpu, fp32, 1 thread" in shown
    assert "2/2 iterations · reward" in shown
    rlgf.train(**{**call, "out": tmp_path / "silent"}, progress=False)
    assert capsys.readouterr().err == ""


def test_the_public_names_are_listed() -> None:
    assert dir(rlgf) == sorted(rlgf.__all__)
