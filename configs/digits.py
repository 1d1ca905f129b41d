"""The embedded default: real handwritten digits, 8x8, class-conditional.

    python -m repulsor_jax.main --config=configs/digits.py --workdir=runs/digits

takes 1 to 4 minutes on 2 CPU cores and ends at a Fréchet distance of 0.56 to held-out digits in
pixel space (2,000 steps, one seed; without the bank's term 0.55). scikit-learn's 1,797 digits go
through the path that ImageNet takes: encoded once into an ArrayRecord data set, read by grain,
trained by the sharded step.

`configs/digits.py:OBJECTIVE` is the same with a sum of the presets of configs/objectives.py.
"""

import ml_collections

from repulsor_jax.configs import default, objectives


def get_config(objective: str = "repulsor") -> ml_collections.ConfigDict:
    """Returns the configuration of `make demo`, or that of another objective."""
    c = default.get_config()
    c.total_steps = 2_000
    c.batch_size = 128

    c.model.latent_size = 8
    c.model.in_channels = 1
    c.model.hidden_size = 64
    c.model.depth = 4
    c.model.num_heads = 4
    c.model.num_classes = 10
    c.model.scan_blocks = False
    c.model.dtype = "float32"

    # Small: at this size repulsion costs capacity, more with a larger lambda (docs/evidence.md).
    c.repulsor.weight = 0.05
    c.repulsor.projection_dim = 64
    c.repulsor.bank_rows = 1_024  # fewer than the 1,300 images: few are there twice
    c.repulsor.bank_dtype = "float32"
    objectives.use(c, objective)

    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.clip_norm = 1.0
    c.optimizer.ema_decay = 0.99  # of 2,000 steps; 0.9999 is for hundreds of thousands

    c.data.source = "digits"
    c.data.encode_if_missing = True
    c.data.encode_workers = 0  # these images are in memory

    c.checkpoint.every_steps = 500
    c.checkpoint.keep_every = 0

    c.log.every_steps = 20
    c.log.diagnostics_every_steps = 200

    c.sampling.solver = "heun"
    c.sampling.num_steps = 12
    c.sampling.num_samples = 100
    c.sampling.batch_size = 200
    c.sampling.grid_every_steps = 500
    c.sampling.grid_samples = 100
    c.sampling.grid_columns = 10

    c.evaluation.every_steps = 500
    c.evaluation.features = "pixels"  # 8x8 pixels are a feature space of their own
    c.evaluation.num_samples = 2_000
    c.evaluation.batch_size = 200
    return c
