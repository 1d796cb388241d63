"""Dispatch of the fast paths: the modes, single paths switched off, and none installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import tiny_model
from rlgf.errors import ConfigError
from rlgf.kernels import dispatch, native
from rlgf.kernels.linear import FastConv1D, FastLinear
from rlgf.kernels.modules import TanhGELU
from rlgf.models import padding_free
from rlgf.models.loading import load_language_model


@pytest.fixture(autouse=True)
def select_auto_again() -> Iterator[None]:
    yield
    dispatch.select("auto")


def test_models_are_left_alone_on_request(tmp_path: Path):
    torch.manual_seed(0)
    tiny_model().save(tmp_path)
    kinds: dict[str, set[type]] = {}
    losses: dict[str, Tensor] = {}
    try:
        for which in ("auto", "off"):
            dispatch.select(which)
            model = load_language_model(str(tmp_path)).model
            kinds[which] = {type(module) for module in model.modules()}
            assert padding_free.is_enabled(model) == (which == "auto")
            losses[which] = model(input_ids=torch.tensor([[1, 2, 3, 1]]), labels=torch.tensor([[1, 2, 3, 1]])).loss
    finally:
        dispatch.select("auto")
    assert FastConv1D in kinds["auto"]
    assert not kinds["off"] & {FastConv1D, FastLinear, TanhGELU}
    torch.testing.assert_close(losses["auto"], losses["off"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("path", "kind"), [("products", FastConv1D), ("activations", TanhGELU)])
def test_a_single_path_can_be_switched_off(path: str, kind: type, tmp_path: Path) -> None:
    tiny_model().save(tmp_path)
    for without in ([], [path]):
        dispatch.select("auto", without)
        model = load_language_model(str(tmp_path)).model
        assert any(isinstance(module, kind) for module in model.modules()) == (not without)


def test_an_unknown_path_or_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown fast path 'attentions'.*attention"):
        dispatch.select("auto", ["attentions"])
    with pytest.raises(ConfigError, match=r"unknown runtime.kernels 'fast'"):
        dispatch.select("fast")


def test_native_is_refused_without_the_c_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda: "rlgf_native is not installed: pip install ./native")
    with pytest.raises(ConfigError, match=r"runtime.kernels is native, but .*pip install ./native.*runtime.kernels=auto"):
        dispatch.select("native")
    assert dispatch.uses_native("attention")  # what was selected before stays
    assert dispatch.describe() == "torch (rlgf_native is not installed: pip install ./native)"


@pytest.mark.parametrize("mode", ["torch", "off"])
def test_without_the_c_kernels_the_caller_is_left_to_torch(mode: str) -> None:
    dispatch.select(mode)
    logits = torch.randn(4, 32)
    heads = torch.randn(1, 2, 4, 16)
    offsets = [torch.tensor([0]), torch.tensor([0]), torch.tensor([4]), torch.tensor([0]), torch.tensor([4])]
    assert dispatch.logsumexp(logits) is None
    assert dispatch.log_softmax_backward(logits, torch.zeros(4), torch.zeros(4, dtype=torch.int64), torch.ones(4)) is None
    assert dispatch.packed_attention(heads, heads, heads, None, True, offsets, 1.0) is None
    assert dispatch.decode_attention(heads[:, :, :1], heads, heads, None, 1.0) is None


@pytest.mark.parametrize(("mode", "without"), [("off", []), ("auto", ["concurrency"])])
def test_two_functions_run_one_after_the_other_where_concurrency_is_off(mode: str, without: list[str]) -> None:
    torch.set_num_threads(2)
    dispatch.select(mode, without)
    order: list[int] = []

    def task(number: int) -> int:
        order.append(number)
        return torch.get_num_threads()

    assert dispatch.run_concurrently(lambda: task(1), lambda: task(2), torch.device("cpu")) == (2, 2)
    assert order == [1, 2]


def test_the_c_kernels_are_given_only_what_they_support() -> None:
    if reason := native.unavailable_reason():
        pytest.skip(reason)
    assert native.supports(torch.zeros(3, 32))
    refused = (torch.zeros(3, 8), torch.zeros(3, 32).double(), torch.zeros(3, 32).bfloat16(), torch.zeros(32, 16).t())
    assert not any(native.supports(states) for states in (*refused, torch.zeros(0, 16)))
    dispatch.select("torch")
    assert not native.supports(torch.zeros(3, 32))
