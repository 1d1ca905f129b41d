import io
import zipfile

import numpy as np
import pytest

from repulsor_jax.evaluation import reference
from repulsor_jax.files.pictures import save_samples

IMAGES = np.random.default_rng(0).integers(0, 256, (11, 6, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def statistics():
    """As an ADM file has them, but for diagonal covariances."""
    rng = np.random.default_rng(1)
    sizes = {"": 2048, "_s": 2023}
    arrays = {f"mu{key}": rng.standard_normal(size) for key, size in sizes.items()}
    return arrays | {f"sigma{key}": np.diag(rng.uniform(0, 1, n)) for key, n in sizes.items()}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_in_batches(tmp_path, save):
    path = tmp_path / "samples.npz"
    save(path, IMAGES, np.arange(11))
    images = reference.open_images(path, size=(6, 8))
    assert len(images) == 11
    for parts in ([range(11)], [range(3), range(3, 11)], [range(2, 5), range(0), range(9, 11)]):
        for part, batch in zip(parts, images.read(parts), strict=True):
            np.testing.assert_array_equal(batch, IMAGES[part.start : part.stop])
    assert reference.read_statistics(path) is None


def test_our_own_samples_open(tmp_path):
    save_samples(tmp_path / "ours.npz", [IMAGES[:4], IMAGES[4:]], np.arange(11))
    (found,) = reference.open_images(tmp_path / "ours.npz").read([range(11)])
    np.testing.assert_array_equal(found, IMAGES)


def test_one_batch_of_a_large_array_takes_little_memory(tmp_path):
    # 64 GiB of images that are not there: the member says so, and is read no further.
    path = tmp_path / "large.npz"
    header = io.BytesIO()
    shape = (2**34 // 12, 2, 2, 3)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + IMAGES.tobytes())
    images = reference.open_images(path)
    first = next(images.read([range(4)]))
    np.testing.assert_array_equal(first.ravel(), IMAGES.ravel()[: first.size])
    with pytest.raises(ValueError, match=r"large.npz: arr_0 ends in image 132 of .*truncated"):
        list(images.read([range(100), range(100, 200)]))


def test_precomputed_statistics(tmp_path, statistics):
    path = tmp_path / "VIRTUAL_imagenet.npz"
    np.savez(path, arr_0=IMAGES, arr_1=np.arange(11), **statistics)
    for gaussian, key in zip(reference.read_statistics(path), ("", "_s"), strict=True):
        np.testing.assert_array_equal(gaussian.mean, statistics[f"mu{key}"])
        np.testing.assert_array_equal(gaussian.covariance, statistics[f"sigma{key}"])
        assert gaussian.count is None
    assert reference.holds_images(path)

    np.savez(path, mu=statistics["mu"], sigma=statistics["sigma"], count=50_000)
    pool, spatial = reference.read_statistics(path)
    assert (pool.count, spatial) == (50_000, None)
    with pytest.raises(ValueError, match="found mu, sigma, count, expected images under arr_0"):
        reference.open_images(path)


def test_wrong_statistics(tmp_path, statistics):
    path = tmp_path / "wrong.npz"
    only = lambda *keys: {key: statistics[key] for key in keys}
    cases = [
        (only("mu"), "found mu, but no sigma, expected floats"),
        (only("mu_s", "sigma_s"), "found mu_s, sigma_s, but no mu,"),
        (only("mu", "sigma", "sigma_s"), "but no mu_s,"),
        ({"x": np.zeros(3)}, r"found x, expected mu and sigma .*arr_0"),
        (
            {"mu": statistics["mu_s"], "sigma": statistics["sigma_s"]},
            r"mu: found float64 \[2023\], expected floats \[2048\]",
        ),
        (only("mu") | {"sigma": np.eye(2048, k=1)}, "differs from its transpose by up to 1"),
        (only("mu") | {"sigma": np.eye(2048) * np.nan}, "sigma: found values that are not finite"),
        (only("mu") | {"sigma": np.eye(2048).astype(int)}, "sigma: found int64"),
        ({"mu": np.array([None]), "sigma": np.eye(3)}, r"mu: found object \[1\], expected floats"),
    ]
    for arrays, message in cases:
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=f"wrong.npz: .*{message}"):
            reference.read_statistics(path)


def test_wrong_images(tmp_path):
    path = tmp_path / "wrong.npz"
    cases = [
        ({"arr_0": IMAGES.astype(np.float32)}, r"found arr_0 float32 \(11, 6, 8, 3\)"),
        ({"arr_0": IMAGES[..., :2]}, r"\(11, 6, 8, 2\), expected uint8 \[N, H, W, 3 or 1\]"),
        ({"arr_0": IMAGES[0]}, r"uint8 \(6, 8, 3\)"),
        ({"arr_0": IMAGES[:0]}, r"uint8 \(0, 6, 8, 3\)"),
        ({"arr_0": np.asfortranarray(IMAGES)}, "Fortran order"),
        ({"arr_0": np.array([None])}, "found arr_0 object"),
        ({"images": IMAGES}, "found images, expected images under arr_0"),
        ({"arr_0": IMAGES}, "found images of 6 x 8, expected 256 x 256.*resolution"),
    ]
    for arrays, message in cases:
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=f"wrong.npz: .*{message}"):
            reference.open_images(path, size=(256, 256))


@pytest.mark.parametrize("read", [reference.open_images, reference.read_statistics])
def test_wrong_files(tmp_path, read):
    path = tmp_path / "adm.npz"
    with pytest.raises(FileNotFoundError, match=r"adm.npz: found no such file.*guided-diffusion"):
        read(path)
    np.savez(path, arr_0=IMAGES)
    whole = path.read_bytes()
    for content in (b"", b"not a zip", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"adm.npz: found a file that is not a whole .npz"):
            read(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("arr_0", "mu"):
            archive.writestr(f"{name}.npy", b"not an array")
    with pytest.raises(ValueError, match=r"adm.npz: (arr_0|mu): "):
        read(path)


def test_flipped_bytes_are_found(tmp_path):
    path = tmp_path / "damaged.npz"
    np.savez(path, arr_0=IMAGES)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged.npz: .*not a whole .npz"):
        list(reference.open_images(path).read([range(11)]))
