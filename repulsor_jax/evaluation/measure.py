"""From images to numbers: the feature pass, the reference, and every metric that they allow."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from repulsor_jax import sharding
from repulsor_jax.evaluation import frechet, scores
from repulsor_jax.evaluation.features import FeatureSpace
from repulsor_jax.evaluation.image_sets import ImageSet, device_batches
from repulsor_jax.evaluation.precision_recall import NEIGHBOURS, precision_recall
from repulsor_jax.files import locks
from repulsor_jax.files.shards import Arrays, Shards, fill, job_name, one_late, whole_batches
from repulsor_jax.inference.generator import Generator, Guidance, draw_batches

Array = jax.Array
Extract = Callable[[Array], dict[str, Array]]

_PER_SHARD = 1024  # images whose features are one file; a stopped job loses as many at most


@dataclasses.dataclass(frozen=True)
class Reference:
    """What samples are compared with; None stands for what is unknown."""

    description: dict[str, Any]  # for reports: name, digest, number of images, and of `features`
    pool: frechet.GaussianStatistics  # of the features of the Fréchet distance
    spatial: frechet.GaussianStatistics | None = None  # of Inception's spatial features, for sFID
    features: np.ndarray | None = None  # [M, D] of some images, for KID, precision and recall


def make_extractor(space: FeatureSpace, mesh: Mesh) -> Extract:
    """Returns images `[B, H, W, C]` -> features on every device; compiled once for each size."""
    everywhere = sharding.replicated(mesh)
    params = jax.device_put(space.params, everywhere)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = _eigen_convolutions() if on_cpu else {}
    apply = jax.jit(space.apply, out_shardings=everywhere, compiler_options=options)

    def extract(images: Array) -> dict[str, Array]:
        with sharding.use_mesh(mesh):
            return apply(params, images)

    return extract


@functools.cache
def _eigen_convolutions() -> dict[str, str]:
    """Options by which XLA on a CPU computes convolutions with Eigen, where it knows them.

    Inception takes 0.5 of the time that it takes with YNNPACK, which jax 0.10 would choose, and
    0.85 with jax 0.12 (docs/evaluation.md).
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
        return options
    return {}


def sample_features(
    generator: Generator,
    params: Any,
    guidance: Guidance | None,
    count: int,
    extract: Extract,
    folder: pathlib.Path,
    title: str,
) -> Shards:
    """Features of the first `count` samples; the samples themselves are not kept.

    A job that was stopped goes on with the shards that are missing in `folder`.

    Raises:
      SamplingError: a sample is not a finite number.
    """
    shards = Shards(folder, count, whole_batches(_PER_SHARD, generator.batch_size))
    fill(shards, lambda r: draw_batches(generator, params, r, guidance, extract), title=title)
    return shards


def image_features(
    images: ImageSet, batch_size: int, extract: Extract, mesh: Mesh, folder: pathlib.Path
) -> Shards:
    """Features of a set of images; restartable as `sample_features` is.

    The batch size is rounded up to a multiple of the mesh's batch shards.
    """
    batch_size = -(-batch_size // sharding.batch_shards(mesh)) * sharding.batch_shards(mesh)
    params = jax.device_put(images.params, sharding.replicated(mesh))
    decode = jax.jit(images.decode, out_shardings=sharding.batch_sharding(mesh))

    def produce(parts: Sequence[range]) -> Iterator[Arrays]:
        started = (
            (numbers, extract(decode(params, items)))
            for numbers, items in device_batches(images, parts, batch_size, mesh)
        )
        for numbers, device_arrays in one_late(started):
            features = sharding.to_host(device_arrays)
            yield {name: array[: len(numbers)] for name, array in features.items()}

    shards = Shards(folder, images.count, whole_batches(_PER_SHARD, batch_size))
    fill(shards, produce, title=f"features of {images.name}")
    return shards


def image_reference(
    images: ImageSet,
    *,
    keep: int,
    batch_size: int,
    space: FeatureSpace,
    extract: Extract,
    mesh: Mesh,
    cache: pathlib.Path,
) -> Reference | None:
    """Statistics and features of a set of images, computed once and kept in `cache`.

    The features of `keep` images, evenly spaced, are kept; the statistics are of all. Returns None
    on processes but the first.
    """
    is_main = jax.process_index() == 0
    content = [images.digest, str(images.count), str(images.shape), space.name, space.digest]
    name = job_name([*content, str(min(keep, images.count))])
    kept = Shards(cache / name, 1, 1)
    # A run that evaluates as it trains may be followed by another job, for the same reference.
    with locks.locked(cache / name, enabled=is_main):
        with sharding.raised_on_all():
            is_missing = is_main and not kept.is_finished(0)
        if sharding.agree(int(is_missing)):
            folder = cache / f".{name}.incomplete"
            shards = image_features(images, batch_size, extract, mesh, folder)
            with sharding.raised_on_all():
                if is_main:
                    kept.write(0, [_reference_arrays(shards, keep)])
                    shards.remove()
    if not is_main:
        return None
    found = {key: next(kept.read(key))[0] for key in kept.names()}
    features = found["features"]
    about = {"name": images.name, "digest": images.digest, "images": images.count}
    gaussians = [
        frechet.GaussianStatistics(found[f"{key}_mean"], found[f"{key}_cov"], images.count)
        for key in ("pool", "spatial")
        if f"{key}_mean" in found
    ]
    spatial = gaussians[1] if len(gaussians) > 1 else None
    return Reference(about | {"features": len(features)}, gaussians[0], spatial, features)


def _reference_arrays(shards: Shards, keep: int) -> Arrays:
    """Gaussians, and the features of `keep` evenly spaced images, each as one item `[1, ...]`."""
    chosen = np.linspace(0, shards.count - 1, min(keep, shards.count)).round().astype(int)
    found: Arrays = {}
    for name in sorted({"pool", "spatial"} & set(shards.names())):
        statistics = frechet.fit_gaussian(shards.read(name))
        found |= {f"{name}_mean": statistics.mean[None], f"{name}_cov": statistics.covariance[None]}
    kept = []
    for shard, part in enumerate(shards.read("pool")):
        rows = shards.rows(shard)
        kept.append(part[chosen[(chosen >= rows.start) & (chosen < rows.stop)] - rows.start])
    return found | {"features": np.concatenate(kept)[None]}


def metrics(
    shards: Shards, reference: Reference, space: FeatureSpace
) -> tuple[dict[str, float], list[str]]:
    """Every metric that the features and the reference allow, by name.

    Also returns warnings of metrics that are left out or not to be trusted.

    Raises:
      ValueError: features that are not finite, or of another dimension than the reference's.
    """
    values: dict[str, float] = {}
    warnings: list[str] = []
    for name, label, gaussian in (
        ("pool", space.metric, reference.pool),
        ("spatial", "sfid", reference.spatial),
    ):
        if name not in shards.names():
            continue
        if gaussian is None:
            warnings.append("the reference has no spatial statistics: no sFID")
            continue
        statistics = frechet.fit_gaussian(shards.read(name))
        for who, each in (("samples", statistics), ("reference", gaussian)):
            if warning := frechet.too_few_samples(each):
                warnings.append(f"{label}, {who}: {warning}")
        values[label] = frechet.frechet_distance(statistics, gaussian)
    if space.name != "inception":
        return values, warnings

    logits = np.concatenate(list(shards.read("logits")))
    adm = scores.adm_inception_score(logits)
    values |= {"inception_score": adm.mean, "inception_score_std": adm.std}
    if shards.count >= scores.SPLITS:
        values["inception_score_shuffled"] = scores.inception_score(logits).mean
    del logits
    if reference.features is None:
        warnings.append("the reference holds statistics alone: no KID, precision, recall")
        return values, warnings
    pool = np.concatenate(list(shards.read("pool")))
    fewest = min(len(pool), len(reference.features))
    if fewest >= scores.SUBSET_SIZE:
        kid = scores.kernel_distance(pool, reference.features)
        values |= {"kid": kid.mean, "kid_std": kid.std}
    else:
        warnings.append(
            f"found {fewest} images, KID needs {scores.SUBSET_SIZE} on both sides: left out"
        )
    if fewest > NEIGHBOURS:
        shares = precision_recall(samples=pool, reference=reference.features)
        values |= {"precision": shares.precision, "recall": shares.recall}
    return values, warnings
