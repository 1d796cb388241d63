"""A server that speaks the policy's tokens. Whether it does is asked before anything is trained; it is refused otherwise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlgf.config import GuideConfig
from rlgf.errors import UserError
from rlgf.guides.answers import InvalidError, PermanentError, Question, TransientError
from rlgf.guides.cache import AnswerCache, key_of
from rlgf.guides.server import Server, parse_spec

PROBES = (
    "The film begins in a quiet town.",
    " a leading space",
    "a trailing space ",
    "two  spaces,   three",
    "\n",
    "line\nafter line\r\n",
    "\ttab\t\ttabs",
    "don't, it's; U.S.A. 3.14159 1,000,000 20:15 => :) ... ---",
    "CamelCase snake_case ALLCAPS",
    "\U0001f389\U0001f468\u200d\U0001f469\u200d\U0001f467 emoji",
    "\u7535\u5f71\u5f88\u597d\u770b\u3002\u6620\u753b\u306f\u9762\u767d\u3044 \uc601\ud654",
    "na\u00efve caf\u00e9 e\u0301 A\u030a \u2014 \u201cquoted\u201d",
    "\u0444\u0438\u043b\u044c\u043c \u03bc\u03bf\u03c5\u03c3\u03b9\u03ba\u03ae \u0641\u064a\u0644\u0645",
    "<|endoftext|>",
    "</s><s> <pad> <unk> [INST] <|im_end|>",
    "\u00a0\u2028\u200b",
    "\x00\x1b[0m",
)
SAMPLED = 256  # further tokens of the vocabulary, evenly spread, that are read back from their own text


@dataclass(frozen=True)
class Tokens:
    """The policy's side of a guide by token ids."""

    tokenizer: Any
    end_ids: Sequence[int]
    longest: int  # tokens of the longest prompt and a whole text behind it


def reach_by_tokens(
    spec: str, config: GuideConfig, tokens: Tokens, cache: AnswerCache, report: Callable[[str], None]
) -> Server:
    """The server that `spec` names, driven by token ids; `UserError` where its tokens are not the policy's.

    It is asked for the tokens of texts that tokenizers differ on, and whether it keeps to a least length; what was found is
    kept for a replay.
    """
    model, url = parse_spec(spec)
    texts = probes_of(tokens.tokenizer)
    ours = [list(tokens.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    key = key_of({"tokens of": model, "ids": ours, "end_ids": list(tokens.end_ids)})
    if config.offline:
        found = cache.get(key)
        if found is None:
            raise UserError(
                f"the guide is offline and {cache.path} does not say that its tokens are the policy's: run it once."
            )
        return Server(spec, config, "token_ids", report, tokens.end_ids, bool(found["exact"]))
    server = Server(spec, config, "token_ids", report, tokens.end_ids)
    try:
        context = _require_same_tokens(server, texts, ours)
        exact = _keeps_to_a_least_length(spec, config, tokens, ours[0])
    except TransientError as error:
        raise UserError(f"the guide at {url} does not answer ({error}): run the same command again when it is back.") from None
    except (PermanentError, InvalidError) as error:
        raise UserError(
            f"the guide at {url} cannot be driven by token ids ({error}): serve it with vLLM and the policy's tokenizer, or "
            "choose another guide.continuation."
        ) from None
    if context < tokens.longest:
        raise UserError(
            f"the guide at {url} reads {context} tokens, but a prompt and its text can have {tokens.longest}: raise its "
            "--max-model-len, or lower task.max_new_tokens."
        )
    if not exact:
        report("guide: it does not keep to min_tokens, so its texts are written to the end and cut at the switch")
    cache.put(key, {"exact": exact}, replace=True)
    return Server(spec, config, "token_ids", report, tokens.end_ids, exact)


def probes_of(tokenizer: Any) -> list[str]:
    """Texts on which tokenizers differ, and one made of tokens from all over the vocabulary."""
    size = len(tokenizer)
    sample = [tokenizer.decode([token]) for token in range(0, size, max(1, size // SAMPLED))]
    return [*PROBES, " ".join(sample)]


def _require_same_tokens(server: Server, texts: Sequence[str], ours: Sequence[Sequence[int]]) -> int:
    """The tokens that the server's context holds; `PermanentError` with the first text that it encodes otherwise."""
    context = 0
    for text, ids in zip(texts, ours):
        theirs, context = server.tokenize(text)
        if theirs != list(ids):
            raise PermanentError(f"its tokens of {text[:40]!r} are {theirs[:8]}, the policy's {list(ids)[:8]}")
    return context


def _keeps_to_a_least_length(spec: str, config: GuideConfig, tokens: Tokens, ids: Sequence[int]) -> bool:
    """Whether a text that is pushed to end at once goes on to `min_tokens` all the same, and tells its ids."""
    push = {"logit_bias": {str(end): 100 for end in tokens.end_ids}}
    pushed = Server(spec, replace(config, extra_body={**config.extra_body, **push}), "token_ids", end_ids=tokens.end_ids)
    answer = pushed.ask(Question("", "", max_tokens=4, seed=0, ids=tuple(ids), min_tokens=4))
    return not answer.finished and len(answer.ids or ()) == 4
