"""Write `docs/config.md`, the reference of every setting, from the dataclasses of `rlgf/config/` and their comments."""

import ast
import io
import re
import textwrap
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "src" / "rlgf" / name for name in ("config/schema.py", "config/sections.py", "types.py")]
ALGORITHMS = ROOT / "src" / "rlgf" / "algorithms" / "guided.py"
BOUNDS = ROOT / "src" / "rlgf" / "config" / "base.py"
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


def page() -> str:
    """Return the page's text."""
    lines = [
        "# Every setting",
        "",
        *wrapped(
            "Generated from `src/rlgf/config/` by `make docs`. On the command line: `section.field=value`; in a YAML file: "
            "nested. A recipe (`rlgf show quickstart`) changes some of these defaults."
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
    for path in (BOUNDS, ALGORITHMS, ALGORITHMS.with_name("switching.py")):
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
    lines = ["", f"## {section or 'the whole run'}", "", *wrapped(ast.get_docstring(node) or ""), ""]
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
