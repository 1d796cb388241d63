"""An extension of griffe for `make site`: examples in docstrings are shown as code."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Rename the section 'Example:' of docstrings to the one that griffe reads as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section of an object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
