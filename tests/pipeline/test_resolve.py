"""The plan of a run: who receives a whole config, and what follows from one."""

import ast
import dataclasses
from pathlib import Path

import pytest

import rlgf
from helpers import config_of, parsed
from rlgf.config.loading import override
from rlgf.config.schema import Config
from rlgf.config.specs import GuideKind, JudgeKind
from rlgf.errors import ConfigError
from rlgf.pipeline import preflight
from rlgf.pipeline.resolve import resolve
from rlgf.pipeline.run import train
from rlgf.tasks.registry import TASKS

PACKAGE = Path(rlgf.__file__).parent
# the folders and files whose functions may receive a whole config
WHOLE_CONFIG = ("cli/", "config/", "pipeline/resolve.py", "runs/directory.py")
# the public functions that receive one and resolve it at once
ENTRIES = {("pipeline/run.py", "train"), ("pipeline/run.py", "evaluate"), ("pipeline/prepare.py", "prepare")}


def receivers() -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """The functions with a parameter whose annotation names `Config`, by file."""
    found: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = {
                name.id for p in parameters if p.annotation for name in ast.walk(p.annotation) if isinstance(name, ast.Name)
            }
            if "Config" in names:
                found.append((path.relative_to(PACKAGE).as_posix(), node))
    return found


def test_only_a_few_places_receive_a_whole_config() -> None:
    others = {(file, node.name) for file, node in receivers() if not file.startswith(WHOLE_CONFIG)}
    assert others == ENTRIES


def test_the_public_functions_use_a_whole_config_only_to_resolve_it() -> None:
    for file, node in receivers():
        if (file, node.name) in ENTRIES:
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            reads = [read for read in ast.walk(node) if isinstance(read, ast.Attribute) and ast.unparse(read.value) == "config"]
            passed = [
                ast.unparse(call.func)
                for call in calls
                for argument in call.args
                if isinstance(argument, ast.Name) and argument.id == "config"
            ]
            assert set(passed) <= {"resolve", "as_config", "given_keys", "RunDirectory", "isinstance", "type"}, file
            assert reads == [], file


def test_a_run_is_resolved_and_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("_check_task", "_check_judge", "_check_guide", "_check_device", "_check_adapters"):
        check = getattr(preflight, name)
        monkeypatch.setattr(preflight, name, lambda *rest, name=name, check=check: (seen.append(name), check(*rest))[1])
    monkeypatch.setattr("rlgf.pipeline.run.resolve", lambda *rest: (seen.append("resolve"), resolve(*rest))[1])
    changes = [("evaluation.output_perplexity", False), ("evaluation.every", 0), ("runtime.trackers", [])]
    train(override(config_of(ppo__iterations=1), changes), tmp_path / "run")
    assert sorted(seen) == ["_check_adapters", "_check_device", "_check_guide", "_check_judge", "_check_task", "resolve"]


def test_specs_become_types() -> None:
    run = resolve(override(Config(), [("guide.spec", "server:m@http://h/v1"), ("judge.spec", "model:there")]))
    assert (run.guide.spec.kind, run.guide.spec.name) == (GuideKind.SERVER, "m@http://h/v1")
    assert run.judge.spec is not None
    assert (run.judge.spec.kind, run.judge.reward_name) == (JudgeKind.MODEL, "there")


@pytest.mark.parametrize(("key", "spec"), [("guide", "sft:x"), ("guide", "model"), ("judge", "model"), ("judge", "sft")])
def test_an_unknown_spec_is_refused(key: str, spec: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown {key} '{spec}'"):
        resolve(override(Config(), [(f"{key}.spec", spec)]))


def test_a_guide_that_is_trained_here_has_the_policys_tokenizer_and_weights_of_its_own() -> None:
    run = resolve(override(Config(), [("guide.spec", "trained"), ("guide.options", {"slots": 3}), ("seed", 5)]))
    assert run.guide.training is not None
    assert run.guide.training.base.tokenizer is run.policy.tokenizer
    assert run.guide.training.seed != run.policy.sft.seed == 5
    assert run.guide.training.task.config.options == {"slots": 3}


def test_the_zero_shot_model_is_the_one_that_fine_tuning_starts_from() -> None:
    run = resolve(override(Config(), [("sft.seed", 3), ("seed", 5)]))
    assert run.policy.base is run.policy.sft.base
    assert run.policy.base.new_seed == 3


def test_a_task_whose_instruction_has_no_place_for_the_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "toy_reviews", dataclasses.replace(TASKS["toy_reviews"], instruction="Go on."))
    with pytest.raises(ConfigError, match="the task's instruction does not say where"):
        resolve(Config())
