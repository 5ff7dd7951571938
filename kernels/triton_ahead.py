"""Compiling kernels for GPUs that are not there, and reading what became of them.

`compiled(launch, 90)` is what calling that `Launch` would run on an H100: Triton specializes it for its arguments as it
would there, because all that stands in for the GPU is the answer to which one it is. The tensors may be on the device
"meta", which costs no memory, however large they are.

Hazard: Triton decides when it is imported whether its kernels are compiled or interpreted. With TRITON_INTERPRET=1
nothing can be compiled in that process any more.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ..errors import ConfigError
from .triton_launch import Launch

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[a-z]+(\d+)\s")


@dataclass(frozen=True)
class Compiled:
    """A kernel for one kind of GPU.

    registers, local: of a thread; local are bytes of memory for what did not fit into registers. shared: bytes of a
    program. ptx, cubin: the code that Triton makes, and the machine code that it becomes.
    """

    capability: int
    registers: int
    local: int
    shared: int
    threads: int
    values: int
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)

    @cached_property
    def code(self) -> str:
        """The machine code as cuobjdump shows it; that takes longer than compiling."""
        return _cuobjdump("-sass", self.cubin)

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each stands in the machine code, such as {"LDG.E.128": 2}."""
        opcodes = Counter(_INSTRUCTION.findall(self.code))
        del opcodes["NOP"]  # after the end
        return opcodes

    @property
    def instructions_per_value(self) -> float:
        """Instructions of the whole program's threads for each value of its tile, everything counted once.

        Also the body of a loop: with two wires or fewer `reduce` has none, and what each wire more costs is the
        difference between those. And what only some threads do, as where a row ends.
        """
        return self.opcodes.total() * self.threads / self.values

    @property
    def loads(self) -> dict[int, int]:
        """Loads from global memory: bytes that a thread gets -> how many."""
        return self._widths("ld")

    @property
    def stores(self) -> dict[int, int]:
        """Stores to global memory: bytes that a thread writes -> how many."""
        return self._widths("st")

    def _widths(self, name: str) -> dict[int, int]:
        """As PTX has them: from one of its instructions becomes one of the machine."""
        accesses = (match.groups() for match in _ACCESS.finditer(self.ptx))
        return dict(Counter(int(count or 1) * int(bits) // 8 for kind, count, bits in accesses if kind == name))


def compiled(launch: Launch, capability: int) -> Compiled:
    """The kernel that `launch` would run on a GPU of this compute capability, such as 90 for 9.0.

    Raises ConfigError where Triton interprets its kernels, and for a GPU that this Triton cannot compile for.
    """
    if not isinstance(launch.kernel, triton.JITFunction):
        raise ConfigError(
            "TRITON_INTERPRET=1 was set when triton was imported, so that nothing can be compiled: unset it, in a new "
            "process"
        )
    if capability not in capabilities():
        raise ConfigError(
            f"triton {triton.__version__} does not know capability {capability}: use one of "
            f"{', '.join(map(str, capabilities()))}, or another triton"
        )
    kernel = _warm_up(launch, GPUTarget("cuda", capability, 32))
    usage = _cuobjdump("-res-usage", kernel.asm["cubin"])
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        capability=capability,
        registers=used["REG"],
        local=used["STACK"] + used["LOCAL"],
        shared=kernel.metadata.shared,
        threads=32 * launch.warps,
        values=32 * launch.constants["NB"],
        ptx=kernel.asm["ptx"],
        cubin=kernel.asm["cubin"],
    )


@cache
def capabilities() -> list[int]:
    """The compute capabilities that this Triton can compile for: LLVM ends the process over any other."""
    known = (_run(assembler, "--help") for assembler in _TOOLS.glob("ptxas*"))
    return sorted({int(number) for text in known for number in re.findall(r"\bsm_(\d+)", text)})


def _warm_up(launch: Launch, target: GPUTarget):
    """Triton's compiled kernel. It keeps kernels by device, so each target is a device of its own."""
    before = dict(vars(driver))  # `driver.active` would look for a GPU
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: ("ahead", target.arch),
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    try:
        return launch.kernel.warmup(**launch.arguments, **launch.constants, **launch.options, grid=launch.grid)
    finally:
        vars(driver).update(before)


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run(_TOOLS / "cuobjdump", option, file.name)


def _run(*command: Path | str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
