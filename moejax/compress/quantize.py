"""quantize(...): QMoE (arXiv 2310.16795) as a Transform over the experts of a model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import account, tree, weights
from moejax.compress import base, budget, hessian_core, matrix, parts
from moejax.config import Act
from moejax.config.moe import require_pattern
from moejax.errors import UserError
from moejax.ops import ffn

_ROWS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(base.Transform):
  """Expert weights to ternary, 2, 3, 4 or 8 bits; make one with `quantize` or `qmoe`."""

  matrix: matrix.Settings
  true_sequential: bool
  mask_special: bool
  expert_group: int
  token_cap_factor: float
  layers: str

  def __post_init__(self):
    require_pattern(self.layers)
    if self.expert_group < 1 or self.token_cap_factor < 0:
      raise UserError(
          f'expert_group = {self.expert_group}: at least 1; token_cap_factor = '
          f'{self.token_cap_factor}: at least 0'
      )

  def takes(self, path: str) -> bool:
    return re.fullmatch(self.layers, path) is not None

  def calibration(self) -> base.Calibration:
    return base.Calibration(
        mask_special=self.mask_special, token_cap_factor=self.token_cap_factor
    )

  def accepts(self, path: str, leaf: Any) -> None:
    if isinstance(leaf, weights.LowRankSparse) and tree.is_array(leaf.kept):
      if self.matrix.max_error is not None or self.matrix.budget is not None:
        raise UserError(
            f'{path} is low rank and sparse: neither max_error nor a search with target_bits '
            'goes with it'
        )
    else:
      base.require_array(path, leaf, self.name, 'start from the model before it was compressed')

  def predict(self, path: str, leaf: Any, zero_share: float | None) -> Any:
    s = self.matrix
    if isinstance(leaf, weights.LowRankSparse):
      factors = {name: jax.ShapeDtypeStruct(a.shape, _factor_dtype(a, s))
                 for name, a in (('left', leaf.left), ('right', leaf.right))}
      return dataclasses.replace(leaf, kept=self.predict(path, leaf.kept, zero_share), **factors)
    dtype = np.dtype(leaf.dtype if s.level_dtype == 'weights' else s.level_dtype)
    if s.storage == 'dense':
      return jax.ShapeDtypeStruct(leaf.shape, dtype)
    if s.bits == 'ternary':
      if zero_share is None:
        zero_share = account.expected_zero_share(
            leaf.shape[1], rounding=s.method == 'rtn', threshold=s.threshold * s.grid_scale
        )
      return account.ternary_node(
          leaf.shape, zero_share, storage=s.storage, level_dtype=dtype,
          target_bits=s.budget,
      )
    return account.packed_node(
        leaf.shape, int(s.bits), group_size=s.group_size, level_dtype=dtype
    )

  def layer(
      self, plan: Mapping[str, Any], path: str, source: base.LeafSource,
      context: base.LayerContext,
  ) -> Iterator[parts.Group]:
    del plan
    experts = range(context.num_experts)
    for start in range(0, context.num_experts, self.expert_group):
      ids = tuple(experts[start : start + self.expert_group])
      yield context.group(ids, functools.partial(self._group, path, source, context, ids))

  def _group(self, path, source, context, ids) -> parts.Group:
    names = [n for n in ('gate', 'wi', 'wo') if f'{path}/experts/{n}' in source.paths()]
    nodes = {
        name: source.read(f'{path}/experts/{name}').take(ids) for name in names
        if isinstance(source.abstract(f'{path}/experts/{name}'), weights.LowRankSparse)
    }
    own = {
        name: parts.dense(nodes[name]) if name in nodes else np.stack(
            [source.read_expert(f'{path}/experts/{name}', e) for e in ids]
        )
        for name in names
    }
    first = [name for name in names if name != 'wo']
    h_in, tokens = matrix.hessians(context.inputs(ids))

    def hidden(weights: Mapping[str, np.ndarray]) -> jax.Array:
      return _hidden_hessians(weights, context.inputs(ids), tokens, context.act)

    h_out = functools.cache(lambda: hidden({name: own[name] for name in first}))

    def run(grids: budget.Grids) -> dict[str, matrix.Stored]:
      def quantized(name, h):
        weight = f'{path}/experts/{name}'
        if name in nodes:
          return _quantize_kept(nodes[name], h, tokens, self.matrix, weight, ids)
        return matrix.quantize_matrices(
            own[name], h, tokens, self.matrix, weight, ids, grids.get(name)
        )

      made = {name: quantized(name, h_in) for name in first}
      if not self.true_sequential:
        return {**made, 'wo': quantized('wo', h_out())}
      group = parts.Group(experts=ids, parts={n: m.parts for n, m in made.items()}, rows=())
      h = hidden({name: parts.group_dense(group, name) for name in first})
      return {**made, 'wo': quantized('wo', h)}

    hessian_of = lambda name: h_out() if name == 'wo' else h_in
    made = budget.within(own, hessian_of, self.matrix, run)
    rows = [{'transform': self.name, **row} for name in names for row in made[name].rows]
    rows.sort(key=lambda row: row['expert'])
    return parts.Group(experts=ids, parts={n: list(made[n].parts) for n in names}, rows=rows)


def _factor_dtype(leaf: Any, settings: matrix.Settings) -> np.dtype:
  """Of a low rank's factors, which are stored as levels are."""
  return np.dtype(leaf.dtype if settings.level_dtype == 'weights' else settings.level_dtype)


def _quantize_kept(
    node: weights.LowRankSparse, h: jax.Array, tokens: Sequence[int], settings: matrix.Settings,
    path: str, ids: Sequence[int],
) -> matrix.Stored:
  """The kept outputs quantized: they are the weight less its low rank, with the same inputs."""
  made = matrix.quantize_matrices(np.asarray(node.kept), h, tokens, settings, path, ids)
  (part,) = made.parts
  whole = dataclasses.replace(
      node, kept=part.weight, left=node.left.astype(_factor_dtype(node.left, settings)),
      right=node.right.astype(_factor_dtype(node.right, settings)),
  )
  rows = tuple({**row, 'bits_per_weight': whole.bits() / whole.size} for row in made.rows)
  return dataclasses.replace(
      made, parts=(dataclasses.replace(part, weight=whole),), rows=rows
  )


@functools.partial(jax.jit, static_argnames=('activation',))
def _hidden_gram(weights_df: Mapping[str, jax.Array], x_md: jax.Array, activation: Act):
  """Gram matrix of the inputs of wo."""
  dot = lambda name: x_md @ weights_df[name].astype(jnp.float32)
  gate = dot('gate') if 'gate' in weights_df else None
  return hessian_core.gram(ffn.hidden_units(activation, dot('wi'), gate))


def _hidden_hessians(
    own: Mapping[str, np.ndarray], inputs: Iterable[np.ndarray], tokens: Sequence[int],
    activation: Act,
) -> jax.Array:
  grams, hidden_size = [], own['wi'].shape[2]
  for i, x in enumerate(inputs):
    mine = {name: jnp.asarray(w[i]) for name, w in own.items()}
    gram = jnp.zeros((hidden_size, hidden_size), jnp.float32)
    for chunk in matrix.chunks(x, _ROWS):
      gram = gram + _hidden_gram(mine, chunk, activation)
    grams.append(gram)
  return hessian_core.scale_gram(jnp.stack(grams), np.array(tokens))


def quantize(
    bits: str | int = 'ternary', *, method: str = 'gptq', damping: float = 0.1,
    block_size: int = 128, act_order: bool = False, group_size: int | None = None,
    symmetric: bool = False, true_sequential: bool = False, refit: bool = True,
    refit_ridge: float = 0.1, gain_weight: float = 10.0, grid_scale: float = 1.0,
    threshold: float = 0.5, search: matrix.Search | None = None, storage: str = 'moejax',
    level_dtype: str = 'bfloat16',
    max_error: float | None = None, mask_special: bool = True, expert_group: int = 16,
    token_cap_factor: float = 4.0, layers: str = '.*',
) -> Quantize:
  """Quantizes the experts of a mixture of experts, layer by layer, with its own inputs (QMoE).

  Args:
    bits: 'ternary' (below one bit a weight as stored), 2, 3, 4 or 8.
    method: 'gptq', or 'rtn' for plain rounding.
    damping: share of the Hessian's mean diagonal that GPTQ adds to it (QMoE section 4: 0.1).
    block_size: inputs swept between matmuls; matters only with group_size.
    act_order: GPTQ takes the inputs by falling Hessian diagonal.
    group_size: inputs that share a grid, for 2 to 4 bits; None for one grid an output.
    symmetric: grids symmetric about 0.
    true_sequential: wo is calibrated behind the quantized wi instead of the original.
    refit: levels refitted by least squares after GPTQ; not with group_size. refit_ridge: how much
      that holds to the weights where tokens are few. gain_weight: how much more an output that is
      too small as a whole counts, in refit and search, see `refit_core`; 0 is least squares.
    grid_scale, threshold: the ternary (or b-bit) range, and the share of it that rounds to a level.
    search: chooses grid_scale and threshold for each matrix instead; with its target_bits, so that
      each group of experts takes at most so many bits a weight, all metadata counted, or the
      fewest its grids can take, which the report then says ('over_budget').
    storage: 'moejax'; 'qmoe_v1' for the published format; 'dense' for plain arrays of the
      quantized values.
    level_dtype: dtype levels are stored in: 'bfloat16', 'float32', or 'weights' for the weights'.
    max_error: a matrix whose relative output error is over it is stored at 2, 3, 4 bits, then bf16.
    mask_special, token_cap_factor: see `base.Calibration`.
    expert_group: experts in memory at a time; the unit of resume.
    layers: a regex of FFN paths ('decoder/.*'); others stay as they are.

  Raises:
    UserError: an unknown value, or a combination that no storage holds.
  """
  settings = matrix.Settings(
      bits=bits, method=method, damping=damping, block_size=block_size, act_order=act_order,
      group_size=group_size, symmetric=symmetric, refit=refit and group_size is None,
      refit_ridge=refit_ridge, gain_weight=gain_weight, grid_scale=grid_scale,
      threshold=threshold, search=search, storage=storage, level_dtype=level_dtype,
      max_error=max_error,
  )
  return Quantize(
      matrix=settings, true_sequential=true_sequential, mask_special=mask_special,
      expert_group=expert_group, token_cap_factor=token_cap_factor, layers=layers,
  )


def qmoe(bits: str | int = 'ternary', **changes) -> Quantize:
  """`quantize` exactly as published: no refit, levels in the weights' dtype, QMoE's own format."""
  published: dict[str, Any] = {
      'refit': False, 'level_dtype': 'weights',
      'storage': 'qmoe_v1' if bits == 'ternary' else 'moejax',
  }
  return quantize(bits, **{**published, **changes})


