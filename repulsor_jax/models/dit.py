"""The diffusion transformer: DiT's architecture as SiT trains it, so that SiT's weights load.

DiT: Peebles and Xie, "Scalable Diffusion Models with Transformers", arXiv 2212.09748.
SiT: Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models", arXiv 2401.08740.

Every parameter carries logical axis names; a caller maps them to mesh axes with
`nn.logical_axis_rules` under `jax.set_mesh`. Without either the names do nothing.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repulsor_jax.models.token_groups import of_tokens

Array = jax.Array
Params = dict[str, Any]

# The published model sizes (arXiv 2212.09748, table 1); "XL/2" is DIT_SIZES["XL"] at patch size 2.
DIT_SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}

_saves_projection = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def _saves_attention(primitive: Any, *avals: Any, **params: Any) -> Any:
    """Also the results of cuDNN's attention: the output and the sums of its softmax.

    Its backward kernel reads both, and a name on the output alone would not save the sums.
    """
    is_fused = primitive.name.startswith("dot_product_attention_fwd")
    return is_fused or _saves_projection(primitive, *avals, **params)


REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "dots": _saves_projection,
    "dots_attention": _saves_attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# Layers that compute in float32 whatever the model's dtype is.
FLOAT32_LAYERS = (
    *("time_in", "time_out", "label_embed", "final_modulation", "final", "condition_map"),
    *("q_norm", "k_norm"),
)

NUM_FREQUENCIES = 256
_MAX_PERIOD = 10_000.0
_NORM_EPS = 1e-6
_QK_NORM_EPS = 1e-5
_GELU_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715


def drop_labels(key: Array, labels: Array, num_classes: int, rate: float) -> Array:
    """Replaces each of the labels [B] by the null class, `num_classes`, with probability `rate`.

    This is the label dropout of classifier-free guidance (arXiv 2207.12598, section 3.2).
    """
    dropped = jax.random.bernoulli(key, rate, labels.shape)
    return jnp.where(dropped, jnp.asarray(num_classes, labels.dtype), labels)


def position_embedding(grid_size: int, hidden_size: int) -> np.ndarray:
    """The fixed 2-D sine-cosine position table, [grid_size**2, hidden_size] float32.

    Tokens are in row-major order. The first half of the channels encodes the column, the second
    the row; each half holds sines, then cosines, of `hidden_size // 4` frequencies
    `10000 ** (-4 i / hidden_size)` (DiT's layout of arXiv 1706.03762, section 3.5).
    """
    quarter = hidden_size // 4
    frequencies = 1.0 / _MAX_PERIOD ** (np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.arange(grid_size, dtype=np.float64)[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    column = np.tile(line, (grid_size, 1))
    row = np.repeat(line, grid_size, axis=0)
    return np.concatenate([column, row], axis=1).astype(np.float32)


def frequencies() -> np.ndarray:
    """Those of the time embedding, from 1 down to about 1e-4: [128] float32."""
    half = NUM_FREQUENCIES // 2
    return np.exp(-np.log(_MAX_PERIOD) * np.arange(half, dtype=np.float32) / half)


def time_features(t: Array) -> Array:
    """Cosines, then sines, of `t` [B] at 128 frequencies: [B, 256] float32 (GLIDE's layout)."""
    angles = t.astype(jnp.float32)[:, None] * frequencies()
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def step_index(t: Array, steps: int) -> Array:
    """The index of a discrete schedule at times `t` in [0, 1]: `steps - 1` at noise, float32.

    steps (1 - t) - 1, as DPM-Solver has it (arXiv 2206.00927, section 3.4); t = 1, the data, is -1.
    Between the discrete times it is a fraction. At them it is an integer, which float32 would miss
    by up to 1e-4.
    """
    index = steps * (1.0 - t.astype(jnp.float32)) - 1.0
    nearest = jnp.round(index)
    return jnp.where(jnp.abs(index - nearest) < 5e-4, nearest, index)


def patchify(x: Array, patch_size: int) -> Array:
    """[B, H, W, C] to tokens [B, N, patch_size**2 * C], channels last within a patch."""
    batch, height, width, channels = x.shape
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return x.swapaxes(2, 3).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(tokens: Array, patch_size: int) -> Array:
    """The inverse of `patchify` on a square grid: [B, N, patch_size**2 * C] to [B, H, W, C]."""
    batch, count, features = tokens.shape
    side = round(count**0.5)
    channels = features // patch_size**2
    x = tokens.reshape(batch, side, side, patch_size, patch_size, channels)
    return x.swapaxes(2, 3).reshape(batch, side * patch_size, side * patch_size, channels)


def _normalise(x: Array, eps: float) -> Array:
    """LayerNorm without affine over the last axis, in float32: same shape, float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    centred = x - mean
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """Adaptive layer norm of x [B, N, D] by shift and scale; float32 (arXiv 2212.09748, 3.2).

    These are [B, D], or [B, N, D] for tokens that have each their own.
    """
    shift, scale = shift.astype(jnp.float32), scale.astype(jnp.float32)
    return _normalise(x, _NORM_EPS) * (1.0 + _over_tokens(scale)) + _over_tokens(shift)


def gated_add(x: Array, gate: Array, update: Array) -> Array:
    """x + gate * update with one rounding to x's dtype; [B, N, D], the gate that or [B, D]."""
    update = _over_tokens(gate.astype(jnp.float32)) * update.astype(jnp.float32)
    return (x.astype(jnp.float32) + update).astype(x.dtype)


def _over_tokens(values: Array) -> Array:
    """[B, D] as [B, 1, D], which holds for all tokens; [B, N, D] as it is."""
    return values[:, None] if values.ndim == 2 else values


def make_dense(
    features: int,
    names: tuple[str | None, str | None],
    *,
    name: str,
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform(),  # noqa: B008
    dtype: Any = jnp.float32,
    precision: jax.lax.Precision | None = None,
    use_bias: bool = True,
) -> nn.Dense:
    """A dense layer of float32 parameters; `names` are the logical axes of its kernel [in, out]."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=jnp.float32,
        precision=precision,
        kernel_init=nn.with_logical_partitioning(kernel_init, names),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, names[1:]),
        name=name,
    )


def project(dense: nn.Dense, x: Array) -> Array:
    """Applies `dense` to [B, N, F] as one matrix product, [B, N, features].

    With three axes the weight gradient contracts two of them, for which XLA on a CPU transposes
    its operands and takes 1.7 times as long; elsewhere the reshape costs nothing.
    """
    batch, count, features = x.shape
    return dense(x.reshape(batch * count, features)).reshape(batch, count, -1)


def _modulation(
    dense: nn.Dense, condition: Array, groups: Array | None, parts: int
) -> tuple[Array, ...]:
    """The `parts` of the modulation, each [B, D]; with groups, those of each token, [B, N, D].

    It is computed once for each group, [B, G, D], and not for each token.
    """
    if groups is None:
        return tuple(jnp.split(dense(condition), parts, axis=-1))
    of_groups = jnp.split(project(dense, condition), parts, axis=-1)
    return tuple(of_tokens(each, groups) for each in of_groups)


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """GELU in its tanh form (arXiv 1606.08415, section 2), elementwise.

    Its derivative is written out as a function of x alone: that of the formula as it stands keeps
    further arrays of x's size for the backward pass.
    """
    return nn.gelu(x, approximate=True)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    # 1 + tanh(u) = 2 sigmoid(2 u), so gelu(x) = x sigmoid(2 u) with u the odd cubic below.
    x32 = x.astype(jnp.float32)
    gate = nn.sigmoid(_GELU_SLOPE * x32 * (1.0 + _GELU_CUBIC * jnp.square(x32)))
    inner = _GELU_SLOPE * (1.0 + 3.0 * _GELU_CUBIC * jnp.square(x32))
    return gelu(x), dx * (gate + x32 * gate * (1.0 - gate) * inner).astype(x.dtype)


def attend(
    q: Array,
    k: Array,
    v: Array,
    implementation: Literal["xla", "cudnn"] | None = None,
    mask: Array | None = None,
) -> Array:
    """Softmax attention (arXiv 1706.03762, equation 1).

    Args:
      q: queries [B, N, H, hd]; keys k, values v and the result have the same shape.
      k: keys.
      v: values, whose dtype the result has.
      implementation: "xla" or "cudnn" for `jax.nn.dot_product_attention`'s. None divides by the
        softmax's sum after the product with v, on [N, hd] instead of [N, N] values per head;
        logits, exponentials' sum and the division are float32.
      mask: [B, N, N] booleans, whether query i sees key j; every query sees at least one. None
        lets all see all.
    """
    if mask is not None:
        mask = mask[:, None]
    if implementation is not None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    # Heads before tokens, q scaled instead of the logits: quicker on a CPU (docs/measurements.md).
    scale = q.shape[-1] ** -0.5
    if q.dtype == jnp.float32:  # bfloat16 would round q, and the scale itself
        q, scale = q * scale, 1.0
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = product("bhqd,bhkd->bhqk", q, k)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    largest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp((logits - largest) * scale)
    out = product("bhqk,bhkd->bhqd", weights.astype(v.dtype), v)
    return (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype).swapaxes(1, 2)


class HeadNorm(nn.Module):
    """LayerNorm over each head's features with affine parameters, [..., hd] to float32 [..., hd].

    Epsilon is 1e-5, as in the `qk_norm` of the attention that SiT builds on.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last axis."""
        size = x.shape[-1]
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale: Any = self.param("scale", nn.with_logical_partitioning(ones, (None,)), (size,))
        bias: Any = self.param("bias", nn.with_logical_partitioning(zeros, (None,)), (size,))
        return _normalise(x, _QK_NORM_EPS) * scale + bias


class Block(nn.Module):
    """One adaLN-Zero transformer block (arXiv 2212.09748, section 3.2).

    The fused qkv projection is laid out heads-major, [D, num_heads * 3 * hd], so that splitting
    its output axis over devices splits by heads.
    """

    hidden_size: int
    num_heads: int
    mlp_ratio: float
    qk_norm: bool
    dtype: Any
    attention: Literal["xla", "cudnn"] | None
    attention_separation: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        condition: Array,
        groups: Array | None = None,
        modulation: Array | None = None,
    ) -> Array:
        """Maps tokens x [B, N, D] under the activated condition [B, D] to tokens [B, N, D].

        With `groups` [B, N] the condition is [B, G, D], one for the tokens of each group, and
        `attention_separation` keeps the tokens of a group among themselves. `modulation`
        [B, 6 D] is what the layer of that name gives for the condition; None computes it.
        """
        x = nn.with_logical_constraint(x, ("batch", None, None))
        if modulation is None:
            dense = make_dense(
                6 * self.hidden_size,
                ("embed", "modulation"),
                name="modulation",
                kernel_init=nn.initializers.zeros,
                dtype=self.dtype,
            )
            parts = _modulation(dense, condition, groups, 6)
        else:
            parts = tuple(jnp.split(modulation, 6, axis=-1))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        h = modulate(x, shift_msa, scale_msa).astype(self.dtype)
        x = gated_add(x, gate_msa, self._attend(h, groups))
        h = modulate(x, shift_mlp, scale_mlp).astype(self.dtype)
        x = gated_add(x, gate_mlp, self._mlp(h))
        return nn.with_logical_constraint(x, ("batch", None, None))

    def _attend(self, h: Array, groups: Array | None) -> Array:
        batch, count, width = h.shape
        qkv = project(make_dense(3 * width, ("embed", "heads"), name="qkv", dtype=self.dtype), h)
        qkv = qkv.reshape(batch, count, self.num_heads, 3, width // self.num_heads)
        q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
        if self.qk_norm:
            q = HeadNorm(name="q_norm")(q).astype(self.dtype)
            k = HeadNorm(name="k_norm")(k).astype(self.dtype)
        mask = None
        if groups is not None and self.attention_separation:
            mask = groups[:, :, None] == groups[:, None, :]
        out = attend(q, k, v, self.attention, mask).reshape(batch, count, width)
        return project(make_dense(width, ("heads", "embed"), name="proj", dtype=self.dtype), out)

    def _mlp(self, h: Array) -> Array:
        hidden = int(self.hidden_size * self.mlp_ratio)
        dense = functools.partial(make_dense, dtype=self.dtype)
        h = project(dense(hidden, ("embed", "mlp"), name="mlp_in"), h)
        h = gelu(h)
        return project(dense(self.hidden_size, ("mlp", "embed"), name="mlp_out"), h)


def remat_block(block_class: Any, remat: str, in_loop: bool) -> Any:
    """The class of a block with the rematerialisation of that name, see `DiT`.

    Inside a scan (`in_loop`) the loop itself keeps XLA from undoing it.
    """
    if remat == "none":
        return block_class
    return nn.remat(block_class, policy=REMAT_POLICIES[remat], prevent_cse=not in_loop)


class DiT(nn.Module):
    """A class-conditional diffusion transformer on square latents.

    `scan_blocks` loops one compiled block over stacked parameters ("blocks") instead of `depth`
    blocks with parameters of their own ("block_0", ...). `remat` is what the backward pass finds
    saved: "none" rematerialises nothing, "dots" saves the projections' outputs alone,
    "dots_attention" those and what cuDNN's attention gives, so that it runs once (with any other
    attention it is "dots"), "full" saves only the blocks' inputs. XLA's CPU compiler merges the
    second computation with the first again unless `scan_blocks` is set. `dtype` is that of the
    computation: parameters, normalisation, softmax, the time embedding and the final layer stay in
    float32.

    Raises:
      ValueError: on construction, naming the field whose value does not fit.
    """

    segments = 1  # not a field: consecutive rows that stay together, see `blockwise.Blockwise`

    latent_size: int  # height and width of the latents
    in_channels: int  # channels C of the latents
    patch_size: int  # side of a patch; N = (latent_size / patch_size)**2 tokens
    hidden_size: int  # model width D
    depth: int
    num_heads: int
    num_classes: int  # real classes; the label `num_classes` means none (the null class)
    mlp_ratio: float = 4.0  # width of the MLP's hidden layer over D
    learn_sigma: bool = False  # makes 2 C channels, of which the output keeps the first C
    qk_norm: bool = False  # normalises queries and keys per head
    scan_blocks: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32
    attention: Literal["xla", "cudnn"] | None = None  # `implementation` of `attend`
    attention_separation: bool = False  # given `groups`, a token sees those of its group alone
    # Channels of a condition that join the latent's in the patches (arXiv 2307.08698).
    # Their kernel begins at zero, so that a network trained without them goes on unchanged.
    condition_channels: int = 0
    condition_classes: int = 0  # channels of the condition before a learned 1x1 map; 0: no map
    time_steps: int = 0  # of a DiT: the network reads an index of so many, not t; see `step_index`

    def __post_init__(self) -> None:
        """Checks the fields."""
        self._check_fields()
        super().__post_init__()

    def _check_fields(self) -> None:
        counts = ("latent_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads")
        for field in (*counts, "num_classes"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: found {getattr(self, field)}, expected 1 or more")
        if self.latent_size % self.patch_size:
            raise ValueError(
                f"patch_size: found {self.patch_size}, expected a divisor of latent_size "
                f"{self.latent_size}"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size: found {self.hidden_size}, expected a multiple of 4 for the "
                "position embedding"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads: found {self.num_heads}, expected a divisor of hidden_size "
                f"{self.hidden_size}"
            )
        if self.remat not in ("none", *REMAT_POLICIES):
            raise ValueError(
                f"remat: found {self.remat!r}, expected one of none, {', '.join(REMAT_POLICIES)}"
            )
        if self.attention == "cudnn" and jnp.dtype(self.dtype).itemsize != 2:
            raise ValueError(
                f"attention: found 'cudnn' with dtype {jnp.dtype(self.dtype)}, expected dtype "
                "bfloat16 or float16, which cuDNN's kernel needs"
            )

    @property
    def takes_modulations(self) -> bool:
        """Whether `__call__` takes `modulations`, with one time for all tokens."""
        return self.scan_blocks

    def param_dtypes(self, params: Params) -> Params:
        """The dtype that each parameter is used in: a tree like `params`.

        Kernels and biases of the layers in `dtype` are cast to it there, so that a copy in it
        gives the same numbers; the rest stays in float32.
        """

        def of(path: Any, _: Any) -> Any:
            names = {str(getattr(entry, "key", "")) for entry in path}
            return jnp.dtype(jnp.float32 if names & {*FLOAT32_LAYERS} else self.dtype)

        return jax.tree_util.tree_map_with_path(of, params)

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        labels: Array,
        *,
        groups: Array | None = None,
        taps: tuple[int, ...] = (),
        nudges: Mapping[int, Array] | None = None,
        has_output: bool = True,
        condition: Array | None = None,
        modulations: Array | None = None,
    ) -> Any:
        """Predicts the output (a velocity, say) at `x` and time `t`.

        Args:
          x: [B, H, W, C] latents at time t.
          t: [B] times in [0, 1], 0 noise and 1 data; with `groups` [B, G], one for each group.
          labels: [B] int32 classes in [0, num_classes].
          groups: [B, N] int32 in [0, G), the group of each token; None is one time for all.
          taps: indices of blocks whose output tokens to return as well.
          nudges: block -> [B, N, D] to add to its tokens, so that a gradient with respect to
            tokens can be taken; None adds nothing.
          has_output: False returns the taps alone, see `tokens_after`.
          condition: [B, H, W, condition_classes or condition_channels]; None is zeros.
          modulations: [depth, B, 6 D], what the blocks' layers `modulation` give for
            `embed_condition(t, labels)`, with `scan_blocks`; None computes them.

        Returns:
          [B, H, W, C] float32; with `taps`, the pair of it and tokens [B, N, D] in `dtype`, one
          array for each tap.

        Raises:
          ValueError: if a tap is not the index of a block, or the shapes of `x`, `t`, `labels`,
            `groups` or `condition` do not fit.
        """
        self._check_inputs(x, t, labels, groups, taps)
        tokens = patchify(x, self.patch_size).astype(self.dtype)
        embed = make_dense(
            self.hidden_size, ("patch", "embed"), name="patch_embed", dtype=self.dtype
        )
        tokens = project(embed, tokens)
        if self.condition_channels or condition is not None:
            tokens += self._embed_condition(x, condition)
        positions = position_embedding(self.latent_size // self.patch_size, self.hidden_size)
        tokens = (tokens.astype(jnp.float32) + positions).astype(self.dtype)
        summed = self._condition(t, labels)
        tokens, tapped = self._run_blocks(
            tokens, summed.astype(self.dtype), groups, taps, nudges or {}, modulations
        )
        if not has_output:
            return tapped
        tokens = nn.with_logical_constraint(tokens, ("batch", None, None))
        out = self._final_layer(tokens, summed, groups)
        return (out, tapped) if taps else out

    def _check_inputs(
        self, x: Array, t: Array, labels: Array, groups: Array | None, taps: tuple[int, ...]
    ) -> None:
        latent = (self.latent_size, self.latent_size, self.in_channels)
        if x.ndim != 4 or x.shape[1:] != latent:
            raise ValueError(
                f"x: found shape {x.shape}, expected [B, {', '.join(map(str, latent))}]"
            )
        num_tokens = (self.latent_size // self.patch_size) ** 2
        shapes = {"t": (t, x.shape[:1]), "labels": (labels, x.shape[:1])}
        if groups is not None:
            shapes["t"] = (t, (*x.shape[:1], *t.shape[-1:]))
            shapes["groups"] = (groups, (*x.shape[:1], num_tokens))
        for name, (array, expected) in shapes.items():
            if array.shape != expected:
                raise ValueError(f"{name}: found shape {array.shape}, expected {expected}")
        if any(not 0 <= tap < self.depth for tap in taps):
            raise ValueError(f"taps: found {taps}, expected blocks in 0 to {self.depth - 1}")

    def _embed_condition(self, x: Array, condition: Array | None) -> Array:
        """The condition's part of the patch embedding, [B, N, D]; `x` is [B, H, W, C]."""
        width = self.condition_classes or self.condition_channels
        if condition is None:
            condition = jnp.zeros((*x.shape[:3], width))
        if condition.shape != (*x.shape[:3], width):
            raise ValueError(
                f"condition: found shape {condition.shape}, expected {(*x.shape[:3], width)}"
            )
        if self.condition_classes:
            condition = make_dense(
                self.condition_channels, (None, None), name="condition_map", use_bias=False
            )(condition)
        embed = make_dense(
            self.hidden_size,
            ("patch", "embed"),
            name="condition_embed",
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            use_bias=False,
        )
        return project(embed, patchify(condition, self.patch_size).astype(self.dtype))

    @nn.compact
    def embed_condition(self, t: Array, labels: Array) -> Array:
        """What the blocks' modulations are computed from: [B, D] in `dtype`."""
        return self._condition(t, labels).astype(self.dtype)

    def _condition(self, t: Array, labels: Array) -> Array:
        """SiLU of the sum of time and label embeddings, float32: [B, D], or [B, G, D] of t [B, G].

        Every user of the condition applies SiLU first, so it is applied here once.
        """
        normal = nn.initializers.normal(0.02)
        # A bfloat16 product (TPU's default for float32) would round t to 8 bits.
        time_dense = functools.partial(
            make_dense, self.hidden_size, kernel_init=normal, precision=jax.lax.Precision.HIGHEST
        )
        if self.time_steps:
            t = step_index(t, self.time_steps)
        h = time_features(t.reshape(-1))
        h = nn.silu(time_dense(("frequency", "mlp"), name="time_in")(h))
        h = time_dense(("mlp", "embed"), name="time_out")(h)
        label = nn.Embed(
            self.num_classes + 1,
            self.hidden_size,
            embedding_init=nn.with_logical_partitioning(normal, ("classes", "embed")),
            name="label_embed",
        )(labels)
        if t.ndim == 2:
            h, label = h.reshape(*t.shape, -1), label[:, None]
        return nn.silu(h + label)

    def _block_maker(self) -> Callable[..., Any]:
        """What makes a block of the given name."""
        return functools.partial(
            remat_block(Block, self.remat, self.scan_blocks),
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            qk_norm=self.qk_norm,
            dtype=self.dtype,
            attention=self.attention,
            attention_separation=self.attention_separation,
        )

    def _run_blocks(
        self,
        tokens: Array,
        condition: Any,
        groups: Array | None,
        taps: tuple[int, ...],
        nudges: Mapping[int, Array],
        modulations: Array | None = None,
    ) -> tuple[Array, tuple[Array, ...]]:
        """Runs all blocks; the second result are the outputs of the blocks `taps`."""
        make_block = self._block_maker()
        if not self.scan_blocks:
            outputs = {}
            for i in range(self.depth):
                tokens = make_block(name=f"block_{i}")(tokens, condition, groups)
                tokens = tokens + nudges[i] if i in nudges else tokens
                outputs[i] = tokens
            return tokens, tuple(outputs[tap] for tap in taps)

        # The last block's tokens come out of the loop by themselves.
        carried = tuple(tap for tap in taps if tap < self.depth - 1)

        def plain(block: Any, x: Array, condition: Any, own: Any) -> Any:
            return block(x, condition, groups, **own), None

        def tapping(block: Any, carry: Any, condition: Any, indexed: Any) -> Any:
            (x, kept), (index, own) = carry, indexed
            x = block(x, condition, groups, **own)
            for tap, nudge in nudges.items():
                x += jnp.where(index == tap, nudge, 0)
            kept = {tap: jnp.where(index == tap, x, old) for tap, old in kept.items()}
            return (x, kept), None

        scan = functools.partial(
            nn.scan,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        blocks = make_block(name="blocks")
        own = {} if modulations is None else {"modulation": modulations}
        if not carried and not nudges:
            tokens, _ = scan(plain)(blocks, tokens, condition, own)
            return tokens, (tokens,) * len(taps)
        carry = (tokens, {tap: jnp.zeros_like(tokens) for tap in carried})
        indexed = jnp.arange(self.depth), own
        (tokens, kept), _ = scan(tapping)(blocks, carry, condition, indexed)
        return tokens, tuple(kept.get(tap, tokens) for tap in taps)

    def _final_layer(self, tokens: Array, condition: Array, groups: Array | None) -> Array:
        """Adaptive norm, projection to patches in float32 and unpatchify: [B, H, W, C]."""
        zeros = nn.initializers.zeros
        channels = self.in_channels * (2 if self.learn_sigma else 1)
        modulation = make_dense(
            2 * self.hidden_size,
            ("embed", "modulation"),
            name="final_modulation",
            kernel_init=zeros,
        )
        shift, scale = _modulation(modulation, condition, groups, 2)
        features = self.patch_size**2 * channels
        dense = make_dense(features, ("embed", "patch"), name="final", kernel_init=zeros)
        out = project(dense, modulate(tokens, shift, scale))
        return unpatchify(out, self.patch_size)[..., : self.in_channels]


def tokens_after(
    model: DiT,
    params: Params,
    x: Array,
    t: Array,
    labels: Array,
    taps: tuple[int, ...],
    extras: Mapping[str, Array] | None = None,
) -> tuple[Array, ...]:
    """Tokens [B, N, D] after the blocks `taps`; no block after the last of them is run.

    Args:
      model: the whole model; a shorter one is made of it.
      params: of the whole model.
      x, t, labels: as in `DiT.__call__`.
      taps: indices of blocks.
      extras: the other arguments of `DiT.__call__` that are arrays, by name.
    """
    depth = max(taps) + 1
    if model.scan_blocks:
        params = params | {"blocks": jax.tree.map(lambda p: p[:depth], params["blocks"])}
    shorter: Any = model.clone(depth=depth)
    return shorter.apply(
        {"params": params}, x, t, labels, taps=taps, has_output=False, **(extras or {})
    )
