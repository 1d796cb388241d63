"""The loop: write, appraise, update, log. Everything that differs between algorithms is in their data."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any

from rlgf.algorithms import Algorithm, Share
from rlgf.budget import most_that_fits
from rlgf.config import Config, to_dict
from rlgf.errors import RunError
from rlgf.evaluate import Judges, evaluate_policy
from rlgf.experience import Models, Reading, appraise, measure
from rlgf.guides import Accounted, Guide, Request
from rlgf.guides.prefetch import Prefetcher
from rlgf.guides.remote import RemoteGuide
from rlgf.judge import PairJudge
from rlgf.models import LanguageModel
from rlgf.profiling import profiled
from rlgf.randomness import Purpose, uniforms
from rlgf.rewards import Batch, score_parts
from rlgf.rollout import Writing, choose_prompts, collect, rollin_requests
from rlgf.runs import RunDirectory, rollout_rows
from rlgf.shaping import KLController, RewardShaper
from rlgf.supervised import Example
from rlgf.tasks import Task, TextFunction
from rlgf.tracking import Trackers
from rlgf.types import GUIDE, POLICY, Experience, Prompt, Rollout
from rlgf.update import Updater


@dataclass(frozen=True)
class Parts:
    """What a trainer is made of; `rlgf.pipeline.prepare` makes them from a config, your own code may as well."""

    config: Config
    algorithm: Algorithm
    task: Task
    reward: TextFunction
    models: Models
    guide: Guide | None
    targets: Sequence[Example]
    general: LanguageModel | None  # for output-perplexity
    judge: PairJudge | None = None  # for the win rate in final evaluations


@dataclass(frozen=True)
class Progress:
    """One iteration, for whoever watches."""

    iteration: int
    iterations: int
    metrics: Mapping[str, Any]
    spent: Mapping[str, float]  # on a guide that counts, over the whole run


class Trainer:
    """Trains `parts.models.policy` in place. Use `run`, or `collect`, `appraise` and `update` in a loop of your own."""

    def __init__(self, parts: Parts) -> None:
        config = parts.config
        self.parts, self.config = parts, config
        self.reading = Reading(config.decoding, config.ppo, config.runtime.micro_batch_tokens, config.runtime.precision)
        self.writing = Writing(
            parts.models.policy, parts.guide, config.decoding, config.task.max_new_tokens, config.task.min_new_tokens,
            config.seed, config.runtime.precision,
        )  # fmt: skip
        self.updater = Updater(parts.models, self.reading, config.kl, config.critic, parts.targets, config.seed)
        self.kl = KLController(config.kl, config.kl.coefficient)
        self.shaper = RewardShaper(config.reward, parts.reward)
        self.judges = Judges(parts.task, parts.reward, parts.models.reference, parts.general, self.reading)
        if not config.runtime.token_budget and parts.models.policy.device.type != "cpu":
            self._read_in(self._budget())
        self.prefetcher = self._prefetcher()
        self.iteration = 0  # iterations done

    def _budget(self) -> int:
        """The most tokens a micro-batch can have on this machine."""
        config, codec = self.config, self.parts.models.policy.codec
        horizon = config.task.max_new_tokens
        width = max(len(codec.prompt(prompt)) for prompt in self.parts.task.train) + horizon
        return most_that_fits(partial(self.updater.rehearse, width=width, horizon=horizon), config.ppo.minibatch_size * width)

    def _read_in(self, token_budget: int) -> None:
        """Read in micro-batches of so many tokens from now on."""
        self.reading = self.updater.reading = dataclasses.replace(self.reading, token_budget=token_budget)
        self.judges = dataclasses.replace(self.judges, reading=self.reading)

    def collect(self, iteration: int) -> Rollout:
        """Write the texts of an iteration."""
        if self.prefetcher is not None:
            self.prefetcher.ready(iteration)
        prompts, indices = self.prompts(iteration)
        samples = self.config.ppo.samples_per_prompt
        return collect(self.writing, self.parts.algorithm, self.shares(iteration), prompts, indices, samples)

    def prompts(self, iteration: int) -> tuple[list[Prompt], range]:
        """The prompts of an iteration's texts, and their global indices."""
        ppo = self.config.ppo
        first = iteration * ppo.texts_per_iteration
        indices = range(first, first + ppo.texts_per_iteration)
        return choose_prompts(self.parts.task.train, self.config.seed, indices, ppo.samples_per_prompt), indices

    def _prefetcher(self) -> Prefetcher | None:
        """Who asks a slow guide ahead for rollins, where the algorithm has any."""
        guide, config = self.parts.guide, self.config

        def requests_of(iteration: int) -> list[Request]:
            return rollin_requests(self.writing, self.parts.algorithm, self.shares(iteration), *self.prompts(iteration))

        if not isinstance(guide, RemoteGuide) or not config.guide.prefetch:
            return None
        return Prefetcher(guide, requests_of, config.guide.prefetch, config.ppo.iterations)

    def shares(self, iteration: int) -> tuple[Share, ...]:
        """How the algorithm's phases share an iteration."""
        return self.parts.algorithm.plan(iteration, float(uniforms(self.config.seed, Purpose.PHASE_COIN, iteration, 1)[0]))

    def appraise(self, rollout: Rollout, iteration: int) -> Experience:
        """Score the texts and, beside that, measure them with the models, once no reward reads with their weights."""
        shares, parts = self.shares(iteration), self.parts
        self._warm_start_critic(iteration)
        with ThreadPoolExecutor(1) as beside:
            free = Event()
            scoring = beside.submit(self._score, rollout, free)
            free.wait()
            measured = measure(rollout, shares, parts.models, self.reading, self.updater.lanes)
            scores, terms = scoring.result()
        rewards = self.shaper.shape(scores, rollout.prompts, rollout.finished.tolist())
        experience = appraise(
            rollout, shares, parts.algorithm.credit, scores, rewards, measured, self.config.ppo, self.kl.coefficient
        )
        means = {f"score/{name}": statistics.fmean(values) for name, values in terms.items()}
        return dataclasses.replace(experience, stats={**experience.stats, **means})

    def _score(self, rollout: Rollout, free: Event) -> tuple[list[float], dict[str, list[float]]]:
        """Everything that is asked of the reward in an iteration; `free` is set once the models' weights are."""
        new = self.shaper.unknown(rollout.prompts)
        batches: list[Batch] = [(rollout.prompts, rollout.texts), (new, [prompt.references[0] for prompt in new])]
        try:
            found, *baselines = score_parts(self.parts.reward, batches if new else batches[:1], free.set)
        finally:
            free.set()
        for values, _ in baselines:
            self.shaper.learn(new, values)
        return found

    def update(self, experience: Experience, iteration: int) -> dict[str, float]:
        """Learn from an experience; the policy and the critics change in place."""
        stats = self.updater.update(experience, iteration)
        if experience.stats["policy_tokens"]:  # texts by the guide alone say nothing about the policy's KL
            self.kl.update(experience.stats["kl_k1"], experience.rollout.ids.shape[0])
        self.iteration = iteration + 1
        return stats

    def step(self, iteration: int) -> tuple[dict[str, Any], Experience]:
        """One iteration: write, appraise, update. Returns its metrics (docs/metrics.md) and its experience."""
        times = [time.monotonic()]
        guide = self.parts.guide
        coefficient = self.kl.coefficient
        rollout = self.collect(iteration)
        times.append(time.monotonic())
        experience = self.appraise(rollout, iteration)
        times.append(time.monotonic())
        stats = self.update(experience, iteration)
        times.append(time.monotonic())
        seconds = {name: after - before for name, before, after in zip(("write", "appraise", "update"), times, times[1:])}
        metrics = {
            "iteration": iteration,
            "texts": (iteration + 1) * self.config.ppo.texts_per_iteration,
            "phases": sorted({self.parts.algorithm.phases[p].rollout.name.lower() for p in rollout.phase.tolist()}),
            **experience.stats,
            **rollout.counts,
            **(guide.take_counts() if isinstance(guide, Accounted) else {}),
            **stats,
            "kl_coefficient": coefficient,
            "left_out_prompts": sum(self.parts.task.notes.values()),
            **{f"seconds_{name}": value for name, value in seconds.items()},
            "seconds": sum(seconds.values()),
            "tokens_per_second": int(rollout.written.sum()) / max(sum(seconds.values()), 1e-9),
        }
        return metrics, experience

    def run(self, directory: RunDirectory | None = None, watch: Callable[[Progress], None] = lambda progress: None) -> None:
        """All iterations, from the last checkpoint on where `directory` holds one."""
        config, iterations = self.config, self.config.ppo.iterations
        trackers = Trackers(config.runtime.trackers, directory.folder / "trackers", to_dict(config)) if directory else None
        if directory:
            self._resume(directory)
        try:
            second = min(self.iteration + 1, iterations - 1)  # the first one of a process warms it up
            while self.iteration < iterations:
                if directory and config.runtime.profile and self.iteration == second:
                    done, shares = profiled(partial(self.step, self.iteration), directory.folder / "profile")
                    metrics, experience = {**done[0], "profile": shares}, done[1]
                else:
                    metrics, experience = self.step(self.iteration)
                try:
                    if self._evaluates():
                        metrics["evaluation"] = self.evaluate(self.parts.task.validation[: config.evaluation.prompts])[0]
                finally:  # a reward that fails in an evaluation must not lose the iteration before it
                    if directory and trackers:
                        self._log(directory, trackers, metrics, experience)
                watch(Progress(self.iteration, iterations, metrics, self._spent()))
        except RunError:
            if directory:
                directory.save_checkpoint(self.iteration, self.state())
            raise
        finally:
            if self.prefetcher is not None:
                self.prefetcher.close()
            if directory and self._spent():  # also when interrupted: limits count over the whole run
                directory.save_spending(self._spent())
            if trackers:
                trackers.finish()

    def _evaluates(self) -> bool:
        """Whether the iteration that was just done is followed by an evaluation."""
        every = self.config.evaluation.every
        return bool(every) and (self.iteration % every == 0 or self.iteration == self.config.ppo.iterations)

    def evaluate(self, prompts: Sequence[Any], final: bool = False) -> tuple[dict[str, float], Rollout, list[float]]:
        """Fresh texts by the policy alone on `prompts`; a final evaluation has the text metrics and the win rate too."""
        evaluation = self.config.evaluation
        judges = self.judges
        if final:
            judges = dataclasses.replace(judges, final=evaluation, judge=self.parts.judge)
        decoding = evaluation.decoding or self.config.decoding
        writing = Writing(
            self.parts.models.policy, self.parts.guide, decoding, self.writing.horizon, self.writing.minimum,
            evaluation.seed, self.writing.precision,
        )  # fmt: skip
        return evaluate_policy(writing, prompts, judges, evaluation.seed)

    def _log(self, directory: RunDirectory, trackers: Trackers, metrics: dict[str, Any], experience: Experience) -> None:
        codec = self.parts.models.policy.codec
        iteration = metrics["iteration"]
        if self._spent():  # first: a run that is killed here must not forget what it has paid
            directory.save_spending(self._spent())
        directory.log("rollouts.jsonl", rollout_rows(experience.rollout, experience.score.tolist(), iteration, codec))
        directory.log("metrics.jsonl", [metrics])
        flat = {**metrics, **{f"evaluation/{key}": value for key, value in metrics.get("evaluation", {}).items()}}
        trackers.log(flat, iteration)
        if self.iteration % self.config.runtime.checkpoint_every == 0 or self.iteration == self.config.ppo.iterations:
            directory.save_checkpoint(self.iteration, self.state())

    def _warm_start_critic(self, iteration: int) -> None:
        """Let V^π begin as a copy of V^g in the first iteration in which the policy finishes texts, where that is asked for."""
        critics, phases = self.parts.models.critics, self.parts.algorithm.phases

        def policy_finishes(number: int) -> bool:
            return any(phases[share.phase].rollout == POLICY for share in self.shares(number))

        wanted = self.config.critic.warm_start_from_guide and POLICY in critics and GUIDE in critics
        if wanted and policy_finishes(iteration) and not any(policy_finishes(number) for number in range(iteration)):
            critics[POLICY].load_weights(critics[GUIDE].weights())

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint holds. Draws need no state: they follow from seed and index."""
        return {
            "updater": self.updater.state(),
            "kl_coefficient": self.kl.coefficient,
            "reward": self.shaper.state(),
            "token_budget": self.reading.token_budget,
        }

    def _spent(self) -> Mapping[str, float]:
        """What the guide was asked and paid over the whole run, if it counts that."""
        return self.parts.guide.state() if isinstance(self.parts.guide, Accounted) else {}

    def _resume(self, directory: RunDirectory) -> None:
        checkpoint = directory.load_checkpoint()
        if checkpoint:
            self.iteration, state = checkpoint
            self.updater.load_state(state["updater"])
            self.kl.coefficient = state["kl_coefficient"]
            self.shaper.load_state(state["reward"])
            if not self.config.runtime.token_budget and "token_budget" in state:
                self._read_in(state["token_budget"])  # as it was found: a run goes on as if it had not been interrupted
        if isinstance(self.parts.guide, Accounted):
            self.parts.guide.load_state(directory.load_spending())
        directory.forget_after(self.iteration)
