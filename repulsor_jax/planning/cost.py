"""What one run of a compiled program costs a device, read from its HLO.

XLA's own `cost_analysis()` counts the body of a loop once. Here every instruction counts as often
as it runs:

- FLOPs of matrix products and convolutions, 2 per multiply-add; elementwise floating-point
  operations are counted apart, 1 per element;
- bytes read from and written to the device's main memory: the operands and results of every
  instruction outside fusions. A slice of an operand counts the slice, and an update in place counts
  the update;
- collectives, with the groups of devices that take part.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator

import numpy as np

from repulsor_jax.planning import hlo
from repulsor_jax.planning.hlo import Array, Collective, Instruction, Module, numbers

# Instructions that move no data.
_FREE = {
    *("after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter"),
    *("partition-id", "replica-id", "tuple"),
}
_SLICES = ("slice", "dynamic-slice", "gather")
# Custom calls that compute: handwritten kernels, and libraries of GPUs and CPUs.
_KERNELS = re.compile(r"tpu_custom_call|mosaic|triton|__cu|__onednn")
_ELEMENTWISE = {
    *("abs", "add", "ceil", "clamp", "compare", "cosine", "divide", "erf", "exponential"),
    *("exponential-minus-one", "floor", "log", "log-plus-one", "logistic", "maximum", "minimum"),
    *("multiply", "negate", "power", "remainder", "rsqrt", "select", "sign", "sine", "sqrt"),
    *("subtract", "tan", "tanh", "cbrt", "round-nearest-even"),
}
# Passes of a bfloat16 matrix unit for a product of float32 operands, by precision.
_PASSES = {"highest": 6, "high": 3}


@dataclasses.dataclass
class Cost:
    """What one run of a program, or of a part of it, costs one device."""

    matmul_flops: float = 0.0  # of matrix products and convolutions
    mxu_flops: float = 0.0  # the same, times a bfloat16 unit's passes for float32 operands
    other_flops: float = 0.0  # of elementwise operations
    bytes_accessed: float = 0.0  # read from and written to main memory
    # Each with the number of times that it runs.
    collectives: list[tuple[Collective, int]] = dataclasses.field(default_factory=list)
    unknown_loops: int = 0  # their number of turns depends on the data; their bodies count once
    # Calls of kernels that do not state their FLOPs, by name.
    unknown_calls: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds another cost, `times` times."""
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
        """Bytes of the collectives' results on one device."""
        return sum(count * each.num_bytes for each, count in self.collectives)


def program_cost(hlo_text: str, num_devices: int = 1) -> Cost:
    """The cost of one run of a program, from `compiled.as_text()`.

    On a mesh of several slices the text is the program of one slice: the groups of its collectives
    are extended to all `num_devices` of the mesh.
    """
    module = hlo.parse(hlo_text)
    cost = _Counter(module).computation(module.entry)
    size = module.num_partitions
    if num_devices > size > 1:
        offsets = range(0, num_devices, size)
        # Between slices, devices at the same place in their slices form a group.
        between = tuple(tuple(i + k for k in offsets) for i in range(size))
        for place, (each, count) in enumerate(cost.collectives):
            on_all = tuple(tuple(i + k for i in group) for k in offsets for group in each.groups)
            extended = dataclasses.replace(each, groups=on_all or between)
            cost.collectives[place] = extended, count
    return cost


class _Counter:
    """Costs of computations, each counted once and multiplied by its number of runs."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._costs: dict[str, Cost] = {}

    def computation(self, name: str, fused: bool = False) -> Cost:
        """Cost of one run of a computation. The values of a fused one do not leave the chip."""
        if name not in self._costs:
            total = Cost()
            parts: set[object] = set()  # keys of collectives that several fusions share
            for instruction in self._module.computations[name].values():
                self._add(total, name, instruction, parts, fused)
            self._costs[name] = total
        return self._costs[name]

    def _add(
        self, total: Cost, scope: str, instruction: Instruction, parts: set[object], fused: bool
    ) -> None:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return
        if opcode in ("while", "call", "call-start", "async-start"):
            turns = self._module.trip_count(instruction) if opcode == "while" else 1
            total.unknown_loops += turns is None
            for called in instruction.called:
                total.add(self.computation(called), 1 if turns is None else turns)
        elif opcode == "conditional":
            branches = [self.computation(called) for called in instruction.called]
            total.add(max(branches, key=lambda c: (c.bytes_accessed, c.matmul_flops)))
        elif opcode == "fusion":
            inside = self.computation(instruction.called[0], fused=True)
            scatter = hlo.reduce_scatter(self._module, instruction)
            found = [(scatter, 1)] if scatter else inside.collectives
            new = [(each, n) for each, n in found if each.key is None or each.key not in parts]
            parts |= {each.key for each, _ in new}
            total.add(dataclasses.replace(inside, collectives=new))
            total.bytes_accessed += 0 if fused else self._fusion_bytes(scope, instruction)
        else:
            total.add(self._operation(scope, instruction))
            total.bytes_accessed += 0 if fused else self._bytes(scope, instruction)

    def _operation(self, scope: str, instruction: Instruction) -> Cost:
        opcode, result = instruction.opcode, Cost()
        if each := hlo.collective(instruction):
            result.collectives.append((each, 1))
        elif opcode in ("dot", "convolution"):
            operands = [self._operand(scope, instruction, k) for k in range(2)]
            count = _dot_flops if opcode == "dot" else _convolution_flops
            result.matmul_flops = count(instruction, *operands)
            precision = re.findall(r"highest|high", instruction.attribute("operand_precision"))
            wide = any(operand.dtype == "f32" for operand in operands)
            passes = max((_PASSES[p] for p in precision), default=1) if wide else 1
            result.mxu_flops = passes * result.matmul_flops
        elif opcode == "custom-call":
            flops = self._kernel_flops(scope, instruction)
            result.matmul_flops = result.mxu_flops = flops or 0.0
            if flops is None:
                result.unknown_calls[_target(instruction)] += 1
        elif opcode == "reduce" or opcode in _ELEMENTWISE:
            arrays = instruction.arrays
            array = self._operand(scope, instruction, 0) if opcode == "reduce" else arrays[0]
            result.other_flops = array.size if array.dtype.startswith(("f", "bf", "c")) else 0
        return result

    def _kernel_flops(self, scope: str, call: Instruction) -> float | None:
        """FLOPs of a custom call; None for a kernel that does not state them."""
        if not _KERNELS.match(_target(call)):
            return 0.0
        if stated := re.search(r'"flops":"?(\d+)', call.attributes):
            return float(stated[1])
        if _target(call).startswith("__cudnn$fmha"):
            return self._attention_flops(scope, call)
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
        if not contracted or not _target(call).startswith("__cublas"):
            return None
        left = self._operand(scope, call, 0)
        return 2.0 * call.arrays[0].size * math.prod(left.shape[k] for k in numbers(contracted[1]))

    def _attention_flops(self, scope: str, call: Instruction) -> float:
        """FLOPs of cuDNN's fused attention: 2 products of [N, hd] forward, 5 backward, a head."""
        batch, queries, heads, size = self._operand(scope, call, 0).shape
        keys = self._operand(scope, call, 1).shape[1]
        products = 5 if _target(call).endswith("Backward") else 2
        return products * 2.0 * batch * heads * queries * keys * size

    def _operand(self, scope: str, instruction: Instruction, k: int) -> Array:
        return self._module.computations[scope][instruction.operands[k]].arrays[0]

    def _bytes(self, scope: str, instruction: Instruction) -> float:
        """Bytes of main memory that an instruction outside fusions reads and writes."""
        opcode, results = instruction.opcode, instruction.arrays
        if opcode == "custom-call" and not _KERNELS.match(_target(instruction)):
            return 0
        computation = self._module.computations[scope]
        operands = [a for name in instruction.operands for a in computation[name].arrays]
        if opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            # (destination, source, flag) or ((source), destination, flag)
            moved = results[0] if opcode == "copy-start" else results[len(operands)]
            return _in_hbm([moved]) + (moved.num_bytes if operands[0].space == hlo.HBM else 0)
        if opcode in _SLICES:
            read = results[0].num_bytes if operands[0].space == hlo.HBM else 0
            return read + _in_hbm(results)
        if opcode in ("dynamic-update-slice", "scatter"):
            update = operands[1] if opcode == "dynamic-update-slice" else operands[-1]
            written = update.num_bytes if results[0].space == hlo.HBM else 0
            return _in_hbm([update]) + written
        each = hlo.collective(instruction)
        return _in_hbm(operands) + _in_hbm(each.arrays if each else results)

    def _fusion_bytes(self, scope: str, fusion: Instruction) -> float:
        computation, called = self._module.computations[scope], fusion.called[0]
        sizes = [_in_hbm(computation[name].arrays) for name in fusion.operands]
        read = sum(min(size, self._read(called, k)) for k, size in enumerate(sizes) if size)
        written = itertools.zip_longest(fusion.arrays, self._written(called), fillvalue=math.inf)
        return read + sum(
            min(array.num_bytes, size)
            for array, size in written
            if isinstance(array, Array) and array.space == hlo.HBM
        )

    def _read(self, called: str, k: int) -> float:
        """Bytes that a fused computation reads of its k-th parameter; inf for all of them."""
        inside = self._module.computations[called].values()
        source = next(i for i in inside if i.opcode == "parameter" and int(i.argument) == k)
        return self._read_of(called, source)

    def _read_of(self, called: str, source: Instruction) -> float:
        if source.is_root:
            return math.inf
        total = 0.0
        for user in self._module.computations[called].values():
            places = [k for k, name in enumerate(user.operands) if name == source.name]
            if not places:
                continue
            if user.opcode in _SLICES and places[0] == 0:
                total += user.arrays[0].num_bytes
            elif self._is_view(user):
                total += self._read_of(called, user)
            elif user.opcode == "fusion":
                total += sum(self._read(user.called[0], k) for k in places)
            elif user.opcode != "dynamic-update-slice" or places[0] != 0:  # updated in place
                return math.inf
        return total

    def _is_view(self, instruction: Instruction) -> bool:
        """Whether its result, inside a fusion, is its operand as it lies in memory.

        Libtpu wraps bitcasts in fusions of their own, and for TPU7x copies to another tiling, which
        alias their operand.
        """
        if instruction.opcode != "fusion":
            return instruction.opcode == "bitcast"
        called = instruction.called[0]
        computation, root = self._module.computations[called], self._module.root(called)
        aliases = "output_to_operand_aliasing={{}: (0, {})}" in instruction.attributes
        if root.opcode != "bitcast" and not (root.opcode == "copy" and aliases):
            return False
        return computation[root.operands[0]].opcode == "parameter"

    def _written(self, called: str) -> Iterator[float]:
        """Bytes that a fused computation writes of each result; inf for all of one."""
        computation, root = self._module.computations[called], self._module.root(called)
        for end in [computation[n] for n in root.operands] if root.opcode == "tuple" else [root]:
            while self._is_view(end):
                end = computation[end.operands[0]]
            if end.opcode == "dynamic-update-slice":
                yield computation[end.operands[1]].arrays[0].num_bytes
            elif end.opcode == "fusion":
                yield from self._written(end.called[0])
            else:
                yield from [math.inf] * len(end.arrays)


def _target(call: Instruction) -> str:
    return call.attribute("custom_call_target").strip('"')


def _in_hbm(arrays: Iterable[Array]) -> float:
    return sum(array.num_bytes for array in arrays if array.space == hlo.HBM)


def _dot_flops(dot: Instruction, left: Array, right: Array) -> float:
    contracted = numbers(dot.attribute("lhs_contracting_dims"))
    return 2.0 * dot.arrays[0].size * math.prod(left.shape[k] for k in contracted)


def _convolution_flops(convolution: Instruction, left: Array, right: Array) -> float:
    """2 per multiply-add with an element of the input; padding and dilation count nothing."""
    labels = re.split(r"_|->", convolution.attribute("dim_labels"))
    shapes = (left.shape, right.shape, convolution.arrays[0].shape)
    inputs, taps, outputs = (
        dict(zip(axes, shape, strict=True)) for axes, shape in zip(labels, shapes, strict=True)
    )
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}

    def field(key: str, k: int, default: int) -> int:
        """The k-th number of a field such as `3x3`; for `pad` (`1_1x0_1`), the padding before."""
        return int(fields[key].split("x")[k].split("_")[0]) if key in fields else default

    pairs = 1.0
    for k, axis in enumerate(sorted(filter(str.isdigit, outputs))):
        dilation = field("lhs_dilate", k, 1)
        # The place in the dilated input that each tap of the window meets for each output.
        places = np.arange(outputs[axis]) * field("stride", k, 1) - field("pad", k, 0)
        places = places + np.arange(taps[axis])[:, None] * field("rhs_dilate", k, 1)
        inside = (places >= 0) & (places <= (inputs[axis] - 1) * dilation)
        pairs *= int((inside & (places % dilation == 0)).sum())
    # `i` of the window is already that of one feature group.
    return 2.0 * outputs["b"] * outputs["f"] * taps["i"] * pairs
