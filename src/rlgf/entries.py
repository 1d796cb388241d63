"""Which rows a comparison has: algorithms, each again with other values of a setting, and the recipe's controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlgf.config import Config, all_keys, override, parse_assignment, to_dict, unknown_key
from rlgf.errors import UserError
from rlgf.recipes import Control


@dataclass(frozen=True)
class Entry:
    """One row of a comparison: a variant of the config, run once for each seed."""

    key: str
    title: str
    changes: Mapping[str, Any]
    algorithm: str | None = None  # whose row this is; None: a control's
    varied: Mapping[str, float] | None = None  # the setting in which it differs from the algorithm's own row


def entries(
    config: Config,
    algorithms: Sequence[str],
    controls: Mapping[str, Control],
    varied: Mapping[str, Sequence[float]] | None = None,
) -> list[Entry]:
    """The algorithms asked for, each again with every value of every varied setting, then the recipe's controls."""
    found: list[Entry] = []
    for name in algorithms:
        own = override(config, [("algorithm.name", name)])
        title = own.algorithm.build().title
        found.append(Entry(name, title, {"algorithm.name": name}, name))
        for setting, values in (varied or {}).items():
            for value in dict.fromkeys(values):
                changes = {"algorithm.name": name, setting: value}
                other = override(config, [*changes.items()])
                means_nothing = setting.startswith("algorithm.") and _same_algorithm(own, other)
                if value != numeric(config, setting) and not means_nothing:  # that is the algorithm's own row
                    key, called = f"{name}-{setting}={value}", f"{title}, {setting} {value}"
                    found.append(Entry(key, called, changes, name, {setting: value}))
    for key, control in controls.items():
        found.append(Entry(key, control.title, {"algorithm.name": "ppo", **control.changes}))
    return found


def _same_algorithm(one: Config, other: Config) -> bool:
    """Whether two configs write and learn alike in every iteration, however its coin falls."""
    mine, theirs = one.algorithm.build(), other.algorithm.build()
    if (mine.phases, mine.credit) != (theirs.phases, theirs.credit):
        return False
    draws = [(iteration, coin / 100) for iteration in range(one.ppo.iterations) for coin in range(100)]
    return all(mine.plan(*draw) == theirs.plan(*draw) for draw in draws)


def numeric(config: Config, setting: str) -> float:
    """The number that a setting has; whatever is none is refused."""
    value: Any = to_dict(config)
    for part in setting.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None and setting not in all_keys(Config):
        raise unknown_key(setting, "--vary")
    if setting == "seed" or setting.startswith(("evaluation.", "runtime.")):
        raise UserError(f"--vary {setting}: rows differ in how they are trained, and share seeds, evaluation and machine.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"--vary {setting}: it is {value!r}, and only numbers can be varied.")
    return value


def read_varied(config: Config, assignments: Sequence[str]) -> dict[str, list[float]]:
    """`["kl.coefficient=0,.001,.01"]` as settings with the values that each takes, one setting at a time."""
    found: dict[str, list[float]] = {}
    for text in assignments:
        setting, _, listed = text.partition("=")
        own = numeric(config, setting)
        values = [parse_assignment(f"{setting}={value.strip()}")[1] for value in listed.split(",") if value.strip()]
        if not values or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
            raise UserError(f"--vary {text}: give numbers with commas between them, as in {setting}={own:g},{2 * own or 1:g}.")
        for value in values:
            override(config, [(setting, value)], "--vary")
        found[setting] = [*found.get(setting, []), *values]
    return found
