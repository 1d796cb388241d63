"""Span corruption: what is left out can be put back, and never everything or nothing is."""

import pytest

from rlgf.supervised.span_corruption import corrupt


def test_spans_are_left_out_and_can_be_put_back():
    ids, sentinels = list(range(100, 120)), [1, 2, 3]
    source, target = corrupt(ids, sentinels, 0, 7)
    assert (source, target) == corrupt(ids, sentinels, 0, 7)
    assert corrupt(ids, sentinels, 0, 8) != (source, target)
    parts: dict[int, list[int]] = {}
    for token in target:
        if token in sentinels:
            parts[token] = []
        else:
            parts[max(parts)].append(token)
    assert sum(map(len, parts.values())) == 3  # 15 % of 20
    assert [x for token in source for x in parts.get(token, [token])] == ids
    places = {corrupt(ids, sentinels, 0, index)[0].index(1) for index in range(200)}
    assert places == set(range(18))  # anywhere, beginning and end included


@pytest.mark.parametrize("length", range(2, 40))
def test_no_text_is_left_out_whole_and_none_is_left_as_it_is(length: int):
    source, target = corrupt(list(range(100, 100 + length)), list(range(16)), 3, length)
    kept = [token for token in source if token >= 100]
    assert 1 <= len(kept) < length
    assert sorted(kept + [token for token in target if token >= 100]) == list(range(100, 100 + length))


def test_one_token_cannot_be_corrupted():
    with pytest.raises(ValueError, match="1 tokens"):
        corrupt([5], [1], 0, 0)
