"""What one run of a compiled program costs a device, read from its HLO, loops multiplied out.

XLA's own `cost_analysis()` counts the body of a loop once. Here every instruction counts as often
as it runs. Counted are

- FLOPs of matrix products and convolutions, 2 per multiply-add, and, apart, one per element of
  what is computed element by element in floating point;
- bytes that pass to and from the device's main memory: operands and results of each instruction
  that is not inside a fusion, of a sliced operand the slice, of one updated in place the update;
- collectives, with the groups of devices that take part.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

from repulsor_jax.planning import hlo
from repulsor_jax.planning.hlo import Array, Collective, Instruction, Module

# Instructions that move nothing: they name, or wait for, what others made.
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
# Custom calls that compute: kernels written by hand, and libraries of GPUs and CPUs.
_KERNELS = re.compile(r"tpu_custom_call|mosaic|triton|__cu|__onednn")
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_ELEMENTWISE = {
    *("abs", "add", "ceil", "clamp", "compare", "cosine", "divide", "erf", "exponential"),
    *("exponential-minus-one", "floor", "log", "log-plus-one", "logistic", "maximum", "minimum"),
    *("multiply", "negate", "power", "remainder", "rsqrt", "select", "sign", "sine", "sqrt"),
    *("subtract", "tan", "tanh", "cbrt", "round-nearest-even"),
}
_FLOATS = ("f", "bf", "c")

# Passes of a bfloat16 matrix unit that a product of float32 operands takes at a given precision.
_PASSES = {"highest": 6, "high": 3}


@dataclasses.dataclass
class Cost:
    """What one run of a program, or of a part of it, costs one device.

    Attributes:
      matmul_flops: of matrix products and convolutions.
      mxu_flops: the same with every pass counted that a bfloat16 matrix unit makes for float32
        operands at higher precision.
      other_flops: of what is computed element by element.
      bytes_accessed: to and from main memory.
      collectives: each with the number of times that it runs.
      unknown_loops: loops whose number of rounds is not known before they run, counted once.
      unknown_calls: calls of kernels that the text says nothing of, by name, with their number.
    """

    matmul_flops: float = 0.0
    mxu_flops: float = 0.0
    other_flops: float = 0.0
    bytes_accessed: float = 0.0
    collectives: list[tuple[Collective, int]] = dataclasses.field(default_factory=list)
    unknown_loops: int = 0
    unknown_calls: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds another cost so many times."""
        self.matmul_flops += times * other.matmul_flops
        self.mxu_flops += times * other.mxu_flops
        self.other_flops += times * other.other_flops
        self.bytes_accessed += times * other.bytes_accessed
        self.collectives += [(each, times * count) for each, count in other.collectives]
        self.unknown_loops += other.unknown_loops
        for name, count in other.unknown_calls.items():
            self.unknown_calls[name] += times * count

    @property
    def collective_bytes(self) -> int:
        """Bytes that the collectives yield on one device."""
        return sum(count * each.num_bytes for each, count in self.collectives)


def program_cost(hlo_text: str, num_devices: int = 1) -> Cost:
    """The cost of one run of a program.

    Args:
      hlo_text: from `compiled.as_text()`.
      num_devices: of the mesh. The text of a mesh of several slices is the program of one; the
        groups of the collectives are completed to those of all.
    """
    module = hlo.parse(hlo_text)
    cost = _Counter(module).computation(module.entry)
    size = module.num_partitions
    if num_devices > size > 1:
        offsets = range(0, num_devices, size)
        cost.collectives = [(_on_all(each, size, offsets), n) for each, n in cost.collectives]
    return cost


def _on_all(each: Collective, size: int, offsets: range) -> Collective:
    """A collective of one slice's program with the groups of all slices."""
    if each.groups:
        groups = [tuple(i + k for i in group) for k in offsets for group in each.groups]
    else:  # between slices: each device with those in its place
        groups = [tuple(i + k for k in offsets) for i in range(size)]
    return dataclasses.replace(each, groups=tuple(groups))


class _Counter:
    """Counts each computation once, and multiplies."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._costs: dict[str, Cost] = {}

    def computation(self, name: str) -> Cost:
        """Cost of one run of a computation that is not a fusion's."""
        if name not in self._costs:
            total = Cost()
            parts: set[object] = set()  # of collectives that several fusions make together
            for instruction in self._module.computations[name].values():
                self._add(total, name, instruction, parts)
            self._costs[name] = total
        return self._costs[name]

    def _add(self, total: Cost, scope: str, instruction: Instruction, parts: set[object]) -> None:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return
        if opcode == "while":
            rounds = self._module.trip_count(instruction)
            total.unknown_loops += rounds is None
            for called in instruction.called:
                total.add(self.computation(called), 1 if rounds is None else rounds)
        elif opcode == "conditional":
            branches = [self.computation(called) for called in instruction.called]
            total.add(max(branches, key=lambda c: (c.bytes_accessed, c.matmul_flops)))
        elif opcode in ("call", "async-start"):
            for called in instruction.called:
                total.add(self.computation(called))
        elif opcode == "fusion":
            inside = self._fused(instruction.called[0])
            scatter = hlo.reduce_scatter(self._module, instruction)
            found = [(scatter, 1)] if scatter else inside.collectives
            new = [(each, n) for each, n in found if each.key is None or each.key not in parts]
            parts |= {each.key for each, _ in new}
            total.add(dataclasses.replace(inside, collectives=new))
            total.bytes_accessed += self._fusion_bytes(scope, instruction)
        else:
            total.add(self._operation(scope, instruction))
            total.bytes_accessed += self._bytes(scope, instruction)

    def _fused(self, name: str) -> Cost:
        """Cost of a fused computation but for its bytes, which do not leave the chip."""
        if name not in self._costs:
            total = Cost()
            for instruction in self._module.computations[name].values():
                if instruction.opcode == "fusion":
                    total.add(self._fused(instruction.called[0]))
                else:
                    total.add(self._operation(name, instruction))
            self._costs[name] = total
        return self._costs[name]

    def _operation(self, scope: str, instruction: Instruction) -> Cost:
        opcode, cost = instruction.opcode, Cost()
        if each := hlo.collective(instruction):
            cost.collectives.append((each, 1))
        elif opcode in ("dot", "convolution"):
            operands = [self._operand(scope, instruction, k) for k in range(2)]
            count = _dot_flops if opcode == "dot" else _convolution_flops
            cost.matmul_flops = count(instruction, *operands)
            precision = re.findall(r"highest|high", instruction.attribute("operand_precision"))
            wide = any(operand.dtype == "f32" for operand in operands)
            passes = max((_PASSES[p] for p in precision), default=1) if wide else 1
            cost.mxu_flops = passes * cost.matmul_flops
        elif opcode == "custom-call":
            flops = self._kernel_flops(scope, instruction)
            cost.matmul_flops = cost.mxu_flops = flops or 0.0
            if flops is None:
                cost.unknown_calls[_target(instruction)] += 1
        elif opcode == "reduce":
            array = self._operand(scope, instruction, 0)
            cost.other_flops = array.size if array.dtype.startswith(_FLOATS) else 0
        elif opcode in _ELEMENTWISE and instruction.arrays[0].dtype.startswith(_FLOATS):
            cost.other_flops = instruction.arrays[0].size
        return cost

    def _kernel_flops(self, scope: str, call: Instruction) -> float | None:
        """FLOPs of a custom call; None for a kernel that does not say."""
        if not _KERNELS.match(_target(call)):
            return 0.0
        stated = re.search(r'"flops":"?(\d+)', call.attributes)
        if stated:
            return float(stated[1])
        product = _CONTRACTED.search(call.attributes)
        if not product or not _target(call).startswith("__cublas"):
            return None
        axes = [int(n) for n in re.findall(r"\d+", product[1])]
        left = self._operand(scope, call, 0)
        return 2.0 * call.arrays[0].size * math.prod(left.shape[k] for k in axes)

    def _operand(self, scope: str, instruction: Instruction, k: int) -> Array:
        return self._module.computations[scope][instruction.operands[k]].arrays[0]

    def _bytes(self, scope: str, instruction: Instruction) -> float:
        """Bytes to and from main memory of an instruction that is not fused."""
        opcode, results = instruction.opcode, instruction.arrays
        if opcode == "custom-call" and not _KERNELS.match(_target(instruction)):
            return 0
        computation = self._module.computations[scope]
        operands = [a for name in instruction.operands for a in computation[name].arrays]
        if opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            # (destination, source, flag) or ((source), destination, flag)
            moved = results[0] if opcode == "copy-start" else results[len(operands)]
            return _in_hbm([moved]) + (moved.num_bytes if operands[0].space == hlo.HBM else 0)
        if opcode in ("slice", "dynamic-slice", "gather"):
            read = results[0].num_bytes if operands[0].space == hlo.HBM else 0
            return read + _in_hbm(results)
        if opcode in ("dynamic-update-slice", "scatter"):
            update = operands[1] if opcode == "dynamic-update-slice" else operands[-1]
            written = update.num_bytes if results[0].space == hlo.HBM else 0
            return _in_hbm([update]) + written
        if each := hlo.collective(instruction):
            results = each.arrays
        return _in_hbm(operands) + _in_hbm(results)

    def _fusion_bytes(self, scope: str, fusion: Instruction) -> float:
        computation, called = self._module.computations[scope], fusion.called[0]
        read = 0.0
        for k, name in enumerate(fusion.operands):
            arrays = computation[name].arrays
            if _in_hbm(arrays):
                read += min(_in_hbm(arrays), self._read(called, k))
        written = self._written(called)
        return read + sum(
            min(array.num_bytes, size)
            for array, size in itertools.zip_longest(fusion.arrays, written, fillvalue=math.inf)
            if isinstance(array, Array) and array.space == hlo.HBM
        )

    def _read(self, called: str, k: int) -> float:
        """Bytes of its k-th parameter that a fused computation reads; inf for all of them."""
        computation = self._module.computations[called]
        parameter = next(
            i for i in computation.values() if i.opcode == "parameter" and int(i.argument) == k
        )
        return self._read_by_users(called, parameter)

    def _read_by_users(self, called: str, source: Instruction) -> float:
        total = 0.0
        for user in self._users(called, source):
            if user.opcode in ("slice", "dynamic-slice", "gather"):
                first = user.operands[0] == source.name
                total += user.arrays[0].num_bytes if first else math.inf
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
                total += 0  # updated in place
            elif user.opcode == "bitcast":
                total += self._read_by_users(called, user)
            elif user.opcode == "fusion":
                places = [k for k, name in enumerate(user.operands) if name == source.name]
                total += sum(self._read(user.called[0], k) for k in places)
            else:
                return math.inf
        return total

    def _users(self, called: str, source: Instruction) -> Iterator[Instruction]:
        for instruction in self._module.computations[called].values():
            if source.name in instruction.operands:
                yield instruction

    def _written(self, called: str) -> list[float]:
        """Bytes that a fused computation writes of each of its results; inf for all of one."""
        computation = self._module.computations[called]
        root = self._module.root(called)
        ends = [computation[n] for n in root.operands] if root.opcode == "tuple" else [root]
        sizes: list[float] = []
        for end in ends:
            while end.opcode == "bitcast":
                end = computation[end.operands[0]]
            if end.opcode == "dynamic-update-slice":
                sizes.append(computation[end.operands[1]].arrays[0].num_bytes)
            elif end.opcode == "fusion":
                sizes += self._written(end.called[0])
            else:
                sizes += [math.inf] * len(end.arrays)
        return sizes


def _target(call: Instruction) -> str:
    return call.attribute("custom_call_target").strip('"')


def _in_hbm(arrays: tuple[Array, ...] | list[Array]) -> float:
    return sum(array.num_bytes for array in arrays if array.space == hlo.HBM)


def _dot_flops(dot: Instruction, left: Array, right: Array) -> float:
    contracted = math.prod(left.shape[k] for k in dot.integers("lhs_contracting_dims"))
    return 2.0 * dot.arrays[0].size * contracted


def _convolution_flops(convolution: Instruction, left: Array, right: Array) -> float:
    """2 per multiply-add with an element that is really there, not padding or dilation."""
    labels = convolution.attribute("dim_labels")
    left_labels, right_labels, out_labels = re.match(r"(\w+)_(\w+)->(\w+)", labels).groups()  # type: ignore[union-attr]
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    result = convolution.arrays[0]
    spatial = sorted(c for c in out_labels if c.isdigit())
    pairs = 1
    for k, label in enumerate(spatial):
        pairs *= _window_pairs(
            inputs=left.shape[left_labels.index(label)],
            outputs=result.shape[out_labels.index(label)],
            size=right.shape[right_labels.index(label)],
            stride=_field(fields, "stride", k, 1),
            pad=_field(fields, "pad", k, 0),
            left_dilation=_field(fields, "lhs_dilate", k, 1),
            right_dilation=_field(fields, "rhs_dilate", k, 1),
        )
    features = result.shape[out_labels.index("f")]
    batch = result.shape[out_labels.index("b")]
    per_output = right.shape[right_labels.index("i")]  # of one group already
    return 2.0 * batch * features * per_output * pairs


def _field(fields: dict[str, str], key: str, k: int, default: int) -> int:
    """The k-th number of a window's field `3x3`; of `pad` `1_1x0_1` the padding before."""
    if key not in fields:
        return default
    return int(fields[key].split("x")[k].split("_")[0])


def _window_pairs(
    *,
    inputs: int,
    outputs: int,
    size: int,
    stride: int,
    pad: int,
    left_dilation: int,
    right_dilation: int,
) -> int:
    """Pairs of an output and a tap of the window that meet an element of the input, in one axis."""
    last = (inputs - 1) * left_dilation
    count = 0
    for tap in range(size):
        for place in range(outputs):
            at = place * stride + tap * right_dilation - pad
            count += 0 <= at <= last and at % left_dilation == 0
    return count
