"""What is compiled against the same in float64 by torch, and what happens where nothing can be compiled."""

import copy
import ctypes
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rlgf.kernels import modules, native
from rlgf.models import padding_free
from rlgf.models.log_probs import token_log_probs

COMPILER = next(filter(None, map(shutil.which, native.COMPILERS)), None)
LIBRARY = native.library
BUILDS = {"as the machine has it": (), "without AVX-512": ("-mno-avx512f",), "alone": ("-fno-openmp",)}  # alone: one thread


@pytest.fixture(scope="module", params=BUILDS)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The library as compiled for several machines; its functions are what `native` calls."""
    if COMPILER is None:
        pytest.skip("no C compiler here")
    if request.param == "without AVX-512" and platform.machine() != "x86_64":
        pytest.skip("AVX-512 is x86's, and this processor is of another kind")
    made, patch = tmp_path_factory.mktemp("native") / "native.so", pytest.MonkeyPatch()
    patch.setattr(native, "FLAGS", (*native.FLAGS, *BUILDS[request.param]))
    native._compile([COMPILER], made)
    found = ctypes.CDLL(str(made))
    patch.setattr(native, "library", lambda: (found, None))
    patch.setattr(native, "_matmul_function", native._matmul_function.__wrapped__)
    yield
    patch.undo()


@pytest.fixture(params=native.UNITS)
def units(build: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Products by each function, in builds for processors that can."""
    found = native.library()[0]
    if found is None or not getattr(found, request.param.replace("product", "ready"))():
        pytest.skip(f"this processor has no {native.UNITS[request.param]}, or this build leaves it out")
    monkeypatch.setattr(native, "_matmul_function", lambda: request.param)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(function: Any, *given: Tensor) -> list[Tensor]:
    """What a function returns, and the gradients of a weighted sum of it."""
    inputs = [t.detach().clone().requires_grad_() for t in given]
    result = function(*inputs)
    upstream = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view(result.shape)
    return [result.detach(), *torch.autograd.grad((result * upstream).sum(), inputs)]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the largest value."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("threads", [1, 3])
def test_activations_are_torchs(build: None, threads: int):
    torch.set_num_threads(threads)
    states = torch.cat([torch.linspace(-12, 12, 1003), torch.tensor([0.0, -0.0, 1e-20, 60.0, -60.0])]).view(-1, 16)
    exact = states.double()
    same(
        with_gradients(modules.TanhGELU(), states),
        with_gradients(lambda x: nn.functional.gelu(x, approximate="tanh"), exact),
    )
    both = torch.cat([states, drawn(*states.shape)], 1)
    found = with_gradients(modules._SiluAndMul.apply, both)
    same(found, with_gradients(lambda x: nn.functional.silu(x[:, :16]) * x[:, 16:], both.double()))


@pytest.mark.parametrize("threads", [1, 3])
def test_rotary_positions_are_transformers(build: None, threads: int):
    torch.set_num_threads(threads)
    q, k = drawn(1, 9, 4, 64).transpose(1, 2), drawn(1, 9, 6, 64, seed=1)[:, :, 2:4].transpose(1, 2)
    angles = drawn(1, 9, 32, seed=2).repeat(1, 1, 2)  # but let both halves differ, as nothing says that they may not
    cos, sin = angles.cos() * torch.linspace(0.5, 1, 64), angles.sin()
    for heads in (q, k):
        found = with_gradients(lambda x: modules._apply_rotary(pytest.fail, x, x, cos, sin)[0], heads)
        exact = with_gradients(lambda x: apply_rotary_pos_emb(x, x, cos.double(), sin.double())[0], heads.double())
        same(found, exact)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [16, 80])
def test_the_norm_is_torchs(build: None, width: int, threads: int):
    torch.set_num_threads(threads)
    states, weight = drawn(2, 7, width) * torch.tensor([1e-3, 10.0])[:, None, None], drawn(width, seed=1)
    found = with_gradients(lambda x, w: modules._RMSNorm.apply(x, w, 1e-6), states, weight)
    same(found, with_gradients(lambda x, w: nn.functional.rms_norm(x, (width,), w, 1e-6), states.double(), weight.double()))


@pytest.mark.parametrize("vocabulary", [16, 61, 203, 1024])
def test_log_probabilities_are_torchs(build: None, vocabulary: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "VECTOR_WIDTH", 1)  # asked for by vocabularies of whole vectors alone, computed for any
    logits = drawn(9, vocabulary) * 8
    logits[3, 5] = -torch.inf
    tokens_apart = torch.stack([torch.arange(9) % 4, torch.zeros(9, dtype=torch.int64)], 1)
    tokens = tokens_apart[:, 0]
    found = with_gradients(lambda x: token_log_probs(x, tokens, inplace_backward=False), logits)
    exact = with_gradients(lambda x: x.log_softmax(1)[torch.arange(9), tokens], logits.double())
    same(found, exact)
    assert found[1][3, 5] == 0


def attended(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, asking: padding_free.PackedRow,
    asked: padding_free.PackedRow,
) -> Tensor:  # fmt: skip
    """Attention as anybody would write it down, [tokens, heads, size]."""
    out, groups = torch.zeros_like(query).transpose(0, 1).contiguous(), query.shape[0] // key.shape[0]
    for text, length in enumerate(asking.lengths):
        start, other = int(asking.starts[text]), int(asked.starts[text])
        seen = slice(other, other + asked.lengths[text])
        scores = query[:, start : start + length] @ key.repeat_interleave(groups, 0)[:, seen].transpose(1, 2) * 0.3
        if bias is not None:
            scores = scores + bias[:, : scores.shape[1], : scores.shape[2]]
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        rows = (scores.softmax(2) @ value.repeat_interleave(groups, 0)[:, seen]).transpose(0, 1)
        idle = asking.num_skipped[text]
        out[start + idle : start + length] = rows[idle:]
    return out


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [16, 48, 80])
@pytest.mark.parametrize("kind", ["causal", "shared keys", "with idle tokens", "both ways, with a bias", "of another line"])
def test_attention_is_what_one_would_write_down(build: None, kind: str, size: int, threads: int):
    torch.set_num_threads(threads)
    lengths = torch.tensor([1, 70, 16, 33, 6, 49, 97, 5])
    ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int64)
    line = padding_free.pack(ids, lengths, torch.device("cpu"))
    other = padding_free.pack(ids, lengths.flip(0), torch.device("cpu")) if kind == "of another line" else line
    if kind == "with idle tokens":
        line = other = padding_free.replace(line, num_skipped=[0, 69, 3, 0, 5, 48, 50, 4])
    heads, tokens, others, causal = (
        4,
        line.ids.shape[1],
        other.ids.shape[1],
        kind not in ("both ways, with a bias", "of another line"),
    )
    key_heads = 2 if kind == "shared keys" else heads
    query = drawn(tokens, heads, size).transpose(0, 1)
    key, value = (drawn(others, 3 * key_heads, size, seed=s)[:, key_heads : 2 * key_heads].transpose(0, 1) for s in (1, 2))
    bias = [drawn(heads, line.width, line.width, seed=3)] if "bias" in kind else []
    given = [query, key, value, *bias]

    def compiled(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None = None) -> Tensor:
        return padding_free._Attention.apply(q[None], k[None], v[None], b, causal, line, other, 0.3)[0]

    def by_hand(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None = None) -> Tensor:
        return attended(q, k, v, b, causal, line, other)

    same(with_gradients(compiled, *given), with_gradients(by_hand, *(t.double() for t in given)))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [16, 80])
def test_a_single_query_attends_as_torchs_do(build: None, size: int, threads: int):
    torch.set_num_threads(threads)
    query = drawn(5, 1, 4, size).transpose(1, 2)
    key, value = (drawn(5, 2, 40, size, seed=seed)[:, :, :37] for seed in (1, 2))
    seen = torch.arange(37) >= torch.tensor([0, 3, 16, 20, 36])[:, None]
    for mask in (None, seen):
        exact = nn.functional.scaled_dot_product_attention(
            query.double(),
            key.double(),
            value.double(),
            None if mask is None else mask[:, None, None],
            scale=0.3,
            enable_gqa=True,
        )
        same([native.attention_decode(query, key, value, mask, 0.3)], [exact.transpose(1, 2)])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (33, 31, 17), (700, 1100, 130), (64, 32, 4200), (1300, 64, 96), (130, 600, 1100), (300, 768, 1)]
)
def test_products_are_as_exact_as_in_fp32(units: None, sizes: tuple[int, int, int], threads: int):
    torch.set_num_threads(threads)
    rows, depth, columns = sizes
    bias = drawn(columns, seed=2)
    for left in (drawn(rows, depth), drawn(depth, rows).t()):
        for right in (drawn(depth, columns, seed=1) * 1e-3, drawn(columns, depth, seed=1).t()):
            for beside in (None, bias):
                exact = left.double() @ right.double() + (0 if beside is None else beside.double())
                usual = left @ right + (0 if beside is None else beside)
                assert float((native.matmul(left, right, beside) - exact).norm()) <= 1.2 * float((usual - exact).norm()) + 1e-6


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_a_product_of_nothing_is_the_bias(units: None, sizes: tuple[int, int, int]):
    rows, depth, columns = sizes
    bias = drawn(columns)
    assert torch.equal(native.matmul(drawn(rows, depth), drawn(depth, columns), bias), bias.expand(rows, columns))
    assert torch.equal(native.matmul(drawn(rows, depth), drawn(depth, columns)), torch.zeros(rows, columns))


@pytest.mark.parametrize(("told", "wide"), [
    ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t: avx512f\n", False),
    ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t: avx512f\n", True),
    ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t: avx2\n", False),
    ("vendor_id\t: GenuineIntel\ncpu family\t: 26\nflags\t: avx512f\n", False),
    ("CPU part\t: 0xd40\n", False),
])  # fmt: skip
def test_a_processor_with_units_of_the_whole_width_is_known(told: str, wide: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "processor", lambda: told)
    assert native.has_full_width_avx512.__wrapped__() is wide


@pytest.mark.parametrize("layer", [modules.FastLinear(48, 80), modules.FastConv1D(80, 48)])
def test_layers_use_compiled_products_and_their_gradients_are_torchs(
    units: None, layer: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(modules, "MIN_MULTIPLICATIONS", 0)
    made, product, found = list[int](), native.matmul, list[list[Tensor]]()
    monkeypatch.setattr(native, "product", lambda *given: made.append(1) or product(*given))
    for module, states in ((layer, drawn(3, 100, 48)), (copy.deepcopy(layer).double(), drawn(3, 100, 48).double())):
        result = module(states.requires_grad_())
        upstream = torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view(result.shape)
        found.append([result.detach(), *torch.autograd.grad((result * upstream).sum(), [states, *module.parameters()])])
    same(*found)
    assert len(made) == 3  # for the result, the gradient of the states, and that of the weight


def test_rows_of_infinities_have_the_normalisers_that_torch_gives_them(build: None):
    logits = torch.zeros(4, 16)
    logits[0], logits[1, 3], logits[2], logits[2, 5] = -torch.inf, torch.inf, -torch.inf, torch.nan
    torch.testing.assert_close(native.logsumexp(logits), logits.logsumexp(1), equal_nan=True)
    for column in (0, 70, 200):  # in the chains, and behind them
        for value in (torch.inf, torch.nan, -torch.inf):
            logits = drawn(2, 203) - (torch.inf if value > 0 else 0)
            logits[0, column] = value
            torch.testing.assert_close(native.logsumexp(logits), logits.logsumexp(1), equal_nan=True)


def test_nothing_hides_what_is_not_a_number(build: None):
    states = drawn(4, 32)
    states[1, 3] = torch.nan
    assert native.gelu(states).isnan().any(1).tolist() == [False, True, False, False]
    assert native.logsumexp(states).isnan().tolist() == [False, True, False, False]
    line = padding_free.pack(torch.zeros(2, 2, dtype=torch.int64), torch.tensor([2, 2]), torch.device("cpu"))
    query = states.new_ones(1, line.ids.shape[1], 32)
    query[0, 1, 5] = torch.nan
    out, _ = native.attention(query, query, query, None, True, (*line.offsets, line.starts, line.offsets[2]), 1.0)
    assert out[:4].isnan().any(2).flatten().tolist()[1:] == [True, False, False]


# where it comes from


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing was compiled yet; the folder in which it will be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "library", LIBRARY.__wrapped__)
    return tmp_path / "rlgf"


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_it_is_compiled_once_and_kept(anew: Path, monkeypatch: pytest.MonkeyPatch):
    assert native.library()[1] is None
    (kept,) = anew.iterdir()
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    assert native.library()[1] is None
    assert native.supports(torch.zeros(2, 16))
    assert [*anew.iterdir()] == [kept]


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_a_cache_that_cannot_be_written_does_not_matter(anew: Path):
    anew.write_text("no folder")
    found, reason = native.library()
    assert reason is None
    assert found is not None


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_a_home_that_is_not_there_does_not_matter(anew: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert native.library()[1] is None


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_what_is_kept_and_broken_is_made_again(anew: Path):
    assert native.library()[1] is None
    (kept,) = anew.iterdir()
    kept.unlink()
    kept.write_bytes(b"half of it")
    assert native.library()[1] is None
    assert kept.stat().st_size > 1000


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_a_compiler_with_options_is_asked_with_them(anew: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CC", f"{COMPILER} -DNOTHING")
    monkeypatch.setattr(native, "COMPILERS", ())
    assert native.library()[1] is None


def test_without_a_compiler_torch_does_the_work(anew: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CC", raising=False)
    assert not native.supports(torch.zeros(2, 16))
    assert "no C compiler found (no-such-compiler" in (native.unavailable_reason() or "")


def test_what_does_not_compile_is_said(anew: Path, monkeypatch: pytest.MonkeyPatch):
    compiler = anew.parent / "broken"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'unknown vector' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(native, "COMPILERS", ())
    assert not native.supports(torch.zeros(2, 16))
    assert "broken could not compile the sources: unknown vector" in (native.unavailable_reason() or "")
    assert not [*anew.iterdir()]


def test_only_what_it_can_read_is_handed_over(build: None):
    assert native.supports(torch.zeros(3, 32))
    refused = (
        torch.zeros(3, 8),
        torch.zeros(3, 32).double(),
        torch.zeros(3, 32).bfloat16(),
        torch.zeros(32, 16).t(),
        torch.zeros(0, 16),
    )
    assert not any(native.supports(states) for states in refused)


def test_on_request_nothing_is_used(build: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(native, "_enabled", False)
    assert not native.supports(torch.zeros(3, 32))
    assert native.unavailable_reason() is None
