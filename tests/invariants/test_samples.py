"""Invariant 6: a sample depends on (seed, its index) only."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repulsor_jax import sharding
from repulsor_jax.autoencoders import get_autoencoder
from repulsor_jax.data.latents import LatentFormat
from repulsor_jax.experiment import Experiment
from repulsor_jax.inference.generator import configured_guidance, generate_images, make_generator
from repulsor_jax.models.build import build_model, build_source, init_model_params
from tests.oracles import tiny


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(tiny.config())


def test_a_sample_is_its_noise_carried_along_the_guided_flow(params):
    """Three Euler steps by hand: guidance, null class, data scale, rounding."""
    latent_format = LatentFormat(False, np.float32([0.1, -0.2]), np.float32([2.0, 3.0]))
    images, labels = generate(
        params,
        8,
        latent_format=latent_format,
        sampling__cfg_scale=2.5,
        sampling__solver="euler",
        sampling__seed=4,
    )
    model = build_model(tiny.config().model)
    velocity = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))
    draw = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(4), i), tiny.SHAPE)
    x = np.asarray(jax.jit(jax.vmap(draw))(np.arange(8)))
    for t in np.float32([0, 1 / 3, 2 / 3]):
        at = np.full(8, t, np.float32)
        cond, uncond = (np.asarray(velocity(x, at, y)) for y in (labels, np.full_like(labels, 3)))
        x = x + (uncond + 2.5 * (cond - uncond)) / 3
    pixels = x / np.float32([2.0, 3.0]) + np.float32([0.1, -0.2])
    expected = np.clip(127.5 * pixels + 128, 0, 255).astype(int)
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert 0 < images.mean() < 255


class Toy:
    """A function that compiles ten times sooner than the model."""

    segments = 1

    @staticmethod
    def apply(variables, x, t, labels):
        times, labels = (a.reshape(-1, 1, 1, 1) for a in (t, labels))
        return jnp.tanh(variables["params"] * x + labels) * (1 + times)


def generate(params, count, mesh=None, latent_format=tiny.FORMAT, **overrides):
    """Samples of the configured model with these parameters, or of a `Toy`."""
    c = tiny.config(**overrides)
    mesh = mesh or tiny.mesh()
    model = Toy() if isinstance(params, float) else build_model(c.model)
    parts = Experiment(
        config=c,
        workdir=pathlib.Path(),
        mesh=mesh,
        model=model,
        autoencoder=get_autoencoder("identity"),
        latent_format=latent_format,
        latents_sha256="",
        class_names=("a", "b", "c"),
    )
    placement = sharding.replicated(mesh)
    if not isinstance(model, Toy):
        source = build_source(c.source, c.model)
        boxed = jax.eval_shape(lambda key: init_model_params(model, key, source), jax.random.key(0))
        placement = sharding.tree_shardings(boxed, mesh)
    placed = jax.device_put(params, placement)
    guidance = configured_guidance(c.sampling)
    return generate_images(make_generator(parts), placed, count, guidance)


@pytest.mark.parametrize(
    "options",
    [{}, {"solver": "euler_maruyama", "cfg_scale": 2.5, "cfg_interval_high": 0.5}],
    ids=str,
)
def test_same_samples_for_any_batch_size_mesh_and_count(params, options):
    options = {f"sampling__{key}": value for key, value in options.items()}
    images, labels = generate(params, 20, **options)
    assert images.shape == (20, *tiny.SHAPE)
    assert len({image.tobytes() for image in images}) == 20
    np.testing.assert_array_equal(labels, np.arange(20) % 3)
    for mesh, batch_size, count in ((tiny.mesh(2, 4), 16, 20), (tiny.mesh(2, 2, 2), 8, 5)):
        other, other_labels = generate(
            params, count, mesh, **options, sampling__batch_size=batch_size
        )
        # uint8: a reordered sum may tip a value over to its neighbour.
        assert np.abs(other.astype(int) - images[:count]).max() <= 1
        assert (other != images[:count]).mean() < 0.01
        np.testing.assert_array_equal(other_labels, labels[:count])


def test_a_sample_of_a_learned_source_depends_on_its_class_too():
    options = {"source__name": "class", "source__rank": 8, "source__learn_variance": True}
    options |= {"sampling__solver": "euler_maruyama", "sampling__cfg_scale": 2.0}
    params = tiny.random_params(tiny.config(**options))
    # Of the order of the noise.
    params["source"] = jax.tree.map(lambda x: 4 * x, params["source"])
    images, _ = generate(params, 20, **options)
    other, _ = generate(params, 5, tiny.mesh(2, 4), **options, sampling__batch_size=16)
    assert np.abs(other.astype(int) - images[:5]).max() <= 1
    # The sources of the other classes change nothing.
    params["source"]["table"]["embedding"][1:] += 1.0
    moved, labels = generate(params, 20, **options)
    np.testing.assert_array_equal(moved[labels == 0], images[labels == 0])
    assert (moved != images)[labels != 0].mean() > 0.1


def test_parameters_in_shards_give_the_same_samples():
    wide = {"model__hidden_size": 64}
    params = tiny.random_params(tiny.config(**wide))
    assert any(leaf.size >= sharding.MIN_SHARDED_SIZE for leaf in jax.tree.leaves(params))
    images, _ = generate(params, 8, **wide)
    for gathers in (True, False):
        found, _ = generate(params, 8, tiny.mesh(1, 8), **wide, sampling__gather_params=gathers)
        assert np.abs(found.astype(int) - images).max() <= 1
        assert (found != images).mean() < 0.01


TOY = 0.5


def test_seed_guidance_and_labels_change_the_samples():
    base, _ = generate(TOY, 6)
    for change in (
        {"sampling.seed": 1},
        {"sampling.cfg_scale": 3.0},
        {"sampling.labels": "random"},
        {"sampling.solver": "dopri5"},
        {"sampling.solver": "stochastic_heun"},
    ):
        assert (generate(TOY, 6, **change)[0] != base).any(), change


def test_decoding_in_slices_changes_nothing():
    images, _ = generate(TOY, 16, sampling__batch_size=16)
    change = {"sampling.decode_slice": 4}
    other, _ = generate(TOY, 16, tiny.mesh(2), sampling__batch_size=16, **change)
    assert np.abs(other.astype(int) - images).max() <= 1
