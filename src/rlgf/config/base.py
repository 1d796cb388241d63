"""The base of all sections: checked dataclasses, bounds, sentences of errors, and flat dicts."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from rlgf.errors import ConfigError, FieldError, unknown

Section = TypeVar("Section")


# docs/make.py shows the comments instead of the names.
PositiveInt = Annotated[int, Field(ge=1)]  # int ≥ 1
NonNegativeInt = Annotated[int, Field(ge=0)]  # int ≥ 0
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # int ≥ 0
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]  # float
PositiveFloat = Annotated[float, Field(gt=0)]  # float > 0
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # float ≥ 0
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]  # float, 0 ≤ x ≤ 1
ProbabilityBelowOne = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]  # float, 0 ≤ x < 1

BOUNDS = {  # pydantic's type of error: the name of the bound and its words
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}
# Errors that show the value. The others do not: a header or a request body may hold a secret.
SHOWING_VALUE = ("int_", "float_", "bool_", "literal_error")


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
    """Return the first of pydantic's errors as one sentence; an error of ours keeps its own.

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
    key = f"{where}: {prefix}{'.'.join(parts)}"
    if kind in BOUNDS:
        name, words = BOUNDS[kind]
        return ConfigError(f"{key} is {_shown(value)}, but must be {words} {_shown(first['ctx'][name])}.")  # pyright: ignore[reportTypedDictNotRequiredAccess]
    if kind == "finite_number":
        return ConfigError(f"{key} is {_shown(value)}, but must be a finite number.")
    value_shown = f" = {value!r}" if kind.startswith(SHOWING_VALUE) else ""
    return ConfigError(f"{key}{value_shown}: {first['msg']}.")


def _shown(number: Any) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


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
    for key in cast("Mapping[str, Any]", values):
        if key not in names:
            if not names:
                raise ConfigError(f"{where}: {prefix.rstrip('.')} takes no options, but has '{key}': remove it.")
            raise unknown(f"key ({where})", key, names)
    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        raise as_config_error(error, where, prefix) from None


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
