"""How tokens of a split layer find their experts: routers made or trained on calibration tokens."""

from collections.abc import Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.compress import chooser_core, router_training, split_core
from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.routing import choice as choice_lib

# Choice -> score of `config.SelectionConfig`.
CHOICES = {
    'mlp': 'mlp', 'norm': 'norm', 'cosine': 'unit_linear', 'euclid': 'unit_linear',
    'average': 'linear', 'representatives': 'swiglu', 'oracle': 'oracle', 'random': 'random',
}
# Those whose scores are never below 0.
POSITIVE = ('norm', 'representatives', 'oracle', 'random')
# Hidden units of D2DMoE's router.
NORM_WIDTH = 128
_ROWS = 2048
_top = jax.jit(choice_lib.top, static_argnames=('k',))


def check(choice: str, config: ModelConfig) -> None:
  """Raises UserError for a router that this model's layers have no use for."""
  if choice in ('average', 'representatives') and not config.gated:
    raise UserError(f'choice = {choice!r} is for gated layers; this is a {config.family} without')


def width(score: str, experts: int) -> int:
  """Hidden units of a router."""
  return {'mlp': experts, 'norm': NORM_WIDTH}.get(score, 0)


def has_bias(choice: str, config: ModelConfig) -> bool:
  """Whether a linear score has a bias."""
  biased = bool(getattr(config, 'ffn_bias', False))
  return choice == 'euclid' or (choice == 'average' and biased)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """A split layer and calibration tokens.

  experts: wi [e, d, s], ... hidden_mf: units of the experts, in their order. x_md: inputs.
  labels_f: the expert of each unit. relu: whether units are never below 0, and 0 where idle.
  parts, ffn: the split, and the layer before.
  """

  experts: Mapping[str, np.ndarray]
  hidden_mf: np.ndarray
  x_md: np.ndarray
  labels_f: np.ndarray
  relu: bool
  parts: split_core.Parts
  ffn: Mapping[str, np.ndarray]

  @property
  def count(self) -> int:
    return self.parts.experts

  @property
  def wo_fd(self) -> np.ndarray:
    """wo of all experts, rows in the order of the hidden units."""
    return np.concatenate(list(self.experts['wo']))

  @property
  def form(self) -> str:
    return 'relu' if self.relu else 'abs'

  def mass(self) -> np.ndarray:
    """Activation in each expert, float32 [m, e]."""
    return np.asarray(
        chooser_core.activation_mass(
            jnp.asarray(self.hidden_mf), jnp.asarray(self.labels_f), self.count, self.form
        )
    )

  def fill(self) -> np.ndarray:
    """What each expert puts out in the mean, float32 [e, d]."""
    return chooser_core.mean_fill(self.wo_fd, self.hidden_mf.mean(0), self.labels_f)

  def neurons_run(self, chosen_me: np.ndarray) -> float:
    """The share of the layer's neurons that a token runs, a mean; shared ones included."""
    shared = self.parts.shared / len(self.parts.order)
    return shared + (1 - shared) * float(np.mean(chosen_me))

  def active(self) -> float:
    """The share of hidden units that are not 0."""
    return float(np.mean(self.hidden_mf != 0))

  def error(
      self, experts: Mapping[str, np.ndarray], chosen_me: np.ndarray, fill_ed: np.ndarray | None
  ) -> float:
    """How far the chosen experts' sum is from that of all, relative to it, over the tokens."""
    off = size = 0.0
    wo_fd, new_fd = self.wo_fd, np.concatenate(list(experts['wo']))
    for start in range(0, len(self.x_md), _ROWS):
      piece = slice(start, start + _ROWS)
      hidden = self.hidden_mf[piece]
      want = hidden @ wo_fd
      got = (hidden * self._units(chosen_me[piece])) @ new_fd
      if fill_ed is not None:
        got = got + (~chosen_me[piece]).astype(np.float32) @ fill_ed
      off += float(np.square(got - want).sum(dtype=np.float64))
      size += float(np.square(want).sum(dtype=np.float64))
    return (off / size) ** 0.5 if size else 0.0

  def _units(self, chosen_me: np.ndarray) -> np.ndarray:
    return chosen_me[:, self.labels_f].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A router's weights, and what it chooses for the calibration tokens.

  top_k: experts of a token at most. recall: the activation mass that is chosen.
  """

  params: dict[str, np.ndarray]
  chosen_me: np.ndarray
  top_k: int
  tau: float
  recall: float


def fit(
    choice: str, problem: Problem, *, top_k: int, share: float, mass: float | None, rule: str,
    tau: float | None, fill: bool, published: bool, epochs: int, seed: int,
) -> Fitted:
  """Makes the router and decides how many experts a token runs; arguments as of `moefy`."""
  held = problem.mass()
  aim = held
  if fill:
    aim = np.asarray(chooser_core.deviation_mass(
        jnp.asarray(problem.hidden_mf), jnp.asarray(problem.hidden_mf.mean(0)),
        jnp.asarray(problem.labels_f), problem.count,
    ))
  params = _params(choice, problem, aim, top_k, published, epochs, seed)
  scores = _scores(choice, params, problem, held, seed)
  if rule == 'top':
    if mass is not None:
      top_k = least_k(scores, aim, mass)
    chosen, tau = np.asarray(_top(jnp.asarray(scores), k=top_k)), 0.0
  else:
    top_k = problem.count
    shared = problem.parts.shared / len(problem.parts.order)
    routed = max((share - shared) / (1 - shared), 1 / problem.count)
    tau = tau_for(scores, rule, routed) if tau is None else tau
    chosen = np.asarray(choice_lib.RULES[rule](jnp.asarray(scores), tau))
  total = aim.sum(1)
  kept = np.where(chosen, aim, 0.0).sum(1)
  recall = float((kept[total > 0] / total[total > 0]).mean()) if (total > 0).any() else 1.0
  return Fitted(params=params, chosen_me=chosen, top_k=top_k, tau=float(tau), recall=recall)


def _params(choice, problem, aim, top_k, published, epochs, seed) -> dict[str, np.ndarray]:
  rows_df = np.asarray(problem.ffn.get('gate', problem.ffn['wi']))[:, problem.parts.order]
  rows_df = rows_df[:, problem.parts.shared :]
  if choice in ('oracle', 'random'):
    return {}
  if choice == 'average':
    bias = problem.ffn.get('gate_bias')
    own = None if bias is None else bias[problem.parts.order][problem.parts.shared :]
    return chooser_core.average_gate(rows_df, problem.labels_f, own)
  if choice == 'representatives':
    return chooser_core.representatives(
        problem.ffn['gate'], problem.ffn['wi'], problem.parts.representatives
    )
  centres = chooser_core.centres(rows_df, problem.labels_f)
  if choice == 'cosine':
    return chooser_core.cosine(centres)
  if choice == 'euclid':
    return chooser_core.published_euclid(centres)
  if choice == 'mlp':
    return router_training.train_mlp(
        router_training.initial_mlp(centres), problem.x_md, aim, top_k, epochs=epochs, seed=seed,
        scale='batch' if published else 'all',
    ).params
  norms = np.asarray(chooser_core.output_norms(problem.hidden_mf, problem.wo_fd, problem.labels_f))
  initial = router_training.initial_norm(problem.x_md.shape[1], NORM_WIDTH, problem.count, seed)
  return router_training.train_norm(initial, problem.x_md, norms, epochs=epochs, seed=seed).params


def _scores(choice, params, problem, held, seed) -> np.ndarray:
  if choice == 'oracle':
    return held
  if choice == 'random':
    return np.random.default_rng(seed).random(held.shape).astype(np.float32)
  run = jax.jit(functools.partial(choice_lib.scores, kind=CHOICES[choice]))
  return np.asarray(run(params, jnp.asarray(problem.x_md)))


def least_k(scores_me: np.ndarray, mass_me: np.ndarray, target: float) -> int:
  """The fewest experts, the best by score, that hold a mean share `target` of a token's mass."""
  order = np.argsort(-scores_me, axis=1, kind='stable')
  total = mass_me.sum(1, keepdims=True)
  some = total[:, 0] > 0
  if not some.any():
    return 1
  held = np.cumsum(np.take_along_axis(mass_me, order, 1), 1)[some] / total[some]
  reached = held.mean(0) >= target - 1e-6
  return int(np.argmax(reached)) + 1 if reached.any() else mass_me.shape[1]


def tau_for(scores_me: np.ndarray, rule: str, share: float, steps: int = 12) -> float:
  """The threshold of a rule at which a share of all pairs of token and expert is chosen, or a
  little less.

  In steps of 1/4096 of its range: nearer to a score, rounding would decide on that expert.
  """
  low, high = 0.0, 1.0
  if rule == 'above':
    low, high = float(scores_me.min()) - 1e-6, float(scores_me.max())
  run = jax.jit(lambda tau: choice_lib.RULES[rule](jnp.asarray(scores_me), tau).mean())
  more_is_more = rule != 'above'
  for _ in range(steps):
    middle = (low + high) / 2
    too_many = float(run(middle)) > share
    if too_many == more_is_more:
      high = middle
    else:
      low = middle
  return low if more_is_more else high


def ridge_wo(
    problem: Problem, chosen_me: np.ndarray, ridge: float, fill_ed: np.ndarray | None = None
) -> np.ndarray:
  """wo [e, s, d] that makes the chosen experts' sum nearest to that of all, by least squares.

  Of all wo with a penalty on leaving the one there is: ridge times the mean of the diagonal of the
  chosen units' Gram matrix. Memory O(f^2).
  """
  wo_fd = problem.wo_fd.astype(np.float64)
  units = len(wo_fd)
  gram, cross = np.zeros((units, units)), np.zeros(wo_fd.shape)
  for start in range(0, len(problem.x_md), _ROWS):
    piece = slice(start, start + _ROWS)
    hidden = problem.hidden_mf[piece]
    kept = hidden * problem._units(chosen_me[piece])
    gram += kept.T @ kept
    missing = (hidden - kept) @ problem.wo_fd
    if fill_ed is not None:
      missing -= (~chosen_me[piece]).astype(np.float32) @ fill_ed
    cross += kept.T @ missing
  gram[np.diag_indices(units)] += ridge * max(np.trace(gram) / units, 1e-12)
  wo_fd = wo_fd + np.linalg.solve(gram, cross)
  return wo_fd.astype(np.float32).reshape(problem.experts['wo'].shape)
