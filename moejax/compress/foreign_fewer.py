"""compress_tree for prune and merge: any pytree's experts as the layers of a decoder of ours.

Rules give each leaf a role in its layer ('wi', 'gate', 'wo', their biases, 'router/kernel',
'router/bias'), so that plans and layer steps work on them as on a model's. What they decide comes
from the function as it was: with fewer experts it may be another one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import config as config_lib
from moejax.compress import fewer, merge, on_inputs, parts, stats, stats_core
from moejax.config import Act
from moejax.errors import UserError, did_you_mean
from moejax.ops import ffn

# Role -> its axes in a model of ours.
ROLES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(('wi', 'gate', 'wo'), ('expert', 'in', 'out')),
    **dict.fromkeys(('wi_bias', 'gate_bias', 'wo_bias'), ('expert', 'out')),
    'router/kernel': ('in', 'expert'), 'router/bias': ('expert',),
}
_ROWS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
  """A leaf under a rule: where it is, what it is in which layer, its axes and its values."""

  path: str
  layer: str
  role: str
  axes: tuple[str, ...]
  value: Any

  def ours(self) -> np.ndarray:
    """The values with the axes of ROLES."""
    return np.transpose(np.asarray(self.value), [self.axes.index(a) for a in ROLES[self.role]])

  def theirs(self, values: np.ndarray) -> jax.Array:
    """Values with the axes of ROLES as the leaf has them."""
    wanted = ROLES[self.role]
    values = np.transpose(values, [wanted.index(a) for a in self.axes])
    return jnp.asarray(values, np.asarray(self.value).dtype)


class Source:
  """Layers of somebody's leaves as a `base.LeafSource`: decoder/layers_0/ffn, ..."""

  def __init__(self, leaves: Sequence[Leaf], activation: str, top_k: int):
    self.names: dict[str, str] = {}
    self._own: dict[str, Leaf] = {}
    for leaf in leaves:
      path = self.names.setdefault(leaf.layer, f'decoder/layers_{len(self.names)}/ffn')
      inside = leaf.role if leaf.role.startswith('router') else f'experts/{leaf.role}'
      if f'{path}/{inside}' in self._own:
        raise UserError(
            f'{leaf.layer!r} has two leaves of role {leaf.role!r}, {leaf.path} and '
            f'{self._own[f"{path}/{inside}"].path}: one layer is what the first group of the '
            'patterns matches, or else what is before the last slash'
        )
      self._own[f'{path}/{inside}'] = leaf
    for layer, path in self.names.items():
      for role in ('wi', 'wo'):
        if f'{path}/experts/{role}' not in self._own:
          raise UserError(f'{layer!r} has no leaf of role {role!r}: give it a rule')
    held = [self.read(f'{path}/experts/wi').shape[0] for path in self.names.values()]
    for path, leaf in self._own.items():
      shape, layer = self.read(path).shape, leaf.layer
      experts = held[list(self.names).index(layer)]
      if shape[ROLES[leaf.role].index('expert')] != experts:
        raise UserError(
            f'{leaf.path} {list(np.shape(leaf.value))} has another number of experts than the '
            f"'wi' of {layer!r}, {experts}"
        )
    d_model, d_ff = self.read(f'{next(iter(self.names.values()))}/experts/wi').shape[1:]
    self.config: Any = config_lib.DecoderConfig(
        family='mixtral', vocab_size=4, d_model=d_model, d_head=2, d_ff=d_ff, num_heads=1,
        num_kv_heads=1, num_layers=len(held), eos_ids=(1,), activation=activation,
        moe=config_lib.DecoderMoeConfig(
            num_experts=max(held), layer_experts=tuple(held), top_k=top_k, router='topk',
        ),
    )

  def paths(self) -> tuple[str, ...]:
    return tuple(self._own)

  def read(self, path: str) -> np.ndarray:
    return self._leaf(path).ours()

  def read_expert(self, path: str, index: int) -> np.ndarray:
    return self.read(path)[index]

  def abstract(self, path: str) -> Any:
    leaf = self.read(path)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

  def leaf(self, path: str) -> Leaf:
    return self._leaf(path)

  def _leaf(self, path: str) -> Leaf:
    if path not in self._own:
      layer = next((n for n, own in self.names.items() if path.startswith(own)), path)
      raise UserError(f'{layer!r} has no leaf of role {path.partition("/ffn/")[2]!r}: give a rule')
    return self._own[path]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
  """What one call of `capture` said of real tokens.

  x [m, d], choice [m, k] (-1: none), gate [m, k], logits [m, e].
  """

  x: np.ndarray
  choice: np.ndarray
  gate: np.ndarray | None
  logits: np.ndarray | None

  @property
  def keep(self) -> np.ndarray:
    return self.choice >= 0


class Capture:
  """`capture` of `apply_fn`: hands what it is told about a layer's 'wi' to `see`."""

  def __init__(self, leaves: Sequence[Leaf]):
    self._layers = {leaf.path: leaf for leaf in leaves if leaf.role == 'wi'}
    self._known = tuple(leaf.path for leaf in leaves)
    self.see: Callable[[str, Routed], None] = lambda layer, routed: None

  def __call__(
      self, path: str, x_md: Any, expert_mk: Any = None, mask_m: Any = None, *,
      gate_mk: Any = None, logits_me: Any = None,
  ) -> None:
    leaf = self._layers.get(path)
    if leaf is None and path not in self._known:
      raise UserError(
          f'capture({path!r}): no rule names this leaf{did_you_mean(path, self._known)}'
      )
    if leaf is None:
      return
    if isinstance(x_md, jax.core.Tracer):
      raise UserError(f'capture({path!r}) was called under jit: call apply_fn without jax.jit')
    experts, inputs = leaf.ours().shape[:2]
    if np.shape(x_md)[-1:] != (inputs,) or expert_mk is None:
      raise UserError(
          f'capture({path!r}): inputs {np.shape(x_md)} and their experts are needed, the leaf '
          f'takes {inputs}'
      )
    x = np.asarray(x_md, np.float32).reshape(-1, inputs)
    if not len(x):
      return
    choice = np.asarray(expert_mk).reshape(len(x), -1)
    if choice.size and (choice.min() < -1 or choice.max() >= experts):
      raise UserError(f'capture({path!r}): expert {choice.max()} of {experts}; -1 means none')
    if logits_me is not None and np.shape(logits_me)[-1:] != (experts,):
      raise UserError(
          f'capture({path!r}): logits_me has shape {np.shape(logits_me)}, the layer has {experts} '
          'experts'
      )
    real = np.ones(len(x), bool) if mask_m is None else np.asarray(mask_m, bool).reshape(-1)
    own = lambda a: None if a is None else np.asarray(a, np.float32).reshape(len(x), -1)[real]
    self.see(leaf.layer, Routed(
        x=x[real], choice=choice[real], gate=own(gate_mk), logits=own(logits_me)
    ))

  def dense(self, path: str, x_ecd: Any, mask_ec: Any = None) -> None:
    """Tokens dispatched by expert say nothing of who chose what."""
    if path in self._layers:
      raise UserError(
          f'capture.dense({path!r}): prune and merge need every token with its experts: call '
          'capture(path, x_md, expert_mk, gate_mk=..., logits_me=...)'
      )


class _Context:
  """A layer's `base.LayerContext`: its inputs by running the function again."""

  def __init__(self, config: Any, experts: int, collect: Callable[[], list[Routed]]):
    self.config, self.num_experts, self._collect = config, experts, collect
    self.act = config.act
    self._held: list[Routed] | None = None

  def inputs(self, experts: Sequence[int]) -> Iterable[np.ndarray]:
    if self._held is None:
      self._held = self._collect()
    for expert in experts:
      yield np.concatenate([r.x[(r.choice == expert).any(1)] for r in self._held])

  def group(self, experts: Sequence[int], make: Callable[[], parts.Group]) -> parts.Group:
    del experts
    return make()


def compress(
    leaves: Sequence[Leaf], run: Callable[[Any], None], step: fewer.Fewer, activation: str
) -> tuple[dict[str, jax.Array], dict[str, np.ndarray], list[dict[str, Any]]]:
  """(new leaves by path, expert maps by layer, report rows).

  Args:
    run: runs the function over the calibration with a `Capture`.
  """
  if activation not in ffn.ACTIVATIONS:
    raise UserError(f'activation = {activation!r}: one of {sorted(ffn.ACTIVATIONS)}')
  if getattr(step, 'method', '') == 'naee':
    raise UserError("compress_tree: 'naee' needs the router itself, so a model of moejax")
  chosen = [leaf for leaf in leaves if re.fullmatch(step.layers, leaf.layer)]
  if not chosen:
    names = ', '.join(dict.fromkeys(leaf.layer for leaf in leaves))
    raise UserError(f'layers = {step.layers!r} matches none of the layers {names}')
  for layer in dict.fromkeys(leaf.layer for leaf in chosen):
    roles = {leaf.role for leaf in chosen if leaf.layer == layer}
    if getattr(step, 'router', '') not in ('remap', 'sum') and 'router/kernel' not in roles:
      raise UserError(
          f"{layer!r} has no leaf of role 'router/kernel', whose columns go with the experts: give "
          'it a rule'
      )
  step = dataclasses.replace(step, layers='.*')
  if isinstance(step, merge.Merge):
    step = dataclasses.replace(step, sequential=False)
  capture = Capture(leaves)
  seen: dict[str, int] = {}
  capture.see = lambda layer, routed: seen.update({layer: routed.choice.shape[1]})
  run(capture)
  for leaf in chosen:
    if leaf.role == 'wi' and leaf.layer not in seen:
      raise UserError(f'apply_fn never called capture({leaf.path!r}, ...), which a rule names')
  source = Source(chosen, activation, max(seen[leaf.layer] for leaf in chosen))
  try:
    return _compress(source, step, run, capture)
  except UserError as error:
    text = str(error)
    for layer, path in reversed(source.names.items()):
      text = text.replace(path, layer)
    raise UserError(text) from None


def _compress(source, step, run, capture):
  plan = step.plan(source.config, source, _statistics(source, step.statistics(), run, capture))
  made: dict[str, jax.Array] = {}
  maps: dict[str, np.ndarray] = {}
  rows: list[dict[str, Any]] = []
  held = fewer.experts_held(source.config)
  for layer, path in source.names.items():
    collect = functools.partial(_collected, run, capture, layer)
    context = _Context(source.config, held[path], collect)
    weights: dict[str, list[np.ndarray]] = {}
    for group in step.layer(plan, path, source, context):
      rows += [{**row, 'path': layer} for row in group.rows]
      for name, leaf in group.leaves.items():
        if name == 'expert_map':
          maps[layer] = leaf
        else:
          made[source.leaf(f'{path}/{name}').path] = source.leaf(f'{path}/{name}').theirs(leaf)
      for name, found in group.parts.items():
        weights.setdefault(name, []).extend(np.asarray(part.weight) for part in found)
    for name, pieces in weights.items():
      leaf = source.leaf(f'{path}/experts/{name}')
      made[leaf.path] = leaf.theirs(np.concatenate(pieces))
  return made, maps, rows


def _collected(run, capture, wanted: str) -> list[Routed]:
  found: list[Routed] = []
  capture.see = lambda layer, routed: found.append(routed) if layer == wanted else None
  run(capture)
  return found


def _statistics(source, kinds, run, capture) -> stats.Statistics | None:
  """Sums of the kinds wanted over the calibration, in one pass."""
  if not kinds:
    return None
  totals: dict[str, stats_core.Sums] = {}
  held = fewer.experts_held(source.config)
  looks = any(kind != 'routing' for kind in kinds)

  def see(layer: str, routed: Routed) -> None:
    path = source.names.get(layer)
    if path is None:
      return
    if routed.logits is None:
      routed = dataclasses.replace(routed, logits=np.zeros((len(routed.x), held[path])))
      missing[path] |= {'gram', 'probability'}
    gate = routed.gate
    if gate is None:
      gate = np.ones(routed.choice.shape, np.float32)
      routed = dataclasses.replace(routed, gate=gate)
      missing[path] |= {'gate', 'gate_norm', 'gate_ratio'}
    observer = stats.Observer(kinds, source)
    acts: Any = _Acts(routed=routed, act=source.config.act)
    observer.layer(path, acts, held[path])
    for expert in range(held[path]) if looks else ():
      rows, place = np.nonzero(routed.choice == expert)
      own = _expert(source, path, expert)
      for start in range(0, len(rows), _ROWS):
        piece = slice(start, start + _ROWS)
        x = routed.x[rows[piece]]
        y = on_inputs.output(own, x, source.config.act)
        observer.expert(path, expert, own, x, y, gate[rows[piece], place[piece]])
      observer.all_tokens(path, expert, own, acts)
    totals[path] = stats_core.add(totals.get(path, {}), observer.layers[path])

  missing: dict[str, set[str]] = {path: set() for path in held}
  capture.see = see
  run(capture)
  for path, names in missing.items():
    for name in names:
      totals[path].pop(name, None)
  return stats.Statistics(
      layers={path: _Sums(sums) for path, sums in totals.items()}, kinds=tuple(kinds), tokens={},
      model='',
  )


class _Sums(dict):
  """Sums of a layer that say what is missing."""

  def __missing__(self, name: str) -> Any:
    given = {'gram': 'logits_me', 'probability': 'logits_me'}.get(name, 'gate_mk')
    raise UserError(
        f'{name!r} needs what the router says: call capture(path, x_md, expert_mk, {given}=...)'
    )


class _Acts:
  """What `stats.Observer` asks of a walk's activations."""

  def __init__(self, routed: Routed, act: Act):
    self.routing, self.act = routed, act
    self.buffer = routed.x[routed.keep.any(1)]

  def output_sum(self, weights_df: Mapping[str, np.ndarray]) -> np.ndarray:
    total = np.zeros(weights_df['wo'].shape[1])
    for start in range(0, len(self.buffer), _ROWS):
      y = on_inputs.output(weights_df, self.buffer[start : start + _ROWS], self.act)
      total += y.sum(0, dtype=np.float64)
    return total


def _expert(source: Source, path: str, expert: int) -> dict[str, np.ndarray]:
  own = fewer.read_experts(source, path, [expert])
  return {name: w[0].astype(np.float32) for name, w in own.items()}
