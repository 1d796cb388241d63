"""The rows of a comparison: algorithms, varied settings, and the recipe's controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlgf.config.base import to_dict
from rlgf.config.loading import all_keys, override, parse_assignment, unknown_key
from rlgf.config.recipes import Control
from rlgf.config.schema import Config
from rlgf.errors import ConfigError


@dataclass(frozen=True)
class Variant:
    """One row of a comparison: a variant of the config, run once per seed."""

    key: str
    title: str
    changes: Mapping[str, Any]
    algorithm: str | None = None  # of the row; None: a control run
    varied: Mapping[str, float] | None = None  # setting and value, if varied


@dataclass(frozen=True)
class ComparisonPlan:
    """The runs of a comparison: one config per row and seed."""

    recipe: str
    task: str
    evaluation_prompts: int
    rows: Sequence[Variant]
    seeds: Sequence[int]
    configs: Mapping[tuple[str, int], Config]  # by key of the row and seed
    baselines: Mapping[int, Config]  # by seed
    varied: Mapping[str, float]  # the recipe's own values of the settings that rows vary


def plan_comparison(config: Config, rows: Sequence[Variant], seeds: Sequence[int]) -> ComparisonPlan:
    """Return the configs of a comparison; raise `ConfigError` without rows or seeds."""
    if not rows or not seeds:
        raise ConfigError("nothing to compare: give at least one algorithm and one seed.")
    settings = dict.fromkeys(setting for row in rows for setting in row.varied or {})
    return ComparisonPlan(
        config.recipe, config.task.name, config.evaluation.final_prompts, rows, seeds,
        {(row.key, seed): override(config, [*row.changes.items(), ("seed", seed)]) for row in rows for seed in seeds},
        {seed: override(config, [("seed", seed)]) for seed in seeds},
        {setting: numeric_setting(config, setting) for setting in settings},
    )  # fmt: skip


def build_variants(
    config: Config,
    algorithms: Sequence[str],
    controls: Mapping[str, Control],
    varied: Mapping[str, Sequence[float]] | None = None,
) -> list[Variant]:
    """Return the rows: algorithms, each with its varied settings, then the recipe's controls.

    An algorithm is repeated with each value of each varied setting.
    """
    found: list[Variant] = []
    for name in algorithms:
        own = override(config, [("algorithm.name", name)])
        title = own.algorithm.build().title
        found.append(Variant(name, title, {"algorithm.name": name}, name))
        for setting, values in (varied or {}).items():
            for value in dict.fromkeys(values):
                changes = {"algorithm.name": name, setting: value}
                other = override(config, [*changes.items()])
                means_nothing = setting.startswith("algorithm.") and _same_algorithm(own, other)
                # Otherwise it would repeat the algorithm's own row.
                if value != numeric_setting(config, setting) and not means_nothing:
                    key, called = f"{name}-{setting}={value}", f"{title}, {setting} {value}"
                    found.append(Variant(key, called, changes, name, {setting: value}))
    for key, control in controls.items():
        found.append(Variant(key, control.title, {"algorithm.name": "ppo", **control.changes}))
    return found


def _same_algorithm(one: Config, other: Config) -> bool:
    """Return whether two configs have the same phases in every iteration.

    Compared for all values of the iteration's random number, in steps of 0.01.
    """
    algorithm, other_algorithm = one.algorithm.build(), other.algorithm.build()
    alike = [(one.phases, one.credit, one.baseline) for one in (algorithm, other_algorithm)]
    if alike[0] != alike[1]:
        return False
    inputs = [(iteration, coin / 100) for iteration in range(one.ppo.iterations) for coin in range(100)]
    return all(algorithm.schedule(*values) == other_algorithm.schedule(*values) for values in inputs)


def numeric_setting(config: Config, setting: str) -> float:
    """Return the value of a numeric setting.

    Raises `ConfigError` if it is not a number or cannot be varied.
    """
    value: Any = to_dict(config)
    for part in setting.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None and setting not in all_keys(Config):
        raise unknown_key(setting, "--vary")
    if setting == "seed" or setting.startswith(("evaluation.", "runtime.")):
        raise ConfigError(f"--vary {setting}: rows share seeds, evaluation and machine, so vary a setting of training.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"--vary {setting}: it is {value!r}, and only numbers can be varied.")
    return value


def parse_vary(config: Config, assignments: Sequence[str]) -> dict[str, list[float]]:
    """Parse `["kl.coefficient=0,.001,.01"]` into the values of each setting.

    Settings are varied one at a time.
    """
    found: dict[str, list[float]] = {}
    for text in assignments:
        setting, _, listed = text.partition("=")
        own = numeric_setting(config, setting)
        values = [parse_assignment(f"{setting}={value.strip()}")[1] for value in listed.split(",") if value.strip()]
        if not values or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
            raise ConfigError(f"--vary {text}: give numbers separated by commas, as in {setting}={own:g},{2 * own or 1:g}.")
        for value in values:
            override(config, [(setting, value)], "--vary")
        found[setting] = [*found.get(setting, []), *values]
    return found
