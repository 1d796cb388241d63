"""From a config to a finished run: check everything, make or reuse the stages, train, evaluate, save."""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlgf import adapters
from rlgf.algorithms import Algorithm, guide_alone
from rlgf.config import Config, GuideConfig, override
from rlgf.errors import UserError
from rlgf.evaluate import Judges, evaluate_policy
from rlgf.experience import Models, Reading
from rlgf.finals import as_results, check_finals, evaluate_baselines, extras, final_prompts, final_results
from rlgf.guides import Accounted, FunctionGuide, Guide, ModelGuide, ReferenceGuide
from rlgf.guides.cache import AnswerCache
from rlgf.guides.human import HumanGuide
from rlgf.guides.local import TextModelGuide, guide_model_path
from rlgf.guides.remote import RemoteGuide
from rlgf.guides.server import reach
from rlgf.guides.tokenizing import Tokens, reach_by_tokens
from rlgf.judge import PairJudge, RewardJudge, chat_judge, probe_judge
from rlgf.models import (
    POLICY_ADAPTER,
    Critic,
    LanguageModel,
    context_length,
    load_codec,
    load_end_ids,
    load_language_model,
    load_tokenizer,
    new_adapter_critic,
    new_critic,
    refuse_other_heads,
    use_kernels,
)
from rlgf.offload import park
from rlgf.plugins import load_object
from rlgf.preference_stage import preference_stage, try_pairs
from rlgf.refusals import (
    cautions,
    check,
    check_base,
    check_lengths,
    check_paths,
    check_to_train,
    judge_names,
    needs_guide,
    probe_guide,
    require_finisher,
)
from rlgf.reward_model import load_reward_model
from rlgf.rewards import build_reward, check_names, check_reads, probe_reward
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
    reward_stage,
    sft_stage,
    tokenizer_for,
)
from rlgf.supervised import Example
from rlgf.tasks import Task, TextFunction, task_kind
from rlgf.tokens import Codec
from rlgf.trainer import Parts, Progress, Trainer
from rlgf.types import Origin

PROBED = 4  # prompts on which a reward is tried before anything is trained


def silent(line: str) -> None:
    """A report nobody reads."""


def prepare(config: Config, stages: Path, report: Report = silent, directory: RunDirectory | None = None) -> Parts:
    """Make or reuse every stage and assemble what a trainer needs; raises `UserError` for whatever cannot be trained.

    In `directory` is kept what a guide is paid for texts to distil, so that its limits count them.
    """
    algorithm = check_to_train(config)
    use_kernels(config.runtime.kernels)
    for warning in cautions(algorithm):
        report(f"warning: {warning}")
    wanted = needs_guide(algorithm) or config.distil.texts > 0
    # Whatever can be refused without a model is refused before one is trained.
    codec, context = starting_codec(config, stages, report)
    check_paths(config, codec.tokenizer, context)
    task = prepare_prompts(config, codec.tokenizer, report)
    longest = check_lengths(codec, context, task, config)
    check_finals(task, config)
    check_reads(config.reward, "training", task.train)
    check_reads(config.reward, "validation", task.validation[: max(PROBED, config.evaluation.prompts)])
    if "preferences" in (*config.reward.names, config.judge.spec):
        try_pairs(config, stages, report)
    probe_judge(config.judge, task.test, stages, report)
    if config.reward.minus_reference and not all(prompt.references for prompt in task.train):
        raise UserError(f"reward.minus_reference needs a reference for every prompt, which task '{task.name}' has not.")
    made = make_rewards(config, stages, report)  # before other models need memory
    reward = None if on_backbone(config, config.reward.names) else prepare_reward(config, task, made)
    judge = None if on_backbone(config, judge_names(config)) else prepare_judge(config, made, stages, report)
    if reward is not None:
        probe_reward(reward, task.validation[:PROBED])
    guide = plain_guide(config, algorithm, codec.tokenizer, longest, stages, report) if wanted else None
    if guide is not None:
        probe_guide(guide, algorithm, codec, task, config)
    start = str(sft_stage(config, stages, report))
    reference = load_language_model(start, config.runtime.device, config.adapter.load_in_4bit).fixed()
    if wanted and guide is None:
        guide = model_guide(config, reference, stages, report)
        probe_guide(guide, algorithm, codec, task, config)
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
        reward = prepare_reward(config, task, made, models.policy)
        probe_reward(reward, task.validation[:PROBED])
    judge = judge or prepare_judge(config, made, stages, report, models.policy)
    targets = TargetExamples(task, models.policy, config.task.max_new_tokens) if config.ppo.mle_coefficient else []
    if isinstance(guide, Accounted):
        guide.take_counts()  # what was asked until here belongs to no iteration
    general = general_model(config, reference, stages, report)
    return Parts(config, algorithm, task, reward, models, guide, targets, general, judge)


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
        if config.adapter.rank or reference.adapter is not None
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
        adapters.load(model, policy_path, POLICY_ADAPTER)
    elif reference.adapter is not None:
        adapters.copy_of(model, reference.adapter, POLICY_ADAPTER)
    else:
        adapters.add(model, POLICY_ADAPTER, config.adapter, config.seed)
    return dataclasses.replace(reference, adapter=POLICY_ADAPTER)


def merge(folder: str, out: Path) -> None:
    """Write the model that an adapter makes of its base as a whole model of its own."""
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}: give that of a run, or of an adapter.")
    if adapters.is_adapter_folder(str(Path(folder) / "policy")):  # a run
        folder = str(Path(folder) / "policy")
    if not adapters.is_adapter_folder(folder):
        raise UserError(f"{folder} holds no adapter (no adapter_config.json): there is nothing to merge.")
    refuse_other_heads(folder)
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


def prepare_prompts(config: Config, tokenizer: Any, report: Report) -> Task:
    """The task's prompts, and what became of rows that are none."""
    task = task_kind(config.task).build(config.task, tokenizer)
    for reason, count in task.notes.items():
        report(f"task {task.name}: {count:,} {reason}, left out")
    for remark, count in task.remarks.items():
        report(f"task {task.name}: {count:,} {remark}")
    return task


def on_backbone(config: Config, names: Sequence[str]) -> bool:
    """Whether any of these reward models may be one more adapter on the policy's weights, which therefore come first."""
    trained = "preferences" in names and config.preferences.lora_rank > 0
    adapted = config.adapter.rank > 0 or (config.policy is not None and adapters.is_adapter_folder(config.policy))
    return adapted and (trained or any(adapters.is_adapter_folder(name) for name in names))


def make_rewards(config: Config, stages: Path, report: Report) -> dict[str, Path]:
    """Train, or find again, the rewards that are stages, and the judge's, 'judge'; the folder of each."""
    make = {"ngram": reward_stage, "preferences": preference_stage}
    made = {name: make[name](config, stages, report) for name in config.reward.names if name in make}
    if config.judge.spec == "preferences":
        made["judge"] = preference_stage(config, stages, report, "judge")
    return made


def prepare_reward(config: Config, task: Task, made: Mapping[str, Path], backbone: LanguageModel | None = None) -> TextFunction:
    """The task's reward; `made` has the stages of `make_rewards`."""
    return build_reward(config.reward, task, made, config.runtime.device, backbone)


def prepare_judge(
    config: Config, made: Mapping[str, Path], stages: Path, report: Report, backbone: LanguageModel | None = None
) -> PairJudge | None:
    """Who compares texts with references in final evaluations, if anybody does; `made` has the stages of `make_rewards`."""
    spec = config.judge.spec
    if spec is None:
        return None
    if spec.startswith("server:"):
        return chat_judge(config.judge, stages, report)
    if spec == "preferences":
        path, name = str(made["judge"]), f"a second reward model, trained on other posts ({made['judge'].name})"
    else:
        path = spec.removeprefix("model:")
        name = f"reward model {path}"
    return RewardJudge(load_reward_model(path, config.runtime.device, backbone=backbone), name)


def general_model(config: Config, reference: LanguageModel, stages: Path, report: Report) -> LanguageModel | None:
    """The model before SFT, under which output-perplexity is measured; None where it is not wanted or there is none.

    Where the reference is an adapter on its weights, or these weights themselves, it is no copy.
    """
    if not config.evaluation.output_perplexity or not base_is_known(config):
        return None
    return base_model(config, stages, report, reference).fixed()


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
    require_finisher(algorithm, guide.capabilities.can_finish, spec)
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
    model = load_language_model(path, config.runtime.device, beside=reference, name="guide")
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
    check_base(config, codec.tokenizer)
    check_names((*config.reward.names, *judge_names(config)))
    task = prepare_prompts(config, codec.tokenizer, report)
    check_finals(task, config)
    probe_judge(config.judge, task.test, stages, report)
    start = sft_stage(config, stages, report)
    made, in_4bit, device = make_rewards(config, stages, report), config.adapter.load_in_4bit, config.runtime.device
    reference = language_model = load_language_model(str(start), device, in_4bit).fixed()
    if policy:
        in_4bit = in_4bit and adapters.is_adapter_folder(policy)
        language_model = load_language_model(policy, device, in_4bit, reference, POLICY_ADAPTER).fixed()
    if zero_shot:
        language_model = base_model(config, stages, report, reference).fixed()
    check_lengths(language_model.codec, language_model.context, task, config)
    reward = prepare_reward(config, task, made, reference)
    reading = Reading(config.decoding, config.ppo, config.runtime.micro_batch_tokens, config.runtime.precision)
    general = general_model(config, reference, stages, report)
    judge = prepare_judge(config, made, stages, report, reference)
    judges = Judges(task, reward, reference, general, reading, config.evaluation, judge)
    writing = Writing(
        language_model, None, config.evaluation.decoding or config.decoding, config.task.max_new_tokens,
        config.task.min_new_tokens, config.seed, config.runtime.precision,
    )  # fmt: skip
    splits = final_prompts(task, config)
    found = {split: evaluate_policy(writing, part, judges, config.evaluation.seed)[0] for split, part in splits.items()}
    return {**as_results(found), **extras(config, writing, splits["test"], judges)}
