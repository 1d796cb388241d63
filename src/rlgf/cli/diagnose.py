"""The checks of `rlgf check guide`: what a guide can do, its answers, latency and cost."""

import time
from collections.abc import Sequence
from pathlib import Path

from rlgf.algorithms.registry import ALGORITHMS
from rlgf.cli.task_checks import Finding
from rlgf.config.loading import override
from rlgf.config.schema import Config
from rlgf.config.sections import EndpointConfig
from rlgf.config.specs import GuideKind
from rlgf.data.tokenization import Codec
from rlgf.errors import INPUT_ERRORS, TrainingError
from rlgf.generation.openai.client import CONTINUATIONS, Server
from rlgf.generation.openai.refusals import RequestRefusedError
from rlgf.generation.openai.responses import InvalidError, PermanentError, ServerRequest, ServerResponse, TransientError
from rlgf.generation.openai.token_ids import TokenIdSetup, connect_by_token_ids
from rlgf.guides.base import CompletionRequest, Guide, query_guide
from rlgf.guides.local import ReferenceGuide, TextModelGuide, as_guide
from rlgf.guides.remote import text_request
from rlgf.models.configs import UNLIMITED
from rlgf.models.forward import is_encoder_decoder
from rlgf.models.input_probe import describe_inputs
from rlgf.models.loading import count_parameters, load_eos_token_ids, load_language_model, load_tokenizer, max_length_of
from rlgf.pipeline import build_guide
from rlgf.pipeline.build_models import starting_codec
from rlgf.pipeline.preflight import check
from rlgf.pipeline.prepare import prepare_prompts
from rlgf.pipeline.resolve import GuidePlan, ResolvedRun, resolve
from rlgf.pipeline.stage_cache import Report, StageCache
from rlgf.rl.model_check import check_model as check_model_support
from rlgf.rl.model_check import describe_vllm
from rlgf.tasks.registry import task_definition
from rlgf.types import Prompt
from rlgf.untrusted_text import show_value

PROMPT, PREFIX = "The film begins in a quiet town where", " nothing ever happens. One day"  # asked without data
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + (m.content or '') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
DECODING = {
    "own": "with the cache of rlgf (fast)", "select": "with transformers' cache (slower)",
    "hold": "with transformers' cache, in which finished rows stay (slower)",
    "uncached": "without a cache: whole texts at each token (much slower)",
}  # fmt: skip


def check_model(path: str, device: str, precision: str) -> list[Finding]:
    """Describe what a model supports; raise `ConfigError` if it cannot be trained."""
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


def check_guide(
    config: Config, prompt: str | None, prefix: str | None, stages: Path, report: Report, with_data: bool = False
) -> list[Finding]:
    """Query a server in every continuation mode, or another guide on the same prompt.

    Guides that cannot be queried here are described.

    Args:
        config: has the guide's settings, and the task.
        prompt: the text to continue; None: a held-out prompt of the data, or an example.
        prefix: the beginning of the completion; None: that of a reference, or an example.
        stages: the folder of cached responses.
        report: called with each line of progress.
        with_data: whether to ask with a row of the task's data.
    """
    changes: list[tuple[str, object]] = [("algorithm.name", "ppo_pp")]
    if task_definition(config.task).needs_data:
        changes.append(("task.data", config.task.data or "."))  # required, but not loaded
    run, cache = resolve(override(config, changes)), StageCache(stages, report)
    check(run)
    plan, codec = run.guide, None
    test_prompt, test_prefix = Prompt(prompt or PROMPT), prefix
    if with_data:
        codec, row = _held_out_prompt(run, cache)
        test_prompt = row if prompt is None else Prompt(prompt)
        if test_prefix is None and test_prompt.references:
            words = test_prompt.references[0].split(" ")
            test_prefix = " ".join(words[: max(2, len(words) // 3)])
    test_prefix = PREFIX if test_prefix is None else test_prefix
    rollin, rollout = (text_request(test_prompt, part, config.task.max_new_tokens, 0) for part in ("", test_prefix))
    found = [Finding("ok", _describe_prompt(plan.spec.kind, test_prompt))] if with_data else []
    if plan.spec.kind == GuideKind.SERVER:
        return [*found, *_check_server(plan, run.policy.tokenizer.path, rollin, rollout, cache)]
    path = plan.model_path()
    if plan.spec.kind == GuideKind.PYTHON or (plan.spec.kind == GuideKind.REFERENCES and test_prompt.references):
        is_function = plan.spec.kind == GuideKind.PYTHON
        guide = as_guide(plan.load(), plan.spec.text) if is_function else ReferenceGuide()
        return [*found, *_query_local_guide(guide, test_prompt, rollout, codec=codec, is_function=is_function)]
    if path is not None:
        model = load_language_model(path, plan.machine.device).freeze()
        # The sample's length is counted in the model's own tokens.
        ids = model.codec.prompt(Prompt(test_prompt.text + test_prefix))
        found.append(Finding("ok", f"a model with a context of {max_length_of(path):,} tokens"))
        return [*found, *_query_local_guide(TextModelGuide(model, config.guide.sampling), test_prompt, rollout, ids)]
    can_continue = plan.spec.kind != GuideKind.REFERENCES
    return [Finding("ok", _describe_support(can_continue) + ("" if can_continue else "; it cannot continue a prefix"))]


def _describe_prompt(kind: GuideKind, asked: Prompt) -> str:
    """Return what a guide is asked, a server of a conversation its messages."""
    if kind == GuideKind.SERVER and asked.messages is not None:
        return f"asked with the messages {show_value([dict(message) for message in asked.messages], 300)}"
    return f"asked with the prompt {show_value(asked.text, 200)}"


def _held_out_prompt(run: ResolvedRun, cache: StageCache) -> tuple[Codec, Prompt]:
    """Return the policy's codec, and the first validation prompt as the guide gets it.

    Without a policy, conversations have a plain layout: which template they get is not known.
    """
    codec, _ = starting_codec(run.policy.tokenizer, run.policy.base.shape.max_length, cache)
    if run.policy.tokenizer.path is None:
        codec.tokenizer.chat_template = PLAIN_TEMPLATE
    return codec, prepare_prompts(run.task, codec.tokenizer, cache.report).validation[0]


def _query_local_guide(
    guide: Guide, prompt: Prompt, sample: ServerRequest, ids: Sequence[int] = (), codec: Codec | None = None,
    is_function: bool = False,
) -> list[Finding]:  # fmt: skip
    """Query a guide in this process: a rollin and, if it can continue, a rollout.

    Of a function it is shown what it is called with.
    """
    can_continue, findings = guide.capabilities.can_continue, list[Finding]()
    for prefix in ("", sample.prefix) if can_continue else ("",):
        start = time.monotonic()
        own_ids = codec.prompt(prompt) if codec is not None else ids
        prefix_ids = codec.response(prefix) if codec is not None and prefix else []
        request = CompletionRequest(prompt, own_ids, prefix, prefix_ids, sample.max_tokens, 0, 0, 0)
        if is_function:
            findings.append(Finding("ok", f"called with a list of requests such as {_describe_request(request)}"))
        try:
            text = query_guide(guide, [request])[0].text
        except TrainingError as error:
            return [*findings, Finding("error", str(error))]
        does = f"continues {prefix!r}" if prefix else "starts a completion"
        findings.append(Finding("ok", f"{does}, {time.monotonic() - start:.2f} s: {text!r}"))
    return [*findings, Finding("ok", _describe_support(can_continue))]


def _describe_request(request: CompletionRequest) -> str:
    """Return the fields of a request that a function reads."""
    prompt = request.prompt
    shown = {
        "prompt.text": prompt.text, "prompt.columns": dict(prompt.columns), "prompt.references": list(prompt.references),
        "prefix": request.prefix, "max_new_tokens": request.max_new_tokens,
    }  # fmt: skip
    return ", ".join(f"{name}={show_value(value, 100)}" for name, value in shown.items())


def _check_server(
    plan: GuidePlan, policy: str | None, rollin: ServerRequest, rollout: ServerRequest, cache: StageCache
) -> list[Finding]:
    """Query a server in the configured continuation mode, or in all of them.

    `policy` is the path of the policy's model, if there is one.
    """
    findings: list[Finding] = []
    chosen = plan.config.continuation
    modes = CONTINUATIONS[:-1] if chosen == "auto" else () if chosen == "token_ids" else (chosen,)
    for mode in modes:
        server = Server(plan.spec.text, plan.settings, mode, cache.report)
        findings += _findings(plan.config.endpoint, server, rollin, rollout)
    if chosen == "token_ids" or (chosen == "auto" and policy):
        findings += _check_token_ids(plan, policy, rollout, cache)
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


def _check_token_ids(plan: GuidePlan, path: str | None, request: ServerRequest, cache: StageCache) -> list[Finding]:
    """Check whether the server accepts token ids of the policy, which must be named."""
    where = "guide.continuation=token_ids: "
    if path is None:
        return [Finding("warning", f"{where}needs the policy: give policy=PATH")]
    tokenizer, max_tokens = load_tokenizer(path), request.max_tokens
    ids = Codec(tokenizer).prompts([Prompt(text) for text in (request.prompt, request.prompt + request.prefix)])
    setup = TokenIdSetup(tokenizer, load_eos_token_ids(path, tokenizer), max(map(len, ids)) + max_tokens)
    responses = build_guide.response_cache(plan.config, cache)
    try:
        server = connect_by_token_ids(plan.spec.text, plan.settings, setup, responses, cache.report)
    except INPUT_ERRORS as error:
        return [Finding("warning", where + str(error))]
    rollin_request, rollout_request = (
        ServerRequest("", part, max_tokens, 0, tuple(found)) for part, found in zip(("", request.prefix), ids)
    )
    exact = "respects min_tokens" if server.exact else "ignores min_tokens"
    return [*_findings(plan.config.endpoint, server, rollin_request, rollout_request), Finding("ok", f"{where}{exact}")]


def _send(server: Server, request: ServerRequest) -> tuple[ServerResponse, float] | str:
    """Return the response and its seconds, or the error message."""
    start = time.monotonic()
    try:
        return server.send(request), time.monotonic() - start
    except (TransientError, InvalidError, PermanentError, RequestRefusedError) as error:
        return str(error)


def _describe_support(can_continue: bool) -> str:
    served = [
        algorithm.title
        for options in ALGORITHMS.values()
        if not (algorithm := options().build()).needs_guide_rollout or can_continue
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
