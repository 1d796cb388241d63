"""The base of all sections: checked dataclasses, sentences of errors, and flat dicts."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar, cast, dataclass_transform

import pydantic
from pydantic import ConfigDict, TypeAdapter, ValidationError

from rlgf.bounds import check_number, declared_numbers, show_bound
from rlgf.errors import USER_FAILURES, ConfigError, FieldError, unknown
from rlgf.untrusted_text import describe_failure, shorten, shorten_sentence, show_value

Section = TypeVar("Section")

BOUNDS = {  # pydantic's type of error: the name of the bound and its words
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}
# Pydantic's type of error, or how it begins: what the value must be.
NUMBERS = {"finite_number": "a finite number", "int_": "a whole number", "float_": "a number", "bool_": "true or false"}
# The same of errors that do not show the value: a header or a request body may hold a secret.
TEXTS = {
    "string_unicode": "text of whole characters, and has half of one", "string_": "text", "tuple_type": "a list",
    "list_type": "a list", "dict_type": "a mapping of keys to values", "mapping_type": "a mapping of keys to values",
    "dataclass_type": "a mapping of keys to values",
}  # fmt: skip
MAX_LENGTH = 300  # characters of an error about one field
MAX_SOURCE, MAX_KEY = 80, 120  # of the source of its value, and of its name


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def section(kind: type[Section]) -> type[Section]:
    """Make a class a frozen dataclass whose values are checked, also in Python code.

    Its constructor raises `ConfigError`, not pydantic's error, which would show every value.
    """
    config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    made: Any = pydantic.dataclasses.dataclass(frozen=True, config=config)(kind)
    initialize = made.__init__

    @functools.wraps(initialize)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        for key in values:
            if key not in made.__dataclass_fields__:
                raise unknown(f"field of {kind.__name__}", key, made.__dataclass_fields__)
        try:
            initialize(self, *args, **values)
        except ValidationError as error:
            raise as_config_error(error, kind.__name__, positions=tuple(made.__dataclass_fields__)) from None

    made.__init__ = checked
    return made


def as_config_error(error: ValidationError, where: str, prefix: str = "", positions: tuple[str, ...] = ()) -> ConfigError:
    """Convert the first of pydantic's errors to a `ConfigError` of one sentence.

    Args:
        error: pydantic's errors.
        where: the source of the values.
        prefix: put before the key, as in 'task.options.'.
        positions: the names of positional arguments.
    """
    first = error.errors(include_url=False)[0]
    ours, kind, value = first.get("ctx", {}).get("error"), first["type"], first.get("input")
    parts = [positions[part] if isinstance(part, int) and number == 0 and positions else str(part)
             for number, part in enumerate(first["loc"])]  # fmt: skip
    if isinstance(ours, FieldError):
        return ConfigError(f"{where}: {prefix}{'.'.join([*parts, str(ours)])}")
    if isinstance(ours, ConfigError):
        return ours
    key = f"{shorten(where, MAX_SOURCE, keep_end=True)}: {shorten(prefix + '.'.join(parts), MAX_KEY)}"
    if kind in BOUNDS:
        name, words = BOUNDS[kind]
        bound = show_bound(first["ctx"][name])  # pyright: ignore[reportTypedDictNotRequiredAccess]
        return ConfigError(f"{key} is {show_value(value)}, but must be {words} {bound}.")
    for beginning, words in NUMBERS.items():
        if kind.startswith(beginning):
            return ConfigError(f"{key} is {show_value(value)}, but must be {words}.")
    if kind == "literal_error":
        choices = first["ctx"]["expected"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        return ConfigError(shorten_sentence(f"{key} is {show_value(value)}, but must be {choices}.", MAX_LENGTH))
    if parts[-1:] == ["[key]"]:
        return ConfigError(
            f"{shorten(where, MAX_SOURCE, keep_end=True)}: {'.'.join(parts[:-2])} has a key that is not a text: quote it."
        )
    for beginning, words in TEXTS.items():
        if kind.startswith(beginning):
            return ConfigError(f"{key} must be {words}.")
    return ConfigError(shorten_sentence(f"{key}: {first['msg']}.", MAX_LENGTH))


@functools.cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read_options(values: object, kind: type, where: str, prefix: str) -> Any:
    """Return free-form options as an instance of `kind`, their own dataclass.

    Raises `ConfigError` for unknown keys and wrong types.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {prefix.rstrip('.')} must be a mapping of keys to values.")
    names = [field.name for field in dataclasses.fields(kind)]
    for key in map(str, cast("Mapping[Any, Any]", values)):
        if key not in names:
            if not names:
                raise ConfigError(f"{where}: {prefix.rstrip('.')} takes no options, but has '{shorten(key, 60)}': remove it.")
            raise unknown(f"key ({where})", key, names, prefix)
    try:
        for name, (_, _, bounds) in declared_numbers(kind).items():
            if bounds is None and name in values:  # pydantic takes true and '3' for numbers
                check_number(kind, name, values[name])
        return _adapter(kind).validate_python(values)
    except FieldError as error:
        raise ConfigError(f"{where}: {prefix}{error}") from None
    except ConfigError:
        raise
    except ValidationError as error:
        raise as_config_error(error, where, prefix) from None
    except USER_FAILURES as error:  # of a user's own dataclass
        raise ConfigError(
            f"{where}: {prefix.rstrip('.')} cannot be read ({describe_failure(error)}): fix its dataclass."
        ) from error


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one flat dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownArgumentType]
    return flat


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as nested plain dicts, as written to `config.yaml`."""
    return dataclasses.asdict(config)
