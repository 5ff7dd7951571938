"""Calibrations and their files: what goes in comes out, and no file, however damaged, does anything but ConfigError."""

import json
import os
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import megatron_lowbit as lowbit
from megatron_lowbit.calibration_file import Calibration
from megatron_lowbit.errors import ConfigError
from megatron_lowbit.ranges import Ranges
from megatron_lowbit.spec import parse

SITES = ("layers.0.attention", "layers.0.mlp")
FEATURES, TP = 130, 2


def make(tp=TP, sums=True, fraction=Fraction(1, 64), seed=0, sites=SITES, **metadata) -> Calibration:
    generator = torch.Generator().manual_seed(seed)

    def some(*shape):
        low = torch.randn(*shape, FEATURES, generator=generator)
        return low, low + torch.rand(*shape, FEATURES, generator=generator)

    ranges = {site: Ranges(*some(tp), *(some() if sums else ())) for site in sites}
    return Calibration.from_ranges(ranges, fraction, metadata)


@pytest.fixture
def file(tmp_path):
    make(fingerprint="f" * 64, model="small").save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def contents(file) -> tuple[dict, dict]:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}, opened.metadata()


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("fraction", ["1/64", "3/50", "1"])
def test_what_is_saved_is_loaded(tmp_path, sums, fraction):
    made = make(sums=sums, fraction=Fraction(fraction), model="small", note="é")
    made.save(tmp_path / "a.safetensors")
    loaded = Calibration.load(str(tmp_path / "a.safetensors"))
    assert loaded.name == "calibration a.safetensors" and os.listdir(tmp_path) == ["a.safetensors"]
    for name in ("sites", "tp", "fraction", "has_sums", "outliers", "digest", "fingerprint"):
        assert getattr(loaded, name) == getattr(made, name)
    for site in SITES:
        for part in ("low", "high") + ("sum_low", "sum_high") * sums:
            assert torch.equal(getattr(loaded.ranges[site], part), getattr(made.ranges[site], part))
    assert loaded.metadata["note"] == "é" and loaded.metadata["version"] == lowbit.__version__


def test_the_file_is_as_documented(file):
    tensors, metadata = contents(file)
    assert {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()} == {
        f"{site}.{part}": kind
        for site in SITES
        for part, kind in {
            "low": (torch.float32, (TP, FEATURES)),
            "high": (torch.float32, (TP, FEATURES)),
            "sum_low": (torch.float32, (FEATURES,)),
            "sum_high": (torch.float32, (FEATURES,)),
            "outliers": (torch.int32, (2,)),
        }.items()
    }
    assert (metadata["format"], metadata["format_version"]) == ("megatron_lowbit.calibration", "1")
    assert (metadata["tp"], metadata["fraction"], metadata["algorithm"]) == ("2", "1/64", "auto")
    assert json.loads(metadata["sites"]) == list(SITES)
    assert {"version", "torch", "date"} <= metadata.keys()


def test_saving_a_loaded_one_keeps_its_origin(file, tmp_path):
    loaded = Calibration.load(file)
    loaded.save(tmp_path / "b.safetensors")
    assert contents(tmp_path / "b.safetensors")[1] == contents(file)[1]


def test_a_digest_is_of_what_decides():
    digest = make().digest
    assert make(model="other name").digest == digest and len(digest) == 64
    others = [make(seed=1), make(sums=False), make(tp=4), make(fraction=Fraction(2, 64)), make(sites=("a", "b"))]
    assert len({digest, *(other.digest for other in others)}) == 6


def test_statistics_of_both_legs():
    made = make()
    ranges = made.ranges["layers.0.mlp"]
    scatter, gather = (made.statistics("layers.0.mlp", leg) for leg in ("scatter", "gather"))
    assert scatter.outliers == gather.outliers == ranges.outliers(Fraction(1, 64)) and len(scatter.outliers) == 2
    assert torch.equal(scatter.low, ranges.low) and torch.equal(scatter.high, ranges.high)
    assert gather.low.shape == (1, FEATURES) and torch.equal(gather.high[0], ranges.sum_high)


def test_statistics_that_are_not_there():
    with pytest.raises(ConfigError, match="unknown leg 'both': use 'scatter' or 'gather'"):
        make().statistics(SITES[0], "both")
    with pytest.raises(
        ConfigError, match="lacks layers.7.mlp, and has layers.0.attention, layers.0.mlp: run calibrate"
    ):
        make().statistics("layers.7.mlp", "scatter")
    make(sums=False).statistics(SITES[0], "scatter")
    with pytest.raises(ConfigError, match="was made for one-shot .* run calibrate --algorithm auto"):
        make(sums=False).statistics(SITES[0], "gather")


@pytest.mark.parametrize(
    "made, arguments, message",
    [
        ({}, {"tp": 8}, "was made for TP 2, this group has 8 ranks: run calibrate --tp 8"),
        (
            {},
            {"fingerprint": "0" * 64},
            "was made for another model (small, fingerprint ffffffffffff, this one has 0000",
        ),
        ({}, {"spec": parse("int4:outliers=1/32")}, "holds a fraction of 1/64 outliers, 'int4:g32:outliers=1/32' asks"),
        (
            {},
            {"spec": parse("int4/int8:outliers=0.5"), "algorithm": "two-step"},
            "run calibrate --fraction 1/2, or use",
        ),
        ({}, {"sites": [*SITES, "x", "y"]}, "lacks x, y, and has layers.0.attention, layers.0.mlp: run calibrate"),
        ({"sums": False}, {"algorithm": "two-step"}, "was made for one-shot"),
        ({"sums": False, "tp": 4}, {"algorithm": "auto", "spec": parse("selective4")}, "was made for one-shot"),
    ],
)
def test_check_names_what_differs(made, arguments, message):
    made = make(**made, fingerprint="f" * 64, model="small")
    with pytest.raises(ConfigError) as error:
        made.check(**arguments)
    assert message in str(error.value) and str(error.value).startswith("calibration in memory ")


@pytest.mark.parametrize(
    "made, arguments",
    [
        ({}, {"spec": parse("int4:outliers=1/64/selective4"), "tp": 2, "sites": SITES, "fingerprint": "f" * 64}),
        ({}, {"spec": parse("int4:outliers=1/64/int8:outliers=1/2"), "algorithm": "one-shot"}),
        ({"sums": False}, {"algorithm": "auto"}),
        ({"sums": False, "tp": 4}, {"algorithm": "one-shot", "spec": parse("selective4")}),
        ({"sums": False, "tp": 4}, {"algorithm": "two-step", "spec": parse("selective4/int8")}),
        ({}, {}),
    ],
)
def test_check_accepts_what_fits(made, arguments):
    make(**made, fingerprint="f" * 64).check(**arguments)
    make(**made).check(**arguments)  # one that was not made from a model fits every model


def test_what_is_no_calibration():
    one, two = make(sites="a"), make(tp=4, sites="b")
    with pytest.raises(ConfigError, match="0 sites have ranges"):
        Calibration.from_ranges({})
    with pytest.raises(ConfigError, match="1 sites have ranges, 0 outliers"):
        Calibration(one.ranges, {}, Fraction(1, 64))
    with pytest.raises(ConfigError, match="b has other ranks or legs than a"):
        Calibration.from_ranges({**one.ranges, **two.ranges})
    with pytest.raises(ConfigError, match="the fraction of outliers is 2: give a Fraction"):
        Calibration.from_ranges(one.ranges, 2)


@pytest.mark.parametrize("indices", [(3,), (3, 5, 7), (5, 3), (5, 5), (-1, 5), (5, FEATURES), ()])
def test_wrong_outliers(indices):
    with pytest.raises(ConfigError, match=rf"a: the outliers are not 2 ascending indices .* from 0 to {FEATURES - 1}"):
        Calibration(make(sites="a").ranges, {"a": indices}, Fraction(1, 64))


def changed(tensors=(), remove=(), **metadata):
    """A way to spoil a file."""

    def spoil(file):
        old, facts = contents(file)
        new = {name: x for name, x in (old | dict(tensors)).items() if name not in remove}
        facts = {name: text for name, text in (facts | metadata).items() if text is not None}
        save_file(new, file, facts)

    return spoil


LOW = "layers.0.mlp.low"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda file: file.unlink(), "there is no calibration file"),
        (lambda file: (file.unlink(), file.mkdir()), "is a folder: give the file that calibrate wrote"),
        (lambda file: file.write_bytes(b""), "cannot be read"),
        (lambda file: file.write_text("a text"), "cannot be read"),
        (lambda file: save_file({"x": torch.zeros(1)}, file), "is no calibration file: give one that calibrate wrote"),
        (changed(format="other"), "is no calibration file"),
        (changed(format_version="2"), "has format 2, this version reads 1: update megatron-lowbit"),
        (changed(format_version="one"), "format_version is 'one'"),
        (changed(tp="4"), "the metadata say TP 4, the tensors TP 2"),
        (changed(tp=None, fraction=None), "the metadata lack fraction, tp"),
        (changed(fraction="1e999999999"), "the metadata's fraction is '1e999999999'"),
        (changed(fraction="2"), "the fraction of outliers is Fraction(2, 1)"),
        (changed(fraction="1/32"), "the outliers are not 4 ascending indices"),
        (changed(sites="["), "cannot be read"),
        (changed(sites="[" * 100_000), "cannot be read"),
        (changed(sites="1"), "the metadata hold no list of sites"),
        (changed(sites="[]"), "the metadata hold no list of sites"),
        (changed(sites='["layers.0.mlp"]'), "are not those of its sites: layers.0.attention.high"),
        (changed(algorithm="one-shot"), "are not those of its sites: layers.0.attention.sum_high"),
        (changed(remove=[LOW]), "tensors are missing"),
        (changed({"more": torch.zeros(1)}), "are not those of its sites: more"),
        (changed({LOW: torch.zeros(TP, FEATURES).double()}), "layers.0.mlp: low is float64"),
        (changed({LOW: torch.zeros(FEATURES)}), "layers.0.mlp: low is float32 [130]"),
        (changed({LOW: torch.zeros(TP, 5)}), "layers.0.mlp: high is float32"),
        (changed({LOW: torch.full((TP, FEATURES), torch.nan)}), "layers.0.mlp: low holds a value that is not finite"),
        (changed({LOW: torch.full((TP, FEATURES), 1e9)}), "layers.0.mlp: a value of low is above that of high"),
        (changed({"layers.0.mlp.outliers": torch.tensor([1, 999], dtype=torch.int32)}), "the outliers are not 2"),
        (changed({"layers.0.mlp.outliers": torch.tensor([1, 9])}), "layers.0.mlp.outliers is int64 [2], not int32"),
        (changed({"layers.0.mlp.outliers": torch.tensor(1, dtype=torch.int32)}), "not int32 [outliers]"),
    ],
)
def test_files_that_are_refused(file, spoil, message):
    spoil(file)
    with pytest.raises(ConfigError) as error:
        Calibration.load(file)
    assert message in str(error.value) and str(file) in str(error.value)


def test_a_file_cut_short(file):
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1}:
        file.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="cannot be read"):
            Calibration.load(file)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8), st.booleans())
def test_changed_bytes_do_no_worse(tmp_path_factory, changes, in_header):
    """Many a change of a number goes unseen, and gives another calibration; none gives anything worse."""
    file = tmp_path_factory.mktemp("file") / "a"
    make().save(file)
    data = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little") if in_header else len(data)
    for place, byte in changes:
        data[int(place * (end - 1))] = byte
    file.write_bytes(data)
    try:
        loaded = Calibration.load(file)
    except ConfigError:
        return
    for site in loaded.sites:
        statistics = loaded.statistics(site, "scatter")
        assert 0 <= min(statistics.outliers) <= max(statistics.outliers) < statistics.features
        assert statistics.low.isfinite().all() and (statistics.low <= statistics.high).all()


def test_the_file_may_change_after_it_was_read(file):
    loaded = Calibration.load(file)
    low = loaded.ranges[SITES[0]].low.clone()
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert torch.equal(loaded.ranges[SITES[0]].low, low)


def test_where_it_cannot_be_written(tmp_path):
    for path, message in ((tmp_path, "is a folder or a device"), (tmp_path / "no" / "file", "cannot be written")):
        with pytest.raises(ConfigError, match=message):
            make().save(path)
    with pytest.raises(ConfigError, match="/dev/null is a folder or a device"):
        make().save("/dev/null")
    assert os.listdir(tmp_path) == []


def test_without_safetensors(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match=r"need safetensors: pip install 'megatron-lowbit\[hf\]'"):
        Calibration.load(file)
