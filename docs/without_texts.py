"""Takes prompts and texts out of a comparison's committed results: datasets of others are not copied here."""

import json
import sys
from pathlib import Path
from typing import Any

from rlgf.data.files import write_json


def without_examples(value: Any) -> Any:
    """A JSON value without what is called `examples` anywhere in it."""
    if isinstance(value, dict):
        return {name: without_examples(part) for name, part in value.items() if name != "examples"}
    return [without_examples(part) for part in value] if isinstance(value, list) else value


def main(folder: Path) -> None:
    """Rewrite every JSON file below a folder that holds examples, and remove its page of texts."""
    (folder / "texts.md").unlink(missing_ok=True)
    for path in folder.rglob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if without_examples(found) != found:
            write_json(path, without_examples(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
