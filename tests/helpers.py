"""Test helpers: completions spelled by origin, models with known gradients, tiny trainers."""

import ast
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlgf.algorithms.base import Algorithm, PhaseWeight
from rlgf.config.loading import override
from rlgf.config.recipes import Control, imdb_small, quickstart
from rlgf.config.schema import Config
from rlgf.config.sections import EndpointConfig, GuideConfig, ModelConfig, TaskConfig
from rlgf.config.variants import ComparisonPlan, build_variants, plan_comparison
from rlgf.data.files import read_complete_lines
from rlgf.data.preferences import Pair, Pairs
from rlgf.experiments.compare import compare
from rlgf.guides.base import Completion, CompletionRequest, Guide
from rlgf.guides.local import FunctionGuide
from rlgf.models import padding_free
from rlgf.models.critic import Critic
from rlgf.models.forward import MicroBatch, micro_batch
from rlgf.models.language_model import Backbone, LanguageModel
from rlgf.models.loading import load_language_model, new_language_model
from rlgf.models.log_probs import SampledSupport
from rlgf.pipeline.run import train
from rlgf.rl import experience
from rlgf.rl.experience import ForwardConfig, Models, make_experience
from rlgf.rl.guards import Guard
from rlgf.rl.tensors import Experience, Rollout
from rlgf.rl.update import Updater
from rlgf.supervised.examples import Example
from rlgf.tasks import toy_reviews
from rlgf.trainer import Components, Trainer
from rlgf.types import Origin, Prompt, SamplingParams

LETTER = {"-": Origin.PAD, "x": Origin.PROMPT, "P": Origin.POLICY, "G": Origin.GUIDE}
WORDS = toy_reviews.tokenizer(TaskConfig())
END = int(WORDS.eos_token_id)
UNBOUNDED = 10**6  # a token budget that puts everything into one micro-batch


ENDPOINT_FIELDS = frozenset(field.name for field in dataclasses.fields(EndpointConfig))


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file: read, never changed."""
    return ast.parse(path.read_text(encoding="utf-8"))


def in_turn(**values: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with each value of a parameter in turn, as one test: for hundreds of values that take no time.

    A failure names the value, `values` being those of one parameter by their names.
    """
    [(parameter, named)] = values.items()

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)

        @functools.wraps(test)
        def run(*arguments: Any, **fixtures: Any) -> None:
            for name, value in named.items():
                try:
                    test(*arguments, **fixtures, **{parameter: value})
                except BaseException as error:
                    error.add_note(f"{parameter}: {name}")
                    raise

        kept = [one for one in signature.parameters.values() if one.name != parameter]
        run.__signature__ = signature.replace(parameters=kept)  # pyright: ignore[reportAttributeAccessIssue]
        return run

    return decorate


def with_fast(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Parameters of a test that trains runs: all but `fast` are marked `integration`."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.integration) for value in values]


def guide_config(**options: Any) -> GuideConfig:
    """Return a guide's config from its own settings and those of its endpoint, all by their last names."""
    endpoint = {name: options.pop(name) for name in ENDPOINT_FIELDS & set(options)}
    return GuideConfig(**options, endpoint=EndpointConfig(**endpoint))


def guide_changes(**options: Any) -> list[tuple[str, Any]]:
    """Return the same settings as changes of a config."""
    return [(f"guide.endpoint.{name}" if name in ENDPOINT_FIELDS else f"guide.{name}", v) for name, v in options.items()]


# --- rollouts by hand -------------------------------------------------------------------------------------------------


def rollout_of(
    authors: Sequence[str],
    finishers: str | None = None,
    ids: Tensor | None = None,
    phases: Sequence[int] | None = None,
    log_probs: Tensor | None = None,
    support: SampledSupport | None = None,
    minimum: int = 0,
) -> Rollout:
    """A rollout from strings such as `xxGGPP-`: prompt, guide, policy, padding.

    `finishers` has a letter for each text ('P' or 'G'; by default the author of its last token); the switch point is where
    the finisher's run of tokens at the end begins. Rows are padded to the longest.
    """
    authors = [text.ljust(max(map(len, authors)), "-") for text in authors]
    finishers = finishers or "".join(text.rstrip("-")[-1] for text in authors)
    origin = torch.tensor([[int(LETTER[letter]) for letter in text] for text in authors], dtype=torch.uint8)
    responses = [text.strip("-").lstrip("x") for text in authors]
    switch = torch.tensor([len(text.rstrip(author)) for text, author in zip(responses, finishers)])
    zeros = torch.zeros(origin.shape)
    given = zeros if log_probs is None else log_probs
    rows = len(authors)
    return Rollout(
        prompts=[Prompt("")] * rows,
        completions=[""] * rows,
        ids=torch.arange(origin.numel()).view_as(zeros) if ids is None else ids,
        origin=origin,
        switch_position=switch,
        rollout_by=torch.tensor([int(LETTER[letter]) for letter in finishers], dtype=torch.uint8),
        phase=torch.tensor([0] * rows if phases is None else phases),
        ended_with_eos=torch.ones(rows, dtype=torch.bool),
        index=torch.arange(rows),
        group=torch.arange(rows),
        log_probs=given,
        full_log_probs=given,
        support=support,
        min_new_tokens=minimum,
    )


def experience_of(rollout: Rollout, credit: str = "gae", **measured: Tensor) -> Experience:
    """An experience with the given measurements and zeros for the rest."""
    names = ("old_log_probs", "reference_log_probs", "kl", "values", "returns", "advantages")
    zeros = {name: torch.zeros(rollout.ids.shape) for name in names}
    return Experience(rollout, rollout.trained_tokens(credit), torch.zeros(len(rollout.ids)), **{**zeros, **measured})


# --- models of which everything is known ------------------------------------------------------------------------------


class Lookup(nn.Module):
    """A causal model without context: the logits that follow a token depend on that token alone.

    If every token of a rollout has an id of its own, row `i` of `embedding` is moved only by what is learned of the token
    after the one with id `i`.
    """

    def __init__(self, vocabulary: int, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding.from_pretrained(torch.randn(vocabulary, width, generator=generator), freeze=False)
        self.head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
        self.head.weight.copy_(torch.randn(vocabulary, width, generator=generator))
        self.device = torch.device("cpu")

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


def lookup_policy(vocabulary: int, seed: int = 0) -> LanguageModel:
    return LanguageModel(Lookup(vocabulary, seed=seed), None, (0,), 10**6, vocabulary)


def uniform_policy(vocabulary: int) -> LanguageModel:
    """Every token has probability 1 / vocabulary."""
    policy = lookup_policy(vocabulary)
    nn.init.zeros_(policy.model.embedding.weight)
    return policy


class LookupTrunk(nn.Module):
    """The same for a critic: the value of a state depends on its last token alone."""

    def __init__(self, vocabulary: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.ones(vocabulary, width), freeze=False)
        self.device = torch.device("cpu")

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(last_hidden_state=self.embedding(input_ids))


def lookup_critic(vocabulary: int) -> Critic:
    critic = Critic(Backbone(LookupTrunk(vocabulary)), 8, 0.0)
    nn.init.ones_(critic.head.weight)
    return critic


class StubCritic(nn.Module):
    """Values as given: `table`, in the shape of the rollout's ids, holds the value of the state *before* each token."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.backbone = Backbone(SimpleNamespace(device=torch.device("cpu")))
        self.table = nn.Parameter(table.clone())

    def forward(self, batch: MicroBatch, precision: str, hidden: Tensor | None = None) -> Tensor:
        return self.table[batch.token_index]

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())


def asked(ids: Tensor, rows: Tensor, columns: Tensor) -> MicroBatch:
    """All of `ids` as one micro-batch for a causal model."""
    selected = torch.zeros(ids.shape, dtype=torch.bool)
    selected[rows, columns] = True
    model = SimpleNamespace(device=torch.device("cpu"))
    batch = micro_batch(model, torch.arange(len(ids)), ids, torch.zeros(len(ids), dtype=torch.int64), selected)
    assert (batch.rows.tolist(), batch.columns.tolist()) == (rows.tolist(), columns.tolist()), "name them in order"
    return batch


def with_gradients(module: nn.Module, states: Tensor) -> list[Tensor]:
    """The output of a module, and the gradients of a weighted sum of it."""
    read = states.clone().requires_grad_(True)
    result = module(read)
    upstream = torch.linspace(-1, 2, result.numel()).view(result.shape)
    gradients = torch.autograd.grad((result * upstream).sum(), [read, *module.parameters()])
    return [result.detach(), *gradients]


def largest_difference(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of each tensor."""
    assert len(some) == len(others)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(some, others))


NEEDS_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def use_fast_products_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let linear layers multiply by oneDNN whatever the processor and however small the product."""
    from rlgf.kernels import linear  # not there where the fast paths are deleted

    for name in ("MIN_MULTIPLICATIONS", "MIN_ROWS", "MIN_COLUMNS"):
        monkeypatch.setattr(linear, name, 0)
    monkeypatch.setattr(linear, "prefers_onednn", torch.backends.mkldnn.is_available)


WAYS_TO_ATTEND = ("texts", "rows", "kernel")


def let_it_attend(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let packed rows attend by the C kernels, by products of padded rows, or by torch's SDPA."""
    from rlgf.kernels import native  # here, as the others are used without the fast paths as well (tests/kernels_off.py)

    monkeypatch.setattr(native, "_enabled", way == "texts")
    if way == "kernel":
        monkeypatch.setattr(padding_free, "MAX_STORED_WIDTH", 0)


# --- settings and measuring -------------------------------------------------------------------------------------------


WAYS_TO_SAMPLE = {
    "full softmax": SamplingParams(),
    "temperature": SamplingParams(temperature=0.7),
    "top-k": SamplingParams(top_k=5),
    "top-p": SamplingParams(top_p=0.8),
    "all": SamplingParams(temperature=1.3, top_k=9, top_p=0.9),
}


def chi_square_p_value(seen: Any, expected: Any = None) -> float:
    """The probability of counts as unlikely as those seen; without expected ones all are equally likely.

    As `scipy.stats.chisquare`, which takes a second to import.
    """
    counts = torch.as_tensor(seen, dtype=torch.float64)
    wanted = (
        torch.full_like(counts, float(counts.mean())) if expected is None else torch.as_tensor(expected, dtype=torch.float64)
    )
    assert float(counts.sum()) == pytest.approx(float(wanted.sum()))
    statistic = ((counts - wanted).square() / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2))


def config_of(**values: Any) -> Config:
    """A small config; `ppo__epochs=3` sets `ppo.epochs`."""
    base: dict[str, Any] = {
        "task__max_new_tokens": 6, "task__options": {"slots": 2, "train_prompts": 32, "held_out_prompts": 4},
        "ppo__iterations": 3, "ppo__completions_per_iteration": 8, "ppo__minibatch_size": 4, "ppo__epochs": 2,
        "ppo__learning_rate": 1e-2, "critic__learning_rate": 1e-2, "kl__coefficient": 0.05,
    }  # fmt: skip
    return override(Config(), [(key.replace("__", "."), value) for key, value in {**base, **values}.items()])


def reading_of(config: Config) -> ForwardConfig:
    return ForwardConfig(config.sampling, config.ppo, config.runtime.micro_batch_tokens)


def updater_of(models: Models, config: Config, targets: Sequence[Example] = ()) -> Updater:
    guard = Guard(config.runtime.on_nonfinite, config.runtime.max_skipped)
    return Updater(models, reading_of(config), config.kl, config.critic, targets, config.seed, guard)


def measure(
    rollout: Rollout,
    shares: Sequence[PhaseWeight],
    rewards: Sequence[float],
    models: Models,
    config: Config,
    credit: str = "gae",
) -> Experience:
    """`appraise` with the score as the reward."""
    measured = experience.compute_log_probs(rollout, shares, models, reading_of(config))
    return make_experience(rollout, shares, credit, rewards, rewards, measured, config.ppo, config.kl.coefficient)


# --- tiny trainers ----------------------------------------------------------------------------------------------------


def tiny_model(seed: int = 0, dropout: float = 0.0, **shape: Any) -> LanguageModel:
    values = {"layers": 1, "width": 16, "heads": 2, "max_length": 32, "init_std": 0.4, **shape}
    model = new_language_model(ModelConfig(**values), WORDS, seed)
    for module in model.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model.model.eval()
    return model


def tiny_critic(policy: LanguageModel) -> Critic:
    trunk = copy.deepcopy(policy.model.get_decoder() if hasattr(policy.model, "get_decoder") else policy.model.transformer)
    return Critic(Backbone(trunk), int(policy.model.config.hidden_size), 0.0)


def word_reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """Something that differs from text to text: how many positive words, and a little for their order."""
    return [sum((1 + 0.1 * i) * (w in toy_reviews.POSITIVE) for i, w in enumerate(text.split())) for text in texts]


def known_word(requests: Sequence[CompletionRequest]) -> list[Completion]:
    """A guide that writes `superb` three times, or as often as there is room, and ends."""
    return [Completion(" superb" * min(3, request.max_new_tokens), finished=request.max_new_tokens > 3) for request in requests]


def tiny_parts(
    algorithm: Algorithm, config: Config, guide: Guide | None = None, policy: LanguageModel | None = None
) -> Components:
    """Return the components of a trainer, equal for equal arguments."""
    policy = policy or tiny_model()
    task = toy_reviews.build(config.task, policy.tokenizer)
    shared = config.critic.kind == "value_head"
    width = int(policy.model.config.hidden_size)
    critics = {origin: Critic(None, width, 0.0) if shared else tiny_critic(policy) for origin in algorithm.critics}
    targets = [Example(WORDS(p.text)["input_ids"] + WORDS(p.sft_targets[0])["input_ids"], 4) for p in task.train]
    models = Models(policy, tiny_model(seed=7).frozen_copy(), critics)
    return Components(config.trainer, algorithm, task, word_reward, models, guide or FunctionGuide(known_word), targets, None)


def tiny_trainer(
    algorithm: Algorithm, config: Config, guide: Guide | None = None, policy: LanguageModel | None = None
) -> Trainer:
    return Trainer(tiny_parts(algorithm, config, guide, policy))


def parameters(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def descends_by_its_gradient(updater: Updater) -> Updater:
    """The updater with plain gradient descent at rate 1: what a parameter loses in a step is its gradient (unless clipped)."""
    updater.policy_optimizer = _plain(updater.policy_optimizer)
    updater.critic_optimizers = {origin: _plain(adam) for origin, adam in updater.critic_optimizers.items()}
    return updater


def _plain(adam: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for group in adam.param_groups for parameter in group["params"]], lr=1.0, fused=True)


def plain_config(**values: Any) -> Config:
    """One step on all texts at rate 1, the gradient as it is."""
    once = {"ppo__epochs": 1, "ppo__minibatch_size": 64, "ppo__learning_rate": 1.0, "critic__learning_rate": 1.0}
    return config_of(**{**once, "ppo__max_grad_norm": 1e9, "ppo__old_log_probs": "recompute", **values})


def farthest(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest change of any parameter."""
    return max(float((a - b).abs().max()) for a, b in zip(before, after))


# --- pairs of preferences ------------------------------------------------------------------------------------------------

PAIR_WORDS = ["great", "superb", "lovely", "dull", "weak", "awful", "plot", "cast", "music", "script", "sound", "story"]


def preference_pair(number: int) -> Pair:
    """A pair that is told apart by its words alone: praise is preferred."""
    subject, post = PAIR_WORDS[6 + number % 6], f"post {number // 2}"
    prompt = Prompt(f"about {subject} {number % 7}:")
    return Pair(prompt, f" {PAIR_WORDS[number % 3]} {subject}", f" {PAIR_WORDS[3 + number % 3]} {subject}", post)


PAIRS = Pairs([preference_pair(n) for n in range(64)], [preference_pair(n) for n in range(1000, 1016)])


# --- whole runs with a guide on a server --------------------------------------------------------------------------------


SMALL_IMDB = [
    ("task.options.prompt_tokens", 16), ("task.max_new_tokens", 10), ("task.min_new_tokens", 0),
    ("model.vocabulary", 500), ("model.layers", 1), ("model.width", 16), ("model.heads", 2), ("model.max_length", 64),
    ("pretrain.steps", 2), ("pretrain.batch_size", 2), ("sft.epochs", 0.0), ("sft.steps", 2), ("sft.batch_size", 2),
    ("reward.epochs", 1),
    ("ppo.iterations", 2), ("ppo.completions_per_iteration", 6), ("ppo.minibatch_size", 3), ("ppo.epochs", 1),
    ("algorithm.options.ppo_pp.beta", 0.9), ("algorithm.options.lols.beta_guide", 0.9),
    ("algorithm.options.d2lols.beta_guide", 0.9), ("algorithm.options.d2lols.switch_iteration", 1),
    ("evaluation.every", 0), ("evaluation.final_prompts", 4), ("runtime.trackers", []),
]  # fmt: skip


def small_imdb(reviews: Path, *changes: tuple[str, Any]) -> Config:
    """The recipe imdb-small on a few reviews, as small as it can be: two iterations of six texts."""
    return override(imdb_small(), [*SMALL_IMDB, ("task.data", str(reviews)), *changes])


def guided_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of a finished run but for times and latency, after both sums of guide counts were checked."""
    assert (run / "results.json").is_file()
    rows = read_complete_lines(run / "metrics.jsonl")
    for row in rows:
        counts = {name.removeprefix("guide_"): value for name, value in row.items() if name.startswith("guide_")}
        assert counts["attempts"] == counts["succeeded"] + counts["retried"] + counts["given_up"] > 0
        ways = ("generated", "cached", "substituted", "dropped")
        assert counts["rows_needed"] == sum(counts[f"rows_{way}"] for way in ways) > 0
    times = ("seconds", "tokens_per_second", "guide_latency")
    return [{name: value for name, value in row.items() if not name.startswith(times)} for row in rows]


def requires_bf16_products() -> None:
    """Skip the test where oneDNN has no product in bf16 for this processor (AVX2 without AVX-512, say)."""
    ones = torch.ones(2, 2, dtype=torch.bfloat16)
    try:
        torch.ops.mkldnn._linear_pointwise(ones, ones, None, "none", [], "")
    except RuntimeError as error:
        pytest.skip(f"oneDNN has no product in bf16 on this processor: {error}")


# --- whole runs ---------------------------------------------------------------------------------------------------------

FEW_PROMPTS = ["task.options.train_prompts=64", "task.options.held_out_prompts=16"]  # on the command line
SMALL = [
    ("task.options", {"slots": 2, "train_prompts": 64, "held_out_prompts": 16}),
    ("task.max_new_tokens", 5),
    ("task.min_new_tokens", 0),
    ("model.layers", 1),
    ("model.width", 16),
    ("model.heads", 2),
    ("guide.model.layers", 1),
    ("guide.model.width", 16),
    ("guide.model.heads", 2),
    ("sft.steps", 3),
    ("sft.batch_size", 8),
    ("guide.sft.steps", 3),
    ("guide.sft.batch_size", 8),
    ("ppo.iterations", 3),
    ("ppo.completions_per_iteration", 8),
    ("ppo.minibatch_size", 4),
    ("ppo.epochs", 1),
    ("evaluation.every", 2),
    ("evaluation.prompts", 4),
    ("evaluation.final_prompts", 8),
    ("runtime.trackers", []),
]


def small(*changes: tuple[str, object]) -> Config:
    return override(quickstart(), [*SMALL, *changes])


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that is complete: its config, its folder, its trainer, and what was reported."""

    config: Config
    folder: Path
    trainer: Trainer
    lines: list[str]


def train_finished_run(algorithm: str, folder: Path, stages: Path) -> FinishedRun:
    """Train a small run with all that changes from iteration to iteration."""
    config = small(
        ("algorithm.name", algorithm), ("algorithm.options.d2lols.switch_iteration", 1), ("kl.controller", "adaptive"),
        ("reward.normalize", True), ("ppo.mle_coefficient", 0.1), ("runtime.threads", 1), ("runtime.checkpoint_every", 1),
    )  # fmt: skip
    lines = list[str]()
    return FinishedRun(config, folder, train(config, folder, stages, lines.append), lines)


def save_peft_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """Save an adapter of PEFT's own on a model, as another tool would: without a generation config."""
    import peft

    loaded = load_language_model(str(base))
    model: Any = loaded.model
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True, **settings)).save_pretrained(
        folder
    )
    loaded.tokenizer.save_pretrained(folder)
    return folder


DISTILL = Control("distill, then PPO", {"distill.num_completions": 8, "distill.steps": 2, "distill.batch_size": 4})


@dataclasses.dataclass(frozen=True)
class FinishedComparison:
    """A comparison that is complete: its plan, its folder, its results, and what was reported."""

    config: Config
    plan: ComparisonPlan
    folder: Path
    results: dict[str, Any]
    lines: list[str]


def run_small_comparison(folder: Path) -> FinishedComparison:
    """Compare an algorithm, a varied setting and a control over two seeds, with all baselines and best of 2."""
    config = small(
        ("evaluation.every", 1), ("evaluation.best_of", 2), ("evaluation.baselines", ["zero_shot", "sft", "guide"]),
        ("ppo.iterations", 2), ("runtime.threads", 1),
    )  # fmt: skip
    rows = build_variants(config, ["ppo_pp"], {"distill": DISTILL}, {"kl.coefficient": [config.kl.coefficient, 0.5, 0.5]})
    plan, lines = plan_comparison(config, rows, [0, 1]), list[str]()
    return FinishedComparison(config, plan, folder, compare(plan, folder, report=lines.append), lines)
