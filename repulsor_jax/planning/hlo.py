"""Reads the optimised HLO of a compiled program: its instructions, loops and collectives.

The grammar is XLA's text format (openxla.org/xla/hlo_syntax), as `compiled.as_text()` writes it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)

_ARRAY = re.compile(
    r"(?P<dtype>pred|bf16|[suf]\d+\w*|c\d+)\[(?P<shape>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?"
)
_SPACE = re.compile(r"S\((\d+)\)")
_COMMENT = re.compile(r"/\*.*?\*/")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")
_PARTITIONS = re.compile(r"num_partitions=(\d+)")
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"?(\d+)')

HBM = 0  # memory space of ordinary arrays; on a TPU, 1 is the vector memory beside the units


@dataclasses.dataclass(frozen=True)
class Array:
    """One array on one device: dtype, shape and the memory space that it lies in."""

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
        return math.ceil(self.size * _bits(self.dtype) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in its program.
      opcode: as "fusion" or "all-reduce-start".
      arrays: what it yields; the arrays of a tuple in their order.
      operands: names of what it reads.
      argument: what stands in its parentheses.
      attributes: all that follows them.
      is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    argument: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls, in the order of the text."""
        found = (group for group in _CALLED.findall(self.attributes))
        return tuple(name for group in found for name in _OPERAND.findall(group))

    def attribute(self, key: str) -> str:
        """The value of an attribute without blanks in it; "" where there is none."""
        match = re.search(rf"(?<![\w]){key}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return match[1] if match else ""

    def integers(self, key: str) -> tuple[int, ...]:
        """The value of an attribute as `{0,1}`; () where there is none."""
        return tuple(int(n) for n in re.findall(r"\d+", self.attribute(key)))


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: by name, each its instructions by name, in order.
      entry: name of the first.
      num_partitions: devices that it runs on. Of a mesh of several TPU slices it is the program of
        one, which sends to and receives from the others.
    """

    computations: Mapping[str, Computation]
    entry: str
    num_partitions: int

    def root(self, computation: str) -> Instruction:
        """The result of a computation."""
        return next(i for i in self.computations[computation].values() if i.is_root)

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a `while` runs its body; None where that is not known before it runs.

        As XLA states it, else from a condition that compares a counter with a constant: what
        `lax.scan` and `lax.fori_loop` compile to. The counter starts at 0 and goes in ones unless
        the text says otherwise.
        """
        stated = _TRIP_COUNT.search(loop.attributes)
        if stated:
            return int(stated[1])
        condition = loop.attribute("condition").lstrip("%")
        root = self.root(condition)
        scope = self.computations[condition]
        found = [scope[name] for name in root.operands]
        if root.opcode == "fusion":
            outer, inner = found, self.computations[root.called[0]]
            root = self.root(root.called[0])
            ends = [inner[name] for name in root.operands]
            found = [outer[int(e.argument)] if e.opcode == "parameter" else e for e in ends]
        if root.opcode != "compare" or root.attribute("direction") not in ("LT", "GT"):
            return None
        limits = [number for i in found if (number := _constant(i)) is not None]
        counters = [i for i in found if i.opcode == "get-tuple-element"]
        if len(limits) != 1 or len(counters) != 1:
            return None
        place = int(counters[0].attribute("index"))
        first, stride = self._first(loop, place), self._stride(loop, place)
        return max(-(-(limits[0] - first) // stride), 0)

    def _first(self, loop: Instruction, place: int) -> int:
        """The value that a loop's counter starts from."""
        for scope in self.computations.values():
            start = scope.get(loop.operands[0])
            if loop.name in scope and start and start.opcode == "tuple":
                return _constant(scope[start.operands[place]]) or 0
        return 0

    def _stride(self, loop: Instruction, place: int) -> int:
        """What one round of a loop adds to its counter."""
        body = loop.attribute("body").lstrip("%")
        root, scope = self.root(body), self.computations[body]
        if root.opcode != "tuple":
            return 1
        step = scope[root.operands[place]]
        steps = [_constant(scope[name]) for name in step.operands if name in scope]
        found = [number for number in steps if number is not None]
        return found[0] if step.opcode == "add" and len(found) == 1 and found[0] > 0 else 1


def _constant(instruction: Instruction) -> int | None:
    """The value of a constant integer."""
    known = instruction.opcode == "constant" and instruction.argument.lstrip("-").isdecimal()
    return int(instruction.argument) if known else None


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is not None and line.startswith("}"):
            current = None
        elif current is None:
            header = _HEADER.match(line) if not line.startswith(("HloModule", " ")) else None
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("found no ENTRY computation, expected the text of a compiled program")
    partitions = _PARTITIONS.search(text)
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(line: str) -> Instruction | None:
    named = _NAMED.match(line)
    if not named:
        return None
    text = _COMMENT.sub("", line[named.end() :])
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
        space = _SPACE.search(match["layout"] or "")
        shape = tuple(int(n) for n in match["shape"].split(",") if n)
        yield Array(match["dtype"], shape, int(space[1]) if space else HBM)


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    match = re.match(r"[a-z]+(\d+)", dtype)
    return int(match[1]) if match else 0


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: as "all-reduce".
      arrays: what it yields, per device.
      groups: the devices, by their places in the flattened mesh, that exchange among each other.
      channel: number of the channel.
    """

    kind: str
    arrays: tuple[Array, ...]
    groups: tuple[tuple[int, ...], ...] = ()
    channel: str = ""

    @property
    def key(self) -> tuple[object, ...] | None:
        """What the parts of one collective have in common, each fused with what it overlaps."""
        if not self.channel or self.kind == "collective-permute":
            return None
        return self.kind, self.channel, tuple((a.dtype, a.shape) for a in self.arrays)

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
        """Bytes that each device sends at the least: what a ring of the group's size does."""
        size = max((len(group) for group in self.groups), default=1)
        factors = {
            "all-reduce": 2 * (size - 1) / size,
            "reduce-scatter": size - 1,  # of the result, a part of the operand
            "collective-permute": 1,
            "collective-broadcast": 1,
        }
        return self.num_bytes * factors.get(self.kind, (size - 1) / size)


def collectives(hlo_text: str) -> list[Collective]:
    """Lists the collectives of `compiled.as_text()`; one in a loop body is listed once."""
    module = parse(hlo_text)
    scatters = {
        called: instruction
        for computation in module.computations.values()
        for instruction in computation.values()
        if reduce_scatter(module, instruction)
        for called in instruction.called
    }
    found: dict[object, Collective] = {}
    for name, computation in module.computations.items():
        for instruction in computation.values():
            each = collective(instruction)
            if each and name in scatters:
                each = reduce_scatter(module, scatters[name])
            if each:
                found.setdefault(each.key or instruction.name, each)
    return list(found.values())


def loops(module: Module) -> list[tuple[Instruction, list[Collective]]]:
    """Every `while`, with the collectives of one turn of it, those of loops inside it included."""
    whiles = [i for c in module.computations.values() for i in c.values() if i.opcode == "while"]
    found = []
    for loop in whiles:
        inside, to_visit = dict[str, Computation](), list(loop.called)
        while to_visit:
            name = to_visit.pop()
            if name not in inside:
                inside[name] = module.computations[name]
                to_visit += [called for i in inside[name].values() for called in i.called]
        each = [collective(i) for computation in inside.values() for i in computation.values()]
        found.append((loop, [c for c in each if c]))
    return found


def collective(instruction: Instruction) -> Collective | None:
    """The collective that an instruction is, or starts; None where it is none.

    An asynchronous one yields its operands too, which are left out. One between slices is what is
    received of it, without groups.
    """
    between = _BETWEEN_SLICES.search(instruction.attributes)
    if instruction.opcode == "recv" and between:
        kind = between[1].lower().replace("_", "-")
        return Collective(kind, instruction.arrays[:1], (), instruction.attribute("channel_id"))
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    arrays = instruction.arrays
    if kind != instruction.opcode and kind in ("all-gather", "collective-permute"):
        count = len(instruction.operands)
        arrays = arrays[count : 2 * count]  # what follows are flags
    groups = _groups(instruction.attributes)
    return Collective(kind, arrays, groups, instruction.attribute("channel_id"))


def reduce_scatter(module: Module, fusion: Instruction) -> Collective | None:
    """The reduce-scatter that a fusion is on a TPU: an all-reduce of which a slice is kept."""
    if fusion.opcode != "fusion":
        return None
    inside = module.computations[fusion.called[0]].values()
    reduces = [i for i in inside if i.opcode == "all-reduce"]
    if len(reduces) != 1:
        return None
    users = [i for i in inside if reduces[0].name in i.operands]
    if [i.opcode for i in users] != ["dynamic-slice"]:
        return None
    whole = collective(reduces[0])
    return whole and dataclasses.replace(whole, kind="reduce-scatter", arrays=fusion.arrays)


def _groups(attributes: str) -> tuple[tuple[int, ...], ...]:
    """Reads `replica_groups` in its three forms, or `source_target_pairs`.

    `{{0,1},{2,3}}`; `[2,4]<=[4,2]T(1,0)`: iota of the second shape, transposed, cut into rows; or
    `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`: along the named axes of a mesh.
    """
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if pairs or listed:
        listed_rows = re.findall(r"\{([\d,]*)\}", (pairs or listed)[1])  # type: ignore[index]
        return tuple(tuple(int(n) for n in row.split(",") if n) for row in listed_rows)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        rows = _iota(iota[2]).reshape(_numbers(iota[1]))
        return tuple(map(tuple, rows.tolist()))
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? ?\{([^}]*)\}", attributes
    )
    if not mesh:
        return ()
    axes = re.findall(r"'([^']+)'=(\d+)", mesh[1])
    sizes = [int(size) for _, size in axes]
    devices = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes))
    along = [name in re.findall(r"'([^']+)'", mesh[3]) for name, _ in axes]
    order = [i for i, yes in enumerate(along) if not yes] + [
        i for i, yes in enumerate(along) if yes
    ]
    group_size = math.prod(size for size, yes in zip(sizes, along, strict=True) if yes)
    rows = devices.reshape(sizes).transpose(order).reshape(-1, group_size)
    return tuple(map(tuple, rows.tolist()))


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)` or `[8]`: 0, 1, 2, ... in that shape, transposed, flattened."""
    shape, _, order = text.partition("T")
    sizes = _numbers(shape)
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return (numbers.transpose(_numbers(order)) if order else numbers).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
