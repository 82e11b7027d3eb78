"""Computes bias and variance of every router-gradient estimator, exactly, and draws them.

A token meets experts with fixed outputs, a router samples among them, and a smooth function of the
layer's output is the loss: small enough to go through every outcome of the random draws in
float64. Each estimator, as shipped in moejax.routing, is compared with the gradient it estimates.

Example:
  python -m experiments.estimators --out experiments/evidence/estimators
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import io
import itertools
import time
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from experiments import flags as common
from moejax import files, progress
from moejax.errors import UserError
from moejax.routing import draws as draws_lib
from moejax.routing import estimators, sparsemixer, stages, switch
from moejax.routing.types import Routing

FLAGS = flags.FLAGS
PICTURED = ('tanh', 'cubic')

# Coefficients of u, u^2, u^3 and tanh(u + c) in phi.
SHAPES = {
    'linear': (1.0, 0.0, 0.0, 0.0),
    'quad': (1.0, 1 / 2, 0.0, 0.0),
    'cubic': (1.0, 1 / 2, 1 / 3, 0.0),
    'tanh': (0.0, 0.0, 0.0, 1.0),
}


class Problem(NamedTuple):
  """f(y) = f0 + sum_h a_h phi(u_h) with u = B y, one token and its experts' outputs; [n, ...].

  phi is a mixture of SHAPES. A loss of problems stacks each field along a leading axis n.
  """

  logits_e: Any
  outputs_ed: Any
  b_hd: Any
  a_h: Any
  c_h: Any
  f0: Any
  shape: Any

  def loss(self, y_d: jax.Array) -> jax.Array:
    u = self.b_hd @ y_d
    basis = jnp.stack([u, u**2, u**3, jnp.tanh(u + self.c_h)])
    return self.f0 + jnp.dot(self.a_h, self.shape @ basis)


def random_problems(
    kind: str, n: int, num_experts: int, scale: float, *, seed: int = 0, d: int = 6, hidden: int = 8
) -> Problem:
  """n problems of a kind: logits N(0, scale^2), expert outputs N(0, 4), B N(0, 1.5^2 / d).

  The same seed gives the same problems at every scale but for the size of the logits.
  """
  rng = np.random.default_rng([seed, num_experts])
  return Problem(
      logits_e=scale * rng.standard_normal((n, num_experts)),
      outputs_ed=2.0 * rng.standard_normal((n, num_experts, d)),
      b_hd=1.5 / np.sqrt(d) * rng.standard_normal((n, hidden, d)),
      a_h=rng.standard_normal((n, hidden)), c_h=0.5 * rng.standard_normal((n, hidden)),
      f0=rng.standard_normal(n), shape=np.tile(SHAPES[kind], (n, 1)),
  )


@dataclasses.dataclass(frozen=True)
class Estimator:
  """A router with its target.

  route: (logits [1, m, e], draws) -> Routing. target: a name of `targets`. coin: probability that
  the second random number matters as 'full'; None: the router tosses no coin. temperature: of its
  softmax; its logits are multiplied by it, so that every estimator samples alike. baseline: for
  REINFORCE, what is subtracted from the loss: 'zero' or 'f(0)'; None: differentiate the loss.
  """

  label: str
  route: Callable[[jax.Array, draws_lib.Draws], Routing]
  target: str
  coin: float | None = None
  temperature: float = 1.0
  baseline: str | None = None


def mixer(version: str, label: str, target: str, k: int = 1, **options: Any) -> Estimator:
  """A SparseMixer of k choices; every expert a candidate, 1/3 exact, unless options say else."""
  rule = sparsemixer.RULES[version]
  options = {'eps': None, 'variant': 'paper', **options}
  return Estimator(
      label, lambda z, draws: sparsemixer.route(z, k, version=version, draws=draws, **options),
      target, coin=rule.full if rule.full < 1 else None, temperature=rule.temperature,
  )


def all_estimators() -> dict[str, Estimator]:
  """Every estimator by a short name, top-1, every expert a candidate."""
  e = estimators
  off = {'euler_on_argmax': False}
  return {
      'topk': Estimator('top-1 gating (Switch, GShard)', lambda z, draws: switch.route(z),
                        'detached'),
      'densemixer': Estimator('DenseMixer (dense)', lambda z, draws: e.densemixer(z, 1), 'dense'),
      'sampled_gating': mixer('sampled_gating', 'sampled gating (Euler)', 'detached'),
      'straight_through': Estimator(
          'straight-through (dense)', lambda z, draws: e.straight_through(z, 1, draws=draws),
          'detached'),
      'reinmax': Estimator(
          'ReinMax (dense)', lambda z, draws: e.reinmax(z, 1, draws=draws), 'detached'),
      'reinforce': Estimator(
          'REINFORCE', lambda z, draws: e.reinforce(z, 1, draws=draws), 'detached',
          baseline='zero'),
      'reinforce_baseline': Estimator(
          'REINFORCE, baseline f(0)', lambda z, draws: e.reinforce(z, 1, draws=draws), 'detached',
          baseline='f(0)'),
      'v1': mixer('sparsemixer_v1', 'SparseMixer v1', 'full'),
      'v2': mixer('sparsemixer_v2', 'SparseMixer v2', 'detached'),
      'v2_star': mixer('sparsemixer_v2_star', 'SparseMixer v2*', 'full'),
      'v1_pure': mixer('sparsemixer_v1', 'v1, no Euler on argmax', 'full', **off),
      'v2_pure': mixer('sparsemixer_v2', 'v2, no Euler on argmax', 'detached', **off),
      'v2_star_pure': mixer('sparsemixer_v2_star', 'v2*, no Euler on argmax', 'full', **off),
  }


def targets(problem: Problem) -> dict[str, jax.Array]:
  """The gradients [e] of one problem's logits that the estimators estimate.

  detached: of E_D[f(p_D E_D)] with the gates held constant. full: with gates that vary. dense: of
  f(sum_i p_i E_i), every expert at once.
  """

  def expected(z, gates):
    values = jax.vmap(problem.loss)(gates[:, None] * problem.outputs_ed)
    return jnp.dot(jax.nn.softmax(z), values)

  z = problem.logits_e
  return {
      'detached': jax.grad(lambda z: expected(z, jax.nn.softmax(problem.logits_e)))(z),
      'full': jax.grad(lambda z: expected(z, jax.nn.softmax(z)))(z),
      'dense': jax.grad(lambda z: problem.loss(jax.nn.softmax(z) @ problem.outputs_ed))(z),
  }


def surrogate(
    estimator: Estimator, problem: Problem, logits_me: jax.Array, outputs_med: jax.Array,
    draws: draws_lib.Draws,
) -> jax.Array:
  """What a training step would differentiate, summed over m tokens with draws of their own."""
  routing = estimator.route(estimator.temperature * logits_me[None], draws)
  chosen = jnp.take_along_axis(outputs_med, routing.choice_mk[..., None], axis=1)
  h = routing.gate_mk[..., None] * chosen
  if routing.scale_mk is not None:
    h = h + jax.lax.stop_gradient(routing.scale_mk[..., None] * h - h)
  losses_m = jax.vmap(problem.loss)(h.sum(1))
  if estimator.baseline is None:
    return losses_m.sum()
  assert routing.log_prob_m is not None
  zero = problem.loss(jnp.zeros_like(outputs_med[0, 0])) if estimator.baseline == 'f(0)' else 0.0
  mean = estimators.surrogate_loss(routing.log_prob_m, losses_m, zero)
  return losses_m.sum() + mean * logits_me.shape[0]


def gradients(
    estimator: Estimator, problem: Problem, draws: draws_lib.Draws
) -> tuple[jax.Array, jax.Array]:
  """The estimates of every draw, [m, e] of the logits and [m, e, d] of the experts' outputs."""
  m = draws.uniform[0].shape[0]
  every = lambda a: jnp.tile(a[None], (m,) + (1,) * a.ndim)
  return jax.grad(lambda z, x: surrogate(estimator, problem, z, x, draws), (0, 1))(
      every(problem.logits_e), every(problem.outputs_ed)
  )


def outcomes(estimator: Estimator, k: int, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
  """All (experts [n, k], coins [n, k]) that the draws of one token can give; coin 1 is 'full'."""
  sides = (0, 1) if estimator.coin is not None else (1,)
  experts = itertools.product(range(num_experts), repeat=k)
  rows = list(itertools.product(experts, itertools.product(sides, repeat=k)))
  return np.array([r[0] for r in rows]), np.array([r[1] for r in rows])


def forcing_draws(
    experts_nk: np.ndarray, coins_nk: np.ndarray, num_experts: int
) -> draws_lib.Draws:
  """Float64 draws that make a router choose these experts and toss these coins."""
  wanted = np.arange(num_experts) == experts_nk.T[..., None]
  return draws_lib.Draws(
      exponential=jnp.array(np.where(wanted, 1e-300, 1.0)),
      uniform=jnp.array(np.where(coins_nk.T == 1, 1 - 1e-9, 0.0)),
  )


def enumerate_estimator(
    estimator: Estimator, problem: Problem, k: int = 1, **candidates: Any
) -> dict[str, jax.Array]:
  """Exact moments of an estimator for one problem in float64.

  Args:
    k: choices the router makes.
    candidates: `eps` and `variant` of the router, where not every expert is a candidate.

  Returns:
    mean: [e], of the gradient of the logits. variance: trace of its covariance. expert_mean:
    [e, d], mean gradient of the experts' outputs.
  """
  num_experts = problem.logits_e.shape[-1]
  experts_nk, coins_nk = outcomes(estimator, k, num_experts)
  draws = forcing_draws(experts_nk, coins_nk, num_experts)
  logits_ne = jnp.tile(problem.logits_e[None], (len(experts_nk), 1))
  weight_n = jnp.ones(len(experts_nk))
  for i, step in enumerate(stages.choose(logits_ne, k, draws=draws, **candidates)):
    # An expert that cannot be drawn, being no candidate or taken, has probability 0 here.
    weight_n *= jnp.take_along_axis(step.probs_me, jnp.array(experts_nk[:, i, None]), -1)[:, 0]
    if estimator.coin is not None:
      weight_n *= jnp.where(coins_nk[:, i] == 1, estimator.coin, 1 - estimator.coin)
  grad_ne, grad_ned = gradients(estimator, problem, draws)
  mean_e = weight_n @ grad_ne
  return {
      'mean': mean_e,
      'variance': weight_n @ jnp.sum((grad_ne - mean_e[None]) ** 2, -1),
      'expert_mean': jnp.einsum('n,ned->ed', weight_n, grad_ned),
  }


def relative(
    moments: Mapping[str, jax.Array], target_ne: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """||mean - target|| / ||target|| and trace of the covariance / ||target||^2, of n problems."""
  size = jnp.sum(target_ne**2)
  bias = jnp.sqrt(jnp.sum((moments['mean'] - target_ne) ** 2) / size)
  return bias, jnp.sum(moments['variance']) / size


@functools.partial(jax.jit, static_argnums=1)
def measure(
    problems: Problem, names: tuple[str, ...] | None = None
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """(relative bias, relative variance) of the named estimators, or of all, over n problems."""
  wanted = jax.vmap(targets)(problems)
  return {
      name: relative(
          jax.vmap(functools.partial(enumerate_estimator, estimator))(problems),
          wanted[estimator.target],
      )
      for name, estimator in all_estimators().items() if names is None or name in names
  }


def compute(
    scales: Sequence[float], experts: Sequence[int], n: int
) -> dict[str, Any]:
  """Everything the picture shows and more, as JSON: results[loss][experts][estimator]."""
  results: dict[str, Any] = {kind: {} for kind in SHAPES}
  cells = list(itertools.product(experts, SHAPES, scales))
  with jax.enable_x64(True):
    for e, kind, scale in progress.bar(cells, label='enumerate', unit='setting'):
      problems = jax.tree.map(jnp.asarray, random_problems(kind, n, e, scale))
      rows = results[kind].setdefault(str(e), {})
      for name, (bias, variance) in measure(problems).items():
        row = rows.setdefault(name, {'relative_bias': [], 'relative_variance': []})
        row['relative_bias'].append(_round(bias))
        row['relative_variance'].append(_round(variance))
  return {
      'what': 'Bias ||E[g] - target|| / ||target|| and variance trace cov(g) / ||target||^2 of '
              'estimators g of the gradient of router logits, pooled over random problems, by '
              'enumeration of every outcome in float64.',
      'problems': n,
      'logit_scales': list(scales),
      'experts': list(experts),
      'estimators': {
          name: {'label': e.label, 'target': e.target} for name, e in all_estimators().items()
      },
      'results': results,
  }


def _round(x: jax.Array) -> float:
  """Four digits; what is rounding error of an exact 0 becomes 0."""
  return 0.0 if abs(float(x)) < 1e-12 else float(f'{float(x):.4g}')


# Colour, dashes and width of each estimator; dashed: the same without its usual helper (Euler's
# rule on the argmax for SparseMixer; for REINFORCE without a baseline).
_STYLES: dict[str, tuple[str, Any, float]] = {
    'topk': ('#1b1b1b', '-', 1.6),
    'densemixer': ('#9a9a9a', '-', 1.6),
    'sampled_gating': ('#e69f00', '-', 1.6),
    'straight_through': ('#7cc4ee', '-', 1.6),
    'reinmax': ('#0063b1', '-', 1.6),
    'reinforce': ('#009e73', '--', 1.6),
    'reinforce_baseline': ('#009e73', '-', 1.6),
    'v2': ('#d1352b', '-', 1.6),
    'v2_pure': ('#d1352b', '--', 1.6),
    'v2_star': ('#7a4a1e', '-', 3.0),
    'v2_star_pure': ('#7a4a1e', '--', 1.6),
    'v1': ('#c58be6', '-', 1.3),
    'v1_pure': ('#c58be6', '--', 1.6),
}
_QUANTITIES = (
    ('relative_bias', 'relative bias\n||E[g] - target|| / ||target||', 3e-3),
    ('relative_variance', 'relative variance\ntrace cov(g) / ||target||$^2$', 3e-2),
)
_NOTE = """One choice a token, every expert a candidate,
{n} random problems a point.

Target of an estimator:
[detached]  E f(p_D E_D), gates held constant
[full]  the same, gates varying
[dense]  f(sum of all p_i E_i)

Not drawn where exactly 0:
bias of REINFORCE; on the cubic loss also of
v2 and v2* without Euler on the argmax;
variance of top-1 gating and DenseMixer.

Values under an axis are cut off."""


def draw(result: Mapping[str, Any]) -> bytes:
  """The picture as PNG: a row for bias and one for variance of each loss, a column an expert count.

  Raises:
    UserError: matplotlib is not installed.
  """
  try:
    from matplotlib import figure, lines
  except ImportError as error:
    raise UserError("pictures need matplotlib: install 'moejax[report]'") from error
  rows = [(kind, *quantity) for kind in PICTURED for quantity in _QUANTITIES]
  canvas = figure.Figure(
      figsize=(3.0 * len(result['experts']) + 3.6, 2.7 * len(rows) + 1.2), dpi=110,
      layout='constrained',
  )
  axes = canvas.subplots(len(rows), len(result['experts']), sharex=True, sharey='row',
                         squeeze=False)
  for line, row in zip(axes, rows):
    _draw_row(line, result, *row)
  for ax in axes[-1]:
    ax.set_xlabel('standard deviation of the logits')
  labels = {name: f"{e['label']}  [{e['target']}]" for name, e in result['estimators'].items()}
  handles = [
      lines.Line2D([], [], color=colour, linestyle=dashes, lw=width, label=labels[name])
      for name, (colour, dashes, width) in _STYLES.items()
  ]
  canvas.legend(handles=handles, loc='outside right upper', frameon=False, fontsize=9,
                title='Estimator  [its target]', alignment='left')
  axes[len(rows) // 2][-1].annotate(
      _NOTE.format(n=result['problems']), (1.06, 1.0), xycoords='axes fraction', va='top',
      fontsize=9, annotation_clip=False,
  ).set_in_layout(False)
  canvas.suptitle('Bias and variance of router-gradient estimators, by exact enumeration',
                  fontsize=13)
  content = io.BytesIO()
  canvas.savefig(content, format='png', metadata={'Software': None})
  return content.getvalue()


def _draw_row(axes: Any, result: Mapping[str, Any], kind: str, name: str, label: str, floor: float):
  """One quantity of one loss, an axis for each number of experts."""
  top = floor
  for ax, e in zip(axes, result['experts']):
    for estimator, (colour, dashes, width) in _STYLES.items():
      values = np.array(result['results'][kind][str(e)][estimator][name])
      top = max(top, values.max())
      if values.max() > 0:
        ax.plot(result['logit_scales'], np.maximum(values, floor / 100), dashes, color=colour,
                lw=width, marker='o', ms=2.6)
    ax.set(xscale='log', yscale='log')
    ax.set_xticks(result['logit_scales'], [f'{s:g}' for s in result['logit_scales']])
    ax.minorticks_off()
    ax.grid(alpha=0.25)
    ax.set_title(f'{kind} loss, {e} experts', fontsize=10)
  axes[0].set_ylim(floor, 1.5 * top)
  axes[0].set_ylabel(label)


def main() -> None:
  for ending in ('json', 'png'):
    files.require_writable(f'{FLAGS.out}.{ending}')
  start = time.monotonic()
  result = compute(FLAGS.scales, [int(e) for e in FLAGS.experts], FLAGS.problems)
  files.write_json(f'{FLAGS.out}.json', result)
  files.write_whole(f'{FLAGS.out}.png', draw(result))
  print(f'{FLAGS.out}.json and .png written in {progress.clock(time.monotonic() - start)}')


def define_flags() -> None:
  """Defines --out, --problems, --scales and --experts."""
  flags.DEFINE_string('out', 'experiments/evidence/estimators', 'Writes OUT.json and OUT.png.')
  flags.DEFINE_integer('problems', 400, 'Random problems a setting.', lower_bound=1)
  flags.DEFINE_multi_float(
      'scales', [0.1, 0.2, 0.4, 0.8, 1.5, 3.0], 'Standard deviations of the logits.',
      lower_bound=1e-3,
  )
  flags.DEFINE_multi_integer('experts', [2, 4, 8, 16], 'Numbers of experts.', lower_bound=2)


if __name__ == '__main__':
  define_flags()
  common.run(main, __doc__)
