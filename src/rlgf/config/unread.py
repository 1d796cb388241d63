"""Settings without effect: a table of the conditions under which fields are read.

A setting that a user typed and that nothing reads is an error. Those of a recipe or of a config
that a run wrote are listed by `rlgf train … --dry-run`: they are read again when, say, another
algorithm is chosen.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rlgf.algorithms.registry import ALGORITHMS
from rlgf.config.base import flatten, to_dict
from rlgf.config.loading import override
from rlgf.config.schema import Config
from rlgf.errors import ConfigError

COMMAND_LINE = "command line"  # source of a value, for error messages
TRAINING_SECTIONS = ("algorithm", "critic", "distill", "evaluation", "guide", "judge", "kl", "ppo", "sampling")
OFF = (None, False)  # values that turn something off; 0 equals False


@dataclass(frozen=True)
class Condition:
    """A condition under which a run reads some fields.

    `fields` are keys; one that ends in `.*` stands for all of its section but those in `besides`.
    """

    fields: tuple[str, ...]
    is_met: Callable[[Config], bool]
    cause: Callable[[Config], str]  # of a field that is not read, as a clause
    fix: str  # what would make it read
    besides: tuple[str, ...] = ()
    problem: str = "has no effect"

    def covers(self, key: str) -> bool:
        """Return whether the condition applies to a key."""
        sections = tuple(field[:-1] for field in self.fields if field.endswith(".*"))
        return (key in self.fields or key.startswith(sections)) and key not in self.besides


@dataclass(frozen=True)
class TypedSetting:
    """A setting that a user typed: its name, its keys, and where it stands."""

    name: str
    keys: tuple[str, ...]  # several for a flag that sets several; one that is read is enough
    where: str = COMMAND_LINE


def typed_setting(key: str, value: Any, where: str = COMMAND_LINE) -> list[TypedSetting]:
    """Return what a user typed as 'section.field=value'; a mapping sets several fields."""
    values = flatten(cast("Mapping[str, Any]", value), f"{key}.") if isinstance(value, Mapping) else {key: value}
    return [TypedSetting(name, (name,), where) for name in values]


def _guide_kind(config: Config) -> str:
    return config.guide.spec.partition(":")[0]


def _guide_is(*kinds: str) -> Callable[[Config], bool]:
    return lambda config: _guide_kind(config) in kinds


def _guide_is_used(config: Config) -> bool:
    return config.algorithm.build().needs_guide or config.distill.num_completions > 0


def _title(config: Config) -> str:
    return config.algorithm.build().title


def _model_is_new(config: Config) -> bool:
    return config.policy is None and config.model.path is None


def _new_guide_is_trained(config: Config) -> bool:
    return _guide_is_used(config) and _guide_kind(config) == "trained" and config.guide.model.path is None


def _given_model(config: Config) -> str:
    return "policy names a model" if config.policy is not None else "model.path names a model"


def _uses_pairs(config: Config) -> bool:
    return "preferences" in (*config.reward.names, config.judge.spec)


def _judge_is_server(config: Config) -> bool:
    return (config.judge.spec or "").startswith("server:")


def _says(text: str) -> Callable[[Config], str]:
    """Return a function that formats `text` with values of the config: '{c.seed}'."""
    return lambda config: text.format(c=config)


def _of_section(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


def _value_of(config: Config, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def _needs(key: str, *fields: str) -> Condition:
    """Return the condition that a number is set, so that its dependent fields matter."""
    return Condition(fields, lambda c: _value_of(c, key) > 0, lambda c: f"{key} is 0", f"set {key}", (key,))


def _conditions_of_training(section: str) -> list[Condition]:
    """Return the conditions of a supervised training loop, whose steps replace its epochs."""
    steps, epochs = f"{section}.steps", f"{section}.epochs"
    return [
        Condition(
            (epochs,), lambda c: not _value_of(c, steps) or not _value_of(c, epochs),
            lambda c: f"{steps} is {_value_of(c, steps)}", f"set {steps}=0",
        ),
        Condition(
            (f"{section}.*",), lambda c: _value_of(c, section).is_enabled, _says(f"{steps} and {epochs} are 0"),
            "set one of them", (steps, epochs, *_of_section(section, "seed", "num_completions")),
        ),
        Condition(
            (f"{section}.warmup_steps",),
            lambda c: not _value_of(c, steps) or _value_of(c, f"{section}.warmup_steps") < _value_of(c, steps),
            lambda c: f"{steps} is {_value_of(c, steps)}", f"set it below {steps}",
            problem="takes the whole training",
        ),
    ]  # fmt: skip


def _condition_of_sampling(section: str, is_stochastic: Callable[[Config], bool]) -> Condition:
    return Condition(
        _of_section(section, "temperature", "top_k", "top_p"), is_stochastic, _says(f"{section} is greedy or a beam search"),
        f"set {section}.greedy=false and {section}.num_beams=1",
    )  # fmt: skip


def _condition_of_options(name: str) -> Condition:
    return Condition(
        (f"algorithm.options.{name}.*",), lambda c: c.algorithm.name == name, _says("algorithm.name is '{c.algorithm.name}'"),
        f"set algorithm.name={name}",
    )  # fmt: skip


SHAPE = ("architecture", "layers", "width", "heads", "max_length", "vocabulary", "init_std")
OF_SERVERS = (
    "continuation", "instruction", "system", "stop", "tokens_per_policy_token", "invalid_retries", "on_failure",
    "on_refusal", "max_refused_share", "prefetch",
)  # fmt: skip

CONDITIONS = (
    Condition(
        ("guide.*",), _guide_is_used, lambda c: f"{_title(c)} queries no guide",
        "choose another algorithm, or set distill.num_completions",
    ),
    Condition(
        ("guide.model.*", "guide.sft.*", "guide.options", "guide.options.*"), _guide_is("trained"),
        _says("guide.spec is not 'trained'"), "set guide.spec=trained",
    ),
    Condition(
        _of_section("guide.model", *SHAPE), lambda c: c.guide.model.path is None, _says("guide.model.path names a model"),
        "set guide.model.path=null",
    ),
    Condition(
        ("guide.model.vocabulary",), lambda c: False, _says("the guide has the policy's tokenizer"), "set model.vocabulary"
    ),
    Condition(
        ("guide.sampling.*",), _guide_is("sft", "trained", "model", "run", "server"),
        lambda c: f"the guide '{_guide_kind(c)}' is not a model", "choose a model or a server as the guide",
    ),
    _condition_of_sampling("guide.sampling", lambda c: c.guide.sampling.is_stochastic),
    Condition(
        _of_section("guide", *OF_SERVERS), _guide_is("server"), lambda c: f"the guide '{_guide_kind(c)}' is not on a server",
        "set guide.spec=server:MODEL@URL",
    ),
    Condition(  # a person's answers are cached too
        ("guide.endpoint.*",), _guide_is("server", "human"),
        lambda c: f"the guide '{_guide_kind(c)}' is in this process", "set guide.spec=server:MODEL@URL",
    ),
    Condition(
        ("guide.prefetch",), lambda c: c.algorithm.build().needs_guide_rollin,
        lambda c: f"the guide starts no completion of {_title(c)}", "choose ppo_pp, lols or d2lols",
    ),
    Condition(
        ("guide.tokens_per_policy_token",), lambda c: c.guide.continuation != "token_ids",
        _says("guide.continuation is token_ids"), "choose another guide.continuation",
    ),
    *map(_condition_of_options, ALGORITHMS),
    Condition(
        ("model.path",), lambda c: c.policy is None or c.evaluation.output_perplexity or "zero_shot" in c.evaluation.baselines,
        _says("policy names a model and nothing asks for the one before SFT"), "set evaluation.output_perplexity=true",
    ),
    Condition(_of_section("model", *SHAPE), _model_is_new, _given_model, "set policy=null and model.path=null"),
    Condition(
        ("pretrain.*",), lambda c: _model_is_new(c) or _new_guide_is_trained(c), _given_model,
        "set policy=null and model.path=null",
    ),
    Condition(("sft.*",), lambda c: c.policy is None, _given_model, "name it with --sft-from (model.path) instead"),
    _needs("distill.num_completions", "distill.*"),
    *(
        condition
        for section in ("pretrain", "sft", "distill", "guide.sft", "preferences.training")
        for condition in _conditions_of_training(section)
    ),
    Condition(("reward.path",), lambda c: not c.reward.weights, _says("reward.weights replaces it"), "set reward.weights={}"),
    Condition(
        _of_section("reward", "epochs", "seed"), lambda c: "ngram" in c.reward.names, _says("the reward is not 'ngram'"),
        "set reward.path=ngram",
    ),
    Condition(
        ("preferences.*",), _uses_pairs, _says("neither reward.path nor judge.spec is 'preferences'"),
        "set reward.path=preferences",
    ),
    _needs("preferences.lora.rank", "preferences.lora.*"),
    Condition(
        ("judge.*",), _judge_is_server, _says("judge.spec is {c.judge.spec}, not a server"),
        "set judge.spec=server:MODEL@URL", ("judge.spec",),
    ),
    _needs("lora.rank", "lora.*"),
    Condition(
        ("lora.in_sft",), lambda c: c.policy is None or c.distill.num_completions > 0,
        _says("policy names a model, which skips SFT"), "name it with --sft-from (model.path) instead",
    ),
    Condition(
        ("lora.dropout",), lambda c: c.lora.in_sft or c.ppo.dropout, _says("lora.in_sft and ppo.dropout are off"),
        "set one of them",
    ),
    Condition(
        ("critic.warmup_iterations",), lambda c: c.critic.warmup_iterations < c.ppo.iterations,
        _says("ppo.iterations is {c.ppo.iterations}"), "set it below ppo.iterations",
        problem="leaves no iteration to the policy",
    ),
    Condition(
        ("ppo.minibatch_size",), lambda c: c.ppo.minibatch_size <= c.ppo.completions_per_iteration,
        _says("ppo.completions_per_iteration is {c.ppo.completions_per_iteration}"), "set it to at most that",
        problem="is more than there is",
    ),
    Condition(
        ("task.options.subset",), lambda c: c.task.data is None or not os.path.isfile(os.path.expanduser(c.task.data)),
        _says("task.data is a file, which has none"), "give a dataset of the Hub or a folder",
    ),
    _needs("ppo.mle_coefficient", "ppo.mle_batch"),
    Condition(
        _of_section("kl", "target", "horizon"), lambda c: c.kl.controller == "adaptive", _says("kl.controller is fixed"),
        "set kl.controller=adaptive",
    ),
    _needs("kl.loss_coefficient", "kl.loss_estimator"),
    Condition(
        ("critic.value_coefficient",), lambda c: c.critic.kind == "value_head", _says("critic.kind is '{c.critic.kind}'"),
        "set critic.kind=value_head",
    ),
    Condition(
        ("critic.learning_rate",), lambda c: c.critic.kind != "value_head",
        _says("critic.kind is 'value_head', whose optimizer is the policy's"), "set ppo.learning_rate",
    ),
    Condition(
        ("critic.*", *_of_section("ppo", "gamma", "gae_lambda", "whiten_advantages")),
        lambda c: c.algorithm.build().baseline is None, lambda c: f"{_title(c)} has no critic",
        "choose an algorithm with a critic, such as ppo_pp",
    ),
    Condition(
        ("ppo.dual_clip",), lambda c: c.ppo.surrogate == "clip", _says("ppo.surrogate is cispo"), "set ppo.surrogate=clip"
    ),
    Condition(
        ("ppo.clip_range",), lambda c: c.ppo.surrogate == "clip" or c.ppo.clip_range_high is None,
        _says("ppo.surrogate is cispo, which uses ppo.clip_range_high"), "set ppo.clip_range_high=null",
    ),
    Condition(
        ("critic.warm_start_from_guide",), lambda c: len(c.algorithm.build().critics) > 1,
        lambda c: f"{_title(c)} has one critic", "choose d2lols",
    ),
    _needs("evaluation.every", "evaluation.prompts"),
    Condition(
        ("evaluation.metric_options", "evaluation.metric_options.*"), lambda c: bool(c.evaluation.metrics),
        _says("evaluation.metrics is empty"), "set evaluation.metrics",
    ),
    Condition(
        ("evaluation.also_sampled",), lambda c: c.evaluation.sampling is not None and not c.evaluation.sampling.is_stochastic,
        _says("evaluations sample anyway"), "set evaluation.sampling.greedy=true",
    ),
    _condition_of_sampling(
        "evaluation.sampling", lambda c: c.evaluation.sampling is None or c.evaluation.sampling.is_stochastic
    ),
    Condition(
        ("evaluation.output_perplexity",), lambda c: c.policy is None or c.model.path is not None,
        _says("nothing says which model the policy was before SFT"), "set model.path",
    ),
)  # fmt: skip
"""The fields that a run does not always read. All others it reads, or a check refuses them."""


def unmet_condition(config: Config, key: str) -> Condition | None:
    """Return the first unmet condition for a key to be read, or None."""
    return next((condition for condition in CONDITIONS if condition.covers(key) and not condition.is_met(config)), None)


def require_read(typed: Sequence[TypedSetting], configs: Sequence[Config]) -> None:
    """Raise `ConfigError` for a setting that a user typed and that no run reads.

    A value that turns something off (None, false, 0) is always accepted.

    Args:
        typed: what the user gave.
        configs: those of the run, or of all rows of a comparison; one that reads it is enough.
    """
    values = flatten(to_dict(configs[0]))
    for setting in typed:
        if all(values.get(key, "") in OFF for key in setting.keys):
            continue
        unmet = [unmet_condition(config, key) for config in configs for key in setting.keys]
        if all(condition is not None for condition in unmet):
            first = cast("Condition", unmet[0])
            raise ConfigError(
                f"{setting.where}: {setting.name} {first.problem}, as {first.cause(configs[0])}: {first.fix}, or leave out "
                f"{setting.name}."
            )


def require_read_in_comparison(typed: Sequence[TypedSetting], config: Config, rows: Sequence[Config]) -> None:
    """Raise `ConfigError` for a typed setting that no row of a comparison reads.

    Its baselines read the settings of the guide if they include it.
    """
    for setting in typed:
        replaced = {"algorithm.name": "--algorithms", "seed": "--seeds"}.get(setting.name)
        if replaced and setting.where == COMMAND_LINE:
            raise ConfigError(f"{setting.where}: {setting.name} has no effect on a comparison: give {replaced}.")
    with_guide = [override(config, [("algorithm.name", "ppo_pp")])] if "guide" in config.evaluation.baselines else []
    for setting in typed:
        of_guide = all(key.startswith("guide.") for key in setting.keys)
        require_read([setting], [*rows, *with_guide] if of_guide else rows)


def require_read_by_stage(typed: Sequence[TypedSetting], command: str) -> None:
    """Raise `ConfigError` for a setting on the command line that no stage reads.

    Those of a YAML file may be meant for `rlgf train`, which reads the same file.
    """
    for setting in typed:
        if setting.where == COMMAND_LINE and all(key.partition(".")[0] in TRAINING_SECTIONS for key in setting.keys):
            raise ConfigError(
                f"{COMMAND_LINE}: {setting.name} has no effect on `rlgf {command}`, which trains no policy: leave "
                f"out {setting.name}, or run `rlgf train`."
            )


def describe_unread(config: Config) -> list[str]:
    """Return the settings of a config that differ from the defaults and are not read.

    Each line has the settings with one cause, and the cause.
    """
    default = flatten(to_dict(override(Config(), [("evaluation.sampling.greedy", False)])))
    lines = dict[str, list[str]]()
    for key, value in flatten(to_dict(config)).items():
        condition = unmet_condition(config, key)
        if condition is not None and value not in OFF and value != default.get(key):
            lines.setdefault(condition.cause(config), []).append(key)
    return [f"{', '.join(keys)}, as {cause}" for cause, keys in lines.items()]
