"""Images from label maps, as latent flow matching does it (arXiv 2307.08698).

    python examples/coloured_digits.py data/coloured_digits
    python -m repulsor_jax.main --config=semantic --workdir=runs/semantic

takes minutes on 2 CPU cores: `:digits`, the default, draws small pictures of handwritten digits
from maps of 4 classes, which examples/coloured_digits.py makes of scikit-learn's digits. `:l_2`,
and the other sizes of configs/imagenet256.py, are for 256 x 256 pixels and ADE20K's 151 classes:
images in data/ade20k/images and their maps, PNG files of the same names, in data/ade20k/maps.
"""

import ml_collections

from repulsor_jax.configs import digits, imagenet256


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
    """Returns the configuration for coloured digits, or for ADE20K and a model size."""
    if variant == "digits":
        c = digits.get_config("none")
        c.model.latent_size = 16
        c.model.in_channels = 3
        c.model.patch_size = 4
        c.conditioning.classes = 4
        folder = "data/coloured_digits"
        c.sampling.grid_samples = 40
        c.sampling.grid_columns = 12
        c.evaluation.every_steps = 0  # 497 images say little in a space of 768 pixels
    else:
        c = imagenet256.get_config(f"{variant},none")
        c.data.autoencoder = "sd-vae-ft-mse"
        c.data.dir = "data/ade20k_sd-vae-mse"
        c.data.train_split, c.data.test_split = "training", "validation"
        c.conditioning.classes = 151
        c.optimizer.learning_rate = 5e-5
        c.sampling.solver, c.sampling.cfg_channels = "heun", 0
        c.sampling.num_steps = 50
        folder = "data/ade20k"
    c.model.num_classes = 1
    c.model.label_dropout = 0.0  # there is no class to leave out
    c.conditioning.kind = "semantic"
    c.conditioning.maps_path = f"{folder}/maps"
    c.data.source = "folder"
    c.data.source_path = f"{folder}/images"
    return c
