"""Guides: whoever helps the policy write. `ask` is the one door through which their answers come in."""

from collections.abc import Sequence
from typing import Any

from rlgf.errors import RunError
from rlgf.guides.base import Accounted, Capabilities, Guide, Request, Text
from rlgf.guides.local import FunctionGuide, ModelGuide, ReferenceGuide, TextModelGuide

__all__ = [
    "Accounted", "Capabilities", "FunctionGuide", "Guide", "ModelGuide", "ReferenceGuide", "Request", "Text",
    "TextModelGuide", "ask",
]  # fmt: skip


def ask(guide: Guide, requests: Sequence[Request]) -> list[Text]:
    """Ask a guide and refuse what is not one usable text for each request; every failure is a `RunError`."""
    if not requests:
        return []
    try:
        answers: Any = guide.complete(requests)
    except RunError:
        raise
    except Exception as error:
        raise RunError(
            f"the guide failed on {len(requests)} requests ({type(error).__name__}: {error}): mend it and run again."
        ) from error
    if not isinstance(answers, list) or len(answers) != len(requests):
        found = len(answers) if isinstance(answers, list) else type(answers).__name__
        raise RunError(f"the guide gave {found} texts for {len(requests)} requests: it must give a list with one each.")
    for answer, request in zip(answers, requests):
        good = isinstance(answer, Text) and isinstance(answer.text, str)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not good or any(not isinstance(token, int) for token in answer.ids or ()):
            raise RunError(f"the guide answered {answer!r} to the prompt {request.prompt.text[:60]!r}: it must be a text.")
        if answer.given_up:
            continue
        if not answer.finished and not (answer.text if answer.ids is None else answer.ids):
            raise RunError(
                f"the guide wrote nothing for the prompt {request.prompt.text[:60]!r} and calls it unfinished: "
                "a guide with nothing to add says finished."
            )
    return answers
