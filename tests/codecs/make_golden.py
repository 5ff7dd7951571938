"""Writes golden.json from the independent oracles, when the wire changes: python -m tests.codecs.make_golden."""

import json
from pathlib import Path

import numpy as np

from tests.codecs import oracle, oracle_gauss, oracle_microscaling, oracle_selective, oracle_spike, oracle_trellis


def numbers(count: int) -> list[int]:
    return [(i * i * 37 + i * 11) % 401 - 200 for i in range(count)]


INPUT = numbers(86)
LONG_INPUT = numbers(600)  # 2 rows of 300, for groups that hide their scale; and these are facts about its features
OUTLIERS = (5, 77, 150, 299)
LOW = np.array([-5 - i % 7 for i in range(300)], np.float32)
HIGH = np.array([3 + i % 5 for i in range(300)], np.float32)


def calibrated_wires(x: np.ndarray) -> dict[str, str]:
    ordinary, picked = oracle_selective.split(x, OUTLIERS)
    section = oracle_selective.outlier_section(picked)
    return {
        "int4:g32:outliers=1/64": (oracle.encode(ordinary, 4, 32, False) + section).hex(),
        "gauss4:g128:outliers=1/64": (oracle_gauss.encode(ordinary, 4, 128) + section).hex(),
        "selective4": oracle_selective.encode(x, LOW, HIGH, OUTLIERS).hex(),
    }


def main() -> None:
    x, long = np.array(INPUT, np.float32).reshape(2, 43) / 16, np.array(LONG_INPUT, np.float32).reshape(2, 300) / 16
    wires = {
        f"int{bits}:g32" + (":sym" if sym else "") + option: encoder.encode(x, bits, 32, sym).hex()
        for option, encoder in (("", oracle), (":spike", oracle_spike))
        for bits in range(2, 9)
        for sym in (False, True)
    }
    floats = {}
    for name in ("fp8:g32", "fp8:g128", "mxfp8", "mxfp6", "mxfp4", "nvfp4"):
        features = 43 if name.startswith("fp8") else 32
        floats[name] = oracle_microscaling.encode(x.flatten()[: 2 * features].reshape(2, features), name).hex()
    trellis = {
        f"gauss{bits}:g{group}:trellis": oracle_trellis.encode(x, bits, group).hex()
        for bits in range(2, 6)
        for group in (32, 128)
    }
    gauss_wires = {
        f"gauss{bits}:g{group}": oracle_gauss.encode(long, bits, group).hex()
        for bits in range(2, 8)
        for group in (32, 64, 128, 256)
    }
    golden = {
        "input": INPUT,
        "wires": wires,
        "float_wires": floats,
        "gauss_wires": gauss_wires,
        "trellis_wires": trellis,
        "calibrated_wires": calibrated_wires(long),
    }
    Path(__file__).with_name("golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
