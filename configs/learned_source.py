"""A source by class, learned with the model, in place of N(0, I): after CSFM and CAR-Flow.

    python -m repulsor_jax.main --config=configs/learned_source.py:digits --workdir=runs/source
    python -m repulsor_jax.main --config=configs/learned_source.py:xl_2 --workdir=runs/source_xl

`:MODEL,OBJECTIVE`: MODEL is "digits", configs/digits.py, or a size of configs/imagenet256.py, as
xl_2; OBJECTIVE is as there, by default none. The mean alone is learned, the variance stays 1: what
CSFM released and CAR-Flow reports. `--config.source.learn_variance=True` learns both.
docs/systems.md, "A learned source", says what is published and what is ours.
"""

import ml_collections

from repulsor_jax.configs import digits, imagenet256


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
    """Returns the configuration of one model and objective."""
    model, _, objective = variant.partition(",")
    if model == "digits":
        c = digits.get_config(objective or "none")
        c.source.rank = 64
        c.source.alignment_axis = "width"  # one channel has no direction
    else:
        c = imagenet256.get_config(f"{model},{objective or 'none'}")
    c.source.name = "class"
    return c
