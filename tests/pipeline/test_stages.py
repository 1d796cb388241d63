"""Fingerprints of stages and runs: whatever changes a completion, and nothing else."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from rlgf.config.loading import override
from rlgf.config.schema import Config
from rlgf.config.sections import CONNECTION_FIELDS, EndpointConfig, GuideConfig, TaskConfig
from rlgf.pipeline.stages import guide_identity, task_source
from rlgf.runs.directory import identifying_settings
from rlgf.types import SamplingParams

OTHER: dict[str, Any] = {
    "api_key_env": "MY_KEY", "extra_body": {"top_k": 5}, "extra_headers": {"X-Title": "films"}, "thinking_tokens": 3,
    "concurrency": 3, "requests_per_minute": 9.0, "timeout_seconds": 9.0, "retries": 9, "retry_seconds": 9.0,
    "price_input": 1.0, "price_output": 2.0, "max_requests": 9, "max_tokens": 9, "max_cost": 9.0, "cache": "responses.sqlite",
    "offline": True,
}  # fmt: skip
IDENTIFYING = {"extra_body", "extra_headers", "thinking_tokens"}


def test_the_fields_of_a_connection_are_all_but_those_that_change_a_response() -> None:
    assert set(OTHER) == {field.name for field in dataclasses.fields(EndpointConfig)}
    assert set(CONNECTION_FIELDS) == set(OTHER) - IDENTIFYING


@pytest.mark.parametrize("section", ["guide", "judge"])
def test_a_run_is_another_run_only_if_a_response_may_be_another(section: str) -> None:
    prices = [(f"{section}.endpoint.price_input", 1.5), (f"{section}.endpoint.price_output", 1.5)]
    plain = override(Config(), prices)
    for name, value in OTHER.items():
        changed = override(plain, [(f"{section}.endpoint.{name}", value)])
        assert changed != plain
        assert (identifying_settings(changed) != identifying_settings(plain)) == (name in IDENTIFYING), name


def test_a_stage_made_with_a_guide_is_named_as_before_its_endpoint_was_a_section() -> None:
    """The identity is that of commit b9c0d81."""
    config = GuideConfig(
        spec="server:m@http://127.0.0.1:9/v1", sampling=SamplingParams(temperature=0.7, top_p=0.9), stop=("\n",), prefetch=0,
        on_failure="wait", endpoint=EndpointConfig(**OTHER),
    )  # fmt: skip
    assert guide_identity(config) == {
        "spec": "server:m",
        "sampling": {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "greedy": False, "num_beams": 1},
        "stop": ("\n",),
        "extra_body": {"top_k": 5},
        "extra_headers": {"X-Title": "films"},
        "thinking_tokens": 3,
    }


def test_a_stage_is_another_one_if_the_template_file_of_its_task_changes(tmp_path: Path) -> None:
    task = TaskConfig("prompts", options={"chat_template": str(tmp_path / "template"), "prompt_column": "prompt"})
    assert task_source(task) == {"name": "prompts", "options": task.options, "data": None}
    (tmp_path / "template").write_text("a")
    before = task_source(task)
    (tmp_path / "template").write_text("b")
    assert before != task_source(task)
