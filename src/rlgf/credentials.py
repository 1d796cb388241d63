"""Credentials in texts: their patterns, and references to environment variables instead.

A config and the files of a run hold `$NAME`, never the value of the variable.
"""

import re
from collections.abc import Sequence

KNOWN = re.compile(
    r"""(?<![A-Za-z0-9])(?:
      sk-(?=[a-z_-]*[A-Z0-9])[A-Za-z0-9_-]{12,}          # OpenAI, Anthropic, OpenRouter
    | hf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{12,}              # Hugging Face
    | gh[oprsu]_[A-Za-z0-9]{12,} | github_pat_\w{12,} | glpat-[\w-]{12,}
    | (?:gsk_|nvapi-|r8_|pplx-|xai-|tgp_v1_|fw_)[\w-]{20,}  # other servers of models
    | xox[abeoprs]-[\w-]{10,}                            # Slack
    | (?:AKIA|ASIA)[A-Z0-9]{12,} | AIza[\w-]{20,}        # clouds
    | eyJ[\w-]{8,}\.[\w-]{6,}\.[\w-]{4,}                 # JSON web tokens
    | (?i:bearer|basic)\s+(?=\S*(?:[0-9=]|[a-z][A-Z]))[A-Za-z0-9._~+/=-]{12,}
    | -----BEGIN\ [A-Z\ ]*PRIVATE\ KEY-----
    )""",
    re.VERBOSE,
)  # fmt: skip
USERINFO = re.compile(r"(?<=://)[^\s/@]+(?=@)")  # the user and password of a URL
# at the beginning of a value that goes to a server, however short; anywhere in a header
OPENING = re.compile(r"(?:bearer|basic)\s|sk-|hf_|gh[oprsu]_", re.IGNORECASE)
SCHEME = re.compile(
    r"(?<!\w)(?:bearer|basic)\s+\S|(?<!\w)(?:token|apikey)\s+(?=\S*\d)\S{8}", re.IGNORECASE
)  # anywhere in a header
SCHEME_ALONE = re.compile(r"\s*(?:bearer|basic|token|apikey)?\s*", re.IGNORECASE)

HEADER_NAME = re.compile(r"key|token|secret|auth(?!or\b)|password|cookie|credential", re.IGNORECASE)
# in request bodies, where max_tokens and tokenizer are allowed
FIELD_NAME = re.compile(
    r"api[-_]?key|secret|passw|authorization|credential|(access|auth|bearer|session|api|refresh)[-_]?token", re.IGNORECASE
)
SUSPECT_NAME = re.compile(r"key|token(?!iz|s?_?ids?|s$)|auth(?!or)|signature", re.IGNORECASE)

REFERENCE = re.compile(r"\$(?:\$|\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")
"""`$NAME` or `${NAME}`, an environment variable; `$$` is a dollar sign."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def is_credential(text: str) -> bool:
    """Return whether a text holds what looks like a key, a token or a password."""
    return bool(KNOWN.search(text) or USERINFO.search(text))


def mask_credentials(text: str) -> str:
    """Return a text with `***` in place of what looks like a credential."""
    return USERINFO.sub("***", KNOWN.sub("***", text))


def is_random(text: str, length: int = 20) -> bool:
    """Return whether a text has a run of `length` letters and digits, as generated keys have.

    Words joined by hyphens, dots or slashes are no such run.
    """
    return any(
        len(run) >= length and len(re.findall(r"\d", run)) > 1 and re.search(r"[A-Za-z]", run) is not None
        for run in re.split(r"[^A-Za-z0-9+=]", text)
    )


def is_credential_as_name(text: str) -> bool:
    """Return whether the name of a field or header looks like a credential."""
    return is_credential(text) or is_random(text)


def is_credential_for_server(text: str) -> bool:
    """Return whether a text that goes to a server looks like a credential, however short."""
    return bool(OPENING.match(text)) or is_credential(text) or is_random(text)


def is_credential_in_header(name: str, value: str) -> bool:
    """Return whether the value of a header is written out and looks like a credential."""
    literal = REFERENCE.sub("", value)
    if HEADER_NAME.search(name):
        return literal == value or not SCHEME_ALONE.fullmatch(literal)
    if literal != value and SCHEME_ALONE.fullmatch(literal):
        return False
    return bool(SCHEME.search(literal)) or is_credential_for_server(literal)


def is_credential_in_body(names: Sequence[str], value: object) -> bool:
    """Return whether a value in a request body, under nested names, looks like a credential."""
    if value is None or isinstance(value, bool):
        return False
    literal = REFERENCE.sub("", value) if isinstance(value, str) else None
    if literal is not None and literal != value and SCHEME_ALONE.fullmatch(literal):
        return False
    if any(FIELD_NAME.search(name) for name in names):
        return True
    if literal is None:
        return False
    suspect = any(SUSPECT_NAME.search(name) for name in names)
    return is_credential_for_server(literal) or (suspect and is_random(re.sub(r"[^A-Za-z0-9]", "", literal), 16))


def is_credential_in_url(url: str) -> bool:
    """Return whether the user or the path of a URL looks like a credential."""
    literal = REFERENCE.sub("", url)
    return is_credential(literal) or any(map(is_credential_for_server, literal.partition("://")[2].split("/")[1:]))
