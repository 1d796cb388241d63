"""A run, resolved once from its config: algorithm, task, and a plan for each part.

A plan holds what its functions need and no more, so that no function receives a whole config.
"""

import dataclasses
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlgf.algorithms.base import Algorithm
from rlgf.config.objects import PassedObjects, require_same_source
from rlgf.config.schema import Config, TrainerConfig
from rlgf.config.sections import (
    CriticConfig,
    DistillConfig,
    GuideConfig,
    JudgeConfig,
    ModelConfig,
    PolicyLoraConfig,
    PreferenceConfig,
    RewardConfig,
    SupervisedConfig,
    TaskConfig,
)
from rlgf.config.specs import GuideKind, GuideSpec, JudgeKind, JudgeSpec, load_object, parse_guide, parse_judge
from rlgf.data.checksums import content_identity, fingerprint
from rlgf.errors import ConfigError
from rlgf.generation.openai.client import without_address
from rlgf.guides.local import guide_model_path
from rlgf.models import lora
from rlgf.runs.directory import identifying_settings
from rlgf.runs.machine import choose_device
from rlgf.tasks.base import TaskDefinition
from rlgf.tasks.registry import task_definition

SEPARATE_SEED = 1_000_003  # added to the seed of models that must differ from the policy


@dataclass(frozen=True)
class Machine:
    """The device and the micro-batches of supervised training."""

    device: str
    micro_batch_tokens: int
    precision: str


@dataclass(frozen=True)
class TaskPlan:
    """A task's settings and its definition."""

    config: TaskConfig
    definition: TaskDefinition

    @property
    def name(self) -> str:
        """Return the task's name."""
        return self.config.name


@dataclass(frozen=True)
class TokenizerPlan:
    """The policy's tokenizer: that of a model, the task's own, or one trained here."""

    path: str | None  # of the model
    task: TaskPlan
    vocabulary: int
    architecture: str


@dataclass(frozen=True)
class BasePlan:
    """A model before supervised fine-tuning: loaded, pretrained here, or new."""

    shape: ModelConfig
    tokenizer: TokenizerPlan  # of a new model
    task: TaskPlan  # whose raw text it is pretrained on
    pretrain: SupervisedConfig
    pretrain_seed: int
    new_seed: int
    machine: Machine

    @property
    def is_pretrained_here(self) -> bool:
        """Return whether the pretrain stage makes it."""
        return self.shape.path is None and self.pretrain.is_enabled


@dataclass(frozen=True)
class FineTuningPlan:
    """A supervised fine-tuning of a base model on a task's demonstrations."""

    name: str  # of the stage
    base: BasePlan
    task: TaskPlan
    training: SupervisedConfig
    seed: int
    lora: PolicyLoraConfig


@dataclass(frozen=True)
class PolicyPlan:
    """The policy before reinforcement learning."""

    path: str | None  # a given model to start from, instead of the stages
    sft: FineTuningPlan
    lora: PolicyLoraConfig
    critic: CriticConfig
    offload: tuple[str, ...]
    seed: int
    machine: Machine

    @property
    def base(self) -> BasePlan:
        """Return the plan of the model before supervised fine-tuning."""
        return self.sft.base

    @property
    def tokenizer(self) -> TokenizerPlan:
        """Return the plan of the policy's tokenizer."""
        return self.sft.base.tokenizer

    @property
    def starts_from_adapter(self) -> bool:
        """Return whether the given model is an adapter."""
        return self.path is not None and lora.is_adapter_folder(self.path)

    @property
    def has_sft(self) -> bool:
        """Return whether this run fine-tunes the policy on targets before it starts."""
        return self.path is None and self.sft.training.is_enabled

    @property
    def base_is_known(self) -> bool:
        """Return whether the model before SFT is known."""
        return self.path is None or self.base.shape.path is not None


@dataclass(frozen=True)
class GuidePlan:
    """The guide of a run."""

    spec: GuideSpec
    config: GuideConfig
    settings: GuideConfig  # the same, with the task's instruction as default
    is_needed: bool  # by the algorithm or by distillation
    training: FineTuningPlan | None  # of the kind 'trained'
    passed: Any  # a guide or a function that Python code passed, or None
    run_key: str  # identifies the run among those that share a response cache
    machine: Machine

    def load(self) -> Any:
        """Load a function or object of kind 'python' or 'passed'; raise if it changed."""
        found = load_object(self.spec.text, "guide") if self.passed is None else self.passed
        require_same_source(found, self.config.source, f"guide '{self.spec.text}'")
        return found

    def content_identity(self) -> Any:
        """Return the identity of the completions' generator, for the fingerprint of a stage.

        A passed object without source is like no other: its stage is never used again.
        """
        if self.spec.kind == GuideKind.PASSED and self.config.source is None:
            return {"spec": self.spec.text, "object": uuid.uuid4().hex}
        return content_identity(self.model_path() or without_address(self.spec.text))

    def model_path(self) -> str | None:
        """Return the path of a guide of the kinds 'model' and 'run', or None.

        Raises `ConfigError` if the run has no policy.
        """
        return guide_model_path(self.spec)


@dataclass(frozen=True)
class PreferencePlan:
    """The training of reward models on preference pairs, for the reward and for the judge."""

    config: PreferenceConfig
    task: TaskPlan
    policy: PolicyPlan  # whose starting model they start from, unless the config names one
    for_judge: bool  # whether the judge has one of its own, trained on other posts
    seed: int
    in_4bit: bool
    machine: Machine


@dataclass(frozen=True)
class RewardPlan:
    """The reward, and the stages that train it."""

    config: RewardConfig
    task: TaskPlan
    preferences: PreferencePlan
    passed: Callable[..., Any] | None  # a function that Python code passed
    shares_policy_weights: bool  # so that the policy must be built first
    device: str

    @property
    def uses_preferences(self) -> bool:
        """Return whether the reward is a model trained here on pairs."""
        return "preferences" in self.config.names


@dataclass(frozen=True)
class JudgePlan:
    """The judge of final evaluations."""

    config: JudgeConfig
    spec: JudgeSpec | None  # None: no judge
    preferences: PreferencePlan
    shares_policy_weights: bool
    device: str

    @property
    def reward_name(self) -> str | None:
        """Return the judge as a `reward.path`, or None if it is a chat model."""
        if self.spec is None or self.spec.kind == JudgeKind.SERVER:
            return None
        return "preferences" if self.spec.kind == JudgeKind.PREFERENCES else self.spec.name

    @property
    def uses_preferences(self) -> bool:
        """Return whether the judge is a model trained here on pairs."""
        return self.spec is not None and self.spec.kind == JudgeKind.PREFERENCES


@dataclass(frozen=True)
class DistillPlan:
    """The training of the policy on completions of the guide, before reinforcement learning."""

    config: DistillConfig
    task: TaskPlan
    seed: int  # of the fine-tuning
    sampling_seed: int  # of the completions
    lora: PolicyLoraConfig
    machine: Machine


@dataclass(frozen=True)
class ResolvedRun:
    """Everything that follows from a config alone, without loading data or models."""

    config: Config  # as written to the run's folder
    recipe: str
    trainer: TrainerConfig
    algorithm: Algorithm
    task: TaskPlan
    policy: PolicyPlan
    guide: GuidePlan
    reward: RewardPlan
    judge: JudgePlan
    distill: DistillPlan


def resolve(config: Config, passed: PassedObjects | None = None) -> ResolvedRun:
    """Resolve a config, without loading data or models.

    `passed` are the objects of Python code that the config only names. The config written to the
    run's folder keeps `runtime.device=auto`; the plans have the device that it stands for here.

    Raises `ConfigError` for an unknown algorithm, task, guide or judge, or a missing device.
    """
    algorithm = config.algorithm.build()
    task = TaskPlan(config.task, task_definition(config.task))
    runtime = dataclasses.replace(config.runtime, device=choose_device(config.runtime.device))
    machine = Machine(runtime.device, runtime.micro_batch_tokens, runtime.precision)
    policy = _policy_plan(config, task, machine)
    passed = passed or PassedObjects()
    guide = dataclasses.replace(_guide_plan(config, task, policy, algorithm, machine), passed=passed.guide)
    judge_spec = parse_judge(config.judge.spec) if config.judge.spec is not None else None
    pairs = config.preferences
    preferences = PreferencePlan(
        pairs, task, policy, judge_spec is not None and judge_spec.kind == JudgeKind.PREFERENCES,
        config.seed if pairs.training.seed is None else pairs.training.seed,
        config.lora.load_in_4bit and pairs.lora.rank > 0, machine,
    )  # fmt: skip
    judge = JudgePlan(config.judge, judge_spec, preferences, False, runtime.device)
    judge_names = () if judge.reward_name is None else (judge.reward_name,)
    adapted = config.lora.rank > 0 or policy.starts_from_adapter

    def shares(names: tuple[str, ...]) -> bool:
        trained = "preferences" in names and pairs.lora.rank > 0
        return adapted and (trained or any(lora.is_adapter_folder(name) for name in names))

    return ResolvedRun(
        config, config.recipe, dataclasses.replace(config.trainer, runtime=runtime), algorithm, task, policy, guide,
        RewardPlan(config.reward, task, preferences, passed.reward, shares(config.reward.names), runtime.device),
        dataclasses.replace(judge, shares_policy_weights=shares(judge_names)),
        DistillPlan(
            config.distill, task, config.seed if config.distill.seed is None else config.distill.seed, config.seed,
            config.lora, machine,
        ),
    )  # fmt: skip


def _policy_plan(config: Config, task: TaskPlan, machine: Machine) -> PolicyPlan:
    model = config.model
    tokenizer = TokenizerPlan(config.policy or model.path, task, model.vocabulary, model.architecture)
    seed = config.seed if config.sft.seed is None else config.sft.seed
    base = _base_plan(model, seed, tokenizer, config.pretrain, config.seed, machine)
    sft = FineTuningPlan("sft", base, task, config.sft, seed, config.lora)
    return PolicyPlan(config.policy, sft, config.lora, config.critic, config.runtime.offload, config.seed, machine)


def _base_plan(
    shape: ModelConfig, seed: int, tokenizer: TokenizerPlan, pretrain: SupervisedConfig, run_seed: int, machine: Machine
) -> BasePlan:
    pretrain_seed = run_seed if pretrain.seed is None else pretrain.seed
    new_seed = seed if pretrain.seed is None else pretrain.seed
    return BasePlan(shape, tokenizer, tokenizer.task, pretrain, pretrain_seed, new_seed, machine)


def _with_instruction(guide: GuideConfig, instruction: str | None) -> GuideConfig:
    """Return the guide's settings with the task's instruction as default."""
    if instruction is not None and "{text}" not in instruction:
        raise ConfigError("the task's instruction does not say where the text to continue goes: put {text} there.")
    return dataclasses.replace(guide, instruction=guide.instruction or instruction)


def _guide_plan(config: Config, task: TaskPlan, policy: PolicyPlan, algorithm: Algorithm, machine: Machine) -> GuidePlan:
    guide, spec = config.guide, parse_guide(config.guide.spec)
    training: FineTuningPlan | None = None
    if spec.kind == GuideKind.TRAINED:
        own = dataclasses.replace(task.config, options={**task.config.options, **guide.options})
        # its weights and batches must differ from the policy's
        seed = (config.seed if guide.sft.seed is None else guide.sft.seed) + SEPARATE_SEED
        base = _base_plan(guide.model, seed, policy.tokenizer, config.pretrain, config.seed, machine)
        training = FineTuningPlan(
            "guide", base, TaskPlan(own, task_definition(own, "guide.options.")), guide.sft, seed, config.lora
        )
    return GuidePlan(
        spec,
        guide,
        _with_instruction(guide, task.definition.instruction),
        algorithm.needs_guide or config.distill.num_completions > 0,
        training,
        None,
        fingerprint(identifying_settings(config)),
        machine,
    )
