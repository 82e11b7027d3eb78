"""Steps that go wrong: a loss that is not finite or far above the last ones."""

from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import errors

WINDOW = 32
ACTIONS = ('stop', 'skip')


def no_losses() -> jax.Array:
  """The memory of a run that has not begun, float32 [WINDOW]; infinite losses are no measure."""
  return jnp.full((WINDOW,), jnp.inf, jnp.float32)


def is_bad(loss: jax.Array, norm: jax.Array, recent_w: jax.Array, nats: float) -> jax.Array:
  """Whether a step is not finite, or its loss is over the median of the recent ones by `nats`.

  nats of 0 asks for finite numbers only; so does a memory that is not yet half full.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  return ~finite | (loss > jnp.median(recent_w) + nats) if nats else ~finite


def remember(recent_w: jax.Array, loss: jax.Array, bad: jax.Array) -> jax.Array:
  """The memory after a step; a bad one leaves no trace."""
  return jnp.where(bad, recent_w, jnp.roll(recent_w, 1).at[0].set(loss))


class Watch:
  """Looks at each step's metrics once they are there, and ends a run that goes wrong."""

  def __init__(self, action: str, nats: float):
    self._skip, self._nats = action == 'skip', nats
    self._waiting: deque[tuple[int, Any]] = deque()
    self._skipped = 0

  def add(self, step: int, metrics: Any) -> None:
    """Takes a step's metrics; looks at those of the step before the last, which must be done."""
    self._waiting.append((step, metrics))
    while len(self._waiting) > 2:
      self._look(*self._waiting.popleft())

  def settle(self) -> None:
    """Looks at every step so far: before a checkpoint, so that none ever holds a bad step."""
    while self._waiting:
      self._look(*self._waiting.popleft())

  def _look(self, step: int, metrics: Any) -> None:
    if not float(metrics['bad_steps']):
      self._skipped = 0
      return
    self._skipped += 1
    loss, norm = float(metrics['cross_entropy']), float(metrics['grad_norm'])
    finite = np.isfinite(loss) and np.isfinite(norm)
    what = f'step {step}: loss {loss:.4g}, gradient norm {norm:.4g}'
    if finite:
      what += f', more than train.spike_nats = {self._nats} over the median of the last {WINDOW}'
    advice = 'lower optim.learning_rate or raise optim.warmup_steps'
    if not self._skip:
      raise errors.UserError(
          f"{what}; {advice} and run again: it goes on from the last checkpoint; train.on_spike = "
          "'skip' would leave such steps out"
      )
    if self._skipped >= WINDOW:
      raise errors.UserError(f'{what}: {WINDOW} steps in a row were skipped; {advice}')
