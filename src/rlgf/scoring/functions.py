"""The text metrics as functions of (prompts, texts), for rewards and for a task's own metrics.

Each reads what it needs from the prompts: their references, or one of their columns. Each is pure: the number of a text hangs
on its prompt and on nothing else in the batch. All are on coco-caption's scale, and finite for an empty text.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, ValidationError, validate_call

from rlgf.errors import UserError, unknown
from rlgf.scoring import captions, rouge
from rlgf.scoring.bertscore import BertScore
from rlgf.scoring.concepts import ConceptCoverage, concepts_in
from rlgf.scoring.diversity import repetition
from rlgf.types import Prompt, TextFunction

Measure = Callable[[list[str], list[Sequence[str]]], list[float]]  # (texts, the references of each) -> one number each


def build_text_function(
    name: str, train_prompts: Sequence[Prompt] = (), options: Mapping[str, Any] | None = None
) -> TextFunction:
    """The function of that name, one of `TEXT_FUNCTIONS`.

    CIDEr-D and SPIDEr take their document frequencies from the references of `train_prompts`, one document per prompt.
    Jars, Java, packages and models are looked for at once, not at the first text. Raises `UserError` for an unknown name or
    option, and for what is missing.
    """
    if name not in TEXT_FUNCTIONS:
        raise unknown("text function", name, TEXT_FUNCTIONS)
    make, given = TEXT_FUNCTIONS[name], dict(options or {})
    known = [key for key in inspect.signature(make).parameters if key not in ("train_prompts", "key")]
    for key in given:
        if key not in known:
            if not known:
                raise UserError(f"'{name}' takes no options, but was given '{key}': remove it.")
            raise unknown(f"option of '{name}'", key, known)
    fixed = {"train_prompts": train_prompts, "key": name}
    wanted = {key: value for key, value in fixed.items() if key in inspect.signature(make).parameters}
    try:
        return validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))(make)(**given, **wanted)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing_keyword_only_argument":
            raise UserError(f"'{name}' needs the option '{first['loc'][0]}': set it.") from None
        raise UserError(f"option '{first['loc'][0]}' of '{name}' is {first['input']!r}: {first['msg']}.") from None


class Sum:
    """Several functions, each times its weight, added."""

    def __init__(self, terms: Mapping[str, tuple[float, TextFunction]]) -> None:
        self.terms = terms

    def total(self, parts: Mapping[str, Sequence[float]]) -> list[float]:
        """The sum of what they said."""
        weights = [weight for weight, _ in self.terms.values()]
        return [math.fsum(w * value for w, value in zip(weights, values)) for values in zip(*parts.values())]

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """The sum for each text."""
        return self.total({name: list(function(prompts, texts)) for name, (_, function) in self.terms.items()})


def said(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[str]:
    """Texts without what a chat template opens every reply with."""
    return [prompt.said(text) for prompt, text in zip(prompts, texts)]


def said_references(prompt: Prompt) -> list[str]:
    """The references of a prompt that say something, likewise."""
    return [said for reference in prompt.references if (said := prompt.said(reference)).strip()]


def of_references(measure: Measure) -> TextFunction:
    """A measure of texts and references as a function of prompts and texts; a prompt without references is an error."""

    def function(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        references: list[Sequence[str]] = []
        for prompt in prompts:
            group = said_references(prompt)
            if not group:
                raise ValueError(f"the prompt {prompt.text[:60]!r} has no references to compare a text with")
            references.append(group)
        return measure(said(prompts, texts), references) if texts else []

    return function


def of_tokens(measure: Measure) -> TextFunction:
    """The same for a measure that reads PTB tokens; those of the references are kept."""
    tokenizer = captions.shared_tokenizer()
    return of_references(lambda texts, references: measure(tokenizer(texts), list(tokenizer.groups(references))))


def check_read(name: str, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> None:
    """Refuse prompts without what a text function reads of them, and say how many there are."""
    if name in OF_TEXTS_ALONE:
        return
    if name == "concept_coverage":
        column = options.get("column", "concepts")
        lacking, what = [prompt for prompt in prompts if not _has_concepts(prompt, column)], f"concepts in column '{column}'"
    else:
        lacking, what = [prompt for prompt in prompts if not said_references(prompt)], "a reference to compare a text with"
    if lacking:
        raise UserError(
            f"'{name}' as a reward needs {what} for every prompt, and {len(lacking):,} of {len(prompts):,} have none, "
            f"{lacking[0].text[:60]!r} among them: give them one, or leave those rows out."
        )


def _has_concepts(prompt: Prompt, column: str) -> bool:
    try:
        return bool(concepts_in(prompt.columns.get(column)))
    except ValueError:
        return False


def cider_measure(train_prompts: Sequence[Prompt]) -> Measure:
    """CIDEr-D on tokens, with the document frequencies of these prompts' references."""
    documents = [group for prompt in train_prompts if (group := [prompt.said(text) for text in prompt.references])]
    if not documents:
        raise UserError("CIDEr-D needs training prompts with references, from which its document frequencies come.")
    return captions.CiderD(captions.shared_tokenizer().groups(documents))


def cider_d(*, train_prompts: Sequence[Any]) -> TextFunction:
    """CIDEr-D, 0 to 10."""
    return of_tokens(cider_measure(train_prompts))


def spice() -> TextFunction:
    """SPICE, 0 to 1."""
    return of_tokens(captions.Spice())


def spider(*, train_prompts: Sequence[Any], cider_coefficient: float = 1.0, spice_coefficient: float = 1.0) -> TextFunction:
    """SPIDEr: CIDEr-D and SPICE, each times its coefficient, added."""
    return Sum({"cider_d": (cider_coefficient, cider_d(train_prompts=train_prompts)), "spice": (spice_coefficient, spice())})


def bleu(*, key: str) -> TextFunction:
    """BLEU of one text, without smoothing, 0 to 1."""
    order = int(key.removeprefix("bleu_"))
    return of_tokens(lambda texts, references: captions.bleu(texts, references)[1][order - 1])


def meteor() -> TextFunction:
    """METEOR, 0 to 1."""
    return of_tokens(lambda texts, references: captions.meteor(texts, references)[1])


def rouge_l() -> TextFunction:
    """ROUGE-L of the caption tools, 0 to 1."""
    return of_tokens(captions.rouge_l)


def rouge_n(*, key: str, stemming: bool = False) -> TextFunction:
    """ROUGE of the summarisation tools against the best reference, 0 to 1."""
    scorer = rouge.Rouge(stemming, (key,))
    return of_references(lambda texts, references: scorer(texts, references)[key])


def bert_score(*, key: str, model: str = "roberta-large", layers: int | None = None, batch_size: int = 64) -> TextFunction:
    """BERTScore against the best reference; a text that is too long for the model is an error."""
    scorer = BertScore(model, layers, batch_size)

    def measure(texts: list[str], references: list[Sequence[str]]) -> list[float]:
        cut = scorer.cut([*texts, *(reference for group in references for reference in group)])
        if cut:
            raise ValueError(f"{cut} of the texts are longer than '{model}' reads")
        return scorer(texts, references)[key]

    return of_references(measure)


def concept_coverage(*, column: str = "concepts") -> TextFunction:
    """The share of the concepts in a prompt's column that a text mentions, 0 to 1."""
    coverage = ConceptCoverage(captions.shared_tokenizer())

    def function(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        concepts: list[tuple[str, ...]] = []
        for prompt in prompts:
            try:
                concepts.append(concepts_in(prompt.columns.get(column)))
            except ValueError as error:
                raise ValueError(f"column '{column}' of the prompt {prompt.text[:60]!r}: {error}") from None
        return coverage(said(prompts, texts), concepts)

    return function


def length_penalty(*, maximum: int, minimum: int = 0) -> TextFunction:
    """Minus the number of words above the maximum or below the minimum; 0 between them."""
    if not 0 <= minimum <= maximum:
        raise UserError(f"'length_penalty' has minimum {minimum} and maximum {maximum}: they must be 0 or more, and in order.")

    def function(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        lengths = [len(text.split()) for text in said(prompts, texts)]
        return [0.0 - max(length - maximum, minimum - length, 0) for length in lengths]

    return function


def repetition_penalty(*, order: int = 3) -> TextFunction:
    """Minus the share of a text's n-grams of words that it has said before; 0 where it says nothing twice."""
    if order < 1:
        raise UserError(f"'repetition_penalty' has order {order}, but must have at least 1.")

    def function(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return [0.0 - repetition(text, order) for text in said(prompts, texts)]

    return function


OF_TEXTS_ALONE = ("length_penalty", "repetition_penalty")  # whatever the prompt

TEXT_FUNCTIONS: dict[str, Callable[..., TextFunction]] = {
    "cider_d": cider_d,
    "spice": spice,
    "spider": spider,
    **{f"bleu_{order}": bleu for order in range(1, captions.ORDERS + 1)},
    "meteor": meteor,
    "rouge_l": rouge_l,
    **dict.fromkeys(rouge.KEYS, rouge_n),
    **dict.fromkeys(("bertscore_precision", "bertscore_recall", "bertscore_f1"), bert_score),
    "concept_coverage": concept_coverage,
    "length_penalty": length_penalty,
    "repetition_penalty": repetition_penalty,
}
"""The functions by name; their keyword arguments are their options."""
