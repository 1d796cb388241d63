"""Checks of a run, its prompts and its guide before training.

Every error message says what to change.
"""

import dataclasses
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlgf.algorithms.base import Algorithm
from rlgf.config.objects import PASSED
from rlgf.config.runtime import RuntimeConfig
from rlgf.config.sections import EvaluationConfig, TaskConfig
from rlgf.config.specs import GuideKind, JudgeKind
from rlgf.data.hub import is_local_name, path_exists
from rlgf.data.tokenization import Codec
from rlgf.errors import ConfigError, TrainingError
from rlgf.evaluation.best_of_n import MAX_SAMPLES
from rlgf.evaluation.chat_judge import load_template
from rlgf.evaluation.evaluate import text_metrics_of
from rlgf.generation.openai.client import parse_spec, require_environment
from rlgf.guides.base import CompletionRequest, Guide, query_guide
from rlgf.guides.human import HumanGuide
from rlgf.guides.local import as_guide
from rlgf.models import lora
from rlgf.models.critic import require_lora_critic
from rlgf.models.language_model import VALUE_HEAD
from rlgf.models.loading import load_tokenizer, max_length_of, quantization_config_4bit, require_language_model
from rlgf.pipeline.resolve import GuidePlan, JudgePlan, PolicyPlan, ResolvedRun, RewardPlan, TaskPlan
from rlgf.pipeline.reward_model_stage import check_preferences
from rlgf.rewards.build import check_reward_names, check_reward_options, check_reward_sources, missing_rule_error
from rlgf.runs.tracking import check_trackers
from rlgf.tasks.base import Task
from rlgf.types import GUIDE, POLICY, Prompt


def check(run: ResolvedRun) -> None:
    """Validate a run without loading data or models; raise `ConfigError` if it is invalid."""
    _check_task(run.task)
    _check_context(run.policy, run.task.config.max_new_tokens)
    check_trackers(run.trainer.runtime.trackers)
    check_reward_options(run.reward.config)
    if run.trainer.evaluation.metrics:
        text_metrics_of(run.trainer.evaluation)
    if run.reward.uses_preferences or run.judge.uses_preferences:
        check_preferences(run.reward.preferences)
    if run.reward.passed is None and run.reward.config.path.startswith(PASSED):
        raise passed_error("reward.path", run.reward.config.path)
    _check_judge(run.judge)
    _check_guide(run.guide, run.algorithm)
    _check_device(run.trainer.runtime, run.policy)
    _check_adapters(run)
    if run.trainer.evaluation.best_of > MAX_SAMPLES:
        raise ConfigError(f"evaluation.best_of is {run.trainer.evaluation.best_of}: choose at most {MAX_SAMPLES:,}.")


def check_to_train(run: ResolvedRun, unwritten: Sequence[str] = ()) -> None:
    """Validate a run before training; raise if a local path does not exist.

    Includes `check`. The paths `unwritten` are written after it.
    """
    check(run)
    _check_guide_object(run.guide, run.algorithm)
    check_reward_sources(run.reward.config)
    if "task" in run.reward.config.names and not run.task.definition.has_builtin_reward:
        raise missing_rule_error(run.task.name)
    guide, policy = run.guide, run.policy
    if guide.spec.kind == GuideKind.SERVER and guide.is_needed and not guide.config.endpoint.offline:
        require_environment(guide.spec.text, guide.config.endpoint)
    judge = run.judge
    if judge.spec is not None and judge.spec.kind == JudgeKind.SERVER and not judge.config.endpoint.offline:
        require_environment(judge.spec.text, judge.config.endpoint, "judge")
    asks = guide.spec.kind == GuideKind.HUMAN and run.algorithm.needs_guide and not guide.config.endpoint.offline
    if asks and has_no_terminal():
        raise ConfigError("the guide 'human' needs a terminal, and there is none: run the same command in one.")
    uses_pairs = run.reward.uses_preferences or run.judge.uses_preferences
    named = [
        ("task.data", run.task.config.data), ("preferences.data", run.reward.preferences.config.data if uses_pairs else None),
        ("policy", policy.path), ("model.path", policy.base.shape.path), ("critic.path", policy.critic.path),
        ("guide.spec", guide.model_path() if guide.is_needed else None), ("judge.spec", judge.reward_name),
        *(("reward.path", name) for name in run.reward.config.names if not name.startswith(("python:", PASSED))),
    ]  # fmt: skip
    for field, name in named:
        if name and name not in unwritten and is_local_name(name) and not path_exists(name):
            raise ConfigError(f"{field} names '{name}', but there is no such file or folder: fix the name.")


def passed_error(key: str, spec: str) -> ConfigError:
    """Return the error for an object that only Python code can pass."""
    return ConfigError(f"{key} is '{spec}', which Python code passed to rlgf.train: resume with the same call.")


def _check_context(policy: PolicyPlan, max_new_tokens: int) -> None:
    """Raise if a new model has no room for a completion."""
    shape = policy.base.shape
    if policy.path is None and shape.path is None and shape.architecture != "t5" and max_new_tokens >= shape.max_length:
        raise ConfigError(
            f"task.max_new_tokens is {max_new_tokens}, which with a prompt exceeds the model's context, model.max_length = "
            f"{shape.max_length}: lower task.max_new_tokens, or raise model.max_length."
        )


def _check_task(task: TaskPlan) -> None:
    if task.definition.needs_data and task.config.data is None:
        raise ConfigError(f"task '{task.name}' needs data: give --data with a Hub name or a folder of .jsonl[.gz] files.")
    if not task.definition.needs_data and task.config.data is not None:
        raise ConfigError(f"task '{task.name}' generates its own data: leave out --data, or choose another task.")


def _check_judge(judge: JudgePlan) -> None:
    """Raise if the server of a judge or its template cannot be used."""
    if judge.spec is not None and judge.spec.kind == JudgeKind.SERVER:
        parse_spec(judge.spec.text, "judge")
        load_template(judge.config.template, judge.config.response_format)


def _check_guide(guide: GuidePlan, algorithm: Algorithm) -> None:
    """Raise if a guide's settings rule out what the algorithm needs."""
    kind, spec = guide.spec.kind, guide.spec.text
    if kind == GuideKind.REFERENCES:
        require_continuation(algorithm, False, spec)
    if kind == GuideKind.SERVER:
        parse_spec(spec)
        require_continuation(algorithm, guide.config.continuation != "none", spec)
    if guide.training is not None and not guide.training.training.is_enabled:
        raise ConfigError("guide 'trained' has guide.sft.steps and guide.sft.epochs 0: set one, or choose another guide.")


def _check_guide_object(guide: GuidePlan, algorithm: Algorithm) -> None:
    """Raise if a guide of Python code is missing, changed or not capable enough."""
    kind, spec = guide.spec.kind, guide.spec.text
    if kind == GuideKind.PASSED and guide.passed is None and guide.is_needed:
        raise passed_error("guide.spec", spec)
    if kind == GuideKind.PYTHON or guide.passed is not None:
        require_continuation(algorithm, as_guide(guide.load(), spec).capabilities.can_continue, spec)


def _check_device(runtime: RuntimeConfig, policy: PolicyPlan) -> None:
    """Raise for settings that do not suit the device, which `resolve` has found."""
    on_cpu = torch.device(runtime.device).type == "cpu"
    offload, critic = runtime.offload, policy.critic
    if offload and on_cpu:
        raise ConfigError("runtime.offload frees a GPU's memory, and runtime.device is the CPU: leave it out.")
    if "reference" in offload and policy.lora.rank:
        raise ConfigError("with adapters the reference has no weights of its own to offload: leave it out of runtime.offload.")
    if "critic" in offload and critic.kind != "separate":
        raise ConfigError(f"a critic of kind '{critic.kind}' uses the policy's weights: leave it out of runtime.offload.")
    if policy.lora.load_in_4bit and on_cpu:
        # On a CPU bitsandbytes packs weights for inference, without gradients.
        raise ConfigError(
            "lora.load_in_4bit needs a GPU, as bitsandbytes computes no gradients on a CPU: set runtime.device=cuda."
        )
    if policy.lora.load_in_4bit:
        quantization_config_4bit(runtime.device)


def _check_adapters(run: ResolvedRun) -> None:
    """Raise if adapters cannot be trained.

    This is so without their library, on base weights that are not stored anywhere, and with a
    distilled policy that is a full model.
    """
    policy, adapters = run.policy, run.policy.lora
    uses_pairs = run.reward.uses_preferences or run.judge.uses_preferences
    if adapters.rank or (uses_pairs and run.reward.preferences.config.lora.rank > 0):
        lora.require_peft()
    if run.distill.config.num_completions and adapters.rank and not adapters.in_sft and not policy.starts_from_adapter:
        raise ConfigError("a distilled policy is a whole model here, and adapters share one: set lora.in_sft=true.")
    bases = [("model", policy.base)] if not policy.path else []
    bases += [("guide.model", run.guide.training.base)] if run.guide.training is not None else []
    for name, base in bases:
        if adapters.in_sft and not base.shape.path and not base.pretrain.is_enabled:
            raise ConfigError(
                f"lora.in_sft trains an adapter on a model that is there, and {name} is a new one: give {name}.path, or set "
                "pretrain.steps."
            )


def has_no_terminal() -> bool:
    """Return whether standard input is closed or the null device.

    A file or a pipe may contain answers, so it counts as a terminal.
    """
    try:
        return not sys.stdin.isatty() and stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):
        return True


def training_warnings(algorithm: Algorithm) -> list[str]:
    """Return warnings for valid algorithms that leave a token or value untrained."""
    found: list[str] = []
    for phase in algorithm.phases:
        if phase.rollin == POLICY and phase.beta == 1.0:
            found.append("with beta = 1 V^g of the prompt is never fitted, though the first token needs it: choose beta < 1")
        if phase.rollin == GUIDE and phase.beta == 1.0 and phase.switch == "paper":
            found.append("with beta = 1 and switch 'paper' the first token is never trained: choose beta < 1 or 'uniform'")
        if phase.rollin == POLICY and phase.switch == "paper":
            found.append("with switch 'paper' the last token is never trained where the guide completes: choose 'uniform'")
    return found


def require_continuation(algorithm: Algorithm, can_continue: bool, spec: str) -> None:
    """Raise if the algorithm needs a guide that can continue a prefix, and this cannot."""
    if algorithm.needs_guide_rollout and not can_continue:
        raise ConfigError(
            f"guide '{spec}' cannot continue a prefix, which {algorithm.title} needs: choose ppo_pp, or a guide that can."
        )


def check_models(run: ResolvedRun, tokenizer: Any, context: int) -> None:
    """Raise if a named model cannot be used, from configs and tokenizers alone."""
    guide, policy = run.guide, run.policy
    path = guide.model_path()
    if path is not None:
        _check_guide_model(path, load_tokenizer(path), max_length_of(path), tokenizer, context)
    if guide.training is not None and guide.training.base.shape.path is None:
        _check_guide_model("trained", tokenizer, guide.training.base.shape.max_length, tokenizer, context)
    check_rewards(run.reward, run.judge)
    check_base(policy, run.trainer.evaluation, tokenizer)
    _check_critic(policy)
    if policy.path is not None and policy.starts_from_adapter:
        require_language_model(policy.path)
        if not lora.is_pure_lora(policy.path):
            raise ConfigError(
                f"the adapter in {policy.path} is not only LoRA layers in adapter_model.safetensors and cannot be trained on "
                "here: make it a whole model with `rlgf merge`, and give that."
            )


def check_rewards(reward: RewardPlan, judge: JudgePlan) -> None:
    """Raise if a reward or the reward model that judges does not exist."""
    check_reward_names((*reward.config.names, *((judge.reward_name,) if judge.reward_name else ())), reward.config.options)


def check_base(policy: PolicyPlan, evaluation: EvaluationConfig, tokenizer: Any) -> None:
    """Raise if the model before SFT lacks tokens of the policy's vocabulary."""
    wanted = evaluation.output_perplexity or "zero_shot" in evaluation.baselines
    path = policy.base.shape.path
    if not (wanted and policy.path and path):
        return
    known = load_tokenizer(path).get_vocab()
    if not tokenizer.get_vocab().items() <= known.items():
        raise ConfigError(
            f"model.path '{path}', the model before SFT, has another vocabulary than the policy '{policy.path}': give the "
            "policy's own base, or set evaluation.output_perplexity=false and leave zero_shot out of evaluation.baselines."
        )


def _check_critic(policy: PolicyPlan) -> None:
    """Raise if the critics cannot be initialized as configured."""
    critic = policy.critic
    if critic.path is not None:
        folder = Path(critic.path).expanduser()
        if critic.kind == "separate":
            max_length_of(critic.path)
        elif critic.kind == "lora":
            require_lora_critic(critic.path)
        elif critic.kind == "value_head" and not (folder / VALUE_HEAD).is_file():
            raise ConfigError(f"critic.path '{critic.path}' holds no {VALUE_HEAD}: give the folder of a critic.")
        return
    trained = not policy.path and policy.lora.in_sft and policy.sft.training.is_enabled
    if critic.kind == "separate" and (trained or policy.starts_from_adapter):
        raise ConfigError(
            "critic.kind=separate is a whole model that begins as the policy, and the policy is an adapter: set "
            "critic.kind=lora or value_head, or name a whole model with critic.path."
        )


def _check_guide_model(name: str, tokenizer: Any, context: int, policy_tokenizer: Any, policy_context: int) -> None:
    """Raise if a guide with the policy's vocabulary has a shorter context.

    With another tokenizer, lengths are checked when the guide is queried.
    """
    if tokenizer.get_vocab() == policy_tokenizer.get_vocab() and context < policy_context:
        raise ConfigError(
            f"guide '{name}' has a context of {context} tokens, the policy one of {policy_context}: choose a guide with a "
            "longer one."
        )


def check_lengths(codec: Codec, context: int, task: Task, plan: TaskPlan) -> int:
    """Return the number of tokens of the longest prompt plus completion.

    Raises `ConfigError` for empty prompts, and for prompts that leave no room for a completion.
    """
    max_new_tokens = plan.config.max_new_tokens
    can_truncate = any(field.name == "prompt_tokens" for field in dataclasses.fields(plan.definition.options))
    if codec.is_encoder_decoder and max_new_tokens > context:
        raise ConfigError(f"task.max_new_tokens is {max_new_tokens}, but the model writes at most {context} tokens: lower it.")
    max_prompt_tokens, longest = context if codec.is_encoder_decoder else context - max_new_tokens, 0
    for split in ("train", "validation", "test"):
        prompts: Sequence[Prompt] = getattr(task, split)
        if not prompts:
            raise ConfigError(f"task '{task.name}' has no {split} prompts: its data needs at least one.")
        for number, length in enumerate(map(len, codec.prompts(prompts)), 1):
            if length == 0:
                raise ConfigError(f"task '{task.name}', {split} prompt {number} is empty: remove the row.")
            longest = max(longest, length)
            if length > max_prompt_tokens:
                fix = (
                    f"set task.options.prompt_tokens={max_prompt_tokens}"
                    if can_truncate and max_prompt_tokens > 0
                    else "shorten the prompts"
                )
                raise ConfigError(
                    f"task '{task.name}', {split} prompt {number} has {length} tokens; with {max_new_tokens} new "
                    f"ones it exceeds the model's context of {context}: {fix}, or set a smaller task.max_new_tokens."
                )
    return longest + max_new_tokens


def probe_guide(guide: Guide, algorithm: Algorithm, codec: Codec, task: Task, lengths: TaskConfig, seed: int) -> None:
    """Query a guide on a few prompts before training; raise if it fails.

    Continuations are tested if the algorithm needs them. A human guide is not probed, as the
    completions are not used.
    """
    if isinstance(guide, HumanGuide):
        return
    requests: list[CompletionRequest] = []
    for index, prompt in enumerate(task.validation[:2]):
        ids = codec.prompt(prompt)
        max_new_tokens = lengths.max_new_tokens
        requests.append(CompletionRequest(prompt, ids, "", [], max_new_tokens, lengths.min_new_tokens, index, seed))
        if algorithm.needs_guide_rollout and max_new_tokens > 1:
            prefix_ids = (codec.response(prompt.references[0]) if prompt.references else ids)[:1]
            prefix = codec.decode([ids], [prefix_ids])[0]
            min_new_tokens = max(0, lengths.min_new_tokens - 1)
            requests.append(CompletionRequest(prompt, ids, prefix, prefix_ids, max_new_tokens - 1, min_new_tokens, index, seed))
    try:
        query_guide(guide, requests)
    except TrainingError as error:
        raise ConfigError(f"probe: {error}") from error.__cause__
