"""Servers that share the policy's tokenizer, verified before training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlgf.config.sections import GuideConfig
from rlgf.errors import ConfigError
from rlgf.generation.openai.cache import ResponseCache, cache_key
from rlgf.generation.openai.client import Server, parse_spec
from rlgf.generation.openai.responses import InvalidError, PermanentError, ServerRequest, TransientError

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
NUM_SAMPLED_TOKENS = 256  # tokens of the last probe, evenly spaced over the vocabulary


@dataclass(frozen=True)
class TokenIdSetup:
    """The policy's tokenizer and lengths, for a guide queried with token ids."""

    tokenizer: Any
    eos_token_ids: Sequence[int]
    max_length: int  # tokens of the longest prompt and a full completion


def connect_by_token_ids(
    spec: str, config: GuideConfig, tokens: TokenIdSetup, cache: ResponseCache, report: Callable[[str], None]
) -> Server:
    """Return the server of `spec`, queried with token ids.

    Compares the tokens of probe texts on which tokenizers differ, and tests whether the server
    respects min_tokens; the result is stored for a replay. Raises `ConfigError` if the server's
    tokens are not the policy's.
    """
    model, url = parse_spec(spec)
    texts = probe_texts(tokens.tokenizer)
    policy_ids = [list(tokens.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    key = cache_key({"tokens of": model, "ids": policy_ids, "end_ids": list(tokens.eos_token_ids)})
    if config.endpoint.offline:
        found = cache.get(key)
        if found is None:
            raise ConfigError(
                f"the guide is offline and {cache.path} has no record that its tokens are the policy's: run once "
                "without --offline."
            )
        return Server(spec, config, "token_ids", report, tokens.eos_token_ids, bool(found["exact"]))
    server = Server(spec, config, "token_ids", report, tokens.eos_token_ids)
    try:
        context = _require_same_tokens(server, texts, policy_ids)
        exact = _respects_min_tokens(spec, config, tokens, policy_ids[0])
    except TransientError as error:
        raise ConfigError(f"the guide at {url} is unreachable ({error}): run the same command again when it is back.") from None
    except (PermanentError, InvalidError) as error:
        raise ConfigError(
            f"the guide at {url} cannot continue token ids ({error}): serve it with vLLM and the policy's tokenizer, or "
            "choose another guide.continuation."
        ) from None
    if context < tokens.max_length:
        raise ConfigError(
            f"the guide at {url} has a context of {context} tokens, but a prompt and its completion can have "
            f"{tokens.max_length}: raise its --max-model-len, or lower task.max_new_tokens."
        )
    if not exact:
        report("guide: it ignores min_tokens, so its completions are generated to the end and truncated at the switch")
    cache.put(key, {"exact": exact}, replace=True)
    return Server(spec, config, "token_ids", report, tokens.eos_token_ids, exact)


def probe_texts(tokenizer: Any) -> list[str]:
    """Return texts on which tokenizers differ, and one of tokens from the whole vocabulary."""
    size = len(tokenizer)
    sample = [tokenizer.decode([token]) for token in range(0, size, max(1, size // NUM_SAMPLED_TOKENS))]
    return [*PROBES, " ".join(sample)]


def _require_same_tokens(server: Server, texts: Sequence[str], policy_ids: Sequence[Sequence[int]]) -> int:
    """Return the server's context length, in tokens.

    Raises `PermanentError` with the first text that it encodes differently.
    """
    context = 0
    for text, ids in zip(texts, policy_ids):
        server_ids, context = server.tokenize(text)
        if server_ids != list(ids):
            raise PermanentError(f"its tokens of {text[:40]!r} are {server_ids[:8]}, the policy's {list(ids)[:8]}")
    return context


def _respects_min_tokens(spec: str, config: GuideConfig, tokens: TokenIdSetup, ids: Sequence[int]) -> bool:
    """Return whether the server respects `min_tokens` and returns token ids.

    A logit bias makes EOS tokens the most likely, so that only `min_tokens` prevents them.
    """
    push = {"logit_bias": {str(end): 100 for end in tokens.eos_token_ids}}
    endpoint = replace(config.endpoint, extra_body={**config.endpoint.extra_body, **push})
    pushed = Server(spec, replace(config, endpoint=endpoint), "token_ids", end_ids=tokens.eos_token_ids)
    response = pushed.send(ServerRequest("", "", max_tokens=4, seed=0, ids=tuple(ids), min_tokens=4))
    return not response.finished and len(response.ids or ()) == 4
