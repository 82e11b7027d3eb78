"""SparseMixer against what microsoft/SparseMixer computes from the same draws."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routing import draws as draws_lib
from moejax.routing import sparsemixer

VECTORS = Path(__file__).parents[1] / 'vectors' / 'grin'
PHASES = ('train', 'eval')


@functools.cache
def arrays(name):
  with np.load(VECTORS / f'{name}.npz') as f:
    return dict(f)


def cases(name):
  found = sorted({key.partition('/')[0] for key in arrays(name)})
  assert len(found) >= 6
  return [(case, phase) for case in found for phase in PHASES]


class Case:
  """One case and phase, its arrays by name, and the tolerance of its dtype."""

  def __init__(self, name, case, phase):
    self.prefix, self.phase, self.all = case, phase, arrays(name)
    self.double = case.endswith('_f64')
    self.tolerance = dict(atol=1e-9, rtol=0) if self.double else dict(atol=1e-5, rtol=1e-5)
    self.k = int(self.all.get(f'{case}/top_k', 1))
    self.eps = float(self.all[f'{case}/jitter_eps'])

  def input(self, name):
    return self.all[f'{self.prefix}/{name}']

  def recorded(self, name):
    return self.all[f'{self.prefix}/{self.phase}/{name}']

  def draws(self):
    if self.phase == 'eval':
      return None
    suffixes = [''] if f'{self.prefix}/train/exp_draw' in self.all else range(1, self.k + 1)
    return draws_lib.Draws(
        exponential=[self.recorded(f'exp_draw{s}') for s in suffixes],
        uniform=[self.recorded(f'u_draw{s}')[:, 0] for s in suffixes],
    )

  def check(self, got, name, **tolerance):
    want = self.recorded(name)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(
        got, want, err_msg=f'{self.prefix} {name}', **(tolerance or self.tolerance)
    )


def weighted(routing, expert_out):
  """The chosen outputs times their gates, [m, k, d]."""
  chosen = jnp.take_along_axis(expert_out, routing.choice_mk[..., None], axis=1)
  return chosen * routing.gate_mk[..., None]


def measure(made, version, args, combine):
  """The Routing, the loss, and the gradients of the loss and of the balance loss, stacked."""

  @jax.jit
  def run(*args):
    def losses(z, *rest):
      routing = sparsemixer.route(
          z[None], made.k, version=version, eps=made.eps, draws=made.draws()
      )
      y = combine(weighted(routing, rest[0]).sum(1), *rest[1:])
      loss = (jnp.tanh(y) * made.input('C')).sum() + 0.05 * (y**2).sum()
      return (loss, routing.load_balance_loss), routing

    (loss, _), pull, routing = jax.vjp(losses, *args, has_aux=True)
    return routing, loss, jax.vmap(pull)(tuple(jnp.eye(2, dtype=loss.dtype)))

  return jax.device_get(run(*args))


@pytest.mark.parametrize('case, phase', cases('sparsemixer_v1'))
def test_v1(case, phase):
  made = Case('sparsemixer_v1', case, phase)
  with jax.enable_x64(made.double):
    args = [made.input(n) for n in ('logits', 'expert_out', 'omega')]
    routing, loss, grads = measure(
        made, 'sparsemixer_v1', args, lambda y, omega: y * omega[None]
    )
    np.testing.assert_array_equal(routing.choice_mk, made.recorded('sample'))
    made.check(routing.gate_mk * args[2][None], 'multiplier')
    made.check(loss, 'loss')
    for got, name in zip(grads, ('grad_logits', 'grad_expert_out', 'grad_omega')):
      made.check(got[0], name)
    # The code divides the counts by the number of tokens + 1e-6, here it is the number. It does so
    # in float32 even where the rest is float64: each share f <= 1 is off by up to 2^-24 f, and with
    # e = m = 8 the gradient, e sum_i f_i p_i (1[i=j] - p_j) / m, by no more.
    tokens = args[0].shape[0]
    factor = tokens / float(np.float32(tokens + 1e-6))
    rounding = dict(rtol=0, atol=2**-24) if made.double else {}
    made.check(
        routing.load_balance_loss * factor, 'balance_loss',
        **(rounding and dict(rtol=2**-24, atol=0)),
    )
    made.check(grads[0][1] * factor, 'grad_logits_of_balance_loss', **rounding)


@pytest.mark.parametrize('case, phase', cases('sparsemixer_v2'))
def test_v2(case, phase):
  made = Case('sparsemixer_v2', case, phase)
  with jax.enable_x64(made.double):
    args = [made.input(n) for n in ('logits', 'expert_out')]
    routing, loss, grads = measure(made, 'sparsemixer_v2', args, lambda y: y)
    np.testing.assert_array_equal(routing.choice_mk, made.recorded('selected'))
    made.check(routing.gate_mk, 'multiplier')
    made.check(loss, 'loss')
    for got, name in zip(grads, ('grad_logits', 'grad_expert_out')):
      made.check(got[0], name)
    # The balance loss takes the softmax over all experts, and counts the experts drawn.
    probs, experts = made.recorded('original_gates'), args[0].shape[-1]
    counts = np.bincount(made.recorded('selected').ravel(), minlength=experts)
    want = experts * (counts / probs.shape[0] * probs.mean(0)).sum()
    np.testing.assert_allclose(routing.load_balance_loss, want, **made.tolerance)
