"""Holes, label maps and what a network is shown of them, against closed forms and LFM's values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax.data import conditioning
from repulsor_jax.flows import paths, solvers
from tests.oracles import fixtures

DRAW = jax.jit(conditioning.random_masks, static_argnums=2)


@pytest.fixture(scope="module")
def lfm():
    path = fixtures.FOLDER / "lfm_visible.npz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with np.load(path) as file:
        return dict(file)


def last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))


def masks(size, numbers, seed=0):
    return np.asarray(DRAW(jax.random.key(seed), jnp.asarray(numbers), size))


def test_a_mask_depends_on_its_key_and_number_alone():
    found = masks(8, range(12))
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_array_equal(masks(8, order), found[order])
    np.testing.assert_array_equal(masks(8, [*range(6), *range(20, 26)])[:6], found[:6])
    assert (masks(8, range(12), seed=1) != found).any(axis=(1, 2)).sum() > 6


@pytest.mark.parametrize("size", [8, 32])
def test_masks_are_of_the_sizes_that_they_are_drawn_with(size):
    found = masks(size, range(200))
    share = found.mean(axis=(1, 2))
    # 1/12 of those of strokes and 1/4 of those of boxes have none.
    expected = (1 / 12 + 1 / 4) / 2
    assert abs((share == 0).mean() - expected) < 4 * np.sqrt(expected / 200)
    assert 0.02 < share.mean() < 0.3
    assert share.max() < 0.7
    if size == 32:  # a box's middle is 25 of 256 or more away from the border, most strokes nearer
        assert found[:, 0].any()
        assert found[:, :, -1].any()


def test_a_box_is_a_rectangle_within_its_margin():
    draw = jax.jit(jax.vmap(lambda key: conditioning._boxes(key, jnp.int32(1), 256, 1.0)))
    boxes = np.asarray(draw(jax.random.split(jax.random.key(0), 20)))
    for box in boxes:
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        assert box.sum() == len(rows) * len(columns)
        for side in (rows, columns):
            assert 29 <= len(side) <= 101
            assert side[0] >= 9
            assert side[-1] <= 246


def test_a_mask_at_latent_size_has_every_cell_that_is_touched_or_those_whose_corner_is():
    mask = np.zeros((1, 16, 16), bool)
    mask[0, 3, 12] = mask[0, 8, 0] = True
    touched = np.zeros((1, 2, 2), bool)
    touched[0, 0, 1] = touched[0, 1, 0] = True
    np.testing.assert_array_equal(conditioning.cells_with_hole(mask, 2), touched)
    touched[0, 0, 1] = False
    np.testing.assert_array_equal(conditioning.mask_at_corners(mask, 2), touched)


def test_shares_of_classes_are_counts_and_sum_to_one():
    label_map = np.random.default_rng(0).integers(0, 6, (2, 8, 8))
    found = conditioning.class_histogram(jnp.asarray(label_map), 6, 2)
    counts = [
        [
            [np.bincount(m[i : i + 4, j : j + 4].ravel(), minlength=6) for j in (0, 4)]
            for i in (0, 4)
        ]
        for m in label_map
    ]
    np.testing.assert_array_equal(found, np.array(counts) / 16)
    np.testing.assert_allclose(found.sum(-1), 1)
    unlabelled = conditioning.class_histogram(jnp.full((1, 8, 8), 255), 6, 2)
    np.testing.assert_array_equal(unlabelled, 0)


def test_a_map_that_does_not_divide_into_cells_is_refused():
    with pytest.raises(ValueError, match="found 9 x 9 pixels, expected a multiple of .* 2 cells"):
        conditioning.class_histogram(jnp.zeros((1, 9, 9), jnp.int32), 6, 2)


@pytest.mark.parametrize("is_hole", [False, True])
def test_a_composite_is_the_original_or_what_is_generated_to_the_bit(is_hole):
    original, generated = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4, 1), np.uint8)
    mask = np.full((3, 4, 4), is_hole)
    found = conditioning.composite(mask, generated, original)
    np.testing.assert_array_equal(found, generated if is_hole else original)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("is_hole", [False, True])
def test_without_a_hole_all_is_shown_and_with_nothing_else_only_the_mask(is_hole, monkeypatch):
    whole = lambda key, numbers, size: jnp.full((len(numbers), size, size), is_hole)
    monkeypatch.setattr(conditioning, "random_masks", whole)
    data = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 3)), jnp.float32)
    form = conditioning.LatentFormat(False, np.zeros(3), np.ones(3))
    found = conditioning.draw_masked_latents(jax.random.key(0), data, None, form, size=8)
    np.testing.assert_array_equal(found[..., :3], 0 if is_hole else data)
    np.testing.assert_array_equal(found[..., 3], 1 if is_hole else -1)


def test_inpainting_is_that_of_latent_flow_matching(lfm):
    mask = last(lfm["inpaint/mask_0_1"][None])[..., 0] == 1
    image = last(lfm["inpaint/image"][None])
    masked = last(lfm["inpaint/masked_image"][None])
    scaled = image if image.min() < 0 else 2 * image - 1  # ours is in [-1, 1]
    np.testing.assert_allclose(conditioning.hide(scaled, mask), masked, atol=2e-5)
    cells = conditioning.mask_at_corners(mask, 4)
    condition = conditioning.inpaint_channels(last(lfm["inpaint/masked_latent"]), cells)
    np.testing.assert_array_equal(condition[..., -1:], last(lfm["inpaint/mask_at_latent_size"]))
    t = jnp.asarray(1 - lfm["inpaint/t_theirs"])
    x = paths.interpolate(
        paths.get_path("linear"), last(lfm["inpaint/latent"]), last(lfm["inpaint/noise"]), t
    )
    np.testing.assert_allclose(x, last(lfm["inpaint/x_t"]), atol=2e-5)
    shown = jnp.concatenate([x, condition], axis=-1)
    np.testing.assert_allclose(shown, last(lfm["inpaint/model_input"]), atol=2e-5)
    generated, original = last(lfm["inpaint/generated"]), scaled
    found = (conditioning.composite(mask, generated, original) + 1) / 2
    np.testing.assert_allclose(found, last(lfm["inpaint/composite_0_1"]), atol=2e-5)


def test_label_maps_are_shown_as_by_latent_flow_matching(lfm):
    histogram = conditioning.class_histogram(
        jnp.asarray(lfm["semantic/segmentation"]), int(lfm["semantic/classes"]), 4
    )
    condition = histogram @ lfm["semantic/kernel"][:, :, 0, 0].T
    np.testing.assert_allclose(condition, last(lfm["semantic/condition"]), atol=2e-5)


def test_the_linear_path_is_the_published_one_without_its_last_noise(lfm):
    """Theirs leaves e = 1e-5 of noise on the data; both agree to a few e."""
    path, t = paths.get_path("linear"), jnp.asarray(lfm["path/t_ours"])
    data, noise = last(lfm["path/data"]), last(lfm["path/noise"])
    np.testing.assert_allclose(
        paths.interpolate(path, data, noise, t), last(lfm["path/x_t"]), atol=4e-5
    )
    np.testing.assert_allclose(
        paths.target_velocity(path, data, noise, t), last(lfm["path/target_ours"]), atol=4e-5
    )
    # And exactly, with their e: the interpolated noise is (1 - (1 - e) t) times it.
    e = float(lfm["path/sigma_min"])
    expected = t[:, None, None, None] * data + (1 - (1 - e) * t)[:, None, None, None] * noise
    np.testing.assert_allclose(expected, last(lfm["path/x_t"]), atol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("points", [2, 5])
def test_fixed_steps_on_the_published_grid_end_where_theirs_do(lfm, solver, points):
    matrix, vector = lfm["sampler/matrix"], lfm["sampler/vector"]
    times = 1 - np.linspace(1, 1e-5, points)  # ours: n points are n - 1 steps, to 1 - 1e-5

    def velocity(x, t):  # theirs is A x + b t over channels, towards the noise
        return -(x @ matrix.T + vector * (1 - t))

    found = solvers.solve_ode(velocity, last(lfm["sampler/noise"]), times, solver)
    expected = last(lfm[f"sampler/{solver}_{points}"])
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("stochastic", [False, True])
def test_what_is_stored_is_shown_in_the_models_units(stochastic):
    """Latents, or moments with hardly any spread, are shifted and scaled; a mask is not."""
    rng = np.random.default_rng(0)
    latents, sign = rng.standard_normal((2, 4, 4, 2)), rng.choice([-1.0, 1.0], (2, 4, 4, 1))
    spread = [np.full(latents.shape, -30.0)] if stochastic else []
    stored = jnp.asarray(np.concatenate([latents, *spread, sign], axis=-1), jnp.float32)
    form = conditioning.LatentFormat(stochastic, np.array([1.0, 2.0]), np.array([0.5, 0.25]))
    found = conditioning.stored_masked_latents(jax.random.key(0), None, stored, form)
    np.testing.assert_allclose(found[..., :2], (latents - [1, 2]) * [0.5, 0.25], atol=1e-5)
    np.testing.assert_array_equal(found[..., 2:], sign)
