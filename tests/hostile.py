"""Hostile texts, tried on every place where text from outside is shown, and what such a place must not let through."""

import unicodedata

ESCAPES = {
    "color": "\x1b[31mred\x1b[0m", "title": "\x1b]0;owned\x07", "clear": "\x1b[2J\x1b[H", "8-bit escape": "\x9b31m",
    "link": "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\", "backspaces": "safe\b\b\b\bevil", "carriage return": "good\rbad",
    "bell": "\x07", "NUL": "a\0b", "delete": "a\x7fb", "tab": "a\tb", "newline": "a\nb", "three lines": "a\r\n\r\n# b\n- c",
}  # fmt: skip
UNICODE = {
    "line separator": "a\u2028b", "paragraph separator": "a\u2029b", "next line": "a\x85b", "right to left": "a\u202etxt.exe",
    "isolate": "a\u2066b\u2069", "mark": "\u200fa", "zero width": "a\u200bb", "byte order": "\ufeffa", "tag": "\U000e0041a",
    "high surrogate": "a\ud800b", "low surrogate": "\udc9b31m", "swapped surrogates": "\udf89\ud83c", "private": "\ue000",
    "unassigned": "\U000e0fff", "nothing": "", "spaces": "   ",
}  # fmt: skip
MARKUP = {
    "markup of rich": "[bold red]x[/]", "unbalanced markup": "[/]", "cell": "a|b", "backtick": "a`b", "backticks": "``a```b`",
    "HTML": "<script>alert(1)</script>", "entity": "&lt;b&gt;", "comment": "<!-- a", "link": "[x](http://evil)",
    "image": "![x](http://evil/y.png)", "bare link": "https://evil/x", "heading": "# a", "list": "- a", "numbers": "1. a",
    "sum": "+ a", "line": "---", "setext": "===", "quote": "> a", "emphasis": "*a* **b** _c_ __d__ ~~e~~", "backslash": "a\\",
    "formula": "$\\frac{$", "dollars": "$a$", "format": "%s %n {0} {x}", "sheet": "=1+1", "quotes": "'a' \"b\"",
}  # fmt: skip
PATHS = {
    "above": "../../etc/x", "root": "/etc/passwd", "hidden": ".bashrc", "home": "~/x", "backslashes": "..\\x", "colon": "C:x",
    "dot": ".", "dots": "..", "option": "-rf", "device": "nul", "glob": "*?[a]",
}  # fmt: skip
GOOD = {"Chinese": "電影很好看", "Persian": "می‌خواهم", "emoji": "👩‍🚀🇩🇪", "accents": "naïve café", "formula": "x² ≤ ½"}
LONG = {"long": "x" * 5_000, "long line of words": "word " * 2_000, "long escape": "\x1b" * 3_000}

HOSTILE = {**ESCAPES, **UNICODE, **MARKUP, **PATHS, **GOOD, **LONG}
"""The texts by a name for the test."""


CONCENTRATE = "".join([*ESCAPES.values(), *UNICODE.values(), *MARKUP.values()])
"""All of them in one text, where each costs too much time."""
PRINTABLE = "".join(letter for letter in CONCENTRATE if not "\ud800" <= letter <= "\udfff" and letter != "\0")
"""The same without what no config and no command line can hold: NUL and halves of characters."""


def is_dangerous(character: str) -> bool:
    """Return whether a character controls a terminal or text direction, ends a line or is a surrogate; joiners are not."""
    return character not in "\n\u200c\u200d" and (unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"))


def is_clean(text: str) -> bool:
    """Return whether a text can be sent to a terminal as it is."""
    text.encode()
    return not any(map(is_dangerous, text))
