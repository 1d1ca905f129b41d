"""Evaluation against torch-fidelity, end to end; and precision and recall of 50,000 by 50,000.

    python -m benchmarks.evaluation --part=parity --source=archive --source_path=cifar10.tar.xz
    python -m benchmarks.evaluation --part=precision_recall --count=50000

parity: two halves of a set of images, with random Inception weights unless --weights names the
published file, are compared by `--mode=evaluate` and by torch-fidelity (`pip install '.[parity]'`):
every metric of both, and images/s of the feature pass. precision_recall: seconds and peak memory
for random features of 2,048 dimensions; no images.
"""

import argparse
import pathlib
import resource
import tempfile
import time

import numpy as np

THEIRS = {
    "fid": "frechet_inception_distance",
    "inception_score_shuffled": "inception_score_mean",
    "kid": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", required=True, choices=["parity", "precision_recall"])
    parser.add_argument("--source", default="folder", help="parity: folder or archive")
    parser.add_argument("--source_path", default="", help="parity: the folder or archive")
    parser.add_argument("--split", default="test", help="parity: which part of it; . is all")
    parser.add_argument("--size", type=int, default=32, help="parity: side of the images")
    parser.add_argument("--count", type=int, default=1000, help="images or features on each side")
    parser.add_argument("--weights", default="", help="parity: Inception's; random without")
    args = parser.parse_args()
    if args.part == "precision_recall":
        precision_recall(args.count)
    else:
        parity(args)


def parity(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        halves = read_halves(args, folder)
        weights = pathlib.Path(args.weights) if args.weights else random_weights(folder)
        ours, seconds = measured_here(folder, halves, weights)
        theirs, their_seconds = measured_by_torch_fidelity(halves, weights)
    print(f"\n{args.count} images of {args.size} x {args.size} on each side\n")
    print("| | repulsor_jax | torch-fidelity | relative difference |\n|---|---|---|---|")
    for name, their_name in THEIRS.items():
        a, b = ours[name], theirs[their_name]
        print(f"| {name} | {a:.8g} | {b:.8g} | {abs(a - b) / max(abs(b), 1e-30):.1e} |")
    rates = [2 * args.count / s for s in (seconds, their_seconds)]
    print(
        f"| images/s, all in all | {rates[0]:.1f} | {rates[1]:.1f} | x {rates[0] / rates[1]:.2f} |"
    )


def read_halves(args: argparse.Namespace, folder: pathlib.Path) -> list[np.ndarray]:
    """Evenly spaced images of the source: the even ones, and the odd ones."""
    from repulsor_jax.data.preprocess import read_images
    from repulsor_jax.data.sources import open_source

    source = open_source(args.source, args.split, path=args.source_path, cache_dir=folder)
    chosen = np.linspace(0, len(source) - 1, 2 * args.count).round().astype(int).tolist()
    images, _ = read_images(source, chosen, args.size)
    return [np.stack(images[k::2]) for k in range(2)]  # type: ignore[arg-type]


def random_weights(folder: pathlib.Path) -> pathlib.Path:
    import torch

    from repulsor_jax.evaluation import inception
    from tests.oracles.inception import random_tensor

    state = {n: torch.from_numpy(random_tensor(n, s)) for n, s in inception.tensor_shapes().items()}
    path = folder / "weights.pth"
    torch.save(state, path)
    return path


def measured_here(
    folder: pathlib.Path, halves: list[np.ndarray], weights: pathlib.Path
) -> tuple[dict[str, float], float]:
    from configs import default
    from repulsor_jax.config import parse
    from repulsor_jax.evaluate import evaluate
    from repulsor_jax.files.pictures import save_samples

    for name, images in zip(("samples", "reference"), halves, strict=True):
        save_samples(folder / f"{name}.npz", [images], np.zeros(len(images)))
    c = default.get_config()
    c.evaluation.update(
        samples=str(folder / "samples.npz"),
        reference=str(folder / "reference.npz"),
        inception_weights=str(weights),
        batch_size=50,
    )
    started = time.perf_counter()
    (record,) = evaluate(parse(c), folder)
    return record["metrics"], time.perf_counter() - started


def measured_by_torch_fidelity(
    halves: list[np.ndarray], weights: pathlib.Path
) -> tuple[dict[str, float], float]:
    from tests.oracles.inception import import_torch_fidelity

    torch_fidelity = import_torch_fidelity()
    import torch

    class Images(torch.utils.data.Dataset):
        def __init__(self, images: np.ndarray) -> None:
            self._images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())

        def __len__(self) -> int:
            return len(self._images)

        def __getitem__(self, index: int) -> torch.Tensor:
            return self._images[index]

    started = time.perf_counter()
    found = torch_fidelity.calculate_metrics(
        input1=Images(halves[0]),
        input2=Images(halves[1]),
        cuda=False,
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        batch_size=50,
        cache=False,
        verbose=False,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
    )
    return found, time.perf_counter() - started


def precision_recall(count: int) -> None:
    from repulsor_jax.evaluation import precision_recall as module

    rng = np.random.default_rng(0)
    samples, reference = (
        np.float32(mean) + rng.standard_normal((count, 2048), dtype=np.float32) ** 2
        for mean in (0.01, 0.0)
    )
    given = samples.nbytes + reference.nbytes
    started = time.perf_counter()
    found = module.precision_recall(samples=samples, reference=reference)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    products = 4 * 2 * count**2 * 2048  # two sets of radii, two of membership tests
    print("| images on each side | seconds | GFLOP/s of the distances | features | peak memory |")
    print("|---|---|---|---|---|")
    print(
        f"| {count:,} | {seconds:.0f} | {products / seconds / 1e9:.0f} | {given / 2**30:.2f} GiB "
        f"| {peak / 2**30:.2f} GiB |"
    )
    print(found)


if __name__ == "__main__":
    main()
