"""What the operations share: when their kernels run, and how a rule for a gradient is given.

The kernels are Pallas kernels for one NVIDIA GPU, each one pass over memory: XLA makes two to five
kernels of each operation, and every one reads its input anew. The plain form does the same
elsewhere; it is the reference. Kernels take flat arrays of M tokens. Where there are gradients of
scales, sums over all tokens, a program goes over every `PROGRAMS`-th token, and they stay in
registers until its end.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from oel_jax.runtime import target

PROGRAMS = 528  # four for each of an H100's 132 multiprocessors
REMAT_SAVED = "kept"  # the name of what is kept for the backward pass though it is no product


def supported(x: Any, head_size: int = 2) -> bool:
  """Whether kernels run on x, an array or its shape and type: they are for NVIDIA GPUs, bfloat16,
  and heads whose halves are powers of two.
  """
  return target.backend() == "gpu" and x.dtype == jnp.bfloat16 and head_size & (head_size - 1) == 0


def padded(first: int, count: int) -> tuple[Any, Any]:
  """`count` places from `first` on, as a slice of a power of two, which may reach beyond the array,
  and which of the slice count.
  """
  size = pl.next_power_of_2(count)
  return pl.ds(jnp.int32(first), size), jnp.arange(size) < count


def with_rule(forward: Callable, backward: Callable, static: tuple[int, ...] = ()) -> Callable:
  """What `forward` returns first, differentiated by `backward`, which gets what it returns besides;
  the arguments `static` come before the others, and are no arrays.

  `forward` may not call the function that the rule is for: `jax.checkpoint` would see that as one
  opaque operation, and make the products in it again instead of keeping them.
  """
  function = jax.custom_vjp(lambda *args: forward(*args)[0], nondiff_argnums=static)
  function.defvjp(forward, backward)
  return function


def spread(
  run: Callable[..., Any], mesh: Mesh | None, own: tuple[Array, Array, Array], *given: Any
) -> Any:
  """`run(own, *given)` on a mesh, where XLA cannot cut it: on each device for its own rows ("data"
  and "fsdp") and heads ("tensor"); on all of them where an axis does not divide them, as for the
  one row that is a text being read.

  Args:
    run: attention; what it returns are arrays [B, heads, …].
    mesh: where the arrays lie; None on one device, and inside `jax.shard_map`.
    own: queries, keys and values, [B, heads, …], of four dimensions.
    given: trees of such arrays, and of others [B, …].
  """
  if mesh is None or mesh.size == 1:
    return run(own, *given)
  q, k, _ = own
  rows = ("data", "fsdp") if q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
  heads = "tensor" if k.shape[1] % mesh.shape["tensor"] == 0 else None
  place = lambda x: PartitionSpec(rows, heads) if x.ndim == 4 else PartitionSpec(rows)
  # A kernel does not say over which axes its results differ, which a check would want to know.
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=jax.tree.map(place, (own, *given)),
    out_specs=PartitionSpec(rows, heads),
    check_vma=False,
  )(own, *given)
