import pytest

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation.windows import consecutive


def scored(windows, prefix=()):
    return [token for w in windows for token in w.ids[w.first :].tolist()]


@pytest.mark.parametrize("prefix", [(), (99,)])
@pytest.mark.parametrize("stride", [None, 1, 3, 4])
def test_each_token_is_scored_once(stride, prefix):
    ids = list(range(20))
    windows = consecutive(ids, 4 + len(prefix), stride, prefix=prefix)
    found = scored(windows)
    assert len(found) == len(set(found)) and 99 not in found
    assert all(len(w.ids) == 4 + len(prefix) and w.scored == len(w.ids) - w.first for w in windows)
    if stride == 3:
        assert found == ids[0 if prefix else 1 : 19]


def test_windows_side_by_side_miss_only_what_nothing_precedes():
    assert scored(consecutive(list(range(10)), 5)) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert scored(consecutive(list(range(10)), 6, prefix=(99,))) == list(range(10))


def test_takes_as_many_as_asked_for():
    assert len(consecutive(list(range(100)), 10, count=3)) == 3
    assert len(consecutive(list(range(109)), 10)) == 10


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
