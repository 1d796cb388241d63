"""Configs: errors and their messages, and a round trip through YAML."""

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hostile import PRINTABLE, is_clean
from rlgf.algorithms import base, guided
from rlgf.algorithms.base import Algorithm
from rlgf.algorithms.registry import ALGORITHMS
from rlgf.algorithms.switch_position import Phase
from rlgf.cli.options import read_config
from rlgf.config.base import to_dict
from rlgf.config.loading import all_keys, dump, from_dict, override, parse_assignment, read_yaml
from rlgf.config.recipes import recipe
from rlgf.config.schema import Config
from rlgf.config.sections import AlgorithmConfig, EndpointConfig, GuideConfig, PPOConfig, TaskConfig
from rlgf.errors import ConfigError
from rlgf.types import GUIDE, POLICY, SamplingParams

NAN = float("nan")


def overridden(*assignments: str) -> Config:
    return override(Config(), [parse_assignment(text) for text in assignments])


# keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("ppo.epoch", "ppo.epochs"),
        ("ppo.learnig_rate", "ppo.learning_rate"),
        ("epochs", "ppo.epochs|reward.epochs|pretrain.epochs|sft.epochs|distill.epochs|guide.sft.epochs"),
        ("algoritm.name", "algorithm.name"),
        ("kl.coeficient", "kl.coefficient"),
        ("sampling.topk", "sampling.top_k"),
        ("guide.sampling.top-p", "guide.sampling.top_p"),
        ("target_kl", "ppo.target_kl"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"override: unknown key '{key}': did you mean '({nearest})'"):
        override(Config(), [(key, 1)])


@pytest.mark.parametrize("section", ["guide", "judge"])
def test_a_key_of_a_connection_without_its_section_is_answered_with_it(section: str) -> None:
    for field in dataclasses.fields(EndpointConfig):
        key, nearest = f"{section}.{field.name}", f"{section}.endpoint.{field.name}"
        with pytest.raises(ConfigError, match=f"a.yaml: unknown key '{key}': did you mean '{nearest}'"):
            from_dict({section: {field.name: 1}}, "a.yaml")


def test_a_key_like_no_other_is_answered_with_where_to_look() -> None:
    with pytest.raises(ConfigError, match="`rlgf show config` lists every key"):
        override(Config(), [("qqqqqqqq", 1)])


def test_unknown_keys_in_a_file_are_named_with_the_file_at_every_depth() -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml: unknown key 'pppo': did you mean 'ppo'"):
        from_dict({"pppo": {}}, "a.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml: unknown key 'ppo\.epoch': did you mean 'ppo\.epochs'"):
        from_dict({"ppo": {"epoch": 1}}, "a.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml: unknown key 'guide\.sampling\.topk'"):
        from_dict({"guide": {"sampling": {"topk": 1}}}, "a.yaml")


def test_unknown_keys_of_an_optional_section_are_refused_too() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.sampling\.topk"):
        from_dict({"evaluation": {"sampling": {"topk": 1}}}, "a.yaml")
    with pytest.raises(ConfigError, match=r"evaluation\.sampling\.topk"):
        overridden("evaluation.sampling.topk=1")


def test_all_keys_lists_sections_and_leaves() -> None:
    keys = all_keys(Config)
    assert {"seed", "ppo", "ppo.epochs", "guide.sampling.top_p", "guide.model.width"} <= set(keys)
    assert len(keys) == len(set(keys))


# types and bounds


@pytest.mark.parametrize(
    "assignment",
    [
        "ppo.epochs=many",
        "ppo.epochs=1.5",
        "ppo.learning_rate=fast",
        "ppo.schedule=cosine",
        "algorithm.options.lols=3",
        "kl.loss_estimator=k1",
        "runtime.precision=fp16",
        "ppo.whiten_advantages=perhaps",
        "ppo=3",
        "task.options=3",
        "sampling.top_k=0.5",
    ],
)
def test_a_value_of_the_wrong_type_is_a_user_error_that_names_the_key(assignment: str) -> None:
    with pytest.raises(ConfigError, match=f"override: .*{assignment.split('=')[0]}"):
        overridden(assignment)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("ppo.iterations=0", "ppo.iterations is 0, but must be at least 1"),
        ("ppo.completions_per_iteration=0", "ppo.completions_per_iteration is 0, but must be at least 1"),
        ("ppo.epochs=-1", "ppo.epochs is -1, but must be at least 1"),
        ("ppo.minibatch_size=0", "ppo.minibatch_size is 0, but must be at least 1"),
        ("task.max_new_tokens=0", "task.max_new_tokens is 0, but must be at least 1"),
        ("task.min_new_tokens=17", r"task.min_new_tokens is 17, but must lie within \[0, .*16"),
        ("task.min_new_tokens=-1", "task.min_new_tokens is -1"),
        ("ppo.gamma=1.01", "override: ppo.gamma is 1.01, but must be at most 1\\.$"),
        ("ppo.gae_lambda=.nan", "ppo.gae_lambda is nan, but must be a finite number\\.$"),
        ("sampling.temperature=0", "override: sampling.temperature is 0, but must be at least 0.0001\\.$"),
        ("sampling.top_p=0", "sampling.top_p is 0, but must be above 0\\.$"),
        ("guide.sampling.top_k=-1", "guide.sampling.top_k is -1, but must be at least 0"),
        ("sampling.greedy=true", "sampling.greedy is for evaluation"),
        ("ppo.samples_per_prompt=3", r"ppo.completions_per_iteration \(128\) must be a multiple of ppo.samples_per_prompt"),
        ("evaluation.sampling.num_beams=0", "evaluation.sampling.num_beams is 0, but must be at least 1"),
        ("ppo.learning_rate=-1", "ppo.learning_rate is -1, but must be at least 0"),
        ("ppo.clip_range=-1", "ppo.clip_range is -1, but must be above 0"),
        ("ppo.max_grad_norm=.nan", "ppo.max_grad_norm is nan, but must be a finite number"),
        ("kl.target=0", "kl.target is 0, but must be above 0"),
        ("kl.horizon=0", "kl.horizon is 0, but must be at least 1"),
        ("kl.coefficient=.inf", "kl.coefficient is inf, but must be a finite number"),
        ("lora.dropout=1", "lora.dropout is 1, but must be below 1"),
        ("reward.weights={task: .nan}", r"reward\.weights\.task is nan, but must be a finite number"),
        ("seed=9223372036854775808", "seed is 9223372036854775808, but must be at most 9223372036854775807"),
        ("guide.sft.max_examples=-1", "guide.sft.max_examples is -1, but must be at least 0"),
        ("guide.endpoint.retries=-1", "guide.endpoint.retries is -1, but must be at least 0"),
        ("runtime.precision=bf16", "set ppo.old_log_probs=recompute"),
    ],
)
def test_a_number_that_cannot_be_trained_with_is_refused_with_what_would_do(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        overridden(assignment)


@pytest.mark.parametrize("section", ["guide", "judge"])
@pytest.mark.parametrize(
    ("name", "refused", "accepted"),
    [
        ("concurrency", 0, 1), ("thinking_tokens", -1, 0), ("requests_per_minute", -1.0, 0.0),
        ("requests_per_minute", NAN, 9.0),
        ("timeout_seconds", 0.0, 0.1), ("timeout_seconds", NAN, 1.0), ("retries", -1, 0), ("retry_seconds", -0.1, 0.0),
        ("max_requests", 0, 1), ("max_tokens", 0, 1), ("price_input", -1.0, 0.0), ("price_output", -1.0, 0.0),
        ("max_requests", 0, None),
    ],
)  # fmt: skip
def test_numbers_of_a_connection_have_bounds(section: str, name: str, refused: float, accepted: float | None) -> None:
    key = f"{section}.endpoint.{name}"
    with pytest.raises(ConfigError, match=rf"{key}\b"):
        override(Config(), [(key, refused)])
    override(Config(), [(key, accepted)])


@pytest.mark.parametrize(
    "key", ["guide.prefetch", "guide.invalid_retries", "guide.tokens_per_policy_token", "judge.max_new_tokens"]
)
def test_a_negative_number_is_refused_for_a_guide_or_judge(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        override(Config(), [(key, -1)])


# construction in Python


@pytest.mark.parametrize(
    ("construct", "message"),
    [
        (lambda: PPOConfig(gamma=1.5), r"^PPOConfig: gamma is 1\.5, but must be at most 1\.$"),
        (lambda: TaskConfig("toy_reviews", None, 0), "^TaskConfig: max_new_tokens is 0, but must be at least 1"),
        (lambda: Config(seed=-1), "^Config: seed is -1, but must be at least 0"),
        (lambda: Config(ppo={"gamma": 2}), r"^Config: ppo\.gamma is 2, but must be at most 1"),  # type: ignore[arg-type]
        (lambda: PPOConfig(epoch=1), "^unknown field of PPOConfig 'epoch': did you mean 'epochs'"),  # type: ignore[call-arg]
        (lambda: SamplingParams(top_p=0), "^top_p is 0, but must be above 0\\.$"),
        (lambda: Config(sampling=SamplingParams(greedy=True)), "^sampling.greedy is for evaluation"),
        (lambda: dataclasses.replace(Config(), task=TaskConfig(min_new_tokens=17)), r"^task\.min_new_tokens is 17"),
    ],
)
def test_a_bad_value_in_python_code_is_the_same_error(construct: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        construct()
    with pytest.raises(ValueError, match=message):  # as callers who know no rlgf expect
        construct()


SECRET = "sk-do-not-show"


@pytest.mark.parametrize(
    "construct",
    [
        lambda: Config(guide=GuideConfig(endpoint=EndpointConfig(extra_headers={"Authorization": f"Bearer {SECRET}"}))),
        lambda: from_dict({"guide": {"endpoint": {"extra_headers": {"Authorization": f"Bearer {SECRET}"}}}}, "a.yaml"),
        lambda: from_dict({"judge": {"endpoint": {"extra_body": {"key": SECRET}, "retries": "many"}}}, "a.yaml"),
        lambda: from_dict({"guide": {"endpoint": {"extra_headers": SECRET}}}, "a.yaml"),
        lambda: from_dict({"guide": {"api_key": SECRET}}, "a.yaml"),
        lambda: EndpointConfig(extra_headers=SECRET),  # type: ignore[arg-type]
        lambda: EndpointConfig(api_key=SECRET),  # type: ignore[call-arg]
        lambda: EndpointConfig(extra_headers={"Authorization": f"Bearer {SECRET}"}, retries="many"),  # type: ignore[arg-type]
        lambda: Config(guide=SECRET),  # type: ignore[arg-type]
        lambda: Config(guide={"api_key": SECRET}),  # type: ignore[arg-type]
        lambda: Config(seed=-1, judge={"endpoint": {"extra_body": {"password": SECRET}}}),  # type: ignore[arg-type]
    ],
)
def test_no_error_shows_a_secret(construct: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        construct()
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_pairs_of_numbers_that_go_together_are_accepted() -> None:
    assert overridden("runtime.precision=bf16", "ppo.old_log_probs=recompute").runtime.precision == "bf16"
    assert overridden("ppo.samples_per_prompt=4").ppo.samples_per_prompt == 4
    assert overridden("task.min_new_tokens=16").task.min_new_tokens == 16


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


# assignments


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=1e-4", 1e-4),
        ("a.b=1E5", 1e5),
        ("a.b=-2.5e-3", -2.5e-3),
        ("a.b=3", 3),
        ("a.b=0.5", 0.5),
        ("a.b=true", True),
        ("a.b=off", "off"),
        ("a.b=No", "No"),
        ("a.b=null", None),
        ("a.b=", None),
        ("a.b=[tensorboard, trackio]", ["tensorboard", "trackio"]),
        ("a.b={c: 1}", {"c": 1}),
        ("a.b=python:module:name", "python:module:name"),
        ("a.b=x=y", "x=y"),
        ("a.b='1e-4'", "1e-4"),
    ],
)
def test_an_assignment_is_a_key_and_a_yaml_value(text: str, value: Any) -> None:
    assert parse_assignment(text) == ("a.b", value)
    assert type(parse_assignment(text)[1]) is type(value)


@pytest.mark.parametrize("text", ["ppo.epochs", "=3", "", "ppo.epochs=[1", "policy={a", "policy=a: b: c"])
def test_what_is_no_assignment_is_a_user_error(text: str) -> None:
    with pytest.raises(ConfigError, match="command line"):
        parse_assignment(text)


def test_a_learning_rate_in_scientific_notation_is_a_number_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    assert overridden("ppo.learning_rate=1e-4").ppo.learning_rate == 1e-4
    path = tmp_path / "a.yaml"
    path.write_text("ppo:\n  learning_rate: 1e-4\n")
    assert from_dict(read_yaml(path), str(path)).ppo.learning_rate == 1e-4


def test_each_choice_of_a_setting_can_be_typed_without_quotes() -> None:
    def choices(section: type, prefix: str = "") -> Iterator[tuple[str, str]]:
        for name, hint in get_type_hints(section).items():
            for part in (hint, *get_args(hint)):
                if dataclasses.is_dataclass(part) and isinstance(part, type):
                    yield from choices(part, f"{prefix}{name}.")
                elif get_origin(part) is Literal:
                    yield from ((f"{prefix}{name}", choice) for choice in get_args(part) if isinstance(choice, str))

    found = list(choices(Config))
    assert ("runtime.kernels", "off") in found
    assert len(found) > 20
    for key, choice in found:
        assert parse_assignment(f"{key}={choice}") == (key, choice)
    assert overridden("runtime.kernels=off").runtime.kernels == "off"


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    config = overridden("ppo.epochs=4", "task.options.slots=3", "evaluation.sampling.top_k=5", "seed=9")
    expected = to_dict(Config())
    expected["ppo"]["epochs"] = 4
    expected["task"]["options"]["slots"] = 3
    expected["evaluation"]["sampling"] = dataclasses.asdict(SamplingParams(top_k=5))
    expected["seed"] = 9
    assert to_dict(config) == expected
    assert to_dict(Config())["ppo"]["epochs"] == 2


# files


def test_a_dumped_config_is_read_back_equal(tmp_path: Path) -> None:
    config = overridden(
        "ppo.learning_rate=1e-7", "evaluation.sampling.greedy=true", "runtime.trackers=[]", "task.options.slots=3",
        "reward.clip=2", "guide.spec='model:größer'", "ppo.target_kl=null",
    )  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert from_dict(read_yaml(path), str(path)) == config
    assert dump(from_dict(read_yaml(path), str(path))) == dump(config)
    assert from_dict(read_yaml(path), str(path)).runtime.trackers == ()


def test_a_dump_holds_every_key() -> None:
    values = yaml.safe_load(dump(Config()))
    assert set(values) == {"format_version", *(field.name for field in dataclasses.fields(Config))}
    assert from_dict(values, "a.yaml") == Config()


TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)  # as files can hold them


@settings(max_examples=10)
@given(st.floats(1e-12, 10), st.integers(1, 10**9), st.floats(0, 1), TEXTS)
def test_numbers_and_texts_survive_a_dump(rate: float, iterations: int, beta: float, name: str) -> None:
    changes = [
        ("ppo.learning_rate", rate), ("ppo.iterations", iterations), ("algorithm.options.ppo_pp.beta", beta), ("recipe", name),
    ]  # fmt: skip
    config = override(Config(), changes)
    assert from_dict(yaml.safe_load(dump(config)), "a.yaml") == config


def test_a_dump_has_no_character_with_a_hidden_effect() -> None:
    config = override(Config(), [("recipe", PRINTABLE), ("guide.endpoint.extra_body", {PRINTABLE: [f"電影 {PRINTABLE}"]})])
    text = dump(config)
    assert is_clean(text)
    assert "電影" in text
    assert from_dict(yaml.safe_load(text), "a.yaml") == config


def test_a_config_of_another_format_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text(dump(Config()).replace("format_version: 1", "format_version: 7"))
    with pytest.raises(ConfigError, match=r"old\.yaml has format version 7, and this rlgf reads version 1"):
        read_yaml(file)
    with pytest.raises(ConfigError, match="a run has format version 7"):
        from_dict({"format_version": 7}, "a run")


def test_files_that_cannot_be_read_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml cannot be read: No such file"):
        read_yaml(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    for content, message in (("a: [1", "is not valid YAML"), ("- 1", "must hold keys and values"), ("", "but holds None")):
        broken.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_yaml(broken)


def test_a_section_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml: ppo must be a mapping"):
        from_dict({"ppo": [1]}, "a.yaml")


# the algorithm


def test_options_become_the_algorithm_that_is_named() -> None:
    options = {
        "ppo_pp": {"beta": 0.25, "switch": "paper"},
        "aggrevated": {"beta": 0.75, "credit": "td", "switch": "horizon"},
        "lols": {"beta_guide": 0.25, "beta_policy": 0.75, "mixing_weight": 0.25},
        "d2lols": {"switch_iteration": 5},
    }

    def built(name: str) -> Any:
        return AlgorithmConfig(name, options).build()

    assert built("ppo").name == "ppo"
    assert built("ppo_pp").phases[0].switch == "paper"
    assert built("ppo_pp").phases[0].beta == 0.25
    aggrevated = built("aggrevated")
    assert (aggrevated.phases[0].beta, aggrevated.phases[0].switch, aggrevated.credit) == (0.75, "horizon", "td")
    lols = built("lols")
    assert [(share.policy_weight, share.guide_weight) for share in lols.schedule(0, 0.0)] == [(0.25, 0.75)] * 2
    assert [phase.beta for phase in lols.phases] == [0.25, 0.75]
    d2lols = built("d2lols")
    assert [d2lols.schedule(iteration, 0.0)[0].phase for iteration in (4, 5)] == [1, 0]
    assert [phase.beta for phase in d2lols.phases] == [0.2, 0.8]


def test_a_config_has_every_option_of_every_algorithm() -> None:
    options = AlgorithmConfig(options={"lols": {"mixing_weight": 0.5}}).options
    assert options == {name: dataclasses.asdict(kind()) for name, kind in ALGORITHMS.items()} | {
        "lols": dataclasses.asdict(guided.LOLS(mixing_weight=0.5))
    }
    assert yaml.safe_load(dump(Config()))["algorithm"]["options"]["d2lols"]["switch_iteration"] == 20


def test_an_assignment_to_an_option_keeps_the_others() -> None:
    first, second = overridden("algorithm.options.lols.mixing_weight=0.5"), overridden("algorithm.options.lols.mix=iteration")
    both = overridden("algorithm.options.lols.mixing_weight=0.5", "algorithm.options.lols.mix=iteration").algorithm
    assert (first.algorithm.options["lols"]["mixing_weight"], first.algorithm.options["lols"]["mix"]) == (0.5, "advantage")
    assert (second.algorithm.options["lols"]["mixing_weight"], second.algorithm.options["lols"]["mix"]) == (0.8, "iteration")
    assert (both.options["lols"]["mixing_weight"], both.options["lols"]["mix"]) == (0.5, "iteration")


def test_a_file_that_changes_one_option_of_a_recipe_keeps_its_others(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: quickstart\nalgorithm:\n  options:\n    d2lols: {switch_iteration: 3}\n")
    options = read_config(str(file)).algorithm.options
    assert options["d2lols"] | options["ppo_pp"] == recipe("quickstart").algorithm.options["d2lols"] | {
        "switch_iteration": 3, "beta": 0.8, "switch": "uniform",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("algorithm.name=ppo_plus", "unknown algorithm 'ppo_plus': did you mean 'ppo_pp'"),
        ("algorithm.options.ppo_plus.beta=1", "unknown algorithm 'ppo_plus': did you mean 'ppo_pp'"),
        (
            "algorithm.options.ppo_pp.betta=1",
            r"\(algorithm 'ppo_pp'\) 'algorithm\.options\.ppo_pp\.betta': did you mean 'algorithm\.options\.ppo_pp\.beta'",
        ),
        ("algorithm.options.ppo.beta=1", r"algorithm\.options\.ppo takes no options, but has 'beta'"),
        ("algorithm.options.ppo_pp.beta=1.5", r"algorithm\.options\.ppo_pp\.beta is 1\.5, but must be at most 1\.$"),
        ("algorithm.options.d2lols.beta_policy=-0.5", r"algorithm\.options\.d2lols\.beta_policy is -0\.5"),
        ("algorithm.options.lols.beta_guide=many", r"algorithm\.options\.lols\.beta_guide is 'many', but must be a number"),
        ("algorithm.options.lols.mix=both", r"algorithm\.options\.lols\.mix is 'both', but must be 'advantage' or 'iteration'"),
        (
            "algorithm.options.aggrevated.credit=tdd",
            r"algorithm\.options\.aggrevated\.credit is 'tdd', but must be 'gae', 'td' or 'switch'",
        ),
        ("algorithm.options.ppo_pp.switch=horizon", r"algorithm\.options\.ppo_pp\.switch is 'horizon', .* for policy rollins"),
        (
            "algorithm.options.d2lols.switch_iteration=1.5",
            r"algorithm\.options\.d2lols\.switch_iteration is 1\.5, but must be a whole number",
        ),
        (
            "algorithm.beta=0.5",
            r"unknown key 'algorithm\.beta': did you mean 'algorithm\.options\.[a-z_]+\.beta'",
        ),
    ],
)
def test_a_bad_option_is_refused_whichever_algorithm_is_selected(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        overridden(assignment)
    with pytest.raises(ConfigError, match=message):
        overridden("algorithm.name=d2lols", assignment)


def test_a_new_algorithm_is_one_class_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Alternating:
        """PPO++ and PPO by turns."""

        name: ClassVar[str] = "alternating"
        title: ClassVar[str] = "alternating PPO++"
        period: int = 2

        def build(self) -> Algorithm:
            ones = tuple(base.single_phase(phase, POLICY) for phase in (0, 1))
            phases = (Phase(GUIDE, POLICY, 1.0), Phase(None, POLICY))
            return Algorithm(
                self.name,
                self.title,
                phases,
                lambda iteration, uniform: (ones[iteration % self.period > 0],),
                "gae",
                "by turns",
            )

    monkeypatch.setitem(ALGORITHMS, "alternating", Alternating)
    config = overridden("algorithm.name=alternating", "algorithm.options.alternating.period=3")
    algorithm = config.algorithm.build()
    assert [algorithm.schedule(iteration, 0.0)[0].phase for iteration in range(5)] == [0, 1, 1, 0, 1]
    assert from_dict(yaml.safe_load(dump(config)), "a.yaml") == config
    with pytest.raises(ConfigError, match=r"did you mean 'algorithm\.options\.alternating\.period'"):
        overridden("algorithm.options.alternating.periods=3")
