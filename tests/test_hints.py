"""Names of other tools lead to ours, and no hint leads to something else."""

import re

import pytest
from typer.testing import CliRunner

from helpers import in_turn
from rlgf.algorithms.registry import ALGORITHMS
from rlgf.cli.app import app
from rlgf.config.loading import all_keys, override
from rlgf.config.schema import Config
from rlgf.config.sections import PPOConfig
from rlgf.errors import ConfigError, unknown
from rlgf.hints import FLAGS, NAMES, NOTES, SYNONYMS, closest, known_as, normalize
from rlgf.tasks.prompts import Options

KEYS = set(all_keys(Config))
OPTIONS = [f"task.options.{name}" for name in vars(Options()) if not name.startswith("_")]


def hint(key: str) -> str:
    with pytest.raises(ConfigError) as caught:
        override(Config(), [(key, 1)])
    return str(caught.value).rpartition(f"'{key}': ")[2]


def test_every_synonym_leads_to_a_key_that_exists_and_to_one_alone() -> None:
    valid = {*KEYS, *OPTIONS, "--out"}
    assert set(SYNONYMS) <= valid
    assert set(FLAGS) <= set(SYNONYMS)
    assert {key for key, _ in NOTES} <= set(SYNONYMS)
    assert set(NAMES.values()) <= set(ALGORITHMS)
    typed = [name for names in SYNONYMS.values() for name in names]
    assert len(typed) == len(set(typed))
    assert all(name == normalize(name) for name in typed)


@in_turn(pair={f"{name} for {key}": (key, name) for key, names in SYNONYMS.items() for name in names})
def test_a_name_of_another_tool_is_answered_with_ours(pair: tuple[str, str]) -> None:
    key, typed = pair
    if typed in KEYS:
        return  # a section of its own name
    assert hint(typed).startswith(f"did you mean '{key}'")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("ppo.lr", "ppo.learning_rate"), ("critic.lr", "critic.learning_rate"), ("sft.lr", "sft.learning_rate"),
        ("guide.sft.lr", "guide.sft.learning_rate"), ("ppo.batch_size", "ppo.completions_per_iteration"),
        ("kl.beta", "kl.coefficient"), ("kl.coef", None), ("ppo.lambda", "ppo.gae_lambda"), ("ppo.lam", "ppo.gae_lambda"),
        ("guide.top_k", "guide.sampling.top_k"), ("ppo.kl", "kl.coefficient"), ("guide.model.lr", "guide.sft.learning_rate"),
        ("preferences.lr", "preferences.training.learning_rate"), ("judge.temperature", None), ("sft.beta", None),
        ("guide.temp", "guide.sampling.temperature"), ("evaluation.decoding.greedy", "evaluation.sampling.greedy"),
        ("ppo.zeta", None), ("ppo.gemma", "ppo.gamma"),
        ("reward.fn", None), ("seeds", "seed"), ("ppo.Learning-Rate", "ppo.learning_rate"),
    ],
)  # fmt: skip
def test_a_section_that_was_typed_stays_and_no_neighbor_is_wrong(typed: str, meant: str | None) -> None:
    found = re.match(r"did you mean '([^']+)'", hint(typed))
    assert (found[1] if found else None) == meant
    if meant is None:
        assert f"{typed.partition('.')[0]} has " in hint(typed)


def test_what_beta_means_here_and_there_is_said() -> None:
    assert hint("beta") == "did you mean 'kl.coefficient' (the weight of the KL penalty; --beta is how often the guide begins)?"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("ppo++", "ppo_pp"), ("PPO", "ppo"), ("PPO-PP", "ppo_pp"), ("AggreVaTe", "aggrevated"), ("D2-LOLS", "d2lols"),
     ("GRPO", "grpo"), ("dpo", None), ("RLOO", "rloo"), ("sac", None)],
)  # fmt: skip
def test_algorithms_are_known_by_their_names_elsewhere(name: str, meant: str | None) -> None:
    assert closest(name, ALGORITHMS) == meant
    assert ("choose from: " in str(unknown("algorithm", name, ALGORITHMS))) == (meant is None)


def test_a_field_in_python_is_answered_too() -> None:
    with pytest.raises(ConfigError, match="unknown field of PPOConfig 'lr': did you mean 'learning_rate'"):
        PPOConfig(lr=1)  # type: ignore[call-arg]
    assert known_as("--model") == "policy"


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--lr", "did you mean ppo.learning_rate=VALUE?"), ("--model", "did you mean --policy (as it is; --sft-from"),
        ("--epochs", "did you mean ppo.epochs=VALUE?"), ("--output_dir", "did you mean --out?"),
        ("--dataset", "did you mean --data?"), ("--num-generations", "did you mean ppo.samples_per_prompt=VALUE?"),
        ("--seeds", "did you mean --seed?"), ("--teacher", "did you mean --guide?"), ("--zzz", "No such option: --zzz"),
    ],
)  # fmt: skip
def test_an_option_of_another_tool_is_answered_with_ours(option: str, told: str) -> None:
    shown = " ".join(CliRunner().invoke(app, ["train", "prompts", option, "3"]).output.replace("│", " ").split())
    assert told in shown
    assert "Possible options" not in shown
