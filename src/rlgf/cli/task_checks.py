"""The checks of `rlgf check task`: prompts, targets and the reward, on texts of the data.

A reward must give one finite number per completion, be pure and not constant; targets must continue
their prompts, and should outscore empty and shuffled text. Without targets, completions are sampled
from the model that is named, or drawn from the words of the data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlgf.algorithms.guided import PPO
from rlgf.config.schema import Config
from rlgf.data.preferences import Pairs, length_baseline
from rlgf.data.tokenization import Codec, decode
from rlgf.errors import INPUT_ERRORS, ConfigError, TrainingError
from rlgf.evaluation.intervals import show_mean
from rlgf.generation.decoder import LocalSampler
from rlgf.models.loading import load_language_model
from rlgf.pipeline import build_rewards
from rlgf.pipeline.build_models import starting_codec
from rlgf.pipeline.final_evaluation import final_prompts
from rlgf.pipeline.preflight import check_lengths
from rlgf.pipeline.prepare import prepare_prompts
from rlgf.pipeline.resolve import ResolvedRun, resolve
from rlgf.pipeline.reward_model_stage import load_pairs
from rlgf.pipeline.stage_cache import Report, StageCache, no_report
from rlgf.randomness import Purpose, permutation
from rlgf.rewards.base import mean_of, score
from rlgf.rewards.build import check_reward_columns, check_reward_names, scorers_in
from rlgf.rewards.classifier import SequenceClassifier
from rlgf.rl.rollout import RolloutConfig, collect_rollout
from rlgf.tasks.base import Task
from rlgf.types import Prompt, RewardFunction

SAMPLE = 64  # prompts whose completions are scored
MAX_WORDS = 24  # of a completion drawn from the words of the data


@dataclass(frozen=True)
class Finding:
    """One result of a check: its level ('ok', 'warning' or 'error') and its text."""

    level: str
    text: str


@dataclass(frozen=True)
class Completions:
    """Completions of prompts to score, and what they are."""

    name: str
    texts: Sequence[str]


Sample = Callable[[Sequence[Prompt]], Completions]
"""A function that completes prompts."""


def check_task(config: Config, stages: Path, report: Report) -> list[Finding]:
    """Check the prompts, targets and reward of a config's task.

    An 'error' among the findings means that the task cannot be trained.
    """
    run, cache = resolve(config), StageCache(stages, report)
    codec, context = starting_codec(run.policy.tokenizer, run.policy.base.shape.max_length, cache)
    task = prepare_prompts(run.task, codec.tokenizer, no_report)
    sizes = f"{len(task.train):,} / {len(task.validation):,} / {len(task.test):,} train, validation and test prompts"
    findings = [Finding("ok", sizes)]
    findings += [Finding("ok", f"{count:,} {reason}, dropped") for reason, count in task.dropped_rows.items()]
    findings += [Finding("ok", f"{count:,} {remark}") for remark, count in task.warnings.items()]
    findings += check_prompts(task, codec.tokenizer)
    try:
        longest = check_lengths(codec, context, task, run.task)
    except ConfigError as error:
        return [*findings, Finding("error", str(error))]
    findings.append(Finding("ok", f"prompts and completions have at most {longest:,} tokens{_of_context(context)}"))
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
    return findings + check_reward(task, build_rewards.prepare_reward(run.reward, task, folders), _sampler(run, task))


def _of_context(context: int) -> str:
    return f", of {context:,} that the model reads" if context < 10**8 else ""


def _sampler(run: ResolvedRun, task: Task) -> Sample:
    """Return a function that samples from the named model, or else from the data's words."""
    path, settings = run.policy.tokenizer.path, run.trainer
    if path is None:
        return lambda prompts: draw_words(task, prompts)

    def sample(prompts: Sequence[Prompt]) -> Completions:
        model = load_language_model(path, settings.runtime.device).freeze()
        rollout_config = RolloutConfig(
            model, LocalSampler(model, settings.runtime.precision), None, settings.sampling, settings.task.max_new_tokens,
            settings.task.min_new_tokens, settings.seed,
        )  # fmt: skip
        algorithm = PPO().build()
        rollout = collect_rollout(rollout_config, algorithm, algorithm.schedule(0, 0.0), prompts, range(len(prompts)))
        return Completions(f"completions sampled from {path}", rollout.completions)

    return sample


def draw_words(task: Task, prompts: Sequence[Prompt]) -> Completions:
    """Return completions of different lengths from the data's words in random order."""
    texts = [text for prompt in task.train[: 4 * SAMPLE] for text in (prompt.text, *prompt.references)]
    words = list(dict.fromkeys(word for text in texts for word in text.split()))
    drawn = [permutation(0, Purpose.TASK, 2000 + i, len(words))[: 1 + i % MAX_WORDS] for i in range(len(prompts))]
    return Completions("random words of the data", [" " + " ".join(words[place] for place in places) for places in drawn])


def check_pairs(pairs: Pairs) -> list[Finding]:
    """Describe the pairs that a reward model would be trained and evaluated on."""
    findings = [
        Finding("ok", f"{len(part):,} {name} pairs about {len({pair.group for pair in part}):,} posts")
        for name, part in (("training", pairs.train), ("held-out", pairs.test))
    ]
    findings += [Finding("ok", f"{count:,} {reason}, dropped") for reason, count in pairs.dropped.items()]
    rule = length_baseline([*pairs.train, *pairs.test])
    return [*findings, Finding("ok", f"people preferred the longer response in {100 * rule:.1f} % of them")]


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


def check_reward(task: Task, reward: RewardFunction, sample: Sample | None = None) -> list[Finding]:
    """Check that the reward is finite, pure and not constant.

    There must be one reward per completion. Targets should outscore empty and shuffled text.
    `sample` completes prompts if there are no targets or all of them have the same reward; None:
    random words of the data.
    """
    sample = sample or (lambda prompts: draw_words(task, prompts))
    prompts = [prompt for prompt in task.train if prompt.sft_targets][:SAMPLE]
    prompts = prompts or [prompt for prompt in task.train[:SAMPLE] if prompt.references]
    goals = [(prompt.sft_targets or prompt.references)[0] for prompt in prompts]
    has_targets, prompts = bool(prompts), prompts or list(task.train[:SAMPLE])
    try:
        main = Completions("targets", goals) if has_targets else sample(prompts)
        kinds = {main.name: main.texts, "empty texts": [""] * len(prompts)}
        if has_targets:
            kinds["shuffled targets"] = [shuffled(g, i) for i, g in enumerate(goals)]
        scores = {name: score(reward, prompts, texts) for name, texts in kinds.items()}
        again = score(reward, prompts, main.texts)
        alone = [score(reward, prompts[i : i + 1], main.texts[i : i + 1])[0] for i in range(min(4, len(prompts)))]
        together = scores[main.name]
        findings = [
            Finding("ok", f"{sum(map(len, kinds.values()))} rewards, one finite number for each completion"),
            _purity([*zip(together, again), *zip(together, alone)]),
            _spread(task, reward, scores, prompts, sample if has_targets else None),
        ]
    except TrainingError as error:
        return [Finding("error", str(error))]
    findings += [Finding("ok", f"it is {s.describe()}") for s in scorers_in(reward) if isinstance(s, SequenceClassifier)]
    means = {name: mean_of(values) for name, values in scores.items()}
    if not has_targets:
        shown = ", ".join(f"{name} {show_mean(values)}" for name, values in scores.items())
        return [*findings, Finding("ok", f"mean rewards: {shown}")]
    wanted = show_mean(scores["targets"])
    for name in ("empty texts", "shuffled targets"):
        compared = f"{name} ({show_mean(scores[name])})"
        if means["targets"] > means[name]:
            findings.append(Finding("ok", f"targets ({wanted}) outscore {compared}"))
        else:
            reason = "expected of noisy demonstrations, otherwise a sign that targets and reward disagree"
            findings.append(Finding("warning", f"targets ({wanted}) do not outscore {compared}: {reason}"))
    return findings


def _purity(pairs: Sequence[tuple[float, float]]) -> Finding:
    """Check that the reward is deterministic: a second call gives the same numbers."""
    if any(abs(a - b) > 1e-6 for a, b in pairs):
        return Finding("error", "the reward is not pure: the same completion got another number the second time or alone")
    return Finding("ok", "the reward is pure: the same completion gets the same number, alone or among others")


def _spread(
    task: Task, reward: RewardFunction, scores: dict[str, list[float]], prompts: Sequence[Prompt], sample: Sample | None
) -> Finding:
    """Check that the reward is not constant.

    A sparse reward is evaluated on more targets, and on completions of `sample`, before it is
    reported as constant. What has no targets may still be sound: nobody knows what it wants.
    """
    values, names = [value for part in scores.values() for value in part], list(scores)
    for start in range(SAMPLE, len(task.train), 4096):
        if max(values) > min(values):
            break
        part: Sequence[Prompt] = [prompt for prompt in task.train[start : start + 4096] if prompt.sft_targets]
        values += score(reward, part, [prompt.sft_targets[0] for prompt in part])
    if max(values) == min(values) and sample is not None:
        sampled = sample(prompts)
        values += score(reward, prompts, sampled.texts)
        names.append(sampled.name)
    count = len(values)
    if max(values) > min(values):
        found = f"from {min(values):.3f} to {max(values):.3f} over {count:,} completions"
        return Finding("ok", f"the reward is not constant: {found}")
    what = f"{values[0]:g} for all {count:,} completions tried ({', '.join(names)})"
    if sample is not None:
        return Finding("error", f"the reward is constant: {what}")
    more = "" if any("sampled" in name for name in names) else ": give --policy MODEL to try completions of a model"
    return Finding("warning", f"the reward was {what}, and nothing can be learned unless others occur{more}")


def shuffled(text: str, number: int) -> str:
    """Return the words of a text in a permuted order."""
    words = text.split()
    return " " + " ".join(words[i] for i in permutation(0, Purpose.TASK, 1000 + number, len(words)))
