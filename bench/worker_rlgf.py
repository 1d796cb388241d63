"""The side of rlgf: `Trainer.step` on components built directly."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from bench.worker import Turns, arguments, machine, peak_rss_mb, replaced
from bench.workload import Workload, read_prompts, reward
from rlgf.algorithms import losses
from rlgf.cli.console import keep_freed_memory, quiet
from rlgf.config.runtime import RuntimeConfig
from rlgf.config.schema import Config
from rlgf.config.sections import CriticConfig, EvaluationConfig, KLConfig, PPOConfig, TaskConfig
from rlgf.kernels import dispatch, linear, native
from rlgf.models.critic import new_critic
from rlgf.models.loading import load_language_model
from rlgf.rl.experience import Models
from rlgf.tasks.base import Task
from rlgf.trainer import Components, Trainer
from rlgf.types import POLICY, Prompt, SamplingParams


def build(workload: Workload, folder: Path, turns: int, precision: str = "fp32", critic: str = "separate") -> Trainer:
    """Return a trainer for the workload."""
    model = str(folder / "model")
    config = Config(
        seed=workload.seed,
        task=TaskConfig(max_new_tokens=workload.new_tokens, min_new_tokens=workload.new_tokens),
        ppo=PPOConfig(
            iterations=turns,
            completions_per_iteration=workload.texts,
            epochs=workload.epochs,
            minibatch_size=workload.minibatch_texts,
            learning_rate=workload.learning_rate,
            gamma=workload.gamma,
            gae_lambda=workload.lam,
            clip_range=workload.clip,
            old_log_probs="sampler" if precision == "fp32" else "recompute",
        ),
        kl=KLConfig(coefficient=workload.kl_coefficient),
        critic=CriticConfig(
            kind=critic,
            learning_rate=workload.learning_rate,
            value_clip=workload.value_clip,
            value_coefficient=workload.value_coefficient,
        ),
        sampling=SamplingParams(temperature=workload.temperature),
        evaluation=EvaluationConfig(every=0),
        runtime=RuntimeConfig(trackers=(), precision=precision),
    )
    policy = load_language_model(model)
    prompts = [Prompt(text="", ids=tuple(ids)) for ids in read_prompts(folder)]

    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return reward(texts)

    models = Models(policy, policy.frozen_copy(), {POLICY: new_critic(critic, model, policy, 0.0)})
    task = Task(workload.name, prompts, prompts, prompts, judge)
    return Trainer(Components(config.trainer, config.algorithm.build(), task, judge, models, None, [], None))


def set_up(threads: int) -> None:
    """Configure the process as the command line does."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    quiet()


def unused_paths(model: Path, threads: int) -> dict[str, str]:
    """Return the fast paths that a causal model cannot use here, each with the reason.

    Selects all fast paths.
    """

    def layers(*without: str) -> list[type]:
        dispatch.select("native", without)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        return [type(module) for module in dispatch.replace_modules(skeleton).modules()]

    every = layers()
    found = {
        path: "the model has no such layer"
        for path in dispatch.PATHS
        if path not in ("attention", "log_softmax", "concurrency") and layers(path) == every  # the others replace layers
    }
    dispatch.select("native")
    if not linear.prefers_onednn() and not native.has_matmul():
        found["products"] = "this processor has no library that multiplies faster than torch's default one"
    if threads < 2:
        found["concurrency"] = "there is one thread"
    return found


def main() -> None:
    asked = arguments(
        __doc__,
        precision=("fp32", "bf16"),
        critic=("separate", "value_head"),
        kernels=dispatch.MODES,
        without=("", *dispatch.PATHS),
    )
    set_up(asked.threads)
    turns, about = Turns(), dict[str, Any]()
    if asked.kernels == "native" and not asked.without:  # the side that the others are compared with
        about = {"paths": list(dispatch.PATHS), "unused": unused_paths(asked.folder / "model", asked.threads)}
    dispatch.select(asked.kernels, [asked.without] if asked.without else [])
    trainer = build(asked.workload, asked.folder, asked.turns, asked.precision, asked.critic)
    models = trainer.components.models
    turns.count_optimizer_steps(policy=next(models.policy.model.parameters()), critic=models.critics[POLICY].head.weight)

    def counting(ppo_loss: Any) -> Any:
        def counted(log_probs: Tensor, *rest: Any) -> Any:
            turns.counts["tokens_trained"] += log_probs.numel()
            return ppo_loss(log_probs, *rest)

        return counted

    turns.say(
        **machine("rlgf", "torch", "transformers", *(["rlgf-native"] if asked.kernels == "native" else [])),
        parameters=sum(parameter.numel() for parameter in models.policy.model.parameters()),
        token_budget=trainer.forward_config.token_budget,
        attention=models.policy.model.config._attn_implementation,
        kernels=dispatch.describe(),
        loaded_rss_mb=peak_rss_mb(),
        **about,
    )
    with replaced(losses, "ppo_loss", counting):
        for iteration in range(asked.turns):
            turns.begin()
            metrics, experience = trainer.step(iteration)
            passed = 0.0
            for stage in ("rollout", "experience", "update"):
                passed += metrics[f"seconds_{stage}"]
                turns.stages[stage] = passed
            turns.counts["tokens_generated"] = int(experience.rollout.completion_mask.sum())
            turns.end(metrics["score"])


if __name__ == "__main__":
    main()
