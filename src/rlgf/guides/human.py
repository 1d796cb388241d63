"""A person at the terminal as the guide. Answers are kept as they are given: a run that was left goes on where it stopped."""

from collections.abc import Callable, Sequence

from rlgf.display import visible
from rlgf.errors import RunError
from rlgf.guides.base import Capabilities, Request, Text
from rlgf.guides.cache import AnswerCache, key_of
from rlgf.tokens import spaced

HELP = (
    "Write what comes next (\\n: a new line), then Enter. 'skip': leave it as it is. 'undo': the text before once more. "
    "With a space before them, these two are text."
)


class HumanGuide:
    """Shows what was written so far and takes the continuation."""

    capabilities = Capabilities(can_finish=True)

    def __init__(
        self, cache: AnswerCache, read: Callable[[str], str] = input, show: Callable[[str], None] = print, offline: bool = False
    ) -> None:
        self.cache, self._read, self._show, self.offline = cache, read, show, offline

    def complete(self, requests: Sequence[Request]) -> list[Text]:
        """One continuation for each request; what was answered before is not asked again."""
        keys = [key_of({"human": [r.prompt.text, r.prefix, r.index, r.seed]}) for r in requests]
        answers = [self.cache.get(key) for key in keys]
        open_places = [place for place, answer in enumerate(answers) if answer is None]
        if open_places and self.offline:
            raise RunError(
                f"the guide is offline and {len(open_places)} of its answers are not in {self.cache.path}: leave out --offline."
            )
        if open_places:
            self._show(HELP)
        at = 0
        while at < len(open_places):
            place = open_places[at]
            said = self._ask(requests[place], at + 1, len(open_places))
            if said == "undo":
                if at == 0:
                    self._show("There is nothing to undo: the texts before are in use already.")
                at = max(0, at - 1)
                continue
            text = "" if said == "skip" else said.replace("\\n", "\n")
            text = spaced(requests[place].prompt.text + requests[place].prefix, text)
            answers[place] = {"text": text, "finished": True}
            self.cache.put(keys[place], {"text": text, "finished": True}, replace=True)
            at += 1
        return [Text(answer["text"], answer["finished"]) for answer in answers if answer is not None]

    def _ask(self, request: Request, number: int, of: int) -> str:
        self._show(f"\n[{number}/{of}] {visible(request.prompt.text)}[[{visible(request.prefix)}]]")
        try:
            return self._read("> ")
        except (EOFError, UnicodeDecodeError):
            raise RunError(
                "the guide 'human' was asked, but nobody is at the terminal: run the same command in a terminal; "
                "answers given so far are kept."
            ) from None
