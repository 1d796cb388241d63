"""The supervised training loop.

It trains language models (raw text), SFT (targets), distillation (guide completions) and reward
models.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from rlgf.algorithms.schedules import learning_rate_factor
from rlgf.config.sections import TrainingConfig
from rlgf.errors import TrainingError
from rlgf.interrupts import Steps, deferred
from rlgf.models.forward import micro_batches, pad_rows, token_logits
from rlgf.models.language_model import LanguageModel
from rlgf.models.log_probs import token_log_probs
from rlgf.randomness import Purpose, permutation
from rlgf.supervised.examples import Example

T = TypeVar("T")


@dataclass
class _Position:
    """The position of a training: the steps taken, the examples to come, and their losses."""

    step: int = 0
    passes: int = 0
    order: list[int] = field(default_factory=list[int])  # of the examples left in the present pass
    losses: list[float] = field(default_factory=list[float])
    units: int = 0
    seconds: float = 0.0  # of earlier parts of the training


def planned_steps(config: TrainingConfig, examples: int) -> int:
    """Return the number of optimizer steps of a supervised stage."""
    return config.steps or math.ceil(config.epochs * examples / config.batch_size)


def fit(
    language_model: LanguageModel,
    examples: Sequence[Example],
    config: TrainingConfig,
    seed: int,
    token_budget: int,
    report: Callable[[str], None] = lambda line: None,
    store: Steps | None = None,
) -> dict[str, float]:
    """Train in place by maximum likelihood.

    The loss is the mean over the tokens of an optimizer step. Returns the metrics of
    `training_loop`, the loss in nats per token.
    """

    def backward(batch: Sequence[Example]) -> tuple[float, int]:
        loss = nll_backward(language_model, batch, 1.0, config.precision, token_budget)
        return loss, sum(len(example.ids) - example.start for example in batch)

    def show(example: Example) -> str:
        return language_model.tokenizer.decode(example.ids)

    return training_loop(
        language_model.model,
        language_model.trainable_parameters(),
        examples,
        config,
        seed,
        backward,
        report,
        "tokens",
        show,
        store,
    )


def training_loop(
    model: Any,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[T],
    config: TrainingConfig,
    seed: int,
    backward: Callable[[Sequence[T]], tuple[float, int]],
    report: Callable[[str], None],
    unit: str,
    show: Callable[[T], str],
    store: Steps | None = None,
) -> dict[str, float]:
    """Train `parameters` in shuffled passes over examples.

    `backward` adds a batch's gradient and returns its loss and its number of `unit`s; `show`
    returns an example as text, for errors. `store` has the state of an earlier part of the
    training, and captures that of this one; both parts end as one would, bit for bit. Returns the
    mean loss over the last tenth of the steps, the steps, the units trained and the seconds. Raises
    `TrainingError` if a loss or a gradient norm is not finite, before the weights are changed.
    """
    model.train()
    steps = planned_steps(config, len(examples))
    optimizer = torch.optim.AdamW(
        parameters, config.learning_rate, betas=(0.9, config.adam_beta2), eps=1e-8, weight_decay=config.weight_decay,
        fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(config.schedule, step, steps, config.warmup_steps)
    )
    at, began = _Position(), time.monotonic()

    def seconds() -> float:
        return at.seconds + time.monotonic() - began

    def state() -> dict[str, Any]:
        return {
            **asdict(at), "seconds": seconds(), "weights": [parameter.data for parameter in parameters],
            "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "generators": _generators(),
        }  # fmt: skip

    if store is not None:
        if (found := store.load()) is not None:
            at = _resume(found, parameters, optimizer, schedule)
            report(f"going on after step {at.step} of {steps}")
        store.capture = state
    for step in range(at.step, steps):
        with deferred(f"step {step + 1} of {steps}"):
            while len(at.order) < config.batch_size:
                at.order += permutation(seed, Purpose.SUPERVISED, at.passes, len(examples)).tolist()
                at.passes += 1
            batch, at.order = [examples[i] for i in at.order[: config.batch_size]], at.order[config.batch_size :]
            loss, count = backward(batch)
            at.losses.append(loss)
            at.units += count
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                name, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
                raise TrainingError(
                    f"supervised training, step {step + 1} of {steps}: the {name} is {value}, in a batch that begins with "
                    f"{show(batch[0])[:60]!r}: lower its learning_rate, or use warmup_steps; no weights were changed by it."
                )
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            at.step += 1
        if (step + 1) % max(1, steps // 20) == 0:
            recent = at.losses[-max(1, steps // 20) :]
            speed = at.units / seconds()
            left = (steps - step - 1) * seconds() / (step + 1)
            report(
                f"step {step + 1}/{steps} · loss {sum(recent) / len(recent):.3f} · {speed:,.0f} {unit}/s · {left:.0f} s left"
            )
    model.eval()
    last = at.losses[-max(1, steps // 10) :]
    return {"loss": sum(last) / max(1, len(last)), "steps": steps, unit: at.units, "seconds": seconds()}


def _generators() -> list[torch.Tensor]:
    """Return the states of torch's random generators, which dropout uses."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *devices]


def _resume(
    found: Mapping[str, Any], parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> _Position:  # fmt: skip
    """Load the state of a training that was stopped, and return its position."""
    for parameter, weight in zip(parameters, found["weights"], strict=True):
        parameter.data.copy_(weight)
    optimizer.load_state_dict(found["optimizer"])
    schedule.load_state_dict(found["schedule"])
    first, *devices = found["generators"]
    torch.set_rng_state(first)
    if devices and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(devices)
    return _Position(**{name: found[name] for name in _Position.__dataclass_fields__})


def nll_backward(
    language_model: LanguageModel, batch: Sequence[Example], coefficient: float, precision: str, token_budget: int
) -> float:
    """Add `coefficient` times the gradient of a batch's mean negative log-likelihood.

    The mean is over the batch's tokens. Returns the mean, without the coefficient.
    """
    ids = pad_rows([example.ids for example in batch])
    columns = torch.arange(ids.shape[1])
    starts = torch.tensor([max(1, example.start) for example in batch])
    lengths = torch.tensor([len(example.ids) for example in batch])
    selected = (columns >= starts[:, None]) & (columns < lengths[:, None])
    total = max(1, int(selected.sum()))
    loss_sum = 0.0
    for part in micro_batches(language_model.model, ids, starts, selected, token_budget):
        logits, _ = token_logits(language_model, part, precision)
        loss = -token_log_probs(logits, ids[part.token_index].to(logits.device), inplace_backward=True).sum() / total
        (coefficient * loss).backward()
        loss_sum += float(loss.detach())
    return loss_sum
