"""Every number of a run, as frozen dataclasses; a YAML file, a recipe and the command line all become a `Config`.

Unknown keys and impossible values are answered before any work is done, with the place and the nearest valid key.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rlgf import algorithms
from rlgf.errors import UserError, unknown
from rlgf.types import Decoding

strict = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=strict)
class TaskConfig:
    """What is written and how it is judged. `options` belong to the task and are checked by it."""

    name: str = "embedded"
    data: str | None = None  # Hub name, local folder or file
    max_new_tokens: int = 16
    min_new_tokens: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])


@dataclass(frozen=True, config=strict)
class ModelConfig:
    """The model before supervised fine-tuning: a Hub name or local folder, or, without a path, a new one of this shape.

    With a vocabulary of `vocabulary` a byte-level BPE tokenizer is trained on the task's raw text; with 0 the task brings
    its own tokenizer.
    """

    path: str | None = None
    architecture: Literal["gpt2", "llama", "t5"] = "gpt2"  # t5: an encoder–decoder
    layers: int = 2
    width: int = 64
    heads: int = 4
    context: int = 128
    vocabulary: int = 0
    initial_std: float = 0.02


@dataclass(frozen=True, config=strict)
class SupervisedConfig:
    """A supervised training loop: `lm` on raw text, `sft` on targets, `distil` on guide texts. 0 steps and epochs: none."""

    epochs: float = 0.0
    steps: int = 0  # if not 0, instead of epochs
    batch_size: int = 32
    learning_rate: float = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    texts: int = 0  # how many texts of the data are used at most; 0: all. For `distil`: how many texts the guide writes
    seed: int | None = None  # None: the run's seed


@dataclass(frozen=True, config=strict)
class RewardConfig:
    """Who judges: 'task' (the task's own rule), 'ngram' (a small classifier trained here), 'preferences' (a reward model
    trained here on pairs), a sequence classifier or reward model (Hub name or local folder), a folder made by `rlgf reward`, a
    text metric ('spider', 'bleu_4', …: `rlgf list`), or 'python:module:name'. With `weights` it is a sum of several of these,
    each logged."""

    path: str = "task"
    weights: dict[str, float] = dataclasses.field(default_factory=dict[str, float])  # instead of `path`: what is added, and how
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])  # of text metrics, under their names
    clip: float | None = None  # bound on |reward|
    normalise: bool = False  # divide by a running standard deviation around a running mean
    minus_reference: bool = False  # subtract the score of the prompt's first reference
    missing_end_penalty: float = 0.0  # subtracted from texts that were cut off by their budget
    epochs: int = 8  # of the 'ngram' classifier
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards that are asked for."""
        return tuple(self.weights) or (self.path,)


@dataclass(frozen=True, config=strict)
class PreferenceConfig:
    """A reward model trained here on pairs of responses of which people preferred one (reward.path: 'preferences')."""

    data: str | None = None  # pairs as a Hub name, folder or file; None: the task's own
    path: str | None = None  # a whole model to start from, Hub name or folder; None: the policy's starting point
    training: SupervisedConfig = SupervisedConfig(epochs=1.0, learning_rate=1e-5)  # texts: pairs at most
    lora_rank: int = 0  # of LoRA adapters; 0: all weights are trained
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_modules: tuple[str, ...] = ()  # the layers that get adapters; none: PEFT's choice for the architecture
    least_words: int = 5  # pairs with a shorter side are dropped


@dataclass(frozen=True, config=strict)
class JudgeConfig:
    """Who compares a text with its prompt's first reference, for the win rate in final evaluations: None (nobody),
    'preferences' (a second reward model, trained here on pairs about other posts), 'model:PATH' (any reward model), or
    'server:MODEL@URL' (a chat model).

    What follows `order` is for a server.
    """

    spec: str | None = None
    order: Literal["random", "both"] = "random"  # of the two texts: drawn for each row, or each row asked in both
    template: str | None = None  # a file with the question; None: that of the paper's appendix C.2
    answer_tokens: int = 256
    thinking_tokens: int = 0  # allowed on top of those, for models that think first
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    extra_body: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    extra_headers: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    concurrency: int = 8  # requests under way at once
    requests_per_minute: float = 0.0  # 0: no limit
    timeout_seconds: float = 60.0  # for a whole answer
    retries: int = 5  # after a transient failure
    retry_seconds: float = 1.0  # the first pause, doubled each time up to a minute
    max_requests: int | None = None  # the evaluation stops at these; answers that were paid for are kept
    cache: str | None = None  # a file for its answers; None: beside the stages
    offline: bool = False  # answers from the cache alone
    seed: int = 0  # of the order


@dataclass(frozen=True, config=strict)
class GuideConfig:
    """Who guides: 'sft' (the policy's own starting point with this decoding), 'trained' (a model made here from the
    sections below), 'model:PATH', 'run:DIR', 'server:MODEL@URL', 'human', 'references', or 'python:module:name'.

    What follows `options` is for guides outside this process.
    """

    spec: str = "sft"
    decoding: Decoding = Decoding(top_k=50, top_p=0.92)
    model: ModelConfig = ModelConfig()
    sft: SupervisedConfig = SupervisedConfig()
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])  # task options for its demonstrations
    continuation: Literal[
        "auto", "completion", "token_ids", "assistant", "continue_final_message", "prefix", "instruction", "none"
    ] = "auto"  # how a prefix is handed over; docs/guides.md says what works where
    instruction: str | None = None  # tells a chat model what to do with '{text}'; None: the task's own
    system: str | None = None  # a system message for it
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    stop: tuple[str, ...] = ()
    extra_body: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    extra_headers: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    tokens_per_policy_token: float = 1.5  # how many of its own tokens it may write for each policy token asked for
    thinking_tokens: int = 0  # allowed on top of those, for models that think first
    concurrency: int = 8  # requests under way at once
    requests_per_minute: float = 0.0  # 0: no limit
    timeout_seconds: float = 60.0  # for a whole answer
    retries: int = 5  # after a transient failure
    retry_seconds: float = 1.0  # the first pause, doubled each time up to a minute
    invalid_retries: int = 2  # new draws after an answer that cannot be used
    on_failure: Literal["stop", "wait", "policy"] = "stop"  # when retries are used up: the policy writes in its stead
    price_input: float | None = None  # per million tokens, in any one currency
    price_output: float | None = None
    max_requests: int | None = None  # the run stops with a checkpoint at these
    max_tokens: int | None = None
    max_cost: float | None = None
    cache: str | None = None  # a file for its answers; None: beside the stages
    prefetch: int = 2  # iterations whose rollins a server is asked for ahead, while the policy trains; 0: none
    offline: bool = False  # answers from the cache alone


JUDGE_REACHING = (
    "api_key_env", "concurrency", "requests_per_minute", "timeout_seconds", "retries", "retry_seconds", "max_requests", "cache",
    "offline",
)  # fmt: skip
# How a guide is reached, not what it writes: a run may be continued with other values, and its stages stay what they are.
GUIDE_REACHING = (
    "api_key_env", "concurrency", "requests_per_minute", "timeout_seconds", "retries", "retry_seconds", "on_failure",
    "price_input", "price_output", "max_requests", "max_tokens", "max_cost", "cache", "prefetch",
    "offline",
)  # fmt: skip


@dataclass(frozen=True, config=strict)
class AlgorithmConfig:
    """Which member of the family, and its parameters; see `rlgf.algorithms`."""

    name: str = "ppo"
    beta_guide: float = 0.2  # probability that the guide begins, where it rolls in (PPO++)
    beta_policy: float = 0.8  # probability that the policy begins, where the guide finishes (AggreVaTeD)
    mixing_weight: float = 0.8  # alpha of LOLS
    switch_iteration: int = 20  # alpha of D2LOLS
    mix: Literal["advantage", "iteration"] = "advantage"
    credit: algorithms.Credit = "gae"
    switch_guide: algorithms.SwitchRule = "uniform"
    switch_policy: algorithms.SwitchRule = "uniform"

    def build(self) -> algorithms.Algorithm:
        """The algorithm these numbers describe."""
        betas = (self.beta_guide, self.beta_policy)
        switches: tuple[algorithms.SwitchRule, algorithms.SwitchRule] = (self.switch_guide, self.switch_policy)
        if self.name == "ppo":
            return algorithms.ppo()
        if self.name == "ppo_pp":
            return algorithms.ppo_pp(self.beta_guide, self.switch_guide)
        if self.name == "aggrevated":
            return algorithms.aggrevated(self.beta_policy, self.credit, self.switch_policy)
        if self.name == "lols":
            return algorithms.lols(*betas, self.mixing_weight, self.mix, self.credit, *switches)
        if self.name == "d2lols":
            return algorithms.d2lols(*betas, self.switch_iteration, self.credit, *switches)
        raise unknown("algorithm", self.name, algorithms.NAMES)


@dataclass(frozen=True, config=strict)
class PPOConfig:
    """One iteration's collection and update. Source: algorithms.md, section 4."""

    iterations: int = 40
    texts_per_iteration: int = 128
    samples_per_prompt: int = 1
    epochs: int = 2
    minibatch_size: int = 128  # texts per optimizer step
    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear"] = "constant"
    adam_epsilon: float = 1e-5
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0  # per model
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    whiten_advantages: bool = True
    loss_aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    old_log_probs: Literal["sampler", "recompute"] = "sampler"
    ratio_support: Literal["sampled", "full"] = "sampled"  # 'full' ignores what top-k or top-p cut off: a biased ratio
    dropout: bool = False
    target_kl: float | None = None  # stop an iteration's epochs once the mean of (ratio − 1) − log ratio exceeds this
    check_first_ratio: bool = False  # an error if the first ratio is off by more than 1e-4
    mle_coefficient: float = 0.0
    mle_batch: int | None = None  # targets per optimizer step; None: the minibatch size


@dataclass(frozen=True, config=strict)
class KLConfig:
    """The penalty for leaving the reference. In the reward it is k1; in the loss k2 or importance-weighted k3."""

    coefficient: float = 0.001
    controller: Literal["fixed", "adaptive"] = "fixed"
    target: float = 6.0  # nats per text, for the adaptive controller
    horizon: int = 10_000  # texts over which it moves
    loss_coefficient: float = 0.0
    loss_estimator: Literal["k2", "k3"] = "k2"


@dataclass(frozen=True, config=strict)
class CriticConfig:
    """Who estimates values: a model of its own, a head on the policy's trunk (one optimizer, value coefficient), or an
    adapter of its own on the policy's base weights, with a head."""

    kind: Literal["separate", "trunk", "adapter"] = "separate"  # adapter: one of its own on the policy's weights
    path: str | None = (
        None  # where it starts: a run's critic-*/, or a model for a separate one; None: the policy's starting point
    )
    learning_rate: float = 1e-3
    value_coefficient: float = 0.5  # trunk only
    value_clip: float | None = 0.2
    initial_value: float = 0.0
    warmup_iterations: int = 0  # iterations at the start in which only the critic learns
    warm_start_from_guide: bool = False  # d2lols: V^π starts as a copy of V^g


@dataclass(frozen=True, config=strict)
class EvaluationConfig:
    """Fresh texts by the policy alone, on prompts it never trained on."""

    every: int = 0  # iterations between evaluations on the validation split; 0: none
    prompts: int = 128  # at those
    final_prompts: int = 512  # on the test split, at the end
    decoding: Decoding | None = None  # None: as in training
    seed: int = 0
    output_perplexity: bool = True  # under the model before SFT; needs one
    metrics: tuple[str, ...] = ()  # text metrics of final evaluations, as `rlgf score` has them
    metric_options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])  # stemming, bertscore_model, …_layers
    baselines: tuple[Literal["zero_shot", "sft", "guide"], ...] = ("sft", "guide")  # rows of a comparison beside the runs
    drawn: bool = False  # at the end also the reward of texts drawn as in training, where `decoding` searches
    best_of: int = 0  # at the end also this many texts for each prompt, of which the one the reward likes best; 0: none


@dataclass(frozen=True, config=strict)
class AdapterConfig:
    """LoRA adapters in the place of whole models: policy, critics, reference and guide share one copy of the base weights.

    The reference is the frozen adapter that SFT left, or, where SFT trained whole weights, the base with adapters off.
    """

    rank: int = 0  # 0: no adapters
    alpha: float = 16.0
    dropout: float = 0.0  # in supervised stages; off in reinforcement learning
    targets: tuple[str, ...] = ()  # names of the layers that are adapted; empty: every linear layer but the head
    in_sft: bool = False  # whether supervised fine-tuning trains an adapter too
    load_in_4bit: bool = False  # the base weights in 4 bits, by bitsandbytes


@dataclass(frozen=True, config=strict)
class RuntimeConfig:
    """The machine. Defaults leave results independent of it."""

    threads: int = 0  # 0: all cores (command line); the library never sets threads by itself
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    token_budget: int = 0  # tokens of one micro-batch; 0: 2,048, or for RL on a GPU the most that fits, found at the start
    offload: tuple[Literal["reference", "critic"], ...] = ()  # what rests in the host's memory while a GPU does other work
    kernels: Literal["auto", "torch", "plain"] = "auto"  # torch: nothing compiled; plain: models as transformers has them
    checkpoint_every: int = 10  # iterations; the last one is always kept
    trackers: tuple[str, ...] = ("tensorboard",)
    profile: bool = False  # the second iteration under torch's profiler: RUN/profile/

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of one micro-batch where nothing is searched for."""
        return self.token_budget or MICRO_BATCH_TOKENS


@dataclass(frozen=True, config=strict)
class Config:
    """A whole run."""

    recipe: str = "custom"
    seed: int = 0
    policy: str | None = None  # start from this model folder instead of the lm and sft stages
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    lm: SupervisedConfig = SupervisedConfig()
    sft: SupervisedConfig = SupervisedConfig()
    distil: SupervisedConfig = SupervisedConfig()
    reward: RewardConfig = RewardConfig()
    preferences: PreferenceConfig = PreferenceConfig()
    judge: JudgeConfig = JudgeConfig()
    guide: GuideConfig = GuideConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    ppo: PPOConfig = PPOConfig()
    kl: KLConfig = KLConfig()
    critic: CriticConfig = CriticConfig()
    adapter: AdapterConfig = AdapterConfig()
    decoding: Decoding = Decoding()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be trained with; each message says what, where and how to mend it."""
        check_numbers(self)


MICRO_BATCH_TOKENS = 2048  # where none are given: fewer cost a CPU more calls, more leave its caches

FREE = (  # sections whose keys are not known here
    "task.options", "guide.options", "reward.weights", "reward.options", "evaluation.metric_options",
)  # fmt: skip

AT_LEAST_ONE = """
    task.max_new_tokens ppo.iterations ppo.texts_per_iteration ppo.samples_per_prompt ppo.epochs ppo.minibatch_size
    guide.concurrency guide.max_requests guide.max_tokens
    ppo.mle_batch evaluation.prompts evaluation.final_prompts runtime.checkpoint_every
    model.layers model.width model.heads model.context
    guide.model.layers guide.model.width guide.model.heads guide.model.context
    lm.batch_size sft.batch_size distil.batch_size guide.sft.batch_size preferences.training.batch_size
    judge.answer_tokens judge.concurrency judge.max_requests preferences.lora_alpha
"""
NOT_NEGATIVE = """
    guide.prefetch guide.requests_per_minute guide.retries guide.retry_seconds guide.invalid_retries
    guide.thinking_tokens guide.max_cost
    guide.price_input guide.price_output
    ppo.learning_rate ppo.weight_decay ppo.mle_coefficient critic.learning_rate critic.value_coefficient
    critic.warmup_iterations kl.coefficient kl.loss_coefficient evaluation.every runtime.threads reward.clip model.vocabulary
    runtime.token_budget
    adapter.rank
    lm.learning_rate lm.steps lm.epochs lm.texts sft.learning_rate sft.steps sft.epochs sft.texts
    distil.learning_rate distil.steps distil.epochs distil.texts
    guide.sft.learning_rate guide.sft.steps guide.sft.epochs guide.sft.texts
    preferences.training.learning_rate preferences.training.steps preferences.training.epochs preferences.training.texts
    preferences.lora_rank preferences.least_words evaluation.best_of
    judge.thinking_tokens judge.requests_per_minute judge.retries judge.retry_seconds
"""
ABOVE_ZERO = """
    guide.timeout_seconds guide.tokens_per_policy_token judge.timeout_seconds adapter.alpha
    ppo.clip ppo.adam_epsilon ppo.max_gradient_norm kl.target kl.horizon critic.value_clip
"""
SHARES = "algorithm.beta_guide algorithm.beta_policy ppo.gamma ppo.lam preferences.lora_dropout"
BOUNDS: list[tuple[str, Callable[[float], bool], str]] = [  # nan is within none of them
    (AT_LEAST_ONE, lambda value: value >= 1, "must be at least 1"),
    (NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "must be a number that is not negative"),
    (ABOVE_ZERO, lambda value: value > 0, "must be above 0"),
    (SHARES, lambda value: 0 <= value <= 1, "must lie within [0, 1]"),
    ("seed", lambda value: 0 <= value < 2**63, "must lie within [0, 2^63)"),
]


SECRET_NAME = re.compile(r"key|token|secret|auth(?!or\b)|password|cookie|credential", re.IGNORECASE)  # of a header
SECRET_FIELD = re.compile(  # of a request's body, where max_tokens is none
    r"api[-_]?key|secret|password|authorization|credential|(access|auth|bearer|session)[-_]?token", re.IGNORECASE
)
SECRET_VALUE = re.compile(r"(bearer|basic)\s|sk-|hf_|gh[opsu]_", re.IGNORECASE)  # whatever it is called


def check_numbers(config: Config) -> None:
    """Bounds on single numbers, then on pairs of them."""
    flat = flatten(to_dict(config))
    for keys, holds, words in BOUNDS:
        for key in keys.split():
            value = flat[key]
            if value is not None and not holds(value):
                raise UserError(f"{key} is {value:g}, but {words}.")
    _check_decodings(config)
    _check_pairs(config)
    _check_guide(config.guide)
    _check_reward(config.reward)
    check_secrets("judge", config.judge.extra_headers, config.judge.extra_body)


def _check_decodings(config: Config) -> None:
    decodings = {"decoding": config.decoding, "guide.decoding": config.guide.decoding}
    decodings["evaluation.decoding"] = config.evaluation.decoding or config.decoding
    for name, decoding in decodings.items():
        if not decoding.temperature > 0 or decoding.top_k < 0 or not 0.0 < decoding.top_p <= 1.0 or decoding.beams < 1:
            raise UserError(f"{name} needs temperature > 0, top_k >= 0, 0 < top_p <= 1 and beams >= 1; it has {decoding}.")
    if not config.decoding.samples:
        how = "greedy" if config.decoding.greedy else "beams"
        raise UserError(f"decoding.{how} is for evaluation: a policy that does not sample cannot learn from its choices.")


def _check_reward(reward: RewardConfig) -> None:
    for name, weight in reward.weights.items():
        if not math.isfinite(weight):
            raise UserError(f"reward.weights.{name} is {weight}, but must be a number.")
    for name in reward.options:
        if name not in reward.names:
            raise unknown("reward in reward.options", name, reward.names)


def _check_guide(guide: GuideConfig) -> None:
    if guide.max_cost is not None and (guide.price_input is None or guide.price_output is None):
        raise UserError("guide.max_cost needs guide.price_input and guide.price_output (per million tokens): give both.")
    if guide.instruction is not None and "{text}" not in guide.instruction:
        raise UserError("guide.instruction does not say where the text goes that is to be continued: put {text} there.")
    check_secrets("guide", guide.extra_headers, guide.extra_body)
    if guide.continuation == "token_ids" and (guide.stop or guide.thinking_tokens):
        raise UserError(
            "guide.stop and guide.thinking_tokens are about text, but guide.continuation is token_ids: leave them out."
        )


def check_secrets(section: str, headers: Mapping[str, str], body: Mapping[str, Any]) -> None:
    """Refuse secrets that are written out in the settings of a server."""
    for name, value in headers.items():
        if (SECRET_NAME.search(name) or SECRET_VALUE.match(value)) and not value.startswith("$"):
            raise UserError(
                f"{section}.extra_headers.{name} is written out, but secrets come from the environment: write $NAME of a "
                "variable."
            )
    for name, value in flatten(body).items():
        if SECRET_FIELD.search(name) or (isinstance(value, str) and SECRET_VALUE.match(value)):
            raise UserError(
                f"{section}.extra_body.{name} looks like a secret, which would stay in files: use {section}.api_key_env or "
                f"{section}.extra_headers."
            )


def _check_pairs(config: Config) -> None:
    ppo, task = config.ppo, config.task
    for name, shape in {"model": config.model, "guide.model": config.guide.model}.items():
        if shape.width % shape.heads:
            raise UserError(f"{name}.width is {shape.width}, but must be a multiple of {name}.heads = {shape.heads}.")
    if not 0 <= task.min_new_tokens <= task.max_new_tokens:
        raise UserError(
            f"task.min_new_tokens is {task.min_new_tokens}, but must lie within [0, {task.max_new_tokens}] (max_new_tokens)."
        )
    if ppo.texts_per_iteration % ppo.samples_per_prompt:
        raise UserError(
            f"ppo.texts_per_iteration ({ppo.texts_per_iteration}) must be a multiple of ppo.samples_per_prompt "
            f"({ppo.samples_per_prompt})."
        )
    adapter = config.adapter
    if config.critic.kind == "adapter" and not adapter.rank:
        raise UserError("critic.kind is 'adapter', but adapter.rank is 0: set adapter.rank, or choose another critic.kind.")
    if (adapter.in_sft or adapter.load_in_4bit) and not adapter.rank:
        raise UserError("adapter.in_sft and adapter.load_in_4bit need adapters: set adapter.rank.")
    if not 0.0 <= adapter.dropout < 1.0:
        raise UserError(f"adapter.dropout is {adapter.dropout:g}, but must lie within [0, 1).")
    if config.runtime.precision == "bf16" and ppo.old_log_probs == "sampler":
        raise UserError(
            "runtime.precision is bf16, in which sampling and training disagree by percents: set ppo.old_log_probs=recompute."
        )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownArgumentType]
    return flat


_adapter: TypeAdapter[Config] = TypeAdapter(Config)


def from_dict(values: Mapping[str, Any], where: str) -> Config:
    """A config from nested mappings; errors name the key, the place and the nearest valid key."""
    check_keys(values, Config, where)
    try:
        return _adapter.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {key} = {first.get('input')!r}: {first['msg']}.") from None


def check_keys(values: object, kind: Any, where: str, prefix: str = "", list_all: bool = False) -> None:
    """Raise for a key that `kind`, a config dataclass, does not have; the nearest is found in it or in the whole config."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys to values.")
    hints = get_type_hints(kind)
    for key, value in cast("Mapping[str, Any]", values).items():
        if key not in hints:
            raise unknown(f"key ({where})", key, hints) if list_all else unknown_key(f"{prefix}{key}", where)
        if dataclasses.is_dataclass(hints[key]):
            check_keys(value, hints[key], where, f"{prefix}{key}.")


def read_options(values: Mapping[str, Any], kind: type, where: str, prefix: str) -> Any:
    """Options whose keys no config knows as `kind`, their own dataclass; unknown keys and wrong types are refused."""
    check_keys(values, kind, where, prefix, list_all=True)
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {prefix}{key} = {first.get('input')!r}: {first['msg']}.") from None


def unknown_key(key: str, where: str) -> UserError:
    """The error for a key that no config has, with the nearest that one has."""
    valid = list(all_keys(Config))
    last = {name.split(".")[-1]: name for name in valid}
    close = [last[key]] if key in last else difflib.get_close_matches(key, valid, n=1, cutoff=0.6)
    close = close or [last[name] for name in difflib.get_close_matches(key.split(".")[-1], list(last), n=1, cutoff=0.5)]
    hint = f"did you mean '{close[0]}'?" if close else "`rlgf show config` lists every key."
    return UserError(f"{where}: unknown key '{key}': {hint}")


def all_keys(kind: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a config dataclass, sections included."""
    keys: list[str] = []
    for name, hint in get_type_hints(kind).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += all_keys(hint, f"{prefix}{name}.")
    return keys


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts, as they go into `config.yaml`."""
    return dataclasses.asdict(config)


def override(config: Config, changes: Sequence[tuple[str, Any]], where: str = "override") -> Config:
    """The config with dotted keys replaced: `override(config, [("ppo.epochs", 4)])`."""
    values = to_dict(config)
    valid = set(all_keys(Config))
    for key, value in changes:
        free = any(key.startswith(f"{section}.") for section in FREE)
        if key not in valid and not free:
            optional = key.rsplit(".", 1)[0]
            if optional != "evaluation.decoding":
                raise unknown_key(key, where)
        *sections, last = key.split(".")
        place = values
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
        place[last] = value
    return from_dict(values, where)


def parse_assignment(text: str) -> tuple[str, Any]:
    """'section.field=value' as a key and a value, the value read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"command line: '{text}' is not of the form section.field=value.")
    try:
        parsed: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"command line: the value of '{text}' is not valid YAML: quote it.") from None
    if parsed == value:
        try:  # YAML 1.1 reads 1e-4 as a string
            parsed = float(value)
        except ValueError:
            parsed = value
    return key, parsed


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, but holds {type(values).__name__}.")
    return cast("dict[str, Any]", values)


def dump(config: Config) -> str:
    """The complete config as YAML."""
    return yaml.safe_dump(_adapter.dump_python(config, mode="json"), sort_keys=False, allow_unicode=True)
