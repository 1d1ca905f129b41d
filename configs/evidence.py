"""The settings that `python -m benchmarks.evidence` compares: a bench, and an arm.

    python -m repulsor_jax.main --config=configs/evidence.py:cifar16,positives_1024 --workdir=...

An arm may differ from a named one in further values: `positives_1024+repulsor.temperature=0.2`.

`cifar16`: CIFAR-10 at 16x16, 5,000 pictures without labels, 38 epochs of them; minutes of one CPU
core a run. `cifar16_labels`: all 50,000, with labels. `digits`: 1,300 digits without labels.
`cifar32`: 32x32, S-sized, bfloat16, for a GPU; it was never run. The bench makes the data set,
gives the learning rate that its search found, and trains the arm `control` with a term of its own
(`benchmarks/evidence/control.py`). docs/evidence.md has what came out.
"""

from typing import Any

import ml_collections

from repulsor_jax import config as config_lib
from repulsor_jax.configs import default, objectives
from repulsor_jax.models.dit import DIT_SIZES

BANKS = (0, 256, 1_024, 4_096, 16_384)  # K, rows

# Name -> objective of configs/objectives.py, and values that differ from it.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("none", {}),
    "logit_normal": ("none", {"flow.time_distribution": "logit_normal"}),
    "control": ("none", {}),  # the bench adds its term
    "dispersive": ("dispersive", {}),
    "dispersive_pytorch": ("dispersive_pytorch", {}),
    "repulsor": ("repulsor", {"repulsor.weight": 0.02, "repulsor.bank_rows": 1_024}),
    **{f"positives_{k}": ("repulsor_positives", {"repulsor.bank_rows": k}) for k in BANKS},
    **{f"crops_{k}": ("repulsor_crops", {"repulsor.bank_rows": k}) for k in BANKS},
    **{
        f"positives_{keys}_1024": (
            "repulsor_positives",
            {"repulsor.bank_keys": keys, "repulsor.bank_rows": 1_024},
        )
        for keys in ("online", "latent")
    },
    # A view with the student's noise can be told by its noise; with its own, by its picture alone.
    "positives_new_noise_1024": (
        "repulsor_positives",
        {"repulsor.view_noise": "new", "repulsor.bank_rows": 1_024},
    ),
    "positives_layersync": ("repulsor_positives+layersync", {"repulsor.bank_rows": 1_024}),
    "layersync": ("layersync", {}),
    "sra": ("sra", {"sra.weight": 0.2}),
    "contrastive_flow": ("contrastive_flow", {}),
}


def get_config(setting: str = "cifar16,plain") -> ml_collections.ConfigDict:
    """Returns the configuration of `BENCH,ARM` or `BENCH,ARM+SECTION.FIELD=VALUE+...`."""
    bench, _, arm = setting.partition(",")
    arm, *changes = arm.split("+")
    if bench not in _BENCHES or arm not in ARMS:
        raise ValueError(
            f"configs/evidence.py:{setting}: expected BENCH,ARM with a bench of "
            f"{', '.join(_BENCHES)} and an arm of {', '.join(ARMS)}"
        )
    c = default.get_config()
    _BENCHES[bench](c)
    # The time gap covers all times up to the data, and the teacher of LayerSync is the last block
    # but one: with both, a first look had seen something (docs/evidence.md).
    c.repulsor.time_gap = 1.0
    c.layersync.student_block = c.model.depth // 4
    c.layersync.teacher_block = c.model.depth - 2
    objective, values = ARMS[arm]
    objectives.use(c, objective)
    c.update_from_flattened_dict(values)
    pairs = dict(change.partition("=")[::2] for change in changes)
    if not all(pairs.values()):
        raise ValueError(f"configs/evidence.py:{setting}: expected +SECTION.FIELD=VALUE")
    return ml_collections.ConfigDict(config_lib.with_changes(c.to_dict(), pairs))


def _small(c: ml_collections.ConfigDict) -> None:
    """What the two small benches share: one core, half a million parameters."""
    c.model.hidden_size = 64
    c.model.num_heads = 2
    c.model.num_classes = 1
    c.model.label_dropout = 0.0
    c.model.scan_blocks = False
    c.model.dtype = "float32"

    c.repulsor.projection_dim = 64
    c.repulsor.bank_dtype = "float32"

    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.clip_norm = 1.0
    c.optimizer.ema_decay = 0.99

    c.data.source = "npy"
    c.data.test_split = ""
    c.data.read_threads = 1
    c.data.prefetch_batches = 4

    c.checkpoint.keep_last = 100  # the bench measures each

    c.sampling.solver = "heun"
    c.sampling.num_steps = 8
    c.sampling.batch_size = 250
    c.sampling.num_samples = 2_000
    c.sampling.grid_every_steps = 0


def _cifar16(c: ml_collections.ConfigDict) -> None:
    _small(c)
    c.total_steps = 6_000
    c.batch_size = 32
    c.model.latent_size = 16
    c.model.in_channels = 3
    c.model.patch_size = 4
    c.model.depth = 6
    c.checkpoint.every_steps = 1_500


def _cifar16_labels(c: ml_collections.ConfigDict) -> None:
    _cifar16(c)
    c.model.num_classes = 10
    c.model.label_dropout = 0.1


def _digits(c: ml_collections.ConfigDict) -> None:
    _small(c)
    c.total_steps = 4_000
    c.batch_size = 64
    c.model.latent_size = 8
    c.model.in_channels = 1
    c.model.patch_size = 2
    c.model.depth = 4
    c.checkpoint.every_steps = 1_000


def _cifar32(c: ml_collections.ConfigDict) -> None:
    _small(c)
    c.total_steps = 20_000
    c.batch_size = 256
    for field, value in DIT_SIZES["S"].items():
        c.model[field] = value
    c.model.latent_size = 32
    c.model.in_channels = 3
    c.model.patch_size = 2
    c.model.dtype = "bfloat16"
    c.model.scan_blocks = True
    c.repulsor.projection_dim = 128
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup_steps = 1_000
    c.optimizer.ema_decay = 0.999
    c.data.read_threads = 4
    c.data.prefetch_batches = 8
    c.checkpoint.every_steps = 5_000
    c.sampling.num_samples = 10_000
    c.sampling.num_steps = 20


_BENCHES = {
    "cifar16": _cifar16,
    "cifar16_labels": _cifar16_labels,
    "digits": _digits,
    "cifar32": _cifar32,
}
