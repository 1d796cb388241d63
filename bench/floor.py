"""Lower bounds of an iteration's time: operations and bytes by stage, at measured rates.

    make bench-floor             # or: python -m bench.floor --workload S

One iteration runs with torch's operations alone, under a dispatch mode that records each of them.
Matmuls are recorded with their shapes, strides and counts (attention over whole rows, although the
C kernel skips padding and later tokens). Each is then repeated alone on random numbers, by torch
and by the C kernel if there is one: the shortest time is the lower bound of matmuls of these
shapes. The number of multiplications over the rate of a large matmul is the lower bound of any
implementation. Of all other operations the bytes read and written are counted, and divided by the
bandwidth of adding two tensors of an activation's size. The timed iterations run without the mode.
"""

import argparse
import datetime
import math
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.iteration import ROOT, keep, processor
from bench.worker import machine
from bench.worker_rlgf import build, set_up
from bench.workload import WORKLOADS
from rlgf.kernels import dispatch, linear, native
from rlgf.trainer import Trainer

STAGES = ("rollout", "experience", "update")
FREE = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "select", "slice", "as_strided", "unsqueeze", "squeeze",
    "detach", "alias", "split", "unbind", "empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense",
    "diagonal", "lift_fresh", "is_same_size", "new_empty_strided", "unfold",
}  # fmt: skip
Product = tuple[Any, tuple[Any, ...]]  # the operation, and its arguments with tensors as their layouts
Layout = tuple[str, tuple[int, ...], tuple[int, ...], torch.dtype]


def rows_and_columns(x: Tensor, y: Tensor) -> int:
    """Return the multiplications and additions of x times y."""
    return 2 * x.numel() * y.shape[-1]


PRODUCTS: dict[str, Callable[..., int]] = {
    "mm": rows_and_columns,
    "bmm": rows_and_columns,
    "addmm": lambda bias, x, y, **_: rows_and_columns(x, y),
    "baddbmm": lambda bias, x, y, **_: rows_and_columns(x, y),
    "_linear_pointwise": lambda x, weight, *_: 2 * x.numel() * weight.shape[0],
    "_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *_, **__: 4 * q.numel() * k.shape[2],
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda gradient, q, k, *_, **__: 10 * q.numel() * k.shape[2],
}
TAKEN = {"embedding", "index_select", "gather", "index"}  # these read only the elements that they return
PLACED = {"scatter_add_", "scatter_", "index_put_", "index_copy_", "index_add_"}  # and these only those that they write
WRITTEN = {"fill_", "zero_", "zeros", "zeros_like", "new_zeros", "copy_"}  # these do not read the old content


class Ledger(TorchDispatchMode):
    """A dispatch mode that counts matmuls by layout, and the bytes of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()
        self.operations: dict[Product, int] = {}
        self.bytes = self.product_bytes = self.calls = 0

    def total(self) -> int:
        """Return the multiplications and additions of all matmuls."""
        return sum(count * self.operations[product] for product, count in self.products.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record it."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls += name not in FREE
        if name in PRODUCTS:
            key = (func, (*map(layout, args), *((name, layout(value)) for name, value in (kwargs or {}).items())))
            self.products[key] += 1
            self.operations[key] = PRODUCTS[name](*args, **(kwargs or {}))
        if name not in FREE:
            passed = bytes_passed(name, list(tensors((*args, *(kwargs or {}).values()))), list(tensors(result)))
            if name in PRODUCTS:
                self.product_bytes += passed
            else:
                self.bytes += passed
        return result


def bytes_passed(name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> int:
    """Return the bytes that an operation reads and writes."""
    if name in TAKEN:
        return 2 * size(made)
    if name in PLACED:
        return size(given[1:]) + 2 * size(given[-1:])
    if name in WRITTEN:
        return size(given[1:]) + size(made)
    return size(given) + size(made)


def size(values: Sequence[Tensor]) -> int:
    """Return the bytes of tensors; expanded dimensions count once."""
    return sum(math.prod(n for n, by in zip(t.shape, t.stride()) if by) * t.element_size() for t in values)


def tensors(values: Any) -> Iterator[Tensor]:
    """Return the tensors among values, including those in lists."""
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(value)


def layout(value: Any) -> Any:
    """Return a description from which `made_again` makes an argument of the same layout."""
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.stride(), value.dtype)
    return tuple(value) if isinstance(value, list) else value


def made_again(value: Any) -> Any:
    """Return an argument with the described layout and random numbers."""
    if isinstance(value, tuple) and value and value[0] == "tensor":
        _, shape, stride, dtype = value
        return torch.empty_strided(shape, stride, dtype=dtype).normal_() if math.prod(shape) else torch.empty(shape)
    return list(value) if isinstance(value, tuple) else value


def best(call: Callable[[], Any], least_seconds: float = 0.02) -> float:
    """Return the shortest time of repeated calls, at least three, in seconds."""
    seconds: list[float] = []
    while sum(seconds) < least_seconds or len(seconds) < 3:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def alone(product: Product) -> float:
    """Return the shortest time of a matmul alone, in seconds."""
    func, arguments = product
    named = [a for a in arguments if isinstance(a, tuple) and len(a) == 2 and isinstance(a[0], str) and a[0] != "tensor"]
    plain = [made_again(a) for a in arguments if a not in named]
    options = {name: made_again(value) for name, value in named}
    with torch.no_grad():
        seconds = best(lambda: func(*plain, **options))
        laid = all(isinstance(x, Tensor) and x.numel() and 1 in x.stride() for x in plain[-2:])
        fits = laid and native.has_matmul() and plain[-1].dtype == torch.float32
        if func.overloadpacket.__name__ in ("mm", "addmm") and fits:
            seconds = min(seconds, best(lambda: native.library().matmul(plain[-2], plain[-1])))
    return seconds


def rates(dtype: torch.dtype) -> dict[str, float]:
    """Measure GFLOP/s of a large matmul, and GB/s of additions in cache and memory."""
    width = 2048
    x, y = torch.randn(width, width).to(dtype), torch.randn(width, width).to(dtype)
    found = {"gflops": 2 * width**3 / best(lambda: linear.linear(x, y), 0.5) / 1e9}
    for name, megabytes in (("gbs_cache", 4), ("gbs_memory", 128)):
        a, b, c = (torch.randn(megabytes * 250_000) for _ in range(3))
        found[name] = 3 * megabytes / 1e3 / best(lambda a=a, b=b, c=c: torch.add(a, b, out=c), 0.3)
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time iterations, count one, and repeat its matmuls alone."""
    workload, folder = WORKLOADS[arguments.workload], arguments.work.resolve() / arguments.workload
    subprocess.run([sys.executable, "-m", "bench.workload", workload.name, str(folder)], cwd=ROOT, check=True)
    load_before = os.getloadavg()
    trainer = build(workload, folder, arguments.rounds + 2, arguments.precision, arguments.critic)
    trainer.step(0)
    steps = [trainer.step(1 + number)[0] for number in range(arguments.rounds)]
    measured = {stage: statistics.median([step[f"seconds_{stage}"] for step in steps]) for stage in STAGES}
    ledgers = counted(trainer, arguments.rounds + 1)
    machine_rates = rates(torch.bfloat16 if arguments.precision == "bf16" else torch.float32)
    seconds = {product: alone(product) for product in {p for ledger in ledgers.values() for p in ledger.products}}
    stages = {stage: floor(ledgers[stage], seconds, machine_rates, measured[stage]) for stage in STAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_before": load_before}
        | machine("rlgf", "torch", "transformers"),
        "workload": workload.name,
        "precision": arguments.precision,
        "critic": arguments.critic,
        "rounds": arguments.rounds,
        "rates": machine_rates,
        "stages": stages,
        "whole": {key: sum(stage[key] for stage in stages.values()) for key in stages["rollout"]},
    }


def counted(trainer: Trainer, iteration: int) -> dict[str, Ledger]:
    """Record the operations of each stage of an iteration."""
    ledgers = {stage: Ledger() for stage in STAGES}
    dispatch.select("torch", ["concurrency"])  # a ledger sees its own thread
    with ledgers["rollout"]:
        rollout = trainer.collect_rollout(iteration)
    with ledgers["experience"]:
        experience = trainer.make_experience(rollout, iteration)
    with ledgers["update"]:
        trainer.update(experience, iteration)
    dispatch.select("auto")
    return ledgers


def floor(
    ledger: Ledger, seconds: Mapping[Product, float], machine_rates: Mapping[str, float], measured: float
) -> dict[str, float]:
    """Return the figures of a stage."""
    operations = ledger.total()
    return {
        "gflop": operations / 1e9,
        "gigabytes_of_the_rest": ledger.bytes / 1e9,
        "operations_called": ledger.calls,
        "seconds_at_peak": operations / 1e9 / machine_rates["gflops"],
        "seconds_of_products_alone": sum(count * seconds[product] for product, count in ledger.products.items()),
        "seconds_of_the_rest_in_cache": ledger.bytes / 1e9 / machine_rates["gbs_cache"],
        "seconds_of_the_rest_in_memory": ledger.bytes / 1e9 / machine_rates["gbs_memory"],
        "seconds": measured,
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the result as a table."""
    found = result["rates"]
    lines = [
        f"{result['workload']}, {result['precision']}, critic {result['critic']}: this machine does "
        f"{found['gflops']:.0f} GFLOP/s and moves {found['gbs_cache']:.0f} GB/s cached, {found['gbs_memory']:.0f} in memory.",
        f"{'':<10}{'GFLOP':>8}{'at peak':>9}{'products':>10}{'the rest':>22}{'measured':>10}{'reached':>9}",
    ]
    for name, row in [*result["stages"].items(), ("whole", result["whole"])]:
        rest = f"{row['gigabytes_of_the_rest']:.1f} GB {row['seconds_of_the_rest_in_cache']:.2f}"
        rest += f"-{row['seconds_of_the_rest_in_memory']:.2f} s"
        peak, alone_, seconds = row["seconds_at_peak"], row["seconds_of_products_alone"], row["seconds"]
        lines.append(
            f"{name:<10}{row['gflop']:>8.0f}{peak:>7.2f} s{alone_:>8.2f} s{rest:>22}{seconds:>8.2f} s{peak / seconds:>9.0%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="S")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--critic", choices=("separate", "value_head"), default="separate")
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-iteration", help="model and prompts")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "floor.json")
    arguments = parser.parse_args()
    set_up(arguments.threads)
    result = measure(arguments)
    keep(result, arguments.out)
    print(table(result))


if __name__ == "__main__":
    main()
