"""The training loop: collect a rollout, make an experience, update, log.

The loop is the same for all algorithms; they differ only in the data of `rlgf.algorithms.guided`.
"""

import dataclasses
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from rlgf.algorithms.base import Algorithm, PhaseWeight
from rlgf.config.schema import TrainerConfig
from rlgf.data.tokenization import Codec
from rlgf.errors import ConfigError
from rlgf.evaluation.evaluate import EvaluationContext, evaluate_policy
from rlgf.evaluation.win_rate import PairJudge
from rlgf.generation.base import Sampler
from rlgf.generation.decoder import LocalSampler
from rlgf.guides.base import CompletionRequest, Guide, TracksUsage
from rlgf.guides.prefetch import Prefetcher
from rlgf.guides.remote import RemoteGuide
from rlgf.interrupts import deferred, immediate
from rlgf.models.language_model import LanguageModel
from rlgf.models.memory import run_within_memory, searches_micro_batch_size
from rlgf.randomness import Purpose, uniforms
from rlgf.rewards.base import mean_of
from rlgf.rl.agreement import AgreementCheck
from rlgf.rl.experience import ForwardConfig, Models, TokenLogProbs, compute_log_probs, make_experience, warm_start_critic
from rlgf.rl.guards import Guard, TrainingWarnings, check_kl, find_warning_flags
from rlgf.rl.kl_controller import KLController
from rlgf.rl.rollout import RolloutConfig, collect_rollout, rollin_requests, select_prompts
from rlgf.rl.shaping import RewardShaper
from rlgf.rl.tensors import Experience, Rollout
from rlgf.rl.update import Updater
from rlgf.supervised.examples import Example
from rlgf.tasks.base import Task
from rlgf.types import Prompt, RewardFunction


@dataclass(frozen=True)
class Components:
    """The components of a trainer: config, algorithm, task, reward, models and guide.

    `rlgf.prepare` builds them from a config; your own code can build them as well.

    Example:
        >>> def reward(prompts, completions):
        ...     return [float(text.count("superb")) for text in completions]
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> components = replace(rlgf.prepare(config, Path("runs/stages")), reward=reward)
        >>> trainer = rlgf.Trainer(components)
    """

    config: TrainerConfig
    algorithm: Algorithm
    task: Task
    reward: RewardFunction
    models: Models
    guide: Guide | None
    sft_targets: Sequence[Example]
    pre_sft_model: LanguageModel | None  # for the metric output-perplexity
    judge: PairJudge | None = None  # for the win rate in final evaluations
    sampler: Sampler | None = None  # of the policy's tokens; None: the policy itself, in this process


@dataclass(frozen=True)
class Progress:
    """The progress after an iteration, as `Trainer.iterate` yields it."""

    iteration: int  # number of iterations done
    iterations: int  # of the whole run
    metrics: Mapping[str, Any]  # of this iteration, see docs/metrics.md
    experience: Experience
    guide_usage: Mapping[str, float]  # of the whole run; empty without counts
    warnings: Sequence[str] = ()  # each is reported once


StepResult = tuple[dict[str, Any], Experience]
Step = Callable[[int], StepResult]


class Trainer:
    """The trainer of a policy, which it updates in place; it opens no file.

    Iterate over `iterate()`, or call `collect_rollout`, `make_experience` and `update` in a loop of
    your own, in this order. Their `iteration` is a number from 0, from which, with the seed, all
    random numbers follow.

    Raises:
        ConfigError: the algorithm needs a critic that the components lack.

    Example:
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> trainer = rlgf.Trainer(rlgf.prepare(config, Path("runs/stages")))
        >>> for progress in trainer.iterate():
        ...     print(progress.iteration, "of", progress.iterations)
        1 of 2
        2 of 2
    """

    def __init__(self, components: Components) -> None:
        config = components.config
        missing = [origin.name.lower() for origin in components.algorithm.critics if origin not in components.models.critics]
        if missing:  # their advantages would be zero
            raise ConfigError(
                f"{components.algorithm.title} needs a critic for rollouts by the {' and the '.join(missing)}, and "
                "components.models.critics has none: add one."
            )
        self.components, self.config = components, config
        self.forward_config = ForwardConfig(
            config.sampling,
            config.ppo,
            config.runtime.micro_batch_tokens,
            config.runtime.precision,
            config.task.max_new_tokens,
        )
        self.sampler = components.sampler or LocalSampler(components.models.policy, config.runtime.precision)
        self.rollout_config = RolloutConfig(
            components.models.policy, self.sampler, components.guide, config.sampling, config.task.max_new_tokens,
            config.task.min_new_tokens, config.seed,
        )  # fmt: skip
        self.agreement = AgreementCheck(self.rollout_config, components.task.train)
        self.guard, self.warnings = Guard(config.runtime.on_nonfinite, config.runtime.max_skipped), TrainingWarnings()
        self.updater = Updater(
            components.models, self.forward_config, config.kl, config.critic, components.sft_targets, config.seed, self.guard
        )
        self.kl, self.shaper = KLController(config.kl, config.kl.coefficient), RewardShaper(config.reward, components.reward)
        self.evaluation_context = EvaluationContext(
            components.task, components.reward, components.models.reference, components.pre_sft_model, self.forward_config
        )
        if not config.runtime.token_budget and searches_micro_batch_size(components.models.policy.device):
            width = max(map(len, self.codec.prompts(components.task.train))) + config.task.max_new_tokens
            trained_models, rows = self.updater.trained_models, config.ppo.minibatch_size
            self._set_token_budget(trained_models.find_token_budget(rows, width, config.task.max_new_tokens))
        self.prefetcher = self._prefetcher()
        self.iteration = 0  # number of iterations done
        self.is_between_iterations = True  # False from the shaping of rewards to the end of the iteration

    def _set_token_budget(self, token_budget: int) -> None:
        """Set the number of tokens of a micro-batch, if it is another one."""
        if token_budget == self.forward_config.token_budget:
            return
        self.forward_config = self.updater.forward_config = dataclasses.replace(self.forward_config, token_budget=token_budget)
        self.evaluation_context = dataclasses.replace(self.evaluation_context, forward_config=self.forward_config)

    def collect_rollout(self, iteration: int) -> Rollout:
        """Generate the completions of an iteration.

        Returns:
            The rollout: token ids with origins and masks, [rows, width].

        Raises:
            GuideError: the guide fails, or returns no usable completion.
            TrainingError: sampler and trainer disagree on the log-probabilities (first call).
        """
        self.agreement.require(self.forward_config)
        if self.prefetcher is not None:
            self.prefetcher.wait_for(iteration)
        algorithm, weights, samples = (
            self.components.algorithm,
            self.phase_weights(iteration),
            self.config.ppo.samples_per_prompt,
        )
        return collect_rollout(self.rollout_config, algorithm, weights, *self.prompts(iteration), samples)

    def prompts(self, iteration: int) -> tuple[list[Prompt], range]:
        """Return the prompts of an iteration, [rows], and their global trajectory indices."""
        ppo, rows = self.config.ppo, self.config.ppo.completions_per_iteration
        indices = range(iteration * rows, (iteration + 1) * rows)
        return select_prompts(self.components.task.train, self.config.seed, indices, ppo.samples_per_prompt), indices

    def _prefetcher(self) -> Prefetcher | None:
        """Return a prefetcher that queries a remote guide for later rollins, or None."""
        guide, algorithm = self.components.guide, self.components.algorithm
        if not isinstance(guide, RemoteGuide) or not self.config.prefetch:
            return None

        def requests_of(iteration: int) -> list[CompletionRequest]:
            weights, samples = self.phase_weights(iteration), self.config.ppo.samples_per_prompt
            return rollin_requests(self.rollout_config, algorithm, weights, *self.prompts(iteration), samples)

        return Prefetcher(guide, requests_of, self.config.prefetch, self.num_iterations)

    def phase_weights(self, iteration: int) -> tuple[PhaseWeight, ...]:
        """Return the weights of the algorithm's phases in an iteration."""
        return self.components.algorithm.schedule(iteration, float(uniforms(self.config.seed, Purpose.PHASE, iteration, 1)[0]))

    def make_experience(self, rollout: Rollout, iteration: int) -> Experience:
        """Score the completions and compute log-probabilities, values and advantages.

        `rollout` is what `collect_rollout` returned for the iteration. Scoring runs in a second
        thread; the models run concurrently with it as soon as no reward uses the policy's weights.

        Returns:
            Scores [rows]; log-probabilities and KL in nats, values, returns and advantages
            [rows, width].

        Raises:
            RewardError: the reward fails, or returns no number for a completion.
            TrainingError: a quantity is not finite, or the KL divergence exceeds its bound.
        """
        phase_weights, components = self.phase_weights(iteration), self.components
        if self.config.critic.warm_start_from_guide:
            warm_start_critic(components.models, components.algorithm, self.phase_weights, iteration)

        def compute(token_budget: int) -> TokenLogProbs:
            forward_config = dataclasses.replace(self.forward_config, token_budget=token_budget)
            return compute_log_probs(
                rollout, phase_weights, components.models, forward_config, self.updater.independent_critics
            )

        with ThreadPoolExecutor(1) as executor:
            weights_released = Event()
            scoring = executor.submit(self.shaper.score, rollout, weights_released)
            weights_released.wait()
            log_probs, token_budget = run_within_memory(compute, self.forward_config.token_budget, rollout.ids.shape[1])
            self._set_token_budget(token_budget)
            scores, terms = scoring.result()
        shaper_state, self.is_between_iterations = self.shaper.state(), False
        try:
            rewards = self.shaper.shape(scores, rollout.prompts, rollout.ended_with_eos.tolist())
            experience = make_experience(
                rollout, phase_weights, components.algorithm.credit, scores, rewards, log_probs, self.config.ppo,
                self.kl.coefficient, components.algorithm.baseline,
            )  # fmt: skip
            means = {f"score/{name}": mean_of(values) for name, values in terms.items()}
            stats = {**experience.stats, **means, **find_warning_flags(rollout, scores, experience.stats)}
            is_finite = self.guard.check_experience(experience, rewards, iteration, self.updater.steps_per_iteration)
            check_kl(stats["kl_k1"], self.config.kl.stop_above, iteration)
        except BaseException:  # in the checkpoint that follows, the iteration is not done
            self.shaper.load_state(shaper_state)
            self.is_between_iterations = True
            raise
        if not is_finite:  # its rewards must not remain in the running scale of later ones
            self.shaper.load_state(shaper_state)
        return dataclasses.replace(experience, is_finite=is_finite, stats=stats)

    def update(self, experience: Experience, iteration: int) -> dict[str, float]:
        """Update policy, critics and KL coefficient with the iteration's `experience`.

        Returns:
            The metrics of the update (docs/metrics.md).

        Raises:
            TrainingError: a loss or gradient norm is not finite, before the optimizer step.
        """
        self.agreement.require(self.forward_config, experience.rollout)
        stats = self.updater.update(experience, iteration)
        self._set_token_budget(self.updater.forward_config.token_budget)  # smaller if memory ran out
        if experience.is_finite and experience.stats["policy_tokens"]:  # without policy tokens there is no KL estimate
            self.kl.update(experience.stats["kl_k1"], experience.rollout.ids.shape[0])
        self.sampler.sync(self.components.models.policy)
        self.iteration, self.is_between_iterations = iteration + 1, True
        return stats

    def step(self, iteration: int) -> tuple[dict[str, Any], Experience]:
        """Run one iteration: collect a rollout, make an experience, update.

        Returns:
            The metrics of the iteration (docs/metrics.md) and its experience.
        """
        began, guide, coefficient = time.monotonic(), self.components.guide, self.kl.coefficient
        with immediate():  # until the completions are there, the state is that of the last iteration's end
            rollout = self.collect_rollout(iteration)
        collected = time.monotonic()
        experience = self.make_experience(rollout, iteration)
        made = time.monotonic()
        stats = self.update(experience, iteration)
        seconds = {"rollout": collected - began, "experience": made - collected, "update": time.monotonic() - made}
        metrics = {
            "iteration": iteration,
            "completions": (iteration + 1) * self.config.ppo.completions_per_iteration,
            "phases": sorted({self.components.algorithm.phases[p].rollout.name.lower() for p in rollout.phase.tolist()}),
            **experience.stats,
            **rollout.counters,
            **(guide.pop_metrics() if isinstance(guide, TracksUsage) else {}),
            **stats,
            "kl_coefficient": coefficient,
            "dropped_prompts": sum(self.components.task.dropped_rows.values()),
            **{f"seconds_{name}": value for name, value in seconds.items()},
            "seconds": sum(seconds.values()),
            "tokens_per_second": int(rollout.completion_mask.sum()) / max(sum(seconds.values()), 1e-9),
        }
        return metrics, experience

    @property
    def num_iterations(self) -> int:
        """Return the number of iterations of the whole run."""
        return self.config.ppo.iterations

    @property
    def codec(self) -> Codec:
        """Return the codec of the policy."""
        return self.components.models.policy.codec

    def iterate(
        self, run_step: Callable[[Step, int], StepResult] = lambda step, iteration: step(iteration)
    ) -> Generator[Progress]:
        """Run the remaining iterations, with evaluations on the validation split as configured.

        `run_step` calls the step of an iteration, for example under a profiler. A signal ends the
        loop at once while completions are collected or evaluated, otherwise after the iteration.

        Yields:
            The progress after each iteration; also before an error of its evaluation is raised.

        Raises:
            TrainingError: a guide or a reward failed.
        """
        self.prefetcher = self.prefetcher or self._prefetcher()
        try:
            while self.iteration < self.num_iterations:
                with deferred(f"iteration {self.iteration + 1} of {self.num_iterations}"):
                    metrics, experience = run_step(self.step, self.iteration)
                    failure: BaseException | None = None
                    try:
                        with immediate():
                            metrics |= self.evaluate_if_due()
                    except BaseException as error:  # the caller records the iteration first
                        failure = error
                    usage, warnings = self.guide_usage(), self.warnings.new_warnings(metrics)
                    yield Progress(self.iteration, self.num_iterations, metrics, experience, usage, warnings)
                if failure is not None:
                    raise failure
        finally:
            if self.prefetcher is not None:
                self.prefetcher.close()
                self.prefetcher = None  # an abandoned loop may be resumed

    def evaluate_if_due(self) -> dict[str, dict[str, float]]:
        """Return 'evaluation' on the validation split if one follows the iteration just done."""
        is_last = self.iteration == self.num_iterations and self.config.evaluation.every > 0
        if not is_last and not self.is_evaluation_due():
            return {}
        return {"evaluation": self.evaluate(self.components.task.validation[: self.config.evaluation.prompts])[0]}

    def is_evaluation_due(self) -> bool:
        """Return whether `evaluation.every` iterations have passed since the last evaluation."""
        return self.config.evaluation.every > 0 and self.iteration % self.config.evaluation.every == 0

    def evaluate(self, prompts: Sequence[Any], final: bool = False) -> tuple[dict[str, float], Rollout, list[float]]:
        """Evaluate the policy on completions that it generates without the guide.

        Args:
            prompts: the prompts to complete.
            final: whether to compute the text metrics and the win rate as well.

        Returns:
            The metrics, the rollout, and the scores, [rows].
        """
        evaluation = self.config.evaluation
        final_fields: dict[str, Any] = {"final": evaluation, "judge": self.components.judge} if final else {}
        context = dataclasses.replace(self.evaluation_context, **final_fields)
        sampling = evaluation.sampling or self.config.sampling
        rollout_config = dataclasses.replace(self.rollout_config, sampling=sampling, seed=evaluation.seed)
        return evaluate_policy(rollout_config, prompts, context, evaluation.seed)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint.

        Random numbers need no state: they are functions of seed and index.
        """
        return {
            "updater": self.updater.state(),
            "kl_coefficient": self.kl.coefficient,
            "reward": self.shaper.state(),
            "token_budget": self.forward_config.token_budget,
        }

    def load_state(self, iteration: int, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint.

        Args:
            iteration: the number of iterations done.
            state: what `state` returned then, of a trainer with the same components.
        """
        self.iteration = iteration
        self.updater.load_state(state["updater"])
        self.kl.coefficient = state["kl_coefficient"]
        self.shaper.load_state(state["reward"])
        if not self.config.runtime.token_budget and "token_budget" in state:  # not searched again: runs stay equal
            self._set_token_budget(state["token_budget"])
        self.sampler.sync(self.components.models.policy)

    def save_policy(self, folder: Path) -> None:
        """Write weights and tokenizer of the policy to `folder`, for `from_pretrained`."""
        self.components.models.policy.save(folder)

    def guide_usage(self) -> Mapping[str, float]:
        """Return the guide's usage and costs over the whole run; empty without counts."""
        return self.components.guide.state() if isinstance(self.components.guide, TracksUsage) else {}

    def load_guide_usage(self, usage: Mapping[str, float]) -> None:
        """Add the guide's `usage` in an earlier part of the run."""
        if isinstance(self.components.guide, TracksUsage):
            self.components.guide.load_state(usage)
