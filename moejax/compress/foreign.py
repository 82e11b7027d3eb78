"""compress_tree: quantize, prune or merge the experts of any pytree and any function.

The function belongs to somebody else, so it must say what its experts see. `apply_fn(params, batch,
capture)` runs the model as always and, next to each expert matrix, reports the matrix' input:

    def apply_fn(params, batch, capture):
      ...
      capture('layers/0/w_in', x_md, expert_mk)      # x of every token and its experts, or
      capture.dense('layers/0/w_in', x_ecd, mask_ec) # tokens already dispatched by expert
      ...

`capture` is called while `apply_fn` runs in Python (outside jit) with concrete arrays. A rule names
the leaves and how their axes lie. Leaves are compressed in the order in which the first batch
reports them, each from the inputs that the compressed ones before it produce, and a leaf by groups
of `expert_group` experts, so that Hessians exist for one group only. apply_fn runs over the batches
once more for each group: a larger group is faster, a smaller one takes less memory.

Pruning and merging want rules with roles, for routers too, and hear of an expert's inputs once, at
its 'wi':

      capture('layers/0/w_in', x_md, expert_mk, gate_mk=gate_mk, logits_me=logits_me)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import re
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from moejax.compress import budget, fewer, foreign_fewer, hessian_core, matrix, parts, quantize
from moejax.config.moe import require_known, require_pattern
from moejax.errors import UserError, did_you_mean

_AXES = ('expert', 'in', 'out')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertRule:
  """Which leaves are expert weights, and how their axes lie.

  pattern: a regex of whole leaf paths, 'a/b/c'. axes: for each axis of the leaf 'expert', 'in'
  (contracted with the input) or 'out'; without 'expert' the leaf is one matrix. role: to prune and
  merge, what the leaf is in its layer: 'wi', 'gate', 'wo', their biases 'wi_bias', ..., of axes
  'expert' and 'out', or 'router/kernel', of 'in' and 'expert', or 'router/bias', of 'expert'. What
  the pattern's first group matches is the name of the layer, or else the path before its last '/'.
  """

  pattern: str
  axes: tuple[str, ...] = _AXES
  role: str = ''

  def __post_init__(self):
    require_pattern(self.pattern, 'pattern')
    if self.role:
      require_known(self.role, 'role', tuple(foreign_fewer.ROLES))
      if sorted(self.axes) != sorted(wanted := foreign_fewer.ROLES[self.role]):
        raise UserError(f'axes = {self.axes}: role {self.role!r} has {wanted}, in any order')
      return
    if sorted(self.axes) not in (['expert', 'in', 'out'], ['in', 'out']):
      raise UserError(f"axes = {self.axes}: 'in' and 'out' once each, and 'expert' at most once")


class Capture(Protocol):
  """What `apply_fn` calls; see the module."""

  def __call__(
      self, path: str, x_md: Any, expert_mk: Any = None, mask_m: Any = None, *,
      gate_mk: Any = None, logits_me: Any = None,
  ) -> None: ...

  def dense(self, path: str, x_ecd: Any, mask_ec: Any = None) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeResult:
  """params: the pytree with the rules' leaves replaced. rows: of the report.

  nodes: compressed weights by path, [experts, in, out]. maps: by layer, where a merge leaves the
  router as it is, the merged expert of each choice, int32 [e].
  """

  params: Any
  rows: list[dict[str, Any]]
  nodes: dict[str, Any] = dataclasses.field(default_factory=dict)
  maps: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class _Grams:
  """Sums X^T X of a group of experts of one leaf as `capture` is called."""

  def __init__(self, leaves: Mapping[str, tuple[int, int]]):
    """leaves: path -> (experts, inputs), every leaf under a rule."""
    self._leaves = leaves
    self.seen: dict[str, None] = {}
    self._path: str | None = None
    self._experts = range(0)

  def start(self, path: str, experts: range) -> None:
    """From now on for these experts of one leaf; what was summed before is let go."""
    inputs = self._leaves[path][1]
    self._path, self._experts = path, experts
    self.grams = np.zeros((len(experts), inputs, inputs), np.float32)
    self.tokens = np.zeros(len(experts), np.int64)

  def _wants(self, path: str, x: Any) -> bool:
    if path not in self._leaves:
      raise UserError(
          f'capture({path!r}): no rule names this leaf{did_you_mean(path, self._leaves)}'
      )
    if isinstance(x, jax.core.Tracer):
      raise UserError(f'capture({path!r}) was called under jit: call apply_fn without jax.jit')
    inputs = self._leaves[path][1]
    if np.shape(x)[-1:] != (inputs,):
      raise UserError(
          f'capture({path!r}): input has shape {np.shape(x)}, the leaf takes {inputs}'
      )
    self.seen.setdefault(path)
    return path == self._path

  def _add(self, expert: int, x_md: np.ndarray) -> None:
    place = expert - self._experts.start
    for chunk in matrix.chunks(x_md):
      self.grams[place] += np.asarray(hessian_core.gram(chunk))
    self.tokens[place] += len(x_md)

  def __call__(
      self, path, x_md, expert_mk=None, mask_m=None, *, gate_mk=None, logits_me=None
  ) -> None:
    del gate_mk, logits_me
    if not self._wants(path, x_md):
      return
    experts = self._leaves[path][0]
    x = np.asarray(x_md, np.float32).reshape(-1, np.shape(x_md)[-1])
    chosen = np.zeros((len(x), 1), int) if expert_mk is None else (
        np.asarray(expert_mk).reshape(len(x), -1)
    )
    if chosen.size and (chosen.min() < -1 or chosen.max() >= experts):
      raise UserError(f'capture({path!r}): expert {chosen.max()} of {experts}; -1 means none')
    keep = np.ones(len(x), bool) if mask_m is None else np.asarray(mask_m, bool).reshape(-1)
    for expert in self._experts:
      rows = (chosen == expert).any(1) & keep
      if rows.any():
        self._add(expert, x[rows])

  def dense(self, path, x_ecd, mask_ec=None) -> None:
    """Tokens already dispatched: row c of expert e, where the mask says so."""
    if not self._wants(path, x_ecd):
      return
    if len(x_ecd) != self._leaves[path][0]:
      raise UserError(
          f'capture.dense({path!r}): {len(x_ecd)} experts, the leaf has {self._leaves[path][0]}'
      )
    for expert in self._experts:
      rows = np.asarray(x_ecd[expert], np.float32)
      kept = rows if mask_ec is None else rows[np.asarray(mask_ec[expert], bool)]
      if len(kept):
        self._add(expert, kept)


def _path(keys: Sequence[Any]) -> str:
  return '/'.join(str(getattr(k, 'key', getattr(k, 'idx', getattr(k, 'name', k)))) for k in keys)


def _forward(leaf: Any, axes: tuple[str, ...]) -> np.ndarray:
  """A leaf as [expert, in, out]."""
  array = np.asarray(leaf)
  if 'expert' not in axes:
    return np.transpose(array, [axes.index('in'), axes.index('out')])[None]
  return np.transpose(array, [axes.index(a) for a in _AXES])


def _backward(values_edf: np.ndarray, axes: tuple[str, ...]) -> np.ndarray:
  if 'expert' not in axes:
    return np.transpose(values_edf[0], np.argsort([axes.index('in'), axes.index('out')]))
  return np.transpose(values_edf, np.argsort([axes.index(a) for a in _AXES]))


def _check_transform(transform: Any) -> None:
  if not isinstance(transform, quantize.Quantize):
    raise UserError(
        'compress_tree takes one quantize(...), prune(...) or merge(...), not a '
        f'{type(transform).__name__}: call it once a step'
    )
  if transform.true_sequential or transform.layers != '.*':
    raise UserError(
        'compress_tree knows no layers: say which leaves by rules, and their order by apply_fn; '
        'leave out true_sequential and layers'
    )


def compress_tree(
    params: Any, rules: Sequence[ExpertRule], apply_fn: Callable[[Any, Any, Capture], Any],
    batches: Iterable[Any], transform: quantize.Quantize | fewer.Fewer | None = None, *,
    sequential: bool = True, activation: str = '',
) -> TreeResult:
  """Quantizes, prunes or merges the experts of any pytree from what `apply_fn` reports.

  Args:
    params: any pytree of arrays.
    rules: which leaves; the first rule that matches a path counts.
    apply_fn: see the module; its result is not looked at.
    batches: calibration, whatever apply_fn takes; iterated many times, so kept in a list.
    transform: from `quantize`; its expert_group bounds the memory. Its masks and cap are for moejax
      models and play no part here. Or from `prune` or `merge`, whose `layers` are matched with the
      names of the layers here.
    sequential: calibrate each leaf behind the compressed ones; False: on the params as they were.
      Pruning and merging always look at the params as they were.
    activation: of experts to prune or merge, a name in `ops.ffn.ACTIVATIONS`.

  The new params of `quantize` hold arrays of the old dtype, made from the stored levels and
  symbols, so that any function takes them; `nodes` holds what to store. Those of `prune` and
  `merge` hold fewer experts, [kept, ...], and fewer columns of the router; behind a merge with
  router 'remap' or 'sum' the function must look its choices up in `maps`.

  Raises:
    UserError: a rule matches nothing or the wrong rank, apply_fn reports an unknown leaf, none at
      all, or a misshapen input, the calibration is empty, or the transform is a chain or has
      settings that only a moejax model can heed.
  """
  transform = quantize.quantize() if transform is None else transform
  if not isinstance(transform, fewer.Fewer):
    _check_transform(transform)
  leaves, structure = jax.tree_util.tree_flatten_with_path(params)
  paths = [_path(keys) for keys, _ in leaves]
  values = dict(zip(paths, (leaf for _, leaf in leaves)))
  matched = _match(rules, values)
  samples = list(batches)
  if not samples:
    raise UserError('calibration has no batch: give at least one')

  def run(params, batches, capture):
    tree = jax.tree_util.tree_unflatten(structure, [params[p] for p in paths])
    for batch in batches:
      apply_fn(tree, batch, capture)

  if isinstance(transform, fewer.Fewer):
    made, maps, rows = foreign_fewer.compress(
        [_leaf(path, rule, values[path]) for path, rule in matched.items()],
        lambda capture: run(values, samples, capture), transform, activation,
    )
    tree = jax.tree_util.tree_unflatten(structure, [{**values, **made}[p] for p in paths])
    return TreeResult(params=tree, maps=maps, rows=rows)
  return _quantized(values, matched, transform, samples, run, structure, sequential)


def _leaf(path: str, rule: ExpertRule, value: Any) -> foreign_fewer.Leaf:
  if not rule.role:
    raise UserError(f'rule {rule.pattern!r} has no role: prune and merge need one')
  found: Any = re.fullmatch(rule.pattern, path)
  layer = (found[1] or '') if found.groups() else path.rpartition('/')[0]
  return foreign_fewer.Leaf(path=path, layer=layer, role=rule.role, axes=rule.axes, value=value)


def _quantized(values, matched, transform, samples, run, structure, sequential) -> TreeResult:
  paths = list(values)
  axes = {path: rule.axes for path, rule in matched.items() if {'in', 'out'} <= {*rule.axes}}
  shapes = {p: _forward(values[p], a).shape for p, a in axes.items()}
  grams = _Grams({p: s[:2] for p, s in shapes.items()})
  run(values, samples[:1], grams)
  order = list(grams.seen)
  silent = sorted(set(axes) - set(order))
  if silent:
    raise UserError(f'apply_fn never called capture({silent[0]!r}, ...), which a rule names')
  nodes: dict[str, Any] = {}
  rows: list[dict[str, Any]] = []
  seen = values if sequential else dict(values)
  for path in order:
    w_edf = _forward(values[path], axes[path])
    found: list[parts.Part] = []
    for start in range(0, len(w_edf), transform.expert_group):
      ids = range(start, min(start + transform.expert_group, len(w_edf)))
      grams.start(path, ids)
      run(seen, samples, grams)
      h = hessian_core.scale_gram(jnp.asarray(grams.grams), grams.tokens)
      own = w_edf[ids.start : ids.stop]
      tokens = grams.tokens.tolist()

      def run_group(grids, own=own, h=h, tokens=tokens, path=path, ids=ids):
        given = grids.get(path)
        return {path: matrix.quantize_matrices(own, h, tokens, transform.matrix, path, ids, given)}

      made = budget.within(
          {path: own}, lambda _, h=h: h, transform.matrix, run_group  # type: ignore[misc]
      )[path]
      found.extend(made.parts)
      rows.extend({'transform': transform.name, **row} for row in made.rows)
    nodes[path] = parts.join(found)
    dense = _backward(parts.dense(nodes[path]), axes[path])
    values[path] = jnp.asarray(dense, np.asarray(values[path]).dtype)
  tree = jax.tree_util.tree_unflatten(structure, [values[p] for p in paths])
  return TreeResult(params=tree, nodes=nodes, rows=rows)


def _match(rules: Sequence[ExpertRule], values: Mapping[str, Any]) -> dict[str, ExpertRule]:
  matched: dict[str, ExpertRule] = {}
  for rule in rules:
    found = [p for p in values if re.fullmatch(rule.pattern, p)]
    if not found:
      raise UserError(
          f'rule {rule.pattern!r} matches no leaf{did_you_mean(rule.pattern, values)}'
      )
    for path in found:
      if np.ndim(values[path]) != len(rule.axes):
        raise UserError(
            f'rule {rule.pattern!r} gives {path} axes {rule.axes}, its shape is '
            f'{np.shape(values[path])}'
        )
      matched.setdefault(path, rule)
  if not matched:
    raise UserError('no rules: name the leaves that hold experts')
  return matched
