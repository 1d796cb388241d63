"""Key-value caches of a batch from which rows can be removed."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class PrefillGroup:
    """Distinct prefixes of one prefill, and the rows of the batch that share them."""

    prefix_rows: Tensor  # int64 [prefixes], one row of the batch for each prefix
    rows: Tensor  # int64 [rows], all rows of the batch that have one of the prefixes
    prefix_index: Tensor  # int64 [rows], index into `distinct`
    first_column: int  # the first column of the longest prefix


class CacheLayer(DynamicLayer):
    """Keys and values of one layer in a buffer that is written in place.

    Rows can be removed; columns are only added.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns, self.filled = rows, columns, 0
        self.prefilling: PrefillGroup | None = None
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values and return all that the query may attend to."""
        if self.key_buffer is None or self.value_buffer is None:
            _, heads, _, size = key_states.shape
            self.key_buffer = key_states.new_zeros((self.rows, heads, self.columns, size))
            self.value_buffer = value_states.new_zeros((self.rows, heads, self.columns, value_states.shape[-1]))
            self.is_initialized = True
        if self.prefilling is not None:
            group, last = self.prefilling, self.prefilling.first_column + key_states.shape[2]
            self.key_buffer[group.rows, :, group.first_column : last] = key_states[group.prefix_index]
            self.value_buffer[group.rows, :, group.first_column : last] = value_states[group.prefix_index]
            return key_states, value_states
        self.key_buffer[: self.rows, :, self.filled] = key_states.squeeze(2)
        self.value_buffer[: self.rows, :, self.filled] = value_states.squeeze(2)
        self.filled += 1
        return self.key_buffer[: self.rows, :, : self.filled], self.value_buffer[: self.rows, :, : self.filled]

    def keep(self, rows: Tensor) -> None:
        """Remove all rows except these; keeping the first rows copies nothing."""
        if self.key_buffer is not None and self.value_buffer is not None and int(rows[-1]) + 1 != len(rows):
            self.key_buffer[: len(rows), :, : self.filled] = self.key_buffer[rows, :, : self.filled]
            self.value_buffer[: len(rows), :, : self.filled] = self.value_buffer[rows, :, : self.filled]
        self.rows = len(rows)

    def get_seq_length(self) -> int:
        """Return the number of columns before the query."""
        return 0 if self.prefilling is not None else self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns the query may attend to, and the first one."""
        return self.get_seq_length() + query_length, 0


class EncoderCacheLayer(CacheLayer):
    """Cross-attention keys and values of one layer, complete after the prefill."""

    def end_prefill(self) -> None:
        """End the prefill; nothing is written to the layer after it."""
        self.filled, self.prefilling = self.columns, None
        self.keys, self.values = self.key_buffer, self.value_buffer

    def keep(self, rows: Tensor) -> None:
        """Remove all rows except these."""
        super().keep(rows)
        if self.key_buffer is not None and self.value_buffer is not None:
            self.keys, self.values = self.key_buffer[: self.rows], self.value_buffer[: self.rows]
