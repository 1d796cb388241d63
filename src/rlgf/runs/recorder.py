"""Rollouts as JSON objects."""

from collections.abc import Sequence
from typing import Any

from rlgf.data.tokenization import Codec
from rlgf.rl.tensors import Rollout
from rlgf.types import Origin


def rollout_rows(rollout: Rollout, scores: Sequence[float], iteration: int, codec: Codec) -> list[dict[str, Any]]:
    """Return the rows of a rollout as JSON objects.

    Each has the completion, its spans by origin, the switch position, the score, and the completion
    of a text guide.
    """
    rows: list[dict[str, Any]] = []
    for i, prompt in enumerate(rollout.prompts):
        rows.append(
            {
                "iteration": iteration,
                "index": int(rollout.index[i]),
                "phase": int(rollout.phase[i]),
                "prompt": prompt.text,
                "text": rollout.completions[i],
                "spans": spans(rollout, i, codec),
                "switch_position": int(rollout.switch_position[i]),
                "rollout_by": Origin(int(rollout.rollout_by[i])).name.lower(),
                "ended_with_eos": bool(rollout.ended_with_eos[i]),
                "score": scores[i],
                "guide_completion": rollout.guide_completions[i] if rollout.guide_completions else None,
            }
        )
    return rows


def spans(rollout: Rollout, row: int, codec: Codec) -> list[dict[str, Any]]:
    """Return consecutive tokens of one origin as spans, with the text each adds."""
    length, start = int(rollout.lengths[row]), int(rollout.prompt_lengths[row])
    ids, origin = rollout.ids[row, :length].tolist(), rollout.origin[row, :length].tolist()
    prompt, found, done = ids[:start], list[dict[str, Any]](), ""
    at = start
    while at < length:
        end = at
        while end < length and origin[end] == origin[at]:
            end += 1
        whole = codec.decode([prompt], [ids[start:end]])[0]
        found.append({"origin": Origin(origin[at]).name.lower(), "tokens": end - at, "text": whole[len(done) :]})
        done, at = whole, end
    return found
