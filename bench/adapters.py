"""Memory of training with adapters and with whole models: weights, optimizer states and the peak.

One iteration of AggreVaTeD on a GPT-2-shaped model and an evaluation: policy, critics, reference,
guide, a reward model from preferences, a second one as the judge, and the model before SFT for
output-perplexity. With whole models each is a separate copy, except that guide, reference and the
model before SFT are the same one, as there is no SFT. With adapters there is one copy of the base
weights. Each variant runs in a separate process, so that its peak memory is its own.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench.worker import machine, peak_rss_mb
from bench.workload import Workload, make, read_prompts
from rlgf.algorithms.registry import aggrevated
from rlgf.config.runtime import RuntimeConfig
from rlgf.config.schema import Config
from rlgf.config.sections import (
    CriticConfig,
    EvaluationConfig,
    ModelConfig,
    PolicyLoraConfig,
    PPOConfig,
    PreferenceConfig,
    RewardLoraConfig,
    TaskConfig,
)
from rlgf.data.files import write_json
from rlgf.evaluation.win_rate import RewardJudge
from rlgf.guides.local import ModelGuide
from rlgf.models import lora
from rlgf.models.loading import load_language_model
from rlgf.pipeline import build_models
from rlgf.pipeline.resolve import resolve
from rlgf.pipeline.stage_cache import StageCache, no_report
from rlgf.rewards.reward_model import load_reward_model
from rlgf.supervised.reward_modeling import new_reward_model
from rlgf.tasks.base import Task
from rlgf.trainer import Components, Trainer
from rlgf.types import Prompt, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Workload(layers=12, width=512, heads=8, vocabulary=16_384, texts=16, minibatch_texts=8, epochs=1)
RANK = 8


def megabytes(tensors: Iterable[Any]) -> float:
    """Return the size of distinct storages; shared ones count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) / 1e6


def trainer_of(folder: Path, shared: bool) -> Trainer:
    """Return a trainer with every model that AggreVaTeD needs."""
    config = Config(
        task=TaskConfig(max_new_tokens=SHAPE.new_tokens, min_new_tokens=SHAPE.new_tokens),
        ppo=PPOConfig(iterations=1, completions_per_iteration=SHAPE.texts, epochs=1, minibatch_size=SHAPE.minibatch_texts),
        critic=CriticConfig(kind="lora" if shared else "separate"),
        lora=PolicyLoraConfig(rank=RANK if shared else 0),
        evaluation=EvaluationConfig(every=0, output_perplexity=True),
        runtime=RuntimeConfig(trackers=()),
        model=ModelConfig(path=str(folder / "model")),
        policy=str(folder / "model"),
    )
    start = str(folder / "model")
    reference = load_language_model(start).freeze()
    algorithm, plan = aggrevated(0.8).build(), resolve(config).policy
    models = build_models.build_models(plan, algorithm, reference, start, start)
    backbone = models.policy if shared else None
    reward, judge = (load_reward_model(str(folder / name), backbone=backbone) for name in ("reward", "judge"))
    pre_sft_model = build_models.load_pre_sft_model(plan, reference, StageCache(folder, no_report))
    prompts = [Prompt(text="", ids=tuple(ids), references=("one two three",)) for ids in read_prompts(folder)]
    task = Task("S", prompts, prompts, prompts, reward)
    guide = ModelGuide(reference, SamplingParams(top_p=0.92))
    return Trainer(
        Components(config.trainer, algorithm, task, reward, models, guide, [], pre_sft_model, RewardJudge(judge, "another one"))
    )


def measure(folder: Path, shared: bool) -> dict[str, Any]:
    """Measure the memory that one iteration holds."""
    loaded = peak_rss_mb()
    trainer = trainer_of(folder, shared)
    components = trainer.components
    models, reward, judge, pre_sft_model = components.models, components.reward, components.judge, components.pre_sft_model
    scorers = [scorer.model.backbone.model if shared else scorer.model for scorer in (reward, judge.reward)]
    backbones = [critic.backbone.model for critic in models.critics.values() if critic.backbone]
    all_models = [models.policy.model, models.reference.model, pre_sft_model.model, *scorers, *backbones]
    weights = megabytes(itertools.chain.from_iterable(model.parameters() for model in all_models))
    metrics, _ = trainer.step(0)
    trainer.evaluate(trainer.components.task.test, final=True)
    optimizers = [trainer.updater.policy_optimizer, *trainer.updater.critic_optimizers.values()]
    moments = (v for o in optimizers for state in o.state.values() for v in state.values() if torch.is_tensor(v))
    return {
        "weights_mb": weights, "moments_mb": megabytes(moments), "libraries_mb": loaded, "peak_mb": peak_rss_mb(),
        "seconds": sum(metrics[f"seconds_{stage}"] for stage in ("rollout", "experience", "update")),
        "adapters": sorted(lora.adapter_names(models.policy.model)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=["whole", "adapters"], help="measure one way in this process (for internal use)")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "adapters.json")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.folder, arguments.way == "adapters")))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(SHAPE, folder)
        for seed, name in enumerate(("reward", "judge")):
            new_reward_model(str(folder / "model"), PreferenceConfig(lora=RewardLoraConfig(rank=RANK)), seed).save(
                folder / name
            )
        base = megabytes(load_language_model(str(folder / "model")).model.parameters())
        found: dict[str, Any] = {}
        for way in ("whole", "adapters"):
            command = [sys.executable, "-m", "bench.adapters", "--way", way, "--folder", str(folder)]
            done = subprocess.run(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, check=True, text=True)
            found[way] = json.loads(done.stdout.splitlines()[-1])
            row = found[way]
            print(
                f"{way:9} weights {row['weights_mb']:7,.0f} MB ({row['weights_mb'] / base:.2f} copies of the base), moments "
                f"{row['moments_mb']:7,.0f} MB, peak {row['peak_mb']:7,.0f} MB, {row['seconds']:.1f} s",
                flush=True,
            )
    write_json(
        arguments.out, {"base_mb": base, "rank": RANK, **found, "machine": machine("rlgf", "torch", "transformers", "peft")}
    )


if __name__ == "__main__":
    main()
