"""Bounds on the numbers of a config, and conditions between them."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from rlgf.config.flatten import flatten, to_dict
from rlgf.config.sections import (
    EndpointConfig,
    GuideConfig,
    RewardConfig,
)
from rlgf.errors import ConfigError, unknown

AT_LEAST_ONE = """
    task.max_new_tokens ppo.iterations ppo.completions_per_iteration ppo.samples_per_prompt ppo.epochs ppo.minibatch_size
    ppo.mle_batch evaluation.prompts evaluation.final_prompts runtime.checkpoint_every
    model.layers model.width model.heads model.max_length
    guide.model.layers guide.model.width guide.model.heads guide.model.max_length
    pretrain.batch_size sft.batch_size distill.batch_size guide.sft.batch_size preferences.training.batch_size
    preferences.lora_alpha
"""
NOT_NEGATIVE = """
    ppo.learning_rate ppo.weight_decay ppo.mle_coefficient critic.learning_rate critic.value_coefficient
    critic.warmup_iterations kl.coefficient kl.loss_coefficient evaluation.every runtime.threads reward.clip model.vocabulary
    runtime.token_budget
    lora.rank
    pretrain.learning_rate pretrain.steps pretrain.epochs pretrain.max_examples sft.learning_rate
    sft.steps sft.epochs sft.max_examples
    distill.learning_rate distill.steps distill.epochs distill.num_completions
    guide.sft.learning_rate guide.sft.steps guide.sft.epochs guide.sft.max_examples
    preferences.training.learning_rate preferences.training.steps preferences.training.epochs preferences.training.max_examples
    preferences.lora_rank preferences.min_words evaluation.best_of
"""
ABOVE_ZERO = """
    lora.alpha
    ppo.clip_range ppo.adam_epsilon ppo.max_grad_norm kl.target kl.horizon critic.value_clip
"""
UNIT_INTERVAL = "algorithm.beta_guide algorithm.beta_policy ppo.gamma ppo.gae_lambda preferences.lora_dropout"
BOUNDS: list[tuple[str, Callable[[float], bool], str]] = [  # nan satisfies none of them
    (AT_LEAST_ONE, lambda value: value >= 1, "must be at least 1"),
    (NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "must be a number that is not negative"),
    (ABOVE_ZERO, lambda value: value > 0, "must be above 0"),
    (UNIT_INTERVAL, lambda value: 0 <= value <= 1, "must lie within [0, 1]"),
    ("seed", lambda value: 0 <= value < 2**63, "must lie within [0, 2^63)"),
]


# in headers
SECRET_NAME = re.compile(r"key|token|secret|auth(?!or\b)|password|cookie|credential", re.IGNORECASE)
SECRET_FIELD = re.compile(  # in request bodies, where max_tokens is allowed
    r"api[-_]?key|secret|password|authorization|credential|(access|auth|bearer|session)[-_]?token", re.IGNORECASE
)
SECRET_VALUE = re.compile(r"(bearer|basic)\s|sk-|hf_|gh[opsu]_", re.IGNORECASE)  # under any name


def check_numbers(config: Any) -> None:
    """Raise for numbers out of bounds, first single ones, then pairs of them."""
    flat = flatten(to_dict(config))
    for keys, holds, words in BOUNDS:
        for key in keys.split():
            value = flat[key]
            if value is not None and not holds(value):
                raise ConfigError(f"{key} is {value:g}, but {words}.")
    _check_sampling(config)
    _check_pairs(config)
    _check_guide(config.guide)
    _check_reward(config.reward)
    _check_endpoint("judge.endpoint", config.judge.endpoint)


def _check_sampling(config: Any) -> None:
    decodings = {"sampling": config.sampling, "guide.sampling": config.guide.sampling}
    decodings["evaluation.sampling"] = config.evaluation.sampling or config.sampling
    for name, sampling in decodings.items():
        if not sampling.temperature > 0 or sampling.top_k < 0 or not 0.0 < sampling.top_p <= 1.0 or sampling.num_beams < 1:
            raise ConfigError(
                f"{name} needs temperature > 0, top_k >= 0, 0 < top_p <= 1 and num_beams >= 1; it has {sampling}."
            )
    if not config.sampling.is_stochastic:
        how = "greedy" if config.sampling.greedy else "num_beams"
        raise ConfigError(f"sampling.{how} is for evaluation: a policy that does not sample cannot learn from its choices.")


def _check_reward(reward: RewardConfig) -> None:
    for name, weight in reward.weights.items():
        if not math.isfinite(weight):
            raise ConfigError(f"reward.weights.{name} is {weight}, but must be a number.")
    for name in reward.options:
        if name not in reward.names:
            raise unknown("reward in reward.options", name, reward.names)


def _check_guide(guide: GuideConfig) -> None:
    if guide.instruction is not None and "{text}" not in guide.instruction:
        raise ConfigError("guide.instruction does not say where the text goes that is to be continued: put {text} there.")
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
    if not 0 <= task.min_new_tokens <= task.max_new_tokens:
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
    if not 0.0 <= lora.dropout < 1.0:
        raise ConfigError(f"lora.dropout is {lora.dropout:g}, but must lie within [0, 1).")
    if config.runtime.precision == "bf16" and ppo.old_log_probs == "sampler":
        raise ConfigError(
            "runtime.precision is bf16, in which sampling and training disagree by percents: set ppo.old_log_probs=recompute."
        )
