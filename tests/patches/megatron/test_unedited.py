"""What the launcher changes in Megatron, and that nothing of it stays."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import megatron_lowbit as lowbit
from tests.calibrations import random_calibration
from tests.ranks import run_ranks

pytest.importorskip("megatron.core")
if find_spec("megatron.training") is not None:  # wheels from 0.17 on have it, for Python 3.12
    pytest.skip("Megatron-Core brings a megatron.training of its own", allow_module_level=True)

STAND_IN = str(Path(__file__).parents[2] / "megatron_lm")


def _everything(rank, world):
    from megatron.core import parallel_state

    from megatron_lowbit.patches.megatron.unedited import Surroundings
    from tests.megatron_models import refused

    def sized(config):
        around = Surroundings(config, argparse.Namespace())
        try:
            said = refused(parallel_state.initialize_model_parallel, world, create_gloo_process_groups=False)
        finally:
            around.undo()
            parallel_state.destroy_model_parallel()
        return around.tp, around.flagged, said

    original = parallel_state.initialize_model_parallel
    four = random_calibration(["layers.0.mlp"], 4, 64, "1/8")
    results = {"without Megatron-LM": sized(lowbit.CommConfig("int4:g32")), "without flag": sized(None)}
    results["other"] = sized(lowbit.CommConfig("selective4:outliers=1/8", calibration=four))
    results["restored"] = parallel_state.initialize_model_parallel is original

    sys.path.append(STAND_IN)
    from megatron.training import arguments

    original, sys.argv = arguments.add_megatron_arguments, ["script.py"]
    flags = argparse.Namespace(
        lowbit_comm="int4", lowbit_comm_sites=["layers.*"], lowbit_comm_json="not a flag of args"
    )
    around = Surroundings(None, flags)
    parsed = vars(arguments.parse_args())
    results["flags"] = {name: value for name, value in parsed.items() if name.startswith("lowbit")}
    around.undo()
    results["flagged"] = around.flagged
    results["restored"] &= arguments.add_megatron_arguments is original and "lowbit_comm" not in vars(
        arguments.parse_args()
    )
    return results


def test_the_size_is_seen_and_the_flags_are_there_until_undone():
    for rank in run_ranks(2, _everything, timeout=200):
        assert rank["without Megatron-LM"] == rank["without flag"] == (2, False, "no error")
        assert rank["other"][0] == 2 and "was made for TP 4, this group has 2 ranks" in rank["other"][2]
        flags = rank["flags"]
        assert flags["lowbit_comm"] == "int4" and flags["lowbit_comm_sites"] == ["layers.*"]
        assert flags["lowbit_comm_min_bytes"] is None and "lowbit_comm_json" not in flags
        assert rank["flagged"] and rank["restored"]
