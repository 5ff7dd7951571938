"""Tables of what was measured on links, from rows written by hand."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from speed_tables import crossover, first_tokens, note, thresholds

from megatron_lowbit import links


@pytest.mark.parametrize(
    ("compressed", "size"),
    [
        ([1, 1, 1], 4096),
        ([3, 1, 1], 8192),
        ([1, 3, 1], 16384),  # a gain that is lost again does not count
        ([1, 1, 3], None),
        ([3, 3, 3], None),
        ([2, 2, 2], None),  # as fast is not faster
        ([1, 2, 1], 16384),
    ],
)
def test_crossover_is_where_every_larger_size_is_faster(compressed, size):
    sizes = [4096, 8192, 16384]
    shuffled = dict(reversed(list(zip(sizes, compressed, strict=True))))
    assert crossover(dict.fromkeys(sizes, 2), shuffled) == size


def test_thresholds_beside_what_is_held():
    row = {"rate_gbit": 1.0, "ranks": 2}
    rows = [row | {"bytes": 4096 << i, "spec": "bf16", "algorithm": "exact", "median_ms": 2.0} for i in range(2)]
    for spec, times in (("int4:g32", (3.0, 1.0)), ("gauss4:g128:trellis", (4.0, 3.0))):
        for i, ms in enumerate(times):
            rows.append(row | {"bytes": 4096 << i, "spec": spec, "algorithm": "auto", "median_ms": ms})
            rows.append(row | {"bytes": 4096 << i, "spec": spec, "algorithm": "gate", "median_ms": 0.0})
    columns, lines = thresholds([*rows, *({**r, "rate_gbit": None} for r in rows)])
    (_, quick, slow, _), *_ = links.named("cpu", "medium").worth
    assert columns == ["link", "kind", "`int4:g32`", "`gauss4:g128:trellis`"]
    cells = [f"8 KiB ({quick >> 10:,} KiB)", f"never ({slow >> 10:,} KiB)"]
    assert lines == [["1 Gbit/s, 2 ranks", "medium", *cells]]


def test_first_tokens_have_gate_and_always_in_one_row():
    row = {
        "engine": "megatron", "rate_gbit": 0.25, "ranks": 2, "tokens": 8, "spec": "int4:g32", "share": 0.652,
        "share_target": 0.65, "ttft_exact_ms": 1800.0, "decode_exact_ms": 20.0, "bytes_exact": 33e6,
        "algorithm": "gate", "ttft_ms": 1000.0, "ratio": 1.8, "decode_ms": 20.2, "bytes_sent": 11e6,
    }  # fmt: skip
    always = row | {"algorithm": "always", "ttft_ms": 900.0, "ratio": 2.0, "decode_ms": 25.0}
    columns, lines = first_tokens([row, always])
    cells = ["1800", "1000 (**1.80×**)", "900 (2.00×)", "33.0 → 11.0", "20.00", "20.20 (+1.0%)", "25.00 (+25.0%)"]
    assert lines == [["0.25 Gbit/s, 2 ranks", "65%", "`int4:g32`", *cells]] and len(columns) == len(lines[0])


def test_the_note_names_sizes_of_random_weights_only():
    result = {"model": "tiny", "dtype": "bfloat16", "rows": [{"engine": "megatron"}], "tokens": 1024}
    result |= {"decode_tokens": 8, "repeats": 3}
    end = ", bfloat16; megatron; a prompt of 1,024 tokens and 8 more; medians of 3, all in turn, of the slowest rank. "
    assert note(result) == "tiny" + end
    sized = result | {"layers": 2, "hidden": 64, "ffn": 96}
    assert note(sized) == "tiny of 2 layers, hidden size 64, 96 in the MLP" + end
