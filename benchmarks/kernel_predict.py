"""What bytes and instructions would take on an H200: predicted, not measured; no GPU is needed.

Every operation is compiled for sm_90 as it would be launched for 64 MiB of bf16. Its time is that of the slowest of

    memory    bytes read and written, at the bandwidth of a copy
    issue     instructions of all warps, 4 a clock and SM
    integer   those among them for the units of integers and comparisons, 2 a clock and SM
    special   those for special functions and some conversions, 1/2 a clock and SM

with nothing else in the way: no latency, no waiting of one unit for another. So it is a floor: a kernel may be slower.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from common import save, show
from kernel_cases import EPS, WORLD, Case

from megatron_lowbit.kernels import triton_launch
from megatron_lowbit.kernels.triton_ahead import compiled

BYTES, CAPABILITY = 64 << 20, 90
COPY_BANDWIDTH = 4.3e12  # bytes read and written; measured on an H200 (2026-10-28, a copy of 4.3 GB)
SMS, CLOCK = 132, 1.98e9
# Instructions a warp can have issued to each unit in a clock (CUDA C++ Programming Guide, arithmetic throughput, 9.0).
UNITS = {"issue": 4.0, "integer": 2.0, "special": 0.5}
INTEGER = set(
    "LOP3 PLOP3 SHF SHL SHR IADD3 VIADD IABS ISETP FSETP IMNMX VIMNMX VIMNMX3 VIADDMNMX FMNMX SEL FSEL PRMT LEA BMSK "
    "SGXT P2R R2P I2FP F2FP".split()
)
SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"}
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE)


def predict(spec: str, operation: str) -> dict | None:
    """None: the codec has no kernel."""
    case = Case(spec, operation, BYTES)
    if case.codec.kernel is None:
        return None
    launch = _launch(case)
    kernel = compiled(launch, CAPABILITY)
    opcodes = usual_path(kernel.code, turns=case.operation.wires - 1)
    warps = launch.grid[0] * launch.grid[1] * kernel.threads // 32
    work = {"issue": opcodes.total()}
    work |= {unit: sum(opcodes[name] for name in names) for unit, names in (("integer", INTEGER), ("special", SPECIAL))}
    times = {"memory": 1e6 * case.moved / COPY_BANDWIDTH}
    times |= {unit: 1e6 * warps * work[unit] / (rate * SMS * CLOCK) for unit, rate in UNITS.items()}
    slowest = max(times, key=times.get)
    return {
        "spec": spec, "operation": operation, "moved": case.moved, "registers": kernel.registers, "local": kernel.local,
        "instructions_per_value": round(32 * warps * work["issue"] / (case.rows * case.features), 2),
        "us": {unit: round(time, 2) for unit, time in times.items()}, "bound_by": slowest,
        "predicted_us": round(times[slowest], 2), "share_of_copy": round(times["memory"] / times[slowest], 4),
    }  # fmt: skip


def usual_path(code: str, turns: int = 1) -> Counter[str]:
    """Opcodes that nearly every warp executes: name without suffixes -> how often. turns: of the loop, if there is one.

    It ends at the first exit: behind that come what only the first program does, and the division of subnormal numbers,
    whose calls are skipped.
    """
    lines = [(int(address, 16), condition, *rest) for address, condition, *rest in _LINE.findall(code)]
    executed: list[tuple[int, str]] = []
    loops, resume = 0, 0
    for index, (address, condition, opcode, operands) in enumerate(lines):
        if address < resume:
            continue
        executed.append((address, opcode.split(".")[0]))
        if opcode == "EXIT":
            break
        if opcode == "BRA":
            target = int(operands.split("0x")[-1].strip(), 16)
            over = [line for line in lines[index + 1 :] if line[0] < target]
            if condition and any(line[2].startswith("CALL") for line in over):
                resume = target
            elif target < address:
                loops += 1
                executed += [line for line in executed if line[0] >= target] * (turns - 1)
    if loops > (turns > 1):
        raise ValueError(f"{loops} loops, and turns are known of {int(turns > 1)}")
    return Counter(name for _, name in executed)


def _launch(case: Case) -> triton_launch.Launch:
    """On the device "meta", where tensors have no values and take no memory."""
    codec, shape, meta = case.codec, (case.rows, case.features), torch.device("meta")
    x = torch.empty(shape, dtype=torch.bfloat16, device=meta)
    wires = torch.empty(max(1, case.operation.wires), codec.wire_nbytes(shape), dtype=torch.uint8, device=meta)
    if not case.operation.wires:
        return triton_launch.encode(codec, x, wires[0])
    if case.operation.to_wire:
        return triton_launch.reduce_encode(codec.inner, wires, codec.inner, shape, wires[0])
    if case.operation.norm:
        return triton_launch.reduce_add_rmsnorm(codec, wires, case.rows, 1, 0, x, x[0], EPS, 0.0, x, x)
    return triton_launch.reduce(codec, wires, x)


def main(specs: list[str], operations: list[str], path: Path | None) -> None:
    rows = []
    for spec in specs:
        for operation in operations:
            try:
                rows += filter(None, [predict(spec, operation)])
            except ValueError as error:
                print(f"not predicted: {operation} of {spec} ({error})")
    show(
        f"PREDICTED for an H200, not measured: {BYTES >> 20} MiB of bf16",
        ["spec", "operation", "registers", "instructions/value", *UNITS, "memory", "µs", "of copy"],
        [
            [r["spec"], r["operation"], str(r["registers"]), f"{r['instructions_per_value']:.1f}",
             *(f"{r['us'][unit]:.1f}" for unit in (*UNITS, "memory")), f"{r['predicted_us']:.1f}",
             f"{r['share_of_copy']:.0%}"]
            for r in rows
        ],
    )  # fmt: skip
    assumptions = {"copy_bandwidth": COPY_BANDWIDTH, "sms": SMS, "clock": CLOCK, "per_clock": UNITS}
    save(path, rows, predicted=True, gpu="NVIDIA H200", bytes=BYTES, wires=WORLD, assumptions=assumptions)
