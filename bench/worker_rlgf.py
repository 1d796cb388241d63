"""The side of rlgf: `Trainer.step` on parts built by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.worker import Turns, arguments, machine, peak_rss_mb, replaced
from bench.workload import Workload, read_prompts, reward
from rlgf import ops
from rlgf.config import Config, CriticConfig, EvaluationConfig, KLConfig, PPOConfig, RuntimeConfig, TaskConfig
from rlgf.console import keep_freed_memory, quiet
from rlgf.experience import Models
from rlgf.kernels import native
from rlgf.models import load_language_model, new_critic
from rlgf.tasks import Task
from rlgf.trainer import Parts, Trainer
from rlgf.types import POLICY, Decoding, Prompt


def build(workload: Workload, folder: Path, turns: int, precision: str = "fp32", critic: str = "separate") -> Trainer:
    """A trainer for the workload."""
    model = str(folder / "model")
    config = Config(
        seed=workload.seed,
        task=TaskConfig(max_new_tokens=workload.new_tokens, min_new_tokens=workload.new_tokens),
        ppo=PPOConfig(
            iterations=turns,
            texts_per_iteration=workload.texts,
            epochs=workload.epochs,
            minibatch_size=workload.minibatch_texts,
            learning_rate=workload.learning_rate,
            gamma=workload.gamma,
            lam=workload.lam,
            clip=workload.clip,
            old_log_probs="sampler" if precision == "fp32" else "recompute",
        ),
        kl=KLConfig(coefficient=workload.kl_coefficient),
        critic=CriticConfig(
            kind=critic,
            learning_rate=workload.learning_rate,
            value_clip=workload.value_clip,
            value_coefficient=workload.value_coefficient,
        ),
        decoding=Decoding(temperature=workload.temperature),
        evaluation=EvaluationConfig(every=0),
        runtime=RuntimeConfig(trackers=(), precision=precision),
    )
    policy = load_language_model(model)
    prompts = [Prompt(text="", ids=tuple(ids)) for ids in read_prompts(folder)]

    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return reward(texts)

    models = Models(policy, policy.frozen(), {POLICY: new_critic(critic, model, policy, 0.0)})
    task = Task(workload.name, prompts, prompts, prompts, judge)
    return Trainer(Parts(config, config.algorithm.build(), task, judge, models, None, [], None))


def set_up(threads: int) -> None:
    """The process as the command line sets it up."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    quiet()


def main() -> None:
    asked = arguments(__doc__, precision=("fp32", "bf16"), critic=("separate", "trunk"))
    set_up(asked.threads)
    turns = Turns()
    trainer = build(asked.workload, asked.folder, asked.turns, asked.precision, asked.critic)
    models = trainer.parts.models
    turns.count_optimizer_steps(policy=next(models.policy.model.parameters()), critic=models.critics[POLICY].head.weight)

    def counting(ppo_loss: Any) -> Any:
        def counted(log_probs: Tensor, *rest: Any) -> Any:
            turns.counts["tokens_trained"] += log_probs.numel()
            return ppo_loss(log_probs, *rest)

        return counted

    turns.say(
        **machine("rlgf", "torch", "transformers"),
        parameters=sum(parameter.numel() for parameter in models.policy.model.parameters()),
        token_budget=trainer.reading.token_budget,
        attention=models.policy.model.config._attn_implementation,
        compiled=native.describe(),
        loaded_rss_mb=peak_rss_mb(),
    )
    with replaced(ops, "ppo_loss", counting):
        for iteration in range(asked.turns):
            turns.begin()
            metrics, experience = trainer.step(iteration)
            passed = 0.0
            for stage in ("write", "appraise", "update"):
                passed += metrics[f"seconds_{stage}"]
                turns.stages[stage] = passed
            turns.counts["tokens_generated"] = int(experience.rollout.written.sum())
            turns.end(metrics["score"])


if __name__ == "__main__":
    main()
