"""Random crops, against scipy's interpolation at the places that a ramp shows."""

import jax
import numpy as np
from scipy import ndimage

from repulsor_jax.method.crops import random_crops

SIZE, COUNT, LEAST = 16, 200, 0.4


def test_a_square_within_the_image_stretched_to_its_size():
    # Of an image whose values are its coordinates a crop is where it was cut.
    ramp = np.stack(np.meshgrid(*2 * [np.arange(SIZE, dtype=np.float32)], indexing="ij"), -1)
    picture = np.random.default_rng(0).standard_normal((SIZE, SIZE, 1)).astype(np.float32)
    images = np.broadcast_to(np.concatenate([ramp, picture], -1), (COUNT, SIZE, SIZE, 3))
    found = np.asarray(random_crops(jax.random.key(1), images, LEAST))

    rows, columns = found[:, :, 0, 0], found[:, 0, :, 1]
    np.testing.assert_allclose(found[..., 0], rows[:, :, None].repeat(SIZE, 2), atol=1e-4)
    np.testing.assert_allclose(found[..., 1], columns[:, None].repeat(SIZE, 1), atol=1e-4)
    middle = slice(SIZE // 4, -SIZE // 4)  # no crop of which reaches beyond the outer pixels
    steps = [np.diff(x[:, middle], axis=1) for x in (rows, columns)]
    side = steps[0][:, 0]
    for step in (steps[0], np.abs(steps[1])):
        np.testing.assert_allclose(step, side[:, None].repeat(step.shape[1], 1), atol=1e-4)
    assert side.min() >= LEAST - 1e-4
    assert side.max() <= 1 + 1e-4
    assert side.min() < LEAST + 0.05 < 0.95 < side.max()
    mirrored = steps[1][:, 0] < 0
    assert 0.35 < mirrored.mean() < 0.65
    assert rows.min() >= 0
    assert rows.max() <= SIZE - 1

    for image, x, y in zip(found, rows, columns, strict=True):
        at = np.meshgrid(x, y, indexing="ij")
        expected = ndimage.map_coordinates(picture[..., 0], at, order=1)
        np.testing.assert_allclose(image[..., 2], expected, atol=1e-4)
