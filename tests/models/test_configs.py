"""Configs of every layout: vocabulary, maximum length, first position, the decoder's opening."""

from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from rlgf.models.configs import UNLIMITED, first_position, max_length, num_decoder_layers, opening_of, vocabulary_size


@pytest.mark.parametrize(
    ("name", "settings", "length"),
    [
        ("llama", {"max_position_embeddings": 64}, 64),
        ("gpt2", {"n_positions": 96}, 96),
        ("mpt", {"max_seq_len": 80}, 80),
        ("roberta", {"max_position_embeddings": 34, "pad_token_id": 1}, 32),
        ("xlm-roberta", {"max_position_embeddings": 34, "pad_token_id": 1}, 32),
        ("bert", {"max_position_embeddings": 34}, 34),
        ("bart", {"max_position_embeddings": 34}, 34),
        ("t5", {}, UNLIMITED),
        ("mamba", {}, UNLIMITED),
        ("gemma3", {"text_config": {"max_position_embeddings": 48}}, 48),
    ],
)
def test_the_maximum_length_is_what_the_positions_hold(name: str, settings: dict[str, object], length: int) -> None:
    assert max_length(AutoConfig.for_model(name, **settings)) == length


def test_positions_of_roberta_begin_after_those_of_the_padding() -> None:
    assert first_position(AutoConfig.for_model("roberta", pad_token_id=1)) == 2
    assert first_position(AutoConfig.for_model("m2m_100", pad_token_id=1)) == 0
    assert first_position(AutoConfig.for_model("llama", pad_token_id=1)) == 0


def test_sizes_are_found_under_their_other_names() -> None:
    assert vocabulary_size(AutoConfig.for_model("xlm", n_words=77)) == 77
    assert vocabulary_size(AutoConfig.for_model("gemma3", text_config={"vocab_size": 55})) == 55
    assert num_decoder_layers(AutoConfig.for_model("t5", num_layers=2, num_decoder_layers=3)) == 3
    assert num_decoder_layers(AutoConfig.for_model("gpt2", n_layer=5)) == 5


def test_a_forced_first_token_opens_the_output() -> None:
    config = AutoConfig.for_model("bart", decoder_start_token_id=2)
    assert opening_of(config, None) == (2,)
    assert opening_of(config, SimpleNamespace(forced_bos_token_id=7)) == (2, 7)
    assert opening_of(AutoConfig.for_model("llama"), None) == ()
