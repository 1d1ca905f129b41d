import functools
import hashlib
import http.server
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from repulsor_jax import config as config_lib
from repulsor_jax.autoencoders import Autoencoder
from repulsor_jax.evaluate import evaluate
from repulsor_jax.evaluation import features, inception
from repulsor_jax.evaluation.frechet import GaussianStatistics
from repulsor_jax.evaluation.measure import Reference, metrics
from repulsor_jax.files.pictures import save_samples
from repulsor_jax.files.shards import Shards
from tests.oracles import tiny
from tests.oracles.inception import random_tensor


def images(count, size=16, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), np.uint8)


def test_pixels():
    space = features.pixel_space(4 * 4 * 3)
    given = images(5, 4)
    found = space.apply(space.params, jnp.asarray(given))
    assert found.keys() == {"pool"}
    np.testing.assert_allclose(found["pool"], given.reshape(5, -1) / 127.5 - 1, atol=1e-6)
    assert space.metric == "frechet_pixels"
    with pytest.raises(ValueError, match=r"at most 4096 values; these have 12288.*'autoencoder'"):
        features.pixel_space(64 * 64 * 3)


def stand_in(channels, stochastic):
    """An autoencoder that averages 2 x 2 pixels and repeats the channels, with a second half."""

    def encode(params, x):
        x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, 3).mean(axis=(2, 4))
        x = jnp.tile(x, (1, 1, 1, channels // 3)) * params
        return jnp.concatenate([x, 9 + x], axis=-1) if stochastic else x

    return Autoencoder(
        "stand-in", jnp.float32(3.0), encode, encode, stochastic, 0.5, 0.25, "ab" * 32
    )


@pytest.mark.parametrize(
    ("channels", "factor", "stochastic"), [(3, 1, False), (24, 2, True), (96, 4, False)]
)
def test_latents_are_normalised_and_averaged_down(channels, factor, stochastic):
    """32 x 32 pixels are 16 x 16 latents, averaged until they are 2,048 values at most."""
    space = features.autoencoder_space(stand_in(channels, stochastic))
    given = images(2, 32)
    found = np.asarray(space.apply(space.params, jnp.asarray(given))["pool"])
    size = 2 * factor
    blocks = (given / 127.5 - 1).reshape(2, 32 // size, size, 32 // size, size, 3)
    latents = np.tile(3.0 * blocks.mean(axis=(2, 4)), (1, 1, 1, channels // 3))
    expected = (latents - 0.25) * 0.5
    np.testing.assert_allclose(found, expected.reshape(2, -1), atol=1e-5)
    assert found.shape[1] <= 2048
    assert (space.metric, space.digest) == (
        "frechet_autoencoder",
        f"stand-in {'ab' * 8} float32",
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights under the published names."""
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file({n: random_tensor(n, s) for n, s in inception.tensor_shapes().items()}, path)
    return path


@pytest.mark.slow
def test_inception_metrics_of_an_npz_against_published_statistics(tmp_path, weights):
    """Through the mode, against NumPy on the features of images made RGB by hand."""
    given, rng = images(8, channels=1, seed=1), np.random.default_rng(2)
    mean, variance = rng.standard_normal(2048), rng.random(2048)
    save_samples(tmp_path / "fake.npz", [given], np.zeros(8))
    np.savez(tmp_path / "real.npz", mu=mean, sigma=np.diag(variance))
    c = config_lib.parse(
        tiny.config_dict(
            evaluation__samples=str(tmp_path / "fake.npz"),
            evaluation__reference=str(tmp_path / "real.npz"),
            evaluation__inception_weights=str(weights),
            evaluation__batch_size=8,
        )
    )
    (record,) = evaluate(c, tmp_path)
    found, params = record["metrics"], inception.load_params(weights)
    layers = jax.device_get(jax.jit(inception.features)(params, np.repeat(given, 3, axis=-1)))
    # tr (F^T F C)^(1/2), with F the centred samples, is that of the small F C F^T.
    x = layers["2048"].astype(np.float64)
    factor = (x - x.mean(0)) / np.sqrt(7)
    overlap = np.sqrt(np.linalg.eigvalsh(factor * variance @ factor.T).clip(0)).sum()
    expected = ((x.mean(0) - mean) ** 2).sum() + (factor**2).sum() + variance.sum() - 2 * overlap
    np.testing.assert_allclose(found["fid"], expected, rtol=1e-3)
    logits = layers["logits_unbiased"].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    score = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    np.testing.assert_allclose(found["inception_score"], score, rtol=1e-5)
    text = " ".join(record["warnings"])
    for expected in ("fid, samples: found 8 samples for a covariance of 2048", "no KID", "no sFID"):
        assert expected in text
    assert record["features"]["name"] == "inception"


def frechet(a, b):
    """Independent: the trace of the root of the product is the sum of its eigenvalues' roots."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    ca, cb = np.cov(a.T), np.cov(b.T)
    overlap = np.sqrt(np.linalg.eigvals(ca @ cb).real).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb) - 2 * overlap


def test_what_a_reference_allows(tmp_path):
    """Features of 1,100 images in a space as Inception's, but of 6 dimensions."""
    rng = np.random.default_rng(0)
    arrays = {
        "pool": rng.normal(0.1, 1.1, (1100, 6)).astype(np.float32),
        "spatial": rng.normal(-0.2, 1, (1100, 5)).astype(np.float32),
        "logits": rng.normal(0, 1, (1100, 4)).astype(np.float32),
    }
    kept = Shards(tmp_path, 1100, 1100)
    kept.write(0, [arrays])
    real = rng.normal(0, 1, (1000, 6)).astype(np.float32)
    real_spatial = rng.normal(0, 1, (1000, 5))
    space = features.FeatureSpace("inception", "", None, lambda params, images: {})
    found, warnings = metrics(
        kept, Reference({}, gaussian(real), gaussian(real_spatial), real), space
    )
    assert not warnings
    np.testing.assert_allclose(found["fid"], frechet(arrays["pool"], real), rtol=1e-9)
    np.testing.assert_allclose(found["sfid"], frechet(arrays["spatial"], real_spatial), rtol=1e-9)
    # Of nearly the same distributions: nearly everything is inside, and the kernels agree.
    assert min(found["precision"], found["recall"]) > 0.8
    assert abs(found["kid"]) < 0.2
    by_images = {"kid", "kid_std", "precision", "recall"}
    by_logits = {"inception_score", "inception_score_std", "inception_score_shuffled"}
    assert found.keys() == {"fid", "sfid"} | by_images | by_logits

    fewer, warnings = metrics(kept, Reference({}, gaussian(real)), space)
    assert fewer == {name: found[name] for name in {"fid"} | by_logits}
    assert warnings == [
        "the reference has no spatial statistics: no sFID",
        "the reference holds statistics alone: no KID, precision, recall",
    ]


def gaussian(x):
    x = x.astype(np.float64)
    return GaussianStatistics(x.mean(0), np.cov(x.T), len(x))


class Site(http.server.SimpleHTTPRequestHandler):
    """A web server on this machine that counts what is fetched."""

    requests = 0

    def do_GET(self):
        Site.requests += 1
        super().do_GET()

    def log_message(self, *arguments):
        pass


def test_the_weights_are_fetched_once(tmp_path, monkeypatch):
    content = b"the published file"
    (tmp_path / "weights.pth").write_bytes(content)
    cache, sha256 = tmp_path / "cache", hashlib.sha256(content).hexdigest()
    handler = functools.partial(Site, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_port}/weights.pth"
        with pytest.raises(ValueError, match=rf"SHA-256 is {sha256[:12]}..., expected 6726825d"):
            features.download_inception(cache, url)
        assert not list(cache.glob("*.pth"))  # a wrong file is not kept
        monkeypatch.setattr(inception, "WEIGHTS_SHA256", sha256[:8])
        before = Site.requests
        for _ in range(2):
            assert features.download_inception(cache, url).read_bytes() == content
        assert Site.requests == before + 1
        server.shutdown()


def test_without_a_network_the_message_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        features.download_inception(tmp_path, "http://localhost:9/nobody.pth")
    for part in (
        "pt_inception-2015-12-05-6726825d.pth from http://localhost:9",
        "--config.evaluation.inception_weights",
        str(tmp_path),
        "--config.evaluation.features='autoencoder'",
        "not FID",
    ):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())
