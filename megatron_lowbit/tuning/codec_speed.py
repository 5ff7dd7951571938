"""How fast the families of codecs are, relative to int4:g32: what is measured once holds on machines of its kind.

cpu: benchmarks/results/codecs.json, bf16, one core of an AMD EPYC, kernels in numba: encode and decode-accumulate;
`passthrough`, `outliers`, `selective`: 1024 x 4096 values in turn with int4:g32, the same machine, 2026-11-22.

cuda: benchmarks/results/kernels_predicted.json, an H200: predicted from instructions and bytes, not measured;
`passthrough` from bytes alone; of `trellis` nothing is predicted for encoding, and half of `gauss` is assumed, as on
CPUs.
"""

from __future__ import annotations

from ..spec import FLOATS, GAUSS, INTEGERS, MICROSCALING, PASSTHROUGH, SELECTIVE, Leg

# device -> family -> (encode, decode), times as fast as int4:g32
RELATIVE = {
    "cpu": {
        "passthrough": (4.0, 1.7),
        "int": (1.0, 1.0),
        "spike": (0.9, 0.9),
        "outliers": (0.8, 0.7),
        "gauss": (0.85, 1.0),
        "trellis": (0.45, 1.0),
        "selective": (1.5, 0.55),
        "float": (1.5, 1.2),
    },
    "cuda": {
        "passthrough": (0.7, 0.5),
        "int": (1.0, 1.0),
        "spike": (0.4, 0.3),
        "outliers": (0.65, 0.85),
        "gauss": (0.45, 0.7),
        "trellis": (0.22, 0.28),
        "selective": (0.65, 0.55),
        "float": (0.8, 0.75),
    },
}

# Seconds more than others for every piece of a message that is encoded or decoded: outliers are put apart and joined in
# many small steps. cpu: between what selective4 takes longer than gauss4:g128 for 16 KiB on links of 1 Gbit/s
# (benchmarks/results/link.json), by pieces: 130 us with two ranks, 50 with four that share two cores.
PIECE = {"cpu": {"outliers": 90e-6, "selective": 90e-6}}


def family(leg: Leg) -> str:
    """Which row of RELATIVE a leg belongs to."""
    if leg.name in SELECTIVE:
        return "selective"
    if leg.outliers is not None:
        return "outliers"
    if leg.spike or leg.trellis:
        return "spike" if leg.spike else "trellis"
    kinds = {"passthrough": PASSTHROUGH, "int": INTEGERS, "gauss": GAUSS, "float": FLOATS + MICROSCALING}
    return next(kind for kind, names in kinds.items() if leg.name in names)
