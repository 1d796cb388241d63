"""The description of the processor, and the library chosen for it."""

from types import SimpleNamespace

import pytest

from rlgf.kernels import native, processor


@pytest.mark.parametrize(("told", "wide"), [
    ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nflags\t: avx512f\n", False),
    ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t: avx512f\n", True),
    ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t: avx2\n", False),
    ("vendor_id\t: GenuineIntel\ncpu family\t: 26\nflags\t: avx512f\n", False),
    ("CPU part\t: 0xd40\n", False),
])  # fmt: skip
def test_a_processor_with_units_of_the_whole_width_is_known(told: str, wide: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processor, "processor", lambda: told)
    assert processor.has_full_width_avx512.__wrapped__() is wide


@pytest.mark.parametrize(("unit", "wide", "used"), [
    ("AMX", False, True), ("AVX-512", True, True), ("AVX-512", False, False), (None, True, False),
])  # fmt: skip
def test_products_in_c_are_for_amx_and_for_the_whole_width_of_avx512(
    unit: str | None, wide: bool, used: bool, monkeypatch: pytest.MonkeyPatch
):
    library = SimpleNamespace(
        matmul_unit=lambda: unit, has_matmul=lambda: unit is not None, describe=lambda: f"products on {unit}"
    )
    monkeypatch.setattr(native, "unavailable_reason", lambda: None)
    monkeypatch.setattr(native, "library", lambda: library)
    monkeypatch.setattr(native, "has_full_width_avx512", lambda: wide)
    assert native.has_matmul() is used
    assert ("unused" in native.describe()) is (unit == "AVX-512" and not used)
    monkeypatch.setattr(native, "_enabled", False)
    assert not native.has_matmul()
