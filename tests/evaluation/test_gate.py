import json

import pytest

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.evaluation.gate import Gate

DIGESTS = {"a": "1", "b": "2"}
FACTS = {"text_sha256": "f00", "tokens_sha256": "f01", "window_length": "512", "stride": "512"}


def row(perplexity, spec="int4:g32", tp=2, sites=None, tokens=100):
    same = {"spec": spec, "tp": tp, "algorithm": "one-shot", "plan_digest": None, "sites": sites, "tokens": tokens}
    return same | {"perplexity": perplexity, "perplexity_exact": 10.0}


def written(tmp_path, **changes):
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({"rows": [row(10.1)], "tensors": DIGESTS} | FACTS | changes))
    return path


def test_without_a_baseline_the_exact_run_is_the_measure():
    gate = Gate.load(None, 0.01)
    assert gate.failures([row(10.09)]) == []
    assert gate.failures([row(10.2)]) == ["int4:g32, TP 2: perplexity +2.00% against exact, above 1.00%"]
    assert gate.failures([row(float("nan"))])


def test_a_baseline_is_compared_case_by_case(tmp_path):
    gate = Gate.load(written(tmp_path), 0.005, FACTS, DIGESTS)
    assert gate.failures([row(10.12)]) == []
    assert gate.failures([row(10.2)]) == ["int4:g32, TP 2: perplexity +0.99% against the baseline, above 0.50%"]
    with pytest.raises(ConfigError, match="the baseline lacks int8 at TP 2"):
        gate.failures([row(10, spec="int8")])


def test_a_baseline_of_another_model_is_refused_by_its_tensors(tmp_path):
    with pytest.raises(ConfigError, match="is of another model: b, c differ"):
        Gate.load(written(tmp_path), 0.01, FACTS, {"a": "1", "b": "9", "c": "3"})


@pytest.mark.parametrize(
    "changes", [{"text_sha256": "bar"}, {"tokens_sha256": "bar"}, {"window_length": "64"}, {"stride": "256"}]
)
def test_perplexities_of_other_windows_are_not_compared(changes, tmp_path):
    with pytest.raises(ConfigError, match=f"is of other windows: its {next(iter(changes))} is"):
        Gate.load(written(tmp_path, **changes), 0.01, FACTS, DIGESTS)
    gate = Gate.load(written(tmp_path), 0.01, FACTS, DIGESTS)
    with pytest.raises(ConfigError, match="has 100 tokens of the text, now there are 50"):
        gate.failures([row(10.1, tokens=50)])


def test_some_sites_are_another_case(tmp_path):
    only = ("layers.0.*",)
    with pytest.raises(ConfigError, match="the baseline lacks int4:g32"):
        Gate.load(written(tmp_path), 0.01, FACTS, DIGESTS).failures([row(10.1, sites=only)])
    gate = Gate.load(written(tmp_path, rows=[row(10.1, sites=only)]), 0.01, FACTS, DIGESTS)
    assert gate.failures([row(10.1, sites=only)]) == [] and len(gate.failures([row(11, sites=only)])) == 1


@pytest.mark.parametrize("changes", [{"rows": 3}, {"rows": [{}]}, {"tensors": None}, {"rows": [row(None)]}])
def test_what_is_no_baseline_is_refused(changes, tmp_path):
    with pytest.raises(ConfigError, match="is no --json of evaluate"):
        Gate.load(written(tmp_path, **changes), 0.01, FACTS, DIGESTS)
    with pytest.raises(ConfigError, match="is no --json of evaluate"):
        Gate.load(tmp_path / "none.json", 0.01, FACTS, DIGESTS)
