"""ROUGE of texts in other scripts.

Reports: evaluate#465, adk-python#4122, opencompass#459.
"""

import pytest

from rlgf.errors import ConfigError
from rlgf.text_metrics.as_rewards import require_columns
from rlgf.text_metrics.rouge import Rouge, count_lost, loses_letters, unicode_words
from rlgf.text_metrics.score import Line, Options, score
from rlgf.types import Prompt

TEXTS = {
    "лодка плывёт": ["лодка", "плывёт"], "η βάρκα": ["η", "βάρκα"], "小船在湖上": ["小", "船", "在", "湖", "上"],
    "القارب في": ["القارب", "في"], "नाव झील": ["नाव", "झील"], "ÉÉÉ ÀÀÀ": ["ééé", "ààà"], "The boat, 2!": ["the", "boat", "2"],
    "ひらがなABC": ["ひ", "ら", "が", "な", "abc"], "": [],
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_words_of_any_script(text: str) -> None:
    assert unicode_words(text) == TEXTS[text]
    if text:
        assert Rouge(tokenizer="unicode")([text], [[text]])["rouge1"] == [1.0]
    assert loses_letters(text, "latin") == (text not in ("", "The boat, 2!"))
    assert not loses_letters(text, "unicode")


def test_a_text_that_scores_nothing_is_said() -> None:
    lines = [Line("лодка", ("лодка",)), Line("the boat", ("the boat",))]
    (warning,) = score(lines, ["rouge1"], Options()).warnings
    assert "1 of 2 lines consist mostly of others" in warning
    assert score(lines, ["rouge1"], Options(rouge_tokenizer="unicode")).warnings == []
    assert score(lines, ["rouge1"], Options(rouge_tokenizer="unicode")).corpus == {"rouge1": 1.0}
    assert count_lost(["naïve café"], [["naïve café"]], "latin") == 0  # most of its letters are there


def test_as_a_reward_it_is_refused() -> None:
    prompts = [Prompt("a", ("лодка",))]
    with pytest.raises(
        ConfigError, match=r"'rouge1' as a reward: ROUGE reads only .*reward\.options\.rouge1\.tokenizer=unicode"
    ):
        require_columns("rouge1", prompts, {})
    require_columns("rouge1", prompts, {"tokenizer": "unicode"})
    require_columns("rouge1", [Prompt("a", ("лодка", "boat"))], {})  # one of its references can be matched
