"""Writes inception.npz, features of two images by torch-fidelity's InceptionV3 in float64.

    python -m tests.data.make_inception               writes inception.npz beside this file
    python -m tests.data.make_inception other.npz     compares with a file of the same layout

The weights are `tests.oracles.inception.random_tensor`'s, which any test can make again; the shapes
here are torch-fidelity's own.
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch

from tests.oracles.inception import import_torch_fidelity, random_tensor, torch_inception


def make() -> dict[str, np.ndarray]:
    """The images, uint8 `[2, 40, 56, 3]`, and each layer's features, float32."""
    import_torch_fidelity()
    from torch_fidelity import feature_extractor_inceptionv3 as module

    # Without weights the constructor would download them.
    module.load_state_dict_from_url = lambda *args, **kwargs: {}
    strict = module.FeatureExtractorInceptionV3.load_state_dict
    module.FeatureExtractorInceptionV3.load_state_dict = lambda *args: None
    empty = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    module.FeatureExtractorInceptionV3.load_state_dict = strict
    state = {
        name: torch.from_numpy(random_tensor(name, tuple(tensor.shape)))
        for name, tensor in empty.items()
        if not name.endswith("num_batches_tracked")
    }
    rng = np.random.default_rng(0)
    # Smooth on one image and noise on the other: they differ in more than their mean.
    ramp = np.add.outer(np.arange(40) * 3, np.arange(56))[..., None] + [0, 40, 80]
    images = np.stack([ramp, rng.integers(0, 256, (40, 56, 3))]).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "weights.pth"
        torch.save(state, path)
        return {"images": images, **torch_inception(path, "float64")(images)}


if __name__ == "__main__":
    values = make()
    if len(sys.argv) > 1:
        stored = np.load(sys.argv[1])
        assert set(stored.files) == set(values)
        for name, value in values.items():
            np.testing.assert_allclose(stored[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    else:
        np.savez_compressed(pathlib.Path(__file__).with_name("inception.npz"), **values)
