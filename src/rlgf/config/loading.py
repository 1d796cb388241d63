"""Configs from dicts, YAML files and command-line assignments, and back."""

import dataclasses
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from rlgf.config.base import as_config_error, flatten, to_dict
from rlgf.config.schema import Config
from rlgf.errors import ConfigError
from rlgf.hints import closest_key, explain
from rlgf.types import FORMAT_VERSION, SamplingParams
from rlgf.untrusted_text import must_be_escaped, shorten, show_value

FREE_FORM_SECTIONS = (  # sections whose keys the schema does not list
    "task.options", "algorithm.options", "guide.options", "reward.weights", "reward.options",
    "evaluation.metric_options",
)  # fmt: skip


_adapter: TypeAdapter[Config] = TypeAdapter(Config)
_hints = functools.cache(get_type_hints)  # of the sections, for every key of every config

FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)
BOOLEAN = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
MAX_LISTED = 30  # fields of a section that an error lists
REPLACED = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "timestamp"))


class _Loader(yaml.SafeLoader):
    """A YAML loader: decimal numbers such as 1e-4, no dates, no repeated keys.

    Booleans are those of YAML 1.2: 'off' is a text, as in `runtime.kernels=off`.
    """

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; raise if a key occurs twice."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", BOOLEAN, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that quotes texts that would be read as other types.

    Texts with characters that are not printable are quoted too: `dump` escapes these.
    """

    def represent_text(self, text: str) -> yaml.Node:
        """Return a text as a YAML node, in double quotes if it needs escapes."""
        quotes = '"' if any(map(must_be_escaped, text)) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=quotes)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text; `where` names it in errors.

    Raises `ConfigError`, which shows nothing of the text: a secret may be in it.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{where} is not valid YAML ({line}{error.problem}).") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(
            f"{where} is not valid YAML: it has control characters, a huge number or is nested too deeply."
        ) from None


def from_dict(values: Mapping[str, Any], where: str) -> Config:
    """Return a config built from nested mappings.

    Errors name the key, its location and the nearest valid key.
    """
    if isinstance(values, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        values = _without_format_version(values, where)
    check_keys(values, Config, where)
    try:
        return _adapter.validate_python(values)
    except ValidationError as error:
        raise as_config_error(error, where) from None


def check_keys(values: object, kind: Any, where: str, prefix: str = "") -> None:
    """Raise for a key that the dataclass `kind` does not have; suggest the nearest one."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys to values.")
    hints = _hints(kind)
    for key, value in cast("Mapping[str, Any]", values).items():
        if key not in hints:
            raise unknown_key(f"{prefix}{shorten(str(key), 80)}", where)
        if dataclasses.is_dataclass(hints[key]):
            check_keys(value, hints[key], where, f"{prefix}{key}.")


def unknown_key(key: str, where: str) -> ConfigError:
    """Return the error for an unknown config key, with the nearest valid key."""
    key, where = shorten(key, 120), shorten(where, 80, keep_end=True)
    optional = flatten(to_dict(SamplingParams()), "evaluation.sampling.")  # a section that may be None
    valid = [*all_keys(Config), *flatten(Config().algorithm.options, "algorithm.options."), *optional]
    close = closest_key(key, valid)
    fields = [name for name in valid if name.rpartition(".")[0] == key.rpartition(".")[0]] if "." in key else []
    hint = "`rlgf show config` lists every key."
    if close is not None:
        hint = f"did you mean '{close}'{explain(close, key)}?"
    elif 0 < len(fields) <= MAX_LISTED:
        hint = f"{key.rpartition('.')[0]} has {', '.join(name.rpartition('.')[2] for name in fields)}."
    return ConfigError(f"{where}: unknown key '{key}': {hint}")


@functools.cache
def all_keys(kind: Any, prefix: str = "") -> tuple[str, ...]:
    """Return every dotted key of a config dataclass, sections included."""
    keys: list[str] = []
    for name, hint in _hints(kind).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += all_keys(hint, f"{prefix}{name}.")
    return tuple(keys)


def override(config: Config, changes: Sequence[tuple[str, Any]] | Mapping[str, Any], where: str = "override") -> Config:
    """Return a copy of a config with the values of keys replaced.

    Args:
        config: the config, which stays as it is.
        changes: pairs of dotted keys and values, or a dict with dotted or nested keys. A value may
            be a section such as `rlgf.SamplingParams(top_p=0.9)`, or a function that can be
            imported.
        where: the source of the changes, for errors.

    Raises:
        ConfigError: an unknown key, with the nearest valid one, or a value that cannot be used.

    Example:
        >>> config = rlgf.override(rlgf.Config(), [("ppo.epochs", 4), ("seed", 1)])
        >>> config.ppo.epochs, config.seed
        (4, 1)
        >>> rlgf.override(config, {"ppo": {"epochs": 2}, "seed": 3}).ppo.epochs
        2
    """
    values = to_dict(config)
    valid = set(all_keys(Config))
    for key, value in _pairs(changes):
        if callable(value) or dataclasses.is_dataclass(value):
            value = _plain(key, value)
        free = any(key.startswith(f"{section}.") for section in FREE_FORM_SECTIONS)
        if key not in valid and not free:
            optional = key.rsplit(".", 1)[0]
            if optional != "evaluation.sampling":
                raise unknown_key(key, where)
        *sections, last = key.split(".")
        place: Any = values
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise ConfigError(f"{where}: {shorten(key, 120)} is set, but {section} is no mapping: set one of them.")
        place[last] = value
    return from_dict(values, where)


def _pairs(changes: Sequence[tuple[str, Any]] | Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return changes as pairs of dotted keys and values; free-form sections stay whole."""
    if not isinstance(changes, Mapping):
        return list(changes)
    found: list[tuple[str, Any]] = []
    for key, value in changes.items():
        name = f"{prefix}{key}"
        is_free = name in FREE_FORM_SECTIONS or name.rpartition(".")[0] in FREE_FORM_SECTIONS or name.endswith("extra_body")
        nested = isinstance(value, Mapping) and not is_free
        found += _pairs(cast("Mapping[str, Any]", value), f"{name}.") if nested else [(name, value)]
    return found


def _plain(key: str, value: Any) -> Any:
    """Return a section as a dict, or a function as its spec."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module not in (None, "__main__") and name and getattr(sys.modules.get(module or ""), name, None) is value:
        return f"python:{module}:{name}"
    raise ConfigError(
        f"{key} is {show_value(value)}, which cannot be imported by its name: pass it to rlgf.train (reward=, guide=, model=)."
    )


def parse_assignment(text: str) -> tuple[str, Any]:
    """Parse 'section.field=value' into a key and a value; the value is YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"command line: '{shorten(key, 80)}' is not of the form section.field=value.")
    try:
        return key, parse_yaml(value, f"the value of '{shorten(key, 80)}'")
    except ConfigError as error:
        raise ConfigError(f"command line: {str(error).removesuffix('.')}: fix or quote it.") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Load the mapping in a YAML file, without its format version."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError:
        raise ConfigError(f"{path} cannot be read: it is not UTF-8.") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, but holds {type(values).__name__}.")
    return _without_format_version(cast("dict[str, Any]", values), str(path))


def _without_format_version(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Remove the format version from the values; raise if it is another one."""
    version = values.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{where} has format version {show_value(version)}, and this rlgf reads version {FORMAT_VERSION}: convert it."
        )
    return {key: value for key, value in values.items() if key != "format_version"}


def dump(config: Config) -> str:
    """Return the complete config as YAML, with the version of its format."""
    values = _adapter.dump_python(config, mode="json")
    text = f"format_version: {FORMAT_VERSION}\n" + yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return "".join(f"\\U{ord(c):08x}" if must_be_escaped(c) else c for c in text)
