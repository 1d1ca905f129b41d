"""The names that other trainers import."""

import subprocess
import sys

import pytest

import repulsor_jax as rj
from repulsor_jax import memory_bank, repulsion
from repulsor_jax.method import dispersive, head
from repulsor_jax.method import memory_bank as bank_lib
from repulsor_jax.method import repulsion as repulsion_lib


def test_each_name_is_the_one_of_its_module():
    assert rj.create_bank is bank_lib.create is memory_bank.create
    assert rj.bank_shardings is bank_lib.shardings
    assert rj.enqueue is bank_lib.enqueue
    assert rj.MemoryBank is bank_lib.MemoryBank
    assert rj.repulsion_loss is repulsion_lib.repulsion_loss is repulsion.repulsion_loss
    assert rj.dispersive_loss is dispersive.dispersive_loss
    assert rj.ProjectionHead is head.ProjectionHead
    assert {"create_bank", "enqueue", "repulsion_loss"} < set(dir(rj))
    with pytest.raises(AttributeError, match="no attribute 'attraction'"):
        _ = rj.attraction


def test_importing_costs_no_jax_and_the_loss_no_flax():
    code = (
        "import sys, repulsor_jax as rj; print('jax' in sys.modules); rj.create_bank; "
        "rj.repulsion_loss, rj.enqueue, rj.dispersive_loss; print('flax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
