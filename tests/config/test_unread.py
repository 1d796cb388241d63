"""Settings without effect: which are found, who is told, and what reads them."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from helpers import FEW_PROMPTS
from rlgf.algorithms.registry import ALGORITHMS
from rlgf.cli import app
from rlgf.cli.options import read_typed_config
from rlgf.config.base import flatten
from rlgf.config.loading import FREE_FORM_SECTIONS, all_keys, dump, override
from rlgf.config.objects import config_of_objects
from rlgf.config.recipes import RECIPES, recipe
from rlgf.config.schema import Config
from rlgf.config.unread import (
    CONDITIONS,
    TypedSetting,
    describe_unread,
    require_read,
    require_read_by_stage,
    require_read_in_comparison,
    typed_setting,
    unmet_condition,
)
from rlgf.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
Changes = dict[str, Any]
GUIDED: Changes = {"algorithm.name": "ppo_pp"}
GROUPED: Changes = {"algorithm.name": "grpo", "ppo.samples_per_prompt": 4}
TRAINED: Changes = {**GUIDED, "guide.spec": "trained"}
SERVER: Changes = {**GUIDED, "guide.spec": "server:m@http://h/v1"}

TRAINED_IN: dict[str, Changes] = {
    "pretrain": {}, "sft": {}, "distill": {"distill.num_completions": 8}, "guide.sft": TRAINED,
    "preferences.training": {"reward.path": "preferences"},
}  # fmt: skip

# a key; changes under which nothing reads it; changes under which something does
CASES: list[tuple[str, Changes, Changes]] = [
    ("critic.value_coefficient", {}, {"critic.kind": "value_head"}),
    ("critic.value_coefficient", {"critic.kind": "lora", "lora.rank": 2}, {"critic.kind": "value_head"}),
    ("critic.learning_rate", {"critic.kind": "value_head"}, {}),
    ("critic.warm_start_from_guide", GUIDED, {"algorithm.name": "d2lols"}),
    ("critic.learning_rate", GROUPED, {}),
    ("ppo.gae_lambda", GROUPED, {}),
    ("ppo.whiten_advantages", GROUPED, {}),
    ("ppo.dual_clip", {"ppo.surrogate": "cispo"}, {}),
    ("ppo.clip_range", {"ppo.surrogate": "cispo", "ppo.clip_range_high": 4.0}, {"ppo.surrogate": "cispo"}),
    ("kl.target", {}, {"kl.controller": "adaptive"}),
    ("kl.horizon", {}, {"kl.controller": "adaptive"}),
    ("kl.loss_estimator", {}, {"kl.loss_coefficient": 0.1}),
    ("ppo.mle_batch", {}, {"ppo.mle_coefficient": 0.1}),
    ("guide.spec", {}, GUIDED),
    ("guide.spec", {}, {"distill.num_completions": 8}),
    ("guide.model.layers", GUIDED, TRAINED),
    ("guide.model.layers", {**TRAINED, "guide.model.path": "there"}, TRAINED),
    ("guide.sft.steps", GUIDED, TRAINED),
    ("guide.options.slots", GUIDED, TRAINED),
    ("guide.sampling.top_k", {**GUIDED, "guide.spec": "human"}, GUIDED),
    ("guide.sampling.top_k", {**GUIDED, "guide.sampling.greedy": True}, SERVER),
    ("guide.stop", GUIDED, SERVER),
    ("guide.endpoint.retries", GUIDED, SERVER),
    ("guide.endpoint.cache", GUIDED, {**GUIDED, "guide.spec": "human"}),
    ("guide.prefetch", {**SERVER, "algorithm.name": "aggrevated"}, SERVER),
    ("guide.tokens_per_policy_token", {**SERVER, "guide.continuation": "token_ids"}, SERVER),
    ("distill.steps", {}, {"distill.num_completions": 8, "distill.steps": 2}),
    ("sft.steps", {"policy": "there"}, {}),
    ("sft.seed", {"policy": "there"}, {}),
    ("pretrain.steps", {"model.path": "there"}, {}),
    ("pretrain.steps", {"policy": "there"}, {"policy": "there", **TRAINED}),
    ("model.width", {"policy": "there"}, {}),
    ("model.path", {"policy": "there", "evaluation.output_perplexity": False, "evaluation.baselines": []}, {}),
    ("evaluation.output_perplexity", {"policy": "there"}, {"policy": "there", "model.path": "base"}),
    ("reward.path", {"reward.weights": {"task": 1.0}}, {}),
    ("reward.epochs", {}, {"reward.path": "ngram"}),
    ("reward.seed", {}, {"reward.weights": {"ngram": 0.5}}),
    ("preferences.min_words", {}, {"reward.path": "preferences"}),
    ("preferences.min_words", {"judge.spec": "model:there"}, {"judge.spec": "preferences"}),
    ("preferences.lora.alpha", {"reward.path": "preferences"}, {"reward.path": "preferences", "preferences.lora.rank": 2}),
    ("judge.order", {}, {"judge.spec": "server:m@http://h/v1"}),
    ("judge.endpoint.retries", {"judge.spec": "preferences"}, {"judge.spec": "server:m@http://h/v1"}),
    ("lora.alpha", {}, {"lora.rank": 2}),
    ("lora.dropout", {"lora.rank": 2}, {"lora.rank": 2, "lora.in_sft": True}),
    ("lora.in_sft", {"lora.rank": 2, "policy": "there"}, {"lora.rank": 2}),
    ("evaluation.prompts", {}, {"evaluation.every": 1}),
    ("evaluation.metric_options.stem", {}, {"evaluation.metrics": ["rouge1"]}),
    ("evaluation.also_sampled", {}, {"evaluation.sampling.greedy": True}),
    ("evaluation.sampling.top_k", {"evaluation.sampling.greedy": True}, {"evaluation.sampling.top_k": 3}),
    *(
        (f"algorithm.options.{name}.{option}", {"algorithm.name": other}, {"algorithm.name": name})
        for name, option, other in (
            ("ppo_pp", "beta", "ppo"),
            ("aggrevated", "credit", "d2lols"),
            ("lols", "mix", "ppo_pp"),
            ("d2lols", "switch_iteration", "lols"),
        )
    ),
    ("algorithm.options.grpo.normalize", {}, GROUPED),
    ("algorithm.options.guided_grpo.beta", GROUPED, {**GROUPED, "algorithm.name": "guided_grpo"}),
    ("algorithm.options.rloo.none", GROUPED, {**GROUPED, "algorithm.name": "rloo"}),
    *(
        case
        for section, needed in TRAINED_IN.items()
        for case in (
            (
                f"{section}.epochs",
                {**needed, f"{section}.steps": 2, f"{section}.epochs": 1.0},
                {**needed, f"{section}.epochs": 1.0},
            ),
            (f"{section}.learning_rate", {**needed, f"{section}.epochs": 0.0}, {**needed, f"{section}.steps": 2}),
        )
    ),
]


BEYOND: dict[str, tuple[Any, Changes, str]] = {
    "critic.warmup_iterations": (3, {"ppo.iterations": 3}, "leaves no iteration to the policy, as ppo.iterations is 3"),
    "ppo.minibatch_size": (64, {"ppo.completions_per_iteration": 32}, "is more than there is, as ppo.completions"),
    "sft.warmup_steps": (5, {"sft.steps": 5}, "takes the whole training, as sft.steps is 5"),
    "guide.sft.warmup_steps": (6, {**TRAINED, "guide.sft.steps": 5}, "takes the whole training, as guide.sft.steps is 5"),
    "task.options.subset": ("a", {"task.data": __file__}, "has no effect, as task.data is a file, which has none"),
}


@pytest.mark.parametrize("key", BEYOND)
def test_a_typed_setting_beyond_another_is_refused(key: str) -> None:
    value, changes, message = BEYOND[key]
    beyond = changed({**changes, key: value})
    with pytest.raises(ConfigError, match=f"^command line: {key} {message}.*: (set|give) .+, or leave out {key}\\.$"):
        require_read([TypedSetting(key, (key,))], [beyond])
    require_read([TypedSetting(name, (name,)) for name in changes if name != "task.data"], [beyond])
    fitting = {key: value - 2} if isinstance(value, int) and value < 64 else {key: 32} if value == 64 else {"task.data": "a/b"}
    require_read([TypedSetting(key, (key,))], [changed({**changes, key: value, **fitting})])


ON: Changes = {  # fields that are off by default; what is off is no mistake
    "critic.warm_start_from_guide": True, "evaluation.also_sampled": True, "guide.endpoint.cache": "there",
    "lora.in_sft": True, "model.path": "there", "ppo.mle_batch": 4, "sft.seed": 3, "guide.sft.steps": 2,
    "distill.steps": 2, "sft.steps": 2, "pretrain.steps": 2, "reward.seed": 3, "lora.dropout": 0.1,
    "evaluation.sampling.top_k": 5, "ppo.dual_clip": 3.0,
}  # fmt: skip


def changed(changes: Changes) -> Config:
    return override(Config(), [*changes.items()])


@pytest.mark.parametrize(("key", "without", "reading"), CASES)
def test_a_setting_is_read_under_its_condition_alone(key: str, without: Changes, reading: Changes) -> None:
    typed, on = [TypedSetting(key, (key,))], {key: ON[key]} if key in ON else {}
    with pytest.raises(ConfigError, match=f"^command line: {key} has no effect, as .+: .+, or leave out {key}\\.$") as caught:
        require_read(typed, [changed({**on, **without})])
    assert len(str(caught.value)) < 300
    require_read(typed, [changed({**on, **reading})])


def test_every_condition_is_about_fields_that_exist() -> None:
    keys = {*all_keys(Config), *flatten(Config().algorithm.options, "algorithm.options."), "task.options.subset"}
    sections = tuple(f"algorithm.options.{name}" for name in ALGORITHMS)
    for condition in CONDITIONS:
        for field in (*condition.fields, *condition.besides):
            known = field.removesuffix(".*") in (*keys, *FREE_FORM_SECTIONS, *sections, "evaluation.sampling")
            assert known or field.startswith("evaluation.sampling.") or field.endswith(".num_completions"), field


def test_every_condition_is_met_by_some_config_and_not_by_another() -> None:
    configs = [changed(changes) for _, *both in CASES for changes in both]
    configs += [changed({**changes, key: value}) for key, (value, changes, _) in BEYOND.items()]
    configs += [changed({**on, f"{name}.steps": 2, f"{name}.warmup_steps": 2}) for name, on in TRAINED_IN.items()]
    for condition in CONDITIONS:
        never = condition.fields == ("guide.model.vocabulary",)
        found = {condition.is_met(config) for config in configs}
        assert found == ({False} if never else {True, False}), condition.fields


def test_switching_something_off_is_no_mistake() -> None:
    for key in ("critic.warm_start_from_guide", "evaluation.also_sampled", "preferences.data", "distill.steps", "lora.dropout"):
        require_read(typed_setting(key, None), [Config()])
    require_read([TypedSetting("sft.epochs", ("sft.epochs",))], [changed({"sft.steps": 2, "sft.epochs": 0.0})])


def test_a_section_given_as_a_whole_is_its_fields() -> None:
    assert [setting.name for setting in typed_setting("kl", {"coefficient": 0.1, "target": 2})] == [
        "kl.coefficient",
        "kl.target",
    ]
    with pytest.raises(ConfigError, match=r"kl\.target has no effect"):
        require_read(typed_setting("kl", {"coefficient": 0.1, "target": 2}), [Config()])


# recipes, files, flags


def test_a_recipes_own_settings_are_no_mistake_and_are_listed() -> None:
    for name in RECIPES:
        for algorithm in ALGORITHMS:
            groups = ["ppo.samples_per_prompt=2"] if ALGORITHMS[algorithm]().build().baseline else []
            given = read_typed_config(name, groups, algorithm=algorithm)
            require_read(given.typed, [given.config])
    lines = describe_unread(recipe("tldr"))
    assert "critic.value_coefficient, as critic.kind is 'lora'" in lines
    assert "lora.dropout, as lora.in_sft and ppo.dropout are off" in lines
    assert not any("evaluation.sampling" in line for line in lines)  # defaults were not chosen by anyone
    assert describe_unread(override(Config(), [("algorithm.name", "lols")])) == []


def test_what_is_typed_over_a_recipe_must_be_read() -> None:
    def check(*arguments: Any, **flags: Any) -> None:
        given = read_typed_config(*arguments, **flags)
        require_read(given.typed, [given.config])

    with pytest.raises(
        ConfigError, match=r"critic\.value_coefficient has no effect, as critic\.kind is 'lora': set critic\.kind=v"
    ):
        check("tldr", ["critic.value_coefficient=0.2"])  # even the recipe's own value
    with pytest.raises(ConfigError, match=r"reward\.path has no effect, as reward\.weights replaces it"):
        check("commongen", ["reward.path=spider"])
    with pytest.raises(ConfigError, match=r"--beta has no effect, as algorithm\.name is 'ppo'"):
        check("quickstart", beta=0.5)
    with pytest.raises(ConfigError, match=r"guide\.spec has no effect, as PPO queries no guide"):
        check("quickstart", guide="references")
    check("quickstart", beta=0.5, algorithm="ppo_pp", guide="references")
    check("quickstart", alpha=0.5, algorithm="lols")


def test_what_a_file_changes_must_be_read_and_what_a_run_wrote_need_not(tmp_path: Path) -> None:
    def check(text: str) -> None:
        (tmp_path / "mine.yaml").write_text(text)
        given = read_typed_config(str(tmp_path / "mine.yaml"))
        require_read(given.typed, [given.config])

    for recipe_line in ("recipe: quickstart\n", ""):
        with pytest.raises(ConfigError, match=r"mine\.yaml: kl\.target has no effect, as kl\.controller is fixed"):
            check(recipe_line + "kl: {target: 2}\n")
        check(recipe_line + "kl: {target: 2, controller: adaptive}\n")
        check(recipe_line + "kl: {target: 6.0}\n")  # as it was
        check(recipe_line + "algorithm: {name: lols, options: {ppo_pp: {beta: 0.5}}}\n")  # for several commands
    check(dump(override(recipe("quickstart"), [("kl.target", 2.0)])))


def test_a_row_that_reads_a_setting_is_enough_in_a_comparison() -> None:
    config = recipe("quickstart")
    rows = [override(config, [("algorithm.name", name)]) for name in ("ppo", "lols")]

    def check(*keys: str, over: Config = config, of: list[Config] = rows) -> None:
        require_read_in_comparison([TypedSetting(key, (key,)) for key in keys], over, of)

    check("algorithm.options.lols.mix", "guide.spec", "kl.coefficient")
    with pytest.raises(ConfigError, match=r"algorithm\.options\.d2lols\.switch_iteration has no effect"):
        check("algorithm.options.d2lols.switch_iteration")
    check("guide.spec", of=rows[:1])  # a baseline has the guide
    without = override(config, [("evaluation.baselines", ["sft"])])
    with pytest.raises(ConfigError, match="PPO queries no guide"):
        check("guide.spec", over=without, of=[override(without, [("algorithm.name", "ppo")])])
    for key, option in {"seed": "--seeds", "algorithm.name": "--algorithms"}.items():
        with pytest.raises(ConfigError, match=f"{key} has no effect on a comparison: give {option}"):
            check(key)


def test_settings_of_a_call_must_be_read(tmp_path: Path) -> None:
    def call(settings: Changes) -> None:
        config_of_objects(tmp_path, "there", None, ["a prompt"], "task", None, None, settings)

    call({"kl.target": 2.0, "kl.controller": "adaptive"})
    with pytest.raises(ConfigError, match=r"^settings: kl\.target has no effect"):
        call({"kl.target": 2.0})
    with pytest.raises(ConfigError, match=r"^settings: sft\.steps has no effect, as policy names a model"):
        call({"sft.steps": 2})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "quickstart", "kl.target=2"], "kl.target has no effect, as kl.controller is fixed"),
        (["train", "quickstart", "kl.target=2", "--dry-run"], "kl.target has no effect, as kl.controller is fixed"),
        (["compare", "quickstart", "seed=3"], "seed has no effect on a comparison: give --seeds"),
        (["compare", "quickstart", "--vary", "kl.target=1,2"], "--vary: kl.target has no effect, as kl.controller is fixed"),
    ],
)
def test_the_commands_refuse_what_nothing_reads(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["rlgf", *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_dry_run_lists_the_recipes_settings_that_are_not_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv",
        ["rlgf", "train", "quickstart", "--dry-run", *FEW_PROMPTS],
    )
    with pytest.raises(SystemExit):
        app.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  not read")]
    assert any("guide.spec" in line and line.endswith("as PPO queries no guide") for line in lines)
    assert any("algorithm.options.d2lols.switch_iteration" in line for line in lines)


def test_the_first_condition_that_fails_is_the_one_that_is_told() -> None:
    condition = unmet_condition(changed({"policy": "there", "sft.steps": 2}), "sft.epochs")
    assert condition is not None
    assert condition.fix == "name it with --sft-from (model.path) instead"
    assert unmet_condition(Config(), "ppo.epochs") is None


@pytest.mark.parametrize("setting", ["ppo.epochs=2", "guide.spec=trained", "kl.coefficient=.1", "algorithm.name=lols"])
def test_a_stage_refuses_settings_of_training_on_its_command_line(setting: str, tmp_path: Path) -> None:
    key = setting.partition("=")[0]
    given = read_typed_config("quickstart", [setting, "sft.steps=2"])
    with pytest.raises(ConfigError, match=rf"command line: {re.escape(key)} has no effect on `rlgf sft`"):
        require_read_by_stage(given.typed, "sft")
    require_read_by_stage(read_typed_config("quickstart", ["sft.steps=2", "runtime.threads=1"]).typed, "sft")
    (tmp_path / "mine.yaml").write_text("recipe: quickstart\nppo:\n  epochs: 2\n")
    require_read_by_stage(read_typed_config(str(tmp_path / "mine.yaml")).typed, "sft")


DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "Makefile", *sorted((REPOSITORY / "docs").rglob("*.md"))]
TYPES = {"iterations": int, "seed": int, "beta": float, "alpha": float}


def commands() -> list[tuple[str, list[str]]]:
    """Every `rlgf train` and `rlgf compare` of a recipe in the documents, with its arguments."""
    found: list[tuple[str, list[str]]] = []
    for path in DOCUMENTS:
        for command, rest in re.findall(r"rlgf\)? (train|compare) ([^`#\n]+)", path.read_text().replace("\\\n", " ")):
            words = rest.split()
            if words[0] in RECIPES and "$(" not in rest.replace("$(DATA)", ""):
                found.append((command, words))
    return found


def test_the_documents_type_nothing_that_is_not_read() -> None:
    seen = commands()
    assert len(seen) > 15
    for command, words in seen:
        flags = {word.lstrip("-"): value for word, value in zip(words, [*words[1:], ""]) if word.startswith("--")}
        known = {"algorithm", "guide", "policy", "data", "iterations", "seed", "beta", "alpha"} & flags.keys()
        overrides = [word for before, word in pairwise(words) if "=" in word and before.lstrip("-") not in flags]
        given = read_typed_config(words[0], overrides, **{name: TYPES.get(name, str)(flags[name]) for name in known})
        rows = [given.config]
        if command == "compare":
            names = (
                flags["algorithms"].split(",") if "algorithms" in flags else ["ppo", "ppo_pp", "aggrevated", "lols", "d2lols"]
            )
            rows = [override(given.config, [("algorithm.name", name)]) for name in names]
        require_read(given.typed, rows)
