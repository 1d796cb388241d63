"""The names of other tools for our settings, and the nearest valid name."""

import difflib
from collections.abc import Iterable, Sequence

SYNONYMS: dict[str, tuple[str, ...]] = {
    "ppo.learning_rate": ("lr", "learning_rate", "policy_lr", "actor_lr", "policy_learning_rate", "actor_learning_rate"),
    "critic.learning_rate": ("critic_lr", "value_lr", "value_learning_rate", "critic_learning_rate"),
    "ppo.iterations": (
        "iterations", "max_steps", "total_steps", "num_steps", "steps", "num_iterations", "total_episodes", "num_updates",
        "total_training_steps", "total_epochs",
    ),
    "ppo.epochs": ("epochs", "num_ppo_epochs", "ppo_epochs", "num_train_epochs", "num_epochs", "noptepochs"),
    "ppo.completions_per_iteration": (
        "batch_size", "train_batch_size", "rollout_batch_size", "per_device_train_batch_size", "completions", "num_rollouts",
    ),
    "ppo.minibatch_size": ("mini_batch_size", "minibatch", "ppo_mini_batch_size", "num_mini_batches", "num_minibatches"),
    "ppo.samples_per_prompt": (
        "num_generations", "group_size", "num_samples", "num_return_sequences", "n_samples_per_prompt", "rollout_n",
        "rloo_k", "samples_per_prompt", "best_of",
    ),
    "runtime.token_budget": ("micro_batch_size", "gradient_accumulation_steps", "max_tokens_per_batch", "ppo_max_token_len"),
    "ppo.clip_range": ("cliprange", "clip_range", "clip_eps", "clip_ratio", "clip_epsilon", "epsilon", "eps_clip", "clip"),
    "critic.value_clip": ("cliprange_value", "value_clip", "clip_range_vf"),
    "critic.value_coefficient": ("vf_coef", "value_loss_coef", "value_coef", "vf_coefficient"),
    "ppo.gae_lambda": ("lam", "lambda", "lambd", "gae_lambda"),
    "ppo.gamma": ("discount", "discount_factor", "gamma"),
    "ppo.max_grad_norm": ("max_norm", "grad_clip", "max_grad_norm", "gradient_clipping", "clip_grad"),
    "ppo.schedule": ("lr_scheduler", "lr_scheduler_type", "lr_schedule", "scheduler"),
    "ppo.whiten_advantages": ("normalize_advantages", "adv_norm", "whiten_advantages", "normalize_advantage"),
    "ppo.loss_aggregation": ("loss_type", "loss_agg_mode", "loss_aggregation"),
    "ppo.mle_coefficient": ("ptx_coef", "pretrain_coef", "sft_coef", "mle_coef"),
    "kl.coefficient": (
        "beta", "kl_coef", "init_kl_coef", "kl_coeff", "kl_beta", "kl_penalty", "kl_coefficient", "kl_loss_coef", "kl",
        "kl_weight",
    ),
    "kl.controller": ("adap_kl_ctrl", "adaptive_kl", "kl_ctrl", "kl_controller"),
    "task.max_new_tokens": (
        "max_new_tokens", "max_completion_length", "response_length", "max_length", "max_response_length", "max_tokens",
        "generate_max_len", "max_gen_len",
    ),
    "task.min_new_tokens": ("min_length", "min_new_tokens", "min_tokens"),
    "task.options.prompt_tokens": ("max_prompt_length", "prompt_length", "prompt_max_len", "max_source_length"),
    "task.options.prompt_column": ("prompt_column", "input_key", "prompt_key", "question_column", "text_column"),
    "task.options.completion_column": ("completion_column", "output_key", "label_key", "answer_column", "response_column"),
    "task.data": ("dataset", "dataset_name", "train_dataset", "data", "train_file", "data_path", "train_files"),
    "task.name": ("task",),
    "policy": (
        "model", "model_name", "model_name_or_path", "model_path", "actor", "pretrained", "base_model", "pretrain_model",
        "policy_model",
    ),
    "reward.path": (
        "reward", "reward_model", "reward_funcs", "reward_func", "reward_fn", "reward_function", "reward_model_path", "rm",
        "reward_model_name_or_path", "reward_path",
    ),
    "reward.weights": ("reward_weights",),
    "reward.normalize": ("whiten_rewards", "normalize_rewards", "scale_rewards", "normalize_reward", "use_score_norm"),
    "reward.clip": ("reward_clip", "cliprange_reward", "score_clip", "reward_clip_range"),
    "reward.missing_eos_penalty": ("missing_eos_penalty", "non_eos_penalty"),
    "guide.spec": ("guide", "teacher", "teacher_model", "expert", "guide_model", "teacher_model_name_or_path"),
    "judge.spec": ("judge", "judge_model"),
    "algorithm.name": ("algorithm", "algo", "adv_estimator", "advantage_estimator"),
    "sampling.temperature": ("temperature", "temp"),
    "sampling.top_p": ("top_p", "topp"),
    "sampling.top_k": ("top_k", "topk"),
    "lora.rank": ("lora_r", "lora_rank", "r"),
    "lora.alpha": ("lora_alpha",),
    "lora.target_modules": ("target_modules", "lora_target_modules"),
    "lora.load_in_4bit": ("load_in_4bit", "use_4bit", "quantization"),
    "critic.warmup_iterations": ("critic_warmup", "critic_warmup_iters", "freezing_actor_steps"),
    "evaluation.every": ("eval_steps", "eval_every", "eval_interval", "test_freq", "evaluation_steps", "eval_freq"),
    "runtime.device": ("device", "gpu", "use_cpu", "no_cuda"),
    "runtime.precision": ("bf16", "fp16", "dtype", "torch_dtype", "mixed_precision", "precision"),
    "runtime.threads": ("num_threads", "threads", "num_workers"),
    "runtime.trackers": ("report_to", "log_with", "wandb", "logger", "tensorboard", "use_wandb", "trackers"),
    "runtime.checkpoint_every": ("save_steps", "save_freq", "save_interval", "checkpoint_every", "save_every"),
    "runtime.keep_checkpoints": ("save_total_limit", "max_checkpoints", "keep_checkpoints"),
    "--out": ("output_dir", "out", "output", "save_path", "out_dir", "default_local_dir", "logging_dir"),
}  # fmt: skip
"""Our keys, each with what people type for it."""

NOTES = {
    ("policy", "policy"): "as it is; --sft-from fine-tunes it first",
    ("kl.coefficient", "beta"): "the weight of the KL penalty; --beta is how often the guide begins",
    ("ppo.completions_per_iteration", "batch_size"): "ppo.minibatch_size is that of an optimizer step",
}
"""What is added to a hint, by our key and the name that was typed; 'policy' stands for any name."""

FLAGS = {
    "policy": "--policy", "guide.spec": "--guide", "task.data": "--data", "algorithm.name": "--algorithm",
    "ppo.iterations": "--iterations", "--out": "--out",
}  # fmt: skip
"""Our keys that have an option of the command line."""

NAMES = {
    "ppo++": "ppo_pp", "ppopp": "ppo_pp", "ppo_plus_plus": "ppo_pp", "ppoplusplus": "ppo_pp", "ppo_plusplus": "ppo_pp",
    "ppo+": "ppo_pp", "ppo_plus": "ppo_pp", "aggrevate": "aggrevated", "aggravated": "aggrevated", "aggrevate_d": "aggrevated",
    "d2_lols": "d2lols", "d²lols": "d2lols",
}  # fmt: skip
"""Names of values as they are written elsewhere."""

OTHER_MODELS = ("guide", "judge", "preferences", "sft", "pretrain", "distill")
"""Sections of other models and stages than the policy in training by reinforcement learning."""

_KEYS = {name: key for key, names in SYNONYMS.items() for name in names}


def normalize(name: str) -> str:
    """Return a name in lower case, without hyphens at its beginning and with underscores."""
    return name.strip().lstrip("-").lower().replace("-", "_").replace(" ", "_")


def known_as(name: str) -> str | None:
    """Return our key for a name of other tools, or None."""
    return _KEYS.get(normalize(name))


def closest(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid name that was meant, or None if none is near enough.

    Spelling in other letters or with other separators comes first, then names of other tools, then
    typing errors: at most about one letter in four.
    """
    names, typed = sorted(valid), normalize(name)
    same = {normalize(each): each for each in names}
    for candidate in (typed, NAMES.get(typed), (known_as(name) or "").rpartition(".")[2]):
        if candidate and candidate in same:
            return same[candidate]
    near = difflib.get_close_matches(typed, list(same), n=1, cutoff=0.72)
    return same[near[0]] if near else None


def closest_key(key: str, valid: Sequence[str]) -> str | None:
    """Return the dotted key that was meant, or None if none is near enough."""
    section, _, last = key.rpartition(".")
    fields = {name: name.rpartition(".")[2] for name in valid}
    inside = [name for name in valid if section and name.startswith(f"{section}.")]
    same_inside = [name for name in inside if normalize(fields[name]) == normalize(last)]
    if same_inside:  # a section between them was left out
        return difflib.get_close_matches(key, same_inside, n=1, cutoff=0.0)[0]
    synonym = known_as(last)
    if synonym is not None:
        field, top = synonym.rpartition(".")[2], section.partition(".")[0]
        meant = f"{section}.{field}"  # the same of the section that was typed
        if not section or meant in valid:
            return meant if section else synonym
        near = [name for name in valid if name.startswith(f"{top}.") and fields[name] == field]
        if top in OTHER_MODELS:  # a setting of the policy's own training is not theirs
            return difflib.get_close_matches(key, near, n=1, cutoff=0.0)[0] if near else None
        return synonym
    same = [name for name in valid if normalize(fields[name]) == normalize(last)]
    if same:
        return difflib.get_close_matches(key, same, n=1, cutoff=0.0)[0]
    if section and (field := closest(last, [fields[name] for name in inside if name.count(".") == section.count(".") + 1])):
        return f"{section}.{field}"
    if section and not inside and (near := closest(section.partition(".")[0], [name for name in valid if "." not in name])):
        return closest_key(f"{near}{key[len(section.partition('.')[0]) :]}", valid)  # the section is mistyped
    if not inside and (field := closest(last, dict.fromkeys(fields.values()))):
        return next(name for name in valid if fields[name] == field)
    return None


def explain(key: str, typed: str) -> str:
    """Return an explanation to add to a hint in parentheses, or an empty text."""
    note = NOTES.get((key, normalize(typed.rpartition(".")[2]))) or NOTES.get((key, key))
    return f" ({note})" if note else ""


def option_hint(option: str, valid: Iterable[str]) -> str | None:
    """Return a hint for an unknown option of the command line, or None.

    Args:
        option: as it was typed, such as '--lr'.
        valid: the options there are.
    """
    options = [name for name in valid if name.startswith("--")]
    key = known_as(option)
    if key is not None and FLAGS.get(key) in options:
        return f"did you mean {FLAGS[key]}{explain(key, option)}?"
    if key is not None and not key.startswith("--"):
        return f"did you mean {key}=VALUE{explain(key, option)}? Settings are given as section.field=value."
    near = closest(option, [name.lstrip("-") for name in options])
    return f"did you mean --{near}?" if near else None
