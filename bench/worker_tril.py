"""The side of TRIL: `PPO.learn` (with `--beta` `PPO_PP.learn`), paused before each iteration. Runs in TRIL's environment."""

import contextlib
import random
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bench.worker import Turns, arguments, machine, peak_rss_mb, replaced
from bench.workload import Workload, read_prompts, reward

# bitsandbytes prints what it misses to stdout, where the answers go
with contextlib.redirect_stdout(sys.stderr):
    from tril.algorithms import PPO, PPO_PP, base_online
    from tril.base_reward import BaseReward
    from tril.base_task import BaseTask, Sample
    from tril.logging import Tracker
    from tril.policies import LMActor
    from tril.rewards import RewardFunctionRegistry
    from tril.tasks import TaskRegistry


class Prompts(BaseTask):
    """The prompts as text, which TRIL needs; each is the decoded ids of one prompt."""

    @classmethod
    def prepare(cls, split: str, folder: str) -> "Prompts":
        """Return the prompts in `folder`, for training; nothing is evaluated."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        prompts = read_prompts(Path(folder).parent) if split == "train" else []
        # a task must have references, though a reward need not look at them
        return cls(
            [
                Sample(id=number, prompt_or_input_text=tokenizer.decode(ids), references=["w0"])
                for number, ids in enumerate(prompts)
            ]
        )


class PythonReward(BaseReward):
    """The Python function as one of TRIL's rewards."""

    def __init__(self, accelerator: Accelerator, **_: Any) -> None:
        super().__init__(accelerator)
        self.mean = 0.0

    def compute_reward(self, prompts: list[str], texts: list[str], references: Any, *_: Any) -> Tensor:
        """Return the reward of each completion, [completions]."""
        rewards = torch.tensor(reward(texts))
        self.mean = float(rewards.mean())
        return rewards


class Pausing(PPO):
    """An algorithm of TRIL on a CPU that waits for its turn before iterations."""

    turns: Turns

    def _prepare_accelerate(self) -> None:
        """Use TRIL's path for DeepSpeed, which works without it; other setups raise."""
        self.dist_type = self.accelerator.distributed_type
        self._prepare_deepspeed()

    def collect_rollouts(self) -> None:
        """Begin an iteration: wait for the turn, then collect rollouts."""
        self.turns.begin()
        super().collect_rollouts()

    def train_step(self) -> None:
        """End an iteration; the time before that is not generation counts as scoring."""
        self.turns.stage("score")
        super().train_step()
        self.turns.stage("update")
        self.turns.end(self.agent.reward.mean)


class PausingPPO(Pausing):
    """TRIL's PPO."""


class PausingPPOPlusPlus(Pausing, PPO_PP):
    """TRIL's PPO++: its guide generates whole completions, whose beginnings the policy then continues."""

    seed = 0  # TRIL reads it and sets it nowhere


@contextlib.contextmanager
def no_gauge() -> Any:
    """Replace TRIL's memory gauge, which reads CUDA's, by a no-op."""
    yield


def settings(workload: Workload, folder: Path, iterations: int, beta: str) -> dict[str, Any]:
    """Return the settings that TRIL reads from YAML files, which its wheel lacks."""
    model, own = str(folder / "model"), str(folder / "tril")
    lengths = {"max_prompt_len": workload.longest_prompt, "max_gen_len": workload.new_tokens}
    policy = {
        "model_type": "seq2seq" if workload.architecture == "t5" else "causal",
        "model_name": model,
        "create_reference": True,
        "gen_kwargs": {
            "do_sample": True,
            "temperature": workload.temperature,
            "top_k": 0,
            "min_new_tokens": workload.new_tokens,  # its min_length lets the end token be the last one
            "max_new_tokens": workload.new_tokens,
        },
        "prompt_truncation_side": "left",
        **lengths,
    }
    guided = beta != "none"
    if guided:
        # the reference is the guide, as the paper has it, with the paper's decoding
        policy |= {"guide_model_name": model, "beta": float(beta), "alg_type": "ppo_pp"}
        policy["guide_gen_kwargs"] = {**policy["gen_kwargs"], "top_k": 50, "top_p": 0.92}
    numbers = {
        "n_iters": iterations,
        "trajectories_per_update": workload.texts,
        "n_epochs": workload.epochs,
        "batch_size": workload.minibatch_texts,
        "gamma": workload.gamma,
        "gae_lambda": workload.lam,
        "clip_range": workload.clip,
        "clip_range_vf": workload.value_clip,
        "vf_coef": workload.value_coefficient,
        "ent_coef": 0.0,
        "max_grad_norm": 1.0,  # rlgf's default
        "target_kl": None,
        "target_regularization": False,
        "target_coef": 0.0,
        "eval_zero_shot": False,
        "eval_every": iterations + 1,
        "eval_splits": [],
        "eval_batch_size": 1,
        "save_checkpoints": False,
        "verbose": 0,
        **lengths,
    }
    return {
        "alg": {
            "id": "ppo_pp" if guided else "ppo",
            "build_reward": True,
            "args": numbers,
            "kl_div": {"kl_type": "fixedklcontroller", "coeff": workload.kl_coefficient, "kl_lr": 0.0},
            "optimizer": {"id": "adam", "args": {"lr": workload.learning_rate, "weight_decay": 0.0}},
            "tokenizer": {"model_name": own, "padding_side": "left", "truncation_side": "left", "pad_token_as_eos_token": True},
            "policy": {"id": "multi_actor_critic" if guided else "actor_critic", "args": policy},
        },
        "task": {"id": "prompts", "args": {"folder": own}},
        "reward_fn": {"id": "python", "args": {}},
        "sampling": {
            "batch_size_per_process": workload.texts,
            "prompt_truncation_side": "left",
            "prompt_padding_side": "left",
            "context_truncation_side": "right",
            "context_padding_side": "right",
            "eval_generation_kwargs": {},
            **lengths,
        },
    }


def build(workload: Workload, folder: Path, turns: Turns, iterations: int, beta: str) -> Pausing:
    """Return an algorithm for the workload."""
    own = folder / "tril"
    own.mkdir(exist_ok=True)
    # this transformers reads the new one's tokenizer.json, but not the class name in the config next to it
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "model" / "tokenizer.json"), eos_token="<end>")
    tokenizer.save_pretrained(own)
    TaskRegistry.add("prompts", Prompts)
    RewardFunctionRegistry.add("python", PythonReward)
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(workload.seed)
    found = settings(workload, folder, iterations, beta)
    tracker = Tracker(str(own), found, "bench", workload.name, is_main_process=True)
    kind = PausingPPO if beta == "none" else PausingPPOPlusPlus
    algorithm = kind(OmegaConf.create(found), Accelerator(cpu=True), tracker)
    algorithm.turns = turns
    torch.nn.init.zeros_(algorithm.agent.policy.critic.score.weight)  # as rlgf begins
    return algorithm


def main() -> None:
    asked = arguments(__doc__, precision=("fp32",), beta=("none", "0.2", "0.6", "0.8", "1.0"))
    torch.set_num_threads(asked.threads)
    turns = Turns()
    algorithm = build(asked.workload, asked.folder, turns, asked.turns, asked.beta)
    policy, pad = algorithm.agent.policy, algorithm.tokenizer.pad_token_id
    turns.count_optimizer_steps(policy=next(policy.actor.model.parameters()), critic=policy.critic.score.weight)

    def generating(generate: Any) -> Any:
        def generated(actor: LMActor, *rest: Any, **named: Any) -> Any:
            written = generate(actor, *rest, **named)
            # an encoder–decoder's begin with the start token
            start = 1 if actor.model.config.is_encoder_decoder else named["input_ids"].shape[1]
            sequences = (written[0] if isinstance(written, tuple) else written)["sequences"]  # a rollout comes with a mask
            turns.counts["tokens_generated"] += int((sequences[:, start:] != pad).sum())
            turns.stage("generate")
            return written

        return generated

    def forwarding(forward: Any) -> Any:
        def forwarded(both: torch.nn.Module, *rest: Any, actions: Tensor, **named: Any) -> Any:
            # PPO's loss takes in what is no pad token; all else is done with the parts of this, never with the whole
            turns.counts["tokens_trained"] += int((actions != pad).sum())
            return forward(both, *rest, actions=actions, **named)

        return forwarded

    turns.say(
        **machine("tril", "torch", "transformers", "accelerate"),
        parameters=sum(parameter.numel() for parameter in policy.actor.model.parameters()),
        attention="eager",  # this transformers has no other for these models
        loaded_rss_mb=peak_rss_mb(),
    )
    with (
        replaced(base_online, "TorchTracemalloc", lambda _: no_gauge),
        replaced(LMActor, "generate", generating),
        replaced(type(policy), "forward", forwarding),
    ):
        algorithm.learn()


if __name__ == "__main__":
    main()
