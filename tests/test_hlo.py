import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from repulsor_jax import hlo
from tests import tiny


def compiled_text(f, shape, spec_in, spec_out, mesh):
    shardings = (
        NamedSharding(mesh, PartitionSpec(*spec_in)),
        NamedSharding(mesh, PartitionSpec(*spec_out)),
    )
    jitted = jax.jit(f, in_shardings=shardings[0], out_shardings=shardings[1])
    return jitted.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text()


def test_finds_what_is_there_and_its_size():
    mesh = tiny.mesh(data=8)
    [gather] = hlo.collectives(compiled_text(lambda x: x, (64, 3), ("data",), (), mesh))
    assert (gather.kind, gather.largest, gather.num_bytes) == ("all-gather", 192, 768)
    [reduce] = hlo.collectives(compiled_text(lambda x: x.sum(0), (64, 3), ("data",), (), mesh))
    assert (reduce.kind, reduce.largest, reduce.num_bytes) == ("all-reduce", 3, 12)
    assert (
        hlo.collectives(compiled_text(lambda x: x + 1, (64, 3), ("data",), ("data",), mesh)) == []
    )


def test_reads_tuples_layouts_and_async_starts():
    text = """
      %a = (bf16[8,4]{1,0:T(8,128)}, f32[]) all-reduce-start(%x, %y), replica_groups={{0,1}}
      %b = u8[16]{0} all-to-all(%z), dimensions={0}
      %c = f32[2] add(%p, %q)
    """
    first, second = hlo.collectives(text)
    assert first.arrays == (("bf16", (8, 4)), ("f32", ()))
    assert first.num_bytes == 8 * 4 * 2 + 4
    assert (second.kind, second.num_bytes) == ("all-to-all", 16)
