"""The spaces that images are compared in: Inception's, an autoencoder's, their own pixels.

Only distances in Inception's space bear the names FID, KID and so on; a Fréchet distance in
another space is named after it, and its values mean nothing beside an FID.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pooch

from repulsor_jax.autoencoders import Autoencoder
from repulsor_jax.evaluation import inception
from repulsor_jax.files.checksums import file_sha256

Array = jax.Array

MAX_LATENT_FEATURES = 2048  # as many as Inception's


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
    """A function from images to features."""

    name: str  # "inception", "pixels" or "autoencoder"
    digest: str  # of its weights, or a name of them; "" where it has none
    params: Any
    # (params, uint8 [B, H, W, C]) -> float32 arrays [B, D]: "pool", whose Gaussians the Fréchet
    # distance compares; in Inception's space "spatial" and "logits" (unbiased) too.
    apply: Callable[[Any, Array], dict[str, Array]]

    @property
    def metric(self) -> str:
        """What the Fréchet distance in this space is called."""
        return "fid" if self.name == "inception" else f"frechet_{self.name}"


def inception_space(weights: str = "") -> FeatureSpace:
    """Inception's pooled features, spatial features and logits; grey images become RGB.

    Args:
      weights: the published PyTorch file, or its tensors as safetensors; "" downloads it once.

    Raises:
      FileNotFoundError: the file is not there, or cannot be downloaded; says where to get it.
      ValueError: the file holds other tensors.
    """
    path = pathlib.Path(weights).expanduser() if weights else download_inception()
    params = inception.load_params(path)
    digest = hashlib.sha256()
    for name in sorted(params):
        for key in sorted(params[name]):
            digest.update(params[name][key].tobytes())

    def apply(params: inception.Params, images: Array) -> dict[str, Array]:
        if images.shape[-1] == 1:
            images = jnp.repeat(images, 3, axis=-1)
        found = inception.features(params, images)
        layers = {"pool": "2048", "spatial": "spatial", "logits": "logits_unbiased"}
        return {name: found[layer] for name, layer in layers.items()}

    return FeatureSpace("inception", digest.hexdigest()[:16], params, apply)


def pixel_space(size: int) -> FeatureSpace:
    """Values in [-1, 1] of images of `size` values, as vectors.

    Raises:
      ValueError: more than 4096 values: the covariance is `[size, size]`.
    """
    if size > 4096:
        raise ValueError(
            "a Fréchet distance in pixel space is for images of at most 4096 values; these have "
            f"{size}: choose 'inception' or 'autoencoder'"
        )

    def apply(params: Any, images: Array) -> dict[str, Array]:
        return {"pool": images.reshape(len(images), -1).astype(jnp.float32) / 127.5 - 1.0}

    return FeatureSpace("pixels", "", {}, apply)


def autoencoder_space(autoencoder: Autoencoder) -> FeatureSpace:
    """Latents of an autoencoder (means, if it is stochastic), normalised by its shift and scale.

    Averaging halves height and width until at most `MAX_LATENT_FEATURES` values are left: 16 x 16
    x 4 for the SD-VAE at 256 x 256.
    """

    def apply(params: Any, images: Array) -> dict[str, Array]:
        if images.shape[-1] == 1 and autoencoder.name != "identity":
            images = jnp.repeat(images, 3, axis=-1)
        latents = autoencoder.encode(params, images.astype(jnp.float32) / 127.5 - 1.0)
        if autoencoder.stochastic:
            latents = jnp.split(latents, 2, axis=-1)[0]
        latents = (latents - autoencoder.shift) * autoencoder.scale
        while latents[0].size > MAX_LATENT_FEATURES and not any(n % 2 for n in latents.shape[1:3]):
            rows, height, width, channels = latents.shape
            halves = latents.reshape(rows, height // 2, 2, width // 2, 2, channels)
            latents = halves.mean(axis=(2, 4))
        return {"pool": latents.reshape(len(latents), -1)}

    return FeatureSpace("autoencoder", autoencoder.identity, autoencoder.params, apply)


def download_inception(
    folder: pathlib.Path | None = None, url: str = inception.WEIGHTS_URL
) -> pathlib.Path:
    """Returns the path of the published Inception weights, fetched on first use (95 MB).

    The file is kept in `folder`, the user's cache folder by default.

    Raises:
      FileNotFoundError: the fetch failed; says where to get the file, and how to do without.
      ValueError: the file has another SHA-256.
    """
    folder = pathlib.Path(pooch.os_cache("repulsor_jax")) if folder is None else folder
    path = folder / inception.WEIGHTS_NAME
    is_new = not path.is_file()
    if is_new:
        try:
            is_remote = url.startswith("http")
            pooch.retrieve(url, None, fname=path.name, path=folder, progressbar=is_remote)
        except Exception as error:  # of requests, urllib3, the file system
            raise FileNotFoundError(
                f"the Inception weights could not be fetched ({type(error).__name__}). Get "
                f"{inception.WEIGHTS_NAME} from {url} and give its path by "
                f"--config.evaluation.inception_weights, or copy it to {folder}; or do without: "
                "--config.evaluation.features='autoencoder' or 'pixels' gives a Fréchet distance "
                "that is not FID"
            ) from error
    found = file_sha256(path)
    if not found.startswith(inception.WEIGHTS_SHA256):
        if is_new:  # a page of a proxy, perhaps
            path.unlink()
        raise ValueError(
            f"{path}: its SHA-256 is {found[:12]}..., expected {inception.WEIGHTS_SHA256}...: "
            "fetch it anew, or give the path of the right one by "
            "--config.evaluation.inception_weights"
        )
    return path
