"""What must be true of a config, its prompts and its guide before anything is trained, and what to change where it is not."""

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlgf import adapters
from rlgf.algorithms import Algorithm
from rlgf.best_of import MOST
from rlgf.config import Config
from rlgf.errors import RunError, UserError, unknown
from rlgf.guides import FunctionGuide, Guide, Request, ask
from rlgf.guides.human import HumanGuide
from rlgf.guides.local import guide_model_path
from rlgf.guides.server import parse_spec
from rlgf.hub import is_local_name, is_there
from rlgf.judge import judge_server, read_question
from rlgf.models import VALUE_HEAD, context_length, four_bits, load_tokenizer, refuse_other_heads, require_critic_adapter
from rlgf.plugins import load_object
from rlgf.preference_stage import check_preferences
from rlgf.rewards import check_names, no_rule
from rlgf.stages import guide_task
from rlgf.tasks import Task, task_kind
from rlgf.tasks.base import task_options
from rlgf.tokens import Codec
from rlgf.tracking import check_trackers
from rlgf.types import GUIDE, POLICY, Prompt

JUDGES = ("preferences", "model:PATH", "server:MODEL@URL")
GUIDES = ("sft", "trained", "model:PATH", "run:DIR", "server:MODEL@URL", "human", "references", "python:module:name")


def check(config: Config) -> Algorithm:
    """Everything that can be refused without loading data or models; returns the algorithm."""
    algorithm = config.algorithm.build()
    kind = task_kind(config.task)
    task_options(config.task, kind.options)
    if kind.needs_data and config.task.data is None:
        raise UserError(f"task '{config.task.name}' needs data: give --data with a Hub name or a folder of .jsonl[.gz] files.")
    if not kind.needs_data and config.task.data is not None:
        raise UserError(f"task '{config.task.name}' makes its own data: leave out --data, or choose another task.")
    check_trackers(config.runtime.trackers)
    _check_judges(config)
    spec = config.guide.spec
    if spec not in ("sft", "trained", "references", "human") and not spec.startswith(("model:", "run:", "server:", "python:")):
        raise unknown("guide", spec, GUIDES)
    if spec == "references":
        require_finisher(algorithm, False, "references")
    if spec.startswith("server:"):
        parse_spec(spec)
        require_finisher(algorithm, config.guide.continuation != "none", spec)
    if spec.startswith("python:"):
        require_finisher(algorithm, FunctionGuide(load_object(spec, "guide")).capabilities.can_finish, spec)
    if spec == "trained":
        task_options(guide_task(config), kind.options)
        if not (config.guide.sft.steps or config.guide.sft.epochs):
            raise UserError("guide 'trained' has guide.sft.steps and guide.sft.epochs 0: set one, or choose another guide.")
    try:
        torch.device(config.runtime.device)
    except RuntimeError:
        raise UserError(f"runtime.device is '{config.runtime.device}': choose cpu, cuda or cuda:0.") from None
    _check_offload(config)
    _check_adapters(config)
    if config.evaluation.best_of > MOST:
        raise UserError(f"evaluation.best_of is {config.evaluation.best_of}: choose at most {MOST:,}.")
    if config.adapter.load_in_4bit and torch.device(config.runtime.device).type == "cpu":
        raise UserError(  # bitsandbytes packs weights for inference there, and no gradient passes through them
            "adapter.load_in_4bit needs a GPU, as bitsandbytes computes no gradients on a CPU: set runtime.device=cuda."
        )
    if config.adapter.load_in_4bit:
        four_bits(config.runtime.device)
    return algorithm


def check_to_train(config: Config) -> Algorithm:
    """The same, and what only training needs: refuse what can only be a file or folder of this machine, and is not there."""
    algorithm = check(config)
    if "task" in config.reward.names and not task_kind(config.task).has_rule:
        raise no_rule(config.task.name)
    if config.guide.spec == "human" and needs_guide(algorithm) and not config.guide.offline and nobody_types():
        raise UserError("the guide 'human' is asked at a terminal, and there is none: run the same command in one.")
    guide = guide_model_path(config.guide.spec) if needs_guide(algorithm) or config.distil.texts else None
    pairs = config.preferences.data if "preferences" in (*config.reward.names, config.judge.spec) else None
    named = [
        ("task.data", config.task.data), ("preferences.data", pairs), ("policy", config.policy),
        ("model.path", config.model.path), ("critic.path", config.critic.path), ("guide.spec", guide),
        *(("judge.spec", name) for name in judge_names(config)),
        *(("reward.path", name) for name in config.reward.names if not name.startswith("python:")),
    ]  # fmt: skip
    for field, name in named:
        if name and is_local_name(name) and not is_there(name):
            raise UserError(f"{field} names '{name}', but there is no such file or folder: mend the name.")
    return algorithm


def nobody_types() -> bool:
    """Whether standard input is closed or the null device; a file or a pipe may hold what somebody wrote."""
    try:
        return not sys.stdin.isatty() and stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):
        return True


def _check_adapters(config: Config) -> None:
    """Refuse adapters without their library, on weights that are stored nowhere, and beside a policy that is trained whole."""
    pairs = "preferences" in (*config.reward.names, config.judge.spec) and config.preferences.lora_rank > 0
    if config.adapter.rank or pairs:
        adapters.need()
    given = config.policy is not None and adapters.is_adapter_folder(config.policy)
    if config.distil.texts and config.adapter.rank and not config.adapter.in_sft and not given:
        raise UserError("a distilled policy is a whole model here, and adapters share one: set adapter.in_sft=true.")
    shapes = [("model", config.model)] if not config.policy else []
    shapes += [("guide.model", config.guide.model)] if config.guide.spec == "trained" else []
    for name, shape in shapes:
        if config.adapter.in_sft and not shape.path and not (config.lm.steps or config.lm.epochs):
            raise UserError(
                f"adapter.in_sft trains an adapter on a model that is there, and {name} is a new one: give {name}.path, or set "
                "lm.steps."
            )


def _check_offload(config: Config) -> None:
    """Refuse to move what does not lie on a GPU by itself."""
    offload, shared = config.runtime.offload, config.adapter.rank > 0
    if offload and torch.device(config.runtime.device).type == "cpu":
        raise UserError("runtime.offload frees a GPU's memory, and runtime.device is the CPU: leave it out.")
    if "reference" in offload and shared:
        raise UserError("with adapters the reference has no weights of its own to offload: leave it out of runtime.offload.")
    if "critic" in offload and config.critic.kind != "separate":
        raise UserError(
            f"a critic of kind '{config.critic.kind}' reads with the policy's weights: leave it out of runtime.offload."
        )


def _check_judges(config: Config) -> None:
    """Refuse a reward or a judge that is to be trained from nothing, and a judge that there is not."""
    spec = config.judge.spec
    if "preferences" in (*config.reward.names, spec):
        check_preferences(config)
    if spec is None:
        return
    if spec.startswith("server:"):
        judge_server(spec)
        read_question(config.judge.template)
    elif spec != "preferences" and not spec.startswith("model:"):
        raise unknown("judge", spec, JUDGES)


def cautions(algorithm: Algorithm) -> list[str]:
    """What can be trained, but is known to leave something unlearnt. Source: algorithms.md, sections 2 and 3."""
    found: list[str] = []
    for phase in algorithm.phases:
        if phase.rollin == POLICY and phase.beta == 1.0:
            found.append("with beta = 1 V^g of the prompt is never fitted, though the first token needs it: choose beta < 1")
        if phase.rollin == GUIDE and phase.beta == 1.0 and phase.switch == "paper":
            found.append("with beta = 1 and switch 'paper' the first token is never trained: choose beta < 1 or 'uniform'")
        if phase.rollin == POLICY and phase.switch == "paper":
            found.append("with switch 'paper' the last token is never trained where the guide finishes: choose 'uniform'")
    return found


def needs_guide(algorithm: Algorithm) -> bool:
    """Whether an algorithm ever asks a guide."""
    return algorithm.asks_guide_to_begin or algorithm.asks_guide_to_finish


def require_finisher(algorithm: Algorithm, can_finish: bool, spec: str) -> None:
    """Refuse a guide that an algorithm asks for what it cannot do."""
    if algorithm.asks_guide_to_finish and not can_finish:
        raise UserError(
            f"guide '{spec}' cannot finish a prefix that another has written, which {algorithm.title} asks of it: "
            "choose ppo_pp, or a guide that can."
        )


def check_paths(config: Config, tokenizer: Any, context: int) -> None:
    """Refuse models that are named but cannot serve, from their configs and tokenizers alone."""
    path = guide_model_path(config.guide.spec)
    if path is not None:
        _check_guide_model(path, load_tokenizer(path), context_length(path), tokenizer, context)
    if config.guide.spec == "trained" and config.guide.model.path is None:
        _check_guide_model("trained", tokenizer, config.guide.model.context, tokenizer, context)
    check_names((*config.reward.names, *judge_names(config)))
    check_base(config, tokenizer)
    _check_critic(config)
    policy = config.policy
    if policy is not None and adapters.is_adapter_folder(policy):
        refuse_other_heads(policy)
        if not adapters.has_layers_alone(policy):
            raise UserError(
                f"the adapter in {policy} is not only LoRA layers in adapter_model.safetensors and cannot be trained on "
                "here: make it a whole model with `rlgf merge`, and give that."
            )


def judge_names(config: Config) -> tuple[str, ...]:
    """The reward model that judges, by the name it would have as a reward; none where nobody judges, or a chat model."""
    spec = config.judge.spec or ""
    return (spec.removeprefix("model:"),) if spec.startswith("model:") or spec == "preferences" else ()


def check_base(config: Config, tokenizer: Any) -> None:
    """Refuse to read the policy's tokens with a model before SFT that has others."""
    wanted = config.evaluation.output_perplexity or "zero_shot" in config.evaluation.baselines
    path = config.model.path
    if not (wanted and config.policy and path):
        return
    known = load_tokenizer(path).get_vocab()
    if not tokenizer.get_vocab().items() <= known.items():
        raise UserError(
            f"model.path '{path}', the model before SFT, has another vocabulary than the policy '{config.policy}': give the "
            "policy's own base, or set evaluation.output_perplexity=false and leave zero_shot out of evaluation.baselines."
        )


def _check_critic(config: Config) -> None:
    """Refuse critics that cannot begin as they are asked to."""
    critic, policy = config.critic, config.policy
    if critic.path is not None:
        folder = Path(critic.path).expanduser()
        if critic.kind == "separate":
            context_length(critic.path)
        elif critic.kind == "adapter":
            require_critic_adapter(critic.path)
        elif critic.kind == "trunk" and not (folder / VALUE_HEAD).is_file():
            raise UserError(f"critic.path '{critic.path}' holds no {VALUE_HEAD}: give the folder of a critic.")
        return
    trained = not policy and config.adapter.in_sft and bool(config.sft.steps or config.sft.epochs)
    if critic.kind == "separate" and (trained or (policy is not None and adapters.is_adapter_folder(policy))):
        raise UserError(
            "critic.kind=separate is a whole model that begins as the policy, and the policy is an adapter: set "
            "critic.kind=adapter or trunk, or name a whole model with critic.path."
        )


def _check_guide_model(name: str, tokenizer: Any, context: int, policy_tokenizer: Any, policy_context: int) -> None:
    """A guide that speaks the policy's tokens must read as many; what another tokenizer makes of a text is seen when asked."""
    if tokenizer.get_vocab() == policy_tokenizer.get_vocab() and context < policy_context:
        raise UserError(f"guide '{name}' reads {context} tokens, the policy {policy_context}: choose a longer one.")


def check_lengths(codec: Codec, context: int, task: Task, config: Config) -> int:
    """Refuse empty prompts and prompts that leave no room for a response; tokens of the longest with its response."""
    room, longest = context if codec.alone else context - config.task.max_new_tokens, 0
    for split in ("train", "validation", "test"):
        prompts: Sequence[Prompt] = getattr(task, split)
        if not prompts:
            raise UserError(f"task '{task.name}' has no {split} prompts: its data needs at least one.")
        for number, length in enumerate(map(len, codec.prompts(prompts)), 1):
            if length == 0:
                raise UserError(f"task '{task.name}', {split} prompt {number} is empty: remove the row.")
            longest = max(longest, length)
            if length > room:
                raise UserError(
                    f"task '{task.name}', {split} prompt {number} has {length} tokens; with {config.task.max_new_tokens} new "
                    f"ones it exceeds the model's context of {context}: shorten the prompts or task.max_new_tokens."
                )
    return longest + config.task.max_new_tokens


def probe_guide(guide: Guide, algorithm: Algorithm, codec: Codec, task: Task, config: Config) -> None:
    """Try a guide on a few prompts before anything is trained: writing, and finishing where the algorithm asks for that.

    A person is not tried: nobody likes to write for nothing.
    """
    if isinstance(guide, HumanGuide):
        return
    requests: list[Request] = []
    for index, prompt in enumerate(task.validation[:2]):
        ids = codec.prompt(prompt)
        budget = config.task.max_new_tokens
        requests.append(Request(prompt, ids, "", [], budget, config.task.min_new_tokens, index, config.seed))
        if algorithm.asks_guide_to_finish and budget > 1:
            begun = (codec.response(prompt.references[0]) if prompt.references else ids)[:1]
            text = codec.texts([ids], [begun])[0]
            minimum = max(0, config.task.min_new_tokens - 1)
            requests.append(Request(prompt, ids, text, begun, budget - 1, minimum, index, config.seed))
    try:
        ask(guide, requests)
    except RunError as error:
        raise UserError(f"probe: {error}") from error.__cause__
