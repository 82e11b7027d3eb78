"""Attention on TPU by JAX's splash attention kernels, for texts that are read in order.

Blocks of keys that no query sees are not read, and no scores are in memory.
"""

from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
import jax.numpy as jnp

_BLOCKS = (512, 256, 128)
# Shorter texts have scores that XLA keeps on the chip.
_LEAST = 256


def supports(t: int, s: int, in_order: bool, *dtypes: Any) -> str:
  """Why the kernels do not serve; '' if they do."""
  if not in_order or t != s:
    return 'queries and keys are not those of one text in order'
  if t < _LEAST:
    return f'{t} tokens are few'
  other = [d for d in map(jnp.dtype, dtypes) if d != jnp.dtype(jnp.bfloat16)]
  return f'{other[0]} is not bfloat16' if other else ''


def attend(
    q_btnh: jax.Array, k_btgh: jax.Array, v_btgh: jax.Array, segment_bt: jax.Array | None,
    window: int | None, *, interpret: bool = False,
) -> jax.Array:
  """Causal attention by index, within segments and a window; bfloat16 [b, t, n, h].

  Differentiable in q, k and v. Any t: it is padded to whole blocks.
  """
  _, t, n, h = q_btnh.shape
  whole = -(-t // _BLOCKS[-1]) * _BLOCKS[-1]
  block = next(size for size in _BLOCKS if whole % size == 0)
  mask = splash.CausalMask((whole, whole))
  if window is not None:
    mask = splash.LocalMask((whole, whole), window_size=(window - 1, 0), offset=0)
  kernel = splash.make_splash_mha(
      splash.MultiHeadMask([mask] * n), head_shards=1, q_seq_shards=1, interpret=interpret,
      block_sizes=splash.BlockSizes(
          block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
          block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
      ),
  )

  def heads_first(x):
    return jnp.pad(x, ((0, 0), (0, whole - t), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

  scaled = (q_btnh.astype(jnp.float32) * h**-0.5).astype(q_btnh.dtype)
  args = heads_first(scaled), heads_first(k_btgh), heads_first(v_btgh)
  if segment_bt is None:
    out_bnth = jax.vmap(kernel)(*args)
  else:
    own = jnp.pad(segment_bt.astype(jnp.int32), ((0, 0), (0, whole - t)), constant_values=-1)
    out_bnth = jax.vmap(kernel)(*args, splash.SegmentIds(own, own))
  return out_bnth.transpose(0, 2, 1, 3)[:, :t].astype(q_btnh.dtype)
