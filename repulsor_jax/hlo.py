"""Reads the optimised HLO of a compiled program: which collectives it holds and how large."""

import dataclasses
import math
import re

_COLLECTIVE = re.compile(
    r" = (?P<result>\([^=]*?\)|\S+) "
    r"(?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    r"|ragged-all-to-all|collective-broadcast)(?:-start)?\("
)
_ARRAY = re.compile(r"(?P<dtype>pred|bf16|[suf]\d+|f8\w+|c\d+)\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: as "all-reduce".
      arrays: dtype and shape of each array that it yields, per device.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def largest(self) -> int:
        """Elements of the largest array."""
        return max((math.prod(shape) for _, shape in self.arrays), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(_bytes_per_element(dtype) * math.prod(shape) for dtype, shape in self.arrays)


def collectives(hlo_text: str) -> list[Collective]:
    """Lists the collectives of `compiled.as_text()`; one in a loop body is listed once."""
    found = []
    for match in _COLLECTIVE.finditer(hlo_text):
        arrays = tuple(
            (a["dtype"], tuple(int(n) for n in a["shape"].split(",") if n))
            for a in _ARRAY.finditer(match["result"])
        )
        found.append(Collective(match["kind"], arrays))
    return found


def _bytes_per_element(dtype: str) -> int:
    if dtype == "pred" or dtype.startswith("f8"):
        return 1
    bits = 16 if dtype == "bf16" else int(re.sub(r"\D", "", dtype))
    return max(1, bits // 8)
