"""Architectures of transformers: sampled and trained with the same numbers, or refused in one sentence."""

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from rlgf.errors import ConfigError
from rlgf.models.loading import wrap_model
from rlgf.rl.model_check import check_model

TOOLS = Path(__file__).resolve().parents[2] / "tools"

ARCHITECTURES = (
    "mamba2", "lfm2", "m2m_100 (encoder–decoder)", "openai-gpt", "qwen3_5_text",
    "qwen3_next", "granitemoehybrid", "falcon_h1", "nemotron_h", "jamba", "olmo_hybrid", "mamba", "falcon_mamba", "rwkv",
    "lfm3", "kimi_linear", "minimax", "deepseek_v4", "bamba", "gemma4_text", "zamba2", "recurrent_gemma", "xlstm",
    "gpt_neo",
    "mbart", "mvp", "plbart", "bigbird_pegasus", "marian", "pegasus", "blenderbot", "roberta", "opt", "gemma3_text", "gpt_oss",
    "llama4_text", "deepseek_v3", "qwen3_moe", "mistral",
    *(f"{name} (encoder–decoder)" for name in ("mbart", "switch_transformers", "nllb-moe", "t5gemma", "marian", "t5", "bart")),
)  # fmt: skip

SHARED = ("zamba2",)  # its layers share weights


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("sweep")


@pytest.mark.integration
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_trained_on_its_own_numbers(sweep: ModuleType, name: str) -> None:
    kind, _, pair = name.partition(" ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sweep.tiny_models.tiny_model(kind, bool(pair))
        report = check_model(wrap_model(model, sweep.tiny_models.tiny_tokenizer(), "tiny"))
    assert report.agreement.tokens > 40
    assert report.agreement.max_error < 1e-4
    assert report.value_head
    assert bool(report.lora_targets) == (kind not in SHARED)


def test_a_model_that_sees_the_future_is_refused_by_its_type(sweep: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sweep.tiny_models.tiny_model("xlnet", False)
        with pytest.raises(ConfigError, match="a model of type 'xlnet' is not causal"):
            wrap_model(model, sweep.tiny_models.tiny_tokenizer(), "tiny")


def test_the_table_has_a_row_for_each_result(sweep: ModuleType) -> None:
    right = {"verdict": "right", "error": 1e-6, "decoding": "select", "rows": "padded", "lora": ["q_proj"], "value_head": True}
    found = sweep.table({"some": right, "other": {"verdict": "refused", "reason": "it is not causal: choose another."}})
    assert "| some | general | padded | yes | q_proj |" in found
    assert "| other | refused: it is not causal |" in found
    assert "2 architectures: 1 right, 1 refused." in found
