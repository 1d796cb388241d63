"""The text metrics as functions of (prompts, texts), for rewards and a task's own metrics.

Each uses the references or a column of the prompts. Each is pure: the value of a text depends on
its prompt and on nothing else in the batch. All are on coco-caption's scale, and finite for an
empty text.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rlgf.bounds import FiniteFloat, Flag, LengthOrZero, Size, SmallInt
from rlgf.config.base import as_config_error
from rlgf.errors import ConfigError, unknown
from rlgf.text_metrics import captions, rouge
from rlgf.text_metrics.bertscore import BertScore
from rlgf.text_metrics.concepts import ConceptCoverage, concepts_in
from rlgf.text_metrics.diversity import repetition
from rlgf.types import Prompt, RewardFunction
from rlgf.untrusted_text import shorten

# (texts, the references of each) -> one number per text
Measure = Callable[[list[str], list[Sequence[str]]], list[float]]
FIXED_ARGUMENTS = ("train_prompts", "key")  # of the functions below; the others are options


def build_text_function(
    name: str, train_prompts: Sequence[Prompt] = (), options: Mapping[str, Any] | None = None
) -> RewardFunction:
    """Build the function of that name, one of `TEXT_FUNCTIONS`.

    CIDEr-D and SPIDEr take their document frequencies from the references of `train_prompts`, one
    document per prompt.

    Raises `ConfigError` for an unknown name or option, and for missing jars, Java, packages or
    models: these are checked at once, not at the first text.
    """
    values = read_text_options(name, options)
    fixed = {"train_prompts": train_prompts, "key": name}
    wanted = {key: value for key, value in fixed.items() if key in inspect.signature(TEXT_FUNCTIONS[name]).parameters}
    return TEXT_FUNCTIONS[name](**values, **wanted)


def read_text_options(name: str, options: object = None) -> dict[str, Any]:
    """Return the options of a text function, checked without building it.

    Raises `ConfigError` for an unknown name or option, a missing one, or a value out of bounds.
    """
    if name not in TEXT_FUNCTIONS:
        raise unknown("text function", name, TEXT_FUNCTIONS)
    prefix, given = f"reward.options.{name}", {} if options is None else options
    if not isinstance(given, Mapping):
        raise ConfigError(f"{prefix} must be a mapping of options to values.")
    parameters = {
        key: value for key, value in inspect.signature(TEXT_FUNCTIONS[name]).parameters.items() if key not in FIXED_ARGUMENTS
    }
    found: dict[str, Any] = {}
    for key, value in cast("Mapping[str, Any]", given).items():
        if key not in parameters:
            if not parameters:
                raise ConfigError(f"'{name}' takes no options, but was given '{shorten(str(key), 60)}': remove it.")
            raise unknown(f"option of '{name}'", str(key), parameters, f"{prefix}.")
        try:
            found[key] = TypeAdapter(parameters[key].annotation, config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            raise as_config_error(error, f"metric '{name}'", f"{prefix}.{key}") from None
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in found:
            raise ConfigError(f"'{name}' needs the option '{key}': set {prefix}.{key}.")
    return found


def _sum(values: Sequence[float]) -> float:
    """Return the exact sum of values; without one, infinity or NaN."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # too large, or infinities of both signs
        return sum(values)


class TermSum:
    """The weighted sum of several functions."""

    def __init__(self, terms: Mapping[str, tuple[float, RewardFunction]]) -> None:
        self.terms = terms

    def total(self, parts: Mapping[str, Sequence[float]]) -> list[float]:
        """Return the weighted sum for each text of the functions' values by name."""
        weights = [weight for weight, _ in self.terms.values()]
        return [_sum([w * value for w, value in zip(weights, values)]) for values in zip(*parts.values())]

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Return the weighted sum for each text."""
        return self.total({name: list(function(prompts, texts)) for name, (_, function) in self.terms.items()})


def strip_reply_prefixes(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[str]:
    """Remove the prefix that a chat template puts before every reply."""
    return [prompt.strip_reply_prefix(text) for prompt, text in zip(prompts, texts)]


def reference_texts(prompt: Prompt) -> list[str]:
    """Return the nonempty references of a prompt, without the prefix of replies."""
    return [stripped for reference in prompt.references if (stripped := prompt.strip_reply_prefix(reference)).strip()]


def on_text(measure: Measure) -> RewardFunction:
    """Return a measure of texts and references as a function of prompts and texts.

    The function raises `ValueError` for a prompt without references.
    """

    def function(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        references: list[Sequence[str]] = []
        for prompt in prompts:
            group = reference_texts(prompt)
            if not group:
                raise ValueError(f"the prompt {prompt.text[:60]!r} has no references to compare a completion with")
            references.append(group)
        return measure(strip_reply_prefixes(prompts, texts), references) if texts else []

    return function


def on_tokens(measure: Measure) -> RewardFunction:
    """Return `on_text` of a measure on PTB tokens, which are cached."""
    tokenizer = captions.shared_tokenizer()
    return on_text(lambda texts, references: measure(tokenizer(texts), list(tokenizer.groups(references))))


def require_columns(name: str, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` if prompts lack the columns or references of a text function."""
    if name in WITHOUT_PROMPT_COLUMNS:
        return
    if name == "concept_coverage":
        column = options.get("column", "concepts")
        lacking, what = [prompt for prompt in prompts if not _has_concepts(prompt, column)], f"concepts in column '{column}'"
    else:
        lacking = [prompt for prompt in prompts if not reference_texts(prompt)]
        what = "a reference to compare a completion with"
    if lacking:
        raise ConfigError(
            f"'{name}' as a reward needs {what} for every prompt, and {len(lacking):,} of {len(prompts):,} have none, "
            f"{lacking[0].text[:60]!r} among them: give them one, or leave those rows out."
        )
    if name in rouge.KEYS:
        _require_letters(name, prompts, str(options.get("tokenizer", "latin")))


def _require_letters(name: str, prompts: Sequence[Prompt], tokenizer: str) -> None:
    """Raise `ConfigError` for references of which ROUGE's own tokenizer keeps next to nothing."""
    groups = [reference_texts(prompt) for prompt in prompts]
    lost = rouge.count_lost([""] * len(groups), groups, tokenizer)
    if lost:
        fix = f"set reward.options.{name}.tokenizer=unicode, or choose another reward"
        raise ConfigError(f"'{name}' as a reward: {rouge.lost_sentence(lost, len(groups), fix)}")


def _has_concepts(prompt: Prompt, column: str) -> bool:
    try:
        return bool(concepts_in(prompt.columns.get(column)))
    except ValueError:
        return False


def cider_measure(train_prompts: Sequence[Prompt]) -> Measure:
    """Return CIDEr-D on tokens, with document frequencies of these prompts' references."""
    documents = [
        group for prompt in train_prompts if (group := [prompt.strip_reply_prefix(text) for text in prompt.references])
    ]
    if not documents:
        raise ConfigError(
            "CIDEr-D needs training prompts with references for its document frequencies: add references, or "
            "choose another metric."
        )
    return captions.CiderD(captions.shared_tokenizer().groups(documents))


def cider_d(*, train_prompts: Sequence[Any]) -> RewardFunction:
    """Compute CIDEr-D, 0 to 10."""
    return on_tokens(cider_measure(train_prompts))


def spice() -> RewardFunction:
    """Compute SPICE, 0 to 1."""
    return on_tokens(captions.Spice())


def spider(
    *, train_prompts: Sequence[Any], cider_coefficient: FiniteFloat = 1.0, spice_coefficient: FiniteFloat = 1.0
) -> RewardFunction:
    """Compute SPIDEr, the sum of CIDEr-D and SPICE, each times its coefficient."""
    return TermSum(
        {"cider_d": (cider_coefficient, cider_d(train_prompts=train_prompts)), "spice": (spice_coefficient, spice())}
    )


def bleu(*, key: str) -> RewardFunction:
    """Compute BLEU of one text, without smoothing, 0 to 1."""
    order = int(key.removeprefix("bleu_"))
    return on_tokens(lambda texts, references: captions.bleu(texts, references)[1][order - 1])


def meteor() -> RewardFunction:
    """Compute METEOR, 0 to 1."""
    return on_tokens(lambda texts, references: captions.meteor(texts, references)[1])


def rouge_l() -> RewardFunction:
    """Compute ROUGE-L of the caption tools, 0 to 1."""
    return on_tokens(captions.rouge_l)


def rouge_n(*, key: str, stemming: Flag = False, tokenizer: rouge.TokenizerName = "latin") -> RewardFunction:
    """Compute ROUGE of the summarization tools against the best reference, 0 to 1."""
    scorer = rouge.Rouge(stemming, (key,), tokenizer)
    return on_text(lambda texts, references: scorer(texts, references)[key])


def bert_score(
    *, key: str, model: str = "roberta-large", layers: SmallInt | None = None, batch_size: Size = 64
) -> RewardFunction:
    """Compute BERTScore against the best reference; texts beyond its length are truncated."""
    scorer = BertScore(model, layers, batch_size)

    def measure(texts: list[str], references: list[Sequence[str]]) -> list[float]:
        scorer.num_truncated += scorer.count_truncated([*texts, *(reference for group in references for reference in group)])
        return scorer(texts, references)[key]

    reward = on_text(measure)
    reward.scorer = scorer  # pyright: ignore[reportFunctionMemberAccess]
    return reward


def concept_coverage(*, column: str = "concepts") -> RewardFunction:
    """Compute the share of the prompt's concepts that a text mentions, 0 to 1."""
    coverage = ConceptCoverage(captions.shared_tokenizer())

    def function(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        concepts: list[tuple[str, ...]] = []
        for prompt in prompts:
            try:
                concepts.append(concepts_in(prompt.columns.get(column)))
            except ValueError as error:
                raise ValueError(f"column '{column}' of the prompt {prompt.text[:60]!r}: {error}") from None
        return coverage(strip_reply_prefixes(prompts, texts), concepts)

    return function


def length_penalty(*, maximum: LengthOrZero, minimum: LengthOrZero = 0) -> RewardFunction:
    """Compute minus the number of words above the maximum or below the minimum.

    It is 0 between them.
    """
    if minimum > maximum:
        raise ConfigError(
            f"'length_penalty' has minimum {minimum} and maximum {maximum}: the minimum must be at most the maximum."
        )

    def function(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        lengths = [len(text.split()) for text in strip_reply_prefixes(prompts, texts)]
        return [0.0 - max(length - maximum, minimum - length, 0) for length in lengths]

    return function


def repetition_penalty(*, order: SmallInt = 3) -> RewardFunction:
    """Compute minus the share of a text's word n-grams that are repetitions.

    It is 0 for a text without any.
    """

    def function(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return [0.0 - repetition(text, order) for text in strip_reply_prefixes(prompts, texts)]

    return function


WITHOUT_PROMPT_COLUMNS = ("length_penalty", "repetition_penalty")  # independent of the prompt

TEXT_FUNCTIONS: dict[str, Callable[..., RewardFunction]] = {
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
