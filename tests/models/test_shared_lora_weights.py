"""One copy of the base weights in training and evaluation, in full precision or 4 bits."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers import WORDS, save_peft_adapter, small
from rlgf.config.loading import override
from rlgf.config.schema import Config
from rlgf.config.sections import LoraConfig
from rlgf.errors import ConfigError
from rlgf.guides.local import ModelGuide
from rlgf.models import loading, lora
from rlgf.models.loading import load_language_model
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.resolve import resolve
from rlgf.pipeline.run import evaluate_policy_on_test, train
from rlgf.pipeline.stage_cache import StageCache, no_report
from rlgf.rewards import reward_model
from rlgf.rewards.reward_model import RewardModel
from rlgf.supervised import reward_modeling
from rlgf.tasks import toy_reviews
from rlgf.trainer import Trainer


def on_adapters(base: Path, folder: Path, *changes: tuple[str, object]) -> Config:
    """A run whose policy, critics, reward model and judge are adapters on the model in `base`."""
    prompts = toy_reviews.build(small().task, WORDS).train[:24]
    pairs = [{"prompt": p.text, "chosen": p.references[0], "rejected": p.references[0].split()[0]} for p in prompts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return small(
        ("algorithm.name", "aggrevated"), ("guide.spec", "sft"), ("lora.rank", 2), ("critic.kind", "lora"),
        ("reward.path", "preferences"), ("preferences.data", str(folder / "pairs.jsonl")), ("preferences.lora.rank", 2),
        ("preferences.training.steps", 2), ("preferences.min_words", 0), ("preferences.training.batch_size", 4),
        ("model.path", str(base)), ("lora.in_sft", True), ("evaluation.output_perplexity", True),
        ("judge.spec", "preferences"), ("ppo.iterations", 1), *changes,
    )  # fmt: skip


class Loads:
    """Record each load of a folder's base weights, and whether in 4 bits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
        self.options: list[dict[str, Any]] = []
        plain = loading.from_pretrained

        def watched(auto: Any, path: str, kind: str, **options: Any) -> Any:
            if "dtype" in options and Path(path).resolve() == base.resolve():
                self.options.append(options)
            return plain(auto, path, kind, **{name: value for name, value in options.items() if name != "bits"})

        monkeypatch.setattr(loading, "from_pretrained", watched)
        monkeypatch.setattr(reward_model, "from_pretrained", watched)
        monkeypatch.setattr(reward_modeling, "from_pretrained", watched)
        monkeypatch.setattr(
            loading, "quantization_config_4bit", lambda device: {"bits": 4}
        )  # stands for bitsandbytes, which needs a GPU
        monkeypatch.setattr(reward_modeling, "quantization_config_4bit", lambda device: {"bits": 4})


@dataclass(frozen=True)
class AdaptedRun:
    """A finished run on adapters, in `folder`/run, and how often the base weights were read for it."""

    config: Config
    folder: Path
    trainer: Trainer
    num_loads: int


@pytest.fixture(scope="module")
def adapted(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AdaptedRun:
    folder = tmp_path_factory.mktemp("adapted")
    config = on_adapters(toy_folder, folder)
    with pytest.MonkeyPatch.context() as patch:
        loads = Loads(patch, toy_folder)
        trainer = train(config, folder / "run", folder / "stages")
    return AdaptedRun(config, folder, trainer, len(loads.options))


@pytest.mark.integration
def test_with_adapters_all_models_share_their_weights(adapted: AdaptedRun, toy_folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert adapted.num_loads == 4  # to train SFT, reward model and judge, each gone when it is done; and once for the run
    parts, critics = adapted.trainer.components, adapted.trainer.components.models.critics
    shared = parts.models.policy.model
    assert isinstance(parts.reward, RewardModel)
    assert parts.models.reference.model is shared is parts.reward.model.backbone.owner is parts.guide.language_model.model
    assert parts.pre_sft_model.model is shared is parts.judge.reward.model.backbone.owner
    assert parts.pre_sft_model.adapter is None
    assert {critic.backbone.owner for critic in critics.values()} == {shared}
    own = {"sft", "policy", "reward", "reward_2", *(f"critic_{origin.name.lower()}" for origin in critics)}
    assert set(lora.adapter_names(shared)) == own
    run, stages = adapted.folder / "run", adapted.folder / "stages"
    for name in ("policy", *(f"critic-{origin.name.lower()}" for origin in critics)):
        assert (run / name / "adapter_config.json").is_file()
    loads = Loads(monkeypatch, toy_folder)
    found = evaluate_policy_on_test(resolve(adapted.config), str(run / "policy"), StageCache(stages, no_report))
    assert len(loads.options) == 1  # for all of them
    results = json.loads((run / "results.json").read_text())
    assert found["output_perplexity_model"] == results["output_perplexity_model"] == str(toy_folder)
    assert found["evaluation"] == pytest.approx(results["evaluation"], rel=1e-4, abs=1e-4, nan_ok=True)
    loads.options.clear()
    again = prepare(override(adapted.config, [("guide.spec", f"model:{run / 'policy'}")]), stages)
    assert len(loads.options) == 1
    assert isinstance(again.guide, ModelGuide)
    assert (again.guide.language_model.model, again.guide.language_model.adapter) == (again.models.policy.model, "guide")


@pytest.mark.integration
def test_weights_in_four_bits_are_so_in_every_stage_and_in_evaluations(
    adapted: AdaptedRun, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = on_adapters(toy_folder, tmp_path, ("lora.load_in_4bit", True))
    monkeypatch.setattr("rlgf.pipeline.preflight.check", lambda run: None)  # which asks for a GPU
    monkeypatch.setattr("rlgf.pipeline.run.check", lambda run: None)
    loads = Loads(monkeypatch, toy_folder)
    train(config, tmp_path / "run", tmp_path / "stages")
    evaluate_policy_on_test(resolve(config), str(tmp_path / "run" / "policy"), StageCache(tmp_path / "stages", no_report))
    evaluate_policy_on_test(resolve(config), None, StageCache(tmp_path / "stages", no_report), zero_shot=True)
    assert [options.get("bits") for options in loads.options] == [4] * 6
    made, others = ({path.name for path in folder.glob("stages/*")} for folder in (tmp_path, adapted.folder))
    assert len(made) == len(others) == 3
    assert not made & others  # the reward model and the judge start from the same model, and are other ones


def test_no_dropout_of_an_adapter_is_on_before_somebody_trains(toy_folder: Path, tmp_path: Path):
    folder = save_peft_adapter(toy_folder, tmp_path / "peft", lora_dropout=0.5)
    model = load_language_model(str(toy_folder)).model
    lora.add(model, "new", LoraConfig(rank=2, dropout=0.5), 0)
    lora.load(model, str(folder), "loaded")
    lora.clone(model, "new", "copied")
    assert not [name for name, module in model.named_modules() if module.training]


def test_an_adapter_beside_its_base_has_the_ends_that_it_has_alone(toy_folder: Path, toy_adapter: Path):
    alone, below = load_language_model(str(toy_adapter)), load_language_model(str(toy_folder))
    beside = load_language_model(str(toy_adapter), share_weights_with=below)
    assert beside.model is below.model
    assert len(alone.eos_token_ids) == 2
    assert beside.eos_token_ids == alone.eos_token_ids == below.eos_token_ids


def test_an_adapter_that_brings_more_than_layers_has_a_model_of_its_own(toy_folder: Path, tmp_path: Path):
    folder = save_peft_adapter(toy_folder, tmp_path / "peft", modules_to_save=["ln_f"])
    below = load_language_model(str(toy_folder))
    assert load_language_model(str(folder), share_weights_with=below).model is not below.model
    assert lora.adapter_names(below.model) == []
    changes = ("policy", str(folder)), ("lora.rank", 2), ("critic.kind", "lora")
    with pytest.raises(ConfigError, match="not only LoRA layers"):
        prepare(small(*changes), tmp_path / "stages")


def test_a_moved_run_finds_the_base_of_its_adapters(toy_folder: Path, tmp_path: Path):
    (tmp_path / "run" / "stages").mkdir(parents=True)
    shutil.copytree(toy_folder, tmp_path / "run" / "stages" / "lm-1")
    save_peft_adapter(tmp_path / "run" / "stages" / "lm-1", tmp_path / "run" / "policy")
    file = tmp_path / "run" / "policy" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(tmp_path / "run/stages/lm-1")}))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert lora.base_of(str(tmp_path / "moved" / "policy")) == str(tmp_path / "moved" / "stages" / "lm-1")


def test_targets_that_a_model_has_not_are_an_error_with_a_name(toy_folder: Path):
    with pytest.raises(ConfigError, match=r"lora\.target_modules are \['nowhere'\]"):
        lora.add(load_language_model(str(toy_folder)).model, "new", LoraConfig(rank=2, target_modules=("nowhere",)), 0)


@pytest.mark.integration
def test_heads_are_not_taken_for_policies(adapted: AdaptedRun):
    reward = next((adapted.folder / "stages").glob("reward-*"))
    for folder in (next((adapted.folder / "run").glob("critic-*")), reward):
        with pytest.raises(ConfigError, match="adapter of a critic or a reward model"):
            load_language_model(str(folder))
