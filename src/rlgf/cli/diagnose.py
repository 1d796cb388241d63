"""The diagnostics of `rlgf check`: a guide's capabilities and a task's validity.

A task is checked without a policy: rewards must be finite, as many as completions, not constant
and pure; targets must continue their prompts, and should outscore empty and shuffled text.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlgf.algorithms import guided
from rlgf.config.loading import override
from rlgf.config.schema import Config
from rlgf.config.sections import EndpointConfig
from rlgf.config.specs import GuideKind
from rlgf.data.preferences import Pairs, length_baseline
from rlgf.data.tokenization import Codec, decode
from rlgf.errors import INPUT_ERRORS, TrainingError
from rlgf.evaluation.intervals import show_mean
from rlgf.generation.openai.client import CONTINUATIONS, Server
from rlgf.generation.openai.refusals import QuestionRefusedError
from rlgf.generation.openai.responses import InvalidError, PermanentError, ServerRequest, ServerResponse, TransientError
from rlgf.generation.openai.token_ids import TokenIdSetup, connect_by_token_ids
from rlgf.guides.base import CompletionRequest, Guide, query_guide
from rlgf.guides.local import FunctionGuide, TextModelGuide
from rlgf.models.configs import UNLIMITED
from rlgf.models.forward import is_encoder_decoder
from rlgf.models.input_probe import describe_inputs
from rlgf.models.loading import count_parameters, load_eos_token_ids, load_language_model, load_tokenizer, max_length_of
from rlgf.pipeline import build_guide, build_rewards
from rlgf.pipeline.final_evaluation import final_prompts
from rlgf.pipeline.preflight import check
from rlgf.pipeline.prepare import prepare_prompts
from rlgf.pipeline.resolve import GuidePlan, resolve
from rlgf.pipeline.reward_model_stage import load_pairs
from rlgf.pipeline.stage_cache import Report, StageCache, no_report
from rlgf.pipeline.stages import prepare_tokenizer
from rlgf.randomness import Purpose, permutation
from rlgf.rewards.base import score
from rlgf.rewards.build import check_reward_columns, check_reward_names, scorers_in
from rlgf.rewards.classifier import SequenceClassifier
from rlgf.rl.model_check import check_model as check_model_support
from rlgf.rl.model_check import describe_vllm
from rlgf.tasks.base import Task
from rlgf.tasks.registry import task_definition
from rlgf.types import Prompt, RewardFunction

SAMPLE = 64
DECODING = {
    "own": "with the cache of rlgf (fast)", "select": "with transformers' cache (slower)",
    "hold": "with transformers' cache, in which finished rows stay (slower)",
    "uncached": "without a cache: whole texts at each token (much slower)",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One result of a check: its level ('ok', 'warning' or 'error') and its text."""

    level: str
    text: str


def check_task(config: Config, stages: Path, report: Report) -> list[Finding]:
    """Check the prompts, targets and reward of a config's task.

    An 'error' among the findings means that the task cannot be trained.
    """
    run, cache = resolve(config), StageCache(stages, report)
    tokenizer, _ = prepare_tokenizer(run.policy.tokenizer, cache)
    task = prepare_prompts(run.task, tokenizer, no_report)
    sizes = f"{len(task.train):,} / {len(task.validation):,} / {len(task.test):,} train, validation and test prompts"
    findings = [Finding("ok", sizes)]
    findings += [Finding("ok", f"{count:,} {reason}, dropped") for reason, count in task.dropped_rows.items()]
    findings += [Finding("ok", f"{count:,} {remark}") for remark, count in task.warnings.items()]
    findings += check_prompts(task, tokenizer)
    check_reward_names(config.reward.names, config.reward.options)
    for split, prompts in (
        ("training", task.train),
        ("validation", task.validation),
        *final_prompts(task, config.evaluation).items(),
    ):
        try:
            check_reward_columns(config.reward, split, prompts)
        except INPUT_ERRORS as error:
            return [*findings, Finding("error", str(error))]
    if "preferences" in config.reward.names:  # no reward model is trained for the check
        return [*findings, *check_pairs(load_pairs(run.reward.preferences, cache))]
    folders = build_rewards.train_rewards(run.reward, None, cache)
    return findings + check_reward(task, build_rewards.prepare_reward(run.reward, task, folders))


def check_model(path: str, device: str, precision: str) -> list[Finding]:
    """Describe what a model supports; raise an error of one sentence if it cannot be trained."""
    model = load_language_model(path, device)
    context = "no limit on tokens" if model.max_length >= UNLIMITED else f"a context of {model.max_length:,} tokens"
    kind = "encoder–decoder" if is_encoder_decoder(model.model) else "causal model"
    size = f"{count_parameters(model.model):,} parameters"
    report, vllm = check_model_support(model, precision), describe_vllm(model.model)
    agreement = report.agreement
    findings = [
        Finding("ok", f"{report.model_type}: {kind}, {size}, {context}"),
        Finding(
            "ok",
            f"log-probabilities of sampling and training agree: {agreement.max_error:.1g} nats at most in {agreement.tokens} "
            f"tokens (mean {agreement.mean_error:.1g})",
        ),
        Finding("ok" if report.is_fast else "warning", f"sampled {DECODING[report.decoding]}"),
        Finding("ok", f"trained on {describe_inputs(model.model)}"),
    ]
    if report.absent_ids:
        findings.append(Finding("ok", f"{report.absent_ids:,} embeddings without a token, never sampled"))
    findings += [Finding("ok", f"LoRA: {', '.join(report.lora_targets)}")] if report.lora_targets else []
    findings += [Finding("ok", "a value head on its states can be its critic")] if report.value_head else []
    findings += [Finding("warning", reason) for reason in report.reasons]
    return [*findings, Finding("ok", vllm)]


def check_pairs(pairs: Pairs) -> list[Finding]:
    """Describe the pairs that a reward model would be trained and evaluated on."""
    findings = [
        Finding("ok", f"{len(part):,} {name} pairs about {len({pair.group for pair in part}):,} posts")
        for name, part in (("training", pairs.train), ("held-out", pairs.test))
    ]
    findings += [Finding("ok", f"{count:,} {reason}, dropped") for reason, count in pairs.dropped.items()]
    rule = length_baseline([*pairs.train, *pairs.test])
    return [*findings, Finding("ok", f"people preferred the longer response in {100 * rule:.1f} % of them")]


def check_guide(config: Config, prompt: str, prefix: str, stages: Path, report: Report) -> list[Finding]:
    """Query a server in every continuation mode, or another guide on the same prompt.

    Guides that cannot be queried here are described.
    """
    changes: list[tuple[str, object]] = [("algorithm.name", "ppo_pp")]
    if task_definition(config.task).needs_data:
        changes.append(("task.data", config.task.data or "."))  # required, but not loaded
    run, cache = resolve(override(config, changes)), StageCache(stages, report)
    check(run)
    plan = run.guide
    if plan.spec.kind == GuideKind.SERVER:
        return _check_server(
            plan, run.policy.tokenizer.path, ServerRequest(prompt, prefix, config.task.max_new_tokens, 0), cache
        )
    question = ServerRequest(prompt, prefix, config.task.max_new_tokens, 0)
    if plan.spec.kind == GuideKind.PYTHON:
        return _query_local_guide(FunctionGuide(plan.load_function()), question)
    path = plan.model_path()
    if path is not None:
        model = load_language_model(path, config.runtime.device).freeze()
        # The sample's length is counted in the model's own tokens.
        ids = model.codec.prompt(Prompt(prompt + prefix))
        found = Finding("ok", f"a model with a context of {max_length_of(path):,} tokens")
        return [found, *_query_local_guide(TextModelGuide(model, config.guide.sampling), question, ids)]
    can_continue = plan.spec.kind != GuideKind.REFERENCES
    return [Finding("ok", _describe_support(can_continue) + ("" if can_continue else "; it cannot continue a prefix"))]


def _query_local_guide(guide: Guide, sample: ServerRequest, ids: Sequence[int] = ()) -> list[Finding]:
    """Query a guide in this process: a rollin and, if it can continue, a rollout."""
    can_continue, findings = guide.capabilities.can_continue, list[Finding]()
    for prefix in ("", sample.prefix) if can_continue else ("",):
        start = time.monotonic()
        request = CompletionRequest(Prompt(sample.prompt), ids, prefix, [], sample.max_tokens, 0, 0, 0)
        try:
            text = query_guide(guide, [request])[0].text
        except TrainingError as error:
            return [Finding("error", str(error))]
        does = f"continues {prefix!r}" if prefix else "starts a completion"
        findings.append(Finding("ok", f"{does}, {time.monotonic() - start:.2f} s: {text!r}"))
    return [*findings, Finding("ok", _describe_support(can_continue))]


def _check_server(plan: GuidePlan, policy: str | None, question: ServerRequest, cache: StageCache) -> list[Finding]:
    """Query a server in the configured continuation mode, or in all of them.

    `policy` is the path of the policy's model, if there is one.
    """
    findings: list[Finding] = []
    chosen = plan.config.continuation
    modes = CONTINUATIONS[:-1] if chosen == "auto" else () if chosen == "token_ids" else (chosen,)
    for mode in modes:
        server = Server(plan.spec.text, plan.settings, mode, cache.report)
        findings += _findings(plan.config.endpoint, server, dataclasses.replace(question, prefix=""), question)
    if chosen == "token_ids" or (chosen == "auto" and policy):
        findings += _check_token_ids(plan, policy, question, cache)
    if not any(finding.level == "ok" for finding in findings):
        return [Finding("error", finding.text) for finding in findings]
    if chosen == "auto" and not policy:
        findings.append(Finding("ok", "guide.continuation=token_ids: not tried; policy=PATH names a policy to try it with"))
    return findings


def _findings(
    endpoint: EndpointConfig, server: Server, rollin_request: ServerRequest, rollout_request: ServerRequest
) -> list[Finding]:
    """Query a server in one continuation mode, and return the findings."""
    where = f"guide.continuation={server.mode}: "
    rollin = _send(server, rollin_request)
    if isinstance(rollin, str):
        return [Finding("warning", f"{where}generates nothing ({rollin})")]
    found = [Finding("ok", f"{where}starts a completion, {rollin[1]:.2f} s: {rollin[0].text!r}")]
    if server.mode == "none":
        return [*found, Finding("ok", where + _describe_support(False)), _price(endpoint, rollin[0], "rollins")]
    rollout = _send(server, rollout_request)
    if isinstance(rollout, str):
        found.append(Finding("warning", f"{where}does not continue a prefix ({rollout}); " + _describe_support(False)))
        return [*found, _price(endpoint, rollin[0], "rollins")]
    found.append(Finding("ok", f"{where}continues {rollout_request.prefix!r}, {rollout[1]:.2f} s: {rollout[0].text!r}"))
    found.append(Finding("ok", where + _describe_support(True)))
    return [*found, _price(endpoint, rollin[0], "rollins"), _price(endpoint, rollout[0], "rollouts")]


def _check_token_ids(plan: GuidePlan, path: str | None, question: ServerRequest, cache: StageCache) -> list[Finding]:
    """Check whether the server accepts token ids of the policy, which must be named."""
    where = "guide.continuation=token_ids: "
    if path is None:
        return [Finding("warning", f"{where}needs the policy: give policy=PATH")]
    tokenizer, budget = load_tokenizer(path), question.max_tokens
    ids = Codec(tokenizer).prompts([Prompt(text) for text in (question.prompt, question.prompt + question.prefix)])
    setup = TokenIdSetup(tokenizer, load_eos_token_ids(path, tokenizer), max(map(len, ids)) + budget)
    responses = build_guide.response_cache(plan.config, cache)
    try:
        server = connect_by_token_ids(plan.spec.text, plan.settings, setup, responses, cache.report)
    except INPUT_ERRORS as error:
        return [Finding("warning", where + str(error))]
    rollin_request, rollout_request = (
        ServerRequest("", part, budget, 0, tuple(found)) for part, found in zip(("", question.prefix), ids)
    )
    exact = "respects min_tokens" if server.exact else "ignores min_tokens"
    return [*_findings(plan.config.endpoint, server, rollin_request, rollout_request), Finding("ok", f"{where}{exact}")]


def _send(server: Server, request: ServerRequest) -> tuple[ServerResponse, float] | str:
    """Return the response and its seconds, or the error message."""
    start = time.monotonic()
    try:
        return server.send(request), time.monotonic() - start
    except (TransientError, InvalidError, PermanentError, QuestionRefusedError) as error:
        return str(error)


def _describe_support(can_continue: bool) -> str:
    served = [
        algorithm.title
        for name in guided.ALGORITHMS
        if not (algorithm := override(Config(), [("algorithm.name", name)]).algorithm.build()).needs_guide_rollout
        or can_continue
    ]
    return f"serves {', '.join(served)}"


def _price(endpoint: EndpointConfig, response: ServerResponse, parts: str) -> Finding:
    """Return the cost of a thousand rollins or rollouts like this one."""
    usage = response.usage
    if not usage.known:
        limits = "guide.endpoint.max_tokens and guide.endpoint.max_cost"
        return Finding("warning", f"it reports no usage: {limits} cannot be enforced")
    thoughts = f" ({usage.thinking_tokens} thinking tokens)" if usage.thinking_tokens else ""
    billed = f"{parts}: billed {usage.prompt_tokens} + {usage.completion_tokens} tokens{thoughts}"
    if endpoint.price_input is None or endpoint.price_output is None:
        unknown_price = "price unknown: give guide.endpoint.price_input and guide.endpoint.price_output per million tokens"
        return Finding("ok", f"{billed}; {unknown_price}")
    thousand = (usage.prompt_tokens * endpoint.price_input + usage.completion_tokens * endpoint.price_output) / 1e3
    return Finding("ok", f"{billed}: {thousand:.4f} per thousand at the prices given")


def check_prompts(task: Task, tokenizer: Any) -> list[Finding]:
    """Check the prompts, their ids and their targets.

    Prompts must not be empty, ids must decode to the prompt's text, and targets must be among the
    references.
    """
    findings: list[Finding] = []
    sample = [*task.train[:SAMPLE], *task.test[:SAMPLE]]
    for prompt in sample:
        if not Codec(tokenizer).prompt(prompt):
            return [Finding("error", "a prompt is empty: remove the row")]
        if prompt.ids is not None and not _ids_match_text(tokenizer, prompt):
            findings.append(Finding("error", f"the ids of a prompt do not decode to its text: {prompt.text[:60]!r}"))
            break
    bad = [p for p in sample for target in p.sft_targets if not _continues(p, target)]
    shown = task.demonstrations or task.train
    targets = sum(bool(prompt.sft_targets) for prompt in shown)
    repeated = len(task.train) - len({(prompt.text, prompt.ids) for prompt in task.train})
    if repeated:
        findings.append(Finding("ok", f"{repeated:,} training prompts repeat an earlier one: they are sampled more often"))
    if bad:
        what = "a target is empty, is no reference of its prompt, or begins by repeating it"
        findings.append(Finding("error", f"{what}: {bad[0].text[:60]!r}"))
    elif targets == 0:
        findings.append(Finding("warning", "no training prompt has a target: SFT and the MLE term cannot be used"))
    else:
        findings.append(Finding("ok", f"{targets:,} targets, each a continuation of its prompt"))
    return findings


def _ids_match_text(tokenizer: Any, prompt: Prompt) -> bool:
    """Return whether the ids of a prompt decode to its text.

    The text may include a chat template's special tokens.
    """
    ids = list(prompt.ids or ())
    texts = (decode(tokenizer, ids), tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return prompt.text.strip() in [text.strip() for text in texts]


def _continues(prompt: Prompt, target: str) -> bool:
    """Return whether a target can follow its prompt.

    It must be one of the references, and not repeat the prompt.
    """
    repeats = len(prompt.text.split()) >= 3 and target.strip().startswith(prompt.text.strip())
    return bool(target.strip()) and target in prompt.references and not repeats


def check_reward(task: Task, reward: RewardFunction) -> list[Finding]:
    """Check that the reward is finite, pure and not constant.

    There must be one reward per completion. Targets should outscore empty and shuffled text.
    """
    prompts = [prompt for prompt in task.train if prompt.sft_targets][:SAMPLE] or list(task.train[:SAMPLE])
    goals = [(prompt.sft_targets or prompt.references or ("",))[0] for prompt in prompts]
    kinds = {
        "targets": goals,
        "empty texts": [""] * len(prompts),
        "shuffled targets": [shuffled(g, i) for i, g in enumerate(goals)],
    }
    try:
        scores = {name: score(reward, prompts, texts) for name, texts in kinds.items()}
        again = score(reward, prompts, goals)
        alone = [score(reward, prompts[i : i + 1], goals[i : i + 1])[0] for i in range(min(4, len(prompts)))]
    except TrainingError as error:
        return [Finding("error", str(error))]
    findings = [Finding("ok", f"{sum(map(len, kinds.values()))} rewards, one finite number for each completion")]
    findings += [Finding("ok", f"it is {s.describe()}") for s in scorers_in(reward) if isinstance(s, SequenceClassifier)]
    together = scores["targets"]
    if any(abs(a - b) > 1e-6 for a, b in [*zip(together, again), *zip(together, alone)]):
        findings.append(
            Finding("error", "the reward is not pure: the same completion got another number the second time or alone")
        )
    else:
        findings.append(Finding("ok", "the reward is pure: the same completion gets the same number, alone or among others"))
    findings.append(_constant(task, reward, [value for values in scores.values() for value in values]))
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    shown = show_mean(scores["targets"])
    for name in ("empty texts", "shuffled targets"):
        compared = f"{name} ({show_mean(scores[name])})"
        if means["targets"] > means[name]:
            findings.append(Finding("ok", f"targets ({shown}) outscore {compared}"))
        else:
            reason = "expected of noisy demonstrations, otherwise a sign that targets and reward disagree"
            findings.append(Finding("warning", f"targets ({shown}) do not outscore {compared}: {reason}"))
    return findings


def _constant(task: Task, reward: RewardFunction, known: Sequence[float]) -> Finding:
    """Check that the reward is not constant.

    A sparse reward is evaluated on more targets before it is reported as constant.
    """
    values, tried = list(known), len(known)
    for start in range(SAMPLE, len(task.train), 4096):
        if max(values) > min(values):
            break
        part: Sequence[Prompt] = [prompt for prompt in task.train[start : start + 4096] if prompt.sft_targets]
        values += score(reward, part, [prompt.sft_targets[0] for prompt in part])
        tried += len(part)
    if max(values) == min(values):
        return Finding("error", f"the reward is constant: {values[0]:g} for all {tried:,} completions tried")
    return Finding("ok", f"the reward is not constant: from {min(values):.3f} to {max(values):.3f} over {tried:,} completions")


def shuffled(text: str, number: int) -> str:
    """Return the words of a text in a permuted order."""
    words = text.split()
    return " " + " ".join(words[i] for i in permutation(0, Purpose.TASK, 1000 + number, len(words)))
