"""One pass of the hidden states through a model, compressing or measuring on the way.

Layer by layer; within a layer expert by expert, so that a model larger than memory is walked.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from moejax import progress as progress_lib
from moejax import tree, weights
from moejax.compress import activations, base, parts, sources, walk
from moejax.compress import samples as samples_lib
from moejax.config import ModelConfig


class Observer(Protocol):
  """Sees the sparse layers of a walk that changes nothing."""

  @property
  def sees_logits(self) -> bool: ...

  def layer(self, path: str, acts: activations.Activations, experts: int) -> None: ...

  def expert(
      self, path: str, expert: int, weights_df: Mapping[str, np.ndarray],
      x_md: np.ndarray, y_md: np.ndarray, gate_m: np.ndarray,
  ) -> None: ...

  def all_tokens(
      self, path: str, expert: int, weights_df: Mapping[str, np.ndarray],
      acts: activations.Activations,
  ) -> None: ...


def dropless(config: ModelConfig) -> Any:
  """The model without capacity: compression looks at every choice."""
  if config.moe is None:
    return config
  moe: Any = dataclasses.replace(
      config.moe, expert_capacity=None, capacity_factor=None, members=1
  )
  return dataclasses.replace(config, moe=moe)


def by_oracle(config: ModelConfig) -> bool:
  """Whether tokens choose by the activations of the experts themselves."""
  selection = None if config.moe is None else config.moe.selection
  return selection is not None and selection.score == 'oracle'


class Context:
  """The `base.LayerContext` of one layer."""

  def __init__(self, config, acts, calibration, work, layer, limit, special):
    self.config = config
    stack, name, _ = layer.split('/')
    own = config.of_layer(stack, int(name.removeprefix('layers_')))
    self.num_experts, self.act = own.moe.held, own.act
    self._acts, self._calibration, self._work, self._layer = acts, calibration, work, layer
    self._limit, self._special = limit, special

  def _tokens(self, expert: int) -> np.ndarray:
    """Cap first, then no validation, then no special tokens (QMoE's order)."""
    tokens = self._acts.tokens_of(expert)
    if self._calibration.token_cap_factor:
      cap = int(self._calibration.token_cap_factor * self._limit / self.num_experts)
      tokens = tokens[:cap]
    tokens = tokens[tokens < self._limit]
    return tokens[~self._special[tokens]] if self._calibration.mask_special else tokens

  def inputs(self, experts: Sequence[int]) -> Iterable[np.ndarray]:
    return (self._acts.expert_inputs(self._tokens(e)) for e in experts)

  def gates(self, experts: Sequence[int]) -> Iterable[np.ndarray]:
    return (self._acts.gates_of(e, self._tokens(e)) for e in experts)

  def sample(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.arange(self._limit)
    if self._calibration.mask_special:
      tokens = tokens[~self._special[: self._limit]]
    tokens = tokens[np.unique(np.linspace(0, len(tokens) - 1, count).astype(int))]
    return self._acts.expert_inputs(tokens), self._all_logits()[tokens]

  def logits(self) -> np.ndarray:
    logits = self._all_logits()[: self._limit]
    return logits[~self._special[: self._limit]] if self._calibration.mask_special else logits

  def _all_logits(self) -> np.ndarray:
    assert self._acts.routing.logits is not None, 'the transform says sees_logits'
    return self._acts.routing.logits

  def group(self, experts, make) -> parts.Group:
    if self._work is None:
      return make()
    first = experts[0] if experts else 0
    folder = self._work / f'{self._layer.replace("/", ".")}.{first:05d}'
    if (group := parts.load_group(folder)) is not None:
      return group
    parts.save_group(folder, make())
    # What a resumed run would read, so that both go on alike.
    group = parts.load_group(folder)
    assert group is not None
    return group


class Walk:
  """One pass of the hidden states through the model; see the module.

  rows: the report's. leaves: what changed beside experts, by whole path. changed: the layers that
  have new experts, and which of their weights are new. loss: of the validation samples. stacks: the
  hidden states by stack.
  """

  def __init__(
      self, source: Any, data: samples_lib.Samples, *, step: base.Transform | None = None,
      plan: Mapping[str, Any] | None = None, work: Path | None = None,
      targets: Iterable[str] = (), observer: Observer | None = None, progress: bool = False,
      keep: bool = True,
  ):
    """Changes the layers `targets` by a step with its plan, or shows all of them to an observer.

    keep: False forgets new experts once tokens went through them, where there is no work folder.
    """
    self._keep = keep
    self.source, self.data, self.work, self.targets = source, data, work, set(targets)
    self.config = dropless(source.config)
    self.step, self.plan = step or base.Transform(), plan or {}
    self.new_config = dropless(self.step.reconfigure(source.config, self.plan))
    self.observer = observer
    self.rows: list[dict[str, Any]] = []
    self.leaves: dict[str, np.ndarray] = {}
    self.changed: dict[str, set[str]] = {}
    self.loss: float | None = None
    self.stacks: dict[str, activations.Activations] = {}
    self._memory: dict[str, list[parts.Group]] = {}
    layers = sum(map(self.config.layers_of, self.config.stacks))
    label = 'statistics' if observer is not None else self.step.name
    self._bar = progress_lib.bar(total=layers, label=label, unit='layer', show=progress)

  def groups(self, path: str):
    """The finished groups of a layer, from memory or, one at a time, from disk."""
    if self.work is None:
      yield from self._memory.get(path, ())
      return
    for folder in sorted(self.work.glob(f'{path.replace("/", ".")}.[0-9]*')):
      if not folder.name.endswith('.partial'):
        yield parts.load_group(folder)

  def run(self) -> None:
    paths = walk.outer_paths(self.config, self.source.paths())
    outer = tree.unflatten({path: self.source.read(path) for path in paths})
    batches = samples_lib.batches(self.data)
    before = None
    for stack in self.config.stacks:
      before = self.stacks[stack] = self._stack(stack, outer, batches, before)
    self._bar.close()
    self.loss = self._validation_loss(outer)

  def _stack(self, stack, outer, batches, before):
    seer = self.step if self.observer is None else self.observer
    acts = activations.Activations(
        self.config, stack, self.data, batches, outer, before, keep_logits=seer.sees_logits
    )
    special = self.data.special(stack)
    for i in range(self.config.layers_of(stack)):
      layer = f'{stack}/layers_{i}'
      acts.run_layer(i, sources.subtree(self.source, layer, skip=f'{layer}/ffn/experts'))
      if i in self.config.sparse_layers(stack):
        self._experts(acts, stack, f'{layer}/ffn', special)
        acts.finish_layer()
      self._bar.update()
    acts.finish()
    return acts

  def _experts(self, acts, stack, path, special) -> None:
    if path in self.targets:
      context = Context(
          self.config, acts, self.step.calibration(), self.work, path,
          self.data.calibration_tokens(stack), special,
      )
      for group in self.step.layer(self.plan, path, self.source, context):
        self._take(acts, path, group)
    if path not in self.changed:
      self._run_uncompressed(acts, path)

  def _take(self, acts, path, group) -> None:
    """Goes on behind a group of new experts."""
    self.rows.extend(dict(row) for row in group.rows)
    dense = {name: parts.group_dense(group, name) for name in group.parts}
    if dense:
      dense |= self._biases(path, group, dense)
    if group.leaves or (path not in self.changed and self._selects_anew()):
      self.leaves |= {f'{path}/{name}': leaf for name, leaf in group.leaves.items()}
      self.new_config = self.step.settle(self.new_config, self.rows)
      seen = {f'experts/{n}': w for n, w in dense.items()} if by_oracle(self.new_config) else {}
      acts.reroute(self.new_config, {**group.leaves, **seen})
    if dense:
      self.changed.setdefault(path, set()).update(group.parts)
      for i, expert in enumerate(group.experts):
        acts.run_expert(expert, {name: w[i] for name, w in dense.items()})
    if self.work is None and self._keep:
      self._memory.setdefault(path, []).append(group)

  def _biases(self, path, group, dense) -> dict[str, np.ndarray]:
    """The biases that a group's step leaves as they are."""
    paths = {p.rpartition('/')[2]: p for p in base.expert_leaves(self.source, path, biases=True)}
    return {
        name: np.stack([self.source.read_expert(p, e) for e in group.experts])
        for name, p in paths.items() if name.endswith('_bias') and name not in dense
    }

  def _selects_anew(self) -> bool:
    """Whether tokens choose in another way after the step, be it without a router's weights."""
    selection = lambda config: None if config.moe is None else config.moe.selection
    return selection(self.new_config) != selection(self.config)

  def _run_uncompressed(self, acts, path) -> None:
    leaves = {p.rpartition('/')[2]: p for p in base.expert_leaves(self.source, path, biases=True)}
    nodes = {
        name: self.source.read(p) for name, p in leaves.items()
        if isinstance(self.source.abstract(p), weights.WeightNode)
    }
    experts, seer = self.source.abstract(next(iter(leaves.values()))).shape[0], self.observer
    if seer is not None:
      seer.layer(path, acts, experts)
    for expert in range(experts):
      own = {
          name: np.asarray(
              nodes[name].expert(expert, jnp.float32) if name in nodes
              else self.source.read_expert(p, expert), np.float32,
          )
          for name, p in leaves.items()
      }
      if seer is None:
        acts.run_expert(expert, own)
        continue
      seer.all_tokens(path, expert, own, acts)
      acts.run_expert(
          expert, own, lambda x, y, gate: seer.expert(path, expert, own, x, y, gate)
      )

  def _validation_loss(self, outer) -> float | None:
    if not self.data.validation or getattr(self.config, 'head', '') == 'none':
      return None
    tail = self.data.tail().samples
    tokens = sum(len(s.targets) for s in tail)
    losses = walk.token_losses(
        self.config, outer, self.stacks[self.config.stacks[-1]].buffer[-tokens:],
        np.concatenate([s.targets for s in tail]),
    )
    weight = np.concatenate([s.weights for s in tail])
    if not weight.any():
      return None
    return float((losses.astype(np.float64) * weight).sum() / weight.sum())
