"""Compiles the programs that a run will run, for devices that may not be here.

All arguments are shapes: no data set, no weights and no memory of the devices is needed.
"""

import dataclasses
import itertools
import math
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repulsor_jax import config as config_lib
from repulsor_jax import sharding
from repulsor_jax.autoencoders import Autoencoder
from repulsor_jax.config import Config, stored_condition_channels, stored_features
from repulsor_jax.data.encoder import compiled_encoder
from repulsor_jax.data.latents import Description, LatentFormat
from repulsor_jax.experiment import (
    Experiment,
    checked_mesh,
    load_autoencoder,
    make_trainer,
    model_of,
    stored_condition,
)
from repulsor_jax.inference.generator import configured_guidance, make_batch_fn
from repulsor_jax.inference.tasks import abstract_given, has_task
from repulsor_jax.method.repulsor import rows_per_image
from repulsor_jax.models.build import build_source
from repulsor_jax.planning.compiler import Answer, ask, compiled_answer
from repulsor_jax.planning.cost import Cost, program_cost
from repulsor_jax.planning.topology import Topology, one_host, open_topology
from repulsor_jax.runtime.chips import GIB
from repulsor_jax.train_state import abstract_model_params, abstract_train_state
from repulsor_jax.train_step import abstract_batch, compile_training

PROGRAMS = ("train", "sample", "encode")

# What libtpu adds to the temporaries with machine code, as a share of them: at most about this.
_ADDED = 0.4


@dataclasses.dataclass(frozen=True)
class Built:
    """A program that is ready to be compiled."""

    name: str  # of `PROGRAMS`
    images: int  # that one run makes or uses, over all devices
    mesh: Mesh
    kinds: dict[str, Any]  # the sharded shapes of its arguments, by kind
    compile: Callable[[], jax.stages.Compiled]
    # Shapes that only an array with bank rows of at least two devices can have.
    bank_shapes: frozenset[tuple[int, ...]] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program(Built):
    """A compiled program, or the reason why the compiler refused it."""

    memory: dict[str, float]  # bytes on one device by kind
    cost: Cost | None  # of one run on one device; None where the compiler refused the program
    seconds: float  # of tracing and compiling
    refusal: str = ""  # why it does not fit
    # Whether there is machine code: without it, neither its bytes nor what libtpu then adds to the
    # temporaries are counted in `memory`.
    emitted: bool = True

    @property
    def total_bytes(self) -> float:
        """All of its memory on one device."""
        return sum(self.memory.values())

    @property
    def carries_the_bank(self) -> bool:
        """Whether a collective yields an array of `bank_shapes`."""
        arrays = [a for each, _ in self.cost.collectives for a in each.arrays] if self.cost else []
        return any(array.shape in self.bank_shapes for array in arrays)


def abstract_experiment(config: Config, workdir: pathlib.Path, topology: Topology) -> Experiment:
    """What the modes build their programs from, with no weights and no data set.

    Raises:
      ConfigError: the configuration does not fit the devices, or an unknown autoencoder.
    """
    mesh = checked_mesh(config, topology.devices)
    has_one = config.data.autoencoder != "none"
    autoencoder = load_autoencoder(config, abstract=True) if has_one else None
    channels = np.ones(config.model.in_channels, np.float32)
    is_stochastic = autoencoder is not None and autoencoder.stochastic
    return Experiment(
        config=config,
        workdir=workdir,
        mesh=mesh,
        model=model_of(config, mesh),
        autoencoder=autoencoder,
        latent_format=LatentFormat(is_stochastic, channels, channels),
        latent_mean=tuple(channels.tolist()),
        latents_sha256="",
        class_names=tuple(str(k) for k in range(config.model.num_classes)),
    )


def compile_program(
    name: str,
    experiment: Experiment,
    topology: Topology,
    *,
    emits: bool = False,
    makes_sure: bool = True,
) -> Program:
    """Compiles one of `PROGRAMS`. A program that does not fit is an answer, not an error.

    For devices elsewhere another process compiles, see `compiler`: for TPUs with machine code where
    `emits`, and where it `makes_sure` of a program that `may_not_fit`.
    """
    started = time.perf_counter()
    built = build(name, experiment, topology)
    if topology.name == "local":
        return _program(built, compiled(built), topology, started)
    slices = topology.num_slices if topology.shape else 1
    request = {
        "name": name,
        "values": dataclasses.asdict(experiment.config),
        "workdir": str(experiment.workdir),
        "kind": topology.name.rpartition(" ")[2],
        "num_slices": slices,
    }
    emits &= topology.devices[0].platform == "tpu"  # of GPUs, it says nothing new
    program = _program(built, ask(request, emits=emits), topology, started)
    if makes_sure and may_not_fit(program, topology):
        program = _program(built, ask(request, emits=True), topology, started)
    return program


def may_not_fit(program: Program, topology: Topology) -> bool:
    """Whether a TPU's program, read before machine code, may not fit with what that adds."""
    most = program.total_bytes + _ADDED * program.memory.get("temporaries", 0)
    unsure = bool(topology.shape) and not program.refusal and not program.emitted
    return unsure and most > (topology.device_bytes or math.inf)


def _program(built: Built, answer: Answer, topology: Topology, started: float) -> Program:
    memory: dict[str, float] = {kind: shard_bytes(tree) for kind, tree in built.kinds.items()}
    padding = max(answer.memory.get("arguments", 0) - sum(memory.values()), 0)
    memory |= {k: n for k, n in answer.memory.items() if k != "arguments"} | {"padding": padding}
    total, available = sum(memory.values()), topology.device_bytes
    refusal = answer.refusal
    if not refusal and available is not None and total > available:
        # GPUs' compiler never refuses, and TPUs' does not count all.
        refusal = f"it takes {total / GIB:.2f} of {available / GIB:.2f} GiB of a device"
    return Program(
        **vars(built),
        memory={kind: count for kind, count in memory.items() if count},
        cost=program_cost(answer.hlo, built.mesh.size) if answer.hlo else None,
        seconds=time.perf_counter() - started,
        refusal=refusal,
        emitted=answer.emitted,
    )


def requested(name: str, values: dict[str, Any], workdir: str, kind: str, num_slices: int) -> Built:
    """The program that `compile_program` asks another process for."""
    topology = open_topology(kind, num_slices)
    experiment = abstract_experiment(config_lib.parse(values), pathlib.Path(workdir), topology)
    return build(name, experiment, topology)


def compiled(built: Built) -> Answer:
    """Compiles a program, and says what it takes or why the compiler refuses it."""
    try:
        return compiled_answer(built.compile())
    except jax.errors.JaxRuntimeError as error:
        message = str(error).strip()
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        first = message.splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        arguments = sum(map(shard_bytes, built.kinds.values()))
        needed = {"temporaries": _refused_bytes(message, arguments)}
        return Answer(needed, refusal=f"the compiler says: {first}")


def with_batch(config: Config, batch_size: int) -> Config:
    """The configuration with another batch; the bank's rows are rounded up to whole batches."""
    r = config.repulsor
    slot = batch_size * rows_per_image(r)
    repulsor = dataclasses.replace(r, bank_rows=-(-r.bank_rows // slot) * slot)
    return dataclasses.replace(config, batch_size=batch_size, repulsor=repulsor)


def reconfigured(experiment: Experiment, config: Config, topology: Topology) -> Experiment:
    """The experiment with another mesh, batch or rematerialisation.

    Raises:
      ConfigError: the configuration does not fit the devices.
    """
    mesh = checked_mesh(config, topology.devices)
    model = model_of(config, mesh)
    return dataclasses.replace(experiment, config=config, mesh=mesh, model=model)


def build(name: str, experiment: Experiment, topology: Topology) -> Built:
    """Builds one of `PROGRAMS` as its mode does, without compiling it."""
    if name == "train":
        return _train(experiment)
    assert experiment.autoencoder is not None, f"no {name} program without an autoencoder"
    if name == "sample":
        return _sample(experiment, experiment.autoencoder)
    return _encode(experiment, experiment.autoencoder, topology)


def _train(experiment: Experiment) -> Built:
    config, mesh = experiment.config, experiment.mesh
    trainer = make_trainer(config, mesh)
    state = abstract_train_state(trainer, mesh)
    size, channels = config.model.latent_size, config.model.in_channels
    record = (size, size, channels * (2 if experiment.latent_format.stochastic else 1))
    stored = stored_condition_channels(config.conditioning, record[-1])
    features = stored_features(config)
    batch = abstract_batch(config.batch_size, record, config.data.dtype, mesh, stored, features)
    kinds = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "EMA": [state.ema_params, state.ema_terms],
        "bank": state.bank,
        "batch": batch,
        "other": [state.step, state.rng],
    }
    arguments = trainer, experiment.latent_format, record, config.data.dtype, mesh
    shapes = _bank_shapes(state.bank.features, state.params) if state.bank else frozenset()
    compile_it = lambda: compile_training(*arguments).step
    return Built("train", config.batch_size, mesh, kinds, compile_it, shapes)


def _bank_shapes(features: Any, params: Any) -> frozenset[tuple[int, ...]]:
    """Shapes that only an array with bank rows of at least two devices can have.

    For the bank `[S, B, d]` and n rows of at least two devices: `[S, n, d]` and `[S * n, d]`, and
    for the tags `[S, n]`.
    """
    slots, batch_size, dim = features.shape
    rows = features.sharding.shard_shape(features.shape)[1]
    counts = range(2 * rows, batch_size + 1, rows)
    shapes: set[tuple[int, ...]] = {(slots, n, dim) for n in counts} | {(slots, n) for n in counts}
    # With at most B rows an array may hold the queries.
    shapes |= {(slots * n, dim) for n in counts if slots * n > batch_size}
    shapes -= {(batch_size, dim), (dim, batch_size)}  # the queries, which are gathered
    # Parameters and their gradients are sent too: whole, in shards, and split along some axes.
    along = features.sharding.mesh.shape.values()
    parts = {math.prod(c) for k in range(len(along) + 1) for c in itertools.combinations(along, k)}
    for leaf in jax.tree.leaves(params):
        shapes -= {
            tuple(size // part for size, part in zip(leaf.shape, split, strict=True))
            for split in itertools.product(
                *([part for part in parts if size % part == 0] for size in leaf.shape)
            )
        }
    return frozenset(shapes)


def _sample(experiment: Experiment, autoencoder: Autoencoder) -> Built:
    config, mesh = experiment.config, experiment.mesh
    everywhere = sharding.replicated(mesh)
    source = build_source(config.source, config.model)
    params = abstract_model_params(experiment.model, source, mesh)
    decoder = _shapes(autoencoder.params, everywhere)
    first = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    guidance = (scalar,) * 3 if configured_guidance(config.sampling) else None
    given = None
    if has_task(config):
        given = _shapes(abstract_given(config), sharding.batch_sharding(mesh))
    jitted = jax.jit(make_batch_fn(experiment), out_shardings=sharding.batch_sharding(mesh))

    def compile_it() -> jax.stages.Compiled:
        with sharding.use_mesh(mesh):
            return jitted.lower(params, None, decoder, first, guidance, given).compile()

    kinds = {"EMA": params, "autoencoder": decoder}
    return Built("sample", config.sampling.batch_size, mesh, kinds, compile_it)


def _encode(experiment: Experiment, autoencoder: Autoencoder, topology: Topology) -> Built:
    """The encoder of one host: every host encodes its own images on its own devices."""
    config = experiment.config
    devices = one_host(topology).devices
    mesh = Mesh(np.array(devices), ("batch",))
    params = _shapes(autoencoder.params, NamedSharding(mesh, PartitionSpec()))
    count = config.data.encode_batch_per_device * len(devices)
    size, channels = config.model.latent_size, config.model.in_channels
    latents = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    decoded = jax.eval_shape(autoencoder.decode, autoencoder.params, latents)
    side = config.data.image_size or decoded.shape[1]
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    condition = stored_condition(config, autoencoder.stochastic)
    kind = condition.get("condition", "")
    # Label maps are the last channel of their images.
    shape = (count, side, side, decoded.shape[-1] + (kind == "semantic"))
    images = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows)
    about = Description(
        dtype=config.data.dtype,
        stochastic=autoencoder.stochastic,
        flipped=config.data.flips,
        autoencoder=autoencoder.name,
        scale=autoencoder.scale,
        source=config.data.source,
        split=config.data.train_split,
        class_names=experiment.class_names,
        **condition,
    )
    encode: Any = compiled_encoder(autoencoder, about)
    numbers = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=rows)
    kinds = {"autoencoder": params, "batch": images}
    compile_it = lambda: encode.lower(
        params, images, numbers if kind == "inpaint" else None
    ).compile()
    return Built("encode", count, mesh, kinds, compile_it)


def _shapes(tree: Any, where: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of sharded shapes."""
    shards = [(x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * itemsize for shape, itemsize in shards)


def _refused_bytes(message: str, arguments: float) -> float:
    """Bytes that a refused program needs beside its arguments, from the compiler's message."""
    found = re.search(r"(Used |temporaries \()([\d.]+)([KMGT])( of|\))", message)
    if not found:
        return 0
    size = float(found[2]) * 1024 ** " KMGT".index(found[3])
    return max(size - arguments, 0) if found[1] == "Used " else size
