"""The entry to attention: C++ where the whole of it is on a CPU, else XLA."""

import jax

from kernels_pallas import extension
from kernels_pallas.attention import ref, vjp


def attend(
    q_btnh: jax.Array, k_bsgh: jax.Array, v_bsgh: jax.Array, mask_b1ts: jax.Array, *,
    in_order: bool = False, sharded: bool = False,
) -> jax.Array:
  """softmax(q k^T / sqrt(h)) v, [b, t, n, h] in q's dtype; query head i sees key head i * g // n.

  Scores and softmax are at least float32. A query that sees no key gets what nothing should read.

  Args:
    mask_b1ts: bool, which keys a query sees.
    in_order: no query sees a key of a later index (t = s). By XLA, texts of 129 to 2,048 then go a
      block of queries at a time, each with the keys up to its last, which is little over half of
      the work. The C++ reads from the mask which keys it can leave out.
    sharded: the arrays are divided among devices by XLA, which cannot divide the C++.

  Raises:
    ValueError: shapes that do not fit.
  """
  (b, t, n, h), (s, g) = q_btnh.shape, k_bsgh.shape[1:3]
  if (
      k_bsgh.shape != (b, s, g, h) or v_bsgh.shape != k_bsgh.shape or n % g
      or mask_b1ts.shape not in ((b, 1, t, s), (1, 1, t, s))
  ):
    raise ValueError(
        f'attention: q {q_btnh.shape}, k {k_bsgh.shape}, v {v_bsgh.shape} and mask '
        f'{mask_b1ts.shape} do not fit [b, t, n, h], [b, s, g, h] and [b, 1, t, s]'
    )
  elsewhere = sharded or jax.default_backend() != 'cpu'
  if elsewhere or extension.without(q_btnh.dtype, k_bsgh.dtype, v_bsgh.dtype):
    return ref.attend(q_btnh, k_bsgh, v_bsgh, mask_b1ts, in_order)
  return vjp.attend(q_btnh, k_bsgh, v_bsgh, mask_b1ts, in_order)
