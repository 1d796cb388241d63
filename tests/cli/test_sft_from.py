"""A starting model of one's own: fine-tuned first or as it is, and what is said of either."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers import small
from rlgf.cli import app
from rlgf.cli.options import read_config
from rlgf.config.base import flatten, to_dict
from rlgf.config.loading import dump, override
from rlgf.config.objects import as_config, config_of_objects, given_keys
from rlgf.config.recipes import PRETRAINED, recipe
from rlgf.config.schema import Config
from rlgf.errors import ConfigError
from rlgf.models.loading import load_tokenizer
from rlgf.pipeline.resolve import resolve
from rlgf.reports.figures import tradeoff
from rlgf.reports.tables import table_rows


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows that have completions."""
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": f"good plot {number}", "completion": " great cast"} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_sft_from_names_the_model_that_is_fine_tuned() -> None:
    config = read_config("prompts", sft_from="gpt2")
    assert (config.policy, config.model.path) == (None, "gpt2")
    assert resolve(config).policy.has_sft
    assert not resolve(read_config("prompts", policy="gpt2")).policy.has_sft
    assert read_config("tldr", ["sft.epochs=1"], sft_from="gpt2").policy is None  # which the recipe gives
    with pytest.raises(ConfigError, match="give one of them"):
        read_config("prompts", policy="gpt2", sft_from="gpt2")
    with pytest.raises(ConfigError, match=r"sft\.steps and sft\.epochs are 0"):
        read_config("tldr", sft_from="gpt2")


def test_a_pretrained_model_takes_smaller_steps_than_one_from_scratch(tmp_path: Path) -> None:
    scratch, kept = recipe("prompts"), {"ppo.learning_rate": 2e-4}  # typed, even if it is the recipe's own
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: prompts\nppo: {learning_rate: 2.0e-4}\n")
    written = tmp_path / "config.yaml"  # as a run writes it: all keys are given
    written.write_text(dump(override(scratch, {"policy": "gpt2"})))
    cases: list[tuple[Config, dict[str, float]]] = [
        (read_config("prompts"), {key: value_of(scratch, key) for key in PRETRAINED}),
        (read_config("prompts", policy="gpt2"), {}),
        (read_config("prompts", sft_from="gpt2"), {}),
        (read_config("prompts", ["model.path=gpt2"]), {}),
        (read_config("prompts", ["ppo.learning_rate=2e-4"], policy="gpt2"), kept),
        (read_config(str(file), policy="gpt2"), kept),
        (read_config(str(written)), {key: value_of(scratch, key) for key in PRETRAINED}),
        (as_config({"recipe": "prompts", "policy": "gpt2", "ppo": {"learning_rate": 2e-4}}), kept),
        (of_call("prompts"), {}),
        (of_call({"recipe": "prompts", "ppo.learning_rate": 2e-4}), kept),
        (of_call(scratch), {key: value_of(scratch, key) for key in PRETRAINED}),  # a config is taken as it is
    ]
    for number, (config, others) in enumerate(cases):
        assert {key: value_of(config, key) for key in PRETRAINED} == {**PRETRAINED, **others}, number
    quickstart = read_config("quickstart", policy="gpt2")
    assert quickstart.ppo.learning_rate == recipe("quickstart").ppo.learning_rate


def value_of(config: Config, key: str) -> float:
    return flatten(to_dict(config))[key]


def of_call(config: Any) -> Config:
    """Return the config of `rlgf.train(config, model="gpt2")`."""
    return config_of_objects(
        Path("stages"), "gpt2", None, None, None, None, None, {}, base=as_config(config), base_keys=given_keys(config)
    )[0]


@pytest.mark.parametrize(
    ("option", "said", "unsaid"),
    [
        ("--policy", "as it is, and the 16 completions in the data are not learned: --sft-from", "fine-tuned on the data"),
        ("--sft-from", "fine-tuned on the data's completions", "are not learned"),
    ],
)
def test_a_dry_run_says_whether_the_completions_are_learned(
    option: str, said: str, unsaid: str, rows: Path, causal_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    (rows / "lengths.py").write_text("def length(prompts, texts):\n    return [float(len(text)) for text in texts]\n")
    reward = "reward.path=lengths.py:length"
    options = ["--data", "rows.jsonl", reward, option, str(causal_folder), "task.max_new_tokens=8"]
    monkeypatch.setattr("sys.argv", ["rlgf", "train", "prompts", "--dry-run", *options])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert not stopped.value.code
    shown = capsys.readouterr()
    text = " ".join(f"{shown.out} {shown.err}".split())
    assert said in text
    assert unsaid not in text


def test_a_folder_without_a_tokenizer_is_named_as_that(causal_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(causal_folder, folder)
    load_tokenizer(str(folder))
    for file in [*folder.glob("*token*"), *folder.glob("vocab*"), *folder.glob("merges*"), *folder.glob("manifest.json")]:
        file.unlink()
    with pytest.raises(ConfigError, match=r"holds no tokenizer files .*tokenizer\.save_pretrained\("):
        load_tokenizer(str(folder))


@pytest.mark.integration
def test_tables_and_figures_say_start_where_no_sft_happened() -> None:
    points = [{"score": 0.1, "kl": 0.5, "completions": 8}, {"score": 0.2, "kl": 1.0, "completions": 16}]
    rows: list[dict[str, Any]] = [
        {"key": "sft", "title": "start", "completions_used": 0, "metrics": {"score": [0.1], "kl": [0.0]}, "curves": []},
        {"key": "ppo", "title": "PPO", "completions_used": 16, "metrics": {"score": [0.2], "kl": [1.0]}, "curves": [points]},
    ]
    results = {"recipe": "mine", "seeds": [0], "rows": rows}
    assert table_rows(results)[0][2] == "KL to start"
    figure = tradeoff(results)
    assert figure is not None
    assert figure.axes[0].get_xlabel().startswith("KL to start")
    assert "dashes: start on test" in figure._suptitle.get_text()
    rows[0]["title"] = "SFT"
    assert table_rows(results)[0][2] == "KL to SFT"


def test_a_run_from_a_model_as_it_is_has_no_row_of_sft() -> None:
    assert not resolve(small(("policy", "somewhere"))).policy.has_sft
    assert resolve(small()).policy.has_sft
