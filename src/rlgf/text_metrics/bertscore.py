"""BERTScore by the package bert-score, with any encoder that transformers can load."""

import importlib
from collections.abc import Sequence
from typing import Any

from rlgf.data.hub import offline_if_unreachable
from rlgf.errors import ConfigError
from rlgf.models.configs import max_length
from rlgf.text_metrics.captions import plain
from rlgf.text_metrics.optional import require_extra

KEYS = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
DEFAULT_MODEL = "roberta-large"  # the package's own choice for English


class BertScore:
    """Precision, recall and F1 of contextual embeddings against a line's best reference.

    Source: Zhang et al. 2020. Without idf weights and without rescaling to a baseline. `layers` is
    the layer whose output is compared; for models of the package's list it is known (17 of
    roberta-large). The constructor raises `ConfigError` if the extra `bertscore` is missing, the
    model cannot be loaded or its layer is not known.
    """

    def __init__(self, model: str = DEFAULT_MODEL, layers: int | None = None, batch_size: int = 64) -> None:
        require_extra("BERTScore", "bertscore", "bert_score")
        package: Any = importlib.import_module("bert_score")
        known: dict[str, int] = importlib.import_module("bert_score.utils").model2layers
        if layers is None and model not in known:
            raise ConfigError(
                f"BERTScore has no default layer for '{model}': set the number of layers (`layers`, --bertscore-layers)."
            )
        importlib.import_module("transformers").logging.disable_progress_bar()
        try:
            with offline_if_unreachable():
                self.scorer: Any = package.BERTScorer(model, num_layers=layers or known[model], batch_size=batch_size)
        except AssertionError as error:
            raise ConfigError(f"BERTScore with {layers} layers: {str(error).removeprefix('Invalid num_layers: ')}.") from None
        # the Hub, the disk and the parser raise errors of their own
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"no encoder for BERTScore can be loaded from '{model}' ({reason}): give a Hub name or a folder (`model`, "
                "--bertscore-model)."
            ) from None
        tokenizer = self.scorer._tokenizer
        # a tokenizer saved without a limit has 1e30, which its own truncation rejects
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_length(self.scorer._model.config), 1 << 20)
        self.path, self.max_length = model, int(tokenizer.model_max_length)
        self.model, self.batch_size, self.num_truncated = model, batch_size, 0

    def count_truncated(self, texts: Sequence[str]) -> int:
        """Return the number of texts over the model's length: the package truncates them."""
        tokenizer = self.scorer._tokenizer
        limit = int(tokenizer.model_max_length)
        long = [plain(text) for text in texts if len(text.encode("utf-8", "surrogatepass")) > limit - 2]
        return sum(len(tokenizer(text, verbose=False)["input_ids"]) > limit for text in long)

    def __call__(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
        """Return for each key one number per text; 0 for a text without words."""
        nonempty = [number for number, text in enumerate(texts) if text.strip()]
        values = {key: [0.0] * len(texts) for key in KEYS}
        if not nonempty:
            return values
        groups = [[plain(reference) for reference in references[number]] for number in nonempty]
        columns = self.scorer.score([plain(texts[number]) for number in nonempty], groups, batch_size=self.batch_size)
        for key, column in zip(KEYS, columns):
            for number, value in zip(nonempty, column.tolist()):
                values[key][number] = float(value)
        return values
