"""Reads the optimised HLO of a compiled program: its instructions, loops and collectives.

The grammar is XLA's text format (openxla.org/xla/hlo_syntax), as `compiled.as_text()` writes it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

COLLECTIVES = {
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
}

_ARRAY = re.compile(
    r"(?P<dtype>pred|bf16|[suf]\d+\w*|c\d+)\[(?P<shape>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?"
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? ?\{([^}]*)\}"
)

HBM = 0  # the memory space of ordinary arrays; on a TPU, space 1 is the on-chip vector memory


@dataclasses.dataclass(frozen=True)
class Array:
    """One array on one device: dtype, shape and the memory space that holds it."""

    dtype: str
    shape: tuple[int, ...]
    space: int = HBM

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes, without the padding of tiled layouts."""
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return math.ceil(self.size * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; its name is unique in its program."""

    name: str
    opcode: str  # as "fusion" or "all-reduce-start"
    arrays: tuple[Array, ...]  # the results; the arrays of a tuple in their order
    operands: tuple[str, ...]  # names of the instructions whose results it reads
    argument: str  # the text between its parentheses
    attributes: str  # the text after them
    is_root: bool  # the result of its computation

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, in the order of the text."""
        groups = _CALLED.findall(self.attributes)
        return tuple(name for group in groups for name in _OPERAND.findall(group))

    def attribute(self, key: str) -> str:
        """The value of an attribute that contains no blank; "" without that attribute."""
        match = re.search(rf"(?<![\w]){key}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return match[1] if match else ""

    @property
    def constant(self) -> int | None:
        """The value of a constant integer; None for any other instruction."""
        is_known = self.opcode == "constant" and self.argument.lstrip("-").isdecimal()
        return int(self.argument) if is_known else None


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and the one that runs first.

    On a mesh of several TPU slices it is the program of one slice, which sends to the others and
    receives from them.
    """

    computations: Mapping[str, Computation]
    entry: str
    num_partitions: int  # devices that run it

    def root(self, computation: str) -> Instruction:
        """The result of a computation."""
        return next(i for i in self.computations[computation].values() if i.is_root)

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a `while` runs its body; None for a number that depends on the data.

        XLA states the number on CPUs and GPUs. TPU programs have only the condition, which
        compares a counter with a constant: `lax.scan` and `lax.fori_loop` compile to that. The
        counter starts at 0 and increases by 1 unless the text says otherwise.
        """
        if stated := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes):
            return int(stated[1])
        sides = self._compared(loop.attribute("condition").lstrip("%"))
        limits = [i.constant for i in sides if i.constant is not None]
        counters = [i for i in sides if i.opcode == "get-tuple-element"]
        if len(limits) != 1 or len(counters) != 1:
            return None
        place = int(counters[0].attribute("index"))
        return max(-(-(limits[0] - self._start(loop, place)) // self._stride(loop, place)), 0)

    def _compared(self, name: str, arguments: tuple[Instruction, ...] = ()) -> list[Instruction]:
        """The two sides of the comparison that a computation ends with; [] without one."""
        scope, root = self.computations[name], self.root(name)
        sides = [scope[operand] for operand in root.operands]
        if arguments:  # of a fused computation
            sides = [arguments[int(i.argument)] if i.opcode == "parameter" else i for i in sides]
        if root.opcode == "fusion":
            return self._compared(root.called[0], tuple(sides))
        is_limit = root.opcode == "compare" and root.attribute("direction") in ("LT", "GT")
        return sides if is_limit else []

    def _start(self, loop: Instruction, place: int) -> int:
        """The first value of a loop's counter."""
        scope = next(c for c in self.computations.values() if loop.name in c)
        start = scope[loop.operands[0]]
        return (start.opcode == "tuple" and scope[start.operands[place]].constant) or 0

    def _stride(self, loop: Instruction, place: int) -> int:
        """The increase of a loop's counter in one turn."""
        body = loop.attribute("body").lstrip("%")
        root, scope = self.root(body), self.computations[body]
        if root.opcode != "tuple":
            return 1
        step = scope[root.operands[place]]
        steps = [n for n in (scope[name].constant for name in step.operands) if n is not None]
        return steps[0] if step.opcode == "add" and len(steps) == 1 and steps[0] > 0 else 1


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is not None:
            if instruction := _instruction(line):
                current[instruction.name] = instruction
        elif not line.startswith("HloModule") and (header := _HEADER.match(line)):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
    if not entry:
        raise ValueError("found no ENTRY computation, expected the text of a compiled program")
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(line: str) -> Instruction | None:
    named = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not named:
        return None
    text = re.sub(r"/\*.*?\*/", "", line[named.end() :])
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    argument = text[opening + 1 : closing]
    return Instruction(
        name=named[2],
        opcode=text[end:opening].strip(),
        arrays=tuple(_arrays(text[:end])),
        operands=tuple(_OPERAND.findall(argument)),
        argument=argument,
        attributes=text[closing + 1 :],
        is_root=named[1] is not None,
    )


def _closing(text: str, opening: int) -> int:
    """Position of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"found no closing parenthesis in {text[:80]!r}")


def _arrays(text: str) -> Iterator[Array]:
    for match in _ARRAY.finditer(text):
        space = re.search(r"S\((\d+)\)", match["layout"] or "")
        yield Array(match["dtype"], tuple(numbers(match["shape"])), int(space[1]) if space else HBM)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction."""

    kind: str  # as "all-reduce"
    arrays: tuple[Array, ...]  # the results on one device
    # Which devices exchange with each other, by their places in the flattened mesh.
    groups: tuple[tuple[int, ...], ...] = ()
    channel: str = ""

    @property
    def key(self) -> tuple[object, ...] | None:
        """Equal for the parts of one collective that XLA fused with several computations."""
        if not self.channel or self.kind == "collective-permute":
            return None
        return self.kind, self.channel, tuple((a.dtype, a.shape) for a in self.arrays)

    @property
    def group(self) -> tuple[int, ...]:
        """The largest of the groups; () without groups."""
        return max(self.groups, key=len, default=())

    @property
    def largest(self) -> int:
        """Elements of the largest array."""
        return max((array.size for array in self.arrays), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends when the group works as a ring, the least possible."""
        size = max(len(self.group), 1)
        factors = {
            "all-reduce": 2 * (size - 1) / size,
            "reduce-scatter": size - 1,  # of the result, a part of the operand
            "collective-permute": 1,
            "collective-broadcast": 1,
        }
        return self.num_bytes * factors.get(self.kind, (size - 1) / size)


def collective(instruction: Instruction) -> Collective | None:
    """The collective that an instruction is or starts; None for any other instruction.

    An async collective lists its operands among its results; skip them. A collective between
    slices appears as a `recv`: its shape is known, its groups are not.
    """
    channel = instruction.attribute("channel_id")
    between = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if instruction.opcode == "recv" and between:
        kind = between[1].lower().replace("_", "-")
        return Collective(kind, instruction.arrays[:1], (), channel)
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    arrays = instruction.arrays
    if kind != instruction.opcode and kind in ("all-gather", "collective-permute"):
        count = len(instruction.operands)
        arrays = arrays[count : 2 * count]  # the rest are flags
    groups = _groups(instruction.attributes)
    if groups and kind != "collective-permute" and all(len(group) == 1 for group in groups):
        return None  # each device with itself
    return Collective(kind, arrays, groups, channel)


def reduce_scatter(module: Module, fusion: Instruction) -> Collective | None:
    """The reduce-scatter that a TPU runs as a fusion: an all-reduce and a slice of its result."""
    inside = module.computations[fusion.called[0]].values() if fusion.opcode == "fusion" else ()
    reduces = [i for i in inside if i.opcode == "all-reduce"]
    users = [i.opcode for i in inside if len(reduces) == 1 and reduces[0].name in i.operands]
    if users != ["dynamic-slice"]:
        return None
    whole = collective(reduces[0])
    return whole and dataclasses.replace(whole, kind="reduce-scatter", arrays=fusion.arrays)


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Reads `replica_groups` in its three forms, or `source_target_pairs`.

    `{{0,1},{2,3}}`; `[2,4]<=[4,2]T(1,0)`: iota of the second shape, transposed, cut into rows; or
    `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`: along the named axes of a mesh.
    """
    if listed := _LISTED_GROUPS.search(attributes):
        return tuple(tuple(numbers(row)) for row in re.findall(r"\{([\d,]*)\}", listed[1]))
    if iota := _IOTA_GROUPS.search(attributes):
        return tuple(map(tuple, _iota(iota[2]).reshape(numbers(iota[1])).tolist()))
    mesh = _MESH_GROUPS.search(attributes)
    if not mesh:
        return ()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    devices = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
    inside = re.findall(r"'([^']+)'", mesh[3])
    order = sorted(range(len(sizes)), key=lambda axis: list(sizes)[axis] in inside)
    rows = devices.reshape(list(sizes.values())).transpose(order)
    return tuple(map(tuple, rows.reshape(-1, math.prod(sizes[name] for name in inside)).tolist()))


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)` or `[8]`: 0, 1, 2, ... in that shape, transposed, flattened."""
    shape, _, order = text.partition("T")
    values = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
    return (values.transpose(numbers(order)) if order else values).reshape(-1)


def numbers(text: str) -> list[int]:
    """The natural numbers in a text, as of `{0,1}` or `3x3`."""
    return [int(n) for n in re.findall(r"\d+", text)]
