"""Credentials in texts: their patterns, and references to environment variables instead.

A config and the files of a run hold `$NAME`, never the value of the variable.
"""

import re
from collections.abc import Mapping, Sequence
from urllib.parse import unquote

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
# a value that is given to a name, up to what ends it; names of variables and placeholders are none
_VALUE = r"""(?!(?:none|null|true|false|str|string|your[-_]\w*|x+)(?![\w/+-]))[^\s'"$<>{}()\[\]*…;&,#]{3,}+(?![(\[])"""
_TOKEN = r"(?:access|api|auth|bearer|csrf|id|personal|refresh|secret|security|session)[-_]?token"
_WORD = rf"authorization|api[-_\ ]?key|passw(?:or)?d|passphrase|(?<![a-z])pwd|{_TOKEN}"
ASSIGNED = re.compile(
    rf"""(?:(?:{_WORD}|secret|(?:secret|access|account|private|shared)[-_]?(?:access[-_]?)?key(?:[-_]?id)?
      | (?<![\w-])token|signature)["']?=["']?
    | [?&;][\w.-]{{0,40}}?(?<![a-z])(?:key|token|sig|auth|code|pass|pw|session|jwt|credential)=  # in the query of a URL
    ) (?P<assigned>{_VALUE})
    | (?:{_WORD})["']?\s{{0,3}}[:=]\s{{0,3}}["']?(?:(?:token|bearer|basic|digest|apikey)\s{{1,3}})?  # as a line of a header
    (?P<said>(?=[^\sA-Za-z]{{0,40}}[A-Za-z][^\s\d]{{0,40}}\d)[^\s'"$<>{{}}()\[\]*…;&,#]{{6,}})""",
    re.VERBOSE | re.IGNORECASE,
)
USERINFO = re.compile(r"(?<=://)[^\s/@]+(?=@)")  # the user and password of a URL
# at the beginning of a value that goes to a server, however short; anywhere in a header
OPENING = re.compile(r"(?:bearer|basic)\s|sk-|hf_|gh[oprsu]_", re.IGNORECASE)
SCHEME = re.compile(
    r"(?<!\w)(?:bearer|basic)\s+\S|(?<!\w)(?:token|apikey)\s+(?=\S*\d)\S{8}", re.IGNORECASE
)  # anywhere in a header
SCHEME_ALONE = re.compile(r"\s*(?:bearer|basic|token|apikey)?\s*", re.IGNORECASE)

HEADER_NAME = re.compile(
    r"key|token|secret|auth(?!or\b)|passw|cookie|credential|session|signature|jwt|(?<![a-z])(?:sig|pass|pwd|pw)(?![a-z])",
    re.IGNORECASE,
)
# in request bodies, where max_tokens and tokenizer are allowed
FIELD_NAME = re.compile(
    r"api[-_]?key|secret|passw|passphrase|authorization|credential|(access|auth|bearer|session|api|refresh)[-_]?token"
    r"|(?<![a-z])(?:pass|pwd|pw)$",
    re.IGNORECASE,
)
SUSPECT_NAME = re.compile(r"key|token(?!iz|s?_?ids?|s$)|auth(?!or)|signature", re.IGNORECASE)

HASH_NAME = re.compile(r"revision|commit|sha\d*$|hash|digest|checksum", re.IGNORECASE)  # hexadecimal and no key
HEXADECIMAL = re.compile(r"(?:sha256:)?[0-9a-f]{40,64}")

UUID = re.compile(r"(?<![0-9a-f])[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}(?![0-9a-f])", re.IGNORECASE)
CHANGE = re.compile(r"(?<=[a-z])[A-Z0-9]|(?<=[A-Z])[0-9]|(?<=[A-Z])[a-z](?![a-z])|(?<=[0-9])[A-Za-z]")  # CamelCase has few
BASE64 = re.compile(r"[A-Za-z0-9+/]{18,}={0,2}")
CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{5}|[BCDFGHJKLMNPQRSTVWXZ]{5}")  # in a row, as words hardly have
QUANTIZATION = re.compile(r"[A-Z]+\d+(?:[A-Z]+\d+)?")  # of models, such as W8A8 or FP8
RANDOM_HOSTS = (".endpoints.huggingface.cloud", ".on.aws", ".amazonaws.com", ".run.app", ".azure.com")
"""Ends of host names whose first label is the random name of a deployment, and no secret."""

MAX_SEGMENTS = 6
"""Segments of a URL's path that are tried together: base64 of 64 bytes rarely has more slashes."""

REFERENCE = re.compile(r"\$(?:\$|\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")
"""`$NAME` or `${NAME}`, an environment variable; `$$` is a dollar sign."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def is_credential(text: str) -> bool:
    """Return whether a text holds what looks like a key, a token or a password."""
    return bool(KNOWN.search(text) or USERINFO.search(text) or ASSIGNED.search(text))


def mask_credentials(text: str) -> str:
    """Return a text with `***` in place of what looks like a credential."""
    return USERINFO.sub("***", KNOWN.sub("***", ASSIGNED.sub(_mask_value, text)))


def _mask_value(found: re.Match[str]) -> str:
    return found[0].removesuffix(found["assigned"] or found["said"]) + "***"


def is_random(text: str, length: int = 20) -> bool:
    """Return whether a text contains `length` consecutive characters that look random.

    These are UUIDs, letters with digits, and base64, also percent-encoded: of its neighbors,
    letters of both cases and digits, many differ in kind. Words joined by hyphens, dots or slashes
    are no such run.
    """
    text = unquote(text)
    return UUID.search(text) is not None or any(
        len(run) >= length and (_is_base64(run) or any(_is_key(part, length) for part in re.split("[/_-]", run)))
        for separators in (r"[^\w+=-]", r"[^\w+/=-]")
        for run in re.split(separators, text, flags=re.ASCII)
    )


def _is_key(run: str, length: int) -> bool:
    if len(run) < length or re.search(r"[A-Za-z]", run) is None:
        return False
    return len(re.findall(r"\d", run)) > 1 or CONSONANTS.search(run) is not None


def _is_base64(run: str) -> bool:
    """Return whether letters, digits and cases alternate as often as in random base64."""
    parts = [part for part in re.split("[/_+=-]", run) if len(part) > 2 and not QUANTIZATION.fullmatch(part)]
    changes = sum(len(CHANGE.findall(part)) for part in parts)
    return changes >= 0.19 * len(run)


def is_credential_as_name(text: str) -> bool:
    """Return whether the name of a field or header looks like a credential."""
    return is_credential(text) or is_random(text)


def is_credential_for_server(text: str) -> bool:
    """Return whether a text that goes to a server looks like a credential, however short."""
    return bool(OPENING.match(text)) or is_credential(text) or is_random(text)


def is_credential_in_header(name: str, value: str) -> bool:
    """Return whether a header's literal value looks like a credential."""
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
    if names and HASH_NAME.search(names[-1]) and HEXADECIMAL.fullmatch(literal):
        return False
    suspect = any(SUSPECT_NAME.search(name) for name in names)
    return is_credential_for_server(literal) or (suspect and is_random(re.sub(r"[^A-Za-z0-9]", "", literal), 16))


def find_labels(leaves: Mapping[tuple[str, ...], object], names: tuple[str, ...]) -> list[str]:
    """Return labels of a value other than keys: `{name: NAME, value: …}`, or text pairs.

    `leaves` are all single values of a request body, by their nested names.
    """
    *above, last = names
    labels: list[object] = []
    if last.lower() in ("value", "val", "v"):
        labels = [leaves.get((*above, name)) for name in ("name", "key", "header", "field", "k")]
    elif last == "1" and (*above, "2") not in leaves and re.search(r"[^A-Za-z_ -]", str(leaves[names])):
        labels = [leaves.get((*above, "0"))]
    return [label for label in labels if isinstance(label, str)]


def is_credential_in_url(url: str) -> bool:
    """Return whether the user, host or path of a URL looks like a credential.

    Base64 has slashes, so that segments of the path are also tried together.
    """
    literal = REFERENCE.sub("", url)
    host, *path = unquote(literal).partition("://")[2].split("/")
    labels = [] if host.partition(":")[0].endswith(RANDOM_HOSTS) else host.split(".")
    joined = ("/".join(path[start : start + count]) for start in range(len(path)) for count in range(2, MAX_SEGMENTS + 1))
    return (
        is_credential(literal)
        or is_credential(unquote(literal))
        or any(map(is_random, labels))
        or any(map(is_credential_for_server, path))
        or any(BASE64.fullmatch(text) and _is_base64(text) for text in joined)
    )
