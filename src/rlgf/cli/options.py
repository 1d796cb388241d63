"""Options shared by the commands, and the config that they define.

The config's classes take a quarter of a second to import, so functions import them when called.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlgf.algorithms import guided
from rlgf.algorithms.registry import ALGORITHMS
from rlgf.bounds import check_number
from rlgf.errors import ConfigError, FieldError, unknown

if TYPE_CHECKING:
    from rlgf.config.schema import Config
    from rlgf.config.unread import TypedSetting

COMMAND_LINE = "command line"  # source of a value, for error messages
BASELINES = ("zero_shot", "sft", "guide")


def complete_recipe(incomplete: str) -> list[str]:
    """Return the recipes that begin as typed, for shell completion."""
    from rlgf.config.recipes import RECIPES

    return [name for name in RECIPES if name.startswith(incomplete)]


def complete_algorithm(incomplete: str) -> list[str]:
    """Return the algorithms that begin as typed, for shell completion."""
    return [name for name in ALGORITHMS if name.startswith(incomplete)]


Recipe = Annotated[
    str,
    typer.Argument(help="A recipe (`rlgf list`) or a YAML file.", metavar="RECIPE_OR_YAML", autocompletion=complete_recipe),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Any other field, as section.field=value (`rlgf show config` lists them).")
]
Out = Annotated[Path | None, typer.Option(help="The folder to write to.", metavar="DIR")]
Stages = Annotated[Path | None, typer.Option(help="Folder of finished stages. Default: OUT/stages.", metavar="DIR")]
Data = Annotated[str | None, typer.Option(help="The task's data: Hub name, local folder or .jsonl[.gz] file.")]
Policy = Annotated[
    str | None,
    typer.Option(help="Start from this model (Hub name or folder) as it is, without fine-tuning it on the data's completions."),
]
SftFrom = Annotated[
    str | None,
    typer.Option(help="Fine-tune this model (Hub name or folder) on the completions in the data, and start from the result."),
]
GuideSpec = Annotated[
    str | None,
    typer.Option("--guide", help="sft, trained, model:PATH, run:DIR, server:MODEL@URL, human, references or FILE.py:name."),
]
Offline = Annotated[bool, typer.Option("--offline", help="Use only cached responses of a guide outside this process.")]
Seed = Annotated[int | None, typer.Option(help="Seed of all randomness.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, make the checks that take under a minute, and exit.")]
Iterations = Annotated[int | None, typer.Option(help="Number of training iterations.")]
Beta = Annotated[float | None, typer.Option(help="Probability of a rollin, in every phase.")]
Alpha = Annotated[float | None, typer.Option(help="lols: weight of A^π; d2lols: iterations of AggreVaTeD before PPO++.")]


@dataclass(frozen=True)
class TypedConfig:
    """A config, and the settings in it that the user typed."""

    config: "Config"
    typed: "list[TypedSetting]"


def read_config(source: str, overrides: list[str] | None = None, **flags: Any) -> "Config":
    """Load a recipe or a YAML file, and apply flags and assignments, as `read_typed_config`."""
    return read_typed_config(source, overrides, **flags).config


def read_typed_config(
    source: str,
    overrides: list[str] | None = None,
    *,
    algorithm: str | None = None,
    beta: float | None = None,
    alpha: float | None = None,
    guide: str | None = None,
    policy: str | None = None,
    sft_from: str | None = None,
    data: str | None = None,
    iterations: int | None = None,
    seed: int | None = None,
    offline: bool = False,
) -> TypedConfig:
    """Load a recipe or a YAML file, and apply flags and assignments.

    A YAML file may change the recipe that it names.
    """
    from rlgf.config.loading import override, parse_assignment
    from rlgf.config.recipes import RECIPES, recipe, with_pretrained_values
    from rlgf.config.unread import TypedSetting, typed_setting

    typed: list[TypedSetting] = []
    given: list[str] | None = []  # keys that the user gave; None: all
    if source in RECIPES:
        config = recipe(source)
    elif source.endswith((".yaml", ".yml")) or Path(source).is_file():
        config, typed, given = _from_yaml(Path(source))
    else:
        raise unknown("recipe", source, RECIPES)
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise unknown("algorithm", algorithm, ALGORITHMS)
    if policy is not None and sft_from is not None:
        raise ConfigError("--policy starts from a model as it is, --sft-from fine-tunes it first: give one of them.")
    name = algorithm or config.algorithm.name
    changes: list[tuple[str, Any]] = [
        (key, value)
        for key, value in {
            "algorithm.name": algorithm,
            "guide.spec": guide,
            "policy": policy,
            "task.data": data,
            "ppo.iterations": iterations,
            "seed": seed,
            "guide.endpoint.offline": offline or None,
        }.items()
        if value is not None
    ]
    changes += [("policy", None), ("model.path", sft_from)] if sft_from is not None else []
    changes += [alpha_change(name, alpha)] if alpha is not None else []
    changes += [parse_assignment(text) for text in overrides or []]
    betas = beta_changes(beta) if beta is not None else []
    config = override(config, [*betas, *changes], COMMAND_LINE)
    if given is not None:
        config = with_pretrained_values(config, [*given, *(key for key, _ in changes)])
    if sft_from is not None and not config.sft.is_enabled:
        raise ConfigError("--sft-from fine-tunes a model, and sft.steps and sft.epochs are 0: set one, as in sft.epochs=3.")
    typed += [setting for key, value in changes for setting in typed_setting(key, value)]
    typed += [TypedSetting("--beta", tuple(key for key, _ in betas))] if betas else []
    from rlgf.cli import terminal

    terminal.announce_loading()  # all commands with a config need them
    return TypedConfig(config, typed)


def _from_yaml(path: Path) -> "tuple[Config, list[TypedSetting], list[str] | None]":
    """Load a YAML file, and return its config, what its author changed, and its keys.

    It holds a whole config, or changes to the recipe that its key `recipe` names. A config that a
    run wrote has no author and all keys, so that they are None; options of other algorithms are no
    mistake in a file that several commands read.
    """
    from rlgf.config.base import flatten, to_dict
    from rlgf.config.loading import FREE_FORM_SECTIONS, from_dict, override, read_yaml
    from rlgf.config.recipes import RECIPES, recipe
    from rlgf.config.schema import Config
    from rlgf.config.unread import TypedSetting

    values = read_yaml(path)
    base = values.get("recipe")
    flat: list[tuple[str, Any]] = []

    def walk(mapping: dict[str, Any], prefix: str) -> None:
        for key, value in mapping.items():
            # Options that are not given stay the recipe's.
            free = f"{prefix}{key}" in FREE_FORM_SECTIONS and f"{prefix}{key}" != "algorithm.options"
            if isinstance(value, dict) and not free:
                walk(value, f"{prefix}{key}.")  # pyright: ignore[reportUnknownArgumentType]
            else:
                flat.append((f"{prefix}{key}", value))

    if isinstance(base, str) and base in RECIPES:
        try:
            walk(values, "")
        except RecursionError:
            raise ConfigError(f"{path} has a mapping that holds itself, or is nested too deeply: write it out.") from None
        config, before = override(recipe(base), flat, str(path)), recipe(base)
    else:
        config, before = from_dict(values, str(path)), Config()
    if path.read_text(encoding="utf-8").startswith("format_version:"):
        return config, [], None
    old, new = flatten(to_dict(before)), flatten(to_dict(config))
    changed = [key for key in flatten(values) if key in new and old.get(key) != new[key]]
    typed = [TypedSetting(key, (key,), str(path)) for key in changed if not key.startswith("algorithm.options.")]
    return config, typed, list(flatten(values))


def beta_changes(beta: float) -> list[tuple[str, Any]]:
    """Return the fields that `--beta` sets, the rollin probabilities of all algorithms."""
    _require_within_bounds("--beta", guided.PPOPlusPlus, "beta", beta)
    return [
        (f"algorithm.options.{name}.{field.name}", beta)
        for name, kind in ALGORITHMS.items()
        for field in dataclasses.fields(kind)
        if field.name.startswith("beta")
    ]


def alpha_change(name: str, alpha: float) -> tuple[str, Any]:
    """Return the field and value that `--alpha` sets for an algorithm."""
    if name == "lols":
        _require_within_bounds("--alpha", guided.LOLS, "mixing_weight", alpha)
        return "algorithm.options.lols.mixing_weight", alpha
    if name == "d2lols":
        if alpha != alpha // 1:
            raise ConfigError(f"--alpha is {alpha:g}, but for d2lols it counts iterations: give a whole number.")
        _require_within_bounds("--alpha", guided.D2LOLS, "switch_iteration", int(alpha))
        return "algorithm.options.d2lols.switch_iteration", int(alpha)
    raise ConfigError(f"--alpha does not apply to {name}: leave it out, or choose lols or d2lols.")


def _require_within_bounds(flag: str, kind: type, field: str, value: float) -> None:
    """Raise `ConfigError` for a value of a flag that the field it sets cannot have."""
    try:
        check_number(kind, field, value)
    except FieldError as error:
        raise ConfigError(f"{flag}{str(error).removeprefix(field)}") from None


def default_stages(run: Path) -> Path:
    """Return the folder of a run's stages.

    It is in the run's own folder, or in that of the comparison it belongs to.
    """
    own, shared = run / "stages", run.parent.parent / "stages"
    return shared if shared.is_dir() and not own.is_dir() else own


STANDARD_OUTPUT = Path("-")


def emit(found: dict[str, Any], json_out: Path | None, show: Callable[[], None]) -> None:
    """Show the results, and write them as JSON to a file if one is given.

    `--json -` prints the JSON instead of the table.
    """
    from rlgf.data.files import json_safe, to_json, write_json

    if json_out == STANDARD_OUTPUT:
        from rlgf.cli import terminal

        terminal.write_block(to_json(json_safe(found), indent=2))
        return
    show()
    if json_out:
        write_json(json_out, json_safe(found))


def check_writable(path: Path) -> None:
    """Raise if results cannot be written to `path`, before they are computed."""
    if path == STANDARD_OUTPUT:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: give --json a file in a folder of yours.")
