"""A person at the terminal as the guide.

Completions are stored as they are entered, so an interrupted run resumes where it stopped.
"""

from collections.abc import Callable, Sequence

from rlgf.data.tokenization import join_with_space
from rlgf.errors import GuideError
from rlgf.generation.openai.cache import ResponseCache, cache_key
from rlgf.guides.base import Capabilities, Completion, CompletionRequest
from rlgf.untrusted_text import escape_control_characters

HELP = (
    "Write what comes next (\\n: a new line), then Enter. 'skip': leave it as it is. 'undo': the text before once more. "
    "With a space before them, these two are text."
)


class HumanGuide:
    """A guide that shows prompt and prefix and takes the completion from the terminal."""

    capabilities = Capabilities(can_continue=True)

    def __init__(
        self,
        cache: ResponseCache,
        read: Callable[[str], str] = input,
        show: Callable[[str], None] = print,
        offline: bool = False,
    ) -> None:
        self.cache, self._read, self._show, self.offline = cache, read, show, offline

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """Return one completion for each request; stored ones are reused."""
        keys = [cache_key({"human": [r.prompt.text, r.prefix, r.index, r.seed]}) for r in requests]
        stored = [self.cache.get(key) for key in keys]
        open_places = [place for place, entry in enumerate(stored) if entry is None]
        if open_places and self.offline:
            raise GuideError(
                f"the guide is offline and {len(open_places)} of its completions are not in {self.cache.path}: leave "
                "out --offline."
            )
        if open_places:
            self._show(HELP)
        at = 0
        while at < len(open_places):
            place = open_places[at]
            typed = self._prompt_user(requests[place], at + 1, len(open_places))
            if typed == "undo":
                if at == 0:
                    self._show("Nothing to undo: earlier completions are in use already.")
                at = max(0, at - 1)
                continue
            text = "" if typed == "skip" else typed.replace("\\n", "\n")
            text = join_with_space(requests[place].prompt.text + requests[place].prefix, text)
            stored[place] = {"text": text, "finished": True}
            self.cache.put(keys[place], {"text": text, "finished": True}, replace=True)
            at += 1
        return [Completion(entry["text"], entry["finished"]) for entry in stored if entry is not None]

    def _prompt_user(self, request: CompletionRequest, number: int, of: int) -> str:
        self._show(
            f"\n[{number}/{of}] {escape_control_characters(request.prompt.text)}[[{escape_control_characters(request.prefix)}]]"
        )
        try:
            return self._read("> ")
        except (EOFError, UnicodeDecodeError):
            raise GuideError(
                "the guide 'human' needs a terminal: run the same command in one; completions given so far are kept."
            ) from None
