"""The flags for Megatron's parsers: what they accept, what they refuse, and that they enable what they say."""

import argparse
import subprocess
import sys
import warnings

import pytest

import megatron_lowbit as lowbit
from megatron_lowbit.patches.megatron.arguments import OPTIONS, add_lowbit_args, config_from_args, enable_from_args
from megatron_lowbit.plan_file import Plan
from tests.calibrations import random_calibration
from tests.ranks import run_ranks

SITES = [f"layers.{layer}.{kind}" for layer in range(2) for kind in ("attention", "mlp")]


def parse(*argv, provider=add_lowbit_args, tp=2):
    parser = argparse.ArgumentParser(allow_abbrev=False)  # as Megatron makes it
    parser.add_argument("--tensor-model-parallel-size", type=int, default=tp)
    return provider(parser).parse_args(argv)


def test_all_flags_reach_the_configuration(tmp_path):
    file = tmp_path / "known.safetensors"
    random_calibration(SITES, 2, 64, "1/8").save(file)
    args = parse(
        "--lowbit-comm", "selective4:outliers=1/8", "--lowbit-comm-algorithm", "two-step", "--lowbit-comm-min-bytes=64",
        "--lowbit-comm-sites", "layers.*.mlp", "--lowbit-comm-sites", "layers.0.*",
        "--lowbit-comm-calibration", str(file),
    )  # fmt: skip
    expected = lowbit.CommConfig(
        "selective4:outliers=1/8", "two-step", 64, ("layers.*.mlp", "layers.0.*"), calibration=file
    )
    assert config_from_args(args) == expected
    assert args.lowbit_comm == "selective4:outliers=1/8" and args.lowbit_comm_sites == ["layers.*.mlp", "layers.0.*"]


def test_what_travels_between_nodes_has_a_flag():
    flags = ("--lowbit-comm", "int4", "--lowbit-comm-algorithm", "hierarchical", "--lowbit-comm-outer", "int3")
    assert config_from_args(parse(*flags)) == lowbit.CommConfig("int4", "hierarchical", outer_spec="int3")
    with pytest.raises(lowbit.ConfigError, match="--lowbit-comm exact and --lowbit-comm-outer int3 exclude"):
        config_from_args(parse("--lowbit-comm", "exact", "--lowbit-comm-outer", "int3"))
    with pytest.raises(lowbit.ConfigError, match="--lowbit-comm-outer does nothing without --lowbit-comm"):
        config_from_args(parse("--lowbit-comm-outer", "int3"))


def test_without_the_flag_nothing_happens():
    assert enable_from_args(parse()) is None


def test_exact_is_a_configuration_that_compresses_nothing():
    assert config_from_args(parse("--lowbit-comm", "exact")).algorithm == "exact"
    with pytest.raises(lowbit.ConfigError, match="--lowbit-comm exact and --lowbit-comm-algorithm one-shot exclude"):
        config_from_args(parse("--lowbit-comm", "exact", "--lowbit-comm-algorithm", "one-shot"))


def test_a_script_keeps_its_own_provider():
    def own(parser):
        parser.add_argument_group("own").add_argument("--stream", action="store_true")
        return parser

    args = parse("--stream", "--lowbit-comm", "int8", provider=lambda parser: add_lowbit_args(own(parser)))
    assert args.stream and args.lowbit_comm == "int8"


def test_adding_the_flags_twice_is_adding_them_once():
    parser = argparse.ArgumentParser()
    assert add_lowbit_args(add_lowbit_args(parser)) is parser
    assert parser.format_help().count("low-bit communication") == 1


@pytest.mark.parametrize("flag", [flag for flag in OPTIONS if not flag.endswith("-sites")])
def test_a_flag_given_twice_is_an_error(flag, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(flag, "1", flag, "1")
    assert exit.value.code == 2 and f"{flag} is given twice: give it once" in capsys.readouterr().err


def test_a_parser_can_be_used_again():
    parser = add_lowbit_args(argparse.ArgumentParser())
    for _ in range(2):
        assert parser.parse_args(["--lowbit-comm", "int4"]).lowbit_comm == "int4"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lowbit-comm", "int99"], "int99"),
        (["--lowbit-comm", "int4", "--lowbit-comm-algorithm", "ring"], "unknown algorithm 'ring'"),
        (["--lowbit-comm", "int4", "--lowbit-comm-min-bytes", "-1"], "min_bytes is -1"),
        (["--lowbit-comm", "int4", "--lowbit-comm-plan", "p.json"], "spec 'int4' and a plan exclude each other"),
        (["--lowbit-comm-plan", "p.json"], "there is no plan file p.json"),
        (["--lowbit-comm", "selective4"], "needs a calibration"),
        (["--lowbit-comm-min-bytes", "0"], "--lowbit-comm-min-bytes does nothing without --lowbit-comm"),
    ],
)
def test_what_cannot_be_used_is_an_error(argv, message):
    with pytest.raises(lowbit.ConfigError, match=message):
        enable_from_args(parse(*argv))


def test_a_plan_takes_the_place_of_a_spec(tmp_path):
    Plan({"layers.0.mlp": "int8:g128"}, tp=2).save(tmp_path / "plan.json")
    config = config_from_args(parse("--lowbit-comm-plan", str(tmp_path / "plan.json")))
    assert config.spec == "plan" and str(config.legs_at("layers.0.mlp")) == "int8:g128"


def test_arguments_parsed_without_the_flags_are_an_error():
    with pytest.raises(lowbit.ConfigError, match="extra_args_provider=add_lowbit_args"):
        enable_from_args(argparse.Namespace(tensor_model_parallel_size=2))


def test_a_tensor_parallel_size_of_one_warns_and_runs():
    with pytest.warns(UserWarning, match="int4:g32 compresses nothing with a tensor-parallel size of 1"):
        assert enable_from_args(parse("--lowbit-comm", "int4", tp=1)) is None


def test_other_ranks_do_not_repeat_the_warning(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert enable_from_args(parse("--lowbit-comm", "int4", tp=1)) is None


def test_a_calibration_of_another_tensor_parallel_size_is_an_error_at_once(tmp_path):
    file = tmp_path / "four.safetensors"
    random_calibration(SITES, 4, 64, "1/8").save(file)
    args = parse("--lowbit-comm", "selective4:outliers=1/8", "--lowbit-comm-calibration", str(file))
    with pytest.raises(lowbit.ConfigError, match="made for TP 4, this group has 2 ranks"):
        enable_from_args(args)


def test_flags_need_no_megatron():
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "from megatron_lowbit.patches.megatron.arguments import *\n"
        "import argparse\n"
        "args = add_lowbit_args(argparse.ArgumentParser()).parse_args(['--lowbit-comm', 'int4'])\n"
        "print(config_from_args(args).spec)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("int4"), done.stderr


def _two_lines(rank, world):
    import torch

    from megatron_lowbit.patches import megatron_core
    from tests.megatron_models import gpt, logits, settings, start

    start(world)
    args = parse(
        "--lowbit-comm", "int6:g32", "--lowbit-comm-algorithm", "one-shot", provider=megatron_core.add_lowbit_args
    )
    handle = megatron_core.enable_from_args(args)
    again = megatron_core.enable_from_args(args) is handle  # under the launcher, which was given the same flags
    try:
        megatron_core.enable_from_args(parse("--lowbit-comm", "int4"))
        other = "no error"
    except lowbit.ConfigError as error:
        other = str(error)
    with torch.no_grad(), handle:
        logits(gpt(settings(world)))
    return {"again": again, "other": other, "stats": lowbit.stats()}


def test_the_two_lines_compress_every_row_parallel_reduce():
    for rank in run_ranks(2, _two_lines, timeout=200):
        assert rank["again"] and "already enabled with spec 'int6:g32'" in rank["other"]
        assert sorted(rank["stats"]) == SITES
        assert all(site["paths"] == {"one-shot": 1} and not site["fallbacks"] for site in rank["stats"].values())
