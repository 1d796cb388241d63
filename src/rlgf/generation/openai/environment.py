"""Values from environment variables in the settings of a server, and secrets in its messages."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast
from urllib.parse import quote

from rlgf.credentials import REFERENCE, mask_credentials
from rlgf.errors import ConfigError

MIN_SECRET = 4  # characters; shorter values are not hidden
MAX_MESSAGE = 300  # characters
_secrets: set[str] = set()  # read in this process, for a guide or a judge: hidden in the messages of both


def read_secret(variable: str) -> str | None:
    """Return the secret in an environment variable, or None if it is unset or empty.

    Raises `ConfigError` for characters that a header cannot contain.
    """
    secret = os.environ.get(variable, "").strip()
    if not (secret.isascii() and secret.isprintable()):
        raise ConfigError(f"the environment variable {variable} contains characters that no key has: set it again.")
    return secret or None


class Environment:
    """The environment variables that the settings of one server name, and their values.

    `role` names the server in errors, 'guide' or 'judge'.
    """

    def __init__(self, role: str) -> None:
        self.role = role

    def read(self, variable: str) -> str | None:
        """Return the secret in a variable, or None; messages hide it from now on."""
        secret = read_secret(variable)
        # a header may have a scheme before its secret ('Bearer …'), and an error only the secret
        for part in (secret, *secret.split()) if secret else ():
            forms = (part, quote(part, safe=""), json.dumps(part)[1:-1], repr(part)[1:-1])  # as an error may quote it
            _secrets.update(form for form in forms if len(form) >= MIN_SECRET)
        return secret

    def fill(self, value: Any, field: str) -> Any:
        """Return a value with its `$NAME` replaced, also in lists and mappings.

        Raises `ConfigError` if a variable is not set; `field` names the setting.
        """
        if isinstance(value, str):
            return REFERENCE.sub(lambda found: self._value(found[1] or found[2], field), value)
        if isinstance(value, Mapping):
            return {name: self.fill(item, field) for name, item in cast("Mapping[str, Any]", value).items()}
        if isinstance(value, list | tuple):
            return [self.fill(item, field) for item in cast("Sequence[Any]", value)]
        return value

    def _value(self, variable: str | None, field: str) -> str:
        if variable is None:  # `$$`
            return "$"
        found = self.read(variable)
        if found is None:
            raise ConfigError(f"{self.role}.{field} names the environment variable {variable}, which is not set: export it.")
        return found

    def hide(self, message: str) -> str:
        """Return a server's message without secrets, on one line of at most 300 characters."""
        for secret in sorted(_secrets, key=len, reverse=True):
            message = message.replace(secret, "***")
        return " ".join(mask_credentials(message).split())[:MAX_MESSAGE]
