"""From a config to a finished run: check everything, make or reuse the stages, train, evaluate, save."""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlgf import adapters
from rlgf.algorithms import Algorithm, guide_alone
from rlgf.config import Config, GuideConfig, override
from rlgf.errors import RunError, UserError, unknown
from rlgf.evaluate import Judges, evaluate_policy
from rlgf.experience import Models, Reading
from rlgf.finals import as_results, check_finals, evaluate_baselines, extras, final_prompts, final_results
from rlgf.guides import Accounted, FunctionGuide, Guide, ModelGuide, ReferenceGuide, Request, ask
from rlgf.guides.cache import AnswerCache
from rlgf.guides.human import HumanGuide
from rlgf.guides.local import TextModelGuide, guide_model_path
from rlgf.guides.remote import RemoteGuide
from rlgf.guides.server import Server, parse_spec, reach
from rlgf.guides.tokenizing import Tokens, reach_by_tokens
from rlgf.judge import ChatJudge, PairJudge, RewardJudge, read_question, server_settings
from rlgf.models import (
    POLICY_ADAPTER,
    VALUE_HEAD,
    Critic,
    LanguageModel,
    context_length,
    load_codec,
    load_end_ids,
    load_language_model,
    load_tokenizer,
    new_adapter_critic,
    new_critic,
    use_kernels,
)
from rlgf.offload import park
from rlgf.plugins import load_object
from rlgf.preference_stage import check_preferences, preference_stage, try_pairs
from rlgf.reward_model import load_reward_model
from rlgf.rewards import build_reward, probe_reward
from rlgf.rollout import Writing, choose_prompts, collect
from rlgf.runs import RunDirectory, identity, require_space, require_writable
from rlgf.stages import (
    Report,
    TargetExamples,
    base_is_known,
    base_model,
    distil_stage,
    fingerprint,
    guide_stage,
    guide_task,
    reward_stage,
    sft_stage,
    tokenizer_for,
)
from rlgf.supervised import Example
from rlgf.tasks import Task, TextFunction, task_kind
from rlgf.tasks.base import task_options
from rlgf.tokens import Codec
from rlgf.tracking import check_trackers
from rlgf.trainer import Parts, Progress, Trainer
from rlgf.types import GUIDE, POLICY, Origin, Prompt

JUDGES = ("preferences", "model:PATH", "server:MODEL@URL")
GUIDES = ("sft", "trained", "model:PATH", "run:DIR", "server:MODEL@URL", "human", "references", "python:module:name")


def silent(line: str) -> None:
    """A report nobody reads."""


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
        _require_finisher(algorithm, False, "references")
    if spec.startswith("server:"):
        parse_spec(spec)
        _require_finisher(algorithm, config.guide.continuation != "none", spec)
    if spec.startswith("python:"):
        _require_finisher(algorithm, FunctionGuide(load_object(spec, "guide")).capabilities.can_finish, spec)
    if spec == "trained":
        task_options(guide_task(config), kind.options)
        if not (config.guide.sft.steps or config.guide.sft.epochs):
            raise UserError("guide 'trained' has guide.sft.steps and guide.sft.epochs 0: set one, or choose another guide.")
    try:
        torch.device(config.runtime.device)
    except RuntimeError:
        raise UserError(f"runtime.device is '{config.runtime.device}': choose cpu, cuda or cuda:0.") from None
    _check_offload(config)
    if config.adapter.load_in_4bit and torch.device(config.runtime.device).type == "cpu":
        raise UserError(  # bitsandbytes packs weights for inference there, and no gradient passes through them
            "adapter.load_in_4bit needs a GPU, as bitsandbytes computes no gradients on a CPU: set runtime.device=cuda."
        )
    return algorithm


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


def judge_server(spec: str) -> tuple[str, str]:
    """Model and address of a judge `server:MODEL@URL`."""
    try:
        return parse_spec(spec)
    except UserError as error:
        raise UserError(str(error).replace("guide", "judge")) from None


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


def _require_finisher(algorithm: Algorithm, can_finish: bool, spec: str) -> None:
    if algorithm.asks_guide_to_finish and not can_finish:
        raise UserError(
            f"guide '{spec}' cannot finish a prefix that another has written, which {algorithm.title} asks of it: "
            "choose ppo_pp, or a guide that can."
        )


def prepare(config: Config, stages: Path, report: Report = silent, directory: RunDirectory | None = None) -> Parts:
    """Make or reuse every stage and assemble what a trainer needs; raises `UserError` for whatever cannot be trained.

    In `directory` is kept what a guide is paid for texts to distil, so that its limits count them.
    """
    algorithm = check(config)
    use_kernels(config.runtime.kernels)
    for warning in cautions(algorithm):
        report(f"warning: {warning}")
    wanted = needs_guide(algorithm) or config.distil.texts > 0
    # Whatever can be refused without a model is refused before one is trained.
    codec, context = starting_codec(config, stages, report)
    _check_paths(config, codec.tokenizer, context)
    task = prepare_prompts(config, codec.tokenizer, report)
    longest = _check_lengths(codec, context, task, config)
    check_finals(task, config)
    if "preferences" in (*config.reward.names, config.judge.spec):
        try_pairs(config, stages, report)
    reward = None if shares_backbone(config) else prepare_reward(config, task, stages, report)
    judge = prepare_judge(config, stages, report)
    if config.reward.minus_reference and not all(prompt.references for prompt in task.train):
        raise UserError(f"reward.minus_reference needs a reference for every prompt, which task '{task.name}' has not.")
    if reward is not None:
        probe_reward(reward, task.validation[:4])
    guide = plain_guide(config, algorithm, codec.tokenizer, longest, stages, report) if wanted else None
    if guide is not None:
        _probe_guide(guide, algorithm, codec, task, config)
    start = str(sft_stage(config, stages, report))
    reference = load_language_model(start, config.runtime.device, config.adapter.load_in_4bit).fixed()
    if wanted and guide is None:
        guide = model_guide(config, reference, stages, report)
        _probe_guide(guide, algorithm, codec, task, config)
    policy_path = start
    if config.distil.texts:
        assert guide is not None
        chosen = guide
        with _spending(guide, directory, config):
            policy_path = str(
                distil_stage(
                    config, start, lambda count: guide_examples(config, reference, chosen, task, count), stages, report
                )
            )
    models = assemble(config, algorithm, reference, start, policy_path)
    if reward is None:
        reward = prepare_reward(config, task, stages, report, models.policy)
        probe_reward(reward, task.validation[:4])
    targets = TargetExamples(task, models.policy, config.task.max_new_tokens) if config.ppo.mle_coefficient else []
    if isinstance(guide, Accounted):
        guide.take_counts()  # what was asked until here belongs to no iteration
    return Parts(config, algorithm, task, reward, models, guide, targets, general_model(config, stages, report), judge)


@contextmanager
def _spending(guide: Guide, directory: RunDirectory | None, config: Config) -> Generator[None]:
    """Keep what is asked of a guide within, however that ends, as part of what the run spends."""
    if directory is None or not isinstance(guide, Accounted):
        yield
        return
    guide.load_state(directory.load_spending())
    before = guide.state()
    try:
        yield
    finally:
        if guide.state() != before:
            directory.create(config)
            directory.save_spending(guide.state())


def assemble(config: Config, algorithm: Algorithm, reference: LanguageModel, start: str, policy_path: str) -> Models:
    """Policy, reference and critics: models of their own, or adapters on the reference's weights."""
    critic = config.critic
    policy = (
        adapted_policy(config, reference, start, policy_path)
        if config.adapter.rank or adapters.has_adapters(reference.model)
        else load_language_model(policy_path, config.runtime.device)
    )

    def new(origin: Origin) -> Critic:
        if critic.kind == "adapter":
            name = f"critic_{origin.name.lower()}"
            seed = config.seed + origin
            return new_adapter_critic(name, policy, critic.initial_value, config.adapter, seed, critic.path)
        return new_critic(critic.kind, critic.path or policy_path, policy, critic.initial_value)

    models = Models(policy, reference, {origin: new(origin) for origin in algorithm.critics})
    device = torch.device(config.runtime.device)
    for module in (
        *([reference.model] if "reference" in config.runtime.offload else []),
        *(models.critics.values() if "critic" in config.runtime.offload else []),
    ):
        park(module, device)
    return models


def adapted_policy(config: Config, reference: LanguageModel, start: str, policy_path: str) -> LanguageModel:
    """The policy as a new adapter on the reference's weights; it begins as what SFT (or a distillation) left."""
    model = reference.model
    if policy_path != start:
        if not adapters.is_adapter_folder(policy_path):
            raise UserError("a distilled policy is a whole model here, and adapters share one: set adapter.in_sft=true.")
        adapters.load(model, policy_path, POLICY_ADAPTER)
    elif reference.adapter is not None:
        adapters.copy_of(model, reference.adapter, POLICY_ADAPTER)
    else:
        adapters.add(model, POLICY_ADAPTER, config.adapter, config.seed)
    return dataclasses.replace(reference, adapter=POLICY_ADAPTER)


def merge(folder: str, out: Path) -> None:
    """Write the model that an adapter makes of its base as a whole model of its own."""
    if not adapters.is_adapter_folder(folder):
        raise UserError(f"{folder} holds no adapter (no adapter_config.json): there is nothing to merge.")
    if (Path(folder) / VALUE_HEAD).is_file() or adapters.classifies(folder):
        raise UserError(
            f"{folder} holds the adapter of a critic or a reward model, which would lose its head in a language model: give "
            "the folder of a policy."
        )
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise UserError(f"{out} is {'a file' if out.is_file() else 'not empty'}: choose another --out.")
    base = load_language_model(adapters.base_of(folder))
    whole = dataclasses.replace(base, model=adapters.merged(base.model, folder), tokenizer=load_tokenizer(folder))
    whole.save(out)


def starting_codec(config: Config, stages: Path, report: Report) -> tuple[Codec, int]:
    """How the policy takes and gives text, and its context length, before the policy is made."""
    path = config.policy or config.model.path
    if path is None:
        tokenizer = tokenizer_for(config, config.task, config.model, stages, report)[0]
        return Codec(tokenizer, config.model.architecture == "t5"), config.model.context
    return load_codec(path), context_length(path)


def starting_end_ids(config: Config, tokenizer: Any) -> tuple[int, ...]:
    """The policy's end tokens, before the policy is made."""
    path = config.policy or config.model.path
    return (int(tokenizer.eos_token_id),) if path is None else load_end_ids(path, tokenizer)


def _check_paths(config: Config, tokenizer: Any, context: int) -> None:
    """Refuse models that are named but cannot serve, from their configs and tokenizers alone."""
    path = guide_model_path(config.guide.spec)
    if path is not None:
        _check_guide_model(path, load_tokenizer(path), context_length(path), tokenizer, context)
    if config.guide.spec == "trained" and config.guide.model.path is None:
        _check_guide_model("trained", tokenizer, config.guide.model.context, tokenizer, context)
    if config.critic.path is not None and config.critic.kind == "separate":
        context_length(config.critic.path)


def _check_guide_model(name: str, tokenizer: Any, context: int, policy_tokenizer: Any, policy_context: int) -> None:
    """A guide that speaks the policy's tokens must read as many; what another tokenizer makes of a text is seen when asked."""
    if tokenizer.get_vocab() == policy_tokenizer.get_vocab() and context < policy_context:
        raise UserError(f"guide '{name}' reads {context} tokens, the policy {policy_context}: choose a longer one.")


def prepare_prompts(config: Config, tokenizer: Any, report: Report) -> Task:
    """The task's prompts, and what became of rows that are none."""
    task = task_kind(config.task).build(config.task, tokenizer)
    for reason, count in task.notes.items():
        report(f"task {task.name}: {count:,} {reason}, left out")
    for remark, count in task.remarks.items():
        report(f"task {task.name}: {count:,} {remark}")
    return task


def shares_backbone(config: Config) -> bool:
    """Whether the reward may be one more adapter on the policy's weights, which therefore come first."""
    trained = "preferences" in config.reward.names and config.preferences.lora_rank > 0
    return config.adapter.rank > 0 and (trained or any(adapters.is_adapter_folder(name) for name in config.reward.names))


def prepare_reward(
    config: Config, task: Task, stages: Path, report: Report, backbone: LanguageModel | None = None
) -> TextFunction:
    """The task's reward, trained here if need be."""
    make = {"ngram": reward_stage, "preferences": preference_stage}
    made = {name: make[name](config, stages, report) for name in config.reward.names if name in make}
    return build_reward(config.reward, task, made, config.runtime.device, backbone)


def prepare_judge(config: Config, stages: Path, report: Report) -> PairJudge | None:
    """Who compares texts with references in final evaluations, if anybody does."""
    spec, judge = config.judge.spec, config.judge
    if spec is None:
        return None
    if spec.startswith("server:"):
        template = read_question(judge.template)
        settings = server_settings(judge, template)
        cache = AnswerCache(Path(judge.cache) if judge.cache else stages / "judge-answers.sqlite")
        guide = RemoteGuide(Server(spec, settings, "none", report), settings, cache, report)
        name = f"chat model {judge_server(spec)[0]}, order {judge.order}"
        return ChatJudge(guide, name, template, judge.order, judge.answer_tokens, judge.seed)
    if spec == "preferences":
        folder = preference_stage(config, stages, report, "judge")
        name = f"a second reward model, trained on other posts ({folder.name})"
        return RewardJudge(load_reward_model(str(folder), config.runtime.device), name)
    path = spec.removeprefix("model:")
    return RewardJudge(load_reward_model(path, config.runtime.device), f"reward model {path}")


def general_model(config: Config, stages: Path, report: Report) -> LanguageModel | None:
    """The model before SFT, under which output-perplexity is measured; None where it is not wanted or there is none."""
    if not config.evaluation.output_perplexity or not base_is_known(config):
        return None
    return base_model(config, stages, report)[0]


def plain_guide(
    config: Config, algorithm: Algorithm, tokenizer: Any, longest: int, stages: Path, report: Report
) -> Guide | None:
    """The guide a config names if it is no model; refused where it cannot do what the algorithm asks.

    `tokenizer` is the policy's, `longest` the tokens of its longest prompt with a whole text.
    """
    spec = config.guide.spec
    guide: Guide
    if spec == "references":
        guide = ReferenceGuide()
    elif spec == "human":
        guide = HumanGuide(answer_cache(config, stages), offline=config.guide.offline)
    elif spec.startswith("server:"):
        cache, settings = answer_cache(config, stages), guide_settings(config)
        if settings.continuation == "token_ids":
            tokens = Tokens(tokenizer, starting_end_ids(config, tokenizer), longest)
            server = reach_by_tokens(spec, settings, tokens, cache, report)
        else:
            server = reach(spec, settings, cache, report)
        guide = RemoteGuide(server, settings, cache, report, run=fingerprint(identity(config)))
    elif spec.startswith("python:"):
        guide = FunctionGuide(load_object(spec, "guide"))
    else:
        return None
    _require_finisher(algorithm, guide.capabilities.can_finish, spec)
    return guide


def guide_settings(config: Config) -> GuideConfig:
    """The guide's settings, with the task's instruction where none is given."""
    instruction = config.guide.instruction or task_kind(config.task).instruction
    return override(config, [("guide.instruction", instruction)]).guide


def answer_cache(config: Config, stages: Path) -> AnswerCache:
    """Where the answers of guides outside this process are kept."""
    return AnswerCache(Path(config.guide.cache) if config.guide.cache else stages / "guide-answers.sqlite")


def model_guide(config: Config, reference: LanguageModel, stages: Path, report: Report) -> Guide:
    """The guide a config names as a model in this process: the SFT model, one trained here, or one to be loaded."""
    spec, decoding = config.guide.spec, config.guide.decoding
    if spec == "sft":
        return ModelGuide(reference, decoding, config.runtime.precision)
    path = str(guide_stage(config, stages, report)) if spec == "trained" else guide_model_path(spec)
    assert path is not None
    model = load_language_model(path, config.runtime.device)
    same = model.tokenizer.get_vocab() == reference.tokenizer.get_vocab() and model.codec.alone == reference.codec.alone
    return (ModelGuide if same else TextModelGuide)(model.fixed(), decoding, config.runtime.precision)


def guide_examples(config: Config, policy: LanguageModel, guide: Guide, task: Task, count: int) -> list[Example]:
    """`count` texts by the guide on training prompts, as tokens to learn."""
    writing = Writing(
        policy, guide, config.decoding, config.task.max_new_tokens, config.task.min_new_tokens, config.seed,
        config.runtime.precision,
    )  # fmt: skip
    indices = range(count)
    rollout = collect(
        writing, guide_alone(), guide_alone().plan(0, 0.0), choose_prompts(task.train, config.seed, indices, 1), indices
    )
    lengths, starts = rollout.lengths.tolist(), rollout.prompt_lengths.tolist()
    return [Example(row[:length].tolist(), start) for row, length, start in zip(rollout.ids, lengths, starts)]


def _check_lengths(codec: Codec, context: int, task: Task, config: Config) -> int:
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


def _probe_guide(guide: Guide, algorithm: Algorithm, codec: Codec, task: Task, config: Config) -> None:
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


def disk_needed(parts: Parts) -> int:
    """Bytes of what is saved at the end and of checkpoints: weights, two moments, and one being written beside the last."""
    trained = sum(value.numel() for value in parts.models.policy.parameters())
    trained += sum(value.numel() for critic in parts.models.critics.values() for value in critic.trained())
    return 4 * (2 * 3 * trained + trained) + 50_000_000


def train(
    config: Config,
    out: Path | str,
    stages: Path | str | None = None,
    report: Report = silent,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Trainer:
    """Train and evaluate one run in the folder `out`, continuing or reusing what is there. Returns the trainer.

    The trained policy is `trainer.parts.models.policy` and, on disk, `out/policy`.
    """
    out = Path(out)
    directory = RunDirectory(out, config)
    check(config)
    shelf = Path(stages) if stages else out / "stages"
    require_writable(out)
    require_space(out, 50_000_000)
    require_writable(shelf, "--stages")
    parts = prepare(config, shelf, report, directory)
    require_space(out, disk_needed(parts))
    trainer = Trainer(parts)
    directory.create(config)
    trainer.run(directory, watch)
    if directory.results is None:
        parts.models.policy.save(out / "policy")
        for origin, critic in parts.models.critics.items():
            critic.save(out / f"critic-{origin.name.lower()}")
        directory.finish(final_results(trainer, directory))
    return trainer


def asking_guide(config: Config) -> Config:
    """The config with an algorithm that asks its guide for all that it can do, so that the guide is prepared."""
    guide = config.guide
    able = guide.spec != "references" and not guide.spec.startswith("python:") and guide.continuation != "none"
    return override(config, [("algorithm.name", "aggrevated" if able else "ppo_pp"), ("distil.texts", 0)])


def evaluate_guide_at(config: Config, stages: Path, report: Report) -> dict[str, Any]:
    """The config's guide by itself, as `evaluate_policy_at` has a policy."""
    parts = prepare(override(asking_guide(config), [("evaluation.baselines", ["guide"])]), stages, report)
    row = evaluate_baselines(parts, stages, report)["guide"]
    measured = {key: row[key] for key in ("evaluation", "evaluations") if key in row}
    return {**measured, **({"judge": parts.judge.name} if parts.judge else {})}


def evaluate_policy_at(
    config: Config, policy: str | None, stages: Path, report: Report, zero_shot: bool = False
) -> dict[str, Any]:
    """A policy on the test split: `evaluation`, its metrics, `evaluations` of further splits that a task reports, and `extras`.

    Nothing is trained for RL. The policy is a folder or Hub name; None is the SFT stage, or with `zero_shot` the model before.
    """
    check(config)
    codec, _ = starting_codec(config, stages, report)
    if policy and load_tokenizer(policy).get_vocab() != codec.tokenizer.get_vocab():
        raise UserError(
            f"the policy '{policy}' has another vocabulary than the model that its texts are compared with (KL needs the same "
            "one): name that model's recipe or YAML file, or its starting point with model.path=PATH."
        )
    task = prepare_prompts(config, codec.tokenizer, report)
    check_finals(task, config)
    start = sft_stage(config, stages, report)
    reference = load_language_model(str(start), config.runtime.device)
    language_model = load_language_model(policy, config.runtime.device) if policy else reference
    if zero_shot:
        language_model = base_model(config, stages, report)[0]
    _check_lengths(language_model.codec, language_model.context, task, config)
    reward = prepare_reward(config, task, stages, report)
    reading = Reading(config.decoding, config.ppo, config.runtime.micro_batch_tokens, config.runtime.precision)
    general, judge = general_model(config, stages, report), prepare_judge(config, stages, report)
    judges = Judges(task, reward, reference, general, reading, config.evaluation, judge)
    writing = Writing(
        language_model, None, config.evaluation.decoding or config.decoding, config.task.max_new_tokens,
        config.task.min_new_tokens, config.seed, config.runtime.precision,
    )  # fmt: skip
    splits = final_prompts(task, config)
    found = {split: evaluate_policy(writing, part, judges, config.evaluation.seed)[0] for split, part in splits.items()}
    return {**as_results(found), **extras(config, writing, splits["test"], judges)}
