"""InceptionV3 as the FID reference graph has it; its features, and its weights by path.

The graph is TensorFlow's of 2015-12-05 (`classify_image_graph_def.pb`), which FID was defined on
(Heusel et al. 2017) and the ADM suite (arXiv 2105.05233) still runs. It departs from Szegedy et al.
(arXiv 1512.00567) and from torchvision in four ways, all kept here: images are resized to 299 by
TensorFlow 1's bilinear rule, which puts pixel 0 of both grids on the same spot and does not smooth
when it shrinks; average pools leave the padding out of the mean; the last block pools by maximum;
and there are 1008 logits.

Everything is float32, NHWC, with full-precision products on accelerators whose default is less.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from repulsor_jax.files import tensors as tensor_files

Array = jax.Array
Params = dict[str, dict[str, np.ndarray]]

SIZE = 299
WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d"  # the first digits of the file's SHA-256, as its name says
WEIGHTS_URL = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_NAME}"
)

_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


# (name of the PyTorch module, x, features, kernel=(1, 1), stride=1, padding="SAME") -> Array
_Convolution = Callable[..., Array]


def features(params: Params, images: Array | np.ndarray) -> dict[str, Array]:
    """Features of images at every layer that a metric uses; jit computes those that are returned.

    Args:
      params: from `load_params`.
      images: uint8 `[B, H, W, 3]`, RGB, of any size.

    Returns:
      float32 arrays:

      - "64", "192", "768": the mean over positions after the first and second max pool and after
        the last 17 x 17 block, `[B, 64]` and so on;
      - "2048": the pooled features of FID, KID, precision and recall, `[B, 2048]` (TF `pool_3`);
      - "logits", and "logits_unbiased" without the bias of the last layer, which the Inception
        Score is computed from, `[B, 1008]`;
      - "spatial": the features of sFID, `[B, 2023]`: 7 channels at 17 x 17 positions, channels
        fastest.

      The spatial features are `mixed_6/conv:0`, channels 0 to 6, in the ADM suite's evaluator.
      In PyTorch's names that is `Mixed_6d.branch1x1` after batch norm and ReLU. That is read, not
      checked by running the TensorFlow graph: converters that wrote the PyTorch weights map one
      name to the other, and the graph's list of operations ends every convolution's group with
      the operation that bears the bare name, which the next layer reads: its ReLU.

    Raises:
      ValueError: the images are not uint8 `[B, H, W, 3]`.
    """
    return activations(params, preprocess(images))


def preprocess(images: Array | np.ndarray) -> Array:
    """The graph's input: images uint8 `[B, H, W, 3]` resized to 299, (x - 128) / 128, float32.

    The resize is TensorFlow 1's `resize_bilinear(align_corners=False)`: output pixel i reads the
    input at i * H / 299, between its two neighbours, the last pixel repeated.

    Raises:
      ValueError: the images are not uint8 `[B, H, W, 3]`.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"found images {images.dtype} {images.shape}, expected uint8 [B, H, W, 3], RGB"
        )
    x = jnp.asarray(images).astype(jnp.float32)
    for axis in (2, 1):
        low, high, fraction = _resize_rule(x.shape[axis])
        shape = [1, 1, 1, 1]
        shape[axis] = SIZE
        left, right = jnp.take(x, low, axis), jnp.take(x, high, axis)
        x = left + (right - left) * fraction.reshape(shape)
    return (x - 128.0) / 128.0


def _resize_rule(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each output pixel: the input pixels on either side, and its distance from the first."""
    position = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
    low = position.astype(np.int32)
    return low, np.minimum(low + 1, size - 1), position - low.astype(np.float32)


def activations(params: Params, x: Array) -> dict[str, Array]:
    """What `features` returns, from an input that `preprocess` made, float32 `[B, 299, 299, 3]`."""

    def convolution(name: str, x: Array, *shape: Any, **steps: Any) -> Array:
        return jax.nn.relu(_convolve(x, params[name]["kernel"], **steps) + params[name]["bias"])

    layers = _network(convolution, x)
    unbiased = jnp.dot(layers["2048"], params["fc"]["kernel"], precision=lax.Precision.HIGHEST)
    return {**layers, "logits": unbiased + params["fc"]["bias"], "logits_unbiased": unbiased}


def _network(conv: _Convolution, x: Array) -> dict[str, Array]:
    """The whole network up to the pooled features; the names are the PyTorch port's."""
    layers = {}
    x = conv("Conv2d_1a_3x3", x, 32, (3, 3), stride=2, padding="VALID")
    x = conv("Conv2d_2a_3x3", x, 32, (3, 3), padding="VALID")
    x = conv("Conv2d_2b_3x3", x, 64, (3, 3))
    x = _max_pool(x, stride=2)
    layers["64"] = _mean(x)
    x = conv("Conv2d_3b_1x1", x, 80)
    x = conv("Conv2d_4a_3x3", x, 192, (3, 3), padding="VALID")
    x = _max_pool(x, stride=2)
    layers["192"] = _mean(x)
    x = _block_35(conv, "Mixed_5b", x, 32)
    x = _block_35(conv, "Mixed_5c", x, 64)
    x = _block_35(conv, "Mixed_5d", x, 64)
    x = _reduce_to_17(conv, "Mixed_6a", x)
    x = _block_17(conv, "Mixed_6b", x, 128)
    x = _block_17(conv, "Mixed_6c", x, 160)
    x = _block_17(conv, "Mixed_6d", x, 160)
    # branch1x1 comes first in the block's output.
    layers["spatial"] = x[..., :7].reshape(len(x), -1)
    x = _block_17(conv, "Mixed_6e", x, 192)
    layers["768"] = _mean(x)
    x = _reduce_to_8(conv, "Mixed_7a", x)
    x = _block_8(conv, "Mixed_7b", x, _average_pool)
    x = _block_8(conv, "Mixed_7c", x, lambda x: _max_pool(x, stride=1, padding="SAME"))
    layers["2048"] = _mean(x)
    return layers


def _block_35(conv: _Convolution, name: str, x: Array, pool_features: int) -> Array:
    return _join(
        conv(f"{name}.branch1x1", x, 64),
        _chain(conv, f"{name}.branch5x5", x, (48,), (64, (5, 5))),
        _chain(conv, f"{name}.branch3x3dbl", x, (64,), (96, (3, 3)), (96, (3, 3))),
        conv(f"{name}.branch_pool", _average_pool(x), pool_features),
    )


def _reduce_to_17(conv: _Convolution, name: str, x: Array) -> Array:
    half = {"stride": 2, "padding": "VALID"}
    return _join(
        conv(f"{name}.branch3x3", x, 384, (3, 3), **half),
        _chain(conv, f"{name}.branch3x3dbl", x, (64,), (96, (3, 3)), (96, (3, 3)), **half),
        _max_pool(x, stride=2),
    )


def _block_17(conv: _Convolution, name: str, x: Array, width: int) -> Array:
    row, column = (1, 7), (7, 1)
    both = (width, column), (width, row)
    return _join(
        conv(f"{name}.branch1x1", x, 192),
        _chain(conv, f"{name}.branch7x7", x, (width,), (width, row), (192, column)),
        _chain(conv, f"{name}.branch7x7dbl", x, (width,), *both, (width, column), (192, row)),
        conv(f"{name}.branch_pool", _average_pool(x), 192),
    )


def _reduce_to_8(conv: _Convolution, name: str, x: Array) -> Array:
    half = {"stride": 2, "padding": "VALID"}
    sevens = (192, (1, 7)), (192, (7, 1))
    return _join(
        _chain(conv, f"{name}.branch3x3", x, (192,), (320, (3, 3)), **half),
        _chain(conv, f"{name}.branch7x7x3", x, (192,), *sevens, (192, (3, 3)), **half),
        _max_pool(x, stride=2),
    )


def _block_8(conv: _Convolution, name: str, x: Array, pool: Callable[[Array], Array]) -> Array:
    three = conv(f"{name}.branch3x3_1", x, 384)
    double = _chain(conv, f"{name}.branch3x3dbl", x, (448,), (384, (3, 3)))
    return _join(
        conv(f"{name}.branch1x1", x, 320),
        conv(f"{name}.branch3x3_2a", three, 384, (1, 3)),
        conv(f"{name}.branch3x3_2b", three, 384, (3, 1)),
        conv(f"{name}.branch3x3dbl_3a", double, 384, (1, 3)),
        conv(f"{name}.branch3x3dbl_3b", double, 384, (3, 1)),
        conv(f"{name}.branch_pool", pool(x), 192),
    )


def _chain(conv: _Convolution, name: str, x: Array, *sizes: tuple, **last: Any) -> Array:
    """Convolutions `<name>_1`, `<name>_2` and on, by (features, kernel); `last` is of the last."""
    for k, size in enumerate(sizes, 1):
        x = conv(f"{name}_{k}", x, *size, **(last if k == len(sizes) else {}))
    return x


def _join(*branches: Array) -> Array:
    return jnp.concatenate(branches, axis=-1)


def _convolve(
    x: Array, kernel: Array | np.ndarray, stride: int = 1, padding: str = "SAME"
) -> Array:
    return lax.conv_general_dilated(
        x,
        jnp.asarray(kernel),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )


def _mean(x: Array) -> Array:
    return x.mean(axis=(1, 2))


def _max_pool(x: Array, *, stride: int, padding: str = "VALID") -> Array:
    return _pool(x, -jnp.inf, lax.max, stride, padding)


def _average_pool(x: Array) -> Array:
    """Mean over 3 x 3 neighbours, of those inside the image."""
    total = _pool(x, 0.0, lax.add, 1, "SAME")
    three = np.ones(3, np.float32)
    rows, columns = (np.convolve(np.ones(n, np.float32), three, "same") for n in x.shape[1:3])
    return total / np.outer(rows, columns)[None, :, :, None]


def _pool(x: Array, init: float, combine: Callable, stride: int, padding: str) -> Array:
    """Combines 3 x 3 neighbours, along columns and then along rows: 6 values instead of 9."""
    x = lax.reduce_window(x, init, combine, (1, 3, 1, 1), (1, stride, 1, 1), padding)
    return lax.reduce_window(x, init, combine, (1, 1, 3, 1), (1, 1, stride, 1), padding)


def load_params(path: str | os.PathLike[str]) -> Params:
    """Reads the weights from the published PyTorch file, or a .safetensors file of its tensors.

    Raises:
      FileNotFoundError: there is no such file; the message says where to get it.
      ValueError: the file cannot be read, or does not hold exactly the tensors that
        `tensor_shapes` lists; names the file.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(
            f"{path}: found no Inception weights; get {WEIGHTS_NAME} from {WEIGHTS_URL}, or do "
            "without: a Fréchet distance of pixels or latents needs none, and is not called FID"
        )
    return params_from_state_dict(tensor_files.read_tensors(path), source=path)


def params_from_state_dict(
    state: Mapping[str, np.ndarray], *, source: str | os.PathLike[str] = "the Inception weights"
) -> Params:
    """Converts a state dict of the FID Inception's PyTorch port.

    Batch norm is folded into each convolution's kernel and a bias, in float64.

    Args:
      state: tensor names to arrays, those that `tensor_shapes` lists; `num_batches_tracked`, a
        counter, is ignored.
      source: for errors.

    Returns:
      For each convolution, by its PyTorch name, and for "fc": "kernel" (HWIO, or `[2048, 1008]`)
      and "bias", float32.

    Raises:
      ValueError: a tensor is missing, superfluous, of another shape or not finite; names the
        first one, what was found and what was expected.
    """
    tensors = {k: np.asarray(v) for k, v in state.items() if not k.endswith("num_batches_tracked")}
    expected = tensor_shapes()
    tensor_files.check_tensors(tensors, expected, source)
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{source}: {name}: found values that are not finite numbers")
    params: Params = {}
    for tensor_name in expected:
        if tensor_name.endswith(".conv.weight"):
            name = tensor_name.removesuffix(".conv.weight")
            gamma, beta, mean, variance = (
                tensors[f"{name}.bn.{key}"].astype(np.float64) for key in _BATCH_NORM
            )
            scale = gamma / np.sqrt(variance + 1e-3)
            kernel = tensors[tensor_name].transpose(2, 3, 1, 0) * scale
            params[name] = _layer(kernel, beta - mean * scale)
    params["fc"] = _layer(tensors["fc.weight"].T, tensors["fc.bias"])
    return params


def _layer(kernel: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    arrays = {"kernel": kernel, "bias": bias}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the PyTorch file, in its order.

    For each convolution, such as `Mixed_6d.branch1x1`: `.conv.weight` `[O, I, h, w]`, and
    `.bn.weight`, `.bn.bias`, `.bn.running_mean`, `.bn.running_var`, `[O]` each; at the end
    `fc.weight` `[1008, 2048]` and `fc.bias` `[1008]`. There is no auxiliary classifier.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def record(
        name: str, x: Array, features: int, kernel: tuple[int, int] = (1, 1), **steps: Any
    ) -> Array:
        shapes[f"{name}.conv.weight"] = (features, x.shape[-1], *kernel)
        shapes.update({f"{name}.bn.{key}": (features,) for key in _BATCH_NORM})
        return _convolve(x, jnp.zeros((*kernel, x.shape[-1], features)), **steps)

    # Every shape follows from the network itself, which is traced but not run.
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32)
    jax.eval_shape(lambda x: _network(record, x), image)
    return {**shapes, "fc.weight": (1008, 2048), "fc.bias": (1008,)}
