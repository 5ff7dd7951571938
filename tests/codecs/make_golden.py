"""Writes golden.json from the independent oracles, when the wire changes: python -m tests.codecs.make_golden."""

import json
from pathlib import Path

import numpy as np

from tests.codecs import oracle, oracle_spike

INPUT = [(i * i * 37 + i * 11) % 401 - 200 for i in range(86)]


def main() -> None:
    x = np.array(INPUT, np.float32).reshape(2, 43) / 16
    wires = {
        f"int{bits}:g32" + (":sym" if sym else "") + option: encoder.encode(x, bits, 32, sym).hex()
        for option, encoder in (("", oracle), (":spike", oracle_spike))
        for bits in range(2, 9)
        for sym in (False, True)
    }
    Path(__file__).with_name("golden.json").write_text(json.dumps({"input": INPUT, "wires": wires}, indent=1) + "\n")


if __name__ == "__main__":
    main()
