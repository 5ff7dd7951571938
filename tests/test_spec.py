"""The grammar: every legal spec parses to one canonical spelling, every other one says what is allowed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import megatron_lowbit as lowbit
from megatron_lowbit import spec

OPTIONS = ["g32", "g64", "g128", "g256", "sym", "spike", "trellis", "outliers=1/64", "outliers=1/8"]


def allowed(family: spec.Family) -> list[str]:
    options = OPTIONS[:4] if family.group else []
    return [*options, *family.flags, *([] if family.outliers is False else OPTIONS[7:])]


def kind(option: str) -> str:
    return option.split("=")[0].rstrip("0123456789")


legs = st.sampled_from(spec.FAMILIES).flatmap(
    lambda family: st.builds(
        lambda name, options: ":".join([name, *options]),
        st.sampled_from(family.names),
        st.lists(st.sampled_from(allowed(family)), unique_by=kind) if allowed(family) else st.just([]),
    )
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
    assert str(spec.parse("gauss4/fp8")) == "gauss4:g128/fp8:g128"
    assert str(spec.parse("int4:outliers=0.125:spike")) == "int4:g32:spike:outliers=1/8"
    assert str(spec.parse("int4:outliers=1/64/int8")) == "int4:g32:outliers=1/64/int8:g32"
    assert str(spec.parse("selective4:outliers=1/64")) == "selective4"
    assert spec.parse("selective4").calibrated and not spec.parse("mxfp4").calibrated


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
        ("int4:outliers=0", "fraction above 0"),
        ("int4:outliers=1e999999999", "fraction above 0"),
        ("int4:outliers=0.123456789", "fraction above 0"),
        ("int4:g" + "1" * 5000, "unknown option"),
        ("gauss8", "gauss2, gauss3"),
        ("mxfp4:g32", "'mxfp4' takes outliers=FRACTION; leave it out"),
        ("gauss4:sym", "'gauss4' takes g32, g64, g128, g256, trellis, outliers=FRACTION; leave it out"),
        (4, "a spec is a string, not int"),
        (["int4"], "a spec is a string, not list"),
        ("int4:g032", "unknown option"),
    ],
)
def test_wrong_specs_say_what_is_allowed(text, message):
    with pytest.raises(lowbit.ConfigError, match=message):
        spec.parse(text)


@pytest.mark.parametrize("family", spec.FAMILIES, ids=lambda family: family.names[0])
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_taken_or_refused_never_ignored(family, option):
    text = f"{family.names[-1]}:{option}"
    if option in allowed(family):
        assert str(spec.parse(f"{text}")) == str(spec.parse(str(spec.parse(text))))
        assert option in str(spec.parse(text)) or option in ("g32", "g128", "outliers=1/64")
    else:
        with pytest.raises(lowbit.ConfigError, match="leave it out"):
            spec.parse(text)


def test_a_codec_has_one_leg():
    with pytest.raises(lowbit.ConfigError, match="two legs where one codec is meant: use 'int4:g32'"):
        lowbit.codec("int4/int8")


def test_codecs_are_value_objects():
    assert lowbit.codec("int4") == lowbit.codec("int4:g32") != lowbit.codec("int4:g64")
    assert len({lowbit.codec("int4"), lowbit.codec("int4:g32")}) == 1
    assert "int4:g32" in repr(lowbit.codec("int4"))
