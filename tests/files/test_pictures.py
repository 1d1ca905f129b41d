import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from repulsor_jax.files.pictures import save_curves, save_grid, save_samples, to_uint8


def random_images(count, height=8, width=6, channels=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, height, width, channels), np.uint8)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_to_uint8(make):
    levels = np.arange(256)
    x = make((levels / 127.5 - 1).astype(np.float32))
    np.testing.assert_array_equal(to_uint8(x), levels)
    np.testing.assert_array_equal(
        to_uint8(make(np.float32([-9, -1, 0, 1, 9]))), [0, 0, 128, 255, 255]
    )
    assert to_uint8(x).dtype == np.uint8
    np.testing.assert_array_equal(jax.jit(to_uint8)(x), levels)


def test_adm_rounding_is_that_of_its_sampler():
    x = np.linspace(-1.1, 1.1, 4001, dtype=np.float32)
    expected = ((x + 1) * 127.5).clip(0, 255).astype(np.uint8)  # its formula
    different = to_uint8(x, "adm") != expected
    assert different.mean() < 1e-3  # where float32 rounds a whole number otherwise
    assert 0.4 < (to_uint8(x) != to_uint8(x, "adm"))[np.abs(x) < 1].mean() < 0.6


def test_to_uint8_of_bfloat16_is_computed_in_float32():
    x = jnp.linspace(-1, 1, 50, dtype=jnp.bfloat16)
    expected = np.clip(127.5 * np.asarray(x, np.float64) + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(to_uint8(x), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_pixel(tmp_path, channels):
    images = random_images(5, channels=channels)
    save_grid(images, tmp_path / "new" / "grid.png", columns=3, upscale=4)
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert picture.mode == {1: "L", 3: "RGB"}[channels]
        sheet = np.asarray(picture).reshape(picture.height, picture.width, channels)
    border = 1
    assert sheet.shape == (2 * 33 + border, 3 * 25 + border, channels)
    for i, image in enumerate(images):
        top, left = i // 3 * 33 + border, i % 3 * 25 + border
        cell = sheet[top : top + 32, left : left + 24]
        np.testing.assert_array_equal(cell[::4, ::4], image)
        np.testing.assert_array_equal(cell[3::4, 3::4], image)
    assert (sheet[34:, 51:] == 255).all()  # the missing sixth image
    assert (sheet[0] == 255).all()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_grid_labels_stand_above_their_columns(tmp_path):
    images = np.full((4, 8, 8, 1), 200, np.uint8)
    save_grid(images, tmp_path / "a.png", columns=2, upscale=6)
    save_grid(images, tmp_path / "b.png", columns=2, upscale=6, column_labels=["7", ""])
    plain, labelled = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in "ab")
    header = len(labelled) - len(plain)
    assert 8 <= header <= 24
    np.testing.assert_array_equal(labelled[header:], plain)
    ink = np.argwhere(labelled[:header] < 100)
    assert len(ink) > 5
    assert abs(ink[:, 1].mean() - 25) < 3  # the middle of the first column
    save_grid(
        images, tmp_path / "c.png", columns=2, upscale=6, column_labels=["golden retriever"] * 2
    )


def test_a_caption_stands_above_each_image(tmp_path):
    images = np.full((3, 8, 8, 1), 200, np.uint8)
    save_grid(images, tmp_path / "a.png", columns=2, upscale=6)
    save_grid(images, tmp_path / "b.png", columns=2, upscale=6, captions=["7", "", "8"])
    plain, captioned = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in "ab")
    header = (len(captioned) - len(plain)) // 2
    assert 8 <= header <= 24
    for row in range(2):
        start = row * (header + 49)
        ink = np.argwhere(captioned[start : start + header] < 100)
        assert len(ink) > 5
        assert abs(ink[:, 1].mean() - 25) < 3
        cells = captioned[start + header + 1 : start + header + 49]
        np.testing.assert_array_equal(cells, plain[row * 49 + 1 : row * 49 + 49])
    with pytest.raises(ValueError, match="2 captions for 3 images"):
        save_grid(images, tmp_path / "c.png", columns=2, captions=["a", "b"])


def test_grid_wrong_input(tmp_path):
    images = random_images(4)
    for bad, message in [
        (images / 255, "found images float64"),
        (images[0], r"\(8, 6, 3\)"),
        (images[..., :2], r"\(4, 8, 6, 2\)"),
        (images[:0], "found 0 images"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_grid(bad, tmp_path / "g.png", columns=2)
    with pytest.raises(ValueError, match="1 column labels for 2 columns"):
        save_grid(images, tmp_path / "g.png", columns=2, column_labels=["a"])
    assert list(tmp_path.iterdir()) == []


def test_samples_have_adms_layout(tmp_path):
    images, labels = random_images(5), np.arange(5)
    save_samples(tmp_path / "s.npz", iter([images[:2], images[2:]]), labels)
    with np.load(tmp_path / "s.npz") as archive:
        assert archive.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(archive["arr_0"], images)
        np.testing.assert_array_equal(archive["arr_1"], labels)
        assert archive["arr_0"].dtype == np.uint8
    with pytest.raises(ValueError, match=r"labels \(4,\)"):
        save_samples(tmp_path / "t.npz", [images], labels[:4])
    with pytest.raises(ValueError, match=r"found images uint8 \(2, 4, 6, 3\).*'n', 8, 6, 3"):
        save_samples(tmp_path / "t.npz", [images[:3], images[3:, :4]], labels)
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "s.npz"
    save_samples(path, [random_images(2)], np.zeros(2))
    before = path.read_bytes()

    def pieces():
        yield random_images(2)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_samples(path, pieces(), np.zeros(3))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


@pytest.mark.parametrize("channels", [1, 3])
def test_smooth_upscaling_keeps_flat_images_and_places(tmp_path, channels):
    flat = np.stack([np.full((4, 4, channels), level, np.uint8) for level in (10, 200)])
    save_grid(flat, tmp_path / "grid.png", columns=2, upscale=3, smooth=True)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    assert pixels.shape == (14, 27)
    assert (pixels[1:13, 1:13] == 10).all()
    assert (pixels[1:13, 14:26] == 200).all()


def test_curves(tmp_path):
    steps = np.arange(100)
    curves = {"flow": {"": (steps, 1 / (1 + steps))}, "rep": {"a": (steps[::5], -np.ones(20))}}
    save_curves(tmp_path / "loss.png", curves, "training step")
    with Image.open(tmp_path / "loss.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
        assert picture.size == (840, 600)
    blue = np.abs(pixels - (31, 119, 180)).max(axis=1) < 10  # matplotlib's first colour
    upper, lower = np.split(blue, 2)  # a panel each
    assert upper.sum() > 50
    assert lower.sum() > 50
