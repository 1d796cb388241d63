"""Guides that need nothing from outside: a model in this process, the dataset's references, a Python function."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from rlgf.guides.base import Capabilities, Request, Text
from rlgf.models import LanguageModel
from rlgf.randomness import Purpose, uniform_rows, uniforms
from rlgf.sampling import continue_prefixes
from rlgf.types import Decoding


class ModelGuide:
    """A model in this process with a decoding of its own; speaks the policy's tokens."""

    def __init__(self, language_model: LanguageModel, decoding: Decoding, precision: str = "fp32") -> None:
        self.language_model, self.decoding, self.precision = language_model, decoding, precision
        self.capabilities = Capabilities(can_finish=True, exact_budget=True)

    def complete(self, requests: Sequence[Request]) -> list[Text]:
        """Sample a continuation for each request; its draws depend on seed, trajectory and position alone."""
        budgets = [request.budget for request in requests]
        draws = uniform_rows(
            requests[0].seed if requests else 0,
            Purpose.GUIDE_TOKEN,
            [request.index for request in requests],
            max(budgets, default=0),
            [len(request.prefix_ids) for request in requests],
        )
        written = continue_prefixes(
            self.language_model,
            [[*request.prompt_ids, *request.prefix_ids] for request in requests],
            budgets,
            [request.minimum for request in requests],
            draws,
            self.decoding,
            self.precision,
        )
        rows = [row[:length].tolist() for row, length in zip(written.tokens, written.lengths.tolist())]
        return [Text("", bool(finished), ids) for finished, ids in zip(written.finished.tolist(), rows)]


class ReferenceGuide:
    """The dataset's own references: it can begin a text, but not finish what another began."""

    capabilities = Capabilities(can_finish=False)

    def complete(self, requests: Sequence[Request]) -> list[Text]:
        """A reference of each prompt, drawn where there are several."""
        texts: list[Text] = []
        for request in requests:
            references = request.prompt.references
            if not references:
                raise ValueError(f"the prompt {request.prompt.text[:60]!r} has no reference")
            draw = uniforms(request.seed, Purpose.REFERENCE, request.index, 1)[0]
            texts.append(Text(references[math.floor(draw * len(references))], finished=True))
        return texts


class FunctionGuide:
    """A Python function from requests to texts (`Text`, or plain strings, which are taken as finished).

    Its attribute `can_finish` (default True) says whether it finishes prefixes.
    """

    def __init__(self, function: Callable[[Sequence[Request]], Sequence[Text | str]]) -> None:
        self.function = function
        self.capabilities = Capabilities(can_finish=bool(getattr(function, "can_finish", True)))

    def complete(self, requests: Sequence[Request]) -> list[Text]:
        """What the function answers."""
        answers: Any = self.function(requests)
        if answers is None or isinstance(answers, (str, Text)):
            raise TypeError(f"it gave {type(answers).__name__} instead of a list of texts")
        return [Text(answer, finished=True) if isinstance(answer, str) else answer for answer in answers]
