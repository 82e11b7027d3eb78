"""moefy(...): a dense layer's neurons become experts and a router (MoEfication, 2110.01786)."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import re
from typing import Any

import jax
import numpy as np

from moejax import account
from moejax.compress import (
  base,
  coactivation_core,
  fewer,
  parts,
  routers,
  sources,
  split_core,
)
from moejax.compress.align_core import hidden_units
from moejax.compress.cluster_core import expert_size
from moejax.config import Activation, ModelConfig, StackConfig
from moejax.config.moe import require_known, require_pattern
from moejax.config.selection import RULES, SelectionConfig
from moejax.errors import UserError
from moejax.ops import selected

# From this share of active neurons in a layer on a user is warned.
_SMOOTH = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moefy(base.Transform):
  """See `moefy`."""

  experts: int | None
  expert_size: int | None
  split: str
  choice: str
  share: float
  top_k: int | None
  mass: float | None
  rule: str
  tau: float | None
  shared: float
  fill: bool
  calibrate: bool
  ridge: float
  published: bool
  tokens: int
  epochs: int
  weights: str
  layers: str
  seed: int

  def __post_init__(self):
    require_known(self.split, 'split', split_core.SPLITS)
    require_known(self.choice, 'choice', tuple(routers.CHOICES))
    require_known(self.rule, 'rule', RULES)
    require_pattern(self.layers)
    if (self.experts is None) == (self.expert_size is None):
      raise UserError('moefy: give experts or expert_size')
    least = {'experts': 1, 'expert_size': 1, 'top_k': 1, 'tokens': 1, 'epochs': 0}
    for name, low in least.items():
      value = getattr(self, name)
      if value is not None and value < low:
        raise UserError(f'moefy: {name} = {value}: at least {low}')
    for name in ('share', 'mass'):
      value = getattr(self, name)
      if value is not None and not 0 < value <= 1:
        raise UserError(f'moefy: {name} = {value}: in (0, 1]')
    if not 0 <= self.shared < 1:
      raise UserError(f'moefy: shared = {self.shared}: a share of the neurons, in [0, 1)')
    if self.shared and self.split != 'shared':
      raise UserError(f"moefy: shared = {self.shared} neurons need split = 'shared'")
    if self.choice == 'representatives' and self.split != 'shared':
      raise UserError("moefy: choice = 'representatives' needs split = 'shared'")
    require_known(self.weights, 'weights', coactivation_core.WEIGHTS)
    if not self.ridge > 0:
      raise UserError(f'moefy: ridge = {self.ridge}: above 0')
    if self.rule != 'top' and self.mass is not None:
      raise UserError("moefy: mass is for rule = 'top', whose number it sets in each layer")
    if self.top_k is not None and (self.rule != 'top' or self.mass is not None):
      raise UserError("moefy: top_k is for rule = 'top', and mass sets it in each layer")
    if self.rule in ('within', 'cumulative') and self.choice not in routers.POSITIVE:
      raise UserError(
          f'moefy: rule = {self.rule!r} is about shares of scores that are not below 0: those of '
          f'choice {", ".join(map(repr, routers.POSITIVE))}, not of {self.choice!r}'
      )

  @property
  def sees_logits(self) -> bool:
    return True

  def takes(self, path: str) -> bool:
    return re.fullmatch(self.layers, path) is not None

  def view(self, source: Any) -> Any:
    return sources.as_one_expert(source)

  def accepts(self, path: str, leaf: Any) -> None:
    base.require_array(path, leaf, self.name)
    if leaf.shape[0] != 1:
      raise UserError(f'{path} holds {leaf.shape[0]} experts: moefy splits dense layers')

  def calibration(self) -> base.Calibration:
    return base.Calibration(mask_special=False, token_cap_factor=0.0)

  def foreseen(self, config: ModelConfig) -> Mapping[str, Any]:
    """Experts to choose among, how many a token runs, and neurons that all share, of a layer.

    Raises:
      UserError: numbers that do not divide the layer.
    """
    routers.check(self.choice, config)
    held = {} if config.moe is None else fewer.experts_held(config)
    if set(held.values()) - {1}:
      raise UserError('moefy: layers of this model are split already: split all in one step')
    whole = self.experts or expert_count(config.d_ff, self.expert_size or 1)
    size = expert_size(config.d_ff, whole)
    shared = round(self.shared * whole)
    if shared and not isinstance(config, StackConfig):
      raise UserError(f'moefy: shared neurons are for decoders; this is a {config.family}')
    if self.split == 'shared' and not (config.gated and config.activation == 'silu'):
      raise UserError("moefy: split = 'shared' is for layers gated by SiLU (CMoE)")
    experts = whole - shared
    if experts < 2:
      raise UserError(f'moefy: {experts} expert to choose from: at least 2')
    top_k = self.top_k or max(1, round(self.share * whole) - shared)
    if top_k > experts:
      raise UserError(f'moefy: top_k = {top_k} of {experts} experts')
    return {'experts': experts, 'shared': shared * size, 'top_k': top_k}

  def plan(
      self, config: ModelConfig, source: base.LeafSource, statistics: Any
  ) -> Mapping[str, Any]:
    return self.foreseen(config)

  def reconfigure(self, config: ModelConfig, plan: Mapping[str, Any]) -> ModelConfig:
    config = sources.one_expert_config(config) if config.moe is None else config
    paths = list(fewer.experts_held(config))
    held = tuple(plan['experts'] if self.takes(path) else 1 for path in paths)
    score = routers.CHOICES[self.choice]
    bounded = self.rule == 'top' and self.mass is None
    selection = SelectionConfig(
        score=score, rule=self.rule,
        choices=(plan['top_k'] if bounded else plan['experts'],), tau=(self.tau or 0.0,),
        width=routers.width(score, plan['experts']),
        bias=routers.has_bias(self.choice, config), fill=self.fill,
    )
    moe: Any = config.moe
    changes: dict[str, Any] = {'shared_d_ff': plan['shared']} if plan['shared'] else {}
    return dataclasses.replace(config, moe=dataclasses.replace(
        moe, num_experts=plan['experts'], top_k=selection.choices[0], selection=selection,
        layer_experts=held if len(set(held)) > 1 else (), **changes,
    ))

  def settle(self, config: ModelConfig, rows: Sequence[Mapping[str, Any]]) -> ModelConfig:
    moe: Any = config.moe
    found = {row['path'].removesuffix('/experts'): row for row in rows if 'top_k' in row}
    paths = list(fewer.experts_held(config))
    value = lambda name, default: tuple(found.get(p, {}).get(name, default) for p in paths)
    top_k, tau = value('top_k', moe.top_k), value('tau', moe.selection.tau[0])
    selection = dataclasses.replace(
        moe.selection, choices=top_k if len(set(top_k)) > 1 else top_k[:1],
        tau=tau if len(set(tau)) > 1 else tau[:1],
    )
    most = max(k for p, k in zip(paths, top_k) if self.takes(p))
    return dataclasses.replace(
        config, moe=dataclasses.replace(moe, selection=selection, top_k=most)
    )

  def caution(self, rows: Sequence[Mapping[str, Any]]) -> str:
    percent = lambda share: f'{share:.0%}'.replace('%', ' %')
    said = []
    active = max((row['active_neurons'] for row in rows), default=0.0)
    if not self.fill and active >= _SMOOTH:
      said.append(
          f'{percent(active)} of the neurons are active, so that none can be left out for nothing: '
          'relufy the model first (configs/relufy.py, configs/cut.py), or set fill=true'
      )
    many = selected.MANY_TOKENS
    whole = [r for r in rows if r['chosen'] > selected.dense_share(many, r['expert_size'])]
    if whole:
      row = max(whole, key=lambda r: r['chosen'])
      said.append(
          f'{percent(row["chosen"])} of experts of {row["expert_size"]} neurons are chosen: where '
          f'XLA runs them, {many} tokens at once or more, all are computed, which is quicker, and '
          'no time is saved; larger experts, or fewer of them, save some (expert_size, share), and '
          'on CPUs the extension in C++'
      )
    return '; '.join(said)

  def layer(
      self, plan: Mapping[str, Any], path: str, source: base.LeafSource,
      context: base.LayerContext,
  ) -> Iterator[parts.Group]:
    yield context.group((), lambda: self._made(plan, path, source, context))

  def _made(self, plan, path, source, context) -> parts.Group:
    config = context.config
    names = [p.rpartition('/')[2] for p in base.expert_leaves(source, path, biases=True)]
    ffn = {
        name: np.asarray(source.read_expert(f'{path}/experts/{name}', 0), np.float32)
        for name in names
    }
    x, _ = context.sample(self.tokens)
    hidden = hidden_units(ffn, x, context.act)
    made = split_core.split(
        ffn, plan['experts'], self.split, hidden_mf=hidden, x_md=x, shared=plan['shared'],
        weights=self.weights, seed=self.seed,
    )
    own, beside = split_core.cut(ffn, made)
    hidden = hidden[:, made.order[made.shared :]]
    problem = routers.Problem(
        experts=own, hidden_mf=hidden, x_md=x, labels_f=made.labels,
        relu=context.act == Activation('relu') and not config.gated, parts=made, ffn=ffn,
    )
    fitted = routers.fit(
        self.choice, problem, top_k=plan['top_k'], share=self.share, mass=self.mass,
        rule=self.rule, tau=self.tau, fill=self.fill, published=self.published,
        epochs=self.epochs, seed=self.seed,
    )
    dtypes = {name: source.abstract(f'{path}/experts/{name}').dtype for name in names}
    leaves: dict[str, np.ndarray] = {f'router/{n}': w for n, w in fitted.params.items()}
    leaves |= {f'shared/{name}': w.astype(dtypes[name]) for name, w in beside.items()}
    kept, fill = fitted.chosen_me, problem.fill() if self.fill else None
    if self.calibrate:
      own = {**own, 'wo': routers.ridge_wo(problem, kept, self.ridge, fill)}
    if fill is not None:
      own = {**own, 'wo_bias': -fill}
    if self.fill or getattr(config, 'ffn_bias', False):
      held = f'{path}/wo_bias'
      bias = np.zeros(config.d_model, np.float32) if held not in source.paths() else (
          np.asarray(source.read(held), np.float32)
      )
      bias = bias if fill is None else bias + fill.sum(0)
      leaves['wo_bias'] = bias.astype(dtypes['wo'])
    row = {
        'path': f'{path}/experts', 'transform': self.name, 'split': self.split,
        'choice': self.choice, 'experts': plan['experts'], 'top_k': fitted.top_k,
        **({'tau': fitted.tau} if self.rule != 'top' else {}),
        'expert_size': len(own['wo'][0]), 'chosen': float(np.mean(kept)),
        'neurons_run': problem.neurons_run(kept), 'active_neurons': problem.active(),
        'mass_recall': fitted.recall, 'relative_output_error': problem.error(own, kept, fill),
        'tokens': len(x), 'bits_per_weight': 8.0 * dtypes['wi'].itemsize,
    }
    ids = tuple(range(plan['experts']))
    stored = lambda name: own[name].astype(dtypes.get(name, dtypes['wo']))
    return parts.Group(
        experts=ids, rows=[row], leaves=leaves,
        parts={n: [parts.Part(format='dense', experts=ids, weight=stored(n))] for n in own},
    )

  def predict_layer(
      self, config: ModelConfig, path: str, leaves: Mapping[str, Any], zero_share: Any
  ) -> dict[str, Any]:
    shapes = account.shapes(self.reconfigure(config, self.foreseen(config)))
    dtype = leaves['experts/wi'].dtype
    return {
        name.removeprefix(f'{path}/'): jax.ShapeDtypeStruct(
            a.shape, np.float32 if '/router/' in name else dtype
        )
        for name, a in shapes.items() if name.startswith(f'{path}/')
    }


def expert_count(d_ff: int, size: int) -> int:
  """Experts of `size` neurons that make d_ff.

  Raises:
    UserError: the size does not divide d_ff.
  """
  if size < 1 or d_ff % size:
    sizes = ', '.join(str(n) for n in range(1, d_ff + 1) if d_ff % n == 0)
    raise UserError(f'expert_size = {size} does not divide d_ff = {d_ff}: {sizes} do')
  return d_ff // size


def moefy(
    experts: int | None = None, *, expert_size: int | None = None, split: str = 'clusters',
    choice: str = 'mlp', share: float = 0.2, top_k: int | None = None, mass: float | None = None,
    rule: str = 'top', tau: float | None = None, shared: float = 0.0, fill: bool = False,
    calibrate: bool = False, ridge: float = 1e-3, published: bool = False, tokens: int = 10_000,
    epochs: int = 30, weights: str = 'product', layers: str = '.*', seed: int = 0,
) -> Moefy:
  """Dense layers become experts of equal size and a router; a token runs a share of them.

  MoEfication (arXiv 2110.01786) is the default: balanced clusters of the neurons' input vectors
  and an MLP that tells how much each will be active. Experts that are chosen are added up, without
  gates, so that all of them together are the dense layer.

  Args:
    experts, expert_size: how many, or of how many neurons each (32 in the paper); one of them.
    split: see `split_core.split`.
    choice: 'mlp', 'norm' (D2DMoE's dynamic k), 'cosine', 'euclid' (as in the public code),
      'average' (EMoE), 'representatives' (CMoE), 'oracle' and 'random'.
    share: of the neurons that a token runs, shared ones included. top_k: the number of experts,
      instead of a share.
    mass: each layer takes the fewest experts whose share of the activation mass reaches this.
    rule: 'top', or a number that depends on the token: 'within' and 'cumulative', for scores that
      are not below 0, or 'above'. tau: its threshold; None finds, in each layer, the one at which
      `share` of the neurons run.
    shared: share of the neurons that every token runs, for split 'shared'.
    fill: experts that do not run give their mean output (G-MoEfication); for smooth activations.
    calibrate: wo is fitted to the dense outputs by ridge regression, with `ridge` times the mean
      of the Gram matrix's diagonal.
    published: the MLP's targets as in the public code, each batch by its own largest.
    tokens: of calibration a layer is fitted on, at most. epochs: of the router's training.
    weights: of the co-activation graph. layers: which FFNs, a regular expression.
  """
  return Moefy(
      experts=experts, expert_size=expert_size, split=split, choice=choice, share=share,
      top_k=top_k, mass=mass, rule=rule, tau=tau, shared=shared, fill=fill, calibrate=calibrate,
      ridge=ridge, published=published, tokens=tokens, epochs=epochs, weights=weights,
      layers=layers, seed=seed,
  )
