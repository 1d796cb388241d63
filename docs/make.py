"""Write the reference pages that are made from the code.

`docs/config.md` has every setting, from the dataclasses of `rlgf/config/` and their comments; `docs/api.md` every public name,
from its docstring.
"""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "src" / "rlgf" / name for name in ("config/schema.py", "config/sections.py", "config/runtime.py", "types.py")]
ALGORITHMS = ROOT / "src" / "rlgf" / "algorithms" / "guided.py"
BOUNDS = ROOT / "src" / "rlgf" / "bounds.py"
SECTIONS = {
    "Config": "",
    "TaskConfig": "task",
    "ModelConfig": "model",
    "TrainingConfig": "pretrain, sft, distill, guide.sft, preferences.training",
    "SupervisedConfig": "pretrain, sft, guide.sft, preferences.training",
    "DistillConfig": "distill",
    "RewardConfig": "reward",
    "PreferenceConfig": "preferences",
    "EndpointConfig": "guide.endpoint, judge.endpoint",
    "JudgeConfig": "judge",
    "GuideConfig": "guide",
    "AlgorithmConfig": "algorithm",
    "PPOConfig": "ppo",
    "KLConfig": "kl",
    "CriticConfig": "critic",
    "LoraConfig": "lora, preferences.lora",
    "PolicyLoraConfig": "lora",
    "RewardLoraConfig": "preferences.lora",
    "SamplingParams": "sampling, guide.sampling, evaluation.sampling",
    "EvaluationConfig": "evaluation",
    "RuntimeConfig": "runtime",
}
HEADINGS = {
    "Training": ("pipeline.run", "pipeline.prepare", "trainer"),
    "Configs": ("config.recipes", "config.loading", "config.schema"),
    "Algorithms": ("algorithms.registry",),
    "Prompts, rollouts and experience": ("types", "rl.tensors"),
    "Guides": ("guides.base",),
    "Tasks": ("tasks.base",),
    "Errors": ("errors",),
}
"""The sections of `docs/api.md`, and the modules whose public names they list."""
EXAMPLES_BEGIN_WITH = """\
from dataclasses import dataclass, replace
from pathlib import Path

import rlgf

small = [  # changes that make a run take a second
    ("algorithm.name", "ppo_pp"),
    ("algorithm.options.ppo_pp.beta", 1.0),
    ("task.options", {"train_prompts": 16, "held_out_prompts": 4}),
    ("model.width", 16),
    ("guide.model.width", 16),
    ("sft.steps", 2),
    ("guide.sft.steps", 2),
    ("ppo.iterations", 2),
    ("ppo.completions_per_iteration", 4),
    ("ppo.minibatch_size", 4),
    ("evaluation.every", 0),
    ("evaluation.baselines", []),
    ("runtime.trackers", []),
]
"""
"""The lines before all examples in docstrings; `tests/test_examples.py` runs them too."""


def api_page() -> str:
    """Return the text of `docs/api.md`."""
    import rlgf

    lines = [
        "# The public interface",
        "",
        "Made from the docstrings by `make docs`; `help(rlgf.train)` has shapes, arguments and errors. A name",
        "is imported when it is first used. All examples are tests, and begin with",
        "",
        *("```python", *EXAMPLES_BEGIN_WITH.splitlines(), "```"),
    ]
    left = dict(rlgf._MODULES)
    for heading, modules in HEADINGS.items():
        names = [name for module in modules for name in left.pop(f"rlgf.{module}", ())]
        lines += ["", f"## {heading}", *(line for name in names for line in api_entry(name, getattr(rlgf, name)))]
    if left:
        raise ValueError(f"HEADINGS of docs/make.py has no section for the public names of {', '.join(left)}: add one.")
    return "\n".join(lines) + "\n"


def api_entry(name: str, thing: object) -> list[str]:
    """Return the lines of one public name: its first sentence and its example."""
    text = inspect.getdoc(thing) or ""
    _, _, example = text.partition("Example:\n")
    return ["", f"### `rlgf.{name}`", "", text.splitlines()[0], "", "```pycon", *textwrap.dedent(example).splitlines(), "```"]


def description(node: ast.ClassDef) -> str:
    """Return a class's docstring in one line, without links, errors and examples."""
    return " ".join(re.split(r"\n\n(?:See |Raises:|Example:)", ast.get_docstring(node) or "")[0].split())


def page() -> str:
    """Return the page's text."""
    lines = [
        "# Every setting",
        "",
        *wrapped(
            "Generated from `src/rlgf/config/` by `make docs`. On the command line: `section.field=value`; in a YAML file: "
            "nested. A recipe (`rlgf show quickstart`) changes some of these defaults."
        ),
        "",
        *wrapped(
            "A setting that you give on the command line, in a YAML file or in `settings=` and that nothing in the run reads "
            "(`kl.target` with a fixed controller, say) is an error that names what would make it read; in a comparison it is "
            "enough that one row reads it. The settings of a recipe that its run does not read are listed by "
            "`rlgf train … --dry-run`. So is what a config that a run wrote holds, and in a YAML file the options of other "
            "algorithms."
        ),
    ]
    classes = {node.name: (node, comments) for source in SOURCES for node, comments in classes_of(source)}
    for name, section in SECTIONS.items():
        lines += table(*classes[name], section)
        if name == "AlgorithmConfig":
            for node, comments in classes_of(ALGORITHMS):
                if algorithm := algorithm_name(node):
                    lines += table(node, comments, f"algorithm.options.{algorithm}")
    return "\n".join(lines) + "\n"


def wrapped(text: str) -> list[str]:
    """Return the lines of a paragraph, at most 100 columns wide."""
    return textwrap.wrap(" ".join(text.split()), 100, break_long_words=False, break_on_hyphens=False)


def classes_of(path: Path) -> list[tuple[ast.ClassDef, dict[int, str]]]:
    """Return the classes of a file, each with the file's comments by line."""
    source = path.read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return [(node, comments) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]


def algorithm_name(node: ast.ClassDef) -> str | None:
    """Return the name of an algorithm's class, or None for another class."""
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == "name" and isinstance(field.value, ast.Constant):
            return str(field.value.value)
    return None


def named_types() -> dict[str, str]:
    """Return the named types of fields: those with bounds in words, choices as they are."""
    found: dict[str, str] = {}
    for path in (BOUNDS, ALGORITHMS, ALGORITHMS.with_name("switch_position.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"(\w+) = (?:Annotated\[.*#\s*(.*)|(Literal\[.*\]))", line):
                found[match[1]] = match[2] or match[3].replace('"', "'")
    return found


def readable_type(annotation: ast.expr) -> str:
    """Return a type as the tables show it."""
    text = ast.unparse(annotation).replace("|", "or")
    for name, words in named_types().items():
        text = re.sub(rf"\b{name}\b", words, text)
    return text


def table(node: ast.ClassDef, comments: dict[int, str], section: str) -> list[str]:
    """Return the lines of one section."""
    lines = ["", f"## {section or 'the whole run'}", "", *wrapped(description(node)), ""]
    fields = [
        field
        for field in node.body
        if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).startswith("ClassVar")
    ]
    lines += ["| field | default | |", "|---|---|---|"] if fields else ["It has no options."]
    for field in fields:
        if isinstance(field.target, ast.Name) and field.value is not None:
            default = ast.unparse(field.value)
            default = "" if default.startswith("dataclasses.field") else default
            kind = readable_type(field.annotation)
            note = comments.get(field.end_lineno or 0, "")
            shown = f"`{default}`" if default else ""
            lines.append(f"| `{field.target.id}` ({kind}) | {shown} | {note} |")
    return lines


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(page(), encoding="utf-8")
    (ROOT / "docs" / "api.md").write_text(api_page(), encoding="utf-8")
