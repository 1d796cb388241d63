"""Checks of a model: sampling from it, training on the samples, adapting it."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlgf.config.sections import LoraConfig, PPOConfig
from rlgf.errors import REFUSED_INPUTS, ConfigError, RlgfError, TrainingError, raise_if_out_of_memory
from rlgf.generation.decoder import LocalSampler
from rlgf.generation.decoding_path import decoding_path
from rlgf.models import lora
from rlgf.models.configs import max_length, model_type
from rlgf.models.critic import new_critic
from rlgf.models.forward import input_format, is_encoder_decoder, micro_batches, token_logits
from rlgf.models.input_probe import probe_rows
from rlgf.models.language_model import LanguageModel
from rlgf.rl.agreement import Agreement, AgreementCheck, sample_restarts
from rlgf.rl.experience import ForwardConfig, policy_log_probs
from rlgf.rl.rollout import RolloutConfig
from rlgf.rl.tensors import Rollout
from rlgf.types import Prompt, SamplingParams

PROMPT_LENGTHS = (3, 4, 6, 7, 9, 12, 15, 20)  # tokens
NEW_TOKENS = 12
TOKEN_BUDGET = 256  # so that several rows of different lengths are evaluated together
ADAPTER = "check"


@dataclass(frozen=True)
class ModelReport:
    """The abilities of a model."""

    model_type: str
    is_encoder_decoder: bool
    decoding: str  # as in `rlgf.generation.decoding_path.PATHS`
    rows: str  # as in `InputFormat`
    absent_ids: int  # embeddings without a token
    agreement: Agreement
    lora_targets: Sequence[str]  # layers that adapters change; empty: none
    value_head: bool  # whether a critic can be a head on its states
    reasons: Sequence[str] = ()  # why something is not supported

    @property
    def is_fast(self) -> bool:
        """Return whether the model is sampled with our own key-value cache."""
        return self.decoding == "own"


def check_model(language_model: LanguageModel, precision: str = "fp32") -> ModelReport:
    """Return what a model supports; it gets an adapter and must not be used again.

    Raises:
        TrainingError: sampler and trainer disagree, or the model has no gradient.
        ConfigError: it cannot be sampled from or evaluated.
    """
    forward_config = ForwardConfig(SamplingParams(), PPOConfig(), TOKEN_BUDGET, precision)
    config = _rollout_config(language_model, precision)
    prompts = _prompts(language_model)
    with _as_config_error(language_model):
        check = AgreementCheck(config, prompts)
        check.require(forward_config)
        assert check.sampled is not None
        rollout = sample_restarts(config, prompts)
        _require_gradients(language_model, rollout, forward_config)
    reasons: list[str] = []
    value_head = _supports_value_head(language_model, rollout, forward_config, reasons)
    targets = _lora_targets(language_model, rollout, forward_config, reasons)
    return ModelReport(
        model_type(language_model.model), is_encoder_decoder(language_model.model), decoding_path(language_model),
        input_format(language_model.model).rows, 0 if language_model.absent_ids is None else len(language_model.absent_ids),
        check.sampled, targets, value_head, reasons,
    )  # fmt: skip


@contextmanager
def _as_config_error(language_model: LanguageModel) -> Generator[None]:
    """Convert an error of transformers to one sentence that names the model type."""
    try:
        yield
    except RlgfError:
        raise
    except REFUSED_INPUTS as error:
        raise_if_out_of_memory(error)
        raise ConfigError(
            f"a model of type '{model_type(language_model.model)}' cannot be sampled from and trained ({_reason(error)}): "
            "choose another model (docs/models.md)."
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _rollout_config(language_model: LanguageModel, precision: str) -> RolloutConfig:
    return RolloutConfig(
        language_model, LocalSampler(language_model, precision), None, SamplingParams(), NEW_TOKENS, 2, seed=0
    )  # fmt: skip


def _prompts(language_model: LanguageModel) -> list[Prompt]:
    room = max(1, max_length(language_model.model.config) - NEW_TOKENS - 2)
    rows = probe_rows(language_model.model, [min(length, room) for length in PROMPT_LENGTHS], seed=5)
    absent = set() if language_model.absent_ids is None else set(language_model.absent_ids.tolist())
    usable = [[id for id in row if id not in absent] or row for row in rows]
    return [Prompt("a prompt", ids=tuple(row)) for row in usable]


def _require_gradients(language_model: LanguageModel, rollout: Rollout, forward_config: ForwardConfig) -> None:
    """Run a backward pass on the policy's tokens; raise if it gives no finite gradient."""
    model, trained = language_model.model, language_model.trainable_parameters()
    frozen = [parameter for parameter in trained if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        for batch in micro_batches(model, rollout.ids, rollout.prompt_lengths, rollout.by_policy, TOKEN_BUDGET):
            logits, _ = token_logits(language_model, batch, forward_config.precision)
            values = policy_log_probs(
                rollout, *batch.token_index, logits, language_model.eos_token_ids, forward_config, inplace_backward=True
            )
            values.sum().backward()  # pyright: ignore[reportUnknownMemberType]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        if not gradients or not finite:
            raise TrainingError(
                f"a model of type '{model_type(model)}' has no finite gradient, so it cannot be trained with this version; "
                "choose another model (docs/models.md)."
            )
    finally:
        for parameter in trained:
            parameter.grad = None
        for parameter in frozen:
            parameter.requires_grad_(False)


def _supports_value_head(
    language_model: LanguageModel, rollout: Rollout, forward_config: ForwardConfig, reasons: list[str]
) -> bool:
    try:
        critic = new_critic("value_head", "", language_model, 0.5)
        batches = micro_batches(
            language_model.model, rollout.ids, rollout.prompt_lengths, rollout.by_policy, forward_config.token_budget
        )
        for batch in batches:
            with torch.no_grad():
                _, hidden = token_logits(language_model, batch, forward_config.precision)
                if not bool(torch.isclose(critic(batch, forward_config.precision, hidden), torch.tensor(0.5)).all()):
                    raise ValueError("its value is not that of a new head")
    except REFUSED_INPUTS as error:
        raise_if_out_of_memory(error)
        reasons.append(f"no value head: {_reason(error)}")
        return False
    return True


def _lora_targets(
    language_model: LanguageModel, rollout: Rollout, forward_config: ForwardConfig, reasons: list[str]
) -> list[str]:
    """Return the layers that adapters change by default; raise if those cannot be trained."""
    try:
        lora.require_peft()
        lora.add(language_model.model, ADAPTER, LoraConfig(rank=2), seed=0)
        _require_gradients(replace(language_model, adapter=ADAPTER), rollout, forward_config)
        return lora.adapted_names(language_model.model)
    except REFUSED_INPUTS as error:
        raise_if_out_of_memory(error)
        reasons.append(f"no LoRA adapters: {_reason(error)}")
        return []


def describe_vllm(model: Any) -> str:
    """Describe whether vLLM supports a model, as far as this is known here."""
    from importlib.util import find_spec

    names = [str(name) for name in getattr(model.config, "architectures", None) or [type(model).__name__]]
    if find_spec("vllm") is None:
        return f"vLLM is not installed here: its list of supported models must have {' or '.join(names)}"
    try:
        from vllm import ModelRegistry  # pyright: ignore[reportMissingImports, reportUnknownVariableType]

        known: Any = ModelRegistry.get_supported_archs()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    except Exception as error:  # it needs a device
        return f"vLLM cannot be asked here ({_reason(error)})"
    return f"vLLM {'supports' if set(names) & set(known) else 'does not support'} {' or '.join(names)}"
