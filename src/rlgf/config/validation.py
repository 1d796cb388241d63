"""Conditions between the fields of a config, and secrets that must not be in one."""

import re
from collections.abc import Mapping
from typing import Any

from rlgf.config.base import flatten
from rlgf.config.sections import EndpointConfig, GuideConfig, RewardConfig
from rlgf.errors import ConfigError, unknown
from rlgf.types import SamplingParams

# in headers
SECRET_NAME = re.compile(r"key|token|secret|auth(?!or\b)|password|cookie|credential", re.IGNORECASE)
SECRET_FIELD = re.compile(  # in request bodies, where max_tokens is allowed
    r"api[-_]?key|secret|password|authorization|credential|(access|auth|bearer|session)[-_]?token", re.IGNORECASE
)
SECRET_VALUE = re.compile(r"(bearer|basic)\s|sk-|hf_|gh[opsu]_", re.IGNORECASE)  # under any name


def check_config(config: Any) -> None:
    """Raise for fields that do not go together; the bounds of each stand on the field."""
    _check_sampling(config.sampling)
    _check_pairs(config)
    _check_guide(config.guide)
    _check_reward(config.reward)
    _check_endpoint("judge.endpoint", config.judge.endpoint)


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
    _check_endpoint("guide.endpoint", guide.endpoint)


def _check_endpoint(section: str, endpoint: EndpointConfig) -> None:
    if endpoint.max_cost is not None and (endpoint.price_input is None or endpoint.price_output is None):
        raise ConfigError(
            f"{section}.max_cost needs {section}.price_input and {section}.price_output (per million tokens): give both."
        )
    check_secrets(section, endpoint.extra_headers, endpoint.extra_body)


def check_secrets(section: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> None:
    """Raise for secrets written out in the settings of a server."""
    for name, value in headers.items():
        if (SECRET_NAME.search(name) or SECRET_VALUE.match(value)) and not value.startswith("$"):
            raise ConfigError(
                f"{section}.extra_headers.{name} is written out, but secrets come from the environment: write $NAME of a "
                "variable."
            )
    for name, value in flatten(body).items():
        if SECRET_FIELD.search(name) or (isinstance(value, str) and SECRET_VALUE.match(value)):
            raise ConfigError(
                f"{section}.extra_body.{name} looks like a secret, which would stay in files: use {section}.api_key_env or "
                f"{section}.extra_headers."
            )


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
    lora = config.lora
    if config.critic.kind == "lora" and not lora.rank:
        raise ConfigError("critic.kind is 'lora', but lora.rank is 0: set lora.rank, or choose another critic.kind.")
    if (lora.in_sft or lora.load_in_4bit) and not lora.rank:
        raise ConfigError("lora.in_sft and lora.load_in_4bit need adapters: set lora.rank.")
    if config.runtime.precision == "bf16" and ppo.old_log_probs == "sampler":
        raise ConfigError(
            "runtime.precision is bf16, in which sampling and training disagree by percents: set ppo.old_log_probs=recompute."
        )
