"""Win rates: a judge compares each text with its prompt's reference. The judge is a reward model, or a chat model on a server.

The chat model is asked as in the paper's appendix C.2. Which of the two texts stands first is drawn for each row, a function of
seed and row, or every row is asked both ways.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from rlgf.config import GuideConfig, JudgeConfig
from rlgf.errors import RunError, UserError
from rlgf.guides.base import Request
from rlgf.guides.cache import AnswerCache
from rlgf.guides.remote import RemoteGuide
from rlgf.guides.server import Server, parse_spec
from rlgf.randomness import Purpose, uniforms
from rlgf.rewards import score
from rlgf.types import Decoding, Prompt, TextFunction

# Quoted from appendix C.2, misprint included. What stands between the marks is the system message, as in Llama 2's template.
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
PLACES = re.compile(r"\[(context|summary 1|summary 2)\]")
SYSTEM = re.compile(r"\s*<<SYS>>\s*(.*?)\s*<<\\SYS>>\s*(.*)", re.DOTALL)
MARKED = re.compile(r"[(\[]([ABab])[)\]]|<([AB])>")
TAGS = re.compile(r"</?\w+>")
BARE = re.compile(r"(?:[\w *_]*:)?[\s*_\"'`]*(?i:(?:summary|option|tl;?dr)\s+)?([AB])[\s*_\"'`.)]*")


class PairJudge(Protocol):
    """Anything that compares a text with another one."""

    @property
    def name(self) -> str:
        """Who it is, for results."""
        ...

    def compare(self, prompts: Sequence[Prompt], texts: Sequence[str], others: Sequence[str]) -> list[float | None]:
        """For each prompt 1 where the text is the better one, 0 where the other is, ½ for a tie, None where it does not say."""
        ...


@dataclass(frozen=True)
class RewardJudge:
    """The better text is the one with the higher score."""

    reward: TextFunction
    name: str

    def compare(self, prompts: Sequence[Prompt], texts: Sequence[str], others: Sequence[str]) -> list[float | None]:
        """Comparisons of the scores."""
        pairs = zip(score(self.reward, prompts, texts), score(self.reward, prompts, others))
        return [0.5 + 0.5 * (first > second) - 0.5 * (first < second) for first, second in pairs]


@dataclass(frozen=True)
class ChatJudge:
    """A chat model is shown both texts as (A) and (B), and its choice read from the last line of its answer."""

    guide: RemoteGuide
    name: str
    template: str = TEMPLATE
    order: Literal["random", "both"] = "random"
    answer_tokens: int = 256
    seed: int = 0

    def compare(self, prompts: Sequence[Prompt], texts: Sequence[str], others: Sequence[str]) -> list[float | None]:
        """What the chat model prefers; asked both ways, it has to say the same twice, or the row is a tie."""
        requests: list[Request] = []
        for row, (prompt, text, other) in enumerate(zip(prompts, texts, others)):
            for turned in self._turns(row):
                pair = (other, text) if turned else (text, other)
                asked = Prompt(question(self.template, prompt, *pair)[1])
                requests.append(Request(asked, [], "", [], self.answer_tokens, 0, 2 * row + turned, self.seed))
        try:
            answers = [answer.text for answer in self.guide.complete(requests)]
        except RunError as error:
            raise RunError(str(error).replace("the guide", "the judge").replace("guide.", "judge.")) from error.__cause__
        failed = self.guide.take_counts()["guide_given_up"]
        if failed:
            raise RunError(
                f"the judge at {self.guide.server.url} gave no answer to {failed:g} of {len(requests)} questions, however "
                "often it was asked: run the same command again when it is back; answers that were given are kept."
            )
        values = {request.index: _value(answer, request.index % 2) for request, answer in zip(requests, answers)}
        return [_agreed([values[2 * row + turned] for turned in self._turns(row)]) for row in range(len(prompts))]

    def _turns(self, row: int) -> list[int]:
        """How a row is asked: 0 with the text as (A), 1 with the other one."""
        return [0, 1] if self.order == "both" else [int(uniforms(self.seed, Purpose.JUDGE_ORDER, row, 1)[0] < 0.5)]


def _value(answer: str, turned: int) -> float | None:
    choice = parse_choice(answer)
    return None if choice is None else float((choice == "A") != bool(turned))


def _agreed(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def parse_choice(answer: str) -> str | None:
    """'A' or 'B', from the last line of an answer; None where it does not name exactly one."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    if not lines:
        return None
    last = TAGS.sub("", lines[-1]) if "</" in lines[-1] else lines[-1]  # <b>A</b> is no choice of B
    marked = {(round_one or angled).upper() for round_one, angled in MARKED.findall(last)}
    if marked:
        return marked.pop() if len(marked) == 1 else None
    bare = BARE.fullmatch(last)
    return bare.group(1) if bare else None


def question(template: str, prompt: Prompt, first: str, second: str) -> tuple[str | None, str]:
    """The system message of a template, if it has one, and the question with a prompt and two texts in their places."""
    context, first, second = prompt.text, prompt.said(first), prompt.said(second)
    if prompt.messages:
        context = "\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
    parts = {"context": context.strip(), "summary 1": first.strip(), "summary 2": second.strip()}
    system, asked = split_system(template)
    return system, PLACES.sub(lambda place: parts[place.group(1)], asked)  # at once: texts may hold such words themselves


def split_system(template: str) -> tuple[str | None, str]:
    """What stands between <<SYS>> and <<\\SYS>> at the head of a template, and the rest."""
    found = SYSTEM.fullmatch(template)
    return (found.group(1), found.group(2)) if found else (None, template)


def read_question(path: str | None) -> str:
    """The template in a file; None: that of the paper."""
    if path is None:
        return TEMPLATE
    try:
        template = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"judge.template '{path}' cannot be read ({error.strerror}): name a text file.") from None
    missing = [f"[{name}]" for name in ("context", "summary 1", "summary 2") if f"[{name}]" not in template]
    if missing:
        raise UserError(f"judge.template '{path}' does not say where {' and '.join(missing)} shall stand: put that in.")
    return template


def server_settings(config: JudgeConfig, template: str) -> GuideConfig:
    """How a judge on a server is asked, in the terms of guides: a whole question, the likeliest answer, once."""
    return GuideConfig(
        spec=config.spec or "", decoding=Decoding(greedy=True), continuation="none", instruction="{text}",
        system=split_system(template)[0], api_key_env=config.api_key_env, extra_body=config.extra_body,
        extra_headers=config.extra_headers, tokens_per_policy_token=1.0, thinking_tokens=config.thinking_tokens,
        concurrency=config.concurrency, requests_per_minute=config.requests_per_minute,
        timeout_seconds=config.timeout_seconds, retries=config.retries, retry_seconds=config.retry_seconds,
        invalid_retries=0, on_failure="policy", max_requests=config.max_requests, offline=config.offline,
    )  # fmt: skip


def judge_server(spec: str) -> tuple[str, str]:
    """Model and address of a judge `server:MODEL@URL`."""
    try:
        return parse_spec(spec)
    except UserError as error:
        raise UserError(str(error).replace("guide", "judge")) from None


def chat_judge(config: JudgeConfig, stages: Path, report: Callable[[str], None]) -> ChatJudge:
    """The judge `server:MODEL@URL`; its answers are kept beside the stages, or where `judge.cache` says."""
    spec, template = config.spec or "", read_question(config.template)
    settings = server_settings(config, template)
    cache = AnswerCache(Path(config.cache) if config.cache else stages / "judge-answers.sqlite")

    def tell(line: str) -> None:  # who asks a server calls itself the guide
        report(line.replace("guide:", "judge:", 1))

    guide = RemoteGuide(Server(spec, settings, "none", tell), settings, cache, tell)
    name = f"chat model {judge_server(spec)[0]}, order {config.order}"
    return ChatJudge(guide, name, template, config.order, config.answer_tokens, config.seed)


def probe_judge(config: JudgeConfig, prompts: Sequence[Prompt], stages: Path, report: Callable[[str], None]) -> None:
    """Ask a judge on a server one question before anything is trained, by a `ChatJudge` whose requests count nowhere else.

    `UserError` where it does not answer. One of the prompts must have a reference.
    """
    if not (config.spec or "").startswith("server:") or config.offline:
        return
    known = next(prompt for prompt in prompts if prompt.references)
    try:
        chat_judge(config, stages, report).compare([known], [known.references[0]], [known.references[-1]])
    except RunError as error:
        raise UserError(f"probe: {error}") from error.__cause__


def win_rate(judge: PairJudge, prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, float]:
    """How often a judge prefers a text to its prompt's first reference; ties count half.

    Rows whose answer cannot be read are counted and left out of the rate, as are prompts without a reference.
    """
    rows = [(prompt, text) for prompt, text in zip(prompts, texts) if prompt.references]
    answers = judge.compare([p for p, _ in rows], [text for _, text in rows], [p.references[0] for p, _ in rows])
    values = [answer for answer in answers if answer is not None]
    return {**rate(values), "unparseable": len(answers) - len(values)}


def rate(values: Sequence[float]) -> dict[str, float]:
    """The mean of wins (1), ties (½) and losses (0), its standard error, and how many there were of each."""
    mean = sum(values) / len(values) if values else math.nan
    spread = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    counts = {"wins": 1.0, "ties": 0.5, "losses": 0.0}
    return {
        "win_rate": mean,
        "win_rate_standard_error": math.sqrt(spread / len(values)) if values else math.nan,
        **{name: float(sum(v == value for v in values)) for name, value in counts.items()},
    }


def summary(result: Mapping[str, float]) -> str:
    """A win rate in words."""
    return (
        f"{100 * result['win_rate']:.1f} % ± {100 * result['win_rate_standard_error']:.1f}: {result['wins']:.0f} wins, "
        f"{result['ties']:.0f} ties, {result['losses']:.0f} losses, {result['unparseable']:.0f} unparseable answers"
    )
