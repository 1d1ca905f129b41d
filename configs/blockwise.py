"""Blockwise flow matching (arXiv 2510.21167): a velocity network of its own for each part of time.

    python -m repulsor_jax.main --config=configs/blockwise.py:digits --workdir=runs/blockwise
    python -m repulsor_jax.main --config=configs/blockwise.py:xl_2,semantic_teacher --workdir=...

`:SIZE,OBJECTIVE`: SIZE is `digits` (three segments, minutes on a CPU) or `xl_2`, the published
sizes on ImageNet 256x256; OBJECTIVE is none or a sum of the presets of configs/objectives.py. The
published alignment with DINOv2, `feature_alignment`, needs its features in a file (data.features);
`semantic_latent` and `semantic_teacher`, which align the trunk with the clean latent and with its
own average, are ours.

`xl_2` follows the paper: AdamW 1e-4, gradients clipped at 1, batch 1,536, EMA 0.9999. Not run here.
"""

import ml_collections

from repulsor_jax.configs import digits, imagenet256, objectives


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
    """Returns the configuration of one size and objective."""
    size, _, objective = variant.partition(",")
    objective = objective or "semantic_teacher"
    if size == "digits":
        return _digits(objective)
    if size == "xl_2":
        return _xl(objective)
    raise ValueError(f"configs/blockwise.py:{variant}: the size {size!r} must be digits or xl_2")


def _digits(objective: str) -> ml_collections.ConfigDict:
    c = digits.get_config()
    c.batch_size = 120
    c.model.architecture = "blockwise"
    c.model.depth = 3
    c.model.segments = 3
    c.model.segment_depth = 1
    c.model.adaln_rank = 16
    c.repulsor.bank_rows = 960
    objectives.use(c, objective)
    c.optimizer.ema_decay = 0.995
    c.sampling.num_steps = 12  # four in each segment
    return c


def _xl(objective: str) -> ml_collections.ConfigDict:
    c = imagenet256.get_config("xl_2")
    c.batch_size = 1_536
    c.total_steps = 2_000_000
    c.model.architecture = "blockwise"
    c.model.depth = 20
    c.model.learn_sigma = False
    c.model.segments = 6
    c.model.segment_depth = 5
    c.model.adaln_rank = 288
    c.repulsor.bank_rows = 43 * 1_536  # 66,048
    objectives.use(c, objective)
    c.optimizer.clip_norm = 1.0
    c.sampling.num_steps = 246  # 41 in each segment
    c.sampling.batch_size = 256
    return c
