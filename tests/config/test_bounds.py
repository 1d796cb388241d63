"""Bounds of numbers: every field has them, and what is out of them or no number is refused with the field's name."""

import dataclasses
import inspect
import math
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import typer

from rlgf.algorithms.registry import ALGORITHMS
from rlgf.bounds import Bounds, Exactly, check_bounds
from rlgf.cli.app import app as cli
from rlgf.cli.app import check_app
from rlgf.config.base import read_options
from rlgf.config.loading import from_dict, override
from rlgf.config.schema import Config
from rlgf.config.sections import TaskConfig
from rlgf.errors import ConfigError, FieldError
from rlgf.tasks.base import task_options
from rlgf.tasks.registry import TASKS
from rlgf.text_metrics.as_rewards import FIXED_ARGUMENTS, TEXT_FUNCTIONS, read_text_options
from rlgf.text_metrics.score import Options
from rlgf.types import SamplingParams

MAX_LENGTH = 300  # characters of a refusal


@dataclasses.dataclass(frozen=True)
class Number:
    """A number that a user may give: where it belongs, its type, and its annotations."""

    key: str
    base: type
    marks: tuple[Any, ...]
    section: Any  # the dataclass that declares it, or None
    name: str

    @property
    def bounds(self) -> Bounds | None:
        return next((mark for mark in self.marks if isinstance(mark, Bounds)), None)


def leaves(hint: Any) -> Iterator[tuple[type, tuple[Any, ...]]]:
    """Every number in an annotation, also those in lists and mappings, with what is annotated."""
    bare, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if bare in (int, float, bool):
        yield bare, tuple(marks)
    for part in get_args(bare):
        yield from leaves(part)


def numbers_of(kind: Any, prefix: str = "") -> Iterator[Number]:
    """Every number of a dataclass and of the sections in it."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner = [part for part in (hint, *get_args(hint)) if isinstance(part, type) and dataclasses.is_dataclass(part)]
        for section in inner:
            yield from numbers_of(section, f"{prefix}{name}.")
        for base, marks in leaves(hint):
            yield Number(prefix + name, base, marks, kind, name)


FIELDS = list(numbers_of(Config))
OPTIONS = [
    *(number for name, kind in ALGORITHMS.items() for number in numbers_of(kind, f"algorithm.options.{name}.")),
    *(number for kind in TASKS.values() for number in numbers_of(kind.options, "task.options.")),
    *numbers_of(Options, "evaluation.metric_options."),
]
METRICS = [
    Number(f"reward.options.{name}.{key}", base, marks, None, key)
    for name, make in TEXT_FUNCTIONS.items()
    for key, parameter in inspect.signature(make).parameters.items()
    if key not in FIXED_ARGUMENTS
    for base, marks in leaves(parameter.annotation)
]
MAPPINGS = {"reward.weights"}  # whose values are numbers
ALL = [*FIELDS, *OPTIONS, *METRICS]


def nonsense(number: Number) -> list[Any]:
    """Values that no number may have."""
    found: list[Any] = [math.nan, math.inf, -math.inf, 1e308, -1e308, 2**63, 10**400, -(10**400), "3", "1e-4", "x" * 5_000,
                        "\x1b[31m3", [1], {"a": 1}, b"1"]  # fmt: skip
    if number.base is bool:
        return [*found, 0, 1, 1.0, "true", "yes"]
    if number.base is int:
        found += [1.5, 1.0, 1e30]
    assert number.bounds is not None
    below, above = number.bounds.low - 1, number.bounds.high + 1
    return [*found, True, False, number.base(below), number.base(above)]


def test_every_number_has_finite_bounds_where_it_is_declared() -> None:
    assert len(FIELDS) > 110
    assert len(OPTIONS) > 20
    assert len(METRICS) > 8
    for number in ALL:
        if number.base is bool:
            assert any(isinstance(mark, Exactly) for mark in number.marks), number.key
        else:
            assert number.bounds is not None, f"{number.key} has no bounds"
            low, high = number.bounds.low, number.bounds.high
            assert math.isfinite(low), number.key
            assert math.isfinite(high), number.key
            assert low < high, number.key


def refusal(give: Any, value: Any) -> str:
    """The message with which a value is refused."""
    try:
        give(value)
    except ConfigError as error:
        return str(error)
    return ""


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("section", sorted({number.key.partition(".")[0] for number in FIELDS}))
def test_nonsense_is_refused_with_the_name_as_it_is_typed(section: str) -> None:
    for number in FIELDS:
        if number.key.partition(".")[0] != section:
            continue
        key = f"{number.key}.a" if number.key in MAPPINGS else number.key
        for value in nonsense(number):
            message = refusal(lambda value, key=key: from_dict(nested(key, value), "command line"), value)
            assert f"command line: {key}" in message, (key, value, message)
            assert len(message) <= MAX_LENGTH, key
            assert message.isprintable(), key


def test_nonsense_in_options_is_refused_with_the_name_as_it_is_typed() -> None:
    for number in OPTIONS:
        prefix = number.key.removesuffix(number.name)
        for value in nonsense(number):
            message = refusal(
                lambda value, n=number, p=prefix: read_options({n.name: value}, n.section, "command line", p), value
            )
            assert f"command line: {number.key} " in message, (number.key, value, message)
            assert len(message) <= MAX_LENGTH


def test_nonsense_in_options_of_metrics_is_refused_with_the_name_as_it_is_typed() -> None:
    for number in METRICS:
        name = number.key.split(".")[2]
        for value in nonsense(number):
            message = refusal(lambda value, n=number, name=name: read_text_options(name, {n.name: value}), value)
            assert f"{number.key} is " in message, (number.key, value, message)
            assert len(message) <= MAX_LENGTH


def test_the_bounds_themselves_are_accepted_unless_they_are_open() -> None:
    for number in [*FIELDS, *OPTIONS]:
        bounds = number.bounds
        if bounds is None or number.key in MAPPINGS:
            continue
        for value, is_open in ((bounds.low, bounds.open_low), (bounds.high, bounds.open_high)):
            made = refusal(lambda value, n=number: n.section(**{n.name: n.base(value)}), value)
            assert bool(made) == is_open or "switch" in number.key, (number.key, value, made)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"sft": {"adam_beta2": 2147483648}}, "sft.adam_beta2 is 2147483648, but must be below 1."),
        ({"model": {"init_std": -math.inf}}, "model.init_std is -inf, but must be a finite number."),
        ({"pretrain": {"warmup_steps": -1}}, "pretrain.warmup_steps is -1, but must be at least 0."),
        ({"reward": {"clip": math.inf}}, "reward.clip is inf, but must be a finite number."),
        ({"guide": {"endpoint": {"timeout_seconds": 1e308}}},
        "guide.endpoint.timeout_seconds is 1e+308, but must be at most 1e+06."),
        ({"evaluation": {"prompts": 1e30}}, "evaluation.prompts is 1e+30, but must be a whole number."),
        ({"ppo": {"mle_batch": 2**31}}, "ppo.mle_batch is 2147483648, but must be at most 1048576."),
        ({"ppo": {"epochs": True}}, "ppo.epochs is True, but must be a whole number."),
        ({"ppo": {"learning_rate": "1e-4"}}, "ppo.learning_rate is '1e-4', but must be a number."),
        ({"ppo": {"dropout": 1}}, "ppo.dropout is 1, but must be true or false."),
        ({"reward": {"weights": {"task": True}}}, "reward.weights.task is True, but must be a number."),
        ({"seed": 10**400}, "seed is a number of about 400 digits, but must be at most 9223372036854775807."),
    ],
)  # fmt: skip
def test_what_was_accepted_once_is_refused(typed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(typed, "command line")
    assert str(caught.value) == f"command line: {message}"


@pytest.mark.parametrize("value", [math.nan, "1", True, -1, 10**400, None, [1]])
def test_a_dataclass_made_in_python_code_has_the_same_bounds(value: Any) -> None:
    with pytest.raises(FieldError, match=r"^top_k is .*, but must be"):
        SamplingParams(top_k=value)
    with_beta = [kind for kind in ALGORITHMS.values() if any(f.name.startswith("beta") for f in dataclasses.fields(kind))]
    assert len(with_beta) == 5
    for kind in with_beta:
        field = next(field.name for field in dataclasses.fields(kind) if field.name.startswith("beta"))
        if value != 1 or value is True:
            with pytest.raises(FieldError, match=rf"^{field} is .*, but must be"):
                kind(**{field: value})


def test_options_of_a_user_are_bounded_even_where_their_class_has_no_bounds() -> None:
    @dataclasses.dataclass
    class Mine:
        """Options without bounds."""

        words: int = 3
        share: float | None = 0.5
        loud: bool = False

    config = TaskConfig("mine", options={"words": 4, "share": None})
    assert task_options(config, Mine) == Mine(4, None)
    for name, value in (("words", True), ("words", "3"), ("words", 2**70), ("share", math.nan), ("share", True), ("loud", 1)):
        with pytest.raises(ConfigError, match=rf"^task 'mine': task\.options\.{name} is .*, but must be"):
            task_options(TaskConfig("mine", options={name: value}), Mine)
    check_bounds(Mine())


def test_options_whose_class_fails_are_refused() -> None:
    @dataclasses.dataclass
    class Exits:
        """Options that end the program."""

        words: int = 3

        def __post_init__(self) -> None:
            raise SystemExit(0)

    with pytest.raises(ConfigError, match=r"task\.options cannot be read \(SystemExit: 0"):
        task_options(TaskConfig("mine", options={"words": 4}), Exits)


@pytest.mark.parametrize("value",
[{1: 2}, {"a": {1: 2}}, {"a": math.inf}, {"a": 10**30}, {"a": {1, 2}}, {"a": b"x"}, {"a": "\0"},
                                   {"a": "\ud800"}, {"a": object()}])  # fmt: skip
@pytest.mark.parametrize(
    "key", ["task.options", "guide.options", "reward.options", "evaluation.metric_options", "guide.endpoint.extra_body"]
)
def test_free_options_hold_what_a_file_can_hold(key: str, value: dict[Any, Any]) -> None:
    value = {"task": value} if key == "reward.options" else value
    with pytest.raises(ConfigError, match=key) as caught:
        override(Config(), [(key, value)], "command line")
    assert len(str(caught.value)) <= MAX_LENGTH


def test_options_that_hold_themselves_or_too_many_are_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    wide: Any = "x"
    for _ in range(3):
        wide = [wide] * 30
    deep: Any = "x"
    for _ in range(5_000):
        deep = {"a": deep}
    for value in (circle, wide, deep):
        with pytest.raises(ConfigError, match=r"guide\.endpoint\.extra_body.* nested too deeply, or too many"):
            override(Config(), [("guide.endpoint.extra_body", {"a": value})])


IN_CONFIGS = {"iterations", "seed", "beta", "alpha", "prompts"}
"""Numbers of the command line that become fields of a config, which has their bounds."""


def test_every_number_of_the_command_line_has_bounds() -> None:
    seen: list[str] = []
    for command in [*cli.registered_commands, *check_app.registered_commands]:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            option = next((mark for mark in get_args(hint) if isinstance(mark, typer.models.ParameterInfo)), None)
            if option is None or not any(base in (int, float) for base, _ in leaves(get_args(hint)[0])):
                continue
            seen.append(name)
            known = name in IN_CONFIGS and command.callback.__name__ != "show"
            assert option.min is not None or known or name == "iteration" or name in ("beta", "alpha"), (command.callback, name)
    assert {"jobs", "count", "best_of", "max_tokens", "bertscore_layers"} <= set(seen)
