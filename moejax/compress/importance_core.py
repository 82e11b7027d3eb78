"""Which neurons matter to a loss, and experts that share the best: MoEBERT (arXiv 2204.07675).

A neuron's importance is the first-order change of the loss without it, its absolute value summed
over samples. Every expert keeps the most important neurons, the next ones are dealt in turn. Two
parts of the method that stand alone are here too: its table from tokens to experts, and its
symmetric divergence. An ffn is a mapping of wi [d, f], wo [f, d] and, where gated, gate [d, f].
"""

from collections.abc import Callable, Mapping
import functools
import heapq
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError

IN_WEIGHTS = ('wi', 'gate')


def importance(
    loss_fn: Callable[[Mapping[str, Any], Any], jax.Array],
    ffn: Mapping[str, Any],
    samples: Any,
    batch: int = 16,
) -> np.ndarray:
  """Sum over samples of | sum of <w, dL/dw> over a neuron's vectors |, float32 [f].

  The vectors are a neuron's column of wi, its row of wo and, where there is one, its column of
  gate; biases do not count. Sums over blocks of samples add up.

  Args:
    loss_fn: (ffn, one sample) -> the loss of that sample, a scalar; differentiable in the ffn. It
      compiles once for each function and shape of samples.
    ffn: the layer, with what else the loss needs of it.
    samples: a tree of arrays with a leading axis of samples.
    batch: samples whose gradients are held at a time.

  Raises:
    UserError: no samples, samples of unequal counts, or a gradient that is not finite.
  """
  counts = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in jax.tree.leaves(samples)}
  if len(counts) != 1 or 0 in counts:
    raise UserError(f'samples of counts {sorted(counts)}: give one or more, as many in each array')
  ffn = {name: jnp.asarray(w) for name, w in ffn.items()}
  total = np.asarray(_importance(loss_fn, ffn, jax.tree.map(jnp.asarray, samples), batch))
  if not np.isfinite(total).all():
    raise UserError('the gradient of the loss holds NaN or infinity: check the samples and weights')
  return total


@functools.partial(jax.jit, static_argnames=('loss_fn', 'batch'))
def _importance(loss_fn, ffn, samples, batch):
  scales = jnp.ones(ffn['wo'].shape[0], jnp.float32)

  def of_one(sample):
    # d/ds of a loss with a neuron's vectors times s is, at s = 1, the sum of <w, dL/dw>.
    return jnp.abs(jax.grad(lambda s: loss_fn(_scaled(ffn, s), sample))(scales))

  return jax.lax.map(of_one, samples, batch_size=batch).sum(0)


def _scaled(ffn, scale_f):
  out = dict(ffn)
  for name, w in ffn.items():
    if name in IN_WEIGHTS:
      out[name] = (w * scale_f[None]).astype(w.dtype)
  out['wo'] = (ffn['wo'] * scale_f[:, None]).astype(ffn['wo'].dtype)
  return out


def by_importance(importance_f: np.ndarray) -> np.ndarray:
  """Neurons from the most important on, int32 [f]; ties go to the lower index.

  Raises:
    UserError: an importance is NaN.
  """
  values = np.asarray(importance_f)
  if np.isnan(values).any():
    raise UserError('an importance is NaN: check the samples and weights it is made from')
  return np.argsort(-values, kind='stable').astype(np.int32)


def deal(order_f: np.ndarray, experts: int, shared: int, size: int) -> np.ndarray:
  """Each expert's neurons, int32 [experts, size].

  The first `shared` neurons are every expert's, the next go to one expert after the other, and each
  expert keeps its first `size`. Neurons may be left over.

  Args:
    order_f: neurons from the most important on; see `by_importance`.

  Raises:
    UserError: there are not enough neurons, or an expert is smaller than what is shared.
  """
  order = np.asarray(order_f, np.int32)
  own = size - shared
  if experts < 1 or shared < 0 or own < 0 or size < 1 or shared + experts * own > len(order):
    raise UserError(
        f'{len(order)} neurons do not make {experts} experts of {size} that share {shared}'
    )
  dealt = order[shared : shared + experts * own].reshape(own, experts).T
  return np.concatenate([np.tile(order[:shared], (experts, 1)), dealt], 1)


def hash_balanced(frequencies_v: np.ndarray, experts: int) -> np.ndarray:
  """An expert for each token of the vocabulary, even in use, int32 [v]; -1 for unseen tokens.

  From the most frequent token on, each goes to the expert with least frequency so far; ties go to
  the token and the expert of lower index.

  Raises:
    UserError: a frequency is negative or not finite, or there are no experts.
  """
  frequencies = np.asarray(frequencies_v)
  if experts < 1:
    raise UserError(f'{experts} experts: one or more')
  if not np.isfinite(frequencies).all() or (frequencies < 0).any():
    raise UserError('a frequency of a token is negative, NaN or infinity: give counts')
  table = np.full(len(frequencies), -1, np.int32)
  loads = [(0, expert) for expert in range(experts)]
  for token in np.argsort(-frequencies.astype(np.float64), kind='stable'):
    if frequencies[token] == 0:
      break
    load, expert = loads[0]
    table[token] = expert
    heapq.heapreplace(loads, (load + frequencies[token].item(), expert))
  return table


def symmetric_kl(p_me: jax.typing.ArrayLike, q_me: jax.typing.ArrayLike) -> jax.Array:
  """Half the sum of (p - q)(log p - log q), over classes, float32 [m]; each row sums
  to 1.

  The mean of the two Kullback-Leibler divergences. Zeros count as the least positive number.
  """
  p, q = jnp.asarray(p_me, jnp.float32), jnp.asarray(q_me, jnp.float32)
  log = lambda a: jnp.log(jnp.maximum(a, jnp.finfo(jnp.float32).tiny))
  return 0.5 * ((p - q) * (log(p) - log(q))).sum(-1)
