"""The grammar: every legal spec parses to one canonical spelling, every other one says what is allowed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import megatron_lowbit as lowbit
from megatron_lowbit import spec

legs = st.one_of(
    st.sampled_from(spec.PASSTHROUGH),
    st.builds(
        lambda name, options: ":".join([name, *options]),
        st.sampled_from(spec.INTEGERS),
        st.tuples(st.sampled_from(["g32", "g64", "g128", "g256"]), st.just("sym")).flatmap(
            lambda both: st.lists(st.sampled_from(both), unique=True)
        ),
    ),
)


@given(legs, legs)
def test_canonical_spelling_is_a_fixed_point(a, b):
    for text in (a, f"{a}/{b}"):
        parsed = spec.parse(text)
        assert spec.parse(str(parsed)) == parsed
    assert spec.parse(f"{a}/{b}").gather == spec.parse(b).scatter


def test_defaults_and_spelling():
    assert str(spec.parse("int4")) == "int4:g32"
    assert str(spec.parse(" int4:sym:g64 / bf16 ")) == "int4:g64:sym/bf16"
    assert str(spec.parse("int8:g128/int8:g128")) == "int8:g128"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "unknown codec ''"),
        ("int9", "int2, int3"),
        ("int4:g48", "use one of g32, g64"),
        ("int4:G32", "unknown option"),
        ("int4:g32:g64", "repeats 'g32'"),
        ("int4:sym:sym", "repeats"),
        ("bf16:g32", "takes no options"),
        ("int4/int4/int4", "3 legs"),
        ("int4:", "unknown option ''"),
        ("int4/", "unknown codec ''"),
        ("int4:outliers=2", "fraction above 0"),
        ("int4:outliers=1/0", "fraction above 0"),
        (4, "a spec is a string, not int"),
        (["int4"], "a spec is a string, not list"),
        ("int4:g032", "unknown option"),
    ],
)
def test_wrong_specs_say_what_is_allowed(text, message):
    with pytest.raises(lowbit.ConfigError, match=message):
        spec.parse(text)


@pytest.mark.parametrize("text", [*spec.PLANNED, "int4:spike", "int4:outliers=1/64", "int4/gauss4:g128", "mxfp4:g32"])
def test_codecs_of_later_versions_are_refused_by_name(text):
    with pytest.raises(lowbit.LowBitError, match="not available in this version"):
        spec.parse(text)


def test_a_codec_has_one_leg():
    with pytest.raises(lowbit.ConfigError, match="two legs where one codec is meant: use 'int4:g32'"):
        lowbit.codec("int4/int8")


def test_codecs_are_value_objects():
    assert lowbit.codec("int4") == lowbit.codec("int4:g32") != lowbit.codec("int4:g64")
    assert len({lowbit.codec("int4"), lowbit.codec("int4:g32")}) == 1
    assert "int4:g32" in repr(lowbit.codec("int4"))
