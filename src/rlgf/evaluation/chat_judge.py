"""Chat models on a server as judges of pairs of completions."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlgf.config.sections import GuideConfig, JudgeConfig
from rlgf.errors import ConfigError, TrainingError
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
PLACEHOLDER = re.compile(r"\[(context|summary 1|summary 2)\]")
SYSTEM = re.compile(r"\s*<<SYS>>\s*(.*?)\s*<<\\SYS>>\s*(.*)", re.DOTALL)
MARKED_CHOICE = re.compile(r"[(\[]([ABab])[)\]]|<([AB])>")
TAGS = re.compile(r"</?\w+>")
BARE_CHOICE = re.compile(r"(?:[\w *_]*:)?[\s*_\"'`]*(?i:(?:summary|option|tl;?dr)\s+)?([AB])[\s*_\"'`.)]*")


@dataclass(frozen=True)
class ChatJudge:
    """A judge that queries a chat model with both texts as (A) and (B).

    The choice is parsed from the last line of the response.
    """

    pool: EndpointPool
    name: str
    template: str = TEMPLATE
    order: Literal["random", "both"] = "random"
    answer_tokens: int = 256
    seed: int = 0

    def compare(self, prompts: Sequence[Prompt], texts: Sequence[str], others: Sequence[str]) -> list[float | None]:
        """Return the chat model's preferences, as in `PairJudge.compare`.

        With order 'both', a row with two different choices is a tie.
        """
        requests: list[PoolRequest] = []
        for row, (prompt, text, other) in enumerate(zip(prompts, texts, others)):
            for swapped in self._orders(row):
                pair = (other, text) if swapped else (text, other)
                question, index = fill_template(self.template, prompt, *pair)[1], 2 * row + swapped
                seed = request_seed(self.seed, index, 0, 0)
                requests.append(PoolRequest(index, [ServerRequest(question, "", self.answer_tokens, seed)]))
        try:
            answers = self.pool.complete(requests, lambda row, response: response.last)
        except KeyboardInterrupt:
            self.pool.wait()
            raise
        failed = sum("given_up" in answer for answer in answers)
        if failed:
            raise TrainingError(
                f"the judge at {self.pool.server.url} failed {failed} of {len(requests)} requests after all retries: "
                "run the same command again when it is back; its responses are cached."
            )
        values = {
            request.index: _value(answer.get("text", ""), request.index % 2) for request, answer in zip(requests, answers)
        }
        return [_combine_orders([values[2 * row + swapped] for swapped in self._orders(row)]) for row in range(len(prompts))]

    def _orders(self, row: int) -> list[int]:
        """Return the orders of a row: 0 has the text as (A), 1 the other one."""
        return [0, 1] if self.order == "both" else [int(uniforms(self.seed, Purpose.JUDGE_ORDER, row, 1)[0] < 0.5)]


def _value(answer: str, swapped: int) -> float | None:
    choice = parse_choice(answer)
    return None if choice is None else float((choice == "A") != bool(swapped))


def _combine_orders(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def parse_choice(answer: str) -> str | None:
    """Parse 'A' or 'B' from the last line of a response.

    Returns None unless the line names exactly one.
    """
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    if not lines:
        return None
    # in <b>A</b> the tag is not a choice of B
    last = TAGS.sub("", lines[-1]) if "</" in lines[-1] else lines[-1]
    marked = {(round_one or angled).upper() for round_one, angled in MARKED_CHOICE.findall(last)}
    if marked:
        return marked.pop() if len(marked) == 1 else None
    bare = BARE_CHOICE.fullmatch(last)
    return bare.group(1) if bare else None


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


def load_template(path: str | None) -> str:
    """Load the template in a file; None: return the template of the paper."""
    if path is None:
        return TEMPLATE
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
    template = load_template(config.template)
    path = Path(config.endpoint.cache) if config.endpoint.cache else stages / "judge-answers.sqlite"
    server = Server(config.spec or "", server_settings(config, template), "none", report, role="judge")
    pool = EndpointPool(server, ResponseCache(path, "judge", report), report)
    name = f"chat model {server.model}, order {config.order}"
    return ChatJudge(pool, name, template, config.order, config.answer_tokens, config.seed)


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
