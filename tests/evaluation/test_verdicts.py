"""Verdicts: the choice that an answer states, never the opposite.

Reports: FastChat#3921 and taosmd#176 (a label taken out of the reasoning).
"""

import pytest

from rlgf.evaluation.verdicts import read_verdict

ANSWERS = [
    ("Comparison: one is longer.\nPreferred: (A), because (B) leaves out the end.", "A"),
    ("Comparison: one is longer.\n**Preferred:** B (it names the boat, (A) does not)", "B"),
    ("Comparison: one is longer.\nPreferred: B. (A) says everything twice.", "B"),
    ("Preferred: B, as it has (a) a boat in it", "B"),
    ("Preferred: not (A)", None),
    ("Preferred: (B) is not as good as (A)", None),
    ("Preferred: A good summary", None),
    ("Preferred: Both (A) and (B)", None),
    ("Preferred: A/B", None),
    ("Preferred: A and B are equal", None),
    ("Preferred: (A)\nPreferred: (B)", None),
    ("Preferred:\n(A)", "A"),
    ("Answer: B\n\nExplanation: A is long.", "B"),
    ("The better summary is (B).", "B"),
    ("The answer is that A is bad", None),
    ("I prefer (B).", "B"),
    ("I do not prefer (B).", None),
    ("(B) is not better", None),
    ("**Final answer:** \\boxed{A}", "A"),
    ("$\\boxed{B}$", "B"),
    ("Preferred - (A)", "A"),
    ("Preferred: “A”", "A"),
    ("preferred: a", None),
    ("Tie", None),
    ('{"comparison": "(A) is short", "preferred": "B"}', "B"),
    ('```json\n{"comparison": "x", "preferred": "A"}\n```', "A"),
    ('{"comparison": "x", "preferred": "A"', "A"),  # cut off
    ('{"preferred": "A", "choice": "B"}', None),
    ('{"preferred": "tie"}', None),
    ('{"comparison": "(A)"}', None),
]


@pytest.mark.parametrize(("answer", "choice"), ANSWERS)
def test_a_verdict_is_what_the_answer_states(answer: str, choice: str | None) -> None:
    assert read_verdict(answer) == choice
