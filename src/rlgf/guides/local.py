"""Guides that need nothing from outside: a model in this process, the dataset's references, a Python function."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlgf.errors import RunError, UserError
from rlgf.guides.base import Capabilities, Request, Text
from rlgf.models import LanguageModel
from rlgf.randomness import Purpose, uniform_rows, uniforms
from rlgf.sampling import Continuations, continue_prefixes, split_context
from rlgf.tokens import decode_continuations, whole_characters
from rlgf.types import Decoding

TOKEN_MARGIN = 1.5  # own tokens that a guide of another tokenizer may write for each that the policy would need
SPARE_TOKENS = 8  # own tokens that it may write beside: a character can take four


def guide_model_path(spec: str) -> str | None:
    """Where the model lies that a spec names: of `model:PATH` the path, of `run:DIR` that run's policy; None for others."""
    if spec.startswith("model:"):
        return spec.removeprefix("model:")
    if not spec.startswith("run:"):
        return None
    folder = Path(spec.removeprefix("run:")).expanduser()
    if not (folder / "config.yaml").is_file():
        raise UserError(f"guide '{spec}': {folder} holds no run: give the folder that a run was written to with --out.")
    if not (folder / "policy").is_dir():
        raise UserError(f"guide '{spec}': the run in {folder} has no policy yet: let it finish first.")
    return str(folder / "policy")


class ModelGuide:
    """A model in this process with a decoding of its own; speaks the policy's tokens."""

    def __init__(self, language_model: LanguageModel, decoding: Decoding, precision: str = "fp32") -> None:
        self.language_model, self.decoding, self.precision = language_model, decoding, precision
        self.capabilities = Capabilities(can_finish=True, exact_budget=True)

    def complete(self, requests: Sequence[Request]) -> list[Text]:
        """Sample a continuation for each request; its draws depend on seed, trajectory and position alone."""
        contexts = [(request.prompt_ids, request.prefix_ids) for request in requests]
        budgets, minimums = [request.budget for request in requests], [request.minimum for request in requests]
        written = self._write(requests, contexts, budgets, minimums)
        rows = [row[:length].tolist() for row, length in zip(written.tokens, written.lengths.tolist())]
        return [Text("", bool(finished), ids) for finished, ids in zip(written.finished.tolist(), rows)]

    def _write(
        self,
        requests: Sequence[Request],
        contexts: Sequence[tuple[Sequence[int], Sequence[int]]],
        budgets: Sequence[int],
        minimums: Sequence[int],
    ) -> Continuations:
        """Continue pairs of prompt and prefix, in the guide's own tokens."""
        draws = uniform_rows(
            requests[0].seed if requests else 0,
            Purpose.GUIDE_TOKEN,
            [request.index for request in requests],
            max(budgets, default=0),
            [len(request.prefix_ids) for request in requests],
        )
        sources, prefixes = split_context(self.language_model.model, contexts)
        return continue_prefixes(
            self.language_model, prefixes, budgets, minimums, draws, self.decoding, self.precision, sources
        )


class TextModelGuide(ModelGuide):
    """A model in this process whose tokenizer is not the policy's: it reads text and answers text.

    Its budget in its own tokens is a generous guess from how both tokenizers write the prompt; what is more than the policy's
    budget is cut where its text becomes policy tokens. So it does not know how long its text is to be exactly.
    """

    def __init__(self, language_model: LanguageModel, decoding: Decoding, precision: str = "fp32") -> None:
        super().__init__(language_model, decoding, precision)
        self.capabilities = Capabilities(can_finish=True, exact_budget=False)

    def complete(self, requests: Sequence[Request]) -> list[Text]:
        """Sample a continuation of prompt and prefix, read as one text by a causal guide; draws are those of `ModelGuide`."""
        codec = self.language_model.codec
        contexts = self._contexts(requests)
        budgets: list[int] = []
        minimums: list[int] = []
        for request, context in zip(requests, contexts):
            prefix = [*context[0], *context[1]]
            room = self.language_model.context - len(context[1] if codec.alone else prefix)
            if room < 1:
                raise RunError(
                    f"the guide reads {self.language_model.context} tokens, and the prompt {request.prompt.text[:60]!r} with "
                    f"what was written has {len(prefix)} of its own: choose a guide that reads more, or shorter prompts."
                )
            share = max(1.0, len(prefix) / max(1, len(request.prompt_ids) + len(request.prefix_ids)))
            budgets.append(min(math.ceil(TOKEN_MARGIN * share * request.budget) + SPARE_TOKENS, room))
            # a text that is to fill the policy's budget never ends by itself
            minimums.append(budgets[-1] if request.minimum >= request.budget else math.ceil(share * request.minimum))
        written = self._write(requests, contexts, budgets, minimums)
        rows = [row[:length].tolist() for row, length in zip(written.tokens, written.lengths.tolist())]
        finished: list[bool] = written.finished.tolist()
        rows = [ids[:-1] if ended else self._whole(ids) for ids, ended in zip(rows, finished)]
        before = [begun if codec.alone else [*prompt, *begun] for prompt, begun in contexts]
        texts = decode_continuations(codec.tokenizer, before, rows)
        # tokens that spell nothing: the guide has nothing to add
        return [Text(text, ended or not text) for text, ended in zip(texts, finished)]

    def _contexts(self, requests: Sequence[Request]) -> list[tuple[list[int], list[int]]]:
        """Prompt and prefix of each request in the guide's tokens; a causal guide reads them as one text."""
        codec, tokenizer = self.language_model.codec, self.language_model.tokenizer
        if codec.alone:
            prompts = codec.prompts([replace(request.prompt, ids=None) for request in requests])
            return [(prompt, codec.response(request.prefix)) for prompt, request in zip(prompts, requests)]
        opening = self.language_model.end_id if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        whole = [replace(request.prompt, text=request.prompt.text + request.prefix, ids=None) for request in requests]
        return [(ids or [opening], []) for ids in codec.prompts(whole)]

    def _whole(self, ids: list[int]) -> list[int]:
        """The ids without a character that the budget cut in two, if anything remains."""
        return ids[: whole_characters(self.language_model.tokenizer, ids)] or ids


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
