"""Objectives by name: published set-ups, and forms of Repulsor, each one line of a config.

`use(c, "repulsor_positives+layersync")` sets `c.terms` and what differs from `configs/default.py`.
Sources and formulas are in docs/method.md.
"""

from typing import Any

import ml_collections

# Name -> term, and the values of its section, or of others by their whole name, that differ from
# the defaults.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    # Repulsor (arXiv 2512.08648 fixes the idea; these forms are ours).
    "repulsor": ("repulsor", {}),  # repulsion alone
    "repulsor_positives": (
        "repulsor",
        {"positives": "view", "bank_keys": "teacher", "temperature": 0.4, "weight": 0.1},
    ),
    "repulsor_crops": (  # the same image as a random crop in other noise: docs/evidence.md
        "repulsor",
        {
            "positives": "view",
            "bank_keys": "teacher",
            "view_noise": "new",
            "view_min_crop": 0.4,
            "temperature": 0.2,
            "weight": 0.1,
        },
    ),
    "repulsor_latent": (
        "repulsor",
        {"positives": "view", "bank_keys": "latent", "temperature": 0.4, "weight": 0.1},
    ),
    "byol": (  # the control without negatives: a predictor and a teacher
        "repulsor",
        {"positives": "view", "bank_keys": "teacher", "negatives": "none", "predictor": True},
    ),
    # Dispersive Loss (arXiv 2506.09027). Its JAX form: B/2 32.35 unguided, XL/2 5.09 guided; its
    # PyTorch form: the last block, B/2 32.64, XL/2 4.74.
    "dispersive": ("dispersive", {}),
    "dispersive_pytorch": ("dispersive", {"weight": 0.25, "temperature": 1.0, "block": "last"}),
    # LayerSync (arXiv 2510.12581): weight 0.2 from the first step on.
    "layersync": ("layersync", {}),
    # SRA (arXiv 2505.02831): the released cosine, and the paper's smooth L1, whose weight falls to
    # a tenth in 1,000 epochs from epoch 149 on (5,004 steps of 256 images are one of ImageNet).
    "sra": ("sra", {}),
    "sra_smooth_l1": (
        "sra",
        {
            "distance": "smooth_l1",
            "weight": 0.2,
            "decay_start": 149 * 5_004,
            "decay_steps": 1_000 * 5_004,
        },
    ),
    # SRA with dual times and attention separation (SRA_DTS_AS, arXiv 2607.02508).
    "dual_times": (
        "sra",
        {
            "teacher_labels": "true",
            "flow.time_groups": 2,
            "flow.group_fractions": (0.25, 0.75),
            "model.attention_separation": True,
        },
    ),
    # The trunk of a blockwise network (configs/blockwise.py) without an encoder: its last block
    # towards the clean latent, or towards its own average at less noise. The weight is BFM's, the
    # targets are ours.
    "semantic_latent": ("latent_alignment", {"weight": 0.05, "block": "last"}),
    "semantic_teacher": (
        "sra",
        {"weight": 0.05, "student_block": "last", "teacher_block": "last", "axis": "channels"},
    ),
    # BFM's form of the same, with features of an encoder that the user has stored (data.features),
    # which has none of mirror images.
    "feature_alignment": ("feature_alignment", {"data.flips": False}),
    # After SRA 2 (arXiv 2601.17830), of which the abstract alone is known.
    "latent_alignment": ("latent_alignment", {}),
    # Contrastive flow matching (arXiv 2506.05350).
    "contrastive_flow": ("contrastive_flow", {}),
}

# Published blocks, counted from 1: (student, teacher) by model size. LayerSync: XL its README, L a
# reviewer's note, B our guess by their rule. SRA: B and XL its code, L a secondary source. S has
# the depth of B.
_BLOCKS = {
    "layersync": {"XL": (8, 16), "L": (8, 18), "B": (4, 8), "S": (4, 8)},
    "sra": {"XL": (8, 20), "L": (6, 16), "B": (3, 8), "S": (3, 8)},
}


def use(c: ml_collections.ConfigDict, objective: str, size: str = "") -> None:
    """Sets the terms of a configuration to a sum of presets.

    Args:
      c: the configuration, its model already set.
      objective: "none", or names of `PRESETS` joined by "+".
      size: "S", "B", "L" or "XL" for the published blocks; "" scales them to the depth.

    Raises:
      ValueError: an unknown name.
    """
    names = [] if objective == "none" else objective.split("+")
    terms = []
    for name in names:
        if name not in PRESETS:
            raise ValueError(f"objective {name!r}: expected none, or a sum of {', '.join(PRESETS)}")
        term, values = PRESETS[name]
        terms.append(term)
        for key, value in values.items():
            section, _, field = key.rpartition(".")
            c[section or term][field] = c.model.depth - 1 if value == "last" else value
        blocks = _BLOCKS.get(term, {}).get(size.upper())
        if blocks:
            c[term].student_block, c[term].teacher_block = blocks[0] - 1, blocks[1] - 1
    c.terms = "+".join(terms) or "none"
