"""Display of untrusted text (from models, data and servers) in a terminal."""


def escape_control_characters(text: str) -> str:
    r"""Escape control characters of a text, as in `\\x1b`; newlines become `⏎`."""
    shown = text.replace("\r\n", "\n").replace("\n", "⏎")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
