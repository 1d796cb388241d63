"""Adapters: policy, critics, reference and guide on one copy of the base weights."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from helpers import asked, config_of, parameters, tiny_model, word_reward
from rlgf.algorithms.registry import lols, ppo
from rlgf.config.sections import LoraConfig
from rlgf.errors import ConfigError
from rlgf.guides.local import ModelGuide
from rlgf.models import lora
from rlgf.models.forward import pad_rows, token_logits
from rlgf.models.language_model import POLICY_ADAPTER, SFT, LanguageModel
from rlgf.models.loading import load_language_model
from rlgf.pipeline import build_models
from rlgf.pipeline.resolve import resolve
from rlgf.tasks import toy_reviews
from rlgf.trainer import Components, Trainer
from rlgf.types import GUIDE, POLICY, SamplingParams

LORA: dict[str, Any] = {"lora__rank": 2, "lora__alpha": 8.0, "critic__kind": "lora"}
BATCH = asked(pad_rows([[5, 9, 12, 7], [8, 8, 3]]), torch.tensor([0, 0, 1]), torch.tensor([1, 3, 2]))


def says(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return token_logits(model, BATCH)[0]


def saved(folder: Path, **shape: Any) -> str:
    tiny_model(**shape).save(folder)
    return str(folder)


def trainer_on(start: str, algorithm: Any, **values: Any) -> Trainer:
    config = config_of(**{**LORA, "ppo__learning_rate": 0.05, "critic__learning_rate": 0.05, **values})
    reference = load_language_model(start).freeze()
    models = build_models.build_models(resolve(config).policy, algorithm, reference, start, start)
    task = toy_reviews.build(config.task, reference.tokenizer)
    guide = ModelGuide(reference, SamplingParams(top_k=5))
    return Trainer(Components(config.trainer, algorithm, task, word_reward, models, guide, [], None))


def test_one_copy_of_the_weights_serves_all_and_training_moves_what_it_should(tmp_path: Path) -> None:
    start = saved(tmp_path / "base")
    before = says(load_language_model(start))
    trainer = trainer_on(start, lols(0.5, 0.5, 0.5).build())
    models = trainer.components.models
    assert models.policy.model is models.reference.model is trainer.components.guide.language_model.model
    assert {critic.backbone.owner for critic in models.critics.values()} == {models.policy.model}
    assert torch.equal(says(models.policy), before)
    assert torch.equal(says(models.reference), before)
    base = [value.clone() for key, value in models.policy.model.named_parameters() if ".lora_" not in key]
    others = {
        origin: parameters(torch.nn.ParameterList(critic.trainable_parameters())) for origin, critic in models.critics.items()
    }
    trainer.step(0)
    assert torch.equal(says(models.reference), before)  # adapters off: the base as it was
    assert not torch.allclose(says(models.policy), before, atol=1e-4)
    assert all(
        torch.equal(a, b) for a, b in zip(base, [v for k, v in models.policy.model.named_parameters() if ".lora_" not in k])
    )
    for origin in (POLICY, GUIDE):
        assert any(not torch.equal(a, b) for a, b in zip(others[origin], models.critics[origin].trainable_parameters()))


def test_the_first_ratio_is_one_and_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    start = saved(tmp_path / "base")
    trainer = trainer_on(start, ppo().build())
    metrics, _ = trainer.step(0)
    assert metrics["first_ratio_error"] < 1e-5
    state = trainer.state()
    assert sum(value.numel() for value in state["updater"]["policy"].values()) < 0.2 * sum(
        value.numel() for value in trainer.components.models.reference.model.parameters()
    )
    other = trainer_on(start, ppo().build(), seed=1)
    other.updater.load_state(state["updater"])
    assert torch.equal(says(other.components.models.policy), says(trainer.components.models.policy))
    mine, theirs = (t.components.models.critics[POLICY] for t in (trainer, other))
    assert all(torch.equal(a, b) for a, b in zip(mine.trainable_parameters(), theirs.trainable_parameters()))


def test_an_adapter_is_saved_loaded_and_merged_as_transformers_reads_it(tmp_path: Path) -> None:
    trainer = trainer_on(saved(tmp_path / "base"), ppo().build())
    trainer.step(0)
    policy = trainer.components.models.policy
    policy.save(tmp_path / "policy")
    assert {path.name for path in (tmp_path / "policy").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = load_language_model(str(tmp_path / "policy"))
    assert again.adapter == SFT
    assert torch.equal(says(again), says(policy))
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    logits = theirs(input_ids=torch.tensor([[5, 9, 12, 7]])).logits[0]
    assert torch.allclose(logits[[0, 2]], says(policy)[:2], atol=1e-5)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy")
    logits = theirs(input_ids=torch.tensor([[5, 9, 12, 7]])).logits[0]
    assert torch.allclose(logits[[0, 2]], says(policy)[:2], atol=1e-5)
    build_models.merge(str(tmp_path), tmp_path / "whole")  # as of a run
    with pytest.raises(ConfigError, match="there is no folder"):
        build_models.merge(str(tmp_path / "nothing"), tmp_path / "another")
    whole = load_language_model(str(tmp_path / "whole"))
    assert not lora.has_adapters(whole.model)
    assert torch.allclose(says(whole), says(policy), atol=1e-5)
    with pytest.raises(ConfigError, match="holds no adapter"):
        build_models.merge(str(tmp_path / "whole"), tmp_path / "again")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file: choose another --out"):
        build_models.merge(str(tmp_path / "policy"), tmp_path / "file")


def test_the_adapter_of_a_critic_is_not_merged_into_a_language_model(tmp_path: Path) -> None:
    trainer = trainer_on(saved(tmp_path / "base"), ppo().build())
    trainer.components.models.critics[POLICY].save(tmp_path / "critic")
    with pytest.raises(ConfigError, match="a critic or a reward model, which would lose its head"):
        build_models.merge(str(tmp_path / "critic"), tmp_path / "whole")


def test_after_sft_with_an_adapter_that_is_the_reference_and_the_beginning(tmp_path: Path) -> None:
    base = load_language_model(saved(tmp_path / "base"))
    lora.add(base.model, SFT, LoraConfig(rank=2), 0)
    tuned = dataclasses.replace(base, adapter=SFT)
    for parameter in tuned.trainable_parameters():
        parameter.data += 0.1
    tuned.save(tmp_path / "sft")
    expected = says(tuned)
    trainer = trainer_on(str(tmp_path / "sft"), ppo().build())
    models = trainer.components.models
    assert (models.policy.adapter, models.reference.adapter) == (POLICY_ADAPTER, SFT)
    assert torch.allclose(says(models.policy), expected)
    trainer.step(0)
    assert torch.allclose(says(models.reference), expected)
    assert not torch.allclose(says(models.policy), expected, atol=1e-4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank is 0"):
        config_of(critic__kind="lora")
    with pytest.raises(ConfigError, match=r"need adapters"):
        config_of(lora__in_sft=True)
    with pytest.raises(ConfigError, match=r"lora\.dropout is 1"):
        config_of(lora__dropout=1.0)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["lora", "separate", "value_head"])
def test_a_critic_is_saved_with_its_head_and_begins_another(kind: str, tmp_path: Path) -> None:
    start = saved(tmp_path / "base")
    trainer = trainer_on(start, ppo().build(), critic__kind=kind)
    trainer.step(0)
    critic = trainer.components.models.critics[POLICY]
    critic.save(tmp_path / "critic")
    again = trainer_on(start, ppo().build(), critic__kind=kind, critic__path=str(tmp_path / "critic"), seed=3)
    found = again.components.models.critics[POLICY]
    assert bool((found.head.weight != 0).any())
    assert all(torch.equal(a, b) for a, b in zip(found.trainable_parameters(), critic.trainable_parameters()))


def test_a_critic_without_an_adapter_cannot_become_one(tmp_path: Path) -> None:
    start = saved(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"holds no adapter, which critic\.kind=lora needs"):
        trainer_on(start, ppo().build(), critic__path=start)


def test_after_a_block_the_adapter_that_was_active_before_is_active_again():
    base = tiny_model()
    lora.add(base.model, "first", LoraConfig(rank=2), 0)
    lora.add(base.model, "second", LoraConfig(rank=2), 1)
    layer = next(iter(lora._layers(base.model)))
    with lora.activate(base.model, "first"):
        with lora.activate(base.model, "second"):
            assert list(layer.active_adapters) == ["second"]
        assert list(layer.active_adapters) == ["first"]
        with lora.activate(base.model, None):
            assert layer.disable_adapters
        assert not layer.disable_adapters
        with pytest.raises(RuntimeError, match="inside"), lora.activate(base.model, "second"):
            raise RuntimeError("inside")
        assert list(layer.active_adapters) == ["first"]
