"""Parameters that are split over all devices of a batch, and a network that runs on them.

Updating a parameter takes one device (weight-update sharding, arXiv 2004.13336; the first stages of
ZeRO, arXiv 1910.02054): each keeps, and updates, its share of the float32 parameters, of the
optimizer's moments and of the average. Once a step, before the loop over blocks, the shares along
`data` are gathered to a copy in the dtype that the network computes in; what is split along `fsdp`
is gathered block by block. In the backward pass the gradient of each block is summed over devices
and scattered to the shares.

The blocks' modulation layers hold a third of a DiT's parameters, and are applied once to an image
instead of to its every token. They are not gathered: the rows go to the parameters, and the
products come back (`apply_dense`).

Heads of terms and a learned source are small and stay whole, but for `fsdp`. Devices read them in
the same way, so that their gradients are summed in the dtype in which the network's are.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from jax.sharding import Mesh, PartitionSpec

from repulsor_jax import sharding
from repulsor_jax.sharding import BATCH_AXES, DATA_AXES
from repulsor_jax.train_state import (
    Trainer,
    TrainState,
    abstract_train_state,
    unsplit_shardings,
)

Array = jax.Array
Axes = tuple[str, ...]  # of the mesh


class Place(NamedTuple):
    """Where a parameter lies, and how it travels."""

    axes: tuple[Axes, ...]  # that split each dimension of the share
    gathered: bool = True  # False: the layer is computed where its parameters lie
    # What the network of the devices does well. A gradient whose parts are no multiples of `tile`
    # along their dimension is summed whole on every device, and cut.
    tile: int = 1
    at_once: bool = True  # one collective may go along several axes of the mesh

    def of_copy(self) -> "Place":
        """That of what `gather` makes."""
        if not self.gathered:
            return self
        return self._replace(axes=tuple(_without(dim, DATA_AXES) for dim in self.axes))

    def spec(self) -> PartitionSpec:
        """The axes as JAX writes them."""
        return PartitionSpec(*(dim or None for dim in self.axes))


class Split(struct.PyTreeNode, meta.AxisMetadata):
    """A parameter that a Flax module reads inside `on_rows`; its gradient goes to the shares."""

    copy: Array  # in the dtype of the computation, as `gather` makes it
    share: Array | None  # takes the gradient; None where the copy does, or there is none
    place: Place = struct.field(pytree_node=False)

    def unbox(self) -> Array:
        """The whole parameter."""
        if self.share is None:
            return _collect(self.copy, self.place.of_copy())
        return _read(self.place, self.copy, self.share)

    def replace_boxed(self, val: Any) -> Any:
        """Is not there: parameters are read."""
        raise NotImplementedError

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Split":
        """The parameter with one more dimension: Flax's loops stack parameters."""
        none: tuple[Axes, ...] = ((),)
        axes = self.place.axes[:index] + none + self.place.axes[index:]
        return self.replace(place=self.place._replace(axes=axes))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Split":
        """The inverse of `add_axis`."""
        axes = self.place.axes[:index] + self.place.axes[index + 1 :]
        return self.replace(place=self.place._replace(axes=axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read(place: Place, copy: Array, share: Array) -> Array:
    """The whole of a copy; its gradient is that of the share, whose values are not read."""
    return _collect(copy, place.of_copy())


def _read_forward(place: Place, copy: Array, share: Array) -> tuple[Array, Any]:
    return _read(place, copy, share), jnp.zeros((0,), share.dtype)


def _read_backward(place: Place, like: Array, gradient: Array) -> tuple[None, Array]:
    # Over the axes that do not split it `shard_map` sums the gradient, in the dtype of the share.
    return None, _scatter(gradient.astype(like.dtype), place)


_read.defvjp(_read_forward, _read_backward)


def _stages(place: Place) -> Iterator[tuple[int, Axes]]:
    """The collectives that scatter an array, one after the other: a dimension, and axes."""
    for dim, axes in enumerate(place.axes):
        if axes and place.at_once:
            yield dim, axes
        elif axes:
            yield from ((dim, (axis,)) for axis in axes)


def _scatter(x: Array, place: Place) -> Array:
    """Sums over the devices, and leaves each its part."""
    stages = list(_stages(place._replace(at_once=place.at_once and place.tile == 1)))
    in_tiles = all(
        x.shape[k] // jax.lax.axis_size(axes) % place.tile == 0 for k, axes in stages[:1]
    )
    if not in_tiles and "fsdp" not in _all_axes(place):
        x = jax.lax.psum(x, _all_axes(place))
        for dim, axes in stages:
            size = x.shape[dim] // jax.lax.axis_size(axes)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, dim)
        return x
    for dim, axes in stages:
        x = jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
    return x


def _collect(x: Array, place: Place) -> Array:
    """The whole of which each device has a part."""
    stages = list(_stages(place))
    if len(stages) < 2 or not place.at_once:
        for dim, axes in reversed(stages):
            x = jax.lax.all_gather(x, axes, axis=dim, tiled=True)
        return x
    sizes = [math.prod(jax.lax.axis_size(axis) for axis in dim) for dim in place.axes]
    parts = jax.lax.all_gather(x, _all_axes(place)).reshape(*sizes, *x.shape)
    order = [k for dim in range(x.ndim) for k in (dim, x.ndim + dim)]
    whole = [size * count for size, count in zip(x.shape, sizes, strict=True)]
    return parts.transpose(order).reshape(whole)


def _all_axes(place: Place) -> Axes:
    return tuple(axis for dim in place.axes for axis in dim)


def _without(axes: Axes, others: Axes) -> Axes:
    return tuple(axis for axis in axes if axis not in others)


class Layout(NamedTuple):
    """The places of parameters, and the dtypes of what is made of them."""

    places: dict[str, Any]  # tree of `Place`
    dtypes: dict[str, Any]  # tree: of the copies
    reduce_dtype: Any = None  # in which gradients are summed over devices; None: that of each copy


def make_layout(
    shapes: dict[str, Any], dtypes: dict[str, Any], reduce_dtype: Any = None, *, in_place: bool
) -> Layout:
    """The layout of parameters: of the networks, the source and the terms.

    Args:
      shapes: tree of `jax.ShapeDtypeStruct` with their shardings.
      dtypes: tree: in which each is used, of what is to be gathered by `gather`.
      reduce_dtype: see `Layout`.
      in_place: compute the blocks' modulations where their kernels lie, if all devices of a batch
        split these by columns.
    """
    places = jax.tree.map(_place, shapes)
    if in_place:
        layer = places["blocks"]["modulation"]
        mesh = shapes["blocks"]["modulation"]["kernel"].sharding.mesh
        kernel: Place = layer["kernel"]
        if {*kernel.axes[-1]} == {*_used(mesh)} and not any(kernel.axes[:-1]):
            stays = layer | {"kernel": kernel._replace(gathered=False)}
            places = places | {"blocks": places["blocks"] | {"modulation": stays}}
    return Layout(places, dtypes, reduce_dtype)


def _place(leaf: jax.ShapeDtypeStruct) -> Place:
    where: Any = leaf.sharding
    mesh, device = where.mesh, where.mesh.devices.flat[0]
    dims = sharding.split_axes(where, leaf.ndim)
    axes = tuple(tuple(axis for axis in dim if axis in _used(mesh)) for dim in dims)
    if device.platform != "tpu":
        return Place(axes)
    # Libtpu 0.0.42 scatters along one axis alone, in whole tiles, and gathers along two dimensions
    # of a torus at once but not along three; it reduces all of the array elsewhere.
    is_flat = all(each.coords[2] == device.coords[2] for each in mesh.devices.flat)
    return Place(axes, tile=16, at_once=is_flat)


def gather(params: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The copy of shares, or of some subtrees of them, for a step; see `Place.of_copy`."""
    places = {name: layout.places[name] for name in params}
    dtypes = {name: layout.dtypes[name] for name in params}

    def whole(place: Place, x: Array) -> Array:
        if not place.gathered:
            return x
        axes = tuple(tuple(axis for axis in dim if axis in DATA_AXES) for dim in place.axes)
        return _collect(x, place._replace(axes=axes))

    def on_device(shares: Any) -> Any:
        return jax.tree.map(whole, places, shares, is_leaf=_is_place)

    specs = jax.tree.map(Place.spec, places, is_leaf=_is_place)
    copies = jax.tree.map(lambda place: place.of_copy().spec(), places, is_leaf=_is_place)
    cast = jax.tree.map(lambda x, dtype: x.astype(dtype), params, dtypes)
    found: dict[str, Any] = _on_devices(on_device, (specs,), copies)(cast)
    return found


def join(copy: dict[str, Any], shares: dict[str, Any] | None, layout: Layout) -> dict[str, Any]:
    """A tree of `Split`: the copy of `gather`, and shares to take gradients of or None."""

    def each(place: Place, copy: Array, share: Array | None) -> Split:
        if share is None:
            return Split(copy, None, place)
        if not place.gathered:
            return Split(share.astype(copy.dtype), None, place)
        return Split(copy, share.astype(layout.reduce_dtype or copy.dtype), place)

    places = {name: layout.places[name] for name in copy}
    rest = jax.tree.map(lambda _: None, places, is_leaf=_is_place) if shares is None else shares
    found: dict[str, Any] = jax.tree.map(
        each, places, copy, rest, is_leaf=lambda x: x is None or _is_place(x)
    )
    return found


def on_rows(fn: Callable[..., Any], params: Any, *rows: Any) -> Any:
    """`fn(params, *rows)`, where the results and `rows` are [B, ...], and no row sees another.

    With `Split` in `params` every device runs it on its own rows; else XLA finds where what runs.
    """
    if not any(map(is_split, jax.tree.leaves(params, is_leaf=is_split))):
        return fn(params, *rows)

    def spec(x: Any) -> Any:
        if not is_split(x):
            return PartitionSpec()
        share = None if x.share is None else x.place.spec()
        return x.replace(copy=x.place.of_copy().spec(), share=share)

    specs = jax.tree.map(spec, params, is_leaf=is_split)
    by_row = PartitionSpec(BATCH_AXES)
    return _on_devices(fn, (specs, *[by_row] * len(rows)), by_row)(params, *rows)


def _used(mesh: Any) -> Axes:
    """The axes that split a batch."""
    return tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)


def _on_devices(fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    def without_names(*args: Any) -> Any:
        with nn.logical_axis_rules(()):  # a device has its rows, and constrains none
            return fn(*args)

    mapped: Callable[..., Any] = jax.shard_map(
        without_names, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    return mapped


def apply_dense(x: Array, kernel: Split, bias: Any) -> Array:
    """x W + b of layers whose kernels are not gathered: rows [b, F] of this device to [L, b, n].

    Every device has some columns of all layers, [L, F, n / devices], computes them for the rows of
    all devices, and gets the other columns for its own.
    """
    axes = kernel.place.axes[-1]
    # In float32 for the gradient, which is summed over layers and devices.
    rows = jax.lax.all_gather(x.astype(jnp.float32), axes, tiled=True)
    # Layers as a batch: for one product of all of them XLA finds no tiles on some GPUs.
    of_layers = jnp.broadcast_to(rows, (len(kernel.copy), *rows.shape)).astype(x.dtype)
    found = jnp.einsum("lbf,lfn->lbn", of_layers, kernel.copy)
    found = jax.lax.all_to_all(found, axes, split_axis=1, concat_axis=2, tiled=True)
    return found + meta.unbox(bias)[:, None]


def is_split(x: Any) -> bool:
    """Whether it is a `Split`."""
    return isinstance(x, Split)


def _is_place(x: Any) -> bool:
    return isinstance(x, Place)


Reads = Callable[[dict[str, Any]], dict[str, Any]]


def make_reader(
    trainer: Trainer, mesh: Mesh | None
) -> Callable[[TrainState], tuple[Reads, tuple[Any, Any]]]:
    """Builds what brings the parameters of a state to the networks that run on a mesh.

    Returns:
      `state -> (reads, averaged)`: `reads` turns parameters, of which gradients are taken, into
      those that the loss is given; `averaged` are the model's and the terms'. With one device, no
      mesh, or without `config.mesh.split_update` all are as they are.
    """
    config = trainer.config
    if mesh is None or sharding.batch_shards(mesh) == 1 or not config.mesh.split_update:
        return lambda state: (lambda params: params, (state.ema_params, state.ema_terms))
    if mesh.shape["tensor"] > 1:  # XLA gathers, and splits the layers along `tensor`
        whole, constrain = unsplit_shardings(trainer, mesh), jax.lax.with_sharding_constraint
        return lambda state: (
            lambda params: constrain(params, whole.params),
            (constrain(state.ema_params, whole.ema_params), state.ema_terms),
        )
    shapes = abstract_train_state(trainer, mesh)
    reduce_dtype = config.mesh.reduce_dtype
    layout = make_layout(
        shapes.ema_params | {"terms": shapes.params["terms"]},
        trainer.model.param_dtypes(_apart(shapes.ema_params)[0]),
        None if reduce_dtype == "model" else jnp.dtype(reduce_dtype),
        in_place=trainer.model.takes_modulations and trainer.objective.groups is None,
    )

    def read(state: TrainState) -> tuple[Reads, tuple[Any, Any]]:
        copy = gather(_apart(state.params["model"])[0], layout)

        def reads(params: dict[str, Any]) -> dict[str, Any]:
            shares, source = _apart(params["model"])
            small = source | {"terms": params["terms"]}  # their own copies
            model = join(copy | small, shares | small, layout)
            return params | {"terms": model.pop("terms"), "model": model}

        averaged, source = _apart(state.ema_params)
        model = join(gather(averaged, layout), None, layout) | source
        return reads, (model, state.ema_terms)

    return read


def _apart(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of the networks, and those of the learned source, which are not gathered."""
    source = {"source": params["source"]} if "source" in params else {}
    return {name: tree for name, tree in params.items() if name != "source"}, source
