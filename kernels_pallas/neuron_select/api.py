"""The entry to chosen experts: picks an implementation, states its cost."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from kernels_pallas.neuron_select import cpu, ref, tpu


class Cost(NamedTuple):
  """Bytes read and written and operations."""

  bytes_moved: float
  flops: float


def neuron_select(
    x_md: jax.Array, experts: Mapping[str, Any], chosen_me: jax.Array,
    act: Callable[..., jax.Array],
) -> jax.Array:
  """y[m] = sum over the chosen e of wo_e(act(wi_e x[m])), [m, d] in x's dtype.

  act(wi_e x[m], gate_e x[m]) where the experts have a gate. Accumulated in float32. See `vjp` for
  gradients: the loops here run as long as what was chosen. On TPU few tokens go by a kernel, on
  CPUs by products in C++.

  Args:
    x_md: tokens. experts: see the package. chosen_me: bool. act: elementwise, of one or two.

  Raises:
    ValueError: shapes that do not fit.
  """
  e, d, f = experts['wi'].shape
  if x_md.shape[1] != d or chosen_me.shape != (len(x_md), e) or experts['wo'].shape != (e, f, d):
    raise ValueError(
        f'neuron_select: x {x_md.shape}, chosen {chosen_me.shape}, wi {experts["wi"].shape} and wo '
        f'{experts["wo"].shape} do not fit'
    )
  if not len(x_md):
    return x_md
  plain = lambda x, own, chosen: ref.neuron_select(x, own, chosen, act)
  refused = tpu.supports(
      len(x_md), d, f, e, x_md.dtype, gated='gate' in experts, weight_dtype=experts['wi'].dtype
  )
  weights = [experts[name].dtype for name in ('wi', 'gate', 'wo') if name in experts]
  by_xla = cpu.supports(x_md.dtype, *weights)
  return jax.lax.platform_dependent(
      x_md, dict(experts), chosen_me, default=plain,
      cpu=plain if by_xla else lambda x, own, c: cpu.neuron_select(x, own, c, act),
      tpu=plain if refused else lambda x, own, c: tpu.neuron_select(x, own, c, act),
  )


def cost(m: int, d: int, f: int, experts: int, pairs: float, *, gated: bool, itemsize: int) -> Cost:
  """What chosen experts move and do, `pairs` of token and expert, `experts` of them met by any.

  flops = 2 n pairs d f; bytes = itemsize (n experts d f + 2 m d), n = 3 gated, else 2.
  """
  matrices = 3 if gated else 2
  return Cost(
      bytes_moved=itemsize * (matrices * experts * d * f + 2 * m * d),
      flops=2.0 * matrices * pairs * d * f,
  )
