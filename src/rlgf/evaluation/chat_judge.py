"""Chat models on a server as judges of pairs of completions."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlgf.config.sections import GuideConfig, JudgeConfig
from rlgf.errors import ConfigError, TrainingError
from rlgf.evaluation.verdicts import VERDICT_SCHEMA, read_verdict
from rlgf.evaluation.win_rate import REFUSED, Verdict
from rlgf.generation.openai.cache import ResponseCache
from rlgf.generation.openai.client import Server
from rlgf.generation.openai.pool import EndpointPool, PoolRequest, request_seed
from rlgf.generation.openai.responses import ServerRequest
from rlgf.randomness import Purpose, uniforms
from rlgf.types import Prompt, SamplingParams

# Quoted from the paper's appendix C.2, misprint included. The system message is between the <<SYS>>
# marks, as in Llama 2's template.
TEMPLATE = r"""<<SYS>>
You are an expert summary evaluator and can consistently
distinguish between good and bad summaries. You provide
informative, correct evaluations.
<<\SYS>>

Task: Judge the quality of two TLDRs, choose the options
among (A) or (B)
context: [context]
tldr (A): [summary 1]
tldr (B): [summary 2]
FIRST provide a one-sentence comparison of the two summaries,
explaining which you prefer and why. SECOND, on a new line,
state only (A) or (B) to indicate your choice. Your
response should use hte format:
Comparison: <one-sentence comparison and explanation>
Preferred: <(A) or (B)>"""
# The same question, for a response that is the JSON object of `VERDICT_SCHEMA`
JSON_TEMPLATE = (
    TEMPLATE[: TEMPLATE.index("FIRST provide")]
    + """Compare the two summaries in one sentence, and choose the better one.
Respond with a JSON object and nothing else:
{"comparison": "<one-sentence comparison and explanation>", "preferred": "<A or B>"}"""
)
PLACEHOLDER = re.compile(r"\[(context|summary 1|summary 2)\]")
SYSTEM = re.compile(r"\s*<<SYS>>\s*(.*?)\s*<<\\SYS>>\s*(.*)", re.DOTALL)
FEW_QUESTIONS = 16  # before the share of refused ones is measured


@dataclass(frozen=True)
class ChatJudge:
    """A judge that queries a chat model with both texts as (A) and (B).

    The choice is what the response states; refused questions and unclear ones have none.
    """

    pool: EndpointPool
    name: str
    template: str = TEMPLATE
    order: Literal["random", "both"] = "random"
    max_new_tokens: int = 256
    seed: int = 0
    max_refused_share: float = 0.5

    def compare(self, prompts: Sequence[Prompt], texts: Sequence[str], others: Sequence[str]) -> list[Verdict]:
        """Return the chat model's preferences, as in `PairJudge.compare`.

        With order 'both', a row with two different choices is a tie.
        """
        requests: list[PoolRequest] = []
        for row, (prompt, text, other) in enumerate(zip(prompts, texts, others)):
            for swapped in self._orders(row):
                pair = (other, text) if swapped else (text, other)
                question, index = fill_template(self.template, prompt, *pair)[1], 2 * row + swapped
                seed = request_seed(self.seed, index, 0, 0)
                requests.append(PoolRequest(index, [ServerRequest(question, "", self.max_new_tokens, seed)]))
        try:
            responses = self.pool.complete(requests, lambda row, completion: completion.last)
        except KeyboardInterrupt:
            self.pool.wait()
            raise
        failed = sum("given_up" in response for response in responses)
        if failed:
            raise TrainingError(
                f"the judge at {self.pool.server.url} failed {failed} of {len(requests)} requests after all retries: "
                "run the same command again when it is back; its responses are cached."
            )
        refused = [str(response["invalid"]) for response in responses if response.get("refused")]
        if len(refused) > self.max_refused_share * max(len(requests), FEW_QUESTIONS):
            raise TrainingError(
                f"the judge refused {len(refused):,} of {len(requests):,} questions ({refused[-1]}), more than "
                f"judge.max_refused_share={self.max_refused_share:g}: choose another judge, or raise it."
            )
        values: dict[int, Verdict] = {
            request.index: _value(response, request.index % 2) for request, response in zip(requests, responses)
        }
        return [_combine_orders([values[2 * row + swapped] for swapped in self._orders(row)]) for row in range(len(prompts))]

    def _orders(self, row: int) -> list[int]:
        """Return the orders to judge: 0 shows the text as (A), 1 as (B)."""
        return [0, 1] if self.order == "both" else [int(uniforms(self.seed, Purpose.JUDGE_ORDER, row, 1)[0] < 0.5)]


def _value(response: Mapping[str, Any], swapped: int) -> Verdict:
    if response.get("refused"):
        return REFUSED
    choice = read_verdict(response.get("text", ""))
    return None if choice is None else float((choice == "A") != bool(swapped))


def _combine_orders(values: Sequence[Verdict]) -> Verdict:
    known = [value for value in values if isinstance(value, float)]
    if len(known) == len(values):
        return sum(known) / len(known)
    return REFUSED if REFUSED in values else None


def fill_template(template: str, prompt: Prompt, first: str, second: str) -> tuple[str | None, str]:
    """Fill a template with a prompt and two texts.

    Returns the template's system message, or None, and the user message.
    """
    context, first, second = prompt.text, prompt.strip_reply_prefix(first), prompt.strip_reply_prefix(second)
    if prompt.messages:
        context = "\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
    parts = {"context": context.strip(), "summary 1": first.strip(), "summary 2": second.strip()}
    system, question_template = split_system(template)
    # one substitution for all: the texts may contain placeholders themselves
    return system, PLACEHOLDER.sub(lambda place: parts[place.group(1)], question_template)


def split_system(template: str) -> tuple[str | None, str]:
    r"""Split a template into its system message, or None, and the rest.

    The system message is between <<SYS>> and <<\\SYS>> at the start of the template.
    """
    found = SYSTEM.fullmatch(template)
    return (found.group(1), found.group(2)) if found else (None, template)


def load_template(path: str | None, response_format: str = "text") -> str:
    """Load the template in a file; None: the paper's, or that for responses as JSON."""
    if path is None:
        return JSON_TEMPLATE if response_format == "json" else TEMPLATE
    try:
        template = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"judge.template '{path}' cannot be read ({error.strerror}): name a text file.") from None
    except ValueError:
        raise ConfigError(f"judge.template '{path}' is not UTF-8 text: name a text file.") from None
    missing = [f"[{name}]" for name in ("context", "summary 1", "summary 2") if f"[{name}]" not in template]
    if missing:
        raise ConfigError(f"judge.template '{path}' lacks {' and '.join(missing)}: add the placeholder where the text belongs.")
    return template


def server_settings(config: JudgeConfig, template: str) -> GuideConfig:
    """Return the settings of a judge on a server as a guide config.

    Each query is a complete question, decoded greedily.
    """
    return GuideConfig(
        spec=config.spec or "", sampling=SamplingParams(greedy=True), continuation="none", instruction="{text}",
        system=split_system(template)[0], endpoint=config.endpoint,
    )  # fmt: skip


def chat_judge(config: JudgeConfig, stages: Path, report: Callable[[str], None]) -> ChatJudge:
    """Return the judge `server:MODEL@URL`.

    Its responses are cached next to the stages, or in the file `judge.endpoint.cache`.
    """
    template = load_template(config.template, config.response_format)
    path = Path(config.endpoint.cache) if config.endpoint.cache else stages / "judge-responses.sqlite"
    form = VERDICT_SCHEMA if config.response_format == "json" and config.template is None else None
    settings = server_settings(config, template)
    server = Server(config.spec or "", settings, "none", report, role="judge", response_format=form)
    pool = EndpointPool(server, ResponseCache(path, "judge", report), report)
    name = f"chat model {server.model}, order {config.order}"
    return ChatJudge(pool, name, template, config.order, config.max_new_tokens, config.seed, config.max_refused_share)


def probe_judge(config: JudgeConfig, prompts: Sequence[Prompt], stages: Path, report: Callable[[str], None]) -> None:
    """Query a judge on a server once, before any training.

    The query uses its own `ChatJudge`, so its requests do not count elsewhere. Raises `ConfigError`
    if the judge does not respond. One of the prompts must have a reference.
    """
    if not (config.spec or "").startswith("server:") or config.endpoint.offline:
        return
    known = next(prompt for prompt in prompts if prompt.references)
    try:
        chat_judge(config, stages, report).compare([known], [known.references[0]], [known.references[-1]])
    except TrainingError as error:
        raise ConfigError(f"probe: {error}") from error.__cause__
