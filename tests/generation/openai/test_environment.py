"""Values from the environment in the settings of a server, and what its messages may show."""

from typing import Any

import pytest

from helpers import guide_config, small
from rlgf.errors import ConfigError
from rlgf.generation.openai.client import Server
from rlgf.generation.openai.environment import Environment
from rlgf.pipeline.preflight import check_to_train
from rlgf.pipeline.resolve import resolve

SECRETS = {"MY_KEY": "key-from-outside-1", "MY_TOKEN": "Bearer token/from+outside=2", "MY_PATH": "path-from-outside-3"}
ADDRESS = "server:m@http://127.0.0.1:9/${MY_PATH}/v1"
SETTINGS: dict[str, Any] = {
    "api_key_env": "MY_KEY", "extra_headers": {"Authorization": "$MY_TOKEN", "X-Title": "films"},
    "extra_body": {"a": [{"api_key": "$MY_KEY", "n": 1}, ["${MY_PATH}"]], "price": "$$5"},
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_references_are_filled_in_nested_values(environment: None) -> None:
    found = Environment("guide").fill({"a": ["$MY_KEY", {"b": "x-${MY_PATH}-$MY_KEY"}], "n": 1, "d": "$$5 $", "f": "^a$"}, "x")
    key, path = SECRETS["MY_KEY"], SECRETS["MY_PATH"]
    assert found == {"a": [key, {"b": f"x-{path}-{key}"}], "n": 1, "d": "$5 $", "f": "^a$"}


def test_a_server_sends_the_values_and_keeps_only_the_names(environment: None) -> None:
    server = Server(ADDRESS, guide_config(**SETTINGS), "completion")
    assert str(server._client.base_url) == "http://127.0.0.1:9/path-from-outside-3/v1/"
    assert server._client.default_headers["Authorization"] == SECRETS["MY_TOKEN"]
    assert server._extra_body == {"a": [{"api_key": SECRETS["MY_KEY"], "n": 1}, [SECRETS["MY_PATH"]]], "price": "$5"}
    for kept in (server.url, server.key(), server.config):
        assert "from-outside" not in str(kept)
        assert "from+outside" not in str(kept)


@pytest.mark.parametrize(
    "echo",
    [
        "wrong key key-from-outside-1", "header 'Bearer token/from+outside=2'", "only token/from+outside=2",
        "at /path-from-outside-3/v1",
        "quoted token%2Ffrom%2Boutside%3D2", "another sk-abcdefgh12345678 and https://me:pw@host", "key-from-outside-1" * 100,
    ],
)  # fmt: skip
def test_messages_of_a_server_hide_every_value(echo: str, environment: None) -> None:
    shown = Server(ADDRESS, guide_config(**SETTINGS), "completion")._environment.hide(f"no: {echo}\nbye")
    assert "***" in shown
    assert len(shown) <= 300
    for secret in ("outside", "sk-abc", "me:pw"):
        assert secret not in shown


def test_a_variable_that_is_not_set_is_named_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    for role, changes in {
        "guide": [("guide.spec", "server:m@http://h/$NOT_SET/v1"), ("algorithm.name", "ppo_pp")],
        "judge": [("judge.spec", "server:m@http://h/v1"), ("judge.endpoint.extra_body", {"a": ["$NOT_SET"]})],
    }.items():
        with pytest.raises(ConfigError, match=rf"^{role}\.(spec|endpoint\.extra_body) names the environment variable NOT_SET"):
            check_to_train(resolve(small(*changes)))
    monkeypatch.setenv("NOT_SET", "now it is")
    check_to_train(resolve(small(("guide.spec", "server:m@http://h/$NOT_SET/v1"), ("algorithm.name", "ppo_pp"))))
    monkeypatch.setenv("NOT_SET", "with\x1bcontrol")
    with pytest.raises(ConfigError, match="NOT_SET contains characters that no key has"):
        check_to_train(resolve(small(("guide.spec", "server:m@http://h/$NOT_SET/v1"), ("algorithm.name", "ppo_pp"))))
