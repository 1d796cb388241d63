"""Language models and critics on Hugging Face causal models, and the one forward pass that scoring and training use.

Rows are padded on the right, so causal attention needs no mask and a padded row gets what an unpadded one gets.
"""

import copy
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
)
from transformers.activations import NewGELUActivation

from rlgf import packing
from rlgf.config import ModelConfig
from rlgf.errors import UserError


@dataclass(frozen=True)
class LanguageModel:
    """A causal model with its tokenizer and what follows from both."""

    model: Any  # a PreTrainedModel with a language-model head
    tokenizer: Any
    end_ids: tuple[int, ...]
    context: int  # tokens of prompt and response together
    vocabulary: int

    @property
    def end_id(self) -> int:
        """The end token that is appended to targets and finished guide texts."""
        return self.end_ids[0]

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.device

    def frozen(self) -> "LanguageModel":
        """A copy that will not be trained."""
        twin = copy.deepcopy(self.model).requires_grad_(False).eval()
        return LanguageModel(twin, self.tokenizer, self.end_ids, self.context, self.vocabulary)

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as `from_pretrained` reads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a Hub name or folder."""
    return _from_pretrained(AutoTokenizer, path, "tokenizer")


def context_length(path: str) -> int:
    """Tokens a model reads at once, from its config alone."""
    return _context(_from_pretrained(AutoConfig, path, "model config"))


def _context(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", 0) or 10**9)


def load_language_model(path: str, device: str = "cpu") -> LanguageModel:
    """A causal model from a Hub name or folder, in fp32; no remote code is run."""
    model = _from_pretrained(AutoModelForCausalLM, path, "causal language model", dtype=torch.float32)
    return bundle(model.to(device), load_tokenizer(path), path)


def bundle(model: Any, tokenizer: Any, name: str) -> LanguageModel:
    """Model and tokenizer with end tokens and context length worked out; raises where one is missing."""
    vocabulary = int(model.config.vocab_size)
    if len(tokenizer) > vocabulary:
        raise UserError(f"model '{name}' has {vocabulary} embeddings, but its tokenizer has {len(tokenizer)} tokens.")
    ends = _end_ids(tokenizer, model.generation_config, model.config, name)
    return LanguageModel(speed_up(model), tokenizer, ends, _context(model.config), vocabulary)


def load_end_ids(path: str, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens of a model, from its configs alone: what `load_language_model` will find."""
    config: Any = _from_pretrained(AutoConfig, path, "model config")
    try:
        generation: Any = GenerationConfig.from_pretrained(path)
    except OSError:  # none is saved with it
        generation = None
    return _end_ids(tokenizer, generation, config, path)


def _end_ids(tokenizer: Any, generation: Any, config: Any, name: str) -> tuple[int, ...]:
    ends: list[int] = []
    for configured in (tokenizer.eos_token_id, getattr(generation, "eos_token_id", None), config.eos_token_id):
        for end in configured if isinstance(configured, list) else [configured]:
            # GPT-2's default id exceeds a small vocabulary
            if end is not None and end < int(config.vocab_size) and end not in ends:
                ends.append(end)
    if not ends:
        raise UserError(
            f"model '{name}' has no end token: set eos_token in its tokenizer_config.json or eos_token_id in its config.json."
        )
    return tuple(ends)


def shape_config(shape: ModelConfig, vocabulary: int) -> Any:
    """The transformers config of a new model of this shape."""
    if shape.architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, n_positions=shape.context,
            initializer_range=shape.initial_std, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=vocabulary, num_hidden_layers=shape.layers, hidden_size=shape.width, intermediate_size=4 * shape.width,
        num_attention_heads=shape.heads, max_position_embeddings=shape.context, initializer_range=shape.initial_std,
        tie_word_embeddings=True,
    )  # fmt: skip


def new_language_model(shape: ModelConfig, tokenizer: Any, seed: int) -> LanguageModel:
    """A model with random weights of the given shape, a pure function of the seed."""
    config = shape_config(shape, len(tokenizer))
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config).eval()
    return bundle(model, tokenizer, "new model")


class TanhGELU(nn.Module):
    """GELU's tanh approximation by the logistic function, ½(1 + tanh u) = σ(2u), which costs a CPU a third of a tanh."""

    def forward(self, states: Tensor) -> Tensor:
        """The activation of `states`, any shape."""
        if states.device.type != "cpu":
            return nn.functional.gelu(states, approximate="tanh")
        result: Tensor = _TanhGELU.apply(states)
        return result


class _TanhGELU(torch.autograd.Function):
    """Keeps the derivative instead of the argument, so that the backward pass is one product."""

    SCALE, CUBE = 2 * (2 / math.pi) ** 0.5, 0.044715

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        square = states * states
        gate = torch.addcmul(states, square, states, value=_TanhGELU.CUBE).mul_(_TanhGELU.SCALE).sigmoid_()
        result = states * gate
        if ctx.needs_input_grad[0]:
            slope = square.mul_(3 * _TanhGELU.CUBE * _TanhGELU.SCALE).add_(_TanhGELU.SCALE).mul_(result)  # x σ · d(2u)/dx
            ctx.save_for_backward(slope.addcmul_(slope, gate, value=-1).add_(gate))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope


def speed_up(model: Any) -> Any:
    """Faster ways to the same numbers: GELU in one step instead of six, texts in a line instead of padded rows."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, TanhGELU())
    return packing.enable(model)


def _from_pretrained(auto: Any, path: str, kind: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # the Hub, the disk and the config parser fail in ways of their own; all mean the same
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"no {kind} can be loaded from '{path}' ({reason}): give a Hub name or a local folder.") from None


@contextmanager
def head_positions(model: Any, pick: Callable[[Tensor], Tensor]) -> Generator[list[Tensor]]:
    """Within it, the language-model head sees only the hidden states that `pick` takes, as `[1, states, width]`.

    So logits of positions that nobody asks for are never computed, for any model whatever it does behind its head.
    Yields a list that receives the hidden states picked, `[states, width]`, of each forward pass.
    """
    hidden: list[Tensor] = []

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden.append(pick(arguments[0]))
        return (hidden[-1].unsqueeze(0), *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield hidden
    finally:
        handle.remove()


def autocast(device: torch.device, precision: str) -> Any:
    """bf16 autocast where asked for; parameters stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def forward(
    language_model: LanguageModel, ids: Tensor, rows: Tensor, columns: Tensor, precision: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """Logits of the tokens at `(rows, columns)` given all before them, and the states before them.

    `ids` [texts, width] padded on the right; returns float [tokens, vocabulary] and [tokens, hidden]. A token in column 0 has
    nothing before it and must not be asked for; no token may be asked for twice.
    """
    model, device = language_model.model, language_model.device
    with (
        autocast(device, precision),
        reading(model, ids, rows, columns, device) as (inputs, pick),
        head_positions(model, pick) as hidden,
    ):
        logits = model(**inputs, use_cache=False).logits
    return logits.squeeze(0).float(), hidden[0]


def trunk_states(trunk: Any, ids: Tensor, rows: Tensor, columns: Tensor, precision: str, device: torch.device) -> Tensor:
    """The states before the tokens at `(rows, columns)` by a model without a head, [tokens, hidden]."""
    with autocast(device, precision), reading(trunk, ids, rows, columns, device) as (inputs, pick):
        return pick(trunk(**inputs, use_cache=False).last_hidden_state)


@contextmanager
def reading(
    model: Any, ids: Tensor, rows: Tensor, columns: Tensor, device: torch.device
) -> Generator[tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]]:
    """A model's inputs, and how to pick the states before the tokens at `(rows, columns)` from what it makes of them.

    A line without padding where the model can read one, otherwise rows padded on the right.
    """
    if packing.is_enabled(model):
        line = packing.line_up(ids, rows, columns, device)
        with packing.packed(line), packing.last_block_on(model, line.asked):
            yield {"input_ids": line.ids, "position_ids": line.positions}, lambda hidden: packing.take(hidden[0], line.asked)
    else:  # the last token conditions nothing
        places = (rows.to(device), columns.to(device) - 1)
        yield {"input_ids": ids[:, :-1].to(device)}, lambda hidden: hidden[places]


class Critic(nn.Module):
    """A value for every state: a linear head on the hidden states of a trunk.

    The trunk is a model of its own, or None where the hidden states are the policy's. The head starts at zero weight, so the
    first value of every state is `initial_value`.
    """

    def __init__(self, trunk: Any | None, width: int, initial_value: float) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, initial_value)

    def forward(self, ids: Tensor, rows: Tensor, columns: Tensor, precision: str, hidden: Tensor | None = None) -> Tensor:
        """Values [tokens] of the states before the tokens at `(rows, columns)`.

        `hidden` [tokens, width] are the policy's states there, where its trunk is shared.
        """
        if self.trunk is not None:
            hidden = trunk_states(self.trunk, ids, rows, columns, precision, self.head.weight.device)
        assert hidden is not None
        return self.head(hidden.float()).squeeze(-1)


def new_critic(kind: str, path: str, policy: LanguageModel, initial_value: float) -> Critic:
    """A critic for `policy`: 'separate', its trunk loaded from `path` (a reward model will do), or 'trunk', a head alone."""
    width = int(policy.model.get_output_embeddings().in_features)
    if kind == "trunk":
        return Critic(None, width, initial_value).to(policy.device)
    trunk = speed_up(_from_pretrained(AutoModel, path, "critic", dtype=torch.float32)).eval()
    if int(trunk.config.vocab_size) != policy.vocabulary:
        raise UserError(
            f"critic.path '{path}' has {trunk.config.vocab_size} embeddings and the policy {policy.vocabulary}: "
            "a critic reads the policy's tokens, so choose one with the same tokenizer."
        )
    return Critic(trunk, int(trunk.config.hidden_size), initial_value).to(policy.device)


FILL = 0.75  # rows share a micro-batch while the shortest has at least this share of the longest


def micro_batches(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Row numbers in groups of similar length, each group's padded size within the budget (or a single row)."""
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    groups: list[list[int]] = []
    for row in order:
        longest = int(lengths[groups[-1][0]]) if groups else 0
        if groups and (len(groups[-1]) + 1) * longest <= token_budget and int(lengths[row]) >= FILL * longest:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [torch.tensor(sorted(group)) for group in groups]


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> Tensor:
    """Rows of ids as one tensor, padded on the right."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *([fill] * (width - len(row)))] for row in rows], dtype=torch.int64).view(len(rows), width)


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def gather_tokens(
    language_model: LanguageModel,
    ids: Tensor,
    selected: Tensor,
    token_budget: int,
    precision: str,
    visit: Callable[[Tensor, Tensor, Tensor, Tensor], None],
) -> None:
    """Run `visit(rows, columns, logits, hidden)` over micro-batches of the rows that have a selected token, no gradient.

    `rows` and `columns` name the selected tokens in `ids`; each row is read only up to its last selected token. `hidden` is
    [tokens, width], the state before each of them.
    """
    with torch.no_grad():
        for rows, columns, batch, local_rows in selected_batches(ids, selected, token_budget):
            logits, hidden = forward(language_model, batch, local_rows, columns, precision)
            visit(rows, columns, logits, hidden)


def selected_batches(ids: Tensor, selected: Tensor, token_budget: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Micro-batches for the selected tokens of `ids`: their rows and columns, the ids to read, their rows within those."""
    needed = (torch.arange(1, ids.shape[1] + 1) * selected).amax(1) if ids.numel() else torch.zeros(0)
    wanted = needed.nonzero().squeeze(1)
    for group in micro_batches(needed[wanted], token_budget):
        members = wanted[group]
        width = int(needed[members].max())
        local_rows, columns = selected[members, :width].nonzero(as_tuple=True)
        yield members[local_rows], columns, ids[members, :width], local_rows
