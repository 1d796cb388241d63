"""Construction of a run's guide."""

from pathlib import Path
from typing import Any

from rlgf.algorithms.guided import Algorithm, guide_only
from rlgf.config.loading import override
from rlgf.config.schema import Config
from rlgf.config.sections import GuideConfig
from rlgf.config.specs import load_object
from rlgf.generation.decoder import LocalSampler
from rlgf.generation.openai.cache import ResponseCache
from rlgf.generation.openai.client import connect
from rlgf.generation.openai.token_ids import TokenIdSetup, connect_by_token_ids
from rlgf.guides.base import Guide
from rlgf.guides.human import HumanGuide
from rlgf.guides.local import FunctionGuide, ModelGuide, ReferenceGuide, TextModelGuide, guide_model_path
from rlgf.guides.remote import RemoteGuide
from rlgf.models.language_model import LanguageModel
from rlgf.models.loading import load_language_model
from rlgf.pipeline.build_models import starting_eos_token_ids
from rlgf.pipeline.preflight import require_continuation
from rlgf.pipeline.stage_cache import Report, fingerprint
from rlgf.pipeline.stages import guide_stage
from rlgf.rl.rollout import RolloutConfig, collect_rollout, select_prompts
from rlgf.runs.directory import identifying_settings
from rlgf.supervised.examples import Example
from rlgf.tasks.base import Task
from rlgf.tasks.registry import task_definition


def build_external_guide(
    config: Config, algorithm: Algorithm, tokenizer: Any, longest: int, stages: Path, report: Report
) -> Guide | None:
    """Return the guide that the config names, or None if it is a model.

    `tokenizer` is the policy's; `longest` is the number of tokens of its longest prompt plus
    completion. Raises `ConfigError` if the guide cannot do what the algorithm needs.
    """
    spec = config.guide.spec
    guide: Guide
    if spec == "references":
        guide = ReferenceGuide()
    elif spec == "human":
        guide = HumanGuide(response_cache(config, stages), offline=config.guide.endpoint.offline)
    elif spec.startswith("server:"):
        cache, settings = response_cache(config, stages), guide_settings(config)
        if settings.continuation == "token_ids":
            tokens = TokenIdSetup(tokenizer, starting_eos_token_ids(config, tokenizer), longest)
            server = connect_by_token_ids(spec, settings, tokens, cache, report)
        else:
            server = connect(spec, settings, cache, report)
        guide = RemoteGuide(server, settings, cache, report, run=fingerprint(identifying_settings(config)))
    elif spec.startswith("python:"):
        guide = FunctionGuide(load_object(spec, "guide"))
    else:
        return None
    require_continuation(algorithm, guide.capabilities.can_continue, spec)
    return guide


def guide_settings(config: Config) -> GuideConfig:
    """Return the guide's settings, with the task's instruction as the default."""
    instruction = config.guide.instruction or task_definition(config.task).instruction
    return override(config, [("guide.instruction", instruction)]).guide


def response_cache(config: Config, stages: Path) -> ResponseCache:
    """Return the response cache of guides outside this process."""
    path = config.guide.endpoint.cache
    return ResponseCache(Path(path) if path else stages / "guide-answers.sqlite")


def build_model_guide(config: Config, reference: LanguageModel, stages: Path, report: Report) -> Guide:
    """Return the guide that the config names as a model in this process.

    It is the SFT model, a model trained here, or a loaded model.
    """
    spec, sampling = config.guide.spec, config.guide.sampling
    if spec == "sft":
        return ModelGuide(reference, sampling, config.runtime.precision)
    path = str(guide_stage(config, stages, report)) if spec == "trained" else guide_model_path(spec)
    assert path is not None
    model = load_language_model(path, config.runtime.device, share_weights_with=reference, name="guide")
    same = (
        model.tokenizer.get_vocab() == reference.tokenizer.get_vocab()
        and model.codec.is_encoder_decoder == reference.codec.is_encoder_decoder
    )
    return (ModelGuide if same else TextModelGuide)(model.freeze(), sampling, config.runtime.precision)


def guide_examples(config: Config, policy: LanguageModel, guide: Guide, task: Task, count: int) -> list[Example]:
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
