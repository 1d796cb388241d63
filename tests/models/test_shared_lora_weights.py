"""One copy of the base weights in training and evaluation, in full precision or 4 bits."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from helpers import small
from rlgf.config.loading import override
from rlgf.config.recipes import recipe
from rlgf.config.schema import Config
from rlgf.config.sections import LoraConfig, ModelConfig
from rlgf.errors import ConfigError
from rlgf.guides.local import ModelGuide
from rlgf.models import loading, lora
from rlgf.models.loading import load_language_model, new_language_model
from rlgf.pipeline import preflight
from rlgf.pipeline.preflight import check_to_train
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.resolve import resolve
from rlgf.pipeline.reward_model_stage import preference_stage
from rlgf.pipeline.run import evaluate_policy_on_test, train
from rlgf.pipeline.stage_cache import StageCache, no_report
from rlgf.pipeline.stages import train_tokenizer
from rlgf.rewards import reward_model
from rlgf.rewards.reward_model import RewardModel
from rlgf.supervised import reward_modeling


def on_adapters(folder: Path, *changes: tuple[str, object]) -> Config:
    """A run whose policy, critics, reward model and judge are adapters on the model in `folder`/base."""
    plain = prepare(small(), folder / "stages")
    plain.models.policy.save(folder / "base")
    prompts = plain.task.train[:24]
    pairs = [{"prompt": p.text, "chosen": p.references[0], "rejected": p.references[0].split()[0]} for p in prompts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return small(
        ("algorithm.name", "aggrevated"), ("guide.spec", "sft"), ("lora.rank", 2), ("critic.kind", "lora"),
        ("reward.path", "preferences"), ("preferences.data", str(folder / "pairs.jsonl")), ("preferences.lora.rank", 2),
        ("preferences.training.steps", 2), ("preferences.min_words", 0), ("preferences.training.batch_size", 4),
        ("model.path", str(folder / "base")), ("lora.in_sft", True), ("evaluation.output_perplexity", True),
        ("judge.spec", "preferences"), *changes,
    )  # fmt: skip


class Loads:
    """How often the base weights of a folder are read, and whether in 4 bits."""

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


def test_with_adapters_all_models_share_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = on_adapters(tmp_path)
    loads = Loads(monkeypatch, tmp_path / "base")
    trainer = train(config, tmp_path / "run", tmp_path / "stages")
    assert len(loads.options) == 4  # to train SFT, reward model and judge, each gone when it is done; and once for the run
    parts, critics = trainer.components, trainer.components.models.critics
    shared = parts.models.policy.model
    assert isinstance(parts.reward, RewardModel)
    assert parts.models.reference.model is shared is parts.reward.model.backbone.owner is parts.guide.language_model.model
    assert parts.pre_sft_model.model is shared is parts.judge.reward.model.backbone.owner
    assert parts.pre_sft_model.adapter is None
    assert {critic.backbone.owner for critic in critics.values()} == {shared}
    own = {"sft", "policy", "reward", "reward_2", *(f"critic_{origin.name.lower()}" for origin in critics)}
    assert set(lora.adapter_names(shared)) == own
    for name in ("policy", *(f"critic-{origin.name.lower()}" for origin in critics)):
        assert (tmp_path / "run" / name / "adapter_config.json").is_file()
    loads.options.clear()
    found = evaluate_policy_on_test(
        resolve(config), str(tmp_path / "run" / "policy"), StageCache(tmp_path / "stages", no_report)
    )
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
    config = on_adapters(tmp_path, ("lora.load_in_4bit", True))
    monkeypatch.setattr("rlgf.pipeline.preflight.check", lambda run: None)  # which asks for a GPU
    monkeypatch.setattr("rlgf.pipeline.run.check", lambda run: None)
    loads = Loads(monkeypatch, tmp_path / "base")
    train(config, tmp_path / "run", tmp_path / "stages")
    evaluate_policy_on_test(resolve(config), str(tmp_path / "run" / "policy"), StageCache(tmp_path / "stages", no_report))
    evaluate_policy_on_test(resolve(config), None, StageCache(tmp_path / "stages", no_report), zero_shot=True)
    assert [options.get("bits") for options in loads.options] == [4] * 6


def test_adapters_are_not_trained_on_weights_that_are_stored_nowhere(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model is a new one: give model\.path, or set pretrain\.steps"):
        train(small(("lora.rank", 2), ("lora.in_sft", True)), tmp_path)


def test_a_reward_model_of_an_encoder_decoder_is_refused_before_any_work(tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    config = small(
        ("reward.path", "preferences"), ("preferences.data", str(tmp_path / "pairs.jsonl")),
        ("preferences.training.steps", 2), ("model.architecture", "t5"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"start from the policy, an encoder–decoder.*give preferences\.path"):
        prepare(config, tmp_path / "stages")
    assert not list((tmp_path / "stages").glob("*sft*"))


def an_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter of PEFT's own on a model, as another tool would save it: without a generation config."""
    import peft

    model: Any = load_language_model(str(base)).model
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True, **settings)).save_pretrained(
        folder
    )
    load_language_model(str(base)).tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small model of the task toy_reviews's words, with two end tokens."""
    model = prepare(small(), tmp_path / "stages").models.policy
    model.model.generation_config.eos_token_id = [model.eos_token_id, 7]
    model.save(tmp_path / "base")
    return tmp_path / "base"


def test_no_dropout_of_an_adapter_is_on_before_somebody_trains(base: Path, tmp_path: Path):
    folder = an_adapter(base, tmp_path / "peft", lora_dropout=0.5)
    model = load_language_model(str(base)).model
    lora.add(model, "new", LoraConfig(rank=2, dropout=0.5), 0)
    lora.load(model, str(folder), "loaded")
    lora.clone(model, "new", "copied")
    assert not [name for name, module in model.named_modules() if module.training]


def test_an_adapter_beside_its_base_has_the_ends_that_it_has_alone(base: Path, tmp_path: Path):
    folder = an_adapter(base, tmp_path / "peft")
    alone, below = load_language_model(str(folder)), load_language_model(str(base))
    beside = load_language_model(str(folder), share_weights_with=below)
    assert beside.model is below.model
    assert len(alone.eos_token_ids) == 2
    assert beside.eos_token_ids == alone.eos_token_ids == below.eos_token_ids


def test_an_adapter_that_brings_more_than_layers_has_a_model_of_its_own(base: Path, tmp_path: Path):
    folder = an_adapter(base, tmp_path / "peft", modules_to_save=["ln_f"])
    below = load_language_model(str(base))
    assert load_language_model(str(folder), share_weights_with=below).model is not below.model
    assert lora.adapter_names(below.model) == []
    changes = ("policy", str(folder)), ("lora.rank", 2), ("critic.kind", "lora")
    with pytest.raises(ConfigError, match="not only LoRA layers"):
        prepare(small(*changes), tmp_path / "stages")


def test_a_moved_run_finds_the_base_of_its_adapters(tmp_path: Path):
    (tmp_path / "run" / "stages").mkdir(parents=True)
    model = prepare(small(), tmp_path / "stages").models.policy
    model.save(tmp_path / "run" / "stages" / "lm-1")
    an_adapter(tmp_path / "run" / "stages" / "lm-1", tmp_path / "run" / "policy")
    file = tmp_path / "run" / "policy" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(tmp_path / "run/stages/lm-1")}))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert lora.base_of(str(tmp_path / "moved" / "policy")) == str(tmp_path / "moved" / "stages" / "lm-1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("policy", "{adapter}")], "critic.kind=separate is a whole model"),
        (
            [("lora.rank", 2), ("lora.in_sft", True), ("model.path", "{base}"), ("guide.spec", "sft")],
            "critic.kind=separate is a whole model",
        ),
        ([("policy", "{adapter}"), ("critic.kind", "value_head"), ("critic.path", "{base}")], "holds no value_head"),
        ([("critic.kind", "lora"), ("lora.rank", 2), ("critic.path", "{base}")], "holds no adapter"),
        ([("reward.path", "{adapter}")], "holds an adapter of a language model"),
        ([("judge.spec", "model:{adapter}")], "holds an adapter of a language model"),
        ([("judge.spec", "model:{base}/nothing")], "there is no such file or folder"),
        ([("reward.weights", {"task": 1.0, "{base}/nothing": 1.0})], "there is no such file or folder"),
        ([("judge.spec", "model:someone/nothing")], "no reward model can be loaded from 'someone/nothing' \\(there is no such"),
        ([("evaluation.best_of", 100_000)], "choose at most"),
        ([("lora.rank", 2), ("distill.num_completions", 4), ("distill.steps", 1)], "a distilled policy is a whole model"),
        ([("policy", "{base}"), ("model.path", "{other}"), ("evaluation.output_perplexity", True)], "has another vocabulary"),
    ],
)  # fmt: skip
def test_what_could_only_fail_later_is_refused_before_any_work(
    changes: list[tuple[str, Any]], words: str, base: Path, tmp_path: Path
):
    folder = an_adapter(base, tmp_path / "peft")
    new_language_model(ModelConfig(layers=1, width=8, heads=1), train_tokenizer(["other words"] * 9, 260), 0).save(
        tmp_path / "other"
    )
    filled = {"{adapter}": str(folder), "{base}": str(base), "{other}": str(tmp_path / "other")}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {fill(name): number for name, number in value.items()}
        for name, path in filled.items():
            value = value.replace(name, path) if isinstance(value, str) else value
        return value

    with pytest.raises(ConfigError, match=words):
        prepare(small(*((name, fill(value)) for name, value in changes)), tmp_path / "work")
    assert not list((tmp_path / "work").glob("*"))


def test_targets_that_a_model_has_not_are_an_error_with_a_name(base: Path):
    with pytest.raises(ConfigError, match=r"lora\.target_modules are \['nowhere'\]"):
        lora.add(load_language_model(str(base)).model, "new", LoraConfig(rank=2, target_modules=("nowhere",)), 0)


def test_heads_are_not_taken_for_policies(tmp_path: Path):
    config = on_adapters(tmp_path)
    train(config, tmp_path / "run", tmp_path / "stages")
    reward = next((tmp_path / "stages").glob("reward-*"))
    for folder in (next((tmp_path / "run").glob("critic-*")), reward):
        with pytest.raises(ConfigError, match="adapter of a critic or a reward model"):
            load_language_model(str(folder))


def test_a_reward_model_made_in_four_bits_is_another_one(tmp_path: Path):
    def made(in_4bit: bool) -> str:
        return preference_stage(
            resolve(on_adapters(tmp_path, ("lora.load_in_4bit", in_4bit))).reward.preferences,
            StageCache(tmp_path / "stages", no_report),
        ).name

    with pytest.MonkeyPatch.context() as patch:
        Loads(patch, tmp_path / "base")
        assert made(True) != made(False)


def test_a_reward_that_nobody_named_and_a_person_who_is_not_there_are_refused_from_the_config(monkeypatch: pytest.MonkeyPatch):
    rows = override(recipe("prompts"), [("task.data", str(Path(__file__)))])
    with pytest.raises(ConfigError, match="task 'prompts' has no built-in reward"):
        check_to_train(resolve(rows))
    asked = small(("guide.spec", "human"), ("algorithm.name", "ppo_pp"))
    monkeypatch.setattr(preflight, "has_no_terminal", lambda: True)
    with pytest.raises(ConfigError, match="needs a terminal, and there is none"):
        check_to_train(resolve(asked))
    check_to_train(resolve(override(asked, [("algorithm.name", "ppo")])))  # who asks nobody needs nobody


def test_nobody_types_into_the_null_device_but_a_file_may_hold_what_somebody_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "answers").write_text("one\n")
    for path, expected in ((os.devnull, True), (str(tmp_path / "answers"), False)):
        with open(path) as file:
            monkeypatch.setattr("sys.stdin", file)
            assert preflight.has_no_terminal() == expected
    assert preflight.has_no_terminal()  # closed
