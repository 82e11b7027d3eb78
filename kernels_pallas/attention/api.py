"""The entry to attention: C++ on a CPU, splash attention on TPU, else XLA."""

import jax

from kernels_pallas import extension
from kernels_pallas.attention import ref, tpu, vjp


def attend(
    q_btnh: jax.Array, k_bsgh: jax.Array, v_bsgh: jax.Array, mask_b1ts: jax.Array, *,
    in_order: bool = False, window: int | None = None, segment_bt: jax.Array | None = None,
    platform: str = '',
) -> jax.Array:
  """softmax(q k^T / sqrt(h)) v, [b, t, n, h] in q's dtype; query head i sees key head i * g // n.

  Scores and softmax are at least float32. A query that sees no key gets what nothing should read.

  Args:
    mask_b1ts: bool, which keys a query sees.
    in_order: a query sees the keys up to its own index (t = s) that are in its window and of its
      segment, and no others: what the mask says too. The TPU kernel reads this and not the mask; by
      XLA, texts of 129 to 2,048 go a block of queries at a time, each with the keys up to its last,
      little over half of the work. The C++ reads from the mask what it can leave out.
    window, segment_bt: as for `moejax.ops.causal.mask`; only read with in_order.
    platform: that the program is for, by default JAX's own. The choice is made when it is traced,
      since what is kept for the gradients differs.

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
  platform = platform or jax.default_backend()
  dtypes = q_btnh.dtype, k_bsgh.dtype, v_bsgh.dtype
  if platform == 'cpu' and not extension.without(*dtypes):
    return vjp.attend(q_btnh, k_bsgh, v_bsgh, mask_b1ts, in_order)
  if platform == 'tpu' and not tpu.supports(t, s, in_order, *dtypes):
    return tpu.attend(q_btnh, k_bsgh, v_bsgh, segment_bt, window)
  return ref.attend(q_btnh, k_bsgh, v_bsgh, mask_b1ts, in_order)
