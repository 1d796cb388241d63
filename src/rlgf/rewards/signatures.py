"""The shapes of reward functions that are accepted, as functions of (prompts, completions)."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlgf.errors import ConfigError, RewardError, list_columns
from rlgf.types import Prompt, RewardFunction

EXPECTED = (
    "a reward is called as reward(prompts, completions) and may name columns of the rows after these two, or, as in TRL, as "
    "reward(completions, **columns); it returns one number for each completion"
)
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def bind_columns(function: Callable[..., Any]) -> RewardFunction:
    """Return a function of `prompts` and `completions` alone.

    Other arguments that `function` names receive a column of the rows, `references` those of each
    prompt, `columns` all columns of each prompt. A function in TRL's shape (`completions` is its
    first argument, or it has `**columns`) is called by keywords, with prompts as texts or messages
    and the replies to conversations as messages.

    Raises:
        ConfigError: the function has another shape.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature
        return function
    kinds = [parameter.kind for parameter in parameters.values()]
    positional = [name for name, parameter in parameters.items() if parameter.kind in POSITIONAL]
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds
    is_named = "completions" in parameters and parameters["completions"].kind in NAMED
    if is_named and (positional[:1] in ([], ["completions"]) or takes_all):
        return _by_keywords(function, parameters, takes_all)
    if len(positional) < 2 and inspect.Parameter.VAR_POSITIONAL not in kinds:
        name = getattr(function, "__name__", type(function).__name__)
        raise ConfigError(f"the reward {name}({', '.join(parameters)}) cannot be called: {EXPECTED}.")
    own = ("references", "columns")
    wanted = [
        name for name, parameter in parameters.items()
        if name not in positional[:2] and parameter.kind in NAMED
        and (name in own or parameter.default is inspect.Parameter.empty)
    ]  # fmt: skip
    if not wanted:
        return function

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> Sequence[float]:
        _require_columns(wanted, prompts, own)
        return function(prompts, texts, **{name: [_column(prompt, name) for prompt in prompts] for name in wanted})

    return reward


def _by_keywords(function: Callable[..., Any], parameters: Mapping[str, inspect.Parameter], takes_all: bool) -> RewardFunction:
    """Return a reward that calls a function in TRL's shape."""
    own = ("prompts", "completions", "references", "columns")
    required = [name for name, p in parameters.items() if p.kind in NAMED and p.default is inspect.Parameter.empty]

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> Sequence[float]:
        _require_columns(required, prompts, own)
        named = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        chosen = [name for name in (*named, "references") if takes_all or name in parameters]
        chosen += ["columns"] if "columns" in parameters and parameters["columns"].kind in NAMED else []
        values: dict[str, Any] = {name: [_column(prompt, name) for prompt in prompts] for name in chosen}
        if takes_all or "prompts" in parameters:
            values["prompts"] = [list(prompt.messages) if prompt.messages else prompt.text for prompt in prompts]
        values["completions"] = [_reply(prompt, text) for prompt, text in zip(prompts, texts)]
        return function(**values)

    return reward


def _reply(prompt: Prompt, text: str) -> Any:
    """Return a completion in TRL's form: a text or, in a conversation, messages."""
    return [{"role": "assistant", "content": prompt.strip_reply_prefix(text)}] if prompt.messages else text


def _column(prompt: Prompt, name: str) -> Any:
    """Return the value of a reward's argument for a prompt."""
    if name == "columns":
        return prompt.columns
    return prompt.columns.get(name, prompt.references if name == "references" else None)


def _require_columns(names: Sequence[str], prompts: Sequence[Prompt], own: Sequence[str]) -> None:
    """Raise `RewardError` for an argument that is no column of any row."""
    for name in names:
        if name not in own and not any(name in prompt.columns for prompt in prompts):
            known = list_columns(prompts[0].columns) if prompts and prompts[0].columns else "no others"
            raise RewardError(f"the reward takes '{name}', which is no column of the rows (they have {known}): {EXPECTED}.")
