"""The bounds of numbers, declared on the fields that hold them.

In a config pydantic checks them; other dataclasses call `check_bounds` when they are made. No value
is converted: texts, fractions and booleans are not accepted as whole numbers.
"""

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from rlgf.errors import FieldError
from rlgf.untrusted_text import show_value

KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
"""The types of fields that are checked, and their words."""


@dataclass(frozen=True)
class Bounds:
    """The least and the greatest value of a number; both are finite.

    With `open_low` or `open_high` the bound itself is excluded.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return pydantic's schema of a field with these bounds."""
        from pydantic_core import core_schema  # slow to import

        bounds: Any = {"gt" if self.open_low else "ge": self.low, "lt" if self.open_high else "le": self.high}
        if source is int:
            return core_schema.int_schema(strict=True, **bounds)
        return core_schema.float_schema(strict=True, allow_inf_nan=False, **bounds)

    def violation(self, value: float) -> str | None:
        """Return what a number must be instead, or None if it is within the bounds."""
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if value < self.low or (self.open_low and value == self.low):
            return f"{'above' if self.open_low else 'at least'} {show_bound(self.low)}"
        if value > self.high or (self.open_high and value == self.high):
            return f"{'below' if self.open_high else 'at most'} {show_bound(self.high)}"
        return None


@dataclass(frozen=True)
class Exactly:
    """A strict boolean: numbers and texts are not accepted for it."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return pydantic's schema of a field with this annotation."""
        from pydantic_core import core_schema

        return core_schema.bool_schema(strict=True)


WIDEST = {int: Bounds(-(2**63), 2**63 - 1), float: Bounds(-1e300, 1e300)}
"""The bounds of fields without any of their own, in options that users define."""

# docs/make.py shows the comments instead of the names.
Flag = Annotated[bool, Exactly()]  # bool
Seed = Annotated[int, Bounds(0, 2**63 - 1)]  # int ≥ 0
PositiveInt = Annotated[int, Bounds(1, 10**9)]  # int, 1 to 10⁹
NonNegativeInt = Annotated[int, Bounds(0, 10**9)]  # int, 0 to 10⁹
SmallInt = Annotated[int, Bounds(1, 1024)]  # int, 1 to 1,024
SmallIntOrZero = Annotated[int, Bounds(0, 1024)]  # int, 0 to 1,024
Size = Annotated[int, Bounds(1, 2**20)]  # int, 1 to 2²⁰
SizeOrZero = Annotated[int, Bounds(0, 2**20)]  # int, 0 to 2²⁰
Length = Annotated[int, Bounds(1, 2**24)]  # int, 1 to 2²⁴
LengthOrZero = Annotated[int, Bounds(0, 2**24)]  # int, 0 to 2²⁴
Budget = Annotated[int, Bounds(1, 10**15)]  # int, 1 to 10¹⁵
FiniteFloat = Annotated[float, Bounds(-1e9, 1e9)]  # float, −10⁹ to 10⁹
DualClip = Annotated[float, Bounds(1, 1e9, open_low=True)]  # float, above 1 to 10⁹
PositiveFloat = Annotated[float, Bounds(0, 1e9, open_low=True)]  # float, above 0 to 10⁹
NonNegativeFloat = Annotated[float, Bounds(0, 1e9)]  # float, 0 to 10⁹
Coefficient = Annotated[float, Bounds(0, 1e4)]  # float, 0 to 10,000
Rate = Annotated[float, Bounds(0, 10)]  # float, 0 to 10
Epsilon = Annotated[float, Bounds(1e-20, 1e6)]  # float, 10⁻²⁰ to 10⁶
Seconds = Annotated[float, Bounds(0.001, 1e6)]  # float, 0.001 to 10⁶
Pause = Annotated[float, Bounds(0, 3600)]  # float, 0 to 3,600
Temperature = Annotated[float, Bounds(1e-4, 1000)]  # float, 0.0001 to 1,000
Probability = Annotated[float, Bounds(0, 1)]  # float, 0 ≤ x ≤ 1
PositiveProbability = Annotated[float, Bounds(0, 1, open_low=True)]  # float, 0 < x ≤ 1
ProbabilityBelowOne = Annotated[float, Bounds(0, 1, open_high=True)]  # float, 0 ≤ x < 1


def show_bound(number: float) -> str:
    """Return a bound as errors show it."""
    return f"{number:g}" if isinstance(number, float) else str(number)


@functools.cache
def declared_numbers(kind: type) -> dict[str, tuple[type, bool, Bounds | None]]:
    """Return the fields of a dataclass that hold a number, or true or false.

    Each has its type, whether None is allowed, and its bounds, or None without any.
    """
    found: dict[str, tuple[type, bool, Bounds | None]] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        parts = [part for part in get_args(hint) if part is not type(None)]
        optional = get_origin(hint) is not Annotated and type(None) in get_args(hint)
        bare = parts[0] if optional and len(parts) == 1 else hint
        base, *marks = get_args(bare) if get_origin(bare) is Annotated else (bare,)
        if base in KINDS:
            found[name] = base, optional, next((mark for mark in marks if isinstance(mark, Bounds)), None)
    return found


def check_bounds(options: object) -> None:
    """Raise `FieldError` for a field of a dataclass that is out of its bounds."""
    for name in declared_numbers(type(options)):
        check_number(type(options), name, getattr(options, name))


def check_number(kind: type, name: str, value: object) -> None:
    """Raise `FieldError` if a value of a field of `kind` is out of its bounds."""
    base, optional, bounds = declared_numbers(kind).get(name, (None, True, None))
    if base is None or (value is None and optional):
        return
    wanted: str | None = KINDS[base]
    if isinstance(value, bool):
        wanted = None if base is bool else wanted
    elif (isinstance(value, int) and base is not bool) or (isinstance(value, float) and base is float):
        wanted = (bounds or WIDEST[base]).violation(value)
    if wanted is not None:
        raise FieldError(f"{name} is {show_value(value)}, but must be {wanted}.")
