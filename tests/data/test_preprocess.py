"""Images against PIL's own steps written out, and against colours worked out by hand."""

import io
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from repulsor_jax.data import preprocess
from repulsor_jax.data.listing import Item
from repulsor_jax.data.preprocess import BadImageError, prepare_image, read_images
from tests.oracles import fixtures


def encode(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def raw_png(width, height, depth, colour_type, pixels):
    """A PNG written by hand; `pixels` are its rows, each after a filter byte of 0."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def adm_crop(image, size):
    """The procedure of ADM and DiT, as they state it, on a PIL image."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


# As it is; smaller, portrait; exactly twice; odd, twice and a bit; four times; only cut.
SIZES = [(64, 64), (20, 31), (65, 64), (128, 128), (129, 257), (256, 256), (64, 200), (1, 1)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crop_is_that_of_adm(height, width):
    pixels = noise(height, width, seed=height)
    expected = adm_crop(Image.fromarray(pixels), 64)
    encoded = encode(Image.fromarray(pixels), "png")
    for image in (pixels, encoded):
        found = prepare_image(image, 64, "x")
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, expected)


def test_crop_of_a_photo_sized_jpeg():
    # Smooth colours, so that the JPEG has something to compress.
    pixels = np.array(Image.fromarray(noise(20, 30)).resize((3000, 2000), Image.BICUBIC))
    data = encode(Image.fromarray(pixels), "jpeg", quality=90)
    expected = adm_crop(Image.open(io.BytesIO(data)).convert("RGB"), 256)
    np.testing.assert_array_equal(prepare_image(data, 256, "x"), expected)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_crop_of_arrays_with_other_channels(channels):
    pixels = noise(70, 45, channels)
    found = prepare_image(pixels, 16, "x")
    assert found.shape == (16, 16, channels)
    for c in range(channels):
        expected = adm_crop(Image.fromarray(pixels[..., c]), 16)
        np.testing.assert_array_equal(found[..., c], expected)


def test_crop_of_real_photos():
    folder = fixtures.DATA / "imagenet_sample"
    if not folder.is_dir():
        pytest.skip(f"the sample of ImageNet is not in {folder}; the other crops still run")
    for path in sorted(folder.iterdir())[::5]:
        found = prepare_image(path.read_bytes(), 256, path.name)
        expected = adm_crop(Image.open(path).convert("RGB"), 256)
        np.testing.assert_array_equal(found, expected, err_msg=path.name)


def test_size_zero_leaves_the_image():
    pixels = noise(5, 7)
    np.testing.assert_array_equal(
        prepare_image(encode(Image.fromarray(pixels), "png"), 0, "x"), pixels
    )
    grey = noise(5, 7, 1)
    np.testing.assert_array_equal(prepare_image(grey, 0, "x"), grey)


def colours(image, image_format="png", **options):
    """The pixels of an encoded image of one row, as prepared."""
    found = prepare_image(encode(image, image_format, **options), 0, "x")
    assert found.shape == (image.height, image.width, 3)
    assert found.dtype == np.uint8
    return [tuple(pixel) for pixel in found[0].tolist()]


def row(mode, pixels):
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def test_transparency_is_over_white():
    # alpha 128 / 255 of red over white: 255 - 128 = 127 of green and blue remain.
    pixels = [(255, 0, 0, 128), (10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 51)]
    expected = [(255, 127, 127), (10, 20, 30), WHITE, (204, 204, 204)]
    assert colours(row("RGBA", pixels)) == expected
    assert colours(row("RGBA", pixels), "webp", lossless=True, exact=True) == expected
    assert colours(row("LA", [(0, 128), (7, 255), (7, 0)])) == [(127,) * 3, (7,) * 3, WHITE]


def test_palettes_and_key_colours():
    image = row("P", [0, 1, 2])
    image.putpalette([255, 0, 0, 0, 255, 0, 1, 2, 3])
    assert colours(image) == [(255, 0, 0), (0, 255, 0), (1, 2, 3)]
    assert colours(image, transparency=1) == [(255, 0, 0), WHITE, (1, 2, 3)]
    # An alpha for each palette entry: 0, 128 and 255.
    assert colours(image, transparency=bytes([0, 128, 255])) == [WHITE, (127, 255, 127), (1, 2, 3)]
    assert colours(image, "gif", transparency=2) == [(255, 0, 0), (0, 255, 0), WHITE]
    assert colours(row("RGB", [(1, 2, 3), (4, 5, 6)]), transparency=(4, 5, 6)) == [(1, 2, 3), WHITE]
    assert colours(row("L", [8, 9]), transparency=8) == [WHITE, (9,) * 3]


def test_greyscale():
    assert colours(row("L", [0, 7, 255])) == [BLACK, (7,) * 3, WHITE]
    assert colours(row("1", [0, 255])) == [BLACK, WHITE]


def test_cmyk():
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255)]
    expected = [WHITE, (0, 255, 255), (255, 0, 255), (255, 255, 0), BLACK]
    assert colours(row("CMYK", inks), "tiff") == expected
    for ink, colour in zip(inks, expected, strict=True):
        image = Image.new("CMYK", (16, 16), ink)
        data = encode(image, "jpeg", quality=100)
        assert b"Adobe" in data[:100]  # the marker of inks stored as 255 minus their amount
        found = prepare_image(data, 8, "x").astype(int)
        assert np.abs(found - colour).max() <= 1


def test_ycbcr():
    # With neutral chroma, grey. JPEG stores YCbCr: red comes back as red, to rounding.
    assert colours(row("YCbCr", [(128, 128, 128)]), "tiff") == [(128, 128, 128)]
    found = prepare_image(encode(Image.new("RGB", (16, 16), "red"), "jpeg", quality=100), 0, "x")
    assert np.abs(found.astype(int) - (255, 0, 0)).max() <= 1


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = [0, 128, 129, 257 * 100, 257 * 100 + 128, 40000, 65535]
    expected = [(round(v / 257),) * 3 for v in values]
    big = struct.pack(f">{len(values)}H", *values)
    png = raw_png(len(values), 1, 16, 0, b"\0" + big)
    pgm = b"P5 %d 1 65535\n" % len(values) + big
    little = Image.fromarray(np.array([values], np.uint16))
    for data in (png, pgm, encode(little, "tiff")):
        assert [tuple(p) for p in prepare_image(data, 0, "x")[0].tolist()] == expected
    # Of 16-bit colours, the high byte.
    rgb = raw_png(1, 1, 16, 2, b"\0" + bytes([0x12, 0x34, 0x56, 0x78, 0xFF, 0xFF]))
    assert prepare_image(rgb, 0, "x").tolist() == [[[0x12, 0x56, 0xFF]]]


@pytest.mark.parametrize("image_format", ["png", "tiff", "webp"])
def test_exif_orientation(image_format):
    upright = noise(3, 2)
    # What a camera stores so that the tag's turn or mirroring gives the upright image.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),  # shown by a quarter turn clockwise
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    options = {"lossless": True} if image_format == "webp" else {}
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(np.ascontiguousarray(pixels))
        found = prepare_image(encode(image, image_format, exif=exif, **options), 0, "x")
        np.testing.assert_array_equal(found, upright, err_msg=str(orientation))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_of_a_jpeg_and_damaged_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # stored left, shown at the top
    found = prepare_image(encode(Image.fromarray(pixels), "jpeg", exif=exif), 0, "x")
    assert found.shape == (32, 16, 3)
    assert found[:12].min() > 200
    assert found[20:].max() < 50
    for junk in (b"Exif\0\0 no such thing", b"Exif\0\0MM\0*\xff\xff\xff\xff", b""):
        data = encode(Image.fromarray(pixels), "png", exif=junk)
        np.testing.assert_array_equal(prepare_image(data, 0, "x"), pixels)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    for image_format in ("gif", "webp"):
        options = {"lossless": True} if image_format == "webp" else {}
        data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
        found = prepare_image(data, 0, "x")
        np.testing.assert_array_equal(found, np.full((3, 4, 3), (255, 0, 0), np.uint8))


PHOTO = encode(Image.fromarray(noise(40, 50)), "jpeg")
PNG = encode(Image.fromarray(noise(40, 50)), "png")
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
BAD = {
    "empty": (b"", "x.jpg: the file is empty"),
    "text": (
        b"Not found, sorry",
        r"x.jpg: not an image in one of .* begins with b'Not found, sorry'",
    ),
    "program": (POSTSCRIPT, "x.jpg: not an image in one of the formats"),
    "cut jpeg": (PHOTO[: len(PHOTO) // 2], "x.jpg: damaged or cut short, JPEG .* truncated"),
    "cut png": (PNG[: len(PNG) // 2], "x.jpg: damaged or cut short, PNG .* truncated"),
    "narrow": (
        encode(Image.new("L", (6000, 1)), "png"),
        "x.jpg: 6000 x 1 is too long and narrow, .* 1536000 x 256",
    ),
    "32 bits": (
        encode(Image.fromarray(np.array([[-1, 70000]], np.int32)), "tiff"),
        "x.jpg: found grey values from -1 to 70000, expected 16 bits",
    ),
    "floats": (
        encode(Image.fromarray(np.ones((2, 2), np.float32)), "tiff"),
        "x.jpg: found colour mode F",
    ),
    "flat array": (np.ones((2, 2), np.uint8), r"x.jpg: found an array of uint8 \(2, 2\), expected"),
}


@pytest.mark.parametrize(("image", "message"), BAD.values(), ids=BAD)
def test_bad_images(image, message):
    with pytest.raises(BadImageError, match=message):
        prepare_image(image, 256, "x.jpg")


def test_the_limit_itself_is_allowed(monkeypatch):
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 110)
    assert prepare_image(encode(Image.new("L", (10, 11)), "png"), 0, "x").shape == (11, 10, 3)
    with pytest.raises(BadImageError, match="more than 110 pixels.*found 10 x 12"):
        prepare_image(encode(Image.new("L", (10, 12)), "png"), 0, "x")


class Source:
    def __getitem__(self, index):
        if index == 0:
            return Item(encode(Image.new("L", (6, 6), 9), "png"), 3, "good.png")
        if index == 1:
            return Item(b"", 4, "bad.png")
        if index == 2:
            raise FileNotFoundError(2, "No such file", "lost.png")
        if index == 3:
            raise OSError("the disk is gone")
        raise RuntimeError("a bug")


def with_chunk(data, kind, content, *, at_the_end):
    """A PNG with another chunk, after its header or before its end."""
    place = len(data) - 12 if at_the_end else 33
    chunk = struct.pack(">I", len(content)) + kind + content
    return data[:place] + chunk + struct.pack(">I", zlib.crc32(kind + content)) + data[place:]


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize(
    ("kind", "head"),
    [(b"iCCP", b"profile\0\0"), (b"zTXt", b"note\0\0"), (b"iTXt", b"note\0\1\0\0\0")],
)
def test_a_png_with_a_large_profile_or_text_is_its_pixels(kind, head, at_the_end):
    pixels = noise(6, 5)
    data = encode(Image.fromarray(pixels), "PNG")
    large = head + zlib.compress(bytes(5 * 2**20))
    data = with_chunk(data, kind, large, at_the_end=at_the_end)
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(data)).load()
    np.testing.assert_array_equal(prepare_image(data, 0, "x.png"), pixels)
    with pytest.raises(BadImageError, match=r"x\.png: .*(damaged|cut short)"):
        prepare_image(data[:40], 0, "x.png")


def test_read_images():
    images, labels = read_images(Source(), [2, 0, 1, 3], 4)
    assert labels.tolist() == [-1, 3, 4, -1]
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(images[1], np.full((4, 4, 3), 9, np.uint8))
    errors = [images[i] for i in (0, 2, 3)]
    assert all(isinstance(error, BadImageError) for error in errors)
    assert [str(error) for error in pickle.loads(pickle.dumps(errors))] == [
        "lost.png: cannot be read: No such file",
        "bad.png: the file is empty",
        "item 3: cannot be read: the disk is gone",
    ]
    with pytest.raises(RuntimeError, match="a bug"):
        read_images(Source(), [4], 4)


def test_workers_start_without_jax():
    code = (
        "import sys, repulsor_jax.data.preprocess, repulsor_jax.data.sources;"
        "print({'jax', 'sklearn', 'tensorflow_datasets', 'grain'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
