"""What is chosen by platform when the model is built."""

from types import SimpleNamespace

import pytest

from repulsor_jax.models.build import build_model
from tests.oracles import tiny

ODD = {  # of 49 tokens, not all of which see each other
    "model__latent_size": 14,
    "model__attention_separation": True,
    "model__dtype": "bfloat16",
    "flow__time_groups": 2,
    "terms": "sra",
}
WIDE = {"model__hidden_size": 144, "model__num_heads": 2}  # heads of 72, as XL's
HOPPER = SimpleNamespace(compute_capability="9.0")


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        (HOPPER, WIDE | {"model__dtype": "bfloat16"}, "cudnn"),
        (SimpleNamespace(compute_capability="7.5"), WIDE | {"model__dtype": "bfloat16"}, None),
        (SimpleNamespace(compute_capability="gfx90a"), WIDE | {"model__dtype": "bfloat16"}, None),
        (SimpleNamespace(), WIDE | {"model__dtype": "bfloat16"}, None),  # a TPU
        (None, WIDE | {"model__dtype": "bfloat16"}, None),
        (HOPPER, WIDE | {"model__dtype": "float32"}, None),
        (HOPPER, {"model__hidden_size": 152, "model__dtype": "bfloat16"}, None),  # heads of 76
        (HOPPER, WIDE | {"model__dtype": "bfloat16", "model__attention": "xla"}, "xla"),
        (HOPPER, WIDE | ODD, None),
        (HOPPER, WIDE | ODD | {"model__latent_size": 16}, "cudnn"),
    ],
)
def test_attention_by_device(device, options, expected):
    assert build_model(tiny.config(**options).model, device).attention == expected
