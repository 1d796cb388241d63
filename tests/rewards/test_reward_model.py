"""Reward models: the scored position, the loss by hand, training, adapters, and saved files."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from rlgf.algorithms.losses import preference_loss
from rlgf.config.sections import (
    LoraConfig,
    ModelConfig,
    PreferenceConfig,
    RewardConfig,
    RewardLoraConfig,
    SupervisedConfig,
)
from rlgf.data.chat import ChatTemplate
from rlgf.data.preferences import Pair, Pairs
from rlgf.errors import ConfigError
from rlgf.evaluation.evaluate import mean_reward_gain
from rlgf.models.critic import new_critic
from rlgf.models.loading import load_language_model, new_language_model
from rlgf.models.lora import adapter_names as adapter_names
from rlgf.models.lora import add as add_adapter
from rlgf.pipeline.reward_model_stage import drop_too_long
from rlgf.pipeline.stages import train_tokenizer
from rlgf.rewards.base import score
from rlgf.rewards.build import build_reward
from rlgf.rewards.reward_model import RewardModel, is_reward_model, load_reward_model
from rlgf.supervised.reward_modeling import new_reward_model, pairs_backward, train_reward_model
from rlgf.tasks.base import Task
from rlgf.types import Prompt

WORDS = ["great", "superb", "lovely", "dull", "weak", "awful", "plot", "cast", "music", "script", "sound", "story"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([" ".join(WORDS)] * 3, 300)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def start(request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model in a folder."""
    shape = ModelConfig(architecture=request.param, layers=2, width=32, heads=4, max_length=48, init_std=0.2)
    folder = tmp_path_factory.mktemp(request.param)
    new_language_model(shape, tokenizer, 0).save(folder)
    return folder


def made(number: int, least: int = 0) -> Pair:
    """A pair that is told apart by its words alone: praise is preferred."""
    place = number + least
    subject, post = WORDS[6 + place % 6], f"post {place // 2}"
    return Pair(
        Prompt(f"about {subject} {place % 7}:"), f" {WORDS[place % 3]} {subject}", f" {WORDS[3 + place % 3]} {subject}", post
    )


PAIRS = Pairs([made(n) for n in range(64)], [made(n, 1000) for n in range(16)])


def test_the_loss_by_hand():
    loss = preference_loss(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([1.0, 2.0, -1.0]))
    # −log σ(0), −log σ(−2), −log σ(4)
    assert loss.tolist() == pytest.approx([0.693147, 2.126928, 0.018150], abs=1e-6)


def test_the_gradient_of_the_loss_pulls_the_two_sides_apart_and_no_more():
    chosen, rejected = torch.tensor([0.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    preference_loss(chosen, rejected).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == (-0.5, 0.5)


def test_scores_are_those_of_transformers_classifier_on_the_same_text(start: Path, tmp_path: Path):
    new_reward_model(str(start), PreferenceConfig(), 0).save(tmp_path / "reward")
    reward = load_reward_model(str(tmp_path / "reward"))
    prompts = [Prompt("about the plot:"), Prompt("a"), Prompt("about the cast and the music:")]
    texts = [" great plot", " dull", ""]
    plain: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    words: Any = AutoTokenizer.from_pretrained(tmp_path / "reward")
    assert plain.config.num_labels == 1
    assert plain.config.pad_token_id == words.pad_token_id != words.eos_token_id
    whole = [prompt.text + text + words.eos_token for prompt, text in zip(prompts, texts)]
    with torch.no_grad():
        expected = plain(**words(whole, return_tensors="pt", padding=True)).logits[:, 0]
    assert reward(prompts, texts) == pytest.approx(expected.tolist(), abs=1e-5)
    assert len({round(value, 4) for value in reward(prompts, texts)}) == 3


def test_a_score_does_not_hang_on_the_texts_beside_it(start: Path):
    reward = new_reward_model(str(start), PreferenceConfig(), 0)
    prompts, texts = [pair.prompt for pair in PAIRS.train], [pair.chosen for pair in PAIRS.train]
    together = reward(prompts, texts)
    reward.token_budget = 20
    assert reward(prompts, texts) == pytest.approx(together, abs=1e-5)
    assert reward(prompts[5:6], texts[5:6]) == pytest.approx(together[5:6], abs=1e-5)
    assert reward([], []) == []


def test_the_head_is_a_function_of_the_seed(start: Path):
    heads = [new_reward_model(str(start), PreferenceConfig(), seed).classifier.score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert float(heads[0].detach().std()) == pytest.approx(1 / math.sqrt(33), rel=0.5)


def test_the_gradient_of_a_batch_is_that_of_the_mean_whatever_the_micro_batches(start: Path):
    gradients: list[torch.Tensor] = []
    for budget in (10**6, 30):
        reward = new_reward_model(str(start), PreferenceConfig(), 0)
        prompts = [pair.prompt for pair in PAIRS.train[:6]]
        sides = [reward.encode(prompts, [getattr(pair, side) for pair in PAIRS.train[:6]]) for side in ("chosen", "rejected")]
        loss = pairs_backward(reward, list(zip(*sides)), budget)
        scores = [reward(prompts, [getattr(pair, side) for pair in PAIRS.train[:6]]) for side in ("chosen", "rejected")]
        by_hand = sum(math.log1p(math.exp(r - c)) for c, r in zip(*scores)) / 6
        assert loss == pytest.approx(by_hand, abs=1e-5)
        gradients.append(reward.classifier.score.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


TRAINING = SupervisedConfig(steps=30, batch_size=16, learning_rate=3e-3)


def test_a_reward_model_learns_what_is_preferred_on_posts_it_has_not_seen(start: Path):
    reward = new_reward_model(str(start), PreferenceConfig(), 0)
    before = train_reward_model(reward, PAIRS, PreferenceConfig(training=SupervisedConfig()), 0, 2048)  # no step
    assert before["steps"] == 0
    measured = train_reward_model(reward, PAIRS, PreferenceConfig(training=TRAINING), 0, 2048)
    assert measured["accuracy"] == 1.0
    assert measured["loss"] < 0.3
    assert (measured["trained_pairs"], measured["trained_posts"]) == (64, 32)
    assert (measured["held_out_pairs"], measured["held_out_posts"]) == (16, 8)
    longer = [len(pair.chosen) - len(pair.rejected) for pair in PAIRS.test]
    assert measured["length_baseline"] == sum((d > 0) + 0.5 * (d == 0) for d in longer) / 16
    assert measured["completions_truncated"] == measured["held_out_completions_truncated"] == 0


def test_adapters_and_head_are_saved_and_loaded_by_peft_and_by_us(start: Path, tmp_path: Path):
    from peft import AutoPeftModelForSequenceClassification

    config = PreferenceConfig(training=TRAINING, lora=RewardLoraConfig(rank=4, alpha=8))
    reward = new_reward_model(str(start), config, 0)
    frozen = {name: p.detach().clone() for name, p in reward.model.named_parameters() if not p.requires_grad}
    assert 0 < sum(p.numel() for p in reward.model.parameters() if p.requires_grad) < sum(p.numel() for p in frozen.values())
    train_reward_model(reward, PAIRS, config, 0, 2048)
    for name, parameter in reward.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    prompts, texts = [pair.prompt for pair in PAIRS.test], [pair.chosen for pair in PAIRS.test]
    scores = reward(prompts, texts)
    assert len(set(scores)) > 1
    reward.save(tmp_path / "reward")
    assert is_reward_model(str(tmp_path / "reward"))
    assert load_reward_model(str(tmp_path / "reward"))(prompts, texts) == pytest.approx(scores, abs=1e-4)
    again: Any = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1).eval()
    words: Any = AutoTokenizer.from_pretrained(tmp_path / "reward")
    for prompt, text, value in list(zip(prompts, texts, scores))[:4]:
        with torch.no_grad():
            logits = again(**words(prompt.text + text + words.eos_token, return_tensors="pt")).logits
        assert logits.item() == pytest.approx(value, abs=1e-4)


def test_adapters_are_found_where_their_base_was_moved_with_them(start: Path, tmp_path: Path):
    import shutil

    (tmp_path / "stages").mkdir()
    shutil.copytree(start, tmp_path / "stages" / "sft-1")
    reward = new_reward_model(str(tmp_path / "stages" / "sft-1"), PreferenceConfig(lora=RewardLoraConfig(rank=2)), 0)
    reward.save(tmp_path / "stages" / "reward-1")
    prompts = [Prompt("about the plot:")]
    scores = reward(prompts, [" great"])
    (tmp_path / "stages").rename(tmp_path / "moved")
    assert load_reward_model(str(tmp_path / "moved" / "reward-1"))(prompts, [" great"]) == pytest.approx(scores, abs=1e-5)


def test_a_critic_may_start_from_a_reward_model(start: Path, tmp_path: Path):
    new_reward_model(str(start), PreferenceConfig(), 0).save(tmp_path / "reward")
    policy = load_language_model(str(start))
    critic = new_critic("separate", str(tmp_path / "reward"), policy, 0.0)
    assert critic.backbone is not None
    assert int(critic.backbone.model.config.vocab_size) == policy.vocab_size + 1  # its padding token


def test_a_reward_model_goes_on_from_itself(start: Path, tmp_path: Path):
    first = new_reward_model(str(start), PreferenceConfig(), 0)
    first.save(tmp_path / "reward")
    again = new_reward_model(str(tmp_path / "reward"), PreferenceConfig(), 5)
    assert torch.equal(again.classifier.score.weight, first.classifier.score.weight)
    assert len(again.tokenizer) == len(first.tokenizer)


def test_a_long_text_loses_part_of_its_prompt_but_not_what_ends_it_and_is_counted(start: Path):
    reward = new_reward_model(str(start), PreferenceConfig(), 0)
    prompt, text = Prompt(" ".join(["plot"] * 80) + "\n\nTL;DR:"), " great plot"
    (ids,) = reward.encode([prompt], [text])
    whole = reward.tokenizer(prompt.text)["input_ids"]
    rest = [*reward.tokenizer(text)["input_ids"], reward.tokenizer.eos_token_id]
    assert len(ids) == reward.max_length == 48 or reward.max_length > 10**6  # llama without a learned position table reads on
    assert ids[-len(rest) :] == rest
    kept = ids[: len(ids) - len(rest)]
    assert kept == ([*whole[: len(kept) - 8], *whole[-8:]] if len(kept) < len(whole) else whole)
    assert reward.tokenizer.decode(ids).endswith("\n\nTL;DR: great plot<|endoftext|>")
    assert reward.num_truncated == (len(whole) + len(rest) > reward.max_length)
    word = len(reward.tokenizer(" plot")["input_ids"])
    (ids,) = reward.encode([prompt], [" plot" * (44 // word)])  # so long that there is hardly room for more
    room = reward.max_length - 44 // word * word - 1
    assert 0 < room < 8 or reward.max_length > 10**6
    assert ids[:room] == whole[-room:] or reward.max_length > 10**6


def test_a_response_that_is_too_long_by_itself_is_an_error(start: Path):
    reward = new_reward_model(str(start), PreferenceConfig(), 0)
    with pytest.raises(Exception, match=r"a response has \d+ tokens, but the context of the reward model .* is 48"):
        score(reward, [Prompt("about:")], [" ".join(["plot"] * 80)])


def test_pairs_with_a_response_that_cannot_be_read_whole_are_left_out_and_counted(start: Path):
    reward = new_reward_model(str(start), PreferenceConfig(), 0)
    long = dataclasses.replace(made(9), rejected=" ".join(["plot"] * 80))
    fine = [made(number) for number in range(4)]
    kept = drop_too_long(reward, Pairs([*fine, long], fine[:1], {"pairs with identical responses": 2}))
    assert (list(kept.train), list(kept.test)) == (fine, fine[:1])
    assert kept.dropped == {
        "pairs with identical responses": 2, "pairs with a response of more tokens than the reward model's context (48)": 1,
    }  # fmt: skip
    assert reward.num_truncated == 0
    with pytest.raises(ConfigError, match=r"1 pairs with a response .* leave none to train or evaluate on"):
        drop_too_long(reward, Pairs([long], fine))


def test_a_classifier_of_two_texts_reads_prompt_and_response_as_a_pair(tmp_path: Path):
    vocabulary = {token: place for place, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", *WORDS])}
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    words = BertTokenizerFast(vocab=vocabulary)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    reward = load_reward_model(str(tmp_path / "bert"))
    assert not reward.scores_last_state
    prompts, texts = [Prompt("plot :"), Prompt("cast music script :")], ["great plot", "dull"]
    pairs = words([prompt.text for prompt in prompts], texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**pairs).logits[:, 0].tolist()
    assert reward(prompts, texts) == pytest.approx(expected, abs=1e-5)
    (ids,) = reward.encode([Prompt("plot cast music script sound story " * 3)], ["great superb"])
    assert len(ids) == 16
    assert words.decode(ids).endswith("[SEP] great superb [SEP]")
    assert reward.num_truncated == 1


def test_a_conversation_is_read_by_the_reward_models_own_template(start: Path):
    reward = new_reward_model(str(start), PreferenceConfig(), 0)
    asked = ({"role": "user", "content": "the plot?"},)
    prompt = Prompt("<|user|>the plot?<|assistant|>", messages=asked)
    bare = reward.tokenizer("<|user|>the plot?<|assistant|> great")["input_ids"]
    assert reward.encode([prompt], [" great"]) == [[*bare, reward.tokenizer.eos_token_id]]  # it has none: the policy's text
    reward.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    assert reward.tokenizer.decode(reward.encode([prompt], ["great"])[0]) == "user=the plot?;assistant=great;"
    begun = Prompt("…", messages=(*asked, {"role": "assistant", "content": "a great"}))
    assert reward.tokenizer.decode(reward.encode([begun], [" plot"])[0]) == "user=the plot?;assistant=a great plot;"


def test_a_reward_of_one_label_is_a_reward_model_and_reads_the_prompt(start: Path, tmp_path: Path):
    new_reward_model(str(start), PreferenceConfig(), 0).save(tmp_path / "reward")
    task = Task("t", [], [], [])
    reward = build_reward(RewardConfig(path=str(tmp_path / "reward")), task, {})
    assert isinstance(reward, RewardModel)
    assert reward([Prompt("about the plot:")], [" great"]) != reward([Prompt("about the cast:")], [" great"])
    made_here = build_reward(RewardConfig(path="preferences"), task, {"preferences": tmp_path / "reward"})
    assert isinstance(made_here, RewardModel)


def test_what_is_no_reward_model_is_refused(start: Path, tmp_path: Path):
    assert not is_reward_model(str(start))
    with pytest.raises(ConfigError, match="no reward model can be loaded"):
        load_reward_model(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="is a classifier of 2 labels"):
        load_reward_model(str(start))


def test_a_token_that_never_ends_a_text_serves_as_padding(tmp_path: Path, tokenizer: Any):
    import copy

    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"unk_token": "great"})
    new_language_model(ModelConfig(layers=1, width=16, heads=2, max_length=16), own, 0).save(tmp_path / "model")
    reward = new_reward_model(str(tmp_path / "model"), PreferenceConfig(), 0)
    assert reward.tokenizer.pad_token == "great"
    assert len(reward.tokenizer) == len(own)


def test_an_evaluation_says_how_far_above_the_references_texts_score(start: Path):
    reward = new_reward_model(str(start), PreferenceConfig(), 0)
    prompts = [Prompt("about the plot:", (" dull plot", " other")), Prompt("about the cast:"), Prompt("a", (" great",))]
    first, third = reward([prompts[0], prompts[2]], [" dull plot", " great"])
    assert mean_reward_gain(reward, prompts, [1.0, 5.0, 3.0]) == pytest.approx((1.0 - first + 3.0 - third) / 2, abs=1e-5)
    assert math.isnan(mean_reward_gain(reward, prompts[1:2], [1.0]))


def test_on_the_policys_weights_it_scores_as_merged_into_its_own(start: Path, tmp_path: Path):
    settings = PreferenceConfig(
        training=SupervisedConfig(steps=5, batch_size=8, learning_rate=0.05), lora=RewardLoraConfig(rank=2)
    )
    trained = new_reward_model(str(start), settings, 0)
    train_reward_model(trained, PAIRS, settings, 0, 512)
    trained.save(tmp_path / "reward")
    policy = load_language_model(str(start)).freeze()
    add_adapter(policy.model, "policy", LoraConfig(rank=2), 0)
    alone = load_reward_model(str(tmp_path / "reward"))
    shared = load_reward_model(str(tmp_path / "reward"), backbone=policy)
    assert shared.model.backbone.owner is policy.model
    assert set(adapter_names(policy.model)) == {"policy", "reward"}
    pairs = PAIRS.test[:6]
    prompts, texts = [pair.prompt for pair in pairs], [pair.chosen for pair in pairs]
    assert shared(prompts, texts) == pytest.approx(alone(prompts, texts), abs=1e-5)
    assert shared(prompts, texts) == shared(prompts, texts)
    elsewhere = tmp_path / "elsewhere"
    load_language_model(str(start)).save(elsewhere)
    other = load_language_model(str(elsewhere)).freeze()
    assert load_reward_model(str(tmp_path / "reward"), backbone=other).classifier is not other.model  # not its base
    assert adapter_names(other.model) == []


def test_a_reply_whose_opening_the_policy_wrote_is_not_opened_twice(start: Path):
    reward = new_reward_model(str(start), PreferenceConfig(), 0)
    opening = "{% if add_generation_prompt %}<assistant>{% endif %}"
    reward.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }};{% endfor %}" + opening
    prompt = Prompt("<user>\nthe plot?;<assistant>", messages=({"role": "user", "content": "the plot?"},))
    written = ChatTemplate(reward.tokenizer).reply(prompt.messages or (), "great")
    assert written == "\ngreat"
    assert reward.tokenizer.decode(reward.encode([prompt], [written])[0]) == prompt.text + "\ngreat;"
    other = dataclasses.replace(prompt, reply_prefix="<think></think>\n")  # that of a policy with another template
    assert reward.encode([other], ["<think></think>\ngreat"]) == reward.encode([prompt], [written])
