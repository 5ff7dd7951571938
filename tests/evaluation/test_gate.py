import json

import pytest

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation.gate import Gate

DIGESTS = {"a": "1", "b": "2"}
FACTS = {"text_sha256": "abc", "window_length": "64", "stride": "64"}


def row(perplexity, spec="int4:g32", tp=2):
    same = {"spec": spec, "tp": tp, "algorithm": "one-shot", "plan_digest": None}
    return same | {"perplexity": perplexity, "perplexity_exact": 10.0, "windows": 2}


def written(tmp_path, **changes):
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(FACTS | {"rows": [row(10.1)], "tensors": DIGESTS} | changes))
    return path


def test_without_a_baseline_the_exact_run_is_the_measure():
    gate = Gate.load(None, 0.01, DIGESTS, FACTS, 2)
    assert gate.failures([row(10.09)]) == []
    assert gate.failures([row(10.2)]) == ["int4:g32, TP 2: perplexity +2.00% against exact, above 1.00%"]
    assert gate.failures([row(float("nan"))])


def test_a_baseline_is_compared_case_by_case(tmp_path):
    gate = Gate.load(written(tmp_path), 0.005, DIGESTS, FACTS, 2)
    assert gate.failures([row(10.12)]) == []
    assert gate.failures([row(10.2)]) == ["int4:g32, TP 2: perplexity +0.99% against the baseline, above 0.50%"]
    with pytest.raises(ConfigError, match="the baseline lacks int8 at TP 2"):
        gate.failures([row(10, spec="int8")])


def test_a_baseline_of_another_model_is_refused_by_its_tensors(tmp_path):
    with pytest.raises(ConfigError, match="is of another model: b, c differ"):
        Gate.load(written(tmp_path), 0.01, {"a": "1", "b": "9", "c": "3"}, FACTS, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_sha256": "abd"}, "its text_sha256 is abd, now abc"),
        ({"window_length": "32"}, "its window_length is 32, now 64"),
        ({"stride": "8"}, "its stride is 8, now 64"),
        ({"rows": [row(10.1) | {"windows": 3}]}, "its windows is 3, now 2"),
    ],
)
def test_a_baseline_of_other_tokens_is_refused(changes, said, tmp_path):
    with pytest.raises(ConfigError, match=f"is of other tokens: {said}; evaluate the same windows"):
        Gate.load(written(tmp_path, **changes), 0.01, DIGESTS, FACTS, 2)


@pytest.mark.parametrize("changes", [{"rows": 3}, {"rows": []}, {"rows": [{}]}, {"tensors": None}])
def test_what_is_no_baseline_is_refused(changes, tmp_path):
    with pytest.raises(ConfigError, match="is no --json of evaluate"):
        Gate.load(written(tmp_path, **changes), 0.01, DIGESTS, FACTS, 2)
    with pytest.raises(ConfigError, match="is no --json of evaluate"):
        Gate.load(tmp_path / "none.json", 0.01, DIGESTS, FACTS, 2)
