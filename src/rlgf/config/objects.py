"""A config from the objects of Python code: model, prompts, reward, guide, algorithm.

The config names them, so that a run can be resumed and compared: a function by its module, name and
the hash of its source, prompts and a loaded model by their content, which is written to files.
"""

import dataclasses
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rlgf.algorithms.registry import ALGORITHMS
from rlgf.config.base import flatten
from rlgf.config.loading import override
from rlgf.config.recipes import PRETRAINED, RECIPES, recipe, with_pretrained_values
from rlgf.config.schema import Config
from rlgf.config.unread import require_read, typed_setting
from rlgf.data.files import write_file
from rlgf.data.hub import FILES
from rlgf.data.scratch import scratch_folder, stage_lock
from rlgf.data.source_hash import source_hash
from rlgf.errors import ConfigError, unknown
from rlgf.types import Prompt
from rlgf.untrusted_text import show_value

PASSED = "passed:"  # begins the spec of an object that only Python code can give again
NAMED = "named:"  # begins the source of an object without one, whose version the caller names
SET_BY_ARGUMENTS = (
    "policy", "model.path", "task.name", "task.data", "reward.path", "reward.source", "guide.spec", "guide.source",
    "algorithm.name",
)  # fmt: skip
SETTINGS: Mapping[str, Any] = {  # over the recipe 'prompts'; for a pretrained model
    "recipe": "python", "pretrain.steps": 0, "sft.epochs": 0.0, "task.max_new_tokens": 64, "ppo.iterations": 100,
    **PRETRAINED, "evaluation.every": 10, "evaluation.output_perplexity": False,
}  # fmt: skip


def check_options(
    *, folders: Mapping[str, Any], callbacks: Mapping[str, Any], flags: Mapping[str, Any], settings: Any = None,
    identity: Any = None,
) -> None:  # fmt: skip
    """Raise `ConfigError` for options of a call that are of the wrong kind."""
    wrong = [(name, value, "a path") for name, value in folders.items() if not isinstance(value, str | Path | None)]
    wrong += [(name, value, "a function") for name, value in callbacks.items() if value is not None and not callable(value)]
    wrong += [(name, value, "true or false") for name, value in flags.items() if not isinstance(value, bool)]
    is_mapping = isinstance(settings, Mapping) and all(isinstance(key, str) for key in cast("Mapping[Any, Any]", settings))
    if settings is not None and not is_mapping:
        wrong.append(("settings", settings, "a dict whose keys are text"))
    if identity is not None and not (isinstance(identity, str) and identity.strip()):
        wrong.append(("identity", identity, "text that is not empty"))
    for name, value, kind in wrong:
        raise ConfigError(f"{name} is {show_value(value)}, but must be {kind}.")


@dataclass(frozen=True)
class PassedObjects:
    """The Python objects passed to a call, which its config only names."""

    reward: Callable[..., Any] | None = None
    guide: Any = None  # a guide, or a function
    files: tuple["ContentFile", ...] = ()  # the prompts and a loaded model, to be written

    def unverifiable(self) -> list[str]:
        """Return the objects without source code: changes to these cannot be detected."""
        objects = {"reward": self.reward, "guide": self.guide}
        return [name for name, value in objects.items() if value is not None and source_hash(value) is None]

    def write_files(self) -> None:
        """Write the files that do not exist yet; each appears only when it is complete."""
        for file in self.files:
            if not file.path.exists():
                file.path.parent.mkdir(parents=True, exist_ok=True)
                file.write(file.path)


@dataclass(frozen=True)
class ContentFile:
    """A file or folder named by its content, and the function that writes it."""

    path: Path
    write: Callable[[Path], Any]


def as_config(value: Config | Mapping[str, Any] | str) -> Config:
    """Return a config unchanged, or build one from a recipe's name or a dict.

    A dict has dotted or nested keys and changes the recipe that its key 'recipe' names, or the
    default config.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(value, Config):
        return value
    if isinstance(value, str):
        return recipe(value)
    if not isinstance(value, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"config is a {type(value).__name__}, but must be a Config such as rlgf.recipe('quickstart').")
    name = value.get("recipe")
    base = recipe(name) if isinstance(name, str) and name in RECIPES else Config()
    return with_pretrained_values(override(base, value, "config"), given_keys(value) or ())


def given_keys(value: Config | Mapping[str, Any] | str | None) -> list[str] | None:
    """Return the keys given over a recipe; None for a `Config`, which has all."""
    if isinstance(value, Mapping):
        return list(flatten(value))
    return None if isinstance(value, Config) else []


def config_of_objects(
    folder: Path,
    model: Any,
    tokenizer: Any,
    prompts: Any,
    reward: Any,
    guide: Any,
    algorithm: Any,
    settings: Mapping[str, Any],
    identity: str | None = None,
    base: Config | None = None,
    base_keys: Sequence[str] | None = None,
) -> tuple[Config, PassedObjects]:
    """Return the config of a call of `rlgf.train` with objects, and the objects themselves.

    Nothing is written: `PassedObjects.write_files` does that after all checks.

    Args:
        folder: where prompts and a loaded model are written, named by their content.
        model: Hub name or folder, or a loaded transformers model.
        tokenizer: of a loaded model.
        prompts: texts, conversations, `Prompt` objects or rows (docs/own-data.md), or their file.
        reward: a function of (prompts, completions), or a value of `reward.path`.
        guide: a guide, a function of requests, a loaded model, a value of `guide.spec`, or None.
        algorithm: options such as `rlgf.ppo_pp(beta=0.5)`, a name, or None.
        settings: config values by dotted key.
        identity: names the version of a reward or guide without source.
        base: the config that the objects replace parts of; None: one for a pretrained model, which
            needs a model, prompts and a reward.
        base_keys: the keys of `base` that the caller gave; None: all.

    Raises:
        ConfigError: an argument is missing or cannot be used.
    """
    given = {"model": model, "prompts": prompts, "reward": reward}
    missing = [name for name, value in given.items() if value is None]
    if missing and base is None:
        raise ConfigError(f"rlgf.train without a config needs model, prompts and reward; {', '.join(missing)} is missing.")
    changes: dict[str, Any] = {} if base is not None else dict(SETTINGS)
    files: list[ContentFile | None] = []
    guide_model = guide if hasattr(guide, "save_pretrained") else None
    if model is not None or (tokenizer is not None and guide_model is None):
        is_name = isinstance(model, str | Path)  # then the tokenizer is that of a loaded guide
        changes["policy"], file = _model(folder, model, None if is_name and guide_model is not None else tokenizer)
        files.append(file)
    if prompts is not None:
        path, file = _data(folder, prompts)
        changes["task.data"] = path
        if base is not None and base.task.name != "prompts":
            changes |= {"task.name": "prompts", "task.options": {}, "guide.options": {}}
        files.append(file)
    if reward is not None:
        path, source = (reward, None) if isinstance(reward, str) else _name(reward, "reward", identity)
        changes |= {"reward.path": path, "reward.source": source, "reward.weights": {}}
    if algorithm is not None or base is None:
        name, options = _algorithm(algorithm, guide is not None)
        changes |= {"algorithm.name": name, **{f"algorithm.options.{name}.{key}": value for key, value in options.items()}}
    for key in settings:
        if key in SET_BY_ARGUMENTS or key.startswith("reward.weights"):
            raise ConfigError(f"settings has {key}, which an argument of rlgf.train sets: leave it out.")
    if guide_model is not None:
        path, file = _model(folder, guide_model, tokenizer)
        changes |= {"guide.spec": f"model:{path}", "guide.source": None}
        files.append(file)
    elif guide is not None:
        path, source = (guide, None) if isinstance(guide, str) else _name(guide, "guide", identity)
        changes |= {"guide.spec": path, "guide.source": source}
    if base is not None and not changes and not settings:
        return base, PassedObjects()
    config = override(base or recipe("prompts"), [*changes.items(), *settings.items()], "rlgf.train")
    if base is not None and base_keys is not None:
        config = with_pretrained_values(config, [*base_keys, *settings])
    require_read([typed for key, value in settings.items() for typed in typed_setting(key, value, "settings")], [config])
    needs_guide, name = config.algorithm.build().needs_guide or config.distill.num_completions > 0, config.algorithm.name
    if guide is None and needs_guide and base is None:
        raise ConfigError(f"{name} needs a guide: give guide=, or choose algorithm=rlgf.ppo().")
    if guide is not None and not needs_guide:
        raise ConfigError(f"{name} uses no guide: leave guide= out, or choose algorithm=rlgf.ppo_pp().")
    is_named = isinstance(guide, str) or guide_model is not None
    return config, PassedObjects(
        None if isinstance(reward, str) else reward,
        None if is_named else guide,
        tuple(file for file in files if file is not None),
    )


def require_same_source(function: Any, source: str | None, what: str) -> None:
    """Raise `ConfigError` if a function's source is not the one that a config recorded."""
    if source is not None and not source.startswith(NAMED) and source_hash(function) != source:
        raise ConfigError(f"the source of {what} has changed since the run began: choose another --out, or change it back.")


def _name(value: Any, what: str, identity: str | None) -> tuple[str, str | None]:
    """Return the spec of a passed object, and the hash of its source or identity.

    It is python:module:name if that can be imported; otherwise only the same call can resume.
    """
    if not callable(value) and not hasattr(value, "complete"):
        expected = "a function, a guide or a spec" if what == "guide" else "a function or a reward.path"
        raise ConfigError(f"{what} is a {type(value).__name__}, but must be {expected}.")
    named = value if hasattr(value, "__qualname__") else type(value)
    module, name, source = named.__module__, named.__qualname__, source_hash(value)
    importable = source is not None and module != "__main__" and getattr(sys.modules.get(module), name, None) is value
    if source is None and identity is not None:
        source = NAMED + identity
    return (f"python:{module}:{name}" if importable else f"{PASSED}{module}:{name}"), source


def _algorithm(algorithm: Any, has_guide: bool) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of an algorithm, by default PPO++ with a guide."""
    if algorithm is None:
        return ("ppo_pp" if has_guide else "ppo"), {}
    name = algorithm if isinstance(algorithm, str) else getattr(algorithm, "name", type(algorithm).__name__)
    if name not in ALGORITHMS:
        raise unknown("algorithm", str(name), ALGORITHMS)
    if isinstance(algorithm, str):
        return name, {}
    if not isinstance(algorithm, ALGORITHMS[name]):
        raise ConfigError(f"algorithm is a {type(algorithm).__name__}, but must be options such as rlgf.{name}().")
    return name, dataclasses.asdict(algorithm)


def _model(folder: Path, model: Any, tokenizer: Any) -> tuple[str, ContentFile | None]:
    """Return the path of a model and, of a loaded one, the folder to write."""
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise ConfigError("tokenizer= belongs to a loaded model, and model is a name: leave it out.")
        return str(model), None
    if not hasattr(model, "save_pretrained"):
        raise ConfigError(f"model is a {type(model).__name__}, but must be a Hub name, a folder or a transformers model.")
    if tokenizer is None:
        raise ConfigError("model is a loaded model: give tokenizer= as well.")
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    with tempfile.TemporaryDirectory() as saved:  # its vocabulary, chat template and special tokens
        for file in sorted(tokenizer.save_pretrained(saved)):
            digest.update(Path(file).read_bytes() if Path(file).is_file() else b"")
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().numpy().tobytes())
    path = folder / f"model-{digest.hexdigest()[:12]}"

    def write(to: Path) -> None:
        with stage_lock(to, lambda line: None):
            if to.exists():  # another process wrote it
                return
            with scratch_folder(to, path.name.rpartition("-")[2]) as scratch:
                model.save_pretrained(scratch)
                tokenizer.save_pretrained(scratch)
                scratch.chmod(0o755)
                scratch.rename(to)

    return str(path), ContentFile(path, write)


def _data(folder: Path, prompts: Any) -> tuple[str, ContentFile | None]:
    """Return the name of the data, and the file to write if prompts are objects."""
    if isinstance(prompts, Path) or (isinstance(prompts, str) and (prompts.endswith(FILES) or Path(prompts).exists())):
        return str(prompts), None
    file = _prompts(folder, prompts)
    return str(file.path), file


def _listed(prompts: Any) -> list[Any]:
    """Convert prompts in a list, a dataset, a table or another iterable to a list."""
    if hasattr(prompts, "to_dict") and hasattr(prompts, "columns"):  # a table of pandas
        return [
            {key: getattr(cell, "item", lambda cell=cell: cell)() for key, cell in row.items()}
            for row in prompts.to_dict("records")
        ]
    if isinstance(prompts, Mapping):
        if "train" not in prompts:
            raise ConfigError(
                f"prompts is a {type(prompts).__name__}, but must be a list, a dataset or a table: give one split."
            )
        prompts = cast("Mapping[str, Any]", prompts)["train"]  # a dataset with splits
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise ConfigError("prompts must be a list of at least one prompt, a dataset, a table, or the name of a file.")
    return list(cast("Iterable[Any]", prompts))


def _prompts(folder: Path, given: Any) -> ContentFile:
    """Return the file of the prompts, as rows of JSON lines."""
    prompts = _listed(given)
    if not prompts:
        raise ConfigError("prompts must be a list of at least one prompt.")
    rows = [_row(prompt, number) for number, prompt in enumerate(prompts, 1)]
    try:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the columns of a prompt cannot be written as JSON ({error}): use text, numbers and lists."
        ) from None
    path = folder / f"prompts-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    return ContentFile(path, lambda to: write_file(to, text))


def _row(prompt: Any, number: int) -> dict[str, Any]:
    """Return a prompt as a row of the task 'prompts'."""
    if isinstance(prompt, Prompt):
        if prompt.sft_targets or prompt.ids is not None:
            raise ConfigError(
                f"prompt {number} has sft_targets or ids, which rlgf.train takes from rows alone: give a row with 'completion'."
            )
        own = {"prompt": list(prompt.messages) if prompt.messages else prompt.text}
        references = {"references": list(prompt.references)} if prompt.references else {}
        return {**prompt.columns, **own, **references}
    if isinstance(prompt, Mapping):
        if not {"prompt", "messages", "chosen"} & set(prompt):
            raise ConfigError(f"prompt {number} has no key 'prompt': it has {', '.join(map(str, prompt))}.")
        return dict(prompt)
    if isinstance(prompt, str | list):
        return {"prompt": prompt}
    raise ConfigError(f"prompt {number} is a {type(prompt).__name__}, but must be text, messages, a row or rlgf.Prompt.")
