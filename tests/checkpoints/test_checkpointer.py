"""Saving and restoring: exact on any mesh, translated to another bank, or refused by name."""

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
from tests.oracles import tiny
from tests.oracles.checkpoints import abstract, cut, flip, spoil, train_state

BATCH = 16


def records(step):
    return {"next_index": step}, {"batch_size": BATCH}, {"shift": [0.5]}


def assert_equal(state, step):
    """All but the bank, which may have another layout."""
    found, expected = (
        jax.device_get(tiny.raw(each.replace(bank=None)))
        for each in (state, train_state(step, tiny.mesh()))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of steps 1 and 2, made on 8 devices."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpointer(folder) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, train_state(step, tiny.mesh(2, 4)), *records(step))
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of them to be damaged."""
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2)], ids=str)
def test_comes_back_exactly_on_any_mesh(saved, shape):
    wanted = abstract(train_state(0, tiny.mesh(*shape)))
    with Checkpointer(saved) as checkpointer:
        state, data_state, notes = checkpointer.restore(wanted, BATCH)
    assert (data_state, notes) == ({"next_index": 2}, [])
    assert abstract(state) == wanted
    assert_equal(state, 2)
    np.testing.assert_array_equal(state.bank.features, train_state(2, tiny.mesh()).bank.features)


@pytest.mark.parametrize(
    ("batch", "slots", "filled", "mesh", "notes"),
    [
        # 32 rows are in the bank.
        (8, 5, 4, (2, 4, 1), ["to 5 slots of 8 in bfloat16", "of 8, from sample 32 on"]),
        # 3 does not divide the 8 features of a row.
        (24, 4, 1, (3, 1, 1), ["to 4 slots of 24 in", "sample 24 on; 8 are read again"]),
    ],
)
def test_another_batch_size_or_bank_keeps_the_newest_rows(saved, batch, slots, filled, mesh, notes):
    wanted = abstract(train_state(0, tiny.mesh(*mesh), slots=slots, batch=batch))
    with Checkpointer(saved) as checkpointer:
        state, data_state, said = checkpointer.restore(wanted, batch)
    assert len(said) == len(notes)
    assert all(note in line for note, line in zip(notes, said, strict=True))
    assert data_state == {"next_index": 32 // batch}
    assert abstract(state) == wanted
    assert (int(state.bank.filled), int(state.bank.cursor)) == (filled, filled % slots)
    rows = np.asarray(train_state(2, tiny.mesh()).bank.features).reshape(-1, 8)[:32]
    found = np.asarray(state.bank.features)
    np.testing.assert_array_equal(found[:filled].reshape(-1, 8), rows[-filled * batch :])
    assert not found[filled:].any()
    assert_equal(state, 2)


def test_another_dtype_of_the_bank_is_cast(saved):
    wanted = abstract(train_state(0, tiny.mesh(2, 4), bank_dtype=jnp.float32))
    with Checkpointer(saved) as checkpointer:
        state, _, (note,) = checkpointer.restore(wanted, BATCH)
    assert note == "bank: 3 slots of 16 in bfloat16 re-slotted to 3 slots of 16 in float32"
    expected = train_state(2, tiny.mesh()).bank.features
    np.testing.assert_array_equal(state.bank.features, expected.astype(jnp.float32))


def test_inference_restores_ema_alone_and_needs_no_regulariser(saved):
    wanted = abstract(train_state(0, tiny.mesh())).ema_params
    with Checkpointer(saved) as checkpointer:
        params, step = checkpointer.restore_ema(wanted)
    assert step == 2
    expected = train_state(2, tiny.mesh()).ema_params
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def without_head(wanted):
    return wanted.replace(params={"model": wanted.params["model"], "terms": {}}, bank=None)


def with_a_block(wanted):
    return wanted.replace(ema_params=wanted.ema_params | {"more": wanted.ema_params["bias"]})


@pytest.mark.parametrize(
    ("change", "width", "expected"),
    [
        (lambda x: x, 12, r"ema_params/bias has shape \(8,\), expected \(12,\)|params/model/bias"),
        (with_a_block, 8, "ema_params/more is missing"),
        (without_head, 8, "it also holds bank/cursor"),
    ],
)
def test_another_configuration_is_refused_by_name_and_not_moved(copy, change, width, expected):
    wanted = change(abstract(train_state(0, tiny.mesh(), width=width)))
    with Checkpointer(copy) as checkpointer, pytest.raises(CheckpointError) as error:
        checkpointer.restore(wanted, BATCH)
    assert re.search(f"copy/2 does not fit this configuration: ({expected})", str(error.value))
    assert error.type is CheckpointError
    assert sorted(p.name for p in copy.iterdir()) == ["1", "2"]


def test_another_dtype_of_parameters_is_refused(saved):
    wanted = abstract(train_state(0, tiny.mesh())).ema_params
    half = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), wanted)
    with (
        Checkpointer(saved) as checkpointer,
        pytest.raises(CheckpointError, match="has dtype float32, expected bfloat16"),
    ):
        checkpointer.restore_ema(half)


def test_an_error_of_one_process_does_not_wait_for_the_others(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, train_state(1, tiny.mesh()), *records(1))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpointer._storage, "outcome", lambda: pytest.fail("a collective"))
    with pytest.raises(ValueError, match="mine"), checkpointer:
        raise ValueError("mine")


def test_missing_checkpoints_are_named(saved, tmp_path):
    with (
        Checkpointer(tmp_path / "nowhere", read_only=True) as checkpointer,
        pytest.raises(CheckpointError, match="nowhere holds no checkpoint: train first"),
    ):
        checkpointer.restore_ema({})
    assert not (tmp_path / "nowhere").exists()
    with Checkpointer(saved) as checkpointer:
        assert checkpointer.latest_step() == 2
        with pytest.raises(CheckpointError, match=r"no step 9; it holds \[1, 2\]"):
            checkpointer.restore_ema({}, step=9)


def test_records_are_read_without_arrays_and_checked_before_them(copy):
    def refuse(config, latents):
        assert (config, latents) == records(2)[1:]
        raise ValueError("another data set")

    wanted = abstract(train_state(0, tiny.mesh()))
    with Checkpointer(copy) as checkpointer:
        _, _, notes = checkpointer.restore(wanted, BATCH, check=lambda *unused: ["noted"])
        assert notes == ["noted"]
        shutil.rmtree(copy / "2" / "state")
        assert checkpointer.records() == (*records(2)[1:], 2)
        with pytest.raises(ValueError, match="another data set"):
            checkpointer.restore(wanted, BATCH, check=refuse)


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGE = {
    "arrays changed": (spoil, "was changed|cannot be read"),
    "arrays gone": (lambda step: shutil.rmtree(step / "state"), "state cannot be read"),
    "arrays cut": (cut, "state cannot be read"),
    "orbax's metadata gone": (
        lambda step: (step / "state" / "array_metadatas" / "process_0").unlink(),
        "its array 'rng' was changed",
    ),
    "record changed": (
        lambda step: (step / "data" / "metadata").write_text('{"next_index": 3}'),
        "its record 'data' was changed",
    ),
    "record cut": (lambda step: os.truncate(step / "config" / "metadata", 3), "config cannot be"),
    "manifest changed": (
        lambda step: rewrite(step / "manifest" / "metadata", '"step": 2', '"step": 3'),
        "its manifest was changed",
    ),
    "of another step": (
        lambda step: shutil.copytree(step.parent / "1", step, dirs_exist_ok=True),
        "it was saved as step 1",
    ),
    "manifest gone": (lambda step: shutil.rmtree(step / "manifest"), "manifest cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_used(copy, damage):
    damaging, message = DAMAGE[damage]
    damaging(copy / "2")
    wanted = abstract(train_state(0, tiny.mesh()))
    # Sampling says so, and moves nothing; position in the data and random key are not read.
    with (
        Checkpointer(copy, read_only=True) as checkpointer,
        contextlib.nullcontext()
        if damage in ("record changed", "orbax's metadata gone")
        else pytest.raises(DamagedCheckpointError, match=rf"copy/2: .*({message}).*--mode=verify"),
    ):
        checkpointer.records()
        checkpointer.restore_ema(wanted.ema_params)
    with Checkpointer(copy) as checkpointer:
        assert checkpointer.steps() == [1, 2]
        state, data_state, (note,) = checkpointer.restore(wanted, BATCH)
        assert (int(state.step), data_state) == (1, {"next_index": 1})
        assert re.search(f"DAMAGED: .*copy/2: .*({message}).*going on from step 1", note)
        assert checkpointer.steps() == [1]
        checkpointer.save(2, state, {}, {}, {})  # its place is free
    (moved,) = (copy / "damaged").iterdir()
    assert moved.name.startswith("2-")


def test_no_training_goes_on_from_a_state_that_is_not_finite(copy):
    """As an older version saved it: training takes the one before, sampling reads its EMA."""
    state = train_state(3, tiny.mesh())
    features = state.bank.features.at[0, 3, 5].set(jnp.nan)
    state = state.replace(bank=dataclasses.replace(state.bank, features=features))
    with Checkpointer(copy) as checkpointer:
        checkpointer.save(3, state, *records(3))
        assert checkpointer.latest_step() == 3
        assert checkpointer.restore_ema(abstract(state).ema_params)[1] == 3
        state, data_state, (note,) = checkpointer.restore(abstract(state), BATCH)
    assert re.search(r"3: not finite: bank/features \(1 number\)\. Moved .* from step 2", note)
    assert (int(state.step), data_state) == (2, {"next_index": 2})


def test_nothing_is_moved_where_no_whole_checkpoint_is_left(copy):
    for step in ("1", "2"):
        flip(copy / step / "manifest" / "metadata")
    with (
        Checkpointer(copy) as checkpointer,
        pytest.raises(DamagedCheckpointError, match="copy/2.*copy/1.*nothing was moved"),
    ):
        checkpointer.restore(abstract(train_state(0, tiny.mesh())), BATCH)
    assert sorted(p.name for p in copy.iterdir()) == ["1", "2"]


def test_random_corruptions_are_detected_or_harmless(tmp_path):
    """A part of `python -m benchmarks.corrupt_checkpoint`."""
    states = {step: train_state(step, tiny.mesh()) for step in (1, 2)}
    corrupt_checkpoint.save(tmp_path / "checkpoints", states)
    rounds = corrupt_checkpoint.damages(tmp_path / "checkpoints", np.random.default_rng(0))
    verdicts = collections.Counter()
    for _, (what, folder) in zip(range(12), rounds, strict=False):
        verdict, said = corrupt_checkpoint.outcome(folder, abstract(states[1]), states)
        assert verdict != "silent", (what, said)
        verdicts[verdict] += 1
    assert verdicts["detected"] > 2
