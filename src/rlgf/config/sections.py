"""The sections of a config, as frozen dataclasses."""

import dataclasses
from typing import Any, Literal

from rlgf.algorithms.base import Algorithm, AlgorithmOptions
from rlgf.algorithms.registry import ALGORITHMS
from rlgf.bounds import (
    Budget,
    Coefficient,
    DualClip,
    Epsilon,
    FiniteFloat,
    Flag,
    Length,
    LengthOrZero,
    NonNegativeFloat,
    NonNegativeInt,
    Pause,
    PositiveFloat,
    PositiveInt,
    Probability,
    ProbabilityBelowOne,
    Rate,
    Seconds,
    Seed,
    Size,
    SizeOrZero,
    SmallInt,
    SmallIntOrZero,
)
from rlgf.config.base import read_options, section
from rlgf.config.specs import complete_spec
from rlgf.errors import unknown
from rlgf.types import SamplingParams


@section
class TaskConfig:
    """The task: data, length of completions and options.

    `options` belong to the task, which checks them.
    """

    name: str = "toy_reviews"
    data: str | None = None  # Hub name, local folder or file
    max_new_tokens: Length = 16
    min_new_tokens: LengthOrZero = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Complete the name of an object in a file."""
        object.__setattr__(self, "name", complete_spec(self.name))


@section
class ModelConfig:
    """The model before supervised fine-tuning: pretrained, or new with this shape.

    `path` is a Hub name or local folder; without it a new model is made. A byte-level BPE tokenizer
    with `vocabulary` tokens is trained on the task's raw text; with 0 the task has its own
    tokenizer.
    """

    path: str | None = None
    architecture: Literal["gpt2", "llama", "t5"] = "gpt2"  # t5: an encoder–decoder
    layers: SmallInt = 2
    width: Size = 64
    heads: SmallInt = 4
    max_length: Length = 128
    vocabulary: LengthOrZero = 0
    init_std: Rate = 0.02


@section
class TrainingConfig:
    """A supervised training loop; with 0 steps and 0 epochs there is no training."""

    epochs: NonNegativeFloat = 0.0
    steps: NonNegativeInt = 0  # 0: use epochs
    batch_size: Size = 32
    learning_rate: Rate = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: NonNegativeInt = 0
    adam_beta2: ProbabilityBelowOne = 0.999
    weight_decay: Rate = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: Seed | None = None  # None: the run's seed

    @property
    def is_enabled(self) -> bool:
        """Return whether there is any training."""
        return bool(self.steps or self.epochs)


@section
class SupervisedConfig(TrainingConfig):
    """Supervised training on data.

    `pretrain` trains on raw text, `sft` on targets, reward models on pairs.
    """

    max_examples: NonNegativeInt = 0  # 0: all


@section
class DistillConfig(TrainingConfig):
    """Supervised training on completions that the guide samples before reinforcement learning."""

    num_completions: NonNegativeInt = 0  # sampled by the guide; 0: no distillation


@section
class RewardConfig:
    """The reward: a rule, a classifier, a reward model, a text metric or a function.

    `path` is 'task' (the task's own rule), 'ngram' (a small classifier trained here), 'preferences'
    (a reward model trained here on pairs), a sequence classifier or reward model (Hub name or local
    folder), a folder made by `rlgf reward`, a text metric ('spider', 'bleu_4', …: `rlgf list`), or
    'FILE.py:name' or 'python:module:name'. With `weights`, which replaces `path`, it is a weighted
    sum of several of these, each logged. `options` are those of text metrics, by metric name.
    """

    path: str = "task"
    weights: dict[str, FiniteFloat] = dataclasses.field(default_factory=dict[str, float])  # for a sum
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])  # of text metrics
    clip: PositiveFloat | None = None  # bound on |reward|
    normalize: Flag = False  # divide by a running standard deviation around a running mean
    subtract_reference: Flag = False  # subtract the score of the prompt's first reference
    missing_eos_penalty: FiniteFloat = 0.0  # subtracted from completions truncated at max_new_tokens
    source: str | None = None  # hash of the source of a function that Python code passed
    epochs: SmallIntOrZero = 8  # of the 'ngram' classifier
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Complete the names of functions in files."""
        object.__setattr__(self, "path", complete_spec(self.path))
        for name in ("weights", "options"):
            object.__setattr__(self, name, {complete_spec(key): value for key, value in getattr(self, name).items()})

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the rewards in use."""
        return tuple(self.weights) or (self.path,)


@section
class LoraConfig:
    """LoRA adapters in place of whole models."""

    rank: SizeOrZero = 0  # 0: no adapters, all weights are trained
    alpha: PositiveFloat = 16.0
    dropout: ProbabilityBelowOne = 0.0  # in supervised stages; 0 in reinforcement learning
    target_modules: tuple[str, ...] = ()  # adapted layers; empty: see the section


@section
class PolicyLoraConfig(LoraConfig):
    """The adapters of the policy; without `target_modules`, of all linear layers but the head.

    Policy, critics, reference and guide share one copy of the base weights. The reference is the
    frozen adapter of SFT, or, if SFT trained all weights, the base model with adapters off.
    """

    in_sft: Flag = False  # train an adapter in supervised fine-tuning too
    load_in_4bit: Flag = False  # base weights in 4 bits, by bitsandbytes


@section
class RewardLoraConfig(LoraConfig):
    """The adapters of a reward model; without `target_modules`, of PEFT's default layers."""

    alpha: PositiveFloat = 32.0


@section
class PreferenceConfig:
    """A reward model trained here on human preference pairs (reward.path: 'preferences')."""

    data: str | None = None  # pairs: Hub name, folder or file; None: the task's own
    path: str | None = None  # initial model, Hub name or folder; None: the policy's initial model
    training: SupervisedConfig = SupervisedConfig(epochs=1.0, learning_rate=1e-5)  # examples: pairs
    lora: RewardLoraConfig = RewardLoraConfig()
    min_words: SizeOrZero = 5  # pairs with a shorter completion are dropped


@section
class EndpointConfig:
    """The connection to the server of a guide or judge, its limits and cache.

    Values `$NAME` in `extra_headers` are read from the environment. A run that reaches a limit
    stops with a checkpoint, an evaluation stops; responses stay cached.
    """

    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key
    extra_body: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    extra_headers: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    thinking_tokens: LengthOrZero = 0  # allowed in addition, for reasoning models
    concurrency: SmallInt = 8  # concurrent requests
    requests_per_minute: NonNegativeFloat = 0.0  # 0: no limit
    timeout_seconds: Seconds = 60.0  # for a complete response
    retries: SmallIntOrZero = 5  # after a transient failure
    retry_seconds: Pause = 1.0  # the first pause, doubled each time up to a minute
    price_input: NonNegativeFloat | None = None  # per million tokens, in any currency
    price_output: NonNegativeFloat | None = None
    max_requests: Budget | None = None
    max_tokens: Budget | None = None
    max_cost: NonNegativeFloat | None = None
    cache: str | None = None  # response cache file; None: next to the stages
    offline: Flag = False  # use cached responses only


# Fields of EndpointConfig that do not change responses: a run may resume with other values, and its
# stages stay valid. All other fields identify runs and stages.
CONNECTION_FIELDS = (
    "api_key_env", "concurrency", "requests_per_minute", "timeout_seconds", "retries", "retry_seconds", "price_input",
    "price_output", "max_requests", "max_tokens", "max_cost", "cache", "offline",
)  # fmt: skip
JUDGE_CONNECTION_FIELDS = tuple(f"endpoint.{name}" for name in CONNECTION_FIELDS)
GUIDE_CONNECTION_FIELDS = (*JUDGE_CONNECTION_FIELDS, "on_failure", "on_refusal", "max_refused_share", "prefetch")


@section
class JudgeConfig:
    """The judge of completions against references, for the win rate in final evaluations.

    It compares a completion with its prompt's first reference. `spec` is None (no judge),
    'preferences' (a second reward model, trained here on pairs about other posts), 'model:PATH'
    (any reward model), or 'server:MODEL@URL' (a chat model). The fields from `order` on are for a
    server.
    """

    spec: str | None = None
    order: Literal["random", "both"] = "random"  # random per row, or each row in both orders
    # json: the choice as a JSON object, by its schema if the server takes one; text: the paper's
    # question, appendix C.2
    response_format: Literal["json", "text"] = "json"
    template: str | None = None  # file with a question of one's own, for responses in words
    max_new_tokens: Length = 256
    max_refused_share: Probability = 0.5  # of an evaluation's questions; it stops beyond it
    seed: Seed = 0  # of the random order
    endpoint: EndpointConfig = EndpointConfig()


@section
class GuideConfig:
    """The guide: a model, a server, a person, references or a function.

    `spec` is 'sft' (the policy's initial model with the guide's `sampling`), 'trained' (a model
    trained here from `model` and `sft`), 'model:PATH', 'run:DIR', 'server:MODEL@URL', 'human',
    'references', 'FILE.py:name' or 'python:module:name'. `options` are task options for its
    demonstrations. The fields after them are for guides outside this process.
    """

    spec: str = "sft"
    sampling: SamplingParams = SamplingParams(top_k=50, top_p=0.92)
    model: ModelConfig = ModelConfig()
    sft: SupervisedConfig = SupervisedConfig()
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])  # task options
    source: str | None = None  # hash of the source of a function that Python code passed
    continuation: Literal[
        "auto", "completion", "token_ids", "assistant", "continue_final_message", "prefix", "instruction", "none"
    ] = "auto"  # how a prefix is sent; see docs/guides.md
    instruction: str | None = None  # for a chat model, with '{text}'; None: the task's own
    system: str | None = None  # system message for a chat model
    stop: tuple[str, ...] = ()
    tokens_per_policy_token: PositiveFloat = 1.5  # guide tokens allowed per policy token
    invalid_retries: SmallIntOrZero = 2  # new requests after an invalid response
    on_failure: Literal["stop", "wait", "policy"] = "stop"  # after all retries; policy: it samples
    # after a question that the server refuses: the policy samples alone, or the row is left out
    on_refusal: Literal["policy", "drop"] = "policy"
    max_refused_share: Probability = 0.5  # of a run's questions; the run stops beyond it
    prefetch: SmallIntOrZero = 2  # iterations of rollins requested ahead, during training; 0: none
    endpoint: EndpointConfig = EndpointConfig()

    def __post_init__(self) -> None:
        """Complete the name of a function in a file."""
        object.__setattr__(self, "spec", complete_spec(self.spec))


@section
class AlgorithmConfig:
    """The algorithm, and the options of all algorithms by name.

    A comparison uses those of several. An option that is not given has its algorithm's default.
    """

    name: str = "ppo"
    options: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict[str, dict[str, Any]])

    def __post_init__(self) -> None:
        """Validate the options of every algorithm and complete them with its defaults."""
        for name in (self.name, *self.options):
            if name not in ALGORITHMS:
                raise unknown("algorithm", name, ALGORITHMS)
        complete = {name: dataclasses.asdict(self._read_options(name)) for name in ALGORITHMS}
        object.__setattr__(self, "options", complete)

    def _read_options(self, name: str) -> AlgorithmOptions:
        options = self.options.get(name, {})
        return read_options(options, ALGORITHMS[name], f"algorithm '{name}'", f"algorithm.options.{name}.")

    def build(self) -> Algorithm:
        """Return the algorithm with its options."""
        return self._read_options(self.name).build()


@section
class PPOConfig:
    """The collection and the update of one iteration."""

    iterations: PositiveInt = 40
    completions_per_iteration: Size = 128
    samples_per_prompt: Size = 1
    epochs: SmallInt = 2
    minibatch_size: Size = 128  # completions per optimizer step
    learning_rate: Rate = 1e-3
    schedule: Literal["constant", "linear"] = "constant"
    adam_epsilon: Epsilon = 1e-5
    weight_decay: Rate = 0.0
    max_grad_norm: PositiveFloat = 1.0  # per model
    gamma: Probability = 1.0
    gae_lambda: Probability = 0.95
    surrogate: Literal["clip", "cispo"] = "clip"  # cispo: clipped, constant importance weights
    ratio_level: Literal["token", "sequence", "sequence_sum"] = "token"  # sequence: GSPO
    clip_range: PositiveFloat = 0.2
    clip_range_high: PositiveFloat | None = None  # above the ratio 1; None: clip_range
    dual_clip: DualClip | None = None  # bound on the ratio where advantages are negative
    mask_truncated: Flag = False  # train no token of completions without EOS
    entropy_coefficient: Coefficient = 0.0  # bonus in the loss, per nat of the full softmax
    whiten_advantages: Flag = True
    loss_aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    old_log_probs: Literal["sampler", "recompute"] = "sampler"
    ratio_support: Literal["sampled", "full"] = "sampled"  # full: no top-k, top-p; a biased ratio
    dropout: Flag = False
    target_kl: NonNegativeFloat | None = None  # stop the epochs if mean (ratio − 1) − log ratio exceeds it
    check_first_ratio: Flag = False  # raise if the first ratio is off by more than 1e-4
    mle_coefficient: Coefficient = 0.0
    mle_batch: Size | None = None  # targets per optimizer step; None: the minibatch size


@section
class KLConfig:
    """The KL penalty between policy and reference model.

    The estimator is k1 in the reward, and k2 or importance-weighted k3 in the loss.
    """

    coefficient: Coefficient = 0.001
    controller: Literal["fixed", "adaptive"] = "fixed"
    target: PositiveFloat = 6.0  # nats per completion, for the adaptive controller
    horizon: PositiveInt = 10_000  # completions over which the coefficient adapts
    stop_above: PositiveFloat | None = None  # nats per completion at which the run stops
    loss_coefficient: Coefficient = 0.0
    loss_estimator: Literal["k2", "k3"] = "k2"


@section
class CriticConfig:
    """The value model: separate, or sharing weights with the policy.

    `kind` is 'separate' (its own model), 'value_head' (a head on the policy's backbone, with one
    optimizer and `value_coefficient`), or 'lora' (its own adapter on the policy's base weights,
    with a head). `path` is the initial model: a run's critic-*/, or a model for a separate critic.
    """

    kind: Literal["separate", "value_head", "lora"] = "separate"
    path: str | None = None  # initial model; None: the policy's initial model
    learning_rate: Rate = 1e-3
    value_coefficient: Coefficient = 0.5  # value_head only
    value_clip: PositiveFloat | None = 0.2
    initial_value: FiniteFloat = 0.0
    warmup_iterations: NonNegativeInt = 0  # initial iterations that train the critic only
    warm_start_from_guide: Flag = False  # d2lols: V^π is initialized as a copy of V^g


@section
class EvaluationConfig:
    """The evaluation of completions by the policy alone, on held-out prompts.

    `metric_options` are stemming, bertscore_model and the other options of the text metrics. Set
    `also_sampled` if `sampling` is greedy or beam search: final evaluations then also report the
    reward of completions sampled as in training.
    """

    every: NonNegativeInt = 0  # iterations between evaluations on the validation split; 0: none
    prompts: PositiveInt = 128  # in evaluations on the validation split
    final_prompts: PositiveInt = 512  # in final evaluations, on the test split
    sampling: SamplingParams | None = None  # None: as in training
    seed: Seed = 0
    output_perplexity: Flag = True  # under the model before SFT; requires one
    metrics: tuple[str, ...] = ()  # text metrics of final evaluations, as in `rlgf score`
    metric_options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    baselines: tuple[Literal["zero_shot", "sft", "guide"], ...] = ("sft", "guide")  # compared rows
    also_sampled: Flag = False  # reward of sampled completions, in final evaluations
    best_of: SizeOrZero = 0  # completions per prompt, for best of N in final evaluations; 0: none
