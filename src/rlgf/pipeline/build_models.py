"""The models of a run: policy, reference, critics and the model before SFT."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from rlgf.algorithms.base import Algorithm
from rlgf.data.tokenization import Codec
from rlgf.errors import ConfigError
from rlgf.models import lora
from rlgf.models.critic import Critic, new_critic, new_lora_critic
from rlgf.models.language_model import POLICY_ADAPTER, LanguageModel
from rlgf.models.loading import (
    load_codec,
    load_eos_token_ids,
    load_language_model,
    load_tokenizer,
    max_length_of,
    require_language_model,
)
from rlgf.models.offload import offload
from rlgf.pipeline.resolve import PolicyPlan, TokenizerPlan
from rlgf.pipeline.stage_cache import StageCache
from rlgf.pipeline.stages import load_base_model, prepare_tokenizer
from rlgf.rl.experience import Models
from rlgf.types import Origin


def build_models(plan: PolicyPlan, algorithm: Algorithm, reference: LanguageModel, start: str, policy_path: str) -> Models:
    """Return the policy, the reference model and the critics.

    They are separate models, or adapters on the reference's weights.

    Args:
        plan: the policy's plan.
        algorithm: decides which critics there are.
        reference: the starting model, frozen.
        start: the folder or Hub name of the starting model.
        policy_path: the same, or that of the distilled policy.
    """
    critic = plan.critic
    policy = (
        adapted_policy(plan, reference, start, policy_path)
        if plan.lora.rank or reference.adapter is not None
        else load_language_model(policy_path, plan.machine.device)
    )

    def new(origin: Origin) -> Critic:
        if critic.kind == "lora":
            name, seed = f"critic_{origin.name.lower()}", plan.seed + origin
            return new_lora_critic(name, policy, critic.initial_value, plan.lora, seed, critic.path)
        return new_critic(critic.kind, critic.path or policy_path, policy, critic.initial_value)

    models = Models(policy, reference, {origin: new(origin) for origin in algorithm.critics})
    device = torch.device(plan.machine.device)
    for module in (
        *([reference.model] if "reference" in plan.offload else []),
        *(models.critics.values() if "critic" in plan.offload else []),
    ):
        offload(module, device)
    return models


def adapted_policy(plan: PolicyPlan, reference: LanguageModel, start: str, policy_path: str) -> LanguageModel:
    """Return the policy as a new adapter on the reference's weights.

    It starts from the result of SFT or, if the policy was distilled, of distillation.
    """
    model = reference.model
    if policy_path != start:
        lora.load(model, policy_path, POLICY_ADAPTER)
    elif reference.adapter is not None:
        lora.clone(model, reference.adapter, POLICY_ADAPTER)
    else:
        lora.add(model, POLICY_ADAPTER, plan.lora, plan.seed)
    return dataclasses.replace(reference, adapter=POLICY_ADAPTER)


def merge(folder: str, out: Path) -> None:
    """Merge an adapter into its base model and write the full model to `out`.

    `folder` is that of a run or of an adapter. Raises `ConfigError` if there is nothing to merge or
    `out` is not empty.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"there is no folder {folder}: give that of a run, or of an adapter.")
    if lora.is_adapter_folder(str(Path(folder) / "policy")):  # a run
        folder = str(Path(folder) / "policy")
    if not lora.is_adapter_folder(folder):
        raise ConfigError(f"{folder} holds no adapter (no adapter_config.json): there is nothing to merge.")
    require_language_model(folder)
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise ConfigError(f"{out} is {'a file' if out.is_file() else 'not empty'}: choose another --out.")
    base = load_language_model(lora.base_of(folder))
    whole = dataclasses.replace(base, model=lora.merged(base.model, folder), tokenizer=load_tokenizer(folder))
    whole.save(out)


def starting_codec(plan: TokenizerPlan, max_length: int, cache: StageCache) -> tuple[Codec, int]:
    """Return the policy's codec and context length, before the policy is built.

    `max_length` is that of a new model.
    """
    if plan.path is None:
        return Codec(prepare_tokenizer(plan, cache)[0], plan.architecture == "t5"), max_length
    return load_codec(plan.path), max_length_of(plan.path)


def starting_eos_token_ids(plan: TokenizerPlan, tokenizer: Any) -> tuple[int, ...]:
    """Return the policy's EOS token ids, before the policy is built."""
    return (int(tokenizer.eos_token_id),) if plan.path is None else load_eos_token_ids(plan.path, tokenizer)


def load_pre_sft_model(plan: PolicyPlan, reference: LanguageModel, cache: StageCache) -> LanguageModel:
    """Return the model before SFT, frozen.

    If the reference is an adapter on its weights, or these weights themselves, they are shared.
    Raises `ConfigError` if the model before SFT is unknown.
    """
    if not plan.base_is_known:
        raise ConfigError(
            f"zero-shot is the model before SFT, and '{plan.path}' does not say which one that was: give model.path, or "
            "leave zero_shot out of evaluation.baselines."
        )
    return load_base_model(plan.base, cache, plan.lora.load_in_4bit, reference).freeze()
