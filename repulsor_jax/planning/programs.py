"""Compiles the programs of a run, the very ones that it will run, for devices that may not be here.

No data set, no weights and no memory of the devices is needed: all arguments are shapes.
"""

import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repulsor_jax import sharding
from repulsor_jax.autoencoders import Autoencoder, abstract_autoencoder
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.data.encoder import compiled_encoder
from repulsor_jax.data.latents import Description, LatentFormat
from repulsor_jax.experiment import Experiment, checked_mesh, make_trainer
from repulsor_jax.inference.generator import configured_guidance, make_batch_fn
from repulsor_jax.models.build import build_model, init_model_params
from repulsor_jax.planning.cost import Cost, program_cost
from repulsor_jax.planning.topology import Topology, one_host
from repulsor_jax.runtime.chips import GIB
from repulsor_jax.train_state import abstract_train_state
from repulsor_jax.train_step import compile_train_step, make_train_step

PROGRAMS = ("train", "sample", "encode")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, or what kept it from being compiled.

    Attributes:
      name: of `PROGRAMS`.
      images: that one run makes or uses, over all its devices.
      mesh: what it runs on.
      memory: bytes on one device by kind. Of a program that does not fit, temporaries are what the
        compiler says is needed beside the rest.
      cost: of one run on one device; None of a program that does not fit.
      bank_shape: of the memory bank on one device; () without one.
      seconds: that tracing and compiling took.
      refusal: what the compiler said of a program that does not fit; "" of one that does.
    """

    name: str
    images: int
    mesh: Mesh
    memory: dict[str, float]
    cost: Cost | None
    bank_shape: tuple[int, ...]
    seconds: float
    refusal: str = ""

    @property
    def total_bytes(self) -> float:
        """All of its memory on one device."""
        return sum(self.memory.values())


class Built(NamedTuple):
    """A program that is ready to be compiled; see `Program`.

    Attributes:
      kinds: the sharded shapes that it is given, by kind.
      compile: compiles it.
    """

    images: int
    mesh: Mesh
    kinds: dict[str, Any]
    bank_shape: tuple[int, ...]
    compile: Callable[[], jax.stages.Compiled]


def abstract_experiment(config: Config, workdir: pathlib.Path, topology: Topology) -> Experiment:
    """What the modes build their programs from, with no weights and no data set.

    Raises:
      ConfigError: the configuration does not fit the devices, or an unknown autoencoder.
    """
    mesh = checked_mesh(config, topology.devices)
    data, autoencoder = config.data, None
    if data.autoencoder != "none":
        try:
            autoencoder = abstract_autoencoder(
                data.autoencoder, weights=data.autoencoder_weights, dtype=data.autoencoder_dtype
            )
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(f"config.data.autoencoder={data.autoencoder!r}: {error}") from error
    channels = np.ones(config.model.in_channels, np.float32)
    return Experiment(
        config=config,
        workdir=workdir,
        mesh=mesh,
        model=build_model(config.model),
        autoencoder=autoencoder,
        latent_format=LatentFormat(
            bool(autoencoder and autoencoder.stochastic), channels, channels
        ),
        latents_sha256="",
        class_names=tuple(str(k) for k in range(config.model.num_classes)),
    )


def compile_program(name: str, experiment: Experiment, topology: Topology) -> Program:
    """Compiles one of `PROGRAMS`; one that does not fit is an answer, not an error.

    Raises:
      ConfigError: the configuration has no such program.
    """
    built = build(name, experiment, topology)
    memory: dict[str, float] = {kind: shard_bytes(tree) for kind, tree in built.kinds.items()}
    started = time.perf_counter()
    try:
        compiled = built.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = _first_line(str(error))
        memory["temporaries"] = _refused_bytes(str(error), sum(memory.values()))
        cost = None
    else:
        refusal, cost = "", program_cost(compiled.as_text() or "", built.mesh.size)
        memory |= _rest_of_memory(compiled, sum(memory.values()))
    seconds = time.perf_counter() - started
    memory = {kind: count for kind, count in memory.items() if count}
    return Program(name, built.images, built.mesh, memory, cost, built.bank_shape, seconds, refusal)


def build(name: str, experiment: Experiment, topology: Topology) -> Built:
    """Builds one of `PROGRAMS` as its mode does, and compiles nothing yet.

    Raises:
      ConfigError: the configuration has no such program.
    """
    builders = {"train": _train, "sample": _sample, "encode": _encode}
    return builders[name](experiment, topology)


def _train(experiment: Experiment, topology: Topology) -> Built:
    del topology
    config, mesh = experiment.config, experiment.mesh
    trainer = make_trainer(config, mesh)
    state = abstract_train_state(trainer, mesh)
    size, channels = config.model.latent_size, config.model.in_channels
    record = (size, size, channels * (2 if experiment.latent_format.stochastic else 1))
    rows = sharding.batch_sharding(mesh)
    batch = [
        jax.ShapeDtypeStruct((config.batch_size, *record), config.data.dtype, sharding=rows),
        jax.ShapeDtypeStruct((config.batch_size,), jnp.int32, sharding=rows),
    ]
    kinds = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "EMA": state.ema_params,
        "bank": state.bank,
        "batch": batch,
        "other": [state.step, state.rng],
    }
    features: Any = state.bank and state.bank.features
    bank_shape = features.sharding.shard_shape(features.shape) if features else ()
    step = make_train_step(trainer, experiment.latent_format)

    def compile_it() -> jax.stages.Compiled:
        return compile_train_step(step, state, record, config.data.dtype, config.batch_size, mesh)

    return Built(config.batch_size, mesh, kinds, bank_shape, compile_it)


def _sample(experiment: Experiment, topology: Topology) -> Built:
    del topology
    config, mesh, autoencoder = experiment.config, experiment.mesh, experiment.autoencoder
    if autoencoder is None:
        raise ConfigError("config.data.autoencoder='none' cannot decode: there is no sampler")
    everywhere = sharding.replicated(mesh)
    boxed = jax.eval_shape(
        lambda key: init_model_params(experiment.model, key), jax.random.key(config.seed)
    )
    params = sharding.abstract_arrays(boxed, sharding.tree_shardings(boxed, mesh))
    decoder = _shapes(autoencoder.params, everywhere)
    first = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    guided = configured_guidance(config.sampling) is not None
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    generate = make_batch_fn(experiment)
    jitted = jax.jit(generate, out_shardings=sharding.batch_sharding(mesh))

    def compile_it() -> jax.stages.Compiled:
        with sharding.use_mesh(mesh):
            arguments = (params, None, decoder, first, (scalar,) * 3 if guided else None)
            return jitted.lower(*arguments).compile()

    kinds = {"EMA": params, "autoencoder": decoder}
    return Built(config.sampling.batch_size, mesh, kinds, (), compile_it)


def _encode(experiment: Experiment, topology: Topology) -> Built:
    """Every host encodes its own images on its own devices: one of them is planned for."""
    config, autoencoder = experiment.config, experiment.autoencoder
    if autoencoder is None:
        raise ConfigError("config.data.autoencoder='none' cannot encode: there is no encoder")
    devices = one_host(topology).devices
    mesh = Mesh(np.array(devices), ("batch",))
    params = _shapes(autoencoder.params, NamedSharding(mesh, PartitionSpec()))
    count = config.data.encode_batch_per_device * len(devices)
    shape = (count, *_image_shape(config, autoencoder))
    images = jax.ShapeDtypeStruct(
        shape, jnp.uint8, sharding=NamedSharding(mesh, PartitionSpec("batch"))
    )
    about = Description(
        dtype=config.data.dtype,
        stochastic=autoencoder.stochastic,
        flipped=config.data.flips,
        autoencoder=autoencoder.name,
        scale=autoencoder.scale,
        source=config.data.source,
        split=config.data.train_split,
        class_names=experiment.class_names,
    )
    encode: Any = compiled_encoder(autoencoder, about)

    def compile_it() -> jax.stages.Compiled:
        return encode.lower(params, images).compile()

    return Built(count, mesh, {"autoencoder": params, "batch": images}, (), compile_it)


def _image_shape(config: Config, autoencoder: Autoencoder) -> tuple[int, int, int]:
    """Height, width and channels of the images whose latents the model is trained on."""
    size, channels = config.model.latent_size, config.model.in_channels
    latents = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    try:
        decoded = jax.eval_shape(autoencoder.decode, autoencoder.params, latents)
    except Exception as error:  # Linen's own, of shapes that do not fit
        raise ConfigError(
            f"config.model.in_channels={channels} are not the channels of "
            f"config.data.autoencoder={autoencoder.name!r}"
        ) from error
    side = config.data.image_size or decoded.shape[1]
    return side, side, decoded.shape[-1]


def _shapes(tree: Any, where: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
    )


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of sharded shapes."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape, leaf.dtype))
            return data.size * data.dtype.itemsize
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _rest_of_memory(compiled: jax.stages.Compiled, arguments: float) -> dict[str, float]:
    """What a program needs beside the arrays that it is given."""
    stats: Any = compiled.memory_analysis()
    return {
        "temporaries": stats.temp_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "padding": max(stats.argument_size_in_bytes - arguments, 0),
        "program": stats.generated_code_size_in_bytes,
    }


def _refused_bytes(message: str, arguments: float) -> float:
    """Bytes that the compiler says a program needs, less the arguments that we know of."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    if found:
        return max(_size(found) - arguments, 0)
    found = re.search(r"temporaries \(([\d.]+)([KMGT])\)", message)
    return _size(found) if found else 0


def _size(found: re.Match[str]) -> float:
    return float(found[1]) * GIB * {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}[found[2]]


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0].removeprefix("RESOURCE_EXHAUSTED: ") if lines else ""
