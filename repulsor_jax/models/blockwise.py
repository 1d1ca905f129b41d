"""Blockwise flow matching: a velocity network of its own for each segment of time.

Arrangement of "Blockwise Flow Matching" (arXiv 2510.21167) and its published code. Time is cut
into S equal segments. A trunk F, shared by all, reads the noisy latents; S stacks of blocks
predict the velocity, each in its own segment, under the trunk's tokens as a condition. A residual
network G (the paper's feature residual network) can stand in for the trunk after the first step of
a segment: F(x_t, t) is about F(x_s, s) + r G(x_t, t), s the start of the segment and r the part of
the segment that lies behind t.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repulsor_jax.models import dit
from repulsor_jax.models.dit import Block, DiT

Array = jax.Array

_THETA = 10_000.0
_RMS_EPS = 1e-6


def segment_of(t: Array, segments: int) -> Array:
    """The segment in which each time lies, int32; t = 1 belongs to the last one."""
    return jnp.clip(jnp.floor(t * segments), 0, segments - 1).astype(jnp.int32)


def segment_of_rows(batch_size: int, segments: int) -> Array:
    """The segment of each row of a batch, by its number modulo S: int32 [B]."""
    return jnp.arange(batch_size, dtype=jnp.int32) % segments


def stratified_times(u: Array, segments: int) -> Array:
    """Times [B], row b uniform in the segment of that row where u [B] is uniform in [0, 1)."""
    return (segment_of_rows(len(u), segments) + u) / segments


def rotary_table(grid_size: int, head_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of 2-D rotary positions, each [grid_size**2, head_size] float32.

    The first half of a head turns with the row, the second with the column; adjacent channels are
    the pairs, pair i at the frequency 10,000^(-2 i / (head_size / 2)) (RoFormer, arXiv 2104.09864,
    in its axial form).
    """
    half = head_size // 2
    frequencies = _THETA ** (-np.arange(0, half, 2, dtype=np.float64) / half)
    angles = np.repeat(np.arange(grid_size)[:, None] * frequencies, 2, axis=1)  # [side, half]
    rows = np.repeat(angles, grid_size, axis=0)
    columns = np.tile(angles, (grid_size, 1))
    table = np.concatenate([rows, columns], axis=1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def rotate(x: Array, cos: np.ndarray, sin: np.ndarray) -> Array:
    """Turns the adjacent pairs of x [B, N, H, hd] by the angles of `rotary_table`; float32."""
    x = x.astype(jnp.float32)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return x * cos[:, None] + turned * sin[:, None]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) over each head's features, times a weight; float32."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last axis of [..., hd]."""
        ones = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        scale: Any = self.param("scale", ones, x.shape[-1:])
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + _RMS_EPS) * scale


class RotaryBlock(Block):
    """An adaLN-Zero block with rotary positions, normalised queries and keys, low-rank adaLN.

    With `adaln_rank` r > 0 the modulation is W2 W1 c, W1 of r columns, plus what the blocks share;
    with 0 it is one full matrix.
    """

    adaln_rank: int = 0

    @nn.compact
    def __call__(  # type: ignore[override]
        self, x: Array, condition: tuple[Array, Array | None], groups: None = None
    ) -> Array:
        """Maps tokens x [B, N, D] to tokens [B, N, D].

        Args:
          x: tokens.
          condition: after SiLU, [B, F] or, for tokens that have each their own, [B, N, F]; and
            the shared part of the modulation, [B, 6 D] or [B, N, 6 D], or None.
        """
        x = nn.with_logical_constraint(x, ("batch", None, None))
        own, shared = condition
        if self.adaln_rank:
            down = dit.make_dense(
                self.adaln_rank, ("embed", None), name="adaln_in", dtype=self.dtype
            )
            own = _project(down, own)
        modulation = _project(
            dit.make_dense(
                6 * self.hidden_size,
                (None if self.adaln_rank else "embed", "modulation"),
                name="modulation",
                kernel_init=nn.initializers.zeros,
                dtype=self.dtype,
            ),
            own,
        )
        modulation = modulation if shared is None else modulation + shared
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.split(
            modulation, 6, axis=-1
        )
        h = dit.modulate(x, shift_msa, scale_msa).astype(self.dtype)
        x = dit.gated_add(x, gate_msa, self._attend(h, groups))
        h = dit.modulate(x, shift_mlp, scale_mlp).astype(self.dtype)
        x = dit.gated_add(x, gate_mlp, self._mlp(h))
        return nn.with_logical_constraint(x, ("batch", None, None))

    def _attend(self, h: Array, groups: Array | None) -> Array:
        batch, count, width = h.shape
        dense = functools.partial(dit.make_dense, dtype=self.dtype)
        parts = dit.project(dense(3 * width, ("embed", "heads"), name="qkv"), h)
        parts = parts.reshape(batch, count, self.num_heads, 3, -1)
        table = rotary_table(round(count**0.5), parts.shape[-1])
        q = rotate(RMSNorm(name="q_norm")(parts[:, :, :, 0]), *table).astype(self.dtype)
        k = rotate(RMSNorm(name="k_norm")(parts[:, :, :, 1]), *table).astype(self.dtype)
        out = dit.attend(q, k, parts[:, :, :, 2], self.attention).reshape(batch, count, width)
        return dit.project(dense(width, ("heads", "embed"), name="proj"), out)


def _project(dense: nn.Dense, x: Array) -> Array:
    """Applies `dense` to [B, F], or as `dit` does to [B, N, F]."""
    return dense(x) if x.ndim == 2 else dit.project(dense, x)


class Stack(nn.Module):
    """Some blocks one after the other, as one scanned block or as blocks with names of their own.

    `make_block` makes a block of the given name.
    """

    depth: int
    make_block: Callable[..., Any]
    scan_blocks: bool

    @nn.compact
    def __call__(self, x: Array, condition: tuple[Array, Array | None]) -> Array:
        """Maps tokens [B, N, D] to tokens, see `RotaryBlock`."""
        if not self.scan_blocks:
            for i in range(self.depth):
                x = self.make_block(name=f"block_{i}")(x, condition)
            return x
        scan = nn.scan(
            lambda block, x, condition: (block(x, condition), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self.make_block(name="blocks"), x, condition)[0]


class Blockwise(DiT):
    """A trunk of `depth` blocks and, for each of `segments` parts of time, a stack of its own.

    Taps, nudges, `scan_blocks` and `remat` are as in `DiT`, of the trunk's blocks. Each stack's
    parameters have a leading axis of segments. Of a batch in training, row b is in segment
    b modulo S, whatever its time: every stack has the same number of rows, and with the batch axis
    split over devices each of them keeps its own rows.

    Raises:
      ValueError: on construction, naming the field whose value does not fit.
    """

    segments: int = 6  # S
    segment_depth: int = 5  # P, blocks of a stack
    adaln_rank: int = 288  # of the modulation of each block; 0 is full rank
    residual_depth: int = 0  # K, blocks of the residual network; 0 is none

    takes_modulations = False  # each block has a condition of its own

    def _check_fields(self) -> None:
        super()._check_fields()
        for field in ("segments", "segment_depth"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: found {getattr(self, field)}, expected 1 or more")
        if self.hidden_size // self.num_heads % 4:
            raise ValueError(
                f"num_heads: found {self.num_heads}, expected heads of a multiple of 4 channels "
                f"for rotary positions, not {self.hidden_size // self.num_heads}"
            )
        if self.learn_sigma or self.qk_norm:
            raise ValueError(
                "learn_sigma, qk_norm: found True, expected False: a blockwise network has no "
                "second half of the output, and always normalises queries and keys"
            )

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        x: Array,
        t: Array,
        labels: Array,
        *,
        taps: tuple[int, ...] = (),
        nudges: Mapping[int, Array] | None = None,
        has_output: bool = True,
        segment: Array | int | None = None,
        start: Array | None = None,
    ) -> Any:
        """Predicts the velocity at `x` and time `t`; see `DiT.__call__` for what is not here.

        Args:
          x, t, labels, taps, nudges, has_output: as in `DiT.__call__`.
          segment: the stack that all rows go through; None is training: row b goes through stack
            b modulo S, and S divides B.
          start: [B, n, N, D], the trunk's tokens at the start of the segment (`tokens_after` of the
            last block), from which the residual network goes on in place of the trunk. With n = 2
            the second are for rows without a class, so that guidance has its own. There are no
            taps then, and `has_output=False` gives the approximated tokens, [B, N, D] float32.

        Raises:
          ValueError: as in `DiT.__call__`; or rows that the segments do not divide.
        """
        self._check_inputs(x, t, labels, None, taps)
        if segment is None and has_output and len(x) % self.segments:
            raise ValueError(
                f"x: found {len(x)} rows, expected a multiple of the {self.segments} segments, or "
                "one `segment` for all rows"
            )
        patches = dit.patchify(x, self.patch_size).astype(self.dtype)
        tokens = self._embed("patch_embed", patches)
        condition = self._condition(t, labels)
        tapped: tuple[Array, ...] = ()
        if start is None:
            narrow = condition.astype(self.dtype)
            both = narrow, self._modulation("global_modulation", 6, narrow)
            feature, tapped = self._run_blocks(tokens, both, None, taps, nudges or {})
            if self.is_initializing() and self.residual_depth:
                self._residual()(tokens, (narrow, None))
        else:
            feature = self._approximate(tokens, condition, t, labels, segment, start)
        if not has_output:
            return tapped if start is None else feature
        out = self._velocity(patches, condition, feature, segment)
        return (out, tapped) if taps else out

    def _block_maker(self, adaln_rank: int | None = None) -> Callable[..., Any]:
        return functools.partial(
            dit.remat_block(RotaryBlock, self.remat, self.scan_blocks),
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            qk_norm=True,
            dtype=self.dtype,
            attention=self.attention,
            adaln_rank=self.adaln_rank if adaln_rank is None else adaln_rank,
        )

    def _embed(self, name: str, patches: Array) -> Array:
        dense = dit.make_dense(self.hidden_size, ("patch", "embed"), name=name, dtype=self.dtype)
        return dit.project(dense, patches)

    def _modulation(self, name: str, parts: int, condition: Array) -> Array:
        """Shifts, scales and gates, `parts` D of them, that start at zero; in condition's dtype."""
        dense = dit.make_dense(
            parts * self.hidden_size,
            ("embed", "modulation"),
            name=name,
            kernel_init=nn.initializers.zeros,
            dtype=condition.dtype,
        )
        return _project(dense, condition)

    def _residual(self) -> Stack:
        """The residual network: blocks with a full modulation of their own."""
        make_block = self._block_maker(adaln_rank=0)
        return Stack(self.residual_depth, make_block, self.scan_blocks, name="residual")

    def _approximate(
        self,
        tokens: Array,
        condition: Array,
        t: Array,
        labels: Array,
        segment: Array | int | None,
        start: Array,
    ) -> Array:
        """The trunk's tokens at the start of the segment, plus r times the residual network's."""
        first = start[:, 0]
        if start.shape[1] > 1:
            has_class = (labels != self.num_classes)[:, None, None]
            first = jnp.where(has_class, first, start[:, 1])
        rows = segment_of_rows(len(t), self.segments)
        behind = self._behind(t, rows if segment is None else segment)
        operands = tokens, (condition.astype(self.dtype), None)

        def run(network: Stack, *operands: Any) -> Array:
            return network(*operands)

        if segment is None:
            change = run(self._residual(), *operands)
        else:  # the first evaluation of a segment needs no residual network
            skip = lambda network, tokens, condition: jnp.zeros_like(tokens)
            change = nn.cond(jnp.any(behind != 0), run, skip, self._residual(), *operands)
        return first.astype(jnp.float32) + behind[:, None, None] * change.astype(jnp.float32)

    def _one_stack(self, segment: Array | int, x: Array, condition: tuple[Array, Array]) -> Array:
        """The stack of one segment; a loop takes its parameters block by block, copying no more."""
        params, make_block = self.variables["params"]["stacks"], self._block_maker()

        def block(x: Array, params: Any) -> Array:
            tokens: Array = make_block(parent=None).apply({"params": params}, x, condition)
            return tokens

        if not self.scan_blocks:
            for i in range(self.segment_depth):
                x = block(x, jax.tree.map(lambda p: p[segment], params[f"block_{i}"]))
            return x

        def advance(x: Array, index: Array) -> tuple[Array, None]:
            return block(x, jax.tree.map(lambda p: p[segment, index], params["blocks"])), None

        return jax.lax.scan(advance, x, jnp.arange(self.segment_depth))[0]

    def _behind(self, t: Array, segment: Array | int) -> Array:
        """The part of the segment that lies behind each time."""
        return t * self.segments - segment

    def _velocity(
        self, patches: Array, condition: Array, feature: Array, segment: Array | int | None
    ) -> Array:
        """The stacks and the final layer that they share: [B, H, W, C]."""
        wide = jnp.broadcast_to(condition[:, None], feature.shape)
        wide = jnp.concatenate([wide, nn.silu(feature.astype(jnp.float32))], axis=-1)
        narrow = wide.astype(self.dtype)
        inputs = (
            self._embed("velocity_embed", patches),
            (narrow, self._modulation("stack_modulation", 6, narrow)),
        )
        fields = self.segment_depth, self._block_maker(), self.scan_blocks
        if segment is None:
            stacks = nn.vmap(
                Stack,
                in_axes=0,
                out_axes=0,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                metadata_params={nn.PARTITION_NAME: "segment"},
            )(*fields, name="stacks")
            tokens = _ungroup(stacks(*_group(inputs, self.segments)))
        else:
            tokens = self._one_stack(segment, *inputs)
        tokens = nn.with_logical_constraint(tokens, ("batch", None, None))
        shift, scale = jnp.split(self._modulation("final_modulation", 2, wide), 2, axis=-1)
        zeros, size = nn.initializers.zeros, self.patch_size**2 * self.in_channels
        dense = dit.make_dense(size, ("embed", "patch"), name="final", kernel_init=zeros)
        out = dit.project(dense, dit.modulate(tokens, shift, scale))
        return dit.unpatchify(out, self.patch_size)


def _group(tree: Any, segments: int) -> Any:
    """Rows [B, ...] by their segment, [S, B / S, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, segments, *x.shape[1:]).swapaxes(0, 1), tree)


def _ungroup(x: Array) -> Array:
    """The inverse of `_group`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
