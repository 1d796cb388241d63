"""Write `docs/config.md`, the reference of every setting, from the dataclasses in `rlgf/config.py` and their comments."""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "rlgf" / "config.py"
SECTIONS = {
    "Config": "", "TaskConfig": "task", "ModelConfig": "model", "SupervisedConfig": "lm, sft, distil", "RewardConfig": "reward",
    "PreferenceConfig": "preferences", "JudgeConfig": "judge",
    "GuideConfig": "guide", "AlgorithmConfig": "algorithm", "PPOConfig": "ppo", "KLConfig": "kl", "CriticConfig": "critic",
    "EvaluationConfig": "evaluation", "RuntimeConfig": "runtime",
}  # fmt: skip


def page() -> str:
    """The page's text."""
    source = SOURCE.read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = [
        "# Every setting",
        "",
        "Made from `src/rlgf/config.py` by `make docs`. On the command line: `section.field=value`; in a YAML file: nested.",
        "A recipe (`rlgf show quickstart`) changes some of these defaults.",
    ]
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name in SECTIONS:
            section = SECTIONS[node.name]
            lines += ["", f"## {section or 'the whole run'}", "", " ".join((ast.get_docstring(node) or "").split()), ""]
            lines += ["| field | default | |", "|---|---|---|"]
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.value is not None:
                    default = ast.unparse(field.value)
                    default = "" if default.startswith("dataclasses.field") else default
                    kind = ast.unparse(field.annotation).replace("|", "or")
                    note = comments.get(field.end_lineno or 0, "")
                    shown = f"`{default}`" if default else ""
                    lines.append(f"| `{field.target.id}` ({kind}) | {shown} | {note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(page(), encoding="utf-8")
