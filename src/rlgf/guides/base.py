"""The guide protocol: a black box that completes prompts.

A guide may also be able to continue a prefix, and may use the policy's tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from rlgf.errors import GuideError, TrainingError, user_code
from rlgf.types import Prompt
from rlgf.untrusted_text import show_value


@dataclass(frozen=True)
class Capabilities:
    """The capabilities of a guide.

    Only a guide that can continue a prefix may finish what the policy began (AggreVaTeD).

    Example:
        >>> rlgf.Capabilities(can_continue=True)
        Capabilities(can_continue=True, exact_length=False, takes_token_ids=False)
    """

    can_continue: bool  # true if it can continue a prefix
    exact_length: bool = False  # true if it respects min_new_tokens and max_new_tokens
    takes_token_ids: bool = False  # true if it continues prefix_ids, not the prefix as text


@dataclass(frozen=True)
class CompletionRequest:
    """A request for a completion of a prompt and a prefix, which may be empty.

    The library makes requests; a guide reads those fields that it needs. Lengths are in tokens of
    the policy.

    Example:
        >>> film = rlgf.Prompt("The film")
        >>> request = rlgf.CompletionRequest(film, [], " was", [], 8, 0, index=0, seed=0)
        >>> request.prompt.text + request.prefix, request.max_new_tokens
        ('The film was', 8)
    """

    prompt: Prompt
    prompt_ids: Sequence[int]
    prefix: str  # the completion so far, as text
    prefix_ids: Sequence[int]  # the prefix in the policy's tokens
    max_new_tokens: int  # in policy tokens, after the prefix
    min_new_tokens: int  # in policy tokens, after the prefix; no EOS token before
    index: int  # the global trajectory index
    seed: int


@dataclass(frozen=True)
class Completion:
    """A guide's completion, after the prefix.

    `finished` is false if it was truncated at max_new_tokens. `ids` are the policy's tokens, EOS
    token included, of a guide that uses them; `text` is then ignored.

    Example:
        >>> rlgf.Completion(" was superb.", finished=True).text
        ' was superb.'
    """

    text: str
    finished: bool
    ids: Sequence[int] | None = None
    failed: bool = False  # no completion; the policy continues (guide.on_failure=policy)
    refused: bool = False  # of a failed one: the server refused this question
    dropped: bool = False  # of a failed one: its row is left out (guide.on_refusal=drop)


class Guide(Protocol):
    """The interface of all guides.

    Example:
        >>> class Admirer:
        ...     capabilities = rlgf.Capabilities(can_continue=True)
        ...
        ...     def complete(self, requests):
        ...         return [rlgf.Completion(" superb.", finished=True) for request in requests]
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> components = replace(rlgf.prepare(config, Path("runs/stages")), guide=Admirer())
        >>> rlgf.Trainer(components).collect_rollout(0).guide_completions[0]
        ' superb.'
    """

    @property
    def capabilities(self) -> Capabilities:
        """Return the capabilities of the guide."""
        ...

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """Return one completion for each request.

        Args:
            requests: prompts with their prefixes, in an order of no meaning.

        Returns:
            The completions, in the order of the requests.

        Raises:
            Exception: anything; it becomes a `GuideError`, which ends the run with a checkpoint.
        """
        ...


@runtime_checkable
class TracksUsage(Protocol):
    """A guide that counts requests, responses and cost."""

    def pop_metrics(self) -> dict[str, float]:
        """Return the metrics since the last call and reset them."""
        ...

    def state(self) -> dict[str, float]:
        """Return the usage of the whole run, which is saved in its folder."""
        ...

    def load_state(self, state: Mapping[str, float]) -> None:
        """Add the usage of an earlier part of the run, once: later calls are ignored."""
        ...


def open_reply(prompt: Prompt, prefix: str, text: str) -> str:
    """Prepend the template's reply prefix to a chat reply."""
    return prompt.reply_prefix[len(prefix) :] + text if prompt.reply_prefix.startswith(prefix) else text


def query_guide(guide: Guide, requests: Sequence[CompletionRequest]) -> list[Completion]:
    """Query a guide and check that it returns one usable completion for each request.

    It gets a list and tuples of its own, so that one that changes them changes nothing else. Every
    failure raises `TrainingError`.
    """
    if not requests:
        return []
    columns = requests[0].prompt.columns
    with user_code(f"the guide failed on {len(requests)} requests", GuideError, TrainingError, columns):
        own = [replace(asked, prompt_ids=tuple(asked.prompt_ids), prefix_ids=tuple(asked.prefix_ids)) for asked in requests]
        completions: Any = guide.complete(own)
    if not isinstance(completions, list) or len(completions) != len(requests):
        found = len(completions) if isinstance(completions, list) else type(completions).__name__
        raise GuideError(
            f"the guide returned {found} completions for {len(requests)} requests: it must return a list with one for each."
        )
    return [_checked_completion(completion, request) for completion, request in zip(completions, requests)]


def _checked_completion(completion: Any, request: CompletionRequest) -> Completion:
    """Convert a completion's ids to integers; raise `GuideError` if it is unusable."""
    about = f"for the prompt {show_value(request.prompt.text)}"
    flags = [getattr(completion, name, None) for name in ("finished", "failed")]
    valid = isinstance(completion, Completion) and isinstance(completion.text, str)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not valid or not all(type(flag).__name__ in ("bool", "bool_") for flag in flags):
        raise GuideError(
            f"the guide returned {show_value(completion)} {about}: it must return a string or a `Completion`, whose text is a "
            "string and whose finished and failed are true or false."
        )
    ids = None if completion.ids is None else _checked_ids(completion.ids, about)
    completion = replace(completion, ids=ids, finished=bool(completion.finished), failed=bool(completion.failed))
    if not completion.failed and not completion.finished and not (completion.text if ids is None else ids):
        raise GuideError(
            f"the guide generated nothing {about} and reports it as unfinished: a guide with nothing to add returns "
            "finished=True."
        )
    return completion


def _checked_ids(ids: Any, about: str) -> tuple[int, ...]:
    """Convert token ids, also of a tensor or an array, to integers."""
    with user_code("the ids of a guide's completion cannot be read", GuideError):
        listed: Any = ids.tolist() if hasattr(ids, "tolist") else ids
        is_list = isinstance(listed, Sequence) and not isinstance(listed, str | bytes)
        found: list[Any] = list(listed) if is_list else [None]
        if not all(type(token) is int for token in found):
            found = list(map(_token, found))
    if any(token is None or token < 0 for token in found):
        raise GuideError(
            f"the guide returned the ids {show_value(ids)} {about}: they must be a flat list of token ids of the policy, whole "
            "numbers from 0."
        )
    return tuple(found)


def _token(token: Any) -> int | None:
    """Convert a token id to an integer; return None for anything else."""
    token = token.item() if getattr(token, "ndim", None) == 0 and hasattr(token, "item") else token
    return token if isinstance(token, int) and not isinstance(token, bool) else None
