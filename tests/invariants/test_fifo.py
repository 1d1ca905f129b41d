"""Invariant 3: the bank holds the last S batches in order, and row b is sample b."""

import jax
import numpy as np

from repulsor_jax.loss import draw_inputs
from repulsor_jax.method.head import ProjectionHead
from tests.oracles import tiny


def test_the_bank_holds_the_last_batches_row_by_row():
    c = tiny.config()
    step = tiny.build(c, tiny.mesh(data=4, fsdp=2))
    state, expected = step.state, []

    @jax.jit
    def features(params, key, batch):
        inputs = draw_inputs(key, batch, tiny.trainer(c).objective, tiny.FORMAT)
        t = inputs.t[:, None, None, None]
        _, (tokens,) = step.model.apply(
            {"params": params["model"]},
            t * inputs.data + (1 - t) * inputs.noise,
            inputs.t,
            inputs.labels,
            taps=(c.model.depth // 4,),
        )
        head = ProjectionHead(tiny.DIM, c.model.hidden_size)
        return head.apply({"params": params["terms"]["repulsor"]["head"]}, tokens.mean(1))

    for number, batch in enumerate(tiny.batches(2 * tiny.SLOTS + 1)):
        key = jax.random.fold_in(state.rng, number)
        expected.append(features(jax.device_get(state.params), key, batch))
        state, _ = step._replace(state=state).run([batch])

        cursor, filled = int(state.bank.cursor), int(state.bank.filled)
        assert filled == min(number + 1, tiny.SLOTS)
        newest_first = [(cursor - 1 - k) % tiny.SLOTS for k in range(filled)]
        kept = np.asarray(state.bank.features)[newest_first]
        np.testing.assert_allclose(kept, expected[: -filled - 1 : -1], atol=1e-5)
