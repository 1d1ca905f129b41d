"""What is chosen by platform when the model is built."""

from types import SimpleNamespace

import pytest

from repulsor_jax.models.build import build_model
from tests.oracles import tiny

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
    ],
)
def test_attention_by_device(device, options, expected):
    assert build_model(tiny.config(**options).model, device).attention == expected
