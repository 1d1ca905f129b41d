import numpy as np
import pytest

from repulsor_jax import config as config_lib
from repulsor_jax.replay import replay
from tests.oracles import tiny


@pytest.mark.parametrize("content", ["absent", "empty", "torn", "other", "no latents"])
def test_what_is_no_kept_batch_is_one_line_that_names_it(tmp_path, content):
    event = tmp_path / "step_00000003_batch_2.npz"
    if content == "no latents":
        np.savez(event, step=3, batch=2, records=np.arange(16))
    elif content == "torn":
        np.savez(event, step=3, batch=2, records=np.arange(16), latents=np.zeros((16, 8, 8, 1)))
        event.write_bytes(event.read_bytes()[:-40])
    elif content != "absent":
        event.write_text("" if content == "empty" else "no archive")
    with pytest.raises(config_lib.ConfigError, match="--event=.*found no kept batch"):
        replay(config_lib.parse(tiny.digits_dict()), tmp_path, event)
