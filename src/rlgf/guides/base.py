"""What a guide is: a black box that writes text. It may also finish what another began, and may speak the policy's tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rlgf.types import Prompt


@dataclass(frozen=True)
class Capabilities:
    """What a guide can be asked for."""

    can_finish: bool  # whether it can finish a prefix that another has written, or only write a text for a prompt
    exact_budget: bool = False  # whether it keeps to `minimum` and `budget` in policy tokens, so that lengths are known


@dataclass(frozen=True)
class Request:
    """One text to be written, or finished."""

    prompt: Prompt
    prompt_ids: Sequence[int]
    prefix: str  # what has been written of the response, as text
    prefix_ids: Sequence[int]  # the same in the policy's tokens
    budget: int  # policy tokens that may still be written
    minimum: int  # policy tokens before which the text must not end
    index: int  # the global trajectory index
    seed: int


@dataclass(frozen=True)
class Text:
    """What a guide wrote after the prefix. `finished`: the text is complete; otherwise it was cut off by the budget.

    `ids` are the policy's tokens, end token included, for a guide that writes them; then `text` is not read.
    """

    text: str
    finished: bool
    ids: Sequence[int] | None = None
    given_up: bool = False  # no text could be had, and the run shall go on without it (guide.on_failure=policy)


class Guide(Protocol):
    """Anything that writes."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        ...

    def complete(self, requests: Sequence[Request]) -> list[Text]:
        """One text for each request, in order."""
        ...


@runtime_checkable
class Accounted(Protocol):
    """A guide that counts what it is asked, answers and costs."""

    def take_counts(self) -> dict[str, float]:
        """Figures since the last call, as metrics."""
        ...

    def state(self) -> dict[str, float]:
        """What was spent over the whole run, kept in its folder."""
        ...

    def load_state(self, state: Mapping[str, float]) -> None:
        """Add what an earlier part of the run had spent; a second call changes nothing."""
        ...
