"""Build the site of the documentation in build/site: `make site`.

The pages are those of the repository, written for its own viewer: README.md and docs/. They are
copied to build/site-pages with these changes: a link to a page that is copied leads to its copy, a
link to a source file loses its address, equations become MathML, and `reference.md` lists the
public names for mkdocstrings. Then Zensical builds them; a dead link is an error.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ziamath  # for its font
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
PAGES, SITE = ROOT / "build" / "site-pages", ROOT / "build" / "site"
# pages outside docs/, and what they are called on the site
OTHERS = {
    "README.md": "index.md", "bench/README.md": "benchmarks.md", "native/README.md": "native.md",
    "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
}  # fmt: skip
COPIED = (".md", ".png", ".svg", ".css")
CSS = """\
/* Without a font for mathematics indices are not lowered. One of the reader's is used, otherwise ours. */
@font-face {
  font-family: "Equations";
  src: local("STIX Two Math"), local("STIXTwoMath-Regular"), local("Cambria Math"), local("Latin Modern Math"),
    url("math.ttf");
}
.md-typeset math { font-family: "Equations", math }
/* equations of their own line, and tables with many columns */
div.math { overflow-x: auto; margin: 1em 0; text-align: center }
div.math math, .md-typeset math { font-size: 1.08em }
.md-typeset table:not([class]) { font-size: .68rem }
.md-typeset table:not([class]) :is(th, td) { padding: .5em .8em }
.md-typeset img { background: transparent }
"""
FONT = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"
HEADINGS: dict[str, tuple[str, ...]] = next(
    ast.literal_eval(node.value)  # read, not imported: docs/make.py imports the library
    for node in ast.parse((ROOT / "docs" / "make.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "HEADINGS"
)
"""The sections of the reference, those of `docs/api.md`."""


def main() -> int:
    """Write the pages and build the site."""
    shutil.rmtree(PAGES, ignore_errors=True)
    names = staged()
    for source, page in names.items():
        target = PAGES / page
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            target.write_text(translate(source, names), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    (PAGES / "reference.md").write_text(reference(), encoding="utf-8")
    (PAGES / "site.css").write_text(CSS, encoding="utf-8")
    shutil.copyfile(FONT, PAGES / "math.ttf")
    zensical = Path(sys.executable).with_name("zensical")
    return subprocess.run([str(zensical), "build", "--clean", "--strict"], cwd=ROOT, check=False).returncode


def staged() -> dict[Path, str]:
    """Return the files that are copied, with their names on the site."""
    found = {ROOT / source: page for source, page in OTHERS.items()}
    for source in sorted((ROOT / "docs").rglob("*")):
        if source.suffix in COPIED:
            page = source.relative_to(ROOT / "docs")
            found[source] = str(page.with_name("index.md") if page.name == "README.md" else page)
    return found


def translate(source: Path, names: dict[Path, str]) -> str:
    """Return a page with links and equations as the site needs them."""
    parts = re.split(r"(^```.*?^```$|^    .*?$|`[^`\n]+`)", source.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    here = names[source]
    for place in range(0, len(parts), 2):  # the others are code
        text = re.sub(r"^\$\$$(.*?)^\$\$$", lambda m: block(m[1]), parts[place], flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"\$([^$\n]+(?:\n[^$\n]+)?)\$", lambda m: inline(m[1]), text)
        parts[place] = text
    return re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", link_of(source, here, names), "".join(parts))


def inline(latex: str) -> str:
    """Return an equation within a line as MathML; the span keeps it in its paragraph."""
    return f'<span class="math">{convert(" ".join(latex.split()))}</span>'


def block(latex: str) -> str:
    """Return an equation on lines of its own as MathML."""
    return f'\n<div class="math">{convert(" ".join(latex.split()), display="block")}</div>\n'


def link_of(source: Path, here: str, names: dict[Path, str]) -> Callable[[re.Match[str]], str]:
    """Return the function that rewrites a link of a page."""

    def rewrite(match: re.Match[str]) -> str:
        mark, text, address = match.groups()
        if re.match(r"[a-z]+:|#", address):
            return match[0]
        path, hash_, anchor = address.partition("#")
        target = (source.parent / path).resolve()
        if not target.exists():
            raise SystemExit(f"{source.relative_to(ROOT)}: there is no {address}")
        if target not in names:
            return text
        relative = os.path.relpath(names[target], Path(here).parent)
        return f"{mark}[{text}]({relative}{hash_}{anchor})"

    return rewrite


def reference() -> str:
    """Return the page of the public names, for mkdocstrings."""
    tree = ast.parse((ROOT / "src" / "rlgf" / "__init__.py").read_text(encoding="utf-8"))
    modules = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_MODULES"
    )
    lines = [
        "# API reference",
        "",
        "The public names with their arguments, from the docstrings. [api.md](api.md) has an example of each.",
        "`rlgf.NAME` is the same object as the one shown with its module.",
    ]
    for heading, members in HEADINGS.items():
        lines += ["", f"## {heading}"]
        for module in members:
            for name in modules.pop(f"rlgf.{module}"):
                lines += ["", f"::: rlgf.{module}.{CLASSES.get(name, name)}"]
    if modules:
        raise SystemExit(f"tools/site.py has no heading for the public names of {', '.join(modules)}")
    return "\n".join(lines) + "\n"


CLASSES = {"ppo": "PPO", "ppo_pp": "PPOPlusPlus", "aggrevated": "AggreVaTeD", "lols": "LOLS", "d2lols": "D2LOLS"}

if __name__ == "__main__":
    sys.exit(main())
