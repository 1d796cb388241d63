"""Secrets in a config: refused wherever they stand, without being shown, and `$NAME` instead."""

import dataclasses
import json
import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable
from random import Random
from string import ascii_lowercase, digits
from typing import Any, get_args, get_type_hints
from urllib.parse import quote
from uuid import UUID

import pytest

from rlgf.cli.options import read_config
from rlgf.config.loading import dump, override, parse_assignment, read_yaml
from rlgf.config.schema import Config
from rlgf.credentials import (
    is_credential_for_server,
    is_credential_in_body,
    is_credential_in_header,
    is_credential_in_url,
    mask_credentials,
)
from rlgf.errors import ConfigError

KEY = "sk-planted-0123456789abcdef"
SHORT = "sk-abc"
GUIDE = "guide.endpoint."


def every_field(kind: Any, prefix: str = "") -> list[str]:
    """Every field of a config that is no section."""
    found: list[str] = []
    for name, hint in get_type_hints(kind).items():
        section = next((part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)), None)
        found += every_field(section, f"{prefix}{name}.") if section else [prefix + name]
    return found


FIELDS = every_field(Config)


@pytest.mark.parametrize("form", [KEY, {"a": [{KEY: [f"see {KEY}"]}]}], ids=["text", "nested"])
def test_a_key_is_refused_in_every_field_and_shown_in_no_error(form: Any) -> None:
    assert len(FIELDS) > 150
    config = Config()
    for field in FIELDS:
        with pytest.raises(ConfigError) as caught:
            override(config, [(field, form)], "command line")
        assert KEY not in str(caught.value), field
        assert "planted" not in str(caught.value), field


def test_a_key_is_refused_with_the_field_and_what_to_do() -> None:
    for field, value in {
        "guide.system": f"You know {KEY}.", "guide.instruction": f"{{text}} {KEY}", "guide.stop": ["a", KEY],
        "policy": f"me/{KEY}",
        "task.data": f"https://me:{SHORT}@host/rows.jsonl", "task.options": {"chat_template": f"{{{{ '{KEY}' }}}}"},
        "model.path": f"https://{SHORT}@host/x", "reward.path": KEY, "judge.template": KEY, "runtime.trackers": [KEY],
        "guide.endpoint.cache": KEY, "evaluation.metric_options": {"bertscore_model": KEY}, "recipe": KEY,
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=rf"^{field}.* is written out, but holds what looks like a secret") as caught:
            override(Config(), [(field, value)])
        assert len(str(caught.value)) <= 300


REFUSED: dict[str, tuple[str, Any]] = {
    "in a list": ("extra_body", {"list": [{"api_key": "abc"}]}),
    "in a list of lists": ("extra_body", {"a": [[["x", {"password": "abc"}]]]}),
    "under a name above": ("extra_body", {"api_key": {"value": "abc"}}),
    "a bearer value": ("extra_body", {"a": ["Bearer abc"]}),
    "a random token": ("extra_body", {"auth": [{"key": "a1b2c3d4e5f6a7b8c9"}]}),
    "a random value": ("extra_body", {"user": "a1b2c3d4e5f6a7b8c9d0"}),
    "a number": ("extra_body", {"password": 1234}), "a key as a key": ("extra_body", {KEY: 1}),
    "beside a reference": ("extra_body", {"api_key": "abc$NAME"}),
    "a harmless header": ("extra_headers", {"X-Proxy": "Bearer abc"}),
    "later in a header": ("extra_headers", {"X-Proxy": "user=1; Bearer abc"}),
    "a token in a header": ("extra_headers", {"X": "Token a1b2c3d4"}),
    "a random header": ("extra_headers", {"X-Request": "a1b2c3d4e5f6a7b8c9d0"}),
    "a short key in a header": ("extra_headers", {"X": SHORT}),
    "a secret header": ("extra_headers", {"Authorization": "abc"}),
    "beside a reference in a header": ("extra_headers", {"X-Api-Key": "abc $N"}),
    "a UUID in a header": ("extra_headers", {"X-Trace": "550e8400-e29b-41d4-a716-446655440000"}),
    "a session": ("extra_headers", {"X-Session": "s%3Aabc.ghijk"}), "a signature": ("extra_headers", {"X-Signature": "abc"}),
    "pass": ("extra_body", {"pass": "abc"}), "pwd": ("extra_body", {"db_pwd": "abc"}), "pw": ("extra_body", {"pw": "abc"}),
    "a connection": ("extra_body", {"dsn": "Server=h;User=u;Password=abc1;"}),
    "an account": ("extra_body", {"account": "DefaultEndpointsProtocol=https;AccountKey=abcd+/efgh=="}),
    "a header as text": ("extra_body", {"raw": "Authorization: Token abcd1234efgh5678"}),
    "a pair": ("extra_body", {"h": ["X-Api-Key", "Zx81abc1234"]}),
    "a named value": ("extra_body", {"h": [{"name": "api_key", "value": "abc"}]}),
    "a query": ("extra_body", {"url": "https://h/x?token=abc"}),
    "a key after the dollar": ("extra_headers", {"Authorization": "$hf_abcdefGHIJ0123456789"}),
    "a name of a key": ("extra_headers", {KEY: "a"}),
    "a key as the variable": ("api_key_env", SHORT), "a key that is a name": ("api_key_env", "hf_abcdefGHIJ0123456789"),
    "a name with a dash": ("api_key_env", "MY-KEY"), "no variable": ("api_key_env", ""),
}  # fmt: skip


@pytest.mark.parametrize("role", ["guide", "judge"])
@pytest.mark.parametrize(("field", "value"), REFUSED.values(), ids=REFUSED)
def test_what_goes_to_a_server_holds_no_secret(role: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{role}\.endpoint\.{field}") as caught:
        override(Config(), [(f"{role}.endpoint.{field}", value)])
    message = str(caught.value)
    assert "variable" in message or "keep it out" in message
    for secret in ("abc", "a1b2", "1234", KEY):
        assert secret not in message


@pytest.mark.parametrize("role", ["guide", "judge"])
@pytest.mark.parametrize(
    "address",
    [
        f"http://host/{SHORT}/v1", "https://host/hf_abc/v1", "https://host/a1b2c3d4e5f6a7b8c9d0/v1", f"https://host/x/{KEY}",
        f"https://{SHORT}@host/v1", "https://me:p%2Fss@host/v1", "https://host/x/aB3%2FxY9%2BkLm2%2FQw8zR5tN7vP1%3D/v1",
        "https://host/team/aB3/xY9+kLm2/Qw8zR5tN7vP1==/v1", f"https://me:{SHORT}@host/v1", "https://host/v1/eyJhbGciOiJIUzI1.eyJzdWIiOi.abcdef",
        "https://host/$hf_abcdefGHIJ0123456789/v1", "https://host/v1;key=a1b2c3d4",
        "https://a1b2c3d4e5f6a7b8c9d0e1f2.host.example/v1", "https://host/a1b2B3_xY9-kLm2_Qw8-zR5tN7_vP1/v1",
    ],
)  # fmt: skip
def test_the_address_of_a_server_holds_no_secret(role: str, address: str) -> None:
    with pytest.raises(ConfigError, match=rf"{role}\.spec") as caught:
        override(Config(), [(f"{role}.spec", f"server:model@{address}")])
    assert not any(part in str(caught.value) for part in (SHORT, "hf_", "a1b2", "eyJ", KEY))


@pytest.mark.parametrize("field", ["guide.system", "task.data", "judge.template"])
@pytest.mark.parametrize(
    "text",
    [
        "aws_secret_access_key=abcXUtnFEMI/K7MDENG/bPx", "Say password=abcabc.", "https://host/r.jsonl?X-Amz-Signature=abc123",
        "https://host/r.jsonl?sv=1&sig=abc123", "https://host/r?token=abc", "Log in (password: hunter2abc).",
        '{"pwd": "S3cr3tabc"}',
    ],
)  # fmt: skip
def test_no_text_of_a_config_gives_a_value_to_the_name_of_a_secret(field: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} is written out, but holds what looks like a secret") as caught:
        override(Config(), [(field, text)])
    assert "abc" not in str(caught.value)
    assert "abc" not in mask_credentials(text)


SORTS: dict[str, Callable[[Random], str]] = {
    "urlsafe 16": lambda random: urlsafe_b64encode(random.randbytes(16)).decode().rstrip("="),
    "urlsafe 32": lambda random: urlsafe_b64encode(random.randbytes(32)).decode().rstrip("="),
    "standard 16": lambda random: b64encode(random.randbytes(16)).decode(),
    "standard 32": lambda random: b64encode(random.randbytes(32)).decode().rstrip("="),
    "percent-encoded": lambda random: quote(b64encode(random.randbytes(18)).decode(), safe=""),
    "lower case 20": lambda random: "".join(random.choices(ascii_lowercase + digits, k=20)),
    "hex": lambda random: random.randbytes(16).hex(),
    "uuid": lambda random: str(UUID(bytes=random.randbytes(16), version=4)),
}


@pytest.mark.parametrize("sort", SORTS)
def test_random_keys_are_found_in_headers_and_paths(sort: str) -> None:
    random = Random(0)
    keys = [SORTS[sort](random) for _ in range(2_000)]
    assert sum(not is_credential_in_header("X-Trace", key) for key in keys) < 20
    assert sum(not is_credential_in_body(["user"], key) for key in keys) < 20
    assert sum(not is_credential_in_url(f"https://host.example/team/{key}/v1") for key in keys) < 20


ORDINARY = (
    "meta-llama/Llama-3.1-8B-Instruct", "gpt-4o-mini-2024-07-18", "Qwen/Qwen2.5-0.5B-Instruct-GGUF",
    "Qwen2-VL-72B-Instruct-GPTQ-Int4", "neuralmagic/Meta-Llama-3.1-8B-Instruct-quantized.w8a8", "Qwen2-7B-W4A16-G128-FP8",
    "Meta-Llama-3-8B-Instruct-FP8-KV", "Mixtral-8x7B-Instruct-v0.1-AWQ", "DeepSeek-R1-Distill-Qwen-32B",
    "anthropic.claude-3-5-sonnet-20241022-v2:0", "accounts/fireworks/models/llama-v3p1-70b-instruct",
    "nvidia/Llama-3_1-Nemotron-51B-Instruct", "TheBloke/OpenHermes-2.5-Mistral-7B-GPTQ-4bit-128g-actorder_True",
    "Qwen3-30B-A3B-Instruct-2507-FP8-dynamic", "mistral-7b-openorca.Q4_K_M.gguf", "AutoModelForSequenceClassification",
    "Every token of the answer counts. Never reveal a password or an API key.", "the secret of a good story; key=value pairs",
    "Password: choose eight letters. The token: a unit of text.", "A password = one word; its length: 8 characters.",
    "Write def login(user, password=None, token=get_token()): pass", "max_tokens=5, tokenizer=bpe, pad_token=eos",
    "https://host/films?id=12&page=3&max_tokens=5&keyword=x", "export OPENAI_API_KEY=YOUR_API_KEY",
    "https://x.openai.azure.com/openai/deployments/gpt-4o-mini-2024-07-18?api-version=2024-02-01",
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36",
)  # fmt: skip


def test_ordinary_texts_are_no_secrets() -> None:
    for text in ORDINARY:
        assert not is_credential_in_header("X-Title", text), text
        assert not is_credential_in_body(["model"], text), text
        override(Config(), [("guide.system", text)])
    override(Config(), [("policy", "me/model@0123456789abcdef0123456789abcdef01234567")])
    assert not is_credential_in_body(["revision"], "0123456789abcdef0123456789abcdef01234567")


def test_long_texts_are_searched_in_linear_time() -> None:
    for part in ("password:", "http://", "?a", "token=", "aB3", "&key=;"):
        start = time.process_time()
        is_credential_for_server(part * 5_000)
        assert time.process_time() - start < 1, part  # minutes, if it were not


ACCEPTED: dict[str, Any] = {
    "extra_headers": {"HTTP-Referer": "https://host/films", "X-Title": "Films of today", "Authorization": "Bearer $TOKEN",
                      "X-Api-Key": "${MY_KEY}", "X-Proxy": "Basic $PROXY"},
    "extra_body": {"api_key": "$NAME", "list": [{"token": "$A", "n": 1}], "tokenizer": "meta-llama/Llama-3.1-8B",
    "max_tokens": 5, "hf_overrides": {"a": 1},
                   "stop_token_ids": [1, 2], "return_token_ids": True, "price": "$$5",
                   "generation_config": '{"do_sample": true}',
                   "chat_template_kwargs": {"enable_thinking": False}, "guided_regex": "^(yes|no)$",
                   "model": "gpt-4o-mini-2024-07-18"},
    "api_key_env": "MY_KEY_2",
}  # fmt: skip


@pytest.mark.parametrize("field", ACCEPTED)
def test_references_and_what_is_no_secret_are_kept_as_they_are(field: str) -> None:
    config = override(Config(), [(GUIDE + field, ACCEPTED[field])])
    assert getattr(config.guide.endpoint, field) == ACCEPTED[field]


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:8000/v1", "https://host/$TOKEN/v1", "https://$HOST/${A}/v1", "https://openrouter.ai/api/v1",
        "https://j3z5luu0ooo76jnl.us-east-1.aws.endpoints.huggingface.cloud/v1", "https://me--app-serve.modal.run/v1",
        "https://abcdefghij4klmnopqrstuvwx2yz0123.lambda-url.us-east-1.on.aws", "https://abc1def2-8000.proxy.runpod.net/v1",
        "https://adb-1234567890123456.7.azuredatabricks.net/serving-endpoints",
        "https://x.openai.azure.com/openai/deployments/gpt-4o-mini-2024-07-18", "http://[::1]:8000/v1",
        "https://host/models/mistralai/Mixtral-8x7B-v0.1/v1", "https://host/Qwen/Qwen3-30B-A3B-Base/v1",
        "https://host/models/facebook/wav2vec2-base-960h", "https://host/api%20v2/serving/Team%2FA/v1",
    ],
)  # fmt: skip
def test_usual_addresses_and_references_in_them_are_accepted(address: str) -> None:
    assert override(Config(), [("guide.spec", f"server:m/x-7b@{address}")]).guide.spec.endswith(address)


def test_the_command_line_and_files_show_no_value_that_they_cannot_read(tmp_path: Any) -> None:
    for text in (f"policy=[{KEY}", f"policy: {KEY}", f"policy='{KEY}", f"ppo.epochs={KEY}", f"{KEY}=1", f"policy={KEY}: a: b"):
        with pytest.raises(ConfigError) as caught:
            read_config("quickstart", [text])
        assert KEY not in str(caught.value)
    path = tmp_path / "a.yaml"
    for text in (
        f"policy: [{KEY}",
        f"policy: '{KEY}",
        f"a: 1\na: {KEY}",
        f"{KEY}: 1",
        f"? {KEY}\n: [1",
        f"format_version: {KEY}",
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_config(str(path))
        assert KEY not in str(caught.value)


def test_yaml_reads_numbers_alone_as_numbers() -> None:
    read = {
        text: parse_assignment(f"a={text}")[1]
        for text in ("010", "1:30", "0x1f", "2020-01-02", "1_000", "1e5", ".5", "-1.", "no", "nan", "inf")
    }
    assert read == {
        "010": "010", "1:30": "1:30", "0x1f": "0x1f", "2020-01-02": "2020-01-02", "1_000": 1000, "1e5": 1e5, ".5": 0.5,
        "-1.": -1.0,
        "no": "no", "nan": "nan", "inf": "inf",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["1e5", "010", "1:30", "0x1f", "2020-01-02", ".5", "no", "~", "1_000", "a: b", "#", "\u2028", "- a", "é", ""]
)
def test_a_text_that_looks_like_something_else_is_still_a_text_in_a_file(text: str, tmp_path: Any) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(dump(override(Config(), [("recipe", text)])), encoding="utf-8")
    assert read_yaml(path)["recipe"] == text


@pytest.mark.parametrize("text",
["a: &x [*x]", "a: 1\nb: &y {c: *y}", "[" * 800, "a: " + "9" * 5_000, "a: 1\na: 2", "\xff", "\0", "recipe: [a]",
                                  "recipe: quickstart\ntask: &t {options: {a: *t}}"])  # fmt: skip
def test_yaml_that_means_nothing_is_refused_in_one_sentence(text: str, tmp_path: Any) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        read_config(str(path))
    assert len(str(caught.value).splitlines()) == 1
    json.dumps(str(caught.value))
