"""Writes golden.json from the independent oracles, when the wire changes: python -m tests.codecs.make_golden."""

import json
from pathlib import Path

import numpy as np

from tests.codecs import oracle, oracle_microscaling, oracle_spike, oracle_trellis

INPUT = [(i * i * 37 + i * 11) % 401 - 200 for i in range(86)]


def main() -> None:
    x = np.array(INPUT, np.float32).reshape(2, 43) / 16
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
    golden = {"input": INPUT, "wires": wires, "float_wires": floats, "trellis_wires": trellis}
    Path(__file__).with_name("golden.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
