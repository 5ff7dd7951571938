import pytest
import torch

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation.windows import consecutive, continued, masked


def scored(windows, prefix=()):
    return [token for w in windows for token in w.targets.tolist()]


@pytest.mark.parametrize("prefix", [(), (99,)])
@pytest.mark.parametrize("stride", [None, 1, 3, 4])
def test_each_token_is_scored_once(stride, prefix):
    ids = list(range(20))
    windows = consecutive(ids, 4 + len(prefix), stride, prefix=prefix)
    found = scored(windows)
    assert len(found) == len(set(found)) and 99 not in found
    assert all(len(w.ids) == 4 + len(prefix) and w.ids[w.positions + 1].equal(w.targets) for w in windows)
    if stride == 3:
        assert found == ids[0 if prefix else 1 : 19]


def test_windows_side_by_side_miss_only_what_nothing_precedes():
    assert scored(consecutive(list(range(10)), 5)) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert scored(consecutive(list(range(10)), 6, prefix=(99,))) == list(range(10))


def test_takes_as_many_as_asked_for():
    assert len(consecutive(list(range(100)), 10, count=3)) == 3
    assert len(consecutive(list(range(109)), 10)) == 10


MASK, CLS, SEP, UNKNOWN = 100, 101, 102, 103


@pytest.mark.parametrize("stride", [None, 5, 20])
def test_some_tokens_are_masked_and_no_others_change(stride):
    ids = [UNKNOWN if n % 7 == 0 else n for n in range(90)]
    windows = masked(ids, 42, stride, None, (CLS,), (SEP,), mask=MASK, spared=(UNKNOWN, CLS, SEP, MASK))
    again = masked(ids, 42, stride, None, (CLS,), (SEP,), mask=MASK, spared=(UNKNOWN, CLS, SEP, MASK))
    for number, (window, same) in enumerate(zip(windows, again, strict=True)):
        start = number * (stride or 40)
        text = torch.tensor([CLS, *ids[start : start + 40], SEP])
        assert window.ids[window.positions].tolist() == [MASK] * window.scored
        assert text[window.positions].equal(window.targets) and UNKNOWN not in window.targets
        rest = torch.ones(42, dtype=torch.bool)
        rest[window.positions] = False
        assert window.ids[rest].equal(text[rest])
        new = 40 if number == 0 or stride is None else stride
        possible = [token for token in text[1:41][40 - new :].tolist() if token != UNKNOWN]
        assert window.scored == max(1, round(0.15 * len(possible))) and window.ids.equal(same.ids)
        assert set(window.targets.tolist()) <= set(possible)
    assert len(set(scored(windows))) == len(scored(windows)) and len(windows) == 1 + 50 // (stride or 40)


def test_a_stride_of_one_masks_each_token_alone():
    windows = masked(range(30), 12, 1, None, (CLS,), (SEP,), mask=MASK)
    assert all(w.scored == 1 for w in windows[1:]) and scored(windows[1:]) == list(range(10, 30))


def test_nothing_to_mask():
    with pytest.raises(ConfigError, match="window 1 has no token that can be masked"):
        masked([1, 2, 3, 4, 9, 9, 9, 9], 4, mask=MASK, spared=(9,))


@pytest.mark.parametrize("stride", [None, 2, 5])
def test_the_second_half_is_predicted_from_the_first(stride):
    windows = continued(range(30), 9, stride, None, (), (SEP,), start=MASK)
    for number, window in enumerate(windows):
        start = number * (stride or 8)
        assert window.ids.tolist() == [*range(start, start + 4), SEP]
        assert window.decoder_ids.tolist() == [MASK, *range(start + 4, start + 7)]
        expected = range(start + (6 if stride == 2 and number else 4), start + 8)
        assert window.targets.tolist() == list(expected) == [*range(start + 4, start + 8)][window.positions[0] :]
    assert set(windows[0].inputs("cpu")) == {"input_ids", "decoder_input_ids"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 1}, "give 2 or more"),
        ({"length": 3, "prefix": (1, 2)}, "give 2 or more"),
        ({"length": 5, "stride": 6}, "stride is 6"),
        ({"length": 5, "stride": 0}, "stride is 0"),
        ({"length": 5, "count": 0}, "give 1 or more"),
        ({"length": 5, "count": 5}, "need 25"),
        ({"length": 30}, "has 20 tokens"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ConfigError, match=message):
        consecutive(list(range(20)), **arguments)
