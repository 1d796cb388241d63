"""Try random nonsense on everything that rlgf reads: `python tools/fuzz.py --count 2000`.

Sorts of input: configs as typed (`command line`) and as objects (`python`), data files, files of a
run (flipped, cut, emptied, removed), responses of guides and of rewards. Hypothesis draws
the inputs. Each input must be used correctly or refused with one sentence by an error of rlgf; a
traceback, or silence where a number is nonsense, fails. The counts are printed.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from rlgf.cli.console import quiet
from rlgf.cli.options import read_config
from rlgf.config.base import flatten, to_dict
from rlgf.config.loading import all_keys, override
from rlgf.config.recipes import recipe
from rlgf.config.schema import Config
from rlgf.config.sections import TaskConfig
from rlgf.errors import RlgfError

LONGEST_MESSAGE = 1_000
TINY: list[tuple[str, Any]] = [
    ("task.options", {"slots": 2, "train_prompts": 32, "held_out_prompts": 4}), ("task.max_new_tokens", 5),
    ("task.min_new_tokens", 0), ("model.layers", 1), ("model.width", 16), ("model.heads", 2), ("guide.spec", "sft"),
    ("sft.steps", 2), ("sft.batch_size", 4), ("ppo.iterations", 2), ("ppo.completions_per_iteration", 4),
    ("ppo.minibatch_size", 4), ("evaluation.every", 1), ("evaluation.prompts", 4), ("evaluation.final_prompts", 4),
    ("runtime.trackers", []), ("runtime.checkpoint_every", 1), ("algorithm.name", "ppo_pp"),
]  # fmt: skip


class FoundError(AssertionError):
    """An input that was neither used correctly nor refused in one sentence."""


def refused(error: RlgfError) -> str:
    """Check an error's sentence; return the outcome."""
    text = str(error)
    if not text.strip() or len(text) > LONGEST_MESSAGE or text.rstrip()[-1] not in ".?":
        raise FoundError(f"not one sentence: {text[:500]!r}")
    return "refused"


# --- configs ------------------------------------------------------------------------------------

NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**63, 10**30, 10**400, -0.0, 1e-300, 1e30, 1e300, math.inf, -math.inf, math.nan, 0.5, 1.5, 2147483648.0]
)
VALUES = st.one_of(
    NUMBERS, st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=40), st.binary(max_size=8),
    st.lists(st.one_of(NUMBERS, st.text(max_size=5)), max_size=3),
    st.dictionaries(st.text(max_size=5), st.one_of(NUMBERS, st.text(max_size=5), st.none()), max_size=3),
)  # fmt: skip
KEYS = [key for key in all_keys(Config) if not key.startswith(("task.data", "policy"))]
RECIPES = ("quickstart", "prompts", "imdb-small", "commongen-small", "tldr-small")


def check_numbers(value: Any, key: str) -> None:
    """Raise if an accepted config holds a number that is nonsense."""
    if isinstance(value, dict):
        for name, item in value.items():
            check_numbers(item, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for item in value:
            check_numbers(item, key)
    elif isinstance(value, float) and not math.isfinite(value):
        raise FoundError(f"{key}={value} was accepted")
    elif isinstance(value, int | float) and abs(value) >= 1e19:
        raise FoundError(f"{key}={value!r} was accepted")


def try_command_line(data: st.DataObject, folder: Path) -> str:
    """Type a setting of a recipe: a number near the recipe's own, or something else."""
    name, values = data.draw(st.sampled_from(RECIPES)), flatten(to_dict(recipe("quickstart")))
    key, kind = data.draw(st.sampled_from(KEYS)), data.draw(st.integers(0, 9))
    own = values.get(key)
    if kind < 4 and isinstance(own, int | float) and not isinstance(own, bool):
        value: Any = own * data.draw(st.sampled_from([1, 2, 3, 0, -1, 1e6, 1e30]))
    elif kind < 5:
        value = json.dumps(own)
    else:
        value = data.draw(st.one_of(st.text(max_size=30), VALUES))
    if kind == 9:
        key = data.draw(st.one_of(st.just(f"{key}x"), st.text(max_size=12)))
    typed = f"{key}: {value}" if kind == 8 else f"{key}={value}"
    try:
        config = read_config(name, [typed])
    except RlgfError as error:
        return refused(error)
    check_numbers(flatten(to_dict(config)), "")
    return resolve_config(config)


def try_python(data: st.DataObject, folder: Path) -> str:
    """Override a setting with an object."""
    key, value = data.draw(st.sampled_from(KEYS)), data.draw(VALUES)
    before = flatten(to_dict(recipe("quickstart"))).get(key)
    try:
        config = override(recipe("quickstart"), [(key, value)])
    except RlgfError as error:
        return refused(error)
    after = flatten(to_dict(config)).get(key)
    if isinstance(value, bool) and isinstance(before, int | float) and not isinstance(before, bool):
        raise FoundError(f"{key}={value} was accepted as {after!r}")
    check_numbers(flatten(to_dict(config)), "")
    return resolve_config(config)


def resolve_config(config: Config) -> str:
    """Resolve a config that was accepted."""
    from rlgf.pipeline.resolve import resolve

    try:
        resolve(config)
    except RlgfError as error:
        return refused(error)
    return "used"


# --- data files ---------------------------------------------------------------------------------

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(allow_nan=False), st.text(max_size=30)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)
PROMPTS = st.one_of(st.text(max_size=40), JSON, st.just([{"role": "user", "content": "Hello"}]))
ROW = st.fixed_dictionaries({"prompt": PROMPTS}, optional={"references": JSON, "completion": JSON, "other": JSON})
GOOD_ROW = st.fixed_dictionaries(
    {"prompt": st.text(min_size=1, max_size=20)},
    optional={"references": st.text(max_size=9), "completion": st.text(max_size=9)},
)
ROWS = st.one_of(st.lists(ROW, max_size=8), st.lists(GOOD_ROW, min_size=12, max_size=20, unique_by=lambda row: row["prompt"]))
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "latin-1")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".txt")


def try_data(data: st.DataObject, folder: Path) -> str:
    """Read a data file as prompts."""
    from rlgf.tasks.registry import task_definition

    path = folder / f"rows{data.draw(st.sampled_from(SUFFIXES))}"
    path.write_bytes(data_bytes(data, path.suffix))
    config = TaskConfig(name="prompts", data=str(path))
    try:
        task = task_definition(config).build(config, tokenizer())
    except RlgfError as error:
        return refused(error)
    finally:
        path.unlink()
    for prompt in (*task.train, *task.validation, *task.test):
        if not isinstance(prompt.text, str) or not all(isinstance(text, str) for text in prompt.references):
            raise FoundError(f"a prompt that is no text: {prompt!r}"[:300])
    return "used"


def data_bytes(data: st.DataObject, suffix: str) -> bytes:
    """Draw the bytes of a data file."""
    if data.draw(st.integers(0, 9)) == 0:
        return data.draw(st.binary(max_size=200))
    rows = data.draw(ROWS)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if suffix in (".csv", ".tsv"):
        file = io.StringIO(newline="")
        header = ["prompt", "references", data.draw(st.sampled_from(["completion", "prompt", "", "\0"]))]
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", quoting=csv.QUOTE_MINIMAL)
        with contextlib.suppress(csv.Error):
            writer.writerow(header)
            for row in rows:
                cells = [
                    str(row.get(name, "")).encode("utf-8", "replace").decode() for name in ("prompt", "references", "other")
                ]
                writer.writerow(cells[: data.draw(st.integers(1, 3))])
        text = file.getvalue()
    text = text.replace("\n", data.draw(st.sampled_from(["\n"] * 6 + ["\r\n", "\r", "\n\n", "\0\n", "\u2028"])))
    content = text.encode(data.draw(st.sampled_from(("utf-8",) * 4 + ENCODINGS)), "replace")  # halves of surrogates become ?
    if data.draw(st.integers(0, 5)) == 0:
        content = content[: data.draw(st.integers(0, len(content)))]
    return content + data.draw(st.sampled_from([b""] * 6 + [b"\0\0", b"\xff", b"{", b'{"prompt": 1}']))


TOKENIZERS: list[Any] = []


def tokenizer() -> Any:
    """Return the tokenizer of the embedded task, made once."""
    from rlgf.tasks import toy_reviews

    if not TOKENIZERS:
        TOKENIZERS.append(toy_reviews.tokenizer(TaskConfig()))
    return TOKENIZERS[0]


# --- files of a run -----------------------------------------------------------------------------

READ_FILES = (
    "identity.json", "config.yaml", "results.json", "metrics.jsonl", "rollouts.jsonl", "checkpoints/*/*", "stages/*/*",
    "policy/*", "best-policy/*", "critic-policy/*",
)  # fmt: skip


def make_run(folder: Path) -> Path:
    """Train the run whose files are damaged."""
    from rlgf.pipeline.run import train

    train(override(recipe("quickstart"), TINY), folder / "run")
    return folder / "run"


def try_files(data: st.DataObject, folder: Path) -> str:
    """Damage one file of a run, then read it as resuming, reusing and evaluating do."""
    original = folder / "run"
    files = sorted(file for pattern in READ_FILES for file in original.glob(pattern) if file.is_file())
    file = data.draw(st.sampled_from(files)).relative_to(original)
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)
    damage(data, copy / file)
    same = (copy / file).is_file() and (copy / file).read_bytes() == (original / file).read_bytes()
    try:
        found = read_run(copy)
    except RlgfError as error:
        return refused(error)
    expected = EXPECTED[0]
    for name, value in found.items():
        if value != expected[name] and not (name == "checkpoint" and value in expected["checkpoints"]):
            raise FoundError(f"{file} was damaged, and {name} changed without a word")
    return "unchanged" if same else "noticed" if WARNINGS else "harmless"


def damage(data: st.DataObject, file: Path) -> None:
    """Flip a bit, cut, empty, lengthen, replace or remove a file."""
    content = bytearray(file.read_bytes())
    kind = data.draw(st.sampled_from(["flip"] * 6 + ["cut", "empty", "longer", "zeros", "text", "gone"]))
    if kind == "gone":
        file.unlink()
        return
    if kind == "flip" and content:
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    elif kind == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
    elif kind == "longer":
        content += data.draw(st.binary(min_size=1, max_size=20))
    elif kind == "zeros":
        content = bytearray(len(content))
    else:
        content = bytearray(b"" if kind == "empty" else b'{"format_version": 1}')
    file.write_bytes(content)


WARNINGS: list[str] = []
EXPECTED: list[dict[str, Any]] = []


def read_run(run: Path) -> dict[str, Any]:
    """Read all that resuming, reusing a stage and evaluating read; return checksums of it."""
    from rlgf.data.checksums import read_checksum
    from rlgf.models.loading import load_language_model
    from rlgf.pipeline.stage_cache import StageCache
    from rlgf.runs.directory import RunDirectory, read_results
    from rlgf.runs.logs import read_rows

    WARNINGS.clear()
    directory = RunDirectory(run, override(recipe("quickstart"), TINY), warn=WARNINGS.append)
    directory.check_identity()
    loaded = directory.load_checkpoint()
    found: dict[str, Any] = {"checkpoint": None if loaded is None else (loaded[0], state_checksum(loaded[1]))}
    found["results"] = json.dumps(read_results(run / "results.json"), sort_keys=True)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        rows = read_rows(run / name, WARNINGS.append) if (run / name).is_file() else []
        known = EXPECTED[0]["rows"][name] if EXPECTED else rows
        if any(row not in known for row in rows):  # a damaged line is left out, and costs no other
            raise FoundError(f"{name} was read with other values")
    for name in ("policy", "best-policy"):
        found[name] = weights_checksum(load_language_model(str(run / name)).model)
    for stage in sorted((run / "stages").iterdir()):
        if not stage.name.startswith((".", "damaged-")):
            cache = StageCache(run / "stages", WARNINGS.append)
            found[stage.name] = reuse_stage(cache, stage, read_checksum)
    return found


def reuse_stage(cache: Any, stage: Path, checksum: Callable[[Path], str]) -> Any:
    """Reuse a stage, or rebuild it from the undamaged one; return its files' checksums."""
    from rlgf.pipeline.stage_cache import build_at

    whole = cache.folder.parent.parent / "run" / "stages" / stage.name
    record = json.loads((whole / "stage.json").read_text())

    def build(folder: Path) -> dict[str, Any]:
        for file in whole.iterdir():
            if file.name not in ("stage.json", "manifest.json"):
                shutil.copy(file, folder)
        return record["metrics"]

    made = build_at(stage, record["stage"], record["inputs"], build, cache.report)
    return [(file.name, checksum(file)) for file in sorted(made.iterdir()) if file.name != "manifest.json"]


def state_checksum(state: Any) -> str:
    """Return a checksum of nested values and tensors."""
    import hashlib

    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                digest.update(repr(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        elif hasattr(value, "numpy"):
            digest.update(value.float().numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    add(state)
    return digest.hexdigest()


def weights_checksum(model: Any) -> str:
    """Return a checksum of a model's weights."""
    return state_checksum(dict(model.state_dict()))


# --- answers of functions -----------------------------------------------------------------------

ODD = st.one_of(VALUES, st.sampled_from([SystemExit(0), SystemExit("x"), ValueError("x"), object(), len, {1, 2}, range(3)]))


def try_rewards(data: st.DataObject, folder: Path) -> str:
    """Let a reward return something."""
    import numpy as np
    import torch

    from rlgf.rewards.base import score
    from rlgf.types import Prompt

    answer = data.draw(st.one_of(ODD, st.lists(ODD, min_size=2, max_size=2)))
    shape = data.draw(st.sampled_from(["as it is", "tensor", "array"]))
    if shape != "as it is" and isinstance(answer, list) and all(isinstance(x, float) for x in answer):
        answer = torch.tensor(answer) if shape == "tensor" else np.array(answer)
    try:
        values = score(raising(answer), [Prompt("a"), Prompt("b")], ["x", "y"])
    except RlgfError as error:
        return refused(error)
    if len(values) != 2 or not all(type(value) is float and math.isfinite(value) for value in values):
        raise FoundError(f"rewards {values!r} were accepted")
    return "used"


def raising(answer: Any) -> Any:
    """Return a function that returns a value, or raises it."""

    def function(*_: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return function


def try_guides(data: st.DataObject, folder: Path) -> str:
    """Let a guide return something."""
    from rlgf.guides.base import Completion, CompletionRequest, query_guide
    from rlgf.guides.local import FunctionGuide
    from rlgf.types import Prompt

    completion = st.builds(Completion, ODD, ODD, ODD)
    answer = data.draw(st.one_of(ODD, st.lists(st.one_of(ODD, completion, st.text(max_size=9)), min_size=1, max_size=1)))
    request = CompletionRequest(
        prompt=Prompt("a"), prompt_ids=[1], prefix="", prefix_ids=[], max_new_tokens=3, min_new_tokens=0, seed=0, index=0
    )  # pyright: ignore[reportCallIssue]
    try:
        found = query_guide(FunctionGuide(raising(answer)), [request])
    except RlgfError as error:
        return refused(error)
    for each in found:
        if not isinstance(each.text, str) or any(type(token) is not int or token < 0 for token in each.ids or ()):
            raise FoundError(f"the completion {each!r} was accepted"[:300])
    return "used"


SORTS: dict[str, Callable[[st.DataObject, Path], str]] = {
    "command line": try_command_line, "python": try_python, "data": try_data, "files": try_files,
    "rewards": try_rewards, "guides": try_guides,
}  # fmt: skip


def main() -> int:
    """Try inputs of every sort; print how many of each, and the first that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2_000, help="inputs of each sort")
    parser.add_argument("--sorts", nargs="+", default=list(SORTS), choices=SORTS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="rlgf-fuzz-") as work:
        folder = Path(work)
        if "files" in options.sorts:
            import torch

            torch.set_num_threads(1)
            run = make_run(folder)
            EXPECTED.append({"rows": {name: _rows(run / name) for name in ("metrics.jsonl", "rollouts.jsonl")}})
            EXPECTED[0] |= read_run(run)
            EXPECTED[0]["checkpoints"] = [_checkpoint(path) for path in sorted((run / "checkpoints").iterdir())]
        for sort in options.sorts:
            failed += run_sort(sort, options.count, options.seed, folder)
    return min(failed, 1)


def _rows(path: Path) -> list[dict[str, Any]]:
    from rlgf.data.files import read_complete_lines

    return read_complete_lines(path)


def _checkpoint(path: Path) -> tuple[int, str]:
    from rlgf.runs.checkpoints import load_state

    return int(path.name.split("-")[1]), state_checksum(load_state(path))


def run_sort(sort: str, count: int, number: int, folder: Path) -> int:
    """Try `count` inputs of a sort; return 1 if one failed."""
    outcomes = Counter[str]()

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        outcomes[SORTS[sort](data, folder)] += 1

    try:
        attempt()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        import traceback

        traceback.print_exc()
        print(f"{sort}: FAILED after {sum(outcomes.values())} inputs ({type(error).__name__})", flush=True)
        return 1
    told = ", ".join(f"{outcome} {number}" for outcome, number in sorted(outcomes.items()))
    print(f"{sort}: {sum(outcomes.values()):,} inputs, no traceback, no nonsense accepted ({told})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
