"""Checkpoints: the state, the position in the data and the configuration, saved together.

Layout: `<directory>/<step>/{state,data,config,latents}`. Saving is asynchronous and atomic: a
checkpoint that was interrupted is never listed. Arrays come back exactly, on any mesh and any
number of processes. A run may go on with another batch size or number of bank rows: the position in
the data and the bank are then translated.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from repulsor_jax import memory_bank, sharding
from repulsor_jax.data.pipeline import rescale_position
from repulsor_jax.memory_bank import MemoryBank
from repulsor_jax.train_state import TrainState


class CheckpointError(ValueError):
    """A checkpoint that is not there, or does not fit the configuration; says which."""


class Checkpointer:
    """Saves and restores the checkpoints of one run; a context manager that waits on leaving."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 3,
        keep_every: int = 0,
        read_only: bool = False,
    ) -> None:
        """Opens, and creates where absent, a directory of checkpoints.

        Args:
          directory: the folder.
          read_only: neither create nor delete anything, as beside a run that is training.
          keep_last: how many of the newest checkpoints to keep.
          keep_every: keep those whose step is a multiple of this as well; 0 keeps no more.

        Raises:
          CheckpointError: the folder is not there, where it is not to be created.
        """
        self.directory = pathlib.Path(directory).absolute()
        if read_only and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is not there: train first, or check --workdir")
        with _reading(self.directory):  # the metadata of every step
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=None if read_only else keep_last,
                    keep_period=keep_every or None,
                    create=not read_only,
                ),
                item_handlers={
                    "state": ocp.PyTreeCheckpointHandler(),
                    "data": ocp.JsonCheckpointHandler(),
                    "config": ocp.JsonCheckpointHandler(),
                    "latents": ocp.JsonCheckpointHandler(),
                },
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def wait(self) -> None:
        """Waits until what is being saved is saved."""
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints that are there now, ascending."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        data_state: Mapping[str, Any],
        config: Mapping[str, Any],
        latents: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        """Starts saving; the state may be donated to the next step right after.

        Args:
          step: the state's step; saved already is no error, and does nothing unless `overwrite`.
          state: the training state.
          data_state: the data iterator's `get_state()`, the same on every process.
          config: the configuration, for the record.
          latents: what sampling needs to know of the data, `experiment.latents_record`.
          overwrite: replace a checkpoint of this step: the state is the same, the position in the
            data has moved on.
        """
        if step in self._manager.all_steps():
            if not overwrite:
                return
            self._manager.wait_until_finished()
            self._manager.delete(step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                data=ocp.args.JsonSave(dict(data_state)),
                config=ocp.args.JsonSave(dict(config)),
                latents=ocp.args.JsonSave(dict(latents)),
            ),
        )

    def restore(
        self, abstract_state: TrainState, batch_size: int, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any], list[str]]:
        """Restores a state (the newest by default) onto the shardings of `abstract_state`.

        Where the run had another batch size or number of bank rows, its bank is laid out anew and
        its position in the data stays that of the same sample: `memory_bank.reslot` and
        `pipeline.rescale_position` say what is kept.

        Args:
          abstract_state: shapes with shardings, from `abstract_train_state`.
          batch_size: of the global batch from now on.
          step: which checkpoint.

        Returns:
          The state, the data iterator's state, and a line for each thing that was translated.

        Raises:
          CheckpointError: no such checkpoint, or it holds another model, head or optimizer.
        """
        step = self.resolve(step)
        with _reading(f"{self.directory}/{step}"):
            wanted = self._with_saved_bank(step, abstract_state)
            self._check_shapes(step, wanted)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=_restore_args(wanted),
                    data=ocp.args.JsonRestore(),
                    config=ocp.args.JsonRestore(),
                ),
            )
            saved_size = restored["config"].get("batch_size", batch_size)
            position = restored["data"]["next_index"]
            if (
                type(saved_size) is not int
                or type(position) is not int
                or min(saved_size - 1, position) < 0
            ):
                raise ValueError(f"found batch_size {saved_size!r}, next_index {position!r}")
        state, data_state, notes = restored["state"], restored["data"], []
        if wanted is not abstract_state:
            bank, note = _reslotted(state.bank, abstract_state.bank)
            state = state.replace(bank=bank)
            notes.append(note)
        if saved_size != batch_size:
            data_state, repeated = rescale_position(data_state, saved_size, batch_size)
            position = data_state["next_index"] * batch_size
            notes.append(
                f"data: batches of {saved_size:,} are now of {batch_size:,}, from sample "
                f"{position:,} on" + (f"; {repeated:,} are read again" if repeated else "")
            )
        return state, data_state, notes

    def restore_ema(self, abstract_params: Any, step: int | None = None) -> tuple[Any, int]:
        """Restores the EMA parameters alone: no head, no bank, no optimizer state is read.

        Returns:
          The parameters, and the step that they are of.

        Raises:
          CheckpointError: no such checkpoint, or it holds another model.
        """
        step = self.resolve(step)
        wanted = {"ema_params": abstract_params}
        with _reading(f"{self.directory}/{step}"):
            self._check_shapes(step, wanted)
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=_restore_args(wanted, partial_restore=True))
            )
        return restored["state"]["ema_params"], step

    def records(self, step: int | None = None) -> tuple[dict[str, Any], dict[str, Any], int]:
        """Reads the run's configuration and what it says of its latents, and no array.

        Returns:
          The configuration, the `experiment.latents_record`, and the step.

        Raises:
          CheckpointError: no such checkpoint, or one without these records.
        """
        step = self.resolve(step)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    config=ocp.args.JsonRestore(), latents=ocp.args.JsonRestore()
                ),
            )
        except (FileNotFoundError, KeyError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self.directory}/{step}: found no record of configuration and latents ({error}); "
                "it was saved by an older version, or is damaged"
            ) from error
        return restored["config"], restored["latents"], step

    def resolve(self, step: int | None) -> int:
        """Returns the step, or the newest for None; raises CheckpointError if it is not there."""
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise CheckpointError(f"{self.directory} holds no checkpoint: train first")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} holds no step {step}; it holds {steps}")
        return steps[-1] if step is None else step

    def _with_saved_bank(self, step: int, wanted: TrainState) -> TrainState:
        """Asks for the bank in the shape that it was saved in, where only its slots differ.

        It is then split over the features' last axis, which any change of slots leaves alone.
        """
        saved = _shapes(self._manager.item_metadata(step)["state"].tree).get("bank/features")
        if wanted.bank is None or saved is None:
            return wanted
        features: Any = wanted.bank.features
        if saved == features.shape or saved[2] != features.shape[2]:
            return wanted
        mesh = features.sharding.mesh
        by_feature = NamedSharding(mesh, PartitionSpec(None, None, sharding.BATCH_AXES))
        if saved[2] % sharding.batch_shards(mesh):
            by_feature = sharding.replicated(mesh)
        features = jax.ShapeDtypeStruct(saved, features.dtype, sharding=by_feature)
        return wanted.replace(bank=dataclasses.replace(wanted.bank, features=features))

    def _check_shapes(self, step: int, wanted: Any) -> None:
        """Compares names and shapes with the saved ones, before anything is read."""
        saved = _shapes(self._manager.item_metadata(step)["state"].tree)
        expected = _shapes(wanted)
        if isinstance(wanted, TrainState):
            unexpected = sorted(set(saved) - set(expected))
        else:
            unexpected = sorted(k for k in set(saved) - set(expected) if k.startswith("ema_params"))
        where = f"{self.directory}/{step} does not fit this configuration"
        for name, shape in expected.items():
            if name not in saved:
                raise CheckpointError(f"{where}: {name} is missing; use the run's own config")
            if saved[name] != shape:
                raise CheckpointError(
                    f"{where}: {name} has shape {saved[name]}, expected {shape}; "
                    "use the run's own config"
                )
        if unexpected:
            raise CheckpointError(
                f"{where}: it also holds {unexpected[0]}; use the run's own config"
            )


def _reslotted(bank: MemoryBank, wanted: Any) -> tuple[MemoryBank, str]:
    """The bank in the shape and shards of `wanted`, and a line that says so."""
    old_slots, old_batch, _ = bank.features.shape
    num_slots, batch_size, _ = wanted.features.shape
    shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    reslot = jax.jit(memory_bank.reslot, static_argnums=(1, 2), out_shardings=shardings)
    note = (
        f"bank: {old_slots:,} slots of {old_batch:,} re-slotted to {num_slots:,} of {batch_size:,}"
    )
    return reslot(bank, num_slots, batch_size), note


@contextlib.contextmanager
def _reading(where: str | os.PathLike[str]) -> Iterator[None]:
    """Says of what orbax stumbles over in a damaged or hostile file where that file is."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        raise CheckpointError(
            f"{where}: cannot be read, it is damaged ({reason}): restore it from a copy, or delete "
            "the step"
        ) from error


def _restore_args(wanted: Any, **kwargs: Any) -> ocp.args.PyTreeRestore:
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    return ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, **kwargs)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every array; a random key counts as its data, as orbax stores it."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not hasattr(leaf, "shape"):
            continue
        if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        shapes[jax.tree_util.keystr(path, simple=True, separator="/")] = tuple(leaf.shape)
    return shapes
