"""Recipes: functions that return a task's complete, frozen config.

Each number is given with its source.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlgf.config.loading import override
from rlgf.config.schema import Config
from rlgf.config.sections import (
    AlgorithmConfig,
    CriticConfig,
    EvaluationConfig,
    GuideConfig,
    JudgeConfig,
    KLConfig,
    ModelConfig,
    PolicyLoraConfig,
    PPOConfig,
    PreferenceConfig,
    RewardConfig,
    RewardLoraConfig,
    SupervisedConfig,
    TaskConfig,
)
from rlgf.errors import unknown
from rlgf.types import SamplingParams

# Revisions, so that a run is the same later. Of the other two datasets none could be looked up.
IMDB = "stanfordnlp/imdb@e6281661ce1c48d982bc483cf8a173c1bbeb5d31"
TLDR = "CarperAI/openai_summarize_tldr@80e30a9d12e98de09639bc46ee50299b9e871d20"
COMMONGEN = "allenai/common_gen"
COMPARISONS = "CarperAI/openai_summarize_comparisons"


@dataclass(frozen=True)
class Control:
    """A baseline that shares everything with a recipe but the named changes."""

    title: str
    changes: Mapping[str, Any]


def _algorithm(
    beta_guide: float, beta_policy: float, mixing_weight: float = 0.8, switch_iteration: int = 20
) -> AlgorithmConfig:
    """Return the options of all algorithms, with the same rollin probabilities."""
    betas = {"beta_guide": beta_guide, "beta_policy": beta_policy}
    return AlgorithmConfig(
        options={
            "ppo_pp": {"beta": beta_guide},
            "aggrevated": {"beta": beta_policy},
            "lols": {**betas, "mixing_weight": mixing_weight},
            "d2lols": {**betas, "switch_iteration": switch_iteration},
        }
    )


def quickstart() -> Config:
    """Toy reviews: a sparse reward that PPO finds only with the guide's help."""
    model = ModelConfig(layers=2, width=64, heads=4, max_length=64, init_std=0.1)
    sft = SupervisedConfig(steps=500, batch_size=64, learning_rate=3e-3, schedule="linear", adam_beta2=0.98)
    return Config(
        recipe="quickstart",
        task=TaskConfig("toy_reviews", max_new_tokens=16, min_new_tokens=16),
        model=model,
        sft=sft,
        guide=GuideConfig(
            spec="trained",
            sampling=SamplingParams(),
            model=ModelConfig(layers=2, width=96, heads=4, max_length=64, init_std=0.1),
            sft=SupervisedConfig(steps=300, batch_size=64, learning_rate=3e-3, schedule="linear", adam_beta2=0.98),
            options={"right_aspect": 0.9, "positive_adjective": 0.8},
        ),
        algorithm=_algorithm(beta_guide=0.8, beta_policy=0.8, mixing_weight=0.8, switch_iteration=8),
        ppo=PPOConfig(
            iterations=40,
            completions_per_iteration=128,
            epochs=2,
            minibatch_size=128,
            learning_rate=1e-3,
            gamma=1.0,
            gae_lambda=0.95,
        ),
        kl=KLConfig(coefficient=0.001),
        critic=CriticConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(every=5, prompts=128, final_prompts=512, output_perplexity=False),
    )


def imdb() -> Config:
    """IMDB as in the paper, with models and data from the Hub.

    Source: the paper; numbers of completions, minibatches and iterations are those of the released
    code. D2LOLS switches at the paper's iteration 20, which is 40 % of these 50 iterations and 20 %
    of the paper's 100: `--alpha 10` has the paper's share.
    """
    return Config(
        recipe="imdb",
        task=TaskConfig(
            "imdb", IMDB, max_new_tokens=48, min_new_tokens=48,
            options={"prompt": "half", "prompt_tokens": 64, "raw_split": "unsupervised"},
        ),
        model=ModelConfig(path="gpt2"),
        sft=SupervisedConfig(epochs=1.0, batch_size=32, learning_rate=1e-5, seed=0),
        reward=RewardConfig(path="lvwerra/distilbert-imdb"),
        guide=GuideConfig(spec="sft", sampling=SamplingParams(top_k=50, top_p=0.92)),
        algorithm=_algorithm(beta_guide=0.2, beta_policy=0.8, mixing_weight=0.8, switch_iteration=20),
        ppo=PPOConfig(
            iterations=50, completions_per_iteration=112, epochs=5, minibatch_size=28, learning_rate=1e-6, gamma=0.99,
            gae_lambda=0.95,
            mle_coefficient=0.1,
        ),
        kl=KLConfig(coefficient=0.001),
        critic=CriticConfig(learning_rate=1e-6, initial_value=0.5),
        sampling=SamplingParams(top_k=50),
        evaluation=EvaluationConfig(
            every=10, prompts=128, final_prompts=5000, baselines=("zero_shot", "sft", "guide"),
        ),
    )  # fmt: skip


def imdb_small() -> Config:
    """IMDB reviews with a model of 2.6M parameters, trained from scratch.

    D2LOLS switches after 4 of 15 iterations, 27 %; in the paper it is 20 % (see `imdb`).
    """
    return Config(
        recipe="imdb-small",
        task=TaskConfig(
            "imdb", IMDB, max_new_tokens=48, min_new_tokens=48, options={"prompt": "first", "prompt_tokens": 32}
        ),
        model=ModelConfig(layers=4, width=192, heads=6, max_length=128, vocabulary=4096),
        pretrain=SupervisedConfig(
            steps=1024, batch_size=32, learning_rate=2e-3, schedule="cosine", warmup_steps=50, adam_beta2=0.98,
            weight_decay=0.01, max_examples=25_000, seed=0,
        ),
        sft=SupervisedConfig(epochs=1.0, batch_size=32, learning_rate=3e-4, seed=0),
        reward=RewardConfig(path="ngram"),
        guide=GuideConfig(spec="sft", sampling=SamplingParams(top_k=50, top_p=0.92)),
        algorithm=_algorithm(beta_guide=0.2, beta_policy=0.8, mixing_weight=0.8, switch_iteration=4),
        ppo=PPOConfig(
            iterations=15, completions_per_iteration=64, epochs=2, minibatch_size=32, learning_rate=2e-4, gamma=0.99,
            gae_lambda=0.95,
            mle_coefficient=0.1, mle_batch=8,
        ),
        kl=KLConfig(coefficient=0.001),
        critic=CriticConfig(learning_rate=5e-4, initial_value=0.5),
        sampling=SamplingParams(top_k=50),
        evaluation=EvaluationConfig(every=3, prompts=128, final_prompts=512),
    )  # fmt: skip


def commongen() -> Config:
    """CommonGen as in the paper, with models and data from the Hub.

    Source: the paper; the SFT numbers other than its one epoch are ours.
    """
    return Config(
        recipe="commongen",
        task=TaskConfig("commongen", COMMONGEN, max_new_tokens=20, min_new_tokens=5),
        model=ModelConfig(path="google-t5/t5-base"),
        sft=SupervisedConfig(epochs=1.0, batch_size=64, learning_rate=1e-4, seed=0),
        reward=RewardConfig(weights={"cider_d": 1.0, "spice": 1.0}),
        guide=GuideConfig(spec="sft", sampling=SamplingParams(top_k=50, top_p=0.92)),
        algorithm=_algorithm(beta_guide=0.2, beta_policy=0.8, mixing_weight=0.8, switch_iteration=200),
        ppo=PPOConfig(
            iterations=500, completions_per_iteration=128, epochs=4, minibatch_size=32, learning_rate=1e-5, schedule="linear",
            gamma=0.99, gae_lambda=0.95, mle_coefficient=0.1,
        ),
        kl=KLConfig(coefficient=0.001),
        # a separate model: the paper's value coefficient is for a shared one
        critic=CriticConfig(learning_rate=1e-5),
        evaluation=EvaluationConfig(
            every=50, prompts=200, final_prompts=1497, sampling=SamplingParams(num_beams=5), output_perplexity=False,
            metrics=("bleu_4", "cider_d", "spice", "concept_coverage"), baselines=("zero_shot", "sft", "guide"),
        ),
    )  # fmt: skip


def commongen_without_kl() -> Config:
    """CommonGen as in the text of the paper, with KL coefficient λ = 0.

    The paper's table has λ = .001.
    """
    return replace(commongen(), recipe="commongen-without-kl", kl=KLConfig(coefficient=0.0))


def commongen_small() -> Config:
    """CommonGen with an encoder–decoder of 3M parameters, trained from scratch.

    The stages are span corruption, SFT, then reinforcement learning with SPIDEr as the reward.
    """
    return Config(
        recipe="commongen-small",
        task=TaskConfig("commongen", COMMONGEN, max_new_tokens=20, min_new_tokens=5, options={"held_out": 1000}),
        model=ModelConfig(architecture="t5", layers=2, width=192, heads=4, max_length=64, vocabulary=4096),
        pretrain=SupervisedConfig(
            steps=100, batch_size=64, learning_rate=2e-4, schedule="cosine", warmup_steps=20, adam_beta2=0.98,
            weight_decay=0.01, seed=0,
        ),
        sft=SupervisedConfig(
            epochs=2.0, batch_size=32, learning_rate=7e-4, schedule="cosine", warmup_steps=100, adam_beta2=0.98,
            weight_decay=0.01, seed=0,
        ),
        reward=RewardConfig(path="spider"),
        guide=GuideConfig(spec="sft", sampling=SamplingParams(top_k=50, top_p=0.92)),
        algorithm=_algorithm(beta_guide=0.2, beta_policy=0.8, mixing_weight=0.8, switch_iteration=10),
        ppo=PPOConfig(
            iterations=25, completions_per_iteration=128, epochs=4, minibatch_size=128, learning_rate=3e-5, gamma=1.0,
            gae_lambda=1.0,
            mle_coefficient=0.1, mle_batch=32,
        ),
        kl=KLConfig(coefficient=0.001),
        critic=CriticConfig(learning_rate=5e-4),
        evaluation=EvaluationConfig(
            every=0, prompts=200, final_prompts=300, sampling=SamplingParams(num_beams=5), output_perplexity=False,
            also_sampled=True,
            metrics=("bleu_4", "cider_d", "spice", "concept_coverage"), baselines=("zero_shot", "sft", "guide"),
        ),
    )  # fmt: skip


def tldr() -> Config:
    """TL;DR as in the paper, with models and data from the Hub.

    Policy, critic and reward model are adapters on the SFT model's weights. Source: the paper; the
    learning rate is that of its text.
    """
    return Config(
        recipe="tldr",
        policy="CarperAI/openai_summarize_tldr_sft",
        task=TaskConfig(
            "tldr", TLDR, max_new_tokens=50, options={"prompt_tokens": 500, "comparisons": COMPARISONS}
        ),
        model=ModelConfig(path="EleutherAI/gpt-j-6b"),
        reward=RewardConfig(path="preferences", subtract_reference=True),
        preferences=PreferenceConfig(
            training=SupervisedConfig(epochs=1.0, batch_size=32, learning_rate=1e-5, seed=0),
            lora=RewardLoraConfig(rank=32),
        ),
        guide=GuideConfig(spec="sft", sampling=SamplingParams(top_p=0.92)),
        algorithm=_algorithm(beta_guide=0.6, beta_policy=1.0),
        ppo=PPOConfig(
            iterations=100, completions_per_iteration=128, epochs=4, minibatch_size=128, learning_rate=1e-5, gamma=1.0,
            gae_lambda=0.95,
            mle_coefficient=0.1,
        ),
        kl=KLConfig(coefficient=0.002),
        critic=CriticConfig(kind="lora", learning_rate=1e-5, value_coefficient=0.2),
        lora=PolicyLoraConfig(rank=8, alpha=64.0, dropout=0.1),
        evaluation=EvaluationConfig(
            every=10, prompts=128, final_prompts=6_550, sampling=SamplingParams(greedy=True), best_of=8,
            metrics=("rouge1", "rouge2", "rougeL"), baselines=("zero_shot", "sft", "guide"),
        ),
    )  # fmt: skip


def tldr_small() -> Config:
    """TL;DR posts and comparisons with a model of 2M parameters, trained from scratch.

    The judge is a second reward model, trained on other posts. Evaluations sample too: with greedy
    decoding such a small model repeats one phrase.
    """
    return Config(
        recipe="tldr-small",
        task=TaskConfig("tldr", TLDR, max_new_tokens=50, options={"prompt_tokens": 160, "comparisons": COMPARISONS}),
        model=ModelConfig(layers=3, width=192, heads=3, max_length=216, vocabulary=4096),
        pretrain=SupervisedConfig(
            steps=900, batch_size=16, learning_rate=2e-3, schedule="cosine", warmup_steps=50, adam_beta2=0.98,
            weight_decay=0.01, seed=0,
        ),
        sft=SupervisedConfig(epochs=3.0, batch_size=32, learning_rate=3e-4, seed=0),
        reward=RewardConfig(path="preferences", subtract_reference=True),
        preferences=PreferenceConfig(
            training=SupervisedConfig(epochs=1.0, batch_size=32, learning_rate=3e-4, warmup_steps=10, seed=0)
        ),
        judge=JudgeConfig(spec="preferences"),
        guide=GuideConfig(spec="sft", sampling=SamplingParams(top_p=0.92)),
        algorithm=_algorithm(beta_guide=0.6, beta_policy=0.8),
        ppo=PPOConfig(
            iterations=12, completions_per_iteration=64, epochs=2, minibatch_size=32, learning_rate=2e-4, gamma=1.0,
            gae_lambda=0.95,
            mle_coefficient=0.1, mle_batch=8,
        ),
        kl=KLConfig(coefficient=0.01),
        critic=CriticConfig(learning_rate=5e-4),
        evaluation=EvaluationConfig(
            every=4, prompts=64, final_prompts=256, best_of=8, metrics=("rouge1", "rouge2", "rougeL"),
            baselines=("zero_shot", "sft", "guide"),
        ),
    )  # fmt: skip


def prompts() -> Config:
    """Your own data (docs/own-data.md), with a small model trained from scratch.

    `--policy` and `--sft-from` start from another model instead, with the values of `PRETRAINED`.
    """
    return Config(
        recipe="prompts",
        task=TaskConfig("prompts", None, max_new_tokens=32),
        model=ModelConfig(layers=2, width=128, heads=4, max_length=256, vocabulary=1024),
        pretrain=SupervisedConfig(
            steps=100, batch_size=8, learning_rate=2e-3, schedule="cosine", warmup_steps=10, adam_beta2=0.98
        ),
        sft=SupervisedConfig(epochs=3.0, batch_size=16, learning_rate=5e-4),
        preferences=PreferenceConfig(training=SupervisedConfig(epochs=1.0, batch_size=32, learning_rate=1e-4)),
        guide=GuideConfig(spec="sft", sampling=SamplingParams(top_p=0.92)),
        ppo=PPOConfig(iterations=20, completions_per_iteration=64, epochs=2, minibatch_size=32, learning_rate=2e-4),
        kl=KLConfig(coefficient=0.02),
        critic=CriticConfig(learning_rate=5e-4),
        evaluation=EvaluationConfig(every=5, prompts=64, final_prompts=256),
    )


# Of `prompts`, where it starts from a pretrained model, which the rates above would destroy.
# Policy and KL coefficient: TRL's PPO (its GRPO, verl and OpenRLHF have 1e-6); critic: verl
# (OpenRLHF 9e-6); SFT: TRL.
PRETRAINED: Mapping[str, float] = {
    "sft.learning_rate": 2e-5, "ppo.learning_rate": 3e-6, "critic.learning_rate": 1e-5, "kl.coefficient": 0.05,
}  # fmt: skip


def with_pretrained_values(config: Config, given: Collection[str]) -> Config:
    """Return a config of `prompts` with the values for a pretrained start, if any.

    Keys that are `given` stay as they are.
    """
    if config.recipe != "prompts" or (config.policy is None and config.model.path is None):
        return config
    changes = [
        (key, value)
        for key, value in PRETRAINED.items()
        if not any(key == name or key.startswith(f"{name}.") for name in given)
    ]
    return override(config, changes, "recipe prompts")


RECIPES: dict[str, Callable[[], Config]] = {
    "quickstart": quickstart, "imdb": imdb, "imdb-small": imdb_small, "commongen": commongen,
    "commongen-without-kl": commongen_without_kl, "commongen-small": commongen_small, "tldr": tldr,
    "tldr-small": tldr_small, "prompts": prompts,
}  # fmt: skip


def controls(config: Config) -> dict[str, Control]:
    """Return the fair controls of a config's recipe, with the config's own numbers."""
    if config.recipe != "quickstart":
        return {}
    # as many completions as have a guide rollin in a run of PPO++
    completions = round(
        config.ppo.iterations * config.ppo.completions_per_iteration * config.algorithm.options["ppo_pp"]["beta"]
    )
    distill = {"num_completions": completions, "steps": 150, "batch_size": 64, "learning_rate": 1e-3, "adam_beta2": 0.98}
    return {
        "ppo_sharpened": Control("PPO, own sampling sharpened (top-p 0.6)", {"sampling.top_p": 0.6}),
        "distill_ppo": Control(
            f"distill {completions:,} guide completions, then PPO", {f"distill.{key}": value for key, value in distill.items()}
        ),
    }


def recipe(name: str) -> Config:
    """Return the config of the recipe `name`; `rlgf list` lists the names.

    Raises:
        ConfigError: there is no such recipe.

    Example:
        >>> config = rlgf.recipe("quickstart")
        >>> config.task.name, config.ppo.iterations
        ('toy_reviews', 40)
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()
