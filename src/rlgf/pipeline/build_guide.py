"""Construction of a run's guide."""

from pathlib import Path
from typing import Any

from rlgf.algorithms.base import Algorithm
from rlgf.algorithms.guided import guide_only
from rlgf.config.schema import TrainerConfig
from rlgf.config.sections import GuideConfig
from rlgf.config.specs import GuideKind
from rlgf.generation.decoder import LocalSampler
from rlgf.generation.openai.cache import ResponseCache
from rlgf.generation.openai.client import connect
from rlgf.generation.openai.token_ids import TokenIdSetup, connect_by_token_ids
from rlgf.guides.base import Guide
from rlgf.guides.human import HumanGuide
from rlgf.guides.local import ModelGuide, ReferenceGuide, TextModelGuide, as_guide
from rlgf.guides.remote import RemoteGuide
from rlgf.models.language_model import LanguageModel
from rlgf.models.loading import load_language_model
from rlgf.pipeline.build_models import starting_eos_token_ids
from rlgf.pipeline.preflight import require_continuation
from rlgf.pipeline.resolve import GuidePlan, TokenizerPlan
from rlgf.pipeline.stage_cache import StageCache
from rlgf.pipeline.stages import fine_tune_stage
from rlgf.rl.rollout import RolloutConfig, collect_rollout, select_prompts
from rlgf.supervised.examples import Example
from rlgf.tasks.base import Task


def build_external_guide(
    plan: GuidePlan, algorithm: Algorithm, policy: TokenizerPlan, tokenizer: Any, longest: int, cache: StageCache
) -> Guide | None:
    """Return the guide of a plan, or None for a model in this process.

    Args:
        plan: the guide's plan.
        algorithm: what the guide must be capable of.
        policy: the plan of the policy's tokenizer.
        tokenizer: the policy's tokenizer.
        longest: the number of tokens of the policy's longest prompt plus completion.
        cache: the folder of cached responses.

    Raises:
        ConfigError: the guide cannot do what the algorithm needs.
    """
    kind = plan.spec.kind
    guide: Guide
    if kind == GuideKind.REFERENCES:
        guide = ReferenceGuide()
    elif kind == GuideKind.HUMAN:
        guide = HumanGuide(response_cache(plan.config, cache), offline=plan.config.endpoint.offline)
    elif kind == GuideKind.SERVER:
        responses, settings = response_cache(plan.config, cache), plan.settings
        if settings.continuation == "token_ids":
            setup = TokenIdSetup(tokenizer, starting_eos_token_ids(policy, tokenizer), longest)
            server = connect_by_token_ids(plan.spec.text, settings, setup, responses, cache.report)
        else:
            server = connect(plan.spec.text, settings, responses, cache.report)
        guide = RemoteGuide(server, settings, responses, cache.report, run=plan.run_key)
    elif kind in (GuideKind.PYTHON, GuideKind.PASSED):
        guide = as_guide(plan.load(), plan.spec.text)
    else:
        return None
    require_continuation(algorithm, guide.capabilities.can_continue, plan.spec.text)
    return guide


def response_cache(config: GuideConfig, cache: StageCache) -> ResponseCache:
    """Return the response cache of guides outside this process."""
    path = config.endpoint.cache
    return ResponseCache(Path(path) if path else cache.folder / "guide-responses.sqlite", report=cache.report)


def build_model_guide(plan: GuidePlan, reference: LanguageModel, cache: StageCache) -> Guide:
    """Return the guide of a plan as a model in this process.

    It is the SFT model, a model trained here, or a loaded model.
    """
    sampling, machine = plan.config.sampling, plan.machine
    if plan.spec.kind == GuideKind.SFT:
        return ModelGuide(reference, sampling, machine.precision)
    path = plan.model_path() if plan.training is None else str(fine_tune_stage(plan.training, cache))
    assert path is not None
    model = load_language_model(path, machine.device, share_weights_with=reference, name="guide")
    same = (
        model.tokenizer.get_vocab() == reference.tokenizer.get_vocab()
        and model.codec.is_encoder_decoder == reference.codec.is_encoder_decoder
    )
    return (ModelGuide if same else TextModelGuide)(model.freeze(), sampling, machine.precision)


def guide_examples(config: TrainerConfig, policy: LanguageModel, guide: Guide, task: Task, count: int) -> list[Example]:
    """Return `count` completions of the guide on training prompts, as training examples."""
    rollout_config = RolloutConfig(
        policy, LocalSampler(policy, config.runtime.precision), guide, config.sampling, config.task.max_new_tokens,
        config.task.min_new_tokens, config.seed,
    )  # fmt: skip
    indices = range(count)
    rollout = collect_rollout(
        rollout_config,
        guide_only(),
        guide_only().schedule(0, 0.0),
        select_prompts(task.train, config.seed, indices, 1),
        indices,
    )
    lengths, starts = rollout.lengths.tolist(), rollout.prompt_lengths.tolist()
    return [Example(row[:length].tolist(), start) for row, length, start in zip(rollout.ids, lengths, starts)]
