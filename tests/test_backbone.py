"""One copy of the base weights for all that reads with them, in training and in evaluation, whole or in 4 bits."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlgf import adapters, models, reward_model
from rlgf.config import Config, override
from rlgf.errors import UserError
from rlgf.guides import ModelGuide
from rlgf.pipeline import evaluate_policy_at, prepare, silent, train
from rlgf.reward_model import RewardModel
from test_pipeline import small


def on_adapters(folder: Path, *changes: tuple[str, object]) -> Config:
    """A run whose policy, critics, reward model and judge are adapters on the model in `folder`/base."""
    plain = prepare(small(), folder / "stages")
    plain.models.policy.save(folder / "base")
    prompts = plain.task.train[:24]
    pairs = [{"prompt": p.text, "chosen": p.references[0], "rejected": p.references[0].split()[0]} for p in prompts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return small(
        ("algorithm.name", "aggrevated"), ("guide.spec", "sft"), ("adapter.rank", 2), ("critic.kind", "adapter"),
        ("reward.path", "preferences"), ("preferences.data", str(folder / "pairs.jsonl")), ("preferences.lora_rank", 2),
        ("preferences.training.steps", 2), ("preferences.least_words", 0), ("preferences.training.batch_size", 4),
        ("model.path", str(folder / "base")), ("adapter.in_sft", True), ("evaluation.output_perplexity", True),
        ("judge.spec", "preferences"), *changes,
    )  # fmt: skip


class Loads:
    """How often the base weights of a folder are read, and whether in 4 bits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
        self.options: list[dict[str, Any]] = []
        plain = models.from_pretrained

        def watched(auto: Any, path: str, kind: str, **options: Any) -> Any:
            if "dtype" in options and Path(path).resolve() == base.resolve():
                self.options.append(options)
            return plain(auto, path, kind, **{name: value for name, value in options.items() if name != "bits"})

        monkeypatch.setattr(models, "from_pretrained", watched)
        monkeypatch.setattr(reward_model, "from_pretrained", watched)
        monkeypatch.setattr(models, "four_bits", lambda device: {"bits": 4})  # stands for bitsandbytes, which needs a GPU
        monkeypatch.setattr(reward_model, "four_bits", lambda device: {"bits": 4})


def test_with_adapters_all_models_share_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = on_adapters(tmp_path)
    loads = Loads(monkeypatch, tmp_path / "base")
    trainer = train(config, tmp_path / "run", tmp_path / "stages")
    assert len(loads.options) == 4  # to train SFT, reward model and judge, each gone when it is done; and once for the run
    parts, critics = trainer.parts, trainer.parts.models.critics
    shared = parts.models.policy.model
    assert isinstance(parts.reward, RewardModel)
    assert parts.models.reference.model is shared is parts.reward.model.trunk.owner is parts.guide.language_model.model
    assert parts.general.model is shared is parts.judge.reward.model.trunk.owner
    assert parts.general.adapter is None
    assert {critic.trunk.owner for critic in critics.values()} == {shared}
    own = {"sft", "policy", "reward", "reward_2", *(f"critic_{origin.name.lower()}" for origin in critics)}
    assert set(adapters.names(shared)) == own
    for name in ("policy", *(f"critic-{origin.name.lower()}" for origin in critics)):
        assert (tmp_path / "run" / name / "adapter_config.json").is_file()
    loads.options.clear()
    found = evaluate_policy_at(config, str(tmp_path / "run" / "policy"), tmp_path / "stages", silent)
    assert len(loads.options) == 1  # for all of them
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["output_perplexity_model"] == results["output_perplexity_model"] == str(tmp_path / "base")
    assert found["evaluation"] == pytest.approx(results["evaluation"], rel=1e-4, abs=1e-4, nan_ok=True)
    loads.options.clear()
    again = prepare(override(config, [("guide.spec", f"model:{tmp_path / 'run' / 'policy'}")]), tmp_path / "stages")
    assert len(loads.options) == 1
    assert isinstance(again.guide, ModelGuide)
    assert (again.guide.language_model.model, again.guide.language_model.adapter) == (again.models.policy.model, "guide")


def test_weights_in_four_bits_are_so_in_every_stage_and_in_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = on_adapters(tmp_path, ("adapter.load_in_4bit", True))
    monkeypatch.setattr("rlgf.refusals.check", lambda config: config.algorithm.build())  # which asks for a GPU
    monkeypatch.setattr("rlgf.pipeline.check", lambda config: config.algorithm.build())
    loads = Loads(monkeypatch, tmp_path / "base")
    train(config, tmp_path / "run", tmp_path / "stages")
    evaluate_policy_at(config, str(tmp_path / "run" / "policy"), tmp_path / "stages", silent)
    evaluate_policy_at(config, None, tmp_path / "stages", silent, zero_shot=True)
    assert [options.get("bits") for options in loads.options] == [4] * 6


def test_adapters_are_not_trained_on_weights_that_are_stored_nowhere(tmp_path: Path):
    with pytest.raises(UserError, match=r"model is a new one: give model\.path, or set lm\.steps"):
        train(small(("adapter.rank", 2), ("adapter.in_sft", True)), tmp_path)


def test_a_reward_model_of_an_encoder_decoder_is_refused_before_any_work(tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    config = small(
        ("reward.path", "preferences"), ("preferences.data", str(tmp_path / "pairs.jsonl")),
        ("preferences.training.steps", 2), ("model.architecture", "t5"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"start from the policy, an encoder–decoder.*give preferences\.path"):
        prepare(config, tmp_path / "stages")
    assert not list((tmp_path / "stages").glob("*sft*"))
