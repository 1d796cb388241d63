"""Text to ids and back at the boundary between prefix and continuation, with real tokenizers."""

import random
from pathlib import Path
from typing import Any

import pytest

from rlgf.algorithms.registry import aggrevated
from rlgf.config.sections import ModelConfig
from rlgf.data.files import read_jsonl
from rlgf.data.tokenization import (
    Codec,
    complete_utf8_prefix,
    decode,
    decode_continuations,
    encode_continuation,
)
from rlgf.generation.decoder import LocalSampler
from rlgf.guides.base import Completion
from rlgf.guides.local import FunctionGuide
from rlgf.models.loading import new_language_model
from rlgf.rl.rollout import RolloutConfig, collect_rollout
from rlgf.types import Prompt, SamplingParams

TEXTS = [" there was a dog", "there", "\nLily", " two  spaces", "", ".", " end. And", "'s dog", "\n\n new", "a b"]


def gpt2(folder: Path) -> Any:
    from transformers import GPT2TokenizerFast

    return GPT2TokenizerFast.from_pretrained(folder / "tokenizers" / "gpt2")


def t5(folder: Path) -> Any:
    """As `from_pretrained` makes it where the sentencepiece library is installed, which is not needed to read its file."""
    from transformers import T5TokenizerFast
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    model.ParseFromString((folder / "tokenizers" / "t5" / "spiece.model").read_bytes())
    extra = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    vocab = [(piece.piece, piece.score) for piece in model.pieces] + [(name, 0.0) for name in extra]
    charsmap = model.normalizer_spec.precompiled_charsmap
    return T5TokenizerFast(vocab=vocab, _spm_precompiled_charsmap=charsmap, additional_special_tokens=extra)


def stories(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "stories260k" / "hf")


@pytest.mark.data
@pytest.mark.parametrize("load", [gpt2, stories])
@pytest.mark.parametrize("text", TEXTS)
def test_a_continuation_adds_exactly_its_text(shared_data: Path, load: Any, text: str):
    tokenizer = load(shared_data)
    before = Codec(tokenizer).prompt(Prompt("Once upon a time"))
    after = encode_continuation(tokenizer, text)
    assert decode(tokenizer, [*before, *after]) == "Once upon a time" + text
    assert decode_continuations(tokenizer, [before], [after]) == [text]


@pytest.mark.data
def test_many_prompts_are_encoded_as_one(shared_data: Path):
    tokenizer = stories(shared_data)
    prompts = [Prompt("Once upon"), Prompt("a time", ids=(5, 6)), Prompt(""), Prompt("there was")]
    assert Codec(tokenizer).prompts(prompts) == [Codec(tokenizer).prompt(prompt) for prompt in prompts]


@pytest.mark.data
def test_a_target_ends_with_an_end_token_only_where_there_is_room(shared_data: Path):
    tokenizer = gpt2(shared_data)
    words = encode_continuation(tokenizer, " one two three")
    assert Codec(tokenizer).target(" one two three", 50256, 4) == [*words, 50256]
    assert Codec(tokenizer).target(" one two three", 50256, 3) == words
    assert Codec(tokenizer).target(" one two three", 50256, 2) == words[:2]


# properties, over real texts and what is rare in them

RARE = [
    "\U0001f389", "\U0001f469\u200d\U0001f680", "\U0001f1e9\U0001f1ea",  # a party, an astronaut of three, a flag of two
    "\u4e2d\u6587\u5b57", "e\u0301", "\u0301", "\u00e9", "\ufb01", "\u2026", "\ufeff", "\ufffd", "\x00",
    "\u00a0", "\u2028", "\t", "\n", "\n\n", "\r\n", " ", "   ", "",
    "<br />", "`", "~", "{}", "</", "-", "'s", "0", "(",
]  # fmt: skip


def excerpts(folder: Path, count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of a prompt and what follows it: pieces of reviews and posts, cut anywhere, some with rare characters put in."""
    rows = [row["text"] for row in read_jsonl(folder / "imdb" / "test.jsonl.gz")[:200]]
    rows += [row["query"] for row in read_jsonl(folder / "tldr" / "sft_posts.jsonl.gz")[:200]]
    draw = random.Random(seed)
    pairs: list[tuple[str, str]] = []
    for _ in range(count):
        text = draw.choice(rows)
        start = draw.randrange(len(text) - 20)
        joint = start + 1 + draw.randrange(60)
        after = text[joint : joint + draw.randrange(80)]
        for _ in range(draw.randrange(4)):
            place = draw.choice([0, 0, len(after), draw.randrange(len(after) + 1)])
            after = after[:place] + draw.choice(RARE) + after[place:]
        pairs.append(("A" + text[start:joint], after))
    return [*pairs, *(("Once upon a time", rare) for rare in RARE), *(("Once upon", f"{rare} a") for rare in RARE)]


def both(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], list[int], str]:
    before, after = Codec(tokenizer).prompt(Prompt(prompt)), encode_continuation(tokenizer, text)
    return before, after, decode_continuations(tokenizer, [before], [after])[0]


@pytest.mark.data
@pytest.mark.parametrize("load", [gpt2, stories])
def test_tokenizers_that_spell_bytes_write_every_text_exactly(shared_data: Path, load: Any):
    tokenizer = load(shared_data)
    for prompt, text in excerpts(shared_data, 1000, 1):
        before, after, back = both(tokenizer, prompt, text)
        assert back == text, (prompt, text)
        assert decode(tokenizer, [*before, *after]) == decode(tokenizer, before) + text
        assert complete_utf8_prefix(tokenizer, [*before, *after]) == len(before) + len(after)


@pytest.mark.data
def test_t5_writes_what_it_can_and_puts_no_space_before_it(shared_data: Path):
    """T5 knows one white space, between words, and 32,000 pieces: runs and line ends become one space, those at the end and
    unknown characters are lost, and characters are normalised (NFKC). All that is counted; nothing else is changed."""
    tokenizer = t5(shared_data)
    exact = 0
    for prompt, text in excerpts(shared_data, 1000, 2):
        before, after, back = both(tokenizer, prompt, text)
        assert tokenizer.eos_token_id not in before
        assert decode(tokenizer, [*before, *after]) == decode(tokenizer, before) + back, (prompt, text)
        words = " ".join(text.split())
        expected = f" {words}" if text[:1].isspace() and words else words
        plain = text.isascii() and "\x00" not in text
        if tokenizer.unk_token_id in after:
            assert back != text, (prompt, text)
        elif plain and not any(name in text for name in tokenizer.all_special_tokens):
            assert back == expected, (prompt, text)
        if not text[:1].isspace() and text[:1].isascii() and text[:1].isprintable():
            assert not back.startswith(" ") or tokenizer.unk_token_id == after[0], (prompt, text)
        exact += back == text
    assert exact > 150


@pytest.mark.data
@pytest.mark.parametrize("load", [gpt2, stories, t5])
def test_a_text_cut_anywhere_is_kept_to_its_last_whole_character(shared_data: Path, load: Any):
    tokenizer = load(shared_data)
    for prompt, text in excerpts(shared_data, 150, 3):
        before, after, back = both(tokenizer, prompt, text)
        for cut in range(len(after) + 1):
            kept = complete_utf8_prefix(tokenizer, after[:cut])
            shorter = decode_continuations(tokenizer, [before], [after[:kept]])[0]
            assert cut - kept <= (0 if load is t5 else 3)
            # nothing of a broken character remains, and nothing else is lost (T5's space may wait for its word)
            assert back.startswith(shorter.rstrip()), (text, cut)


@pytest.mark.data
@pytest.mark.parametrize("load", [gpt2, stories, t5])
def test_every_text_that_a_tokenizer_changes_is_counted_and_kept(shared_data: Path, load: Any):
    tokenizer = load(shared_data)
    policy = new_language_model(ModelConfig(layers=1, width=8, heads=1, max_length=512), tokenizer, 0)
    pairs = excerpts(shared_data, 100, 4)
    texts = iter([text for _, text in pairs])
    guide = FunctionGuide(lambda requests: [Completion(next(texts), True) for _ in requests])
    algorithm = aggrevated(0.0).build()
    setting = RolloutConfig(policy, LocalSampler(policy), guide, SamplingParams(), 400, 0, 0)
    prompts = [Prompt(prompt) for prompt, _ in pairs]
    rollout = collect_rollout(setting, algorithm, algorithm.schedule(0, 0.0), prompts, range(len(pairs)))
    assert list(rollout.guide_completions) == [text for _, text in pairs]
    assert rollout.counters["guide_completions_truncated"] == 0
    changed = sum(text != wrote for text, wrote in zip(rollout.completions, rollout.guide_completions))
    assert rollout.counters["guide_completions_changed"] == changed
    assert (changed > 0) == (load is t5)


def byte_level(**options: Any) -> Any:
    """A byte-level tokenizer; with `opens` it puts <bos> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=options.get("spaces", False))
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>", "<bos>"]
    options_of: dict[str, Any] = {"vocab_size": 290, "special_tokens": special, "show_progress": False}
    trainer: Any = trainers.BpeTrainer(initial_alphabet=alphabet, **options_of)
    made.train_from_iterator(["boats sail over the row of boats"] * 3, trainer)
    if options.get("opens"):
        made.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", bos_token="<bos>")


@pytest.mark.parametrize("spaces", [False, True])
@pytest.mark.parametrize("text", ["boats", " boats", "\nboats", "(boats)", "", "  two"])
def test_a_byte_level_tokenizer_puts_no_space_before_a_continuation(spaces: bool, text: str):
    tokenizer = byte_level(spaces=spaces)
    ids = encode_continuation(tokenizer, text)
    before = Codec(tokenizer).prompt(Prompt("row"))
    assert decode_continuations(tokenizer, [before], [ids]) == [text]


def test_a_prompt_that_opens_itself_gets_no_second_opening_token():
    codec = Codec(byte_level(opens=True))
    bare, opened, twice = codec.prompts([Prompt("boats"), Prompt("<bos>boats"), Prompt("<bos><bos>boats")])
    assert bare == opened
    assert bare[0] == 1
    assert 1 not in bare[1:]
    assert twice == [1, *bare]  # what the text itself says twice stays
    assert Codec(byte_level()).prompt(Prompt("<bos>boats"))[0] == 1
