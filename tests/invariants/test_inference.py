"""Invariant 5: inference knows nothing of training: EMA parameters of the model, and no more."""

import flax.linen as nn
import jax
import numpy as np

from repulsor_jax import config as config_lib
from repulsor_jax.inference import run
from repulsor_jax.models.build import build_model, init_model_params
from tests.oracles import tiny


def test_a_run_with_head_and_bank_is_sampled_by_a_program_that_has_neither(tmp_path):
    values = tiny.config_dict()  # with the bank
    params = tiny.random_params(config_lib.parse(values))
    tiny.save_run(tmp_path, values, {7: params})
    without = tiny.config(terms="none", sampling__cfg_scale=2.0)
    with run.open_checkpoints(without, tmp_path) as checkpointer:
        experiment = run.open_experiment(without, tmp_path, checkpointer, 7)
        found = run.restore_params(experiment, checkpointer, 7)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), params)
    # What is restored is the model, and nothing else of the training state.
    model = build_model(without.model)
    alone = jax.eval_shape(lambda key: nn.unbox(init_model_params(model, key)), jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(lambda x: x.shape, alone)
