"""Conditions between the fields of a config, and a search for credentials in it."""

import functools
import math
from collections.abc import Generator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from rlgf.config.sections import EndpointConfig, GuideConfig, RewardConfig
from rlgf.credentials import (
    REFERENCE,
    VARIABLE,
    find_labels,
    is_credential,
    is_credential_as_name,
    is_credential_for_server,
    is_credential_in_body,
    is_credential_in_header,
    is_credential_in_url,
)
from rlgf.errors import ConfigError, unknown
from rlgf.types import SamplingParams
from rlgf.untrusted_text import replace_surrogates, shorten

MAX_DEPTH, MAX_VALUES = 32, 20_000  # of options, nested and in all
MAX_TEXT = 1_000_000  # characters of one text
SECRET = "is written out, but holds what looks like a secret, and secrets come from the environment"
TO_REFERENCE = "write $NAME of a variable"


def check_config(config: Any) -> None:
    """Raise for fields that contradict each other; single values are checked by their fields."""
    for role in ("guide", "judge"):
        section = getattr(config, role)
        _check_endpoint(f"{role}.endpoint", section.endpoint)
        _check_address(f"{role}.spec", section.spec or "")
    _check_values(config)
    _check_sampling(config.sampling)
    _check_pairs(config)
    _check_guide(config.guide)
    _check_reward(config.reward)


def walk(value: Any, names: tuple[str, ...] = ()) -> Generator[tuple[tuple[str, ...], Any]]:
    """Yield every single value of a config, with the names that lead to it.

    Sections, mappings and lists are entered. Raises `ConfigError` for options that are nested too
    deeply, too many, or have keys that are not texts.
    """
    stack, count = [(names, value)], 0
    while stack:
        path, item = stack.pop()
        count += 1
        if len(path) > MAX_DEPTH or count > MAX_VALUES:
            raise ConfigError(f"{_field(path[:3])} holds lists or mappings nested too deeply, or too many: give fewer.")
        if is_dataclass(item) and not isinstance(item, type):
            inner: Any = [(field.name, getattr(item, field.name)) for field in fields(item)]
        elif isinstance(item, Mapping):
            inner = list(cast("Mapping[Any, Any]", item).items())
        elif isinstance(item, list | tuple):
            inner = [(str(number), part) for number, part in enumerate(cast("list[Any]", item))]
        else:
            yield path, item
            continue
        for name, part in reversed(inner):
            if not isinstance(name, str):
                raise ConfigError(f"{_field(path)} has a key that is not a text: quote it.")
            stack.append(((*path, name), part))


def _field(names: tuple[str, ...]) -> str:
    """Return a field as it is typed on the command line."""
    shown = ("***" if is_credential_as_name(name) else shorten(name, 40) for name in names)
    return shorten(".".join(shown), 160)


def _check_values(config: Any) -> None:
    """Raise for a value that no file can hold or that looks like a credential."""
    for names, value in walk(config):
        problem = _problem(value)
        if problem is None and any(map(_is_credential, names)):
            problem = f"has a key that {SECRET}: keep it out of the config"
        if problem is not None:
            raise ConfigError(f"{_field(names)} {problem}.")


def _problem(value: Any) -> str | None:
    """Return why a config cannot have a value, or None."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value:g}, but must be a finite number"
    if isinstance(value, int | float):
        return None if abs(value) < 2**63 else "is a number that is too large: give one below 2^63"
    if not isinstance(value, str):
        return f"is a {type(value).__name__}, but must be text, a number, true or false, a list or a mapping"
    if "\0" in value or len(value) > MAX_TEXT or replace_surrogates(value) != value:
        return f"has a NUL, half of a character or over {MAX_TEXT:,} characters: change the text"
    return f"{SECRET}: keep it out of the config" if _is_credential(value) else None


_is_credential = functools.lru_cache(maxsize=4096)(is_credential)  # of the same few texts, config after config


def _check_sampling(sampling: SamplingParams) -> None:
    if not sampling.is_stochastic:
        how = "greedy" if sampling.greedy else "num_beams"
        raise ConfigError(f"sampling.{how} is for evaluation: a policy that does not sample cannot learn from its choices.")


def _check_reward(reward: RewardConfig) -> None:
    for name in reward.options:
        if name not in reward.names:
            raise unknown("reward in reward.options", name, reward.names)


def _check_guide(guide: GuideConfig) -> None:
    if guide.instruction is not None and "{text}" not in guide.instruction:
        raise ConfigError("guide.instruction does not say where the text to continue goes: put {text} there.")
    if guide.continuation == "token_ids" and (guide.stop or guide.endpoint.thinking_tokens):
        raise ConfigError(
            "guide.stop and guide.endpoint.thinking_tokens are about text, but guide.continuation is token_ids: leave them out."
        )


def _check_endpoint(section: str, endpoint: EndpointConfig) -> None:
    if endpoint.max_cost is not None and (endpoint.price_input is None or endpoint.price_output is None):
        raise ConfigError(
            f"{section}.max_cost needs {section}.price_input and {section}.price_output (per million tokens): give both."
        )
    if 0 < endpoint.requests_per_minute < 0.001:
        raise ConfigError(f"{section}.requests_per_minute must be 0 (no limit) or at least 0.001.")
    if not VARIABLE.fullmatch(endpoint.api_key_env) or is_credential_for_server(endpoint.api_key_env):
        raise ConfigError(
            f"{section}.api_key_env must be the name of an environment variable, not a key: export the key under a name, and "
            "give the name."
        )
    for name, value in endpoint.extra_headers.items():
        if is_credential_in_header(name, value) or is_credential_as_name(name):
            raise ConfigError(f"{_field((section, 'extra_headers', name))} {SECRET}: {TO_REFERENCE}.")
        _check_references(f"{section}.extra_headers.{shorten(name, 40)}", value)
    leaves = dict(walk(endpoint.extra_body, (section, "extra_body")))
    for names, value in leaves.items():
        own = names[2:]
        if is_credential_in_body([*own, *find_labels(leaves, names)], value) or any(map(is_credential_as_name, own)):
            raise ConfigError(f"{_field(names)} {SECRET}: {TO_REFERENCE}.")
        if isinstance(value, str):
            _check_references(_field(names), value)


def _check_references(field: str, value: str) -> None:
    """Raise for a `$NAME` whose name looks like the credential itself."""
    for found in REFERENCE.finditer(value):
        if is_credential_for_server(found[1] or found[2] or ""):
            raise ConfigError(f"{field} has a secret after the $: write $NAME of an environment variable that holds it.")


def _check_address(field: str, spec: str) -> None:
    """Raise for a credential in the address of a server."""
    if not spec.startswith("server:"):
        return
    model, _, rest = spec.removeprefix("server:").partition("@http")
    url = f"http{rest}"
    try:
        parts = urlsplit(url)
    except ValueError:  # as parse_spec says where the server is used
        return
    if parts.query or parts.fragment:
        return  # the same
    if is_credential_in_url(url) or is_credential(model):
        raise ConfigError(f"{field} {SECRET}: {TO_REFERENCE} in its place.")
    _check_references(field, url)


def _check_pairs(config: Any) -> None:
    ppo, task = config.ppo, config.task
    for name, shape in {"model": config.model, "guide.model": config.guide.model}.items():
        if shape.width % shape.heads:
            raise ConfigError(f"{name}.width is {shape.width}, but must be a multiple of {name}.heads = {shape.heads}.")
    if task.min_new_tokens > task.max_new_tokens:
        raise ConfigError(
            f"task.min_new_tokens is {task.min_new_tokens}, but must lie within [0, {task.max_new_tokens}] (max_new_tokens)."
        )
    if ppo.completions_per_iteration % ppo.samples_per_prompt:
        raise ConfigError(
            f"ppo.completions_per_iteration ({ppo.completions_per_iteration}) must be a multiple of ppo.samples_per_prompt "
            f"({ppo.samples_per_prompt})."
        )
    algorithm = config.algorithm.build()
    if algorithm.baseline is not None and ppo.samples_per_prompt < 2:
        raise ConfigError(
            f"{algorithm.title} compares the completions of a prompt, and ppo.samples_per_prompt is {ppo.samples_per_prompt}: "
            "set it to 2 or more, for example 8."
        )
    lora = config.lora
    if config.critic.kind == "lora" and not lora.rank:
        raise ConfigError("critic.kind is 'lora', but lora.rank is 0: set lora.rank, or choose another critic.kind.")
    if (lora.in_sft or lora.load_in_4bit) and not lora.rank:
        raise ConfigError("lora.in_sft and lora.load_in_4bit need adapters: set lora.rank.")
    if config.runtime.precision == "bf16" and ppo.old_log_probs == "sampler":
        raise ConfigError(
            "runtime.precision is bf16, in which sampling and training disagree by percents: set ppo.old_log_probs=recompute."
        )
