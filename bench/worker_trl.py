"""The side of TRL: `PPOTrainer.train`, paused by a callback after each of its iterations. Runs in TRL's environment."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from bench.worker import Turns, arguments, machine, peak_rss_mb
from bench.workload import Workload, read_prompts, reward


class Ids(nn.Module):
    """A backbone that returns token ids as if they were hidden states."""

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """Return the ids, [completions, width, 1]."""
        return SimpleNamespace(hidden_states=[input_ids.unsqueeze(-1)])


class PythonReward(nn.Module):
    """The reward as a model: decodes responses and calls the Python function."""

    base_model_prefix = "ids"

    def __init__(self, tokenizer: Any, new_tokens: int) -> None:
        super().__init__()
        self.ids, self.tokenizer, self.new_tokens = Ids(), tokenizer, new_tokens

    def score(self, ids: Tensor) -> Tensor:
        """Return each completion's reward at every position, [completions, width, 1]; TRL reads the last."""
        texts = self.tokenizer.batch_decode(ids[:, -self.new_tokens :, 0], skip_special_tokens=True)
        return torch.tensor(reward(texts))[:, None, None].expand(ids.shape)


class Pauses(TrainerCallback):
    """A callback that ends the turn after each iteration and awaits the next."""

    def __init__(self, turns: Turns, iterations: int) -> None:
        self.turns, self.left, self.score = turns, iterations, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the turn of the first iteration."""
        self.turns.begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Note the result of the iteration: TRL logs once, at its end."""
        self.score = (logs or {}).get("objective/scores", self.score)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """End the turn: TRL calls this once per iteration, after its update."""
        self.turns.stage("update")
        self.turns.end(self.score)
        self.left -= 1
        if self.left:
            self.turns.begin()


def watch(turns: Turns, pad: int) -> None:
    """Count TRL's tokens and note its stages, by wrapping the functions that its loop calls."""
    generate, log_softmax, forward = (
        ppo_trainer.batch_generation,
        ppo_trainer.selective_log_softmax,
        ppo_trainer.forward,
    )

    def generating(model: Any, queries: Tensor, *rest: Any) -> Any:
        written = generate(model, queries, *rest)
        turns.counts["tokens_generated"] += int((written[0][:, queries.shape[1] :] != pad).sum())
        turns.stage("generate")
        return written

    def forwarding(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and "score" not in turns.stages:
            turns.stage("score")
        return forward(*arguments)

    def selecting(logits: Tensor, ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            turns.counts["tokens_trained"] += int((ids != pad).sum())
        return log_softmax(logits, ids)

    ppo_trainer.batch_generation, ppo_trainer.forward = generating, forwarding
    ppo_trainer.selective_log_softmax = selecting


def build(workload: Workload, folder: Path, turns: Turns, iterations: int, precision: str) -> PPOTrainer:
    """Return a trainer for the workload."""
    model = str(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    # TRL treats every pad token as padding, wherever it occurs: one outside the vocabulary can't be sampled
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    watch(turns, tokenizer.pad_token_id)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    critic = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    nn.init.zeros_(critic.score.weight)  # as rlgf begins
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=precision == "bf16",
        gradient_checkpointing=False,
        # with gradient_accumulation_steps=4 Accelerate would step only at every fourth minibatch; this way all 16 count
        per_device_train_batch_size=workload.texts,
        gradient_accumulation_steps=1,
        num_mini_batches=workload.texts // workload.minibatch_texts,
        num_ppo_epochs=workload.epochs,
        total_episodes=workload.texts * iterations,
        local_rollout_forward_batch_size=workload.texts,
        completion_length=workload.new_tokens,
        stop_token=None,
        temperature=workload.temperature,
        learning_rate=workload.learning_rate,
        lr_scheduler_type="constant",
        kl_coef=workload.kl_coefficient,
        cliprange=workload.clip,
        cliprange_value=workload.value_clip,
        vf_coef=workload.value_coefficient,
        gamma=workload.gamma,
        lam=workload.lam,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=workload.seed,
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=PythonReward(tokenizer, workload.new_tokens),
        value_model=critic,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in read_prompts(folder)]),
        callbacks=[Pauses(turns, iterations)],
    )


def main() -> None:
    asked = arguments(__doc__, precision=("fp32", "bf16"))
    torch.set_num_threads(asked.threads)
    turns = Turns()
    trainer = build(asked.workload, asked.folder, turns, asked.turns, asked.precision)
    turns.count_optimizer_steps(policy=next(trainer.policy_model.parameters()), critic=next(trainer.value_model.parameters()))
    turns.say(
        **machine("trl", "torch", "transformers", "accelerate"),
        parameters=sum(parameter.numel() for parameter in trainer.policy_model.parameters()),
        attention=trainer.policy_model.config._attn_implementation,
        loaded_rss_mb=peak_rss_mb(),
    )
    trainer.train()


if __name__ == "__main__":
    main()
