"""Training the routers of split layers on what their experts did.

MoEfication's (arXiv 2110.01786) starts from the experts' centres and learns the mass of activations
in each expert, by binary cross-entropy with Adam at 0.01 over 30 epochs of batches of 512. The
published code scales each batch by its own largest mass, so the same token has another target in
another batch; one scale for all is the default here. D2DMoE's (2310.04361) learns the lengths of
the outputs, by squared error. The first nine tenths of the tokens train, the last validate, and
the parameters kept are those that validate best, the initial ones among them.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.compress import chooser_core
from moejax.errors import UserError, did_you_mean
from moejax.routing import choice

Params = dict[str, Any]
SCALES = ('all', 'batch')
DECAY, SQUARE_DECAY, EPS = 0.9, 0.999, 1e-8


@dataclasses.dataclass(frozen=True)
class Trained:
  """A router and how it came about.

  params: for `choice.scores`, of kind 'mlp' or 'norm', float32. losses: of each step, float32
  [epochs, steps]. validation: of the initial router and after each epoch, [epochs + 1]; recall of
  the mass, higher is better, or the squared error over the mean square of the lengths, lower is
  better. kept: the epoch of params, 0 for the initial one.
  """

  params: dict[str, np.ndarray]
  losses: np.ndarray
  validation: np.ndarray
  kept: int


def initial_mlp(centres_ed: np.ndarray) -> Params:
  """MoEfication's start: the centres, then the identity; it ranks as x . centre does."""
  kernel = np.array(np.asarray(centres_ed, np.float32).T)
  return {'kernel': kernel, 'out': np.eye(kernel.shape[1], dtype=np.float32)}


def initial_norm(width: int, hidden: int, experts: int, seed: int = 0) -> Params:
  """D2DMoE's router of a hidden layer: normal weights of variance 1 / inputs, biases of zero."""
  rng = np.random.default_rng(seed)
  normal = lambda a, b: (rng.standard_normal((a, b)) / np.sqrt(a)).astype(np.float32)
  return {
      'kernel': normal(width, hidden), 'bias': np.zeros(hidden, np.float32),
      'out': normal(hidden, experts), 'out_bias': np.zeros(experts, np.float32),
  }


def train_mlp(
    initial: Mapping[str, Any], x_md: np.ndarray, mass_me: np.ndarray, k: int, *,
    scale: str = 'all', epochs: int = 30, batch: int = 512, rate: float = 0.01, seed: int = 0,
    batches: Sequence[np.ndarray] | None = None,
) -> Trained:
  """MoEfication's router, the same for the same seed.

  Args:
    initial: of `initial_mlp`. x_md: the layer's inputs. mass_me: of `activation_mass`.
    k: experts of the recall by which an epoch is judged.
    scale: what targets are divided by: 'all', the largest mass of the training tokens; 'batch', as
      published, that of each batch.
    batches: tokens of each batch, [n] each; the same for every epoch and in this order. None: the
      tokens are shuffled in each epoch.

  Raises:
    UserError: no tokens, inputs and masses that do not match, values that are not finite, an
      unknown scale, or a k that is not between 1 and the number of experts.
  """
  if scale not in SCALES:
    raise UserError(f'scale = {scale!r}: one of {SCALES}{did_you_mean(scale, SCALES)}')
  x, mass = _checked(x_md, mass_me)
  train, held = _split(len(x))
  unit = _or_one(mass[train].max()) if scale == 'all' else None
  x_held, mass_held = jnp.asarray(x[held]), jnp.asarray(mass[held])
  recall = lambda params: chooser_core.mass_recall(_scores(params, x_held, 'mlp'), mass_held, k)
  orders = _orders(len(x[train]), epochs, batch, seed, batches)
  return _train('mlp', initial, x, mass, unit, recall, orders, rate)


def train_norm(
    initial: Mapping[str, Any], x_md: np.ndarray, norms_me: np.ndarray, *, epochs: int = 10,
    batch: int = 512, rate: float = 1e-3, seed: int = 0,
    batches: Sequence[np.ndarray] | None = None,
) -> Trained:
  """D2DMoE's router, the same for the same seed.

  It learns lengths over their root mean square, which the last layer then takes in: lengths of any
  size are learnt alike.

  Args:
    initial: of `initial_norm`. x_md: the layer's inputs. norms_me: of `output_norms`.
    batches: as in `train_mlp`.

  Raises:
    UserError: no tokens, inputs and lengths that do not match, or values that are not finite.
  """
  x, norms = _checked(x_md, norms_me)
  train, held = _split(len(x))
  power = lambda a: float(np.mean(np.square(a, dtype=np.float64)))
  unit = _or_one(np.sqrt(power(norms[train])))
  x_held, target = jnp.asarray(x[held]), norms[held] / unit
  most = _or_one(power(target))
  less = lambda params: -power(np.asarray(_scores(params, x_held, 'norm')) - target) / most
  orders = _orders(len(x[train]), epochs, batch, seed, batches)
  found = _train('norm', initial, x, norms, unit, less, orders, rate)
  params = {
      name: a * unit if name in ('out', 'out_bias') else a for name, a in found.params.items()
  }
  return dataclasses.replace(found, params=params, validation=-found.validation)


def targets(mass_be: jax.Array, scale: float | jax.Array | None = None) -> jax.Array:
  """Masses over a scale, float32 [b, e]; over the largest of them, as published, without one."""
  largest = jnp.max(mass_be) if scale is None else jnp.asarray(scale, jnp.float32)
  return mass_be / jnp.where(largest > 0, largest, 1.0)


def initial_state(params: Mapping[str, Any]) -> Any:
  """Adam's means of gradients and of their squares, and the steps taken."""
  zeros = lambda: {name: jnp.zeros(np.shape(a), jnp.float32) for name, a in params.items()}
  return zeros(), zeros(), jnp.float32(0)


@functools.partial(jax.jit, static_argnames=('kind',))
def run_epoch(
    params: Params, state: Any, x_md: jax.Array, target_me: jax.Array, index_sb: jax.Array,
    scale: jax.Array | None, rate: float, *, kind: str,
) -> tuple[Params, Any, jax.Array]:
  """One step of Adam for each row of `index_sb`, the tokens of a batch, -1 for none.

  Args:
    state: of `initial_state`. scale: what targets are divided by; None for the batch's largest.

  Returns:
    (parameters, state, losses float32 [s]).
  """
  def step(carry, index_b):
    params, state = carry
    there_b = index_b >= 0
    target = targets(jnp.where(there_b[:, None], target_me[index_b], 0.0), scale)

    def loss_of(params):
      y = choice.scores(params, x_md[index_b], kind)
      if kind == 'mlp':
        each = jax.nn.softplus(y) - target * y
      else:
        each = jnp.square(y - target)
      total = jnp.where(there_b[:, None], each, 0.0).sum()
      return total / (jnp.maximum(there_b.sum(), 1) * target.shape[1])

    loss, gradient = jax.value_and_grad(loss_of)(params)
    return _adam(params, state, gradient, rate), loss

  (params, state), losses = jax.lax.scan(step, (params, state), index_sb)
  return params, state, losses


def _adam(params, state, gradient, rate):
  """Adam as in PyTorch; 1 - decay^n from its logarithm, which float32 would lose digits of."""
  mean, square, steps = state
  steps = steps + 1
  rest = lambda decay: -jnp.expm1(steps * math.log(decay))
  mean = {n: DECAY * a + (1 - DECAY) * gradient[n] for n, a in mean.items()}
  square = {
      n: SQUARE_DECAY * a + (1 - SQUARE_DECAY) * gradient[n] ** 2 for n, a in square.items()
  }
  by = {n: jnp.sqrt(a / rest(SQUARE_DECAY)) + EPS for n, a in square.items()}
  params = {n: a - rate * (mean[n] / rest(DECAY)) / by[n] for n, a in params.items()}
  return params, (mean, square, steps)


def _train(kind, initial, x, target, unit, judge, orders, rate):
  """An epoch for each of `orders`, then judged: more is better, the first of equal ones is kept."""
  params: Params = {name: jnp.asarray(a, jnp.float32) for name, a in initial.items()}
  state = initial_state(params)
  x_md, target_me = jnp.asarray(x), jnp.asarray(target)
  scale = None if unit is None else jnp.float32(unit)
  best, kept, figures, losses = params, 0, [judge(params)], []
  for epoch, index_sb in enumerate(orders, 1):
    params, state, loss = run_epoch(
        params, state, x_md, target_me, index_sb, scale, rate, kind=kind
    )
    losses.append(np.asarray(loss))
    figures.append(judge(params))
    if figures[-1] > max(figures[:-1]):
      best, kept = params, epoch
  return Trained(
      {name: np.asarray(a) for name, a in best.items()},
      np.stack(losses) if losses else np.zeros((0, 0), np.float32), np.array(figures), kept,
  )


@functools.partial(jax.jit, static_argnames=('kind',))
def _scores(params, x_md, kind):
  return choice.scores(params, x_md, kind)


def _checked(x_md: np.ndarray, target_me: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  x, target = np.asarray(x_md, np.float32), np.asarray(target_me, np.float32)
  if not len(x):
    raise UserError('no tokens to train a router on: give the calibration at least one')
  if x.shape[:1] != target.shape[:1]:
    raise UserError(f'inputs of {len(x)} tokens and targets of {len(target)} do not match')
  for name, a in (('inputs', x), ('targets', target)):
    if not np.isfinite(a).all():
      bad = int((~np.isfinite(a)).sum())
      raise UserError(f'the {name} of the router are not finite in {bad} places')
  return x, target


def _split(tokens: int) -> tuple[slice, slice]:
  """The first tenths train and the rest validates; below ten tokens all do both."""
  first = tokens // 10 * 9
  return (slice(0, first), slice(first, tokens)) if first else (slice(0, tokens),) * 2


def _orders(
    tokens: int, epochs: int, batch: int, seed: int, batches: Sequence[np.ndarray] | None
) -> Iterator[np.ndarray]:
  """The batches of each epoch, int32 [steps, batch]: those given, or all tokens in a new order."""
  rng = np.random.default_rng(seed)
  for _ in range(epochs):
    if batches is not None:
      yield _padded(batches)
      continue
    order = rng.permutation(tokens)
    yield _padded([order[i : i + batch] for i in range(0, tokens, batch)])


def _padded(batches: Sequence[np.ndarray]) -> np.ndarray:
  out = np.full((len(batches), max(len(tokens) for tokens in batches)), -1, np.int32)
  for row, tokens in zip(out, batches):
    row[: len(tokens)] = tokens
  return out


def _or_one(value: Any) -> float:
  return float(value) if value > 0 else 1.0
