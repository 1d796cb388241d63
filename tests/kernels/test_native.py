"""The C kernels of `rlgf_native` against the same computed by torch in float64."""

import ast
import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from helpers import parsed
from rlgf.kernels.processor import processor

rlgf_native = pytest.importorskip(
    "rlgf_native", reason="the C kernels are not installed (pip install ./native)", exc_type=ModuleNotFoundError
)
library = rlgf_native.library
SOURCES = Path(__file__).resolve().parents[2] / "native"
TAIL = 3  # filler after the last sequence of a packed row


@pytest.fixture(params=library.VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each variant of the kernels that this processor can run."""
    if request.param not in library.supported_variants():
        pytest.skip(rlgf_native.unavailable_reason() or f"this processor cannot run the variant {request.param!r}")
    monkeypatch.setattr(library, "variant", lambda: request.param)
    return request.param


@pytest.fixture(params=["amx", "avx512"])
def matmul_variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each variant of `matmul` that this processor can run, and this process may."""
    use_matmul(request.param, monkeypatch)
    return request.param


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    use_matmul("amx", monkeypatch)


def use_matmul(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library.variant() != "avx512":
        pytest.skip(rlgf_native.unavailable_reason() or "this processor has no AVX-512, which products in C need")
    if variant == "amx" and not library.supports_amx():
        pytest.skip("matrix units (AMX) are missing: from the processor, or the system or the compiler does not support them")
    monkeypatch.setattr(library, "matmul_variant", lambda: variant)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def upstream_of(result: Tensor) -> Tensor:
    """A gradient in which no two numbers are the same."""
    return torch.linspace(-1, 2, result.numel(), dtype=result.dtype).view(result.shape)


def exact(function: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
    """Return the result of a torch function in float64, and its gradients."""
    inputs = [t.detach().double().requires_grad_() for t in given]
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad((result * upstream_of(result)).sum(), inputs)]


def same(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 2e-6) -> None:
    """Assert that values agree within `tolerance` of the largest."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max().clamp(min=1e-30))


def test_activations_are_torchs(variant: str, threads: None):
    states = torch.cat([torch.linspace(-12, 12, 1003), torch.tensor([0.0, -0.0, 1e-20, 60.0, -60.0])]).view(-1, 16)
    result = rlgf_native.gelu(states)
    found = [result, rlgf_native.gelu_backward(states, upstream_of(result))]
    same(found, exact(lambda x: nn.functional.gelu(x, approximate="tanh"), states))


@pytest.mark.parametrize("vocabulary", [16, 61, 203, 1024])  # of any size, not of whole vectors alone
def test_log_probabilities_are_torchs(variant: str, threads: None, vocabulary: int):
    logits = drawn(9, vocabulary) * 8
    logits[3, 5] = -torch.inf
    tokens = torch.arange(9) % 4
    normalizers = rlgf_native.logsumexp(logits)
    result = logits[torch.arange(9), tokens] - normalizers
    overwritten = logits.clone()
    gradient = rlgf_native.log_prob_backward(overwritten, normalizers, tokens, upstream_of(result))
    assert gradient is overwritten
    same([result, gradient], exact(lambda x: x.log_softmax(1)[torch.arange(9), tokens], logits))
    assert gradient[3, 5] == 0


def starts_of(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def attention_by_hand(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, spans: Sequence[Tensor]
) -> Tensor:
    """Attention as anybody would write it down, [tokens, heads, size]."""
    out, groups = torch.zeros_like(query).transpose(0, 1).contiguous(), query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    for start, skipped, length, key_start, key_length in zip(*(span.tolist() for span in spans), strict=True):
        keys = slice(key_start, key_start + key_length)
        scores = query[:, start : start + length] @ key[:, keys].transpose(1, 2) * 0.3
        if bias is not None:
            scores = scores + bias[:, : scores.shape[1], : scores.shape[2]]
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
        rows = (scores.softmax(2) @ value[:, keys]).transpose(0, 1)
        out[start + skipped : start + length] = rows[skipped:]
    return out


@pytest.mark.parametrize("size", [16, 48, 80])
@pytest.mark.parametrize("kind", ["causal", "shared keys", "skipped tokens", "both ways, with a bias", "of another row"])
def test_attention_is_what_one_would_write_down(variant: str, threads: None, kind: str, size: int):
    lengths = torch.tensor([1, 70, 16, 33, 6, 49, 97, 5])
    key_lengths = lengths.flip(0) if kind == "of another row" else lengths
    skipped = torch.tensor([0, 69, 3, 0, 5, 48, 50, 4]) if kind == "skipped tokens" else torch.zeros_like(lengths)
    spans = starts_of(lengths), skipped, lengths, starts_of(key_lengths), key_lengths
    causal = kind not in ("both ways, with a bias", "of another row")
    heads, key_heads, tokens = 4, 2 if kind == "shared keys" else 4, int(lengths.sum()) + TAIL
    query = drawn(tokens, heads, size).transpose(0, 1)
    key, value = (drawn(tokens, 3 * key_heads, size, seed=s)[:, key_heads : 2 * key_heads].transpose(0, 1) for s in (1, 2))
    bias = drawn(heads, 112, 112, seed=3) if "bias" in kind else None
    given = [t for t in (query, key, value, bias) if t is not None]

    out, normalizers = rlgf_native.attention(query, key, value, bias, causal, spans, 0.3)
    *gradients, for_bias = rlgf_native.attention_backward(
        query, key, value, bias, causal, spans, 0.3, out, normalizers, upstream_of(out), bias is not None
    )
    found = [out, *(t.transpose(0, 1) for t in gradients), *([] if for_bias is None else [for_bias])]
    same(found, exact(lambda q, k, v, b=None: attention_by_hand(q, k, v, b, causal, spans), *given))


def test_the_gradient_of_a_bias_is_computed_on_request_alone(variant: str):
    length = torch.tensor([16])
    query, bias, spans = drawn(1, 16, 16), drawn(1, 16, 16), (length - 16, length - 16, length, length - 16, length)
    given = query, query, query, bias, False, spans, 1.0
    *_, for_bias = rlgf_native.attention_backward(*given, *rlgf_native.attention(*given), drawn(16, 1, 16), False)
    assert for_bias is None


@pytest.mark.parametrize("size", [16, 80])
def test_a_single_query_attends_as_torchs_do(variant: str, threads: None, size: int):
    query = drawn(5, 1, 4, size).transpose(1, 2)
    key, value = (drawn(5, 2, 40, size, seed=seed)[:, :, :37] for seed in (1, 2))
    seen = torch.arange(37) >= torch.tensor([0, 3, 16, 20, 36])[:, None]
    for mask in (None, seen):
        expected = nn.functional.scaled_dot_product_attention(
            query.double(),
            key.double(),
            value.double(),
            None if mask is None else mask[:, None, None],
            scale=0.3,
            enable_gqa=True,
        )
        same([rlgf_native.attention_decode(query, key, value, mask, 0.3)], [expected.transpose(1, 2)])


def test_a_single_query_that_sees_nothing_gets_zeros(variant: str):
    query, key = drawn(2, 1, 1, 16), drawn(2, 1, 5, 16)
    seen = torch.tensor([[False] * 5, [True] * 5])
    found = rlgf_native.attention_decode(query, key, key, seen, 1.0)
    assert (found == 0).flatten(1).all(1).tolist() == [True, False]


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (33, 31, 17), (700, 1100, 130), (64, 32, 4200), (1300, 64, 96), (130, 600, 1100), (300, 768, 1)]
)
def test_products_are_as_exact_as_torchs(matmul_variant: str, threads: None, sizes: tuple[int, int, int]):
    rows, depth, columns = sizes
    bias = drawn(columns, seed=2)
    for left in (drawn(rows, depth), drawn(depth, rows).t()):
        for right in (drawn(depth, columns, seed=1) * 1e-3, drawn(columns, depth, seed=1).t()):
            for added in (None, bias):
                expected = left.double() @ right.double() + (0 if added is None else added.double())
                usual = matrix_product(left, right) + (0 if added is None else added)
                found = rlgf_native.matmul(left, right, added)
                assert float((found - expected).norm()) <= 1.2 * float((usual - expected).norm()) + 1e-6


def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """torch's product of matrices; that of a matrix and a vector has other sums, which some processors round less."""
    return (left @ right.repeat(1, 32))[:, : right.shape[1]] if right.shape[1] == 1 else left @ right


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_a_product_of_nothing_is_the_bias(sizes: tuple[int, int, int]):
    rows, depth, columns = sizes
    bias = drawn(columns)
    assert torch.equal(rlgf_native.matmul(drawn(rows, depth), drawn(depth, columns), bias), bias.expand(rows, columns))
    assert torch.equal(rlgf_native.matmul(drawn(rows, depth), drawn(depth, columns)), torch.zeros(rows, columns))


@pytest.mark.parametrize("scales", [(1.0, 1e-30), (1e-30, 1.0), (1e-15, 1e-15), (3e37, 1e-30), (1e18, 1e18)])
def test_products_are_as_exact_for_small_and_large_numbers(matmul_variant: str, scales: tuple[float, float]):
    left, right = (drawn(40, 70, seed=seed).abs().clamp(1.0, 8.0) * scale for seed, scale in enumerate(scales))
    expected, usual, found = left.double() @ right.t().double(), left @ right.t(), rlgf_native.matmul(left, right.t())
    assert float((found - expected).norm()) <= 1.2 * float((usual - expected).norm())


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_on_amx_digits_of_smaller_numbers_are_lost(amx: None):
    left, right = drawn(40, 70).abs().clamp(min=1.0), drawn(70, 40, seed=1).abs().clamp(min=1.0)
    errors = [
        relative_error(rlgf_native.matmul(left * scale, right), (left * scale).double() @ right.double())
        for scale in (1e-30, 1e-34, 1e-36)
    ]
    assert errors[0] < 1e-6 < errors[1] < errors[2] < 1e-2
    assert (rlgf_native.matmul(torch.full((4, 4), 1e-39), torch.ones(4, 4)) == 0).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3.4e38])
@pytest.mark.parametrize("sizes", [(20, 40, 20), (64, 600, 64)])
def test_products_show_what_is_not_finite_where_torchs_do(matmul_variant: str, sizes: tuple[int, int, int], value: float):
    rows, depth, columns = sizes
    for left, right, row, column in (
        (with_one(drawn(rows, depth), 3, value), drawn(depth, columns), 3, slice(None)),
        (drawn(rows, depth), with_one(drawn(depth, columns), 3, value), slice(None), 5),
    ):
        wanted = torch.zeros(rows, columns, dtype=torch.bool)
        wanted[row, column] = True
        found = rlgf_native.matmul(left, right)
        if matmul_variant == "amx":
            assert torch.equal(found.isnan(), wanted)  # infinities too, and numbers above 3e38
        elif abs(value) == torch.inf or value != value:
            assert torch.equal(found.isfinite(), ~wanted)
        torch.testing.assert_close(found[~wanted], (left @ right)[~wanted], rtol=1e-4, atol=1e-4)


def with_one(states: Tensor, row: int, value: float) -> Tensor:
    states[row, 5] = value
    return states


def test_products_at_the_same_time_do_not_share_memory(matmul_variant: str):
    """Two threads multiply matrices of changing sizes, as policy and critic do."""
    cases = [(drawn(rows, 300, seed=rows), drawn(300, 96, seed=rows + 1)) for rows in (33, 400, 65, 257)] * 5
    expected = [rlgf_native.matmul(left, right) for left, right in cases]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(lambda: [rlgf_native.matmul(left, right) for left, right in cases]) for _ in range(2)]
        for run in runs:
            assert all(map(torch.equal, run.result(), expected))


def test_rows_of_infinities_have_the_normalizers_that_torch_gives_them(variant: str):
    logits = torch.zeros(4, 16)
    logits[0], logits[1, 3], logits[2], logits[2, 5] = -torch.inf, torch.inf, -torch.inf, torch.nan
    torch.testing.assert_close(rlgf_native.logsumexp(logits), logits.logsumexp(1), equal_nan=True)
    for column in (0, 70, 200):  # in the chains, and after them
        for value in (torch.inf, torch.nan, -torch.inf):
            logits = drawn(2, 203) - (torch.inf if value > 0 else 0)
            logits[0, column] = value
            torch.testing.assert_close(rlgf_native.logsumexp(logits), logits.logsumexp(1), equal_nan=True)


def test_nothing_hides_what_is_not_a_number(variant: str):
    states = drawn(4, 32)
    states[1, 3] = torch.nan
    assert rlgf_native.gelu(states).isnan().any(1).tolist() == [False, True, False, False]
    assert rlgf_native.logsumexp(states).isnan().tolist() == [False, True, False, False]
    lengths = torch.tensor([2, 2])
    query = torch.ones(1, 4, 32)
    query[0, 1, 5] = torch.nan
    starts = starts_of(lengths)
    out, _ = rlgf_native.attention(query, query, query, None, True, (starts, starts * 0, lengths, starts, lengths), 1.0)
    assert out.isnan().any(2).flatten().tolist()[1:] == [True, False, False]  # the first weighs the second's value with 0


# which kernels a processor gets


@pytest.mark.parametrize(("variants", "amx", "used"), [
    (("avx512", "avx2"), True, "attention, activations, log-probabilities, products on AMX"),
    (("avx512", "avx2"), False, "attention, activations, log-probabilities, products on AVX-512"),
    (("avx2",), False, "attention, activations, log-probabilities"),
    ((), False, "nothing"),
])  # fmt: skip
def test_products_are_for_amx_and_avx512(variants: tuple[str, ...], amx: bool, used: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "load", lambda: (ctypes.CDLL(None), None))
    monkeypatch.setattr(library, "supported_variants", lambda: variants)
    monkeypatch.setattr(library, "supports_amx", lambda: amx)
    assert rlgf_native.describe() == used
    assert rlgf_native.matmul_unit() == ("AMX" if amx else "AVX-512" if "avx512" in variants else None)
    assert rlgf_native.has_matmul() is ("products" in used)


def flags_of_this_processor() -> set[str]:
    return {flag for line in processor().splitlines() if line.startswith("flags") for flag in line.split()}


def test_the_variants_are_those_of_the_flags_of_the_processor():
    flags = flags_of_this_processor()
    if not flags:
        pytest.skip("the system names no flags of an x86 processor")
    wanted = {"avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"}, "avx2": {"avx2", "fma"}}
    assert library.supported_variants() == tuple(name for name, needed in wanted.items() if needed <= flags)


def test_amx_is_used_if_the_processor_the_system_and_the_compiler_have_it(monkeypatch: pytest.MonkeyPatch):
    flags = flags_of_this_processor()
    if not library.supports_amx():
        assert library.matmul_variant() != "amx"
    if {"amx_tile", "amx_bf16", "avx512_bf16"} <= flags and library.variant() == "avx512":
        assert library.supports_amx() is hasattr(library.load()[0], "matmul_amx")
    else:
        assert not library.supports_amx()


@pytest.mark.parametrize("has_function", [True, False])
def test_a_library_of_an_older_compiler_has_no_amx(has_function: bool, monkeypatch: pytest.MonkeyPatch):
    unload(monkeypatch)
    built = {"supports_avx512": lambda: 1, "supports_avx2": lambda: 1, "supports_generic": lambda: 0, "supports_amx": lambda: 1}
    built |= {"matmul_amx": lambda: 0} if has_function else {}
    monkeypatch.setattr(library, "load", lambda: (SimpleNamespace(**built), None))
    assert rlgf_native.matmul_unit() == ("AMX" if has_function else "AVX-512")


def test_a_product_without_avx512_is_refused(monkeypatch: pytest.MonkeyPatch):
    if "avx2" not in library.supported_variants():
        pytest.skip("needs a processor with AVX2")
    monkeypatch.setattr(library, "variant", lambda: "avx2")
    with pytest.raises(RuntimeError, match=r"'matmul' has no variant 'avx2': check `has_matmul\(\)`"):
        rlgf_native.matmul(torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.parametrize(("supported", "reason"), [
    (("avx2",), None), ((), "this processor has neither AVX-512 nor AVX2 with FMA, which the C kernels need"),
])  # fmt: skip
def test_a_processor_without_vectors_is_said(supported: tuple[str, ...], reason: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "load", lambda: (ctypes.CDLL(None), None))
    monkeypatch.setattr(library, "supported_variants", lambda: supported)
    assert rlgf_native.unavailable_reason() == reason
    assert (rlgf_native.describe() == "nothing") is (reason is not None)


def unload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library be loaded again."""
    for name in ("load", "supported_variants", "supports_amx", "find_function"):
        monkeypatch.setattr(library, name, getattr(library, name).__wrapped__)


def test_macos_is_refused(monkeypatch: pytest.MonkeyPatch):
    unload(monkeypatch)
    monkeypatch.setattr("sys.platform", "darwin")
    assert "do not support macOS" in rlgf_native.unavailable_reason()


@pytest.mark.parametrize(("content", "reason"), [(None, "is missing"), (b"half of it", "cannot be loaded")])
def test_a_library_that_cannot_be_loaded_is_said(
    content: bytes | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    unload(monkeypatch)
    monkeypatch.setattr(library, "PATH", tmp_path / "libkernels.so")
    if content is not None:
        library.PATH.write_bytes(content)
    assert reason in rlgf_native.unavailable_reason()
    assert "pip install ./native" in rlgf_native.unavailable_reason()
    assert not rlgf_native.has_matmul()
    with pytest.raises(RuntimeError, match=f"'gelu' cannot be used: .* {reason}"):
        rlgf_native.gelu(torch.zeros(2, 16))


def instructions() -> dict[str, str]:
    """The instructions of each function of the built library; of equal names, those of the last."""
    if shutil.which("objdump") is None or rlgf_native.unavailable_reason() is not None:
        pytest.skip("needs objdump, and a library that was built")
    told = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library.PATH], check=True, capture_output=True, text=True)
    blocks = [block.partition(">:\n") for block in told.stdout.split("\n\n") if ">:\n" in block]
    return {head.partition("<")[2]: body for head, _, body in blocks}


def test_vectors_are_in_functions_for_checked_processors_alone():
    functions = instructions()
    checks = [body for name, body in functions.items() if name.startswith("supports_")]
    assert len(checks) == 4
    assert not any("ymm" in body or "zmm" in body for body in checks)
    avx2 = {name: body for name, body in functions.items() if "_avx2" in name}
    assert not any("zmm" in body for body in avx2.values())
    if flags_of_this_processor():
        assert "ymm" in avx2["gelu_avx2._omp_fn.0"] or "omp" not in "".join(avx2)  # other compilers name it otherwise
        assert any("zmm" in body for name, body in functions.items() if "_avx512" in name)
    tiles = {name for name, body in functions.items() if "tdpbf16ps" in body or "ldtilecfg" in body}
    assert not any("_avx" in name or name.startswith("supports_") for name in tiles)


def test_the_kernels_know_nothing_of_rlgf():
    files = [path for path in SOURCES.glob("src/**/*.py") if "build" not in path.parts]
    assert files
    for path in files:
        for node in ast.walk(parsed(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "rlgf"]
