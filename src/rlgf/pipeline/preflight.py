"""Checks of a config, its prompts and its guide before training.

Every error message says what to change.
"""

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlgf.algorithms.guided import Algorithm
from rlgf.config.schema import Config
from rlgf.config.specs import load_object
from rlgf.data.hub import is_local_name, path_exists
from rlgf.data.tokenization import Codec
from rlgf.errors import ConfigError, TrainingError, unknown
from rlgf.evaluation.best_of_n import MAX_SAMPLES
from rlgf.evaluation.chat_judge import load_template
from rlgf.generation.openai.client import parse_spec
from rlgf.guides.base import CompletionRequest, Guide, query_guide
from rlgf.guides.human import HumanGuide
from rlgf.guides.local import FunctionGuide, guide_model_path
from rlgf.models import lora
from rlgf.models.critic import require_lora_critic
from rlgf.models.language_model import VALUE_HEAD
from rlgf.models.loading import load_tokenizer, max_length_of, quantization_config_4bit, require_language_model
from rlgf.pipeline.reward_model_stage import check_preferences
from rlgf.pipeline.stages import guide_task
from rlgf.rewards.build import check_reward_names, missing_rule_error
from rlgf.runs.tracking import check_trackers
from rlgf.tasks.base import Task, task_options
from rlgf.tasks.registry import task_definition
from rlgf.types import GUIDE, POLICY, Prompt

JUDGES = ("preferences", "model:PATH", "server:MODEL@URL")
GUIDES = ("sft", "trained", "model:PATH", "run:DIR", "server:MODEL@URL", "human", "references", "python:module:name")


def check(config: Config) -> Algorithm:
    """Validate a config without loading data or models, and return its algorithm.

    Raises `ConfigError` for an invalid config.
    """
    algorithm = config.algorithm.build()
    kind = task_definition(config.task)
    task_options(config.task, kind.options)
    if kind.needs_data and config.task.data is None:
        raise ConfigError(
            f"task '{config.task.name}' needs data: give --data with a Hub name or a folder of .jsonl[.gz] files."
        )
    if not kind.needs_data and config.task.data is not None:
        raise ConfigError(f"task '{config.task.name}' makes its own data: leave out --data, or choose another task.")
    check_trackers(config.runtime.trackers)
    _check_judges(config)
    spec = config.guide.spec
    if spec not in ("sft", "trained", "references", "human") and not spec.startswith(("model:", "run:", "server:", "python:")):
        raise unknown("guide", spec, GUIDES)
    if spec == "references":
        require_continuation(algorithm, False, "references")
    if spec.startswith("server:"):
        parse_spec(spec)
        require_continuation(algorithm, config.guide.continuation != "none", spec)
    if spec.startswith("python:"):
        require_continuation(algorithm, FunctionGuide(load_object(spec, "guide")).capabilities.can_continue, spec)
    if spec == "trained":
        task_options(guide_task(config), kind.options)
        if not (config.guide.sft.steps or config.guide.sft.epochs):
            raise ConfigError("guide 'trained' has guide.sft.steps and guide.sft.epochs 0: set one, or choose another guide.")
    try:
        torch.device(config.runtime.device)
    except RuntimeError:
        raise ConfigError(f"runtime.device is '{config.runtime.device}': choose cpu, cuda or cuda:0.") from None
    _check_offload(config)
    _check_adapters(config)
    if config.evaluation.best_of > MAX_SAMPLES:
        raise ConfigError(f"evaluation.best_of is {config.evaluation.best_of}: choose at most {MAX_SAMPLES:,}.")
    if config.lora.load_in_4bit and torch.device(config.runtime.device).type == "cpu":
        # On a CPU bitsandbytes packs weights for inference, without gradients.
        raise ConfigError(
            "lora.load_in_4bit needs a GPU, as bitsandbytes computes no gradients on a CPU: set runtime.device=cuda."
        )
    if config.lora.load_in_4bit:
        quantization_config_4bit(config.runtime.device)
    return algorithm


def check_to_train(config: Config) -> Algorithm:
    """Validate a training config; raise if a local path does not exist.

    Includes `check`, and returns the algorithm as well.
    """
    algorithm = check(config)
    if "task" in config.reward.names and not task_definition(config.task).has_builtin_reward:
        raise missing_rule_error(config.task.name)
    if config.guide.spec == "human" and needs_guide(algorithm) and not config.guide.endpoint.offline and has_no_terminal():
        raise ConfigError("the guide 'human' is asked at a terminal, and there is none: run the same command in one.")
    guide = guide_model_path(config.guide.spec) if needs_guide(algorithm) or config.distill.num_completions else None
    pairs = config.preferences.data if "preferences" in (*config.reward.names, config.judge.spec) else None
    named = [
        ("task.data", config.task.data), ("preferences.data", pairs), ("policy", config.policy),
        ("model.path", config.model.path), ("critic.path", config.critic.path), ("guide.spec", guide),
        *(("judge.spec", name) for name in judge_names(config)),
        *(("reward.path", name) for name in config.reward.names if not name.startswith("python:")),
    ]  # fmt: skip
    for field, name in named:
        if name and is_local_name(name) and not path_exists(name):
            raise ConfigError(f"{field} names '{name}', but there is no such file or folder: mend the name.")
    return algorithm


def has_no_terminal() -> bool:
    """Return whether standard input is closed or the null device.

    A file or a pipe may contain answers, so it counts as a terminal.
    """
    try:
        return not sys.stdin.isatty() and stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):
        return True


def _check_adapters(config: Config) -> None:
    """Raise if adapters cannot be trained.

    This is so without their library, on base weights that are not stored anywhere, and with a
    distilled policy that is a full model.
    """
    pairs = "preferences" in (*config.reward.names, config.judge.spec) and config.preferences.lora.rank > 0
    if config.lora.rank or pairs:
        lora.require_peft()
    given = config.policy is not None and lora.is_adapter_folder(config.policy)
    if config.distill.num_completions and config.lora.rank and not config.lora.in_sft and not given:
        raise ConfigError("a distilled policy is a whole model here, and adapters share one: set lora.in_sft=true.")
    shapes = [("model", config.model)] if not config.policy else []
    shapes += [("guide.model", config.guide.model)] if config.guide.spec == "trained" else []
    for name, shape in shapes:
        if config.lora.in_sft and not shape.path and not (config.pretrain.steps or config.pretrain.epochs):
            raise ConfigError(
                f"lora.in_sft trains an adapter on a model that is there, and {name} is a new one: give {name}.path, or set "
                "pretrain.steps."
            )


def _check_offload(config: Config) -> None:
    """Raise if a model without separate weights on a GPU is to be offloaded."""
    offload, shared = config.runtime.offload, config.lora.rank > 0
    if offload and torch.device(config.runtime.device).type == "cpu":
        raise ConfigError("runtime.offload frees a GPU's memory, and runtime.device is the CPU: leave it out.")
    if "reference" in offload and shared:
        raise ConfigError("with adapters the reference has no weights of its own to offload: leave it out of runtime.offload.")
    if "critic" in offload and config.critic.kind != "separate":
        raise ConfigError(
            f"a critic of kind '{config.critic.kind}' reads with the policy's weights: leave it out of runtime.offload."
        )


def _check_judges(config: Config) -> None:
    """Raise if a reward model or judge has no training data, or the judge is unknown."""
    spec = config.judge.spec
    if "preferences" in (*config.reward.names, spec):
        check_preferences(config)
    if spec is None:
        return
    if spec.startswith("server:"):
        parse_spec(spec, "judge")
        load_template(config.judge.template)
    elif spec != "preferences" and not spec.startswith("model:"):
        raise unknown("judge", spec, JUDGES)


def training_warnings(algorithm: Algorithm) -> list[str]:
    """Return warnings for valid algorithms that leave a token or value untrained."""
    found: list[str] = []
    for phase in algorithm.phases:
        if phase.rollin == POLICY and phase.beta == 1.0:
            found.append("with beta = 1 V^g of the prompt is never fitted, though the first token needs it: choose beta < 1")
        if phase.rollin == GUIDE and phase.beta == 1.0 and phase.switch == "paper":
            found.append("with beta = 1 and switch 'paper' the first token is never trained: choose beta < 1 or 'uniform'")
        if phase.rollin == POLICY and phase.switch == "paper":
            found.append("with switch 'paper' the last token is never trained where the guide finishes: choose 'uniform'")
    return found


def needs_guide(algorithm: Algorithm) -> bool:
    """Return whether an algorithm queries a guide in any phase."""
    return algorithm.needs_guide_rollin or algorithm.needs_guide_rollout


def require_continuation(algorithm: Algorithm, can_continue: bool, spec: str) -> None:
    """Raise if the algorithm needs a guide that can continue a prefix, and this cannot."""
    if algorithm.needs_guide_rollout and not can_continue:
        raise ConfigError(
            f"guide '{spec}' cannot finish a prefix that another has written, which {algorithm.title} asks of it: "
            "choose ppo_pp, or a guide that can."
        )


def check_models(config: Config, tokenizer: Any, context: int) -> None:
    """Raise if a named model cannot be used, from configs and tokenizers alone."""
    path = guide_model_path(config.guide.spec)
    if path is not None:
        _check_guide_model(path, load_tokenizer(path), max_length_of(path), tokenizer, context)
    if config.guide.spec == "trained" and config.guide.model.path is None:
        _check_guide_model("trained", tokenizer, config.guide.model.max_length, tokenizer, context)
    check_reward_names((*config.reward.names, *judge_names(config)))
    check_base(config, tokenizer)
    _check_critic(config)
    policy = config.policy
    if policy is not None and lora.is_adapter_folder(policy):
        require_language_model(policy)
        if not lora.is_pure_lora(policy):
            raise ConfigError(
                f"the adapter in {policy} is not only LoRA layers in adapter_model.safetensors and cannot be trained on "
                "here: make it a whole model with `rlgf merge`, and give that."
            )


def judge_names(config: Config) -> tuple[str, ...]:
    """Return the reward model that judges, by its name as a reward, in a tuple.

    The tuple is empty if there is no judge, or if it is a chat model.
    """
    spec = config.judge.spec or ""
    return (spec.removeprefix("model:"),) if spec.startswith("model:") or spec == "preferences" else ()


def check_base(config: Config, tokenizer: Any) -> None:
    """Raise if the model before SFT lacks tokens of the policy's vocabulary."""
    wanted = config.evaluation.output_perplexity or "zero_shot" in config.evaluation.baselines
    path = config.model.path
    if not (wanted and config.policy and path):
        return
    known = load_tokenizer(path).get_vocab()
    if not tokenizer.get_vocab().items() <= known.items():
        raise ConfigError(
            f"model.path '{path}', the model before SFT, has another vocabulary than the policy '{config.policy}': give the "
            "policy's own base, or set evaluation.output_perplexity=false and leave zero_shot out of evaluation.baselines."
        )


def _check_critic(config: Config) -> None:
    """Raise if the critics cannot be initialized as configured."""
    critic, policy = config.critic, config.policy
    if critic.path is not None:
        folder = Path(critic.path).expanduser()
        if critic.kind == "separate":
            max_length_of(critic.path)
        elif critic.kind == "lora":
            require_lora_critic(critic.path)
        elif critic.kind == "value_head" and not (folder / VALUE_HEAD).is_file():
            raise ConfigError(f"critic.path '{critic.path}' holds no {VALUE_HEAD}: give the folder of a critic.")
        return
    trained = not policy and config.lora.in_sft and bool(config.sft.steps or config.sft.epochs)
    if critic.kind == "separate" and (trained or (policy is not None and lora.is_adapter_folder(policy))):
        raise ConfigError(
            "critic.kind=separate is a whole model that begins as the policy, and the policy is an adapter: set "
            "critic.kind=lora or trunk, or name a whole model with critic.path."
        )


def _check_guide_model(name: str, tokenizer: Any, context: int, policy_tokenizer: Any, policy_context: int) -> None:
    """Raise if a guide with the policy's vocabulary has a shorter context.

    With another tokenizer, lengths are checked when the guide is queried.
    """
    if tokenizer.get_vocab() == policy_tokenizer.get_vocab() and context < policy_context:
        raise ConfigError(f"guide '{name}' reads {context} tokens, the policy {policy_context}: choose a longer one.")


def check_lengths(codec: Codec, context: int, task: Task, config: Config) -> int:
    """Return the number of tokens of the longest prompt plus completion.

    Raises `ConfigError` for empty prompts, and for prompts that leave no room for a completion.
    """
    room, longest = context if codec.is_encoder_decoder else context - config.task.max_new_tokens, 0
    for split in ("train", "validation", "test"):
        prompts: Sequence[Prompt] = getattr(task, split)
        if not prompts:
            raise ConfigError(f"task '{task.name}' has no {split} prompts: its data needs at least one.")
        for number, length in enumerate(map(len, codec.prompts(prompts)), 1):
            if length == 0:
                raise ConfigError(f"task '{task.name}', {split} prompt {number} is empty: remove the row.")
            longest = max(longest, length)
            if length > room:
                raise ConfigError(
                    f"task '{task.name}', {split} prompt {number} has {length} tokens; with {config.task.max_new_tokens} new "
                    f"ones it exceeds the model's context of {context}: shorten the prompts or task.max_new_tokens."
                )
    return longest + config.task.max_new_tokens


def probe_guide(guide: Guide, algorithm: Algorithm, codec: Codec, task: Task, config: Config) -> None:
    """Query a guide on a few prompts before training; raise if it fails.

    Continuations are tested if the algorithm needs them. A human guide is not probed, as the
    completions are not used.
    """
    if isinstance(guide, HumanGuide):
        return
    requests: list[CompletionRequest] = []
    for index, prompt in enumerate(task.validation[:2]):
        ids = codec.prompt(prompt)
        budget = config.task.max_new_tokens
        requests.append(CompletionRequest(prompt, ids, "", [], budget, config.task.min_new_tokens, index, config.seed))
        if algorithm.needs_guide_rollout and budget > 1:
            begun = (codec.response(prompt.references[0]) if prompt.references else ids)[:1]
            text = codec.decode([ids], [begun])[0]
            minimum = max(0, config.task.min_new_tokens - 1)
            requests.append(CompletionRequest(prompt, ids, text, begun, budget - 1, minimum, index, config.seed))
    try:
        query_guide(guide, requests)
    except TrainingError as error:
        raise ConfigError(f"probe: {error}") from error.__cause__
