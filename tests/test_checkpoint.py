import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import regularizers
from repulsor_jax.checkpoint import Checkpointer, CheckpointError
from repulsor_jax.train_state import (
    abstract_train_state,
    build_model,
    build_optimizer,
    create_train_state,
)
from tests import tiny


def parts(c):
    return c, build_model(c.model), regularizers.build(c), build_optimizer(c)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of step 2 made on 8 devices, with a bfloat16 bank."""
    c = tiny.config(regularizer__bank_dtype="bfloat16")
    state, _ = tiny.build(c, tiny.mesh(2, 4)).run(tiny.batches(2))
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(2, state, {"next_index": 2}, {"batch_size": tiny.BATCH}, {"shift": [0.5]})
    return c, folder, jax.device_get(tiny.raw(state))


@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 1, 1), (1, 2, 2)], ids=str)
def test_comes_back_exactly_on_any_mesh(saved, shape):
    c, folder, expected = saved
    abstract, shardings = abstract_train_state(*parts(c), tiny.mesh(*shape))
    with Checkpointer(folder) as checkpointer:
        state, data_state, notes = checkpointer.restore(abstract, tiny.BATCH)
    assert data_state == {"next_index": 2}
    assert notes == []
    assert state.bank.features.dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tiny.raw(state)), expected)


@pytest.mark.parametrize(
    ("batch_size", "slots", "filled", "mesh", "notes"),
    [
        # 32 rows are in the bank.
        (8, 5, 4, (2, 4, 1), ["3 slots of 16 re-slotted to 5 of 8", "of 8, from sample 32 on"]),
        (24, 4, 1, (2, 1, 1), ["3 slots of 16 re-slotted to 4 of 24", "sample 24 on; 8 are read"]),
        (24, 1, 1, (3, 1, 1), ["re-slotted to 1 of 24", "sample 24 on"]),  # 3 divides not d = 8
        (16, 1, 1, (1, 1, 1), ["3 slots of 16 re-slotted to 1 of 16"]),
    ],
)
def test_another_batch_size_or_bank_keeps_the_newest_rows(
    saved, batch_size, slots, filled, mesh, notes
):
    _, folder, expected = saved
    c = tiny.config(
        batch_size=batch_size,
        regularizer__bank_rows=slots * batch_size,
        regularizer__bank_dtype="bfloat16",
    )
    abstract, shardings = abstract_train_state(*parts(c), tiny.mesh(*mesh))
    with Checkpointer(folder) as checkpointer:
        state, data_state, said = checkpointer.restore(abstract, batch_size)
    assert len(said) == len(notes)
    assert all(note in line for note, line in zip(notes, said, strict=True))
    assert data_state == {"next_index": 32 // batch_size}
    assert (int(state.bank.filled), int(state.bank.cursor)) == (filled, filled % slots)
    rows = expected.bank.features[:2].reshape(32, -1)
    found = np.asarray(state.bank.features)
    np.testing.assert_array_equal(
        found[:filled].reshape(-1, tiny.DIM), rows[-filled * batch_size :]
    )
    assert not found[filled:].any()
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), expected.params)


def test_inference_restores_ema_alone_and_needs_no_regulariser(saved):
    """Invariant 5: the tree that inference asks for is that of a model trained without one."""
    _, folder, expected = saved
    without = tiny.config(regularizer__name="none")
    abstract, _ = abstract_train_state(*parts(without), tiny.mesh())
    with Checkpointer(folder) as checkpointer:
        params, step = checkpointer.restore_ema(abstract.ema_params)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected.ema_params)
    fresh = create_train_state(*parts(without), tiny.mesh())
    assert jax.tree.structure(params) == jax.tree.structure(fresh.params["model"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model.hidden_size": 64}, "has shape.*expected"),
        ({"model.depth": 3}, "block_2.*is missing"),
        ({"regularizer.name": "none"}, "also holds"),
        ({"regularizer.projection_dim": 4}, "has shape"),
    ],
    ids=str,
)
def test_another_configuration_is_refused_by_name(saved, overrides, expected):
    _, folder, _ = saved
    abstract, _ = abstract_train_state(*parts(tiny.config(**overrides)), tiny.mesh())
    with Checkpointer(folder) as checkpointer, pytest.raises(CheckpointError, match=expected):
        checkpointer.restore(abstract, tiny.BATCH)


def test_missing_checkpoints_are_named(saved, tmp_path):
    _, folder, _ = saved
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(CheckpointError, match="train first"):
            checkpointer.restore_ema({})
    with (
        Checkpointer(folder) as checkpointer,
        pytest.raises(CheckpointError, match=r"no step 9; it holds \[2\]"),
    ):
        checkpointer.restore_ema({}, step=9)


def test_saving_a_step_twice_is_no_error(tmp_path):
    c = tiny.config()
    state = create_train_state(*parts(c), tiny.mesh())
    with Checkpointer(tmp_path) as checkpointer:
        for _ in range(2):
            checkpointer.save(0, state, {"next_index": 0}, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["0"]


def test_records_are_read_without_arrays_and_missed_by_name(saved, tmp_path):
    _, folder, _ = saved
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "2" / "state")
    with Checkpointer(tmp_path / "copy", read_only=True) as checkpointer:
        assert checkpointer.records() == ({"batch_size": tiny.BATCH}, {"shift": [0.5]}, 2)
    shutil.rmtree(tmp_path / "copy" / "2" / "latents")
    with (
        Checkpointer(tmp_path / "copy", read_only=True) as checkpointer,
        pytest.raises(CheckpointError, match=r"copy/2: found no record of .* latents"),
    ):
        checkpointer.records(2)
    with pytest.raises(CheckpointError, match="nowhere is not there: train first"):
        Checkpointer(tmp_path / "nowhere", read_only=True)
    assert not (tmp_path / "nowhere").exists()
