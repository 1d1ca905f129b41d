import collections
import contextlib
import dataclasses
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import corrupt_checkpoint
from repulsor_jax.checkpoints.checkpointer import (
    Checkpointer,
    CheckpointError,
    DamagedCheckpointError,
)
from repulsor_jax.method import memory_bank, registry
from repulsor_jax.models.build import build_model
from repulsor_jax.optimizer import build_optimizer
from repulsor_jax.train_state import abstract_train_state, create_train_state
from tests.oracles import tiny


def parts(c):
    return c, build_model(c.model), registry.build(c), build_optimizer(c)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of step 2 made on 8 devices, with a bfloat16 bank of two batches."""
    c = tiny.config(regularizer__bank_dtype="bfloat16")
    state, rng = create_train_state(tiny.trainer(c), tiny.mesh(2, 4)), np.random.default_rng(0)
    bank = state.bank
    for _ in range(2):
        bank = memory_bank.enqueue(bank, jnp.asarray(rng.normal(size=(tiny.BATCH, tiny.DIM))))

    def filled(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        return leaf

    values = jax.tree.map(filled, state).replace(bank=bank, step=jnp.int32(2))
    state = jax.device_put(values, jax.tree.map(lambda leaf: leaf.sharding, state))
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(2, state, {"next_index": 2}, {"batch_size": tiny.BATCH}, {"shift": [0.5]})
    return c, folder, jax.device_get(tiny.raw(state))


@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 1, 1), (1, 2, 2)], ids=str)
def test_comes_back_exactly_on_any_mesh(saved, shape):
    c, folder, expected = saved
    abstract = abstract_train_state(tiny.trainer(c), tiny.mesh(*shape))
    with Checkpointer(folder) as checkpointer:
        state, data_state, notes = checkpointer.restore(abstract, tiny.BATCH)
    assert data_state == {"next_index": 2}
    assert notes == []
    assert state.bank.features.dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tiny.raw(state)), expected)


@pytest.mark.parametrize(
    ("batch_size", "slots", "filled", "mesh", "notes"),
    [
        # 32 rows are in the bank.
        (8, 5, 4, (2, 4, 1), ["to 5 slots of 8 in", "of 8, from sample 32 on"]),
        (24, 4, 1, (2, 1, 1), ["to 4 slots of 24 in", "sample 24 on; 8 are read"]),
        (24, 1, 1, (3, 1, 1), ["to 1 slots of 24 in", "sample 24 on"]),  # 3 divides not d = 8
        (
            16,
            1,
            1,
            (1, 1, 1),
            ["3 slots of 16 in bfloat16 re-slotted to 1 slots of 16"],
        ),
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
    abstract = abstract_train_state(tiny.trainer(c), tiny.mesh(*mesh))
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
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), expected.params)


def test_inference_restores_ema_alone_and_needs_no_regulariser(saved):
    """Invariant 5: the tree that inference asks for is that of a model trained without one."""
    _, folder, expected = saved
    without = tiny.config(regularizer__name="none")
    abstract = abstract_train_state(tiny.trainer(without), tiny.mesh())
    with Checkpointer(folder) as checkpointer:
        params, step = checkpointer.restore_ema(abstract.ema_params)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected.ema_params)
    fresh = create_train_state(tiny.trainer(without), tiny.mesh())
    assert jax.tree.structure(params) == jax.tree.structure(fresh.params["model"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model.hidden_size": 64}, "has shape.*expected"),
        ({"model.depth": 2}, "block_1.*is missing"),
        ({"regularizer.name": "none"}, "also holds"),
        ({"regularizer.projection_dim": 4}, "has shape"),
    ],
    ids=str,
)
def test_another_configuration_is_refused_by_name(saved, overrides, expected):
    _, folder, _ = saved
    abstract = abstract_train_state(tiny.trainer(tiny.config(**overrides)), tiny.mesh())
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
    state = create_train_state(tiny.trainer(c), tiny.mesh())
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
        pytest.raises(CheckpointError, match=r"copy/2: latents cannot be read.*mode=verify"),
    ):
        checkpointer.records(2)
    with pytest.raises(CheckpointError, match="nowhere is not there: train first"):
        Checkpointer(tmp_path / "nowhere", read_only=True)
    assert not (tmp_path / "nowhere").exists()


def test_another_dtype_of_the_bank_is_cast_and_any_other_refused(saved):
    _, folder, expected = saved
    abstract = abstract_train_state(tiny.trainer(tiny.config()), tiny.mesh(2, 4))
    with Checkpointer(folder) as checkpointer:
        state, _, notes = checkpointer.restore(abstract, tiny.BATCH)
        assert notes == ["bank: 3 slots of 16 in bfloat16 re-slotted to 3 slots of 16 in float32"]
        assert state.bank.features.dtype == jnp.float32
        np.testing.assert_array_equal(
            state.bank.features, expected.bank.features.astype(np.float32)
        )
        half = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
            abstract.ema_params,
        )
        with pytest.raises(CheckpointError, match="has dtype float32, expected bfloat16"):
            checkpointer.restore_ema(half)


def flip(path):
    """Changes one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def spoil(folder):
    """Changes bytes all over the arrays."""
    for path in array_files(folder):
        content = bytearray(path.read_bytes())
        content[::100] = bytes(byte ^ 0x10 for byte in content[::100])
        path.write_bytes(content)


def cut(folder):
    """Leaves the beginning of the arrays only."""
    for path in array_files(folder):
        os.truncate(path, path.stat().st_size // 10)


def array_files(folder):
    """Every file with arrays; which of them holds which is different in every checkpoint."""
    return [path for path in (folder / "state").rglob("d/*") if path.is_file()]


DAMAGE = {
    "arrays changed": (spoil, "came back otherwise|cannot be read"),
    "arrays gone": (lambda step: shutil.rmtree(step / "state"), "state cannot be read"),
    "arrays cut": (cut, "state cannot be read"),
    "record changed": (
        lambda step: (step / "data" / "metadata").write_text('{"next_index": 3}'),
        "its record 'data' was changed",
    ),
    "record cut": (lambda step: os.truncate(step / "config" / "metadata", 3), "config cannot be"),
    "manifest changed": (
        lambda step: rewrite(step / "manifest" / "metadata", '"step": 2', '"step": 3'),
        "its manifest was changed",
    ),
    "manifest gone": (lambda step: shutil.rmtree(step / "manifest"), "it has no manifest"),
}


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def saved_twice(saved, tmp_path_factory):
    """Steps 1 and 2 with different values."""
    c, _, _ = saved
    folder = tmp_path_factory.mktemp("twice")
    state = create_train_state(tiny.trainer(c), tiny.mesh())
    with Checkpointer(folder) as checkpointer:
        for step in (1, 2):
            state = state.replace(step=jnp.int32(step))
            checkpointer.save(step, state, {"next_index": step}, {"batch_size": tiny.BATCH}, {})
    return c, folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_used(
    saved_twice, tmp_path, damage
):
    c, folder = saved_twice
    damaging, message = DAMAGE[damage]
    shutil.copytree(folder, tmp_path / "copy")
    damaging(tmp_path / "copy" / "2")
    abstract = abstract_train_state(tiny.trainer(c), tiny.mesh())
    # One who only looks says so, and moves nothing; the position in the data is not looked at.
    with (
        Checkpointer(tmp_path / "copy", read_only=True, read_delay=0) as checkpointer,
        contextlib.nullcontext()
        if damage == "record changed"
        else pytest.raises(DamagedCheckpointError, match=rf"copy/2: .*({message}).*--mode=verify"),
    ):
        checkpointer.records()
        checkpointer.restore_ema(abstract.ema_params)
    with Checkpointer(tmp_path / "copy", read_delay=0) as checkpointer:
        assert checkpointer.steps() == [1, 2]
        with pytest.raises(DamagedCheckpointError, match=message):
            checkpointer.restore(abstract, tiny.BATCH, step=2)
        state, data_state, (note,) = checkpointer.restore(abstract, tiny.BATCH)
        assert (int(state.step), data_state) == (1, {"next_index": 1})
        assert re.search(f"DAMAGED: .*copy/2: .*({message}).*going on from step 1", note)
        assert checkpointer.steps() == [1]
        checkpointer.save(2, state, {}, {}, {})  # its place is free
    (moved,) = (tmp_path / "copy" / "damaged").iterdir()
    assert moved.name.startswith("2-")


def test_a_state_that_is_not_finite_is_none_to_go_on_from(saved, tmp_path):
    """As an older version saved it: training takes the one before, sampling reads its EMA."""
    c, folder, _ = saved
    shutil.copytree(folder, tmp_path / "run")
    abstract = abstract_train_state(tiny.trainer(c), tiny.mesh())
    with Checkpointer(tmp_path / "run") as checkpointer:
        state, *_ = checkpointer.restore(abstract, tiny.BATCH)
        features = state.bank.features.at[0, 3, 5].set(jnp.nan)
        bank = dataclasses.replace(state.bank, features=features)
        records = ({"next_index": 3}, {"batch_size": tiny.BATCH}, {"shift": [0.5]})
        checkpointer.save(3, state.replace(bank=bank), *records)
        assert checkpointer.latest_step() == 3
        assert checkpointer.restore_ema(abstract.ema_params)[1] == 3
        state, data_state, (note,) = checkpointer.restore(abstract, tiny.BATCH)
    assert re.search(r"3: not finite: bank/features \(1 number\)\. Moved .* from step 2", note)
    assert (int(state.step), data_state) == (2, {"next_index": 2})


def test_nothing_is_moved_where_no_whole_checkpoint_is_left(saved_twice, tmp_path):
    c, folder = saved_twice
    shutil.copytree(folder, tmp_path / "copy")
    for step in ("1", "2"):
        flip(tmp_path / "copy" / step / "manifest" / "metadata")
    abstract = abstract_train_state(tiny.trainer(c), tiny.mesh())
    with (
        Checkpointer(tmp_path / "copy", read_delay=0) as checkpointer,
        pytest.raises(DamagedCheckpointError, match="copy/2.*copy/1.*nothing was moved"),
    ):
        checkpointer.restore(abstract, tiny.BATCH)
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["1", "2"]


def test_a_checkpoint_that_does_not_fit_is_not_damaged(saved_twice, tmp_path):
    _, folder = saved_twice
    shutil.copytree(folder, tmp_path / "copy")
    other = abstract_train_state(tiny.trainer(tiny.config(model__hidden_size=64)), tiny.mesh())
    with (
        Checkpointer(tmp_path / "copy") as checkpointer,
        pytest.raises(CheckpointError, match="copy/2 does not fit this configuration") as error,
    ):
        checkpointer.restore(other, tiny.BATCH)
    assert not isinstance(error.value, DamagedCheckpointError)
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["1", "2"]


def test_the_saved_records_are_checked_before_arrays_are_read(saved_twice, tmp_path):
    c, folder = saved_twice
    abstract = abstract_train_state(tiny.trainer(c), tiny.mesh())

    def refuse(config, latents):
        assert (config, latents) == ({"batch_size": tiny.BATCH}, {})
        raise ValueError("another data set")

    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "2" / "state")
    with (
        Checkpointer(tmp_path / "copy") as checkpointer,
        pytest.raises(ValueError, match="another data set"),
    ):
        checkpointer.restore(abstract, tiny.BATCH, check=refuse)
    with Checkpointer(folder) as checkpointer:
        _, _, notes = checkpointer.restore(abstract, tiny.BATCH, check=lambda *unused: ["noted"])
    assert notes == ["noted"]


def test_random_corruptions_are_detected_or_harmless(tmp_path):
    """A part of `python -m benchmarks.corrupt_checkpoint`."""
    config = corrupt_checkpoint.small_config()
    states = corrupt_checkpoint.save_two(tmp_path / "checkpoints", config)
    abstract = corrupt_checkpoint.abstract_state(config)
    rounds = corrupt_checkpoint.damages(tmp_path / "checkpoints", np.random.default_rng(0))
    verdicts = collections.Counter()
    for _, (what, copy) in zip(range(12), rounds, strict=False):
        verdict, said = corrupt_checkpoint.outcome(copy, abstract, states)
        assert verdict != "silent", (what, said)
        verdicts[verdict] += 1
    assert verdicts["detected"] > 2
