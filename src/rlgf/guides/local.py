"""Guides in this process: a model, the dataset's references, a Python function."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlgf.config.specs import GuideKind, GuideSpec
from rlgf.data.chat import inputs_of
from rlgf.data.conversations.template import ChatTemplate
from rlgf.data.tokenization import complete_utf8_prefix, decode_continuations
from rlgf.errors import ConfigError, GuideError, user_code
from rlgf.generation.base import SampledCompletions, Sampler, SampleRequest
from rlgf.generation.decoder import LocalSampler
from rlgf.guides.base import Capabilities, Completion, CompletionRequest, Guide, open_reply
from rlgf.models.language_model import LanguageModel
from rlgf.randomness import Purpose, uniforms
from rlgf.types import Prompt, SamplingParams

# limit on guide tokens: margin × estimated guide tokens per policy token × max_new_tokens + spare
TOKEN_MARGIN = 1.5
EXTRA_TOKENS = 8  # a character can take four tokens


def guide_model_path(spec: GuideSpec) -> str | None:
    """Return the path of a guide's model, or None if the spec names none.

    It is PATH for `model:PATH` and that run's policy for `run:DIR`. Raises `ConfigError` if the run
    has no policy.
    """
    if spec.kind == GuideKind.MODEL:
        return spec.name
    if spec.kind != GuideKind.RUN:
        return None
    folder = Path(spec.name).expanduser()
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"guide '{spec.text}': {folder} holds no run: give the folder that a run was written to with --out.")
    if not (folder / "policy").is_dir():
        raise ConfigError(f"guide '{spec.text}': the run in {folder} has no policy yet: let it finish first.")
    return str(folder / "policy")


class ModelGuide:
    """A model in this process with its own sampling parameters and the policy's tokenizer."""

    def __init__(self, language_model: LanguageModel, sampling: SamplingParams, precision: str = "fp32") -> None:
        self.language_model, self.sampling = language_model, sampling
        self.sampler: Sampler = LocalSampler(language_model, precision)
        self.capabilities = Capabilities(can_continue=True, exact_length=True, takes_token_ids=True)

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """Sample a completion for each request.

        Its random numbers depend only on seed, trajectory index and position.
        """
        sampled = self._sample(
            [
                SampleRequest(
                    request.prompt_ids, request.prefix_ids, request.max_new_tokens, request.min_new_tokens, request.index,
                    len(request.prefix_ids),
                )
                for request in requests
            ],
            requests,
        )  # fmt: skip
        rows = [row[:length].tolist() for row, length in zip(sampled.tokens, sampled.lengths.tolist())]
        return [Completion("", bool(finished), ids) for finished, ids in zip(sampled.ended_with_eos.tolist(), rows)]

    def _sample(self, contexts: Sequence[SampleRequest], requests: Sequence[CompletionRequest]) -> SampledCompletions:
        """Sample completions of prompts and prefixes in the guide's tokens."""
        return self.sampler.sample(contexts, self.sampling, requests[0].seed if requests else 0, Purpose.GUIDE_TOKEN)


class TextModelGuide(ModelGuide):
    """A model in this process with another tokenizer than the policy: text in, text out.

    Its limit in its own tokens is a generous estimate from the lengths of the prompt in both
    tokenizers; a completion longer than max_new_tokens is truncated when it is encoded in policy
    tokens. So its lengths in policy tokens are not exact. A conversation is rendered with its own
    chat template, if it has one: the policy's control tokens mean nothing to it.
    """

    def __init__(self, language_model: LanguageModel, sampling: SamplingParams, precision: str = "fp32") -> None:
        super().__init__(language_model, sampling, precision)
        self.capabilities = Capabilities(can_continue=True, exact_length=False)
        self._chat = ChatTemplate(language_model.tokenizer, option="the guide's own chat_template")

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """Sample a completion for each request, with the random numbers of `ModelGuide`.

        A causal guide takes prompt and prefix as one text.
        """
        codec = self.language_model.codec
        contexts = self._contexts(requests)
        sample_requests: list[SampleRequest] = []
        for request, context in zip(requests, contexts):
            prefix = [*context[0], *context[1]]
            room = self.language_model.max_length - len(context[1] if codec.is_encoder_decoder else prefix)
            if room < 1:
                raise GuideError(
                    f"the guide's context is {self.language_model.max_length} tokens, and the prompt "
                    f"{request.prompt.text[:60]!r} with its prefix has {len(prefix)} of its own: choose a guide "
                    "with a longer context, or shorter prompts."
                )
            share = max(1.0, len(prefix) / max(1, len(request.prompt_ids) + len(request.prefix_ids)))
            max_new_tokens = min(math.ceil(TOKEN_MARGIN * share * request.max_new_tokens) + EXTRA_TOKENS, room)
            # a completion that must fill max_new_tokens gets no EOS token
            fills = request.min_new_tokens >= request.max_new_tokens
            min_new_tokens = max_new_tokens if fills else math.ceil(share * request.min_new_tokens)
            sample_requests.append(
                SampleRequest(*context, max_new_tokens, min_new_tokens, request.index, len(request.prefix_ids))
            )
        sampled = self._sample(sample_requests, requests)
        rows = [row[:length].tolist() for row, length in zip(sampled.tokens, sampled.lengths.tolist())]
        finished: list[bool] = sampled.ended_with_eos.tolist()
        rows = [ids[:-1] if ended else self._drop_incomplete_character(ids) for ids, ended in zip(rows, finished)]
        before = [start_ids if codec.is_encoder_decoder else [*prompt, *start_ids] for prompt, start_ids in contexts]
        texts = decode_continuations(codec.tokenizer, before, rows)
        chats = self._chat.available and not codec.is_encoder_decoder
        texts = [
            open_reply(request.prompt, request.prefix, text) if text and chats and request.prompt.messages else text
            for request, text in zip(requests, texts)
        ]
        # tokens that decode to no text count as an empty, finished completion
        return [Completion(text, ended or not text) for text, ended in zip(texts, finished)]

    def _contexts(self, requests: Sequence[CompletionRequest]) -> list[tuple[list[int], list[int]]]:
        """Return the prompt and the prefix of each request in the guide's tokens.

        A causal guide takes both as one text, with an empty prefix.
        """
        codec, tokenizer = self.language_model.codec, self.language_model.tokenizer
        if codec.is_encoder_decoder:
            prompts = codec.prompts([replace(request.prompt, ids=None) for request in requests])
            return [(prompt, codec.response(request.prefix)) for prompt, request in zip(prompts, requests)]
        opening = self.language_model.eos_token_id if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        whole = [self._as_read(request) for request in requests]
        return [(ids or [opening], []) for ids in codec.prompts(whole)]

    def _as_read(self, request: CompletionRequest) -> Prompt:
        """Return prompt and prefix as the guide reads them."""
        prompt = request.prompt
        if prompt.messages is None or not self._chat.available:
            return replace(prompt, text=prompt.text + request.prefix, ids=None)
        begun = prompt.strip_reply_prefix(request.prefix)
        text = self._chat.prompt(prompt.messages, "the prompt", inputs_of(prompt)) + begun
        return Prompt(text, ids=tuple(self.language_model.tokenizer(text, add_special_tokens=False)["input_ids"]))

    def _drop_incomplete_character(self, ids: list[int]) -> list[int]:
        """Return the ids without an incomplete last character, if any remain."""
        return ids[: complete_utf8_prefix(self.language_model.tokenizer, ids)] or ids


class ReferenceGuide:
    """The dataset's references as completions; it cannot continue a prefix."""

    capabilities = Capabilities(can_continue=False)

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """Return one reference of each prompt, sampled if there are several."""
        texts: list[Completion] = []
        for request in requests:
            references = request.prompt.references
            if not references:
                raise ValueError(f"the prompt {request.prompt.text[:60]!r} has no reference")
            uniform = uniforms(request.seed, Purpose.REFERENCE, request.index, 1)[0]
            texts.append(Completion(references[math.floor(uniform * len(references))], finished=True))
        return texts


def as_guide(value: Any, spec: str = "") -> Guide:
    """Return a user's guide: a function from requests to completions, an object, or its class.

    Raises:
        ConfigError: it cannot be called as a guide, or does not say what it is capable of.
    """
    made: Any = value
    if isinstance(value, type) and hasattr(value, "complete"):
        with user_code(f"the guide {value.__name__} cannot be made without arguments", ConfigError):
            made = value()
    if not hasattr(made, "complete"):
        return FunctionGuide(made)
    if not isinstance(getattr(made, "capabilities", None), Capabilities):
        shown = spec or type(made).__name__
        raise ConfigError(f"guide '{shown}' has no capabilities: give it an attribute of that name, a rlgf.Capabilities.")
    return made


def _require_one_argument(function: Callable[..., Any]) -> None:
    """Raise `ConfigError` for a function that cannot be called with a list of requests alone."""
    if not callable(function):
        raise ConfigError(f"the guide is a {type(function).__name__}, but must be a function or a rlgf.Guide.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in callables have no signature
        return
    try:
        signature.bind([])
    except TypeError:
        name = getattr(function, "__name__", type(function).__name__)
        raise ConfigError(
            f"the guide {name}({', '.join(signature.parameters)}) cannot be called: a guide is called as guide(requests), with "
            "a list of rlgf.CompletionRequest, and returns a text or a rlgf.Completion for each."
        ) from None


class FunctionGuide:
    """A Python function from requests to completions.

    It returns a `Completion` or a string, which counts as finished, for each request. Its attribute
    `can_continue` (default True) is true if it can continue a prefix, and `takes_token_ids`
    (default False) if it continues the prefix as token ids.
    """

    def __init__(self, function: Callable[[Sequence[CompletionRequest]], Sequence[Completion | str]]) -> None:
        _require_one_argument(function)
        self.function = function
        self.capabilities = Capabilities(
            can_continue=bool(getattr(function, "can_continue", True)),
            takes_token_ids=bool(getattr(function, "takes_token_ids", False)),
        )

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """Call the function and return its completions."""
        completions: Any = self.function(requests)
        if not isinstance(completions, Iterable) or isinstance(completions, str | bytes | Completion | Mapping | Set):
            raise TypeError(f"it returned {type(completions).__name__} instead of a list of completions")
        return [
            Completion(completion, finished=True) if isinstance(completion, str) else completion for completion in completions
        ]
