"""Text from models, data and servers is untrusted: how it is shown in a terminal."""


def visible(text: str) -> str:
    """Text with control characters (escape sequences among them) shown as `\\x1b`; newlines as `⏎`."""
    shown = text.replace("\r\n", "\n").replace("\n", "⏎")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
