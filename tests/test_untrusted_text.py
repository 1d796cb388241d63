"""Text from outside: how it is shown in a terminal, in Markdown, in JSON, in names of files and in errors."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from helpers import in_turn
from hostile import GOOD, HOSTILE, is_clean
from rlgf.credentials import is_credential, mask_credentials
from rlgf.errors import ConfigError, RewardError, list_columns, unknown, user_code
from rlgf.untrusted_text import (
    as_code,
    as_file_name,
    describe_failure,
    escape_control_characters,
    escape_json,
    escape_lines,
    escape_markdown,
    shorten_sentence,
    show_value,
)

EVERY = in_turn(text=HOSTILE)
TEXTS = st.text(st.characters(), max_size=40) | st.sampled_from([*HOSTILE.values()])
PAGE = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


@given(TEXTS)
def test_a_line_for_a_terminal_has_nothing_that_controls_it(text: str) -> None:
    shown = escape_control_characters(text)
    assert shown.isprintable()
    assert is_clean(shown)
    assert len(shown.splitlines()) <= 1
    assert is_clean(escape_lines(text))
    assert escape_lines(text).count("\n") == text.count("\n")


@EVERY
def test_json_holds_the_same_text_on_one_line_whatever_reads_it(text: str) -> None:
    for value in (text, {text: [text]}):
        document = escape_json(json.dumps(value, ensure_ascii=False))
        document.encode()
        assert json.loads(document) == value
        assert len(document.splitlines()) == 1
        assert not any(letter in document for letter in "\u2028\u2029\x85\u202e\u2066\u200b\ufeff\x7f\x9b")


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_what_is_no_danger_stays_readable_in_json(text: str) -> None:
    assert text in escape_json(json.dumps({text: f"a {text}\u00a0b\u3000c"}, ensure_ascii=False))


def cells(page: str) -> list[str]:
    """The texts of the cells of a page's tables; no link, image, HTML, code or formula may be in one."""
    tokens = PAGE.parse(page)
    assert {token.type for token in tokens} <= {f"{part}_{end}" for part in ("table", "thead", "tbody", "tr", "th", "td")
                                                for end in ("open", "close")} | {"inline"}  # fmt: skip
    found: list[str] = []
    for token in tokens:
        if token.type == "inline":
            assert {child.type for child in token.children or []} <= {"text", "text_special"}, token.content
            found.append("".join(child.content for child in token.children or []))
    return found


@given(TEXTS)
def test_a_cell_of_a_table_shows_the_text_and_does_nothing(text: str) -> None:
    found = cells(f"| a | b |\n|---|---|\n| {escape_markdown(text)} | end |\n")
    assert found[:2] == ["a", "b"]
    assert found[2:] == [escape_control_characters(text).strip(), "end"]


@EVERY
def test_a_paragraph_shows_the_text_wherever_its_lines_break(text: str) -> None:
    for word in escape_markdown(text).split()[:20]:  # each may stand at the beginning of a line
        tokens = PAGE.parse(f"before\n{word} after")
        assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"], word
        assert {child.type for child in tokens[1].children or []} <= {"text", "text_special", "softbreak"}


@EVERY
def test_inline_code_holds_the_text_alone(text: str) -> None:
    (paragraph,) = [token for token in PAGE.parse(f"Recipe {as_code(text)}; seed 0") if token.type == "inline"]
    kinds = [child.type for child in paragraph.children or []]
    if text.strip():
        assert kinds == ["text", "code_inline", "text"]
        assert paragraph.children is not None
        assert paragraph.children[1].content.strip() == escape_control_characters(text).strip()
    assert "html_inline" not in kinds


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_name_of_a_file_stays_in_its_folder(text: str, tmp_path: Path) -> None:
    name = as_file_name(text)
    file = tmp_path / name
    file.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert file.resolve().parent == tmp_path.resolve()
    assert not name.startswith(".")
    assert is_clean(name)


def test_no_two_texts_share_a_name() -> None:
    texts = [*HOSTILE.values(), "a/b", "a b", "a_b", "電" * 100, "電" * 101]
    names = [as_file_name(text) for text in texts]
    assert len(set(names)) == len(set(texts))
    assert max(len(name.encode()) for name in names) < 200


def test_usual_names_stay_as_they_are() -> None:
    for name in ("quickstart-ppo_pp-seed0", "ppo-kl.coefficient=0.01-seed3", "validation"):
        assert as_file_name(name) == name
    for title in ("PPO++", "PPO, own sampling sharpened (top-p 0.6)", "LOLS, kl.coefficient 0.01", "0.168 ± 0.000", "x86_64"):
        assert escape_markdown(title) == title
    assert as_code("quickstart") == "`quickstart`"


@EVERY
@pytest.mark.parametrize(
    "error",
    [
        ConfigError, RewardError, lambda text: unknown("reward", text, ["task", "spice"]),
        lambda text: ConfigError(f"the row has {list_columns(dict.fromkeys([text, *map(str, range(5_000))]))}."),
    ],
)  # fmt: skip
def test_the_message_of_an_error_is_one_clean_line(text: str, error: Callable[[str], Exception]) -> None:
    message = str(error(text))
    assert is_clean(message)
    assert len(message.splitlines()) <= 1
    assert len(message) <= 1_000


def test_a_message_that_is_cut_is_still_a_sentence() -> None:
    assert shorten_sentence("a" * 50 + ".", 20) == "a" * 18 + "…."
    assert shorten_sentence("a.", 20) == "a."


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1, "1"), (1.0, "1.0"), (True, "True"), (None, "None"), ("a\x1b", "'a\\x1b'"), ("a" * 100, "'" + "a" * 58 + "…"),
        (10**400, "a number of about 400 digits"), ([10**5000], "a list"), (Rude(), "a Rude"), (-(2**63), str(-(2**63))),
        ("my sk-abcdefgh12345678", "'my ***'"), ({"a": "https://me:pw@host/x"}, "{'a': 'https://***@host/x'}"),
    ],
)  # fmt: skip
def test_a_value_is_shown_short_and_without_its_secrets(value: object, shown: str) -> None:
    assert show_value(value) == shown


@EVERY
def test_a_failure_of_a_users_code_is_told_on_one_line_with_its_place(text: str) -> None:
    with pytest.raises(ConfigError) as caught, user_code("it failed", ConfigError):
        raise ValueError(text)
    message = str(caught.value)
    assert is_clean(message)
    assert message.startswith("it failed (ValueError")
    assert ", test_untrusted_text.py line " in message
    assert isinstance(caught.value.__cause__, ValueError)


def test_what_has_no_message_has_a_type() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert describe_failure(MuteError()) == "MuteError"
    with pytest.raises(KeyboardInterrupt), user_code("it failed", ConfigError):
        raise KeyboardInterrupt
    with pytest.raises(ConfigError, match=r"it failed \(SystemExit: 0, "), user_code("it failed", ConfigError):
        raise SystemExit(0)


KEYS = {
    "OpenAI": "sk-proj-abcdEFGH12345678", "Anthropic": "sk-ant-api03-abcdefgh", "Hugging Face": "hf_abcdefGHIJ0123456789",
    "GitHub": "ghp_abcdefghij0123456789", "GitHub's new": "github_pat_11ABCDEFG0123456789", "Slack": "xoxb-123456789012-abc",
    "AWS": "AKIAIOSFODNN7EXAMPLE", "Google": "AIzaSyA-0123456789abcdefghijk", "Groq": "gsk_0123456789abcdefghijklmnop",
    "web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abcdef", "bearer": "Bearer 0123456789abcdef",
    "basic": "Basic dXNlcjpwYXNz",
    "private key": "-----BEGIN RSA PRIVATE KEY-----", "user of a URL": "https://me:pw@host/v1", "token of a URL": "https://tok@host",
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_credential_is_known_wherever_it_stands_and_masked_in_errors(key: str) -> None:
    for text in (key, f"the key is {key} today", f'{{"a": "{key}"}}', f"({key})"):
        assert is_credential(text)
        secret = key.partition("://")[2].partition("@")[0] or key
        assert secret not in mask_credentials(text)
        assert secret not in str(ConfigError(text))


@pytest.mark.parametrize(
    "text",
    [
        "Explain the basic responsibilities of a bearer of good news.", "hf-internal-testing/tiny-random-gpt2", "task-oriented",
        "lvwerra/distilbert-imdb", "runs/sk-learn-experiments", "sk-", "meta-llama/Llama-3.1-8B-Instruct", "hf_transformers",
        "https://host/v1", "me@host.example", "a risk-averse policy", "google-t5/t5-base", "The token budget is 2048.",
        *GOOD.values(),
    ],
)  # fmt: skip
def test_what_is_no_credential_is_not_taken_for_one(text: str) -> None:
    assert not is_credential(text)
    assert mask_credentials(text) == text
