"""The inputs that a model evaluates correctly, found by trials on random tokens.

Plain decoders are known by their classes. Any other model is evaluated on single rows, and on the
same rows packed, padded or of equal length: the first that gives the same numbers is used.
"""

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlgf.errors import REFUSED_INPUTS, ConfigError, raise_if_out_of_memory
from rlgf.models import padding_free
from rlgf.models.configs import first_position, max_length, model_type, text_config, vocabulary_size
from rlgf.models.forward import (
    InputFormat,
    backbone_states,
    input_format,
    is_encoder_decoder,
    micro_batch,
    pad_rows,
    token_logits,
)  # fmt: skip
from rlgf.models.language_model import Backbone

LENGTHS = (5, 14, 9)  # tokens of the rows that are evaluated together
MAX_ERROR = 1e-3  # of the numbers' spread: two of the same model differ by rounding, about 1e-6
ROUNDING = 3e-5  # of the spread: a form that differs by more is used if no other differs by less
MAX_MEAN_ERROR = 0.05  # the same on average, of weights in 4 bits or half precision
EARLIEST = 3  # ids below are often special tokens

_known: dict[tuple[Any, ...], InputFormat | str] = {}


def probe_input_format(model: Any) -> Any:
    """Find the format of a model's inputs and return the model, which keeps it.

    Raises ConfigError if the model is not causal, or cannot be evaluated.
    """
    if is_plain(model):
        return model
    key = identity(model)
    found = _known.get(key) or _known.setdefault(key, _probe(model))
    if isinstance(found, str):
        raise ConfigError(found)
    set_input_format(model, found)
    return model


def set_input_format(model: Any, found: InputFormat) -> None:
    """Attach a format to a model and its backbone."""
    if padding_free.is_enabled(model) and found.rows != "packed":
        padding_free.disable(model)
    for module in {id(part): part for part in (model, getattr(model, "base_model", model))}.values():
        module._rlgf_input_format = found


def is_plain(model: Any) -> bool:
    """Return whether packed rows and our cache are known to fit a model.

    It attends through transformers' interface, takes positions, and all that it keeps of earlier
    tokens are keys and values of every layer.
    """
    if not padding_free.supports(model) or is_encoder_decoder(model) or first_position(model.config):
        return False
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    layers = DynamicCache(config=model.config).layers
    only_keys = all(type(layer) is DynamicLayer for layer in layers)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return only_keys and not _mixes(model) and not _masks_itself(model) and (head is None or isinstance(head, nn.Linear))


def _mixes(model: Any) -> bool:
    """Return whether a model has convolutions, recurrences or mixtures of experts."""
    special = ("expert", "router", "moe")
    return any(
        isinstance(module, nn.Conv1d | nn.RNNBase) or any(word in type(module).__name__.lower() for word in special)
        for module in model.modules()
    )


def _masks_itself(model: Any) -> bool:
    """Return whether an attention layer of a model makes masks of its own."""
    kinds = {type(module) for module in model.modules() if type(module).__name__.endswith("Attention")}
    return any("mask" in name for kind in kinds for name in dir(kind))


def identity(model: Any) -> tuple[Any, ...]:
    """Return everything that the format depends on: class, config, device and precision."""
    named = {name: value for name, value in model.config.to_dict().items() if name not in ("_name_or_path", "architectures")}
    parameter = next(model.parameters())
    return (
        type(model), repr(sorted(named.items(), key=lambda item: item[0])), model.config._attn_implementation,
        str(parameter.device), parameter.dtype, bool(getattr(model, "is_quantized", False)),
    )  # fmt: skip


def probe_rows(model: Any, lengths: Sequence[int], seed: int = 0, with_padding: bool = False) -> list[list[int]]:
    """Return rows of random ids, none of which has a meaning of its own."""
    config = text_config(model.config)
    size = vocabulary_size(model.config, model)
    special = {
        value
        for source in (model.config, config)
        for name, value in vars(source).items()
        if name.endswith("token_id") and isinstance(value, int)
    }
    usable = [id for id in range(min(EARLIEST, size - 1), min(size, 5_000)) if id not in special] or list(range(size))
    generator = torch.Generator().manual_seed(seed)
    rows = [[usable[int(place)] for place in torch.randint(len(usable), (length,), generator=generator)] for length in lengths]
    padding = getattr(config, "pad_token_id", None)
    if with_padding and padding is not None and 0 <= padding < size:
        for row in rows:
            row[len(row) // 3] = padding
    return rows


def probe_lengths(model: Any) -> list[int]:
    """Return lengths of rows that fit the model."""
    return [max(1, min(length, max_length(model.config) - 4)) for length in LENGTHS]


def agree(model: Any, first: Sequence[Tensor], second: Sequence[Tensor], max_error: float = MAX_ERROR) -> bool:
    """Return whether two evaluations of the same rows differ by rounding only."""
    exact = next(model.parameters()).dtype == torch.float32 and not getattr(model, "is_quantized", False)
    for one, other in zip(first, second, strict=True):
        if one.shape != other.shape:
            return False
        spread = float(one.std().clamp(1e-2, 1.0))
        apart = (one - other).abs()
        error, bound = (apart.max(), max_error) if exact else (apart.mean(), MAX_MEAN_ERROR)
        if not float(error) <= bound * spread:  # nan is no agreement
            return False
    return True


def evaluate_rows(model: Any, rows: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
    """Return log-probabilities (or states, without a head) at each token of rows, in one batch.

    They are float [tokens, vocabulary or width], given the token and all before it; of an
    encoder–decoder given all before it.
    """
    before = [[]] * len(rows) if sources is None else sources
    ids = pad_rows([[*source, *row, 0] for source, row in zip(before, rows)])
    starts = torch.tensor([len(source) if sources is not None else 1 for source in before])
    columns, lengths = torch.arange(ids.shape[1]), torch.tensor([len(row) for row in rows])
    selected = (columns >= starts[:, None]) & (columns < starts[:, None] + lengths[:, None])
    batch = micro_batch(model, torch.arange(len(rows)), ids, starts, selected)
    has_head = getattr(model, "get_output_embeddings", lambda: None)() is not None
    with torch.no_grad():
        if has_head:
            found = token_logits(Backbone(model), batch)[0].log_softmax(1)
        else:
            found = backbone_states(Backbone(model), batch).float()
    return list(found.cpu().split(lengths.tolist()))


def _probe(model: Any) -> InputFormat | str:
    """Return the format of a model's inputs, or the reason that there is none."""
    packs, was_training = padding_free.is_enabled(model), model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _choose(model, packs)
    except ConfigError as error:
        return str(error)
    finally:
        model.train(was_training)
        if packs and not padding_free.is_enabled(model):
            model.set_attn_implementation(padding_free.ATTENTION_NAME)


def _choose(model: Any, packs: bool) -> InputFormat:
    parameters = inspect.signature(model.forward).parameters
    takes_cache = "use_cache" in parameters or any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    position = first_position(model.config) if "position_ids" in parameters else 0
    plain = InputFormat("padded", position, takes_use_cache=takes_cache)
    lengths = probe_lengths(model)
    rows = probe_rows(model, lengths, with_padding=True)
    sources = probe_rows(model, [max(1, length - 2) for length in lengths[::-1]], 1) if is_encoder_decoder(model) else None
    set_input_format(model, plain)
    plain = _head_format(model, plain, rows, sources)
    set_input_format(model, plain)
    if _depends_on_padding(model, plain, rows, sources):
        plain = replace(plain, as_embeddings=True)
    alone = _evaluate_alone(model, rows, sources)
    if not all(bool(values.isfinite().all()) for values in alone):  # nothing can be compared
        return replace(plain, rows="packed" if packs else "padded")
    half = [row[: (len(row) + 1) // 2] for row in rows]
    if not agree(model, [part[: len(row)] for part, row in zip(alone, half)], _evaluate_alone(model, half, sources)):
        raise ConfigError(
            f"a model of type '{model_type(model)}' is not causal as it is configured (a token's probability depends on the "
            "tokens after it): choose a causal model (docs/models.md)."
        )
    usable: list[InputFormat] = []
    for kind in ("packed", "padded") if packs else ("padded",):
        form = replace(plain, rows=kind)
        found = _evaluate_in_form(model, form, rows, sources)
        if found is None or not agree(model, alone, found):
            continue
        if agree(model, alone, found, ROUNDING):
            return form
        usable.append(form)
    if usable:  # an attention that leaves out a small term of the model's own agrees, but not so well
        return usable[0]
    size, read = min(map(len, rows)), min(map(len, sources)) if sources else 0
    same, same_sources = [row[:size] for row in rows], [source[:read] for source in sources] if sources else None
    set_input_format(model, replace(plain, rows="equal"))
    alone = _evaluate_alone(model, same, same_sources)
    found = _evaluate_in_form(model, replace(plain, rows="equal"), same, same_sources)
    return replace(plain, rows="equal" if found is not None and agree(model, alone, found) else "single")


def _evaluate_in_form(
    model: Any, form: InputFormat, rows: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] | None
) -> list[Tensor] | None:
    """Return a model's outputs for rows in a form, or None if it rejects them."""
    set_input_format(model, form)
    if form.rows == "packed":
        model.set_attn_implementation(padding_free.ATTENTION_NAME)
    return _unless_refused(lambda: evaluate_rows(model, rows, sources))[0]


def _unless_refused(evaluate: Callable[[], list[Tensor]]) -> tuple[list[Tensor] | None, Exception | None]:
    """Return what a model gives, or the error with which it refuses its inputs."""
    try:
        return evaluate(), None
    except REFUSED_INPUTS as error:
        raise_if_out_of_memory(error)
        return None, error


def _head_format(model: Any, plain: InputFormat, rows: Any, sources: Any) -> InputFormat:
    """Return the format with which the head works on selected states, or else on all."""
    whole = replace(plain, restricts_head=False)
    selected, _ = _unless_refused(lambda: _evaluate_alone(model, rows[:1], sources))
    if selected is not None and getattr(model, "get_output_embeddings", lambda: None)() is None:
        return plain
    set_input_format(model, whole)
    complete, error = _unless_refused(lambda: _evaluate_alone(model, rows[:1], sources))
    if complete is None:
        if selected is not None:  # it returns no states, which only a value head needs
            return plain
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"a model of type '{model_type(model)}' cannot be evaluated on token ids alone ({reason[:160]}): choose another "
            "model (docs/models.md)."
        ) from None
    return plain if selected is not None and agree(model, selected, complete) else whole


def _depends_on_padding(model: Any, plain: InputFormat, rows: Any, sources: Any) -> bool:
    """Return whether the ids of padding change the positions of other tokens.

    Then embeddings are the inputs, if they give the same numbers for rows without padding.
    """
    if plain.first_position:
        return False
    without = probe_rows(model, [len(row) for row in rows])
    by_ids = [_evaluate_alone(model, part, sources) for part in (rows, without)]
    set_input_format(model, replace(plain, as_embeddings=True))
    padded, _ = _unless_refused(lambda: _evaluate_alone(model, rows, sources))
    bare, _ = _unless_refused(lambda: _evaluate_alone(model, without, sources))
    if padded is None or bare is None:  # it does not take embeddings
        set_input_format(model, plain)
        return False
    found = agree(model, by_ids[1], bare) and not agree(model, by_ids[0], padded)
    set_input_format(model, replace(plain, as_embeddings=found))
    return found


def _evaluate_alone(model: Any, rows: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] | None) -> list[Tensor]:
    return [evaluate_rows(model, [row], None if sources is None else [sources[place]])[0] for place, row in enumerate(rows)]


def describe_inputs(model: Any) -> str:
    """Describe how a model's rows are evaluated in training."""
    kind = input_format(model).rows
    return {
        "packed": "packed rows without padding", "padded": "padded rows", "equal": "rows of equal length",
        "single": "one row at a time",
    }[kind]  # fmt: skip
