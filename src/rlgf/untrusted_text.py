"""Text from outside (data, models, servers, users' code), as it is shown and written.

Every line for a terminal passes `escape_control_characters`, every text in a Markdown page
`escape_markdown`, every JSON document `escape_json`, every name of a file `as_file_name`.
"""

import hashlib
import os
import re
import sysconfig
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rlgf.credentials import mask_credentials

# folders with code that no user wrote: the standard library and this package
LIBRARIES = ("<", sysconfig.get_paths()["stdlib"] + os.sep, os.path.dirname(os.path.abspath(__file__)) + os.sep)
MAX_DIGITS = 40  # of a whole number that an error shows
MAX_FILE_NAME = 150  # bytes; file systems allow 255
JOINERS = "\u200c\u200d"  # Persian, Hindi and families of emoji are written with them
NOT_IN_FILE_NAMES = re.compile(r"[^\w.=+-]+")
MARKDOWN = re.compile(r"[\\`*\[\]<>|#~&$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)")
MARKS_OF_BLOCKS = re.compile(r"(?<!\S)([-+=]+|\d+[.)])(?!\S)")  # words that begin a list or underline a heading


def escape_control_characters(text: str) -> str:
    r"""Escape control characters of a text, as in `\\x1b`; newlines become `⏎`."""
    if text.isprintable():
        return text
    shown = text.replace("\r\n", "\n").replace("\n", "⏎")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def escape_reports(report: Callable[[str], None]) -> Callable[[str], None]:
    """Return a reporter whose lines have no control characters and no credentials."""
    return lambda line: report(escape_control_characters(mask_credentials(line)))


def escape_lines(text: str) -> str:
    """Escape the control characters of each line of a text, and keep its line breaks."""
    return "\n".join(map(escape_control_characters, text.split("\n")))


def escape_json(document: str) -> str:
    r"""Escape what is not printable in a JSON document, as in `\\u2028`.

    Its values stay the same. Spaces of other languages and joiners of characters stay as they are,
    as do line breaks, which JSON never has inside a text.
    """
    if document.isprintable():
        return document
    return "".join(map(_escape_in_json, document))


def must_be_escaped(character: str) -> bool:
    """Return whether a character of a document is escaped: if it has a hidden effect."""
    is_space = character.isspace() and character > "\x85" and character not in "\u2028\u2029"
    return not (character.isprintable() or character in JOINERS or character == "\n" or is_space)


def _escape_in_json(character: str) -> str:
    if not must_be_escaped(character):
        return character
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[place]:02x}{units[place + 1]:02x}" for place in range(0, len(units), 2))


def escape_markdown(text: str) -> str:
    """Return Markdown that shows a text on one line, without markup, links or HTML."""
    shown = MARKDOWN.sub(lambda found: "\\" + found[0], escape_control_characters(text))
    return MARKS_OF_BLOCKS.sub(lambda found: found[0][:-1] + "\\" + found[0][-1], shown)


def as_code(text: str) -> str:
    """Return a text as Markdown's inline code, whatever backticks it has."""
    shown = escape_control_characters(text)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    if not longest:
        return f"`{shown}`"
    fence = "`" * (longest + 1)
    return f"{fence} {shown} {fence}"


def as_file_name(text: str) -> str:
    """Return a text as the name of a visible file: letters, digits and `._=+-`.

    A name that had to change ends with a hash of the text, so that no two texts share a file.
    """
    name = NOT_IN_FILE_NAMES.sub("_", text).lstrip(".").encode()[:MAX_FILE_NAME].decode(errors="ignore")
    if name == text and name:
        return name
    return f"{name}-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"


def replace_surrogates(text: str) -> str:
    """Replace unpaired surrogates by U+FFFD.

    Broken JSON can hold them; files and tokenizers cannot.
    """
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def shorten(text: str, limit: int, keep_end: bool = False) -> str:
    """Return a text, shortened to `limit` characters with an ellipsis if it is longer."""
    if len(text) <= limit:
        return text
    return "…" + text[1 - limit :] if keep_end else text[: limit - 1] + "…"


def shorten_sentence(text: str, limit: int) -> str:
    """Return at most `limit` characters of a sentence, which still ends with a full stop."""
    return text if len(text) <= limit else shorten(text, limit - 1) + "."


def show_value(value: Any, limit: int = 60) -> str:
    """Return a value as an error shows it: short, on one line, without credentials."""
    if isinstance(value, int) and value.bit_length() > MAX_DIGITS * 3:
        return f"a number of about {value.bit_length() * 0.30103:,.0f} digits"
    try:
        shown = repr(value)
    except Exception:  # objects of users, and lists of numbers with thousands of digits
        return f"a {type(value).__name__}"
    return shorten(escape_control_characters(mask_credentials(shown)), limit)


def place_of(error: BaseException) -> TracebackType | None:
    """Return the last place of an exception in the user's code, or else of all."""
    step, last, own = error.__traceback__, None, None
    while step is not None:
        last = step
        file = step.tb_frame.f_code.co_filename
        if not file.startswith(LIBRARIES) and "site-packages" not in file:
            own = step
        step = step.tb_next
    return own or last


def describe_failure(error: BaseException, limit: int = 200) -> str:
    """Return the type, message and place of an exception, on one line.

    The place is the last one in code of the user, if there is any: not in a library.
    """
    try:
        message = str(error)
    except Exception:
        message = ""
    name = type(error).__name__
    last = place_of(error)
    place = ""
    if last is not None:
        file = last.tb_frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
        place = f", {escape_control_characters(shorten(file, 60))} line {last.tb_lineno}"
    shown = shorten(escape_control_characters(mask_credentials(message)), limit)
    return f"{name}: {shown}{place}" if shown else f"{name}{place}"
