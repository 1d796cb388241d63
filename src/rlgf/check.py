"""`rlgf check`: what can a guide do, and is a task sound?

A task is looked at without a policy: rewards finite, as many as texts, not constant, pure; targets continue their prompts;
and whether targets outscore empty and shuffled text.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlgf import algorithms, pipeline
from rlgf.config import Config, override
from rlgf.errors import RunError, UserError
from rlgf.finals import final_prompts
from rlgf.guides import FunctionGuide, Guide, Request, ask
from rlgf.guides.answers import Answer, InvalidError, PermanentError, Question, TransientError
from rlgf.guides.local import TextModelGuide, guide_model_path
from rlgf.guides.server import CONTINUATIONS, Server
from rlgf.guides.tokenizing import Tokens, reach_by_tokens
from rlgf.models import context_length, load_end_ids, load_language_model, load_tokenizer
from rlgf.pipeline import Report
from rlgf.plugins import load_object
from rlgf.preference_stage import try_pairs
from rlgf.preferences import Pairs, longer_rule
from rlgf.randomness import Purpose, permutation
from rlgf.refusals import check
from rlgf.rewards import check_names, check_reads, score
from rlgf.stages import tokenizer_for
from rlgf.tasks import Task, TextFunction, task_kind
from rlgf.tokens import Codec, decode
from rlgf.types import Prompt

SAMPLE = 64


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: 'ok', 'warning' or 'error', and what was seen."""

    level: str
    text: str


def check_task(config: Config, stages: Path, report: Report) -> list[Finding]:
    """Look at prompts, targets and reward of a config's task; any 'error' among the findings means it cannot be trained."""
    tokenizer, _ = tokenizer_for(config, config.task, config.model, stages, report)
    task = pipeline.prepare_prompts(config, tokenizer, lambda line: None)
    sizes = f"{len(task.train):,} / {len(task.validation):,} / {len(task.test):,} train, validation and test prompts"
    findings = [Finding("ok", sizes)]
    findings += [Finding("ok", f"{count:,} {reason}, left out") for reason, count in task.notes.items()]
    findings += [Finding("ok", f"{count:,} {remark}") for remark, count in task.remarks.items()]
    findings += check_prompts(task, tokenizer)
    check_names(config.reward.names)
    for split, prompts in (("training", task.train), ("validation", task.validation), *final_prompts(task, config).items()):
        try:
            check_reads(config.reward, split, prompts)
        except UserError as error:
            return [*findings, Finding("error", str(error))]
    if "preferences" in config.reward.names:  # which is not trained for this
        return [*findings, *check_pairs(try_pairs(config, stages, report))]
    made = pipeline.make_rewards(override(config, [("judge.spec", None)]), stages, report)
    return findings + check_reward(task, pipeline.prepare_reward(config, task, made))


def check_pairs(pairs: Pairs) -> list[Finding]:
    """What a reward model would be trained and measured on."""
    findings = [
        Finding("ok", f"{len(part):,} {name} pairs about {len({pair.post for pair in part}):,} posts")
        for name, part in (("training", pairs.train), ("held-out", pairs.test))
    ]
    findings += [Finding("ok", f"{count:,} {reason}, left out") for reason, count in pairs.dropped.items()]
    rule = longer_rule([*pairs.train, *pairs.test])
    return [*findings, Finding("ok", f"people preferred the longer response in {100 * rule:.1f} % of them")]


def check_guide(config: Config, prompt: str, prefix: str, stages: Path, report: Report) -> list[Finding]:
    """Ask a server in every way it can be asked; try other guides on the same prompt, or say what they can do."""
    spec = config.guide.spec
    changes: list[tuple[str, object]] = [("algorithm.name", "ppo_pp")]
    if task_kind(config.task).needs_data:
        changes.append(("task.data", config.task.data or "."))  # which is not read
    check(override(config, changes))
    if spec.startswith("server:"):
        return _check_server(config, prompt, prefix, stages, report)
    question = Question(prompt, prefix, config.task.max_new_tokens, 0)
    if spec.startswith("python:"):
        return _tried(FunctionGuide(load_object(spec, "guide")), question)
    path = guide_model_path(spec)
    if path is not None:
        model = load_language_model(path, config.runtime.device).fixed()
        ids = model.codec.prompt(Prompt(prompt + prefix))  # so that the length of the sample is counted in its own tokens
        found = Finding("ok", f"a model that reads {context_length(path):,} tokens")
        return [found, *_tried(TextModelGuide(model, config.guide.decoding), question, ids)]
    able = spec != "references"
    return [Finding("ok", _serves(able) + ("" if able else "; it cannot finish what another has begun"))]


def _tried(guide: Guide, question: Question, ids: Sequence[int] = ()) -> list[Finding]:
    """A guide in this process: a text begun, and one finished if it says that it can."""
    able, findings = guide.capabilities.can_finish, list[Finding]()
    for prefix in ("", question.prefix) if able else ("",):
        began = time.monotonic()
        request = Request(Prompt(question.prompt), ids, prefix, [], question.max_tokens, 0, 0, 0)
        try:
            text = ask(guide, [request])[0].text
        except RunError as error:
            return [Finding("error", str(error))]
        does = f"finishes {prefix!r}" if prefix else "begins a text"
        findings.append(Finding("ok", f"{does}, {time.monotonic() - began:.2f} s: {text!r}"))
    return [*findings, Finding("ok", _serves(able))]


def _check_server(config: Config, prompt: str, prefix: str, stages: Path, report: Report) -> list[Finding]:
    findings: list[Finding] = []
    settings, chosen = pipeline.guide_settings(config), config.guide.continuation
    modes = CONTINUATIONS[:-1] if chosen == "auto" else () if chosen == "token_ids" else (chosen,)
    for mode in modes:
        server = Server(config.guide.spec, settings, mode, report)
        questions = (Question(prompt, part, config.task.max_new_tokens, 0) for part in ("", prefix))
        findings += _findings(config, server, *questions)
    path = config.policy or config.model.path
    if chosen == "token_ids" or (chosen == "auto" and path):
        findings += _check_token_ids(config, path, prompt, prefix, stages, report)
    if not any(finding.level == "ok" for finding in findings):
        return [Finding("error", finding.text) for finding in findings]
    if chosen == "auto" and not path:
        findings.append(Finding("ok", "guide.continuation=token_ids: not tried; policy=PATH names a policy to try it with"))
    return findings


def _findings(config: Config, server: Server, begin: Question, finish: Question) -> list[Finding]:
    """What comes of one way of asking."""
    where = f"guide.continuation={server.mode}: "
    begun = _try(server, begin)
    if isinstance(begun, str):
        return [Finding("warning", f"{where}does not write ({begun})")]
    found = [Finding("ok", f"{where}begins a text, {begun[1]:.2f} s: {begun[0].text!r}")]
    if server.mode == "none":
        return [*found, Finding("ok", where + _serves(False)), _price(config, begun[0], "rollins")]
    finished = _try(server, finish)
    if isinstance(finished, str):
        found.append(Finding("warning", f"{where}does not finish a prefix ({finished}); " + _serves(False)))
        return [*found, _price(config, begun[0], "rollins")]
    found.append(Finding("ok", f"{where}finishes {finish.prefix!r}, {finished[1]:.2f} s: {finished[0].text!r}"))
    found.append(Finding("ok", where + _serves(True)))
    return [*found, _price(config, begun[0], "rollins"), _price(config, finished[0], "rollouts")]


def _check_token_ids(config: Config, path: str | None, prompt: str, prefix: str, stages: Path, report: Report) -> list[Finding]:
    """Whether the server can be driven by the tokens of a policy, which must be named."""
    where = "guide.continuation=token_ids: "
    if path is None:
        return [Finding("warning", f"{where}needs to know the policy: name it with policy=PATH")]
    tokenizer, settings = load_tokenizer(path), pipeline.guide_settings(config)
    ids = Codec(tokenizer).prompts([Prompt(text) for text in (prompt, prompt + prefix)])
    budget = config.task.max_new_tokens
    tokens = Tokens(tokenizer, load_end_ids(path, tokenizer), max(map(len, ids)) + budget)
    try:
        server = reach_by_tokens(config.guide.spec, settings, tokens, pipeline.answer_cache(config, stages), report)
    except UserError as error:
        return [Finding("warning", where + str(error))]
    begin, finish = (Question("", part, budget, 0, tuple(found)) for part, found in zip(("", prefix), ids))
    exact = "keeps to a least length" if server.exact else "does not keep to a least length"
    return [*_findings(config, server, begin, finish), Finding("ok", f"{where}{exact}")]


def _try(server: Server, question: Question) -> tuple[Answer, float] | str:
    """An answer and its seconds, or why there is none."""
    began = time.monotonic()
    try:
        return server.ask(question), time.monotonic() - began
    except (TransientError, InvalidError, PermanentError) as error:
        return str(error)


def _serves(can_finish: bool) -> str:
    served = [
        algorithm.title
        for name in algorithms.NAMES
        if not (algorithm := override(Config(), [("algorithm.name", name)]).algorithm.build()).asks_guide_to_finish
        or can_finish
    ]
    return f"serves {', '.join(served)}"


def _price(config: Config, answer: Answer, parts: str) -> Finding:
    """What a thousand rollins, or rollouts, like this one cost."""
    guide, bill = config.guide, answer.bill
    if not bill.known:
        return Finding("warning", "it does not say what it bills: guide.max_tokens and guide.max_cost cannot be kept")
    thoughts = f" ({bill.thinking_tokens} of thought)" if bill.thinking_tokens else ""
    billed = f"{parts}: billed {bill.prompt_tokens} + {bill.completion_tokens} tokens{thoughts}"
    if guide.price_input is None or guide.price_output is None:
        unknown_price = "price unknown: give guide.price_input and guide.price_output per million tokens"
        return Finding("ok", f"{billed}; {unknown_price}")
    thousand = (bill.prompt_tokens * guide.price_input + bill.completion_tokens * guide.price_output) / 1e3
    return Finding("ok", f"{billed}: {thousand:.4f} per thousand at the prices given")


def check_prompts(task: Task, tokenizer: Any) -> list[Finding]:
    """Prompts are not empty, their ids say what their text says, and targets are among the references."""
    findings: list[Finding] = []
    sample = [*task.train[:SAMPLE], *task.test[:SAMPLE]]
    for prompt in sample:
        if not Codec(tokenizer).prompt(prompt):
            return [Finding("error", "a prompt is empty: remove the row")]
        if prompt.ids is not None and not _says(tokenizer, prompt):
            findings.append(Finding("error", f"the ids of a prompt do not say its text: {prompt.text[:60]!r}"))
            break
    bad = [p for p in sample for target in p.targets if not _continues(p, target)]
    shown = task.demonstrations or task.train
    targets = sum(bool(prompt.targets) for prompt in shown)
    repeated = len(task.train) - len({(prompt.text, prompt.ids) for prompt in task.train})
    if repeated:
        findings.append(Finding("ok", f"{repeated:,} training prompts say what an earlier one says: they are asked more often"))
    if bad:
        what = "a target is empty, is no reference of its prompt, or begins by repeating it"
        findings.append(Finding("error", f"{what}: {bad[0].text[:60]!r}"))
    elif targets == 0:
        findings.append(Finding("warning", "no training prompt has a target: SFT and the MLE term cannot be used"))
    else:
        findings.append(Finding("ok", f"{targets:,} targets, each a continuation of its prompt"))
    return findings


def _says(tokenizer: Any, prompt: Prompt) -> bool:
    """Whether the ids of a prompt say its text; a chat template's special tokens are part of that."""
    ids = list(prompt.ids or ())
    texts = (decode(tokenizer, ids), tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return prompt.text.strip() in [text.strip() for text in texts]


def _continues(prompt: Prompt, target: str) -> bool:
    """Whether a target can be what follows its prompt: one of its references, and not the prompt's own beginning again."""
    repeats = len(prompt.text.split()) >= 3 and target.strip().startswith(prompt.text.strip())
    return bool(target.strip()) and target in prompt.references and not repeats


def check_reward(task: Task, reward: TextFunction) -> list[Finding]:
    """The reward is finite, one per text, pure and not constant, and prefers targets to empty and shuffled text."""
    prompts = [prompt for prompt in task.train if prompt.targets][:SAMPLE] or list(task.train[:SAMPLE])
    goals = [(prompt.targets or prompt.references or ("",))[0] for prompt in prompts]
    kinds = {
        "targets": goals,
        "empty texts": [""] * len(prompts),
        "shuffled targets": [shuffled(g, i) for i, g in enumerate(goals)],
    }
    try:
        scores = {name: score(reward, prompts, texts) for name, texts in kinds.items()}
        again = score(reward, prompts, goals)
        alone = [score(reward, prompts[i : i + 1], goals[i : i + 1])[0] for i in range(min(4, len(prompts)))]
    except RunError as error:
        return [Finding("error", str(error))]
    findings = [Finding("ok", f"{sum(map(len, kinds.values()))} rewards, one finite number for each text")]
    together = scores["targets"]
    if any(abs(a - b) > 1e-6 for a, b in [*zip(together, again), *zip(together, alone)]):
        findings.append(Finding("error", "the reward is not pure: the same text got another number the second time or alone"))
    else:
        findings.append(Finding("ok", "the reward is pure: the same text gets the same number, alone or among others"))
    findings.append(_constant(task, reward, [value for values in scores.values() for value in values]))
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    for name in ("empty texts", "shuffled targets"):
        said = f"{name} ({means[name]:.3f})"
        if means["targets"] > means[name]:
            findings.append(Finding("ok", f"targets ({means['targets']:.3f}) outscore {said}"))
        else:
            reason = "expected of noisy demonstrations, otherwise a sign that targets and reward disagree"
            findings.append(Finding("warning", f"targets ({means['targets']:.3f}) do not outscore {said}: {reason}"))
    return findings


def _constant(task: Task, reward: TextFunction, seen: Sequence[float]) -> Finding:
    """Whether the reward tells any texts apart; a sparse one is given more targets before it is called constant."""
    values, tried = list(seen), len(seen)
    for start in range(SAMPLE, len(task.train), 4096):
        if max(values) > min(values):
            break
        part: Sequence[Prompt] = [prompt for prompt in task.train[start : start + 4096] if prompt.targets]
        values += score(reward, part, [prompt.targets[0] for prompt in part])
        tried += len(part)
    if max(values) == min(values):
        return Finding("error", f"the reward is constant: {values[0]:g} for all {tried:,} texts tried")
    return Finding("ok", f"the reward is not constant: from {min(values):.3f} to {max(values):.3f} over {tried:,} texts")


def shuffled(text: str, number: int) -> str:
    """The words of a text in another order."""
    words = text.split()
    return " " + " ".join(words[i] for i in permutation(0, Purpose.TASK, 1000 + number, len(words)))
