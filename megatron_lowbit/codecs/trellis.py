"""Trellis-coded quantization of rotated groups: gauss2 to gauss5 with `trellis` (ours, for communication).

The bits of plain gauss and 1.2 to 1.5 dB less error on Gaussian values in groups of 128, 1.0 to 1.3 in groups of 32,
1.3 to 1.7 in those of 256, which store their scale here. A value may use one of twice as many levels, half of which are
open to it, depending on the codes before it; the encoder finds the best path (Marcellin and Fischer, "Trellis Coded
Quantization", 1990; 4 states, after Ungerboeck). The decoder needs a value's code and the lowest bits of the two codes
before it, so it stays parallel.

Definition, on top of codecs/gauss.py: there are 2**(bits + 1) levels, ascending; level m belongs to subset m % 4. With
b(t) the lowest bit of code t of a group, and 0 before its start,

    level(t) = levels[4 * (code(t) >> 1) + 2 * (b(t) ^ b(t - 2)) + b(t - 1)]

The encoder takes, for u = w * (1 / rms) and every subset, the nearest level (thresholds midway; of equals the lower)
and its squared distance, all in fp32, and finds the path of least total distance by the Viterbi algorithm over the
states 2 * b(t - 2) + b(t - 1), from state 0: each new state s = 2 * b(t - 1) + b(t) has the predecessors s >> 1 and
(s >> 1) + 2, the first of which wins a tie, as the lowest state does at the end. Unreachable states start at 1e9.

scale = bf16(sum(w * level) / sum(level * level) * 2**e), always stored. A group without a normal scale has codes 0.
Negating a group does not negate its values exactly: state 0 is open to subsets 0 and 2 only.

Bound: that of codecs/gauss.py, |x - y|_2 <= |x|_2 * sqrt(D**2 / 4 + max(0, 1 - t / sqrt(n))**2) before the same
roundings, but with t the second highest level and D the largest distance of levels two apart. In every state either
levels[0::2] or levels[1::2] are open, so always taking the nearest open level keeps within it; the best path does no
worse, and the scale that fits it no worse than rms.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..spec import Leg
from .gauss import Gauss
from .lloyd_max import TRELLIS

_SUBSETS = torch.tensor([[0, 2, 1, 3], [2, 0, 3, 1]])  # [second predecessor?, new state]


class Trellis(Gauss):
    """bits, group: as in the spec."""

    numba = "cpu_trellis"
    zero, unreachable = 0, 1e9

    def __init__(self, leg: Leg, rotates: bool = True) -> None:
        super().__init__(leg, rotates)
        self.hides, self.kernel = False, replace(self.kernel, family="trellis")
        positive = torch.tensor(TRELLIS[leg.bits])
        self.levels = torch.cat([-positive.flip(0), positive])

    def define_table(self) -> torch.Tensor:
        """Levels, then the thresholds of each subset, filled up to as many."""
        parts = [self.levels]
        for subset in range(4):
            own = self.levels[subset::4]
            parts += [(own[1:] + own[:-1]) * 0.5, torch.tensor([torch.inf])]
        return torch.cat(parts)

    def _quantize(self, u: torch.Tensor) -> torch.Tensor:
        return best_path(u, self.levels.to(u.device), self.unreachable)

    def _level(self, codes: torch.Tensor) -> torch.Tensor:
        return self.levels.to(codes.device)[level_index(codes)]


def level_index(codes: torch.Tensor) -> torch.Tensor:
    """Codes of whole groups [..., n] -> indices of their levels."""
    codes = codes.int()
    low = torch.nn.functional.pad(codes & 1, (2, 0))
    return 4 * (codes >> 1) + 2 * (low[..., 2:] ^ low[..., :-2]) + low[..., 1:-1]


def best_path(u: torch.Tensor, levels: torch.Tensor, unreachable: float = 1e9) -> torch.Tensor:
    """u fp32 [..., n] -> the codes whose levels come closest, int32, alike."""
    values = u.reshape(-1, u.shape[-1])
    indices, distances = [], []
    for subset in range(4):
        own = levels[subset::4].contiguous()
        index = torch.bucketize(values, (own[1:] + own[:-1]) * 0.5)
        indices.append(index)
        distances.append((values - own[index]) * (values - own[index]))
    index, distance = torch.stack(indices, -1), torch.stack(distances, -1)  # [groups, n, subset]
    subsets = _SUBSETS.to(u.device)
    cost = values.new_tensor([0.0, unreachable, unreachable, unreachable]).expand(len(values), 4)
    seconds = []
    for t in range(values.shape[1]):
        first = cost[:, [0, 0, 1, 1]] + distance[:, t, subsets[0]]
        second = cost[:, [2, 2, 3, 3]] + distance[:, t, subsets[1]]
        seconds.append((second < first).int())
        cost = torch.where(second < first, second, first)
    state = cost.argmin(1, keepdim=True)
    codes = torch.empty(values.shape, dtype=torch.int32, device=u.device)
    for t in reversed(range(values.shape[1])):
        second = seconds[t].gather(1, state)
        subset = subsets[second.squeeze(1), state.squeeze(1)][:, None]
        codes[:, t] = (2 * index[:, t].gather(1, subset) + (state & 1)).squeeze(1)
        state = (state >> 1) + 2 * second
    return codes.view(u.shape)
