"""profile(model, ...): how sparse the layers of a dense model are, and what a share of them loses.

MoEfication (arXiv 2110.01786, 3.1) rests on few neurons being active for a token. One layer is in
memory at a time; nothing grows with the number of tokens but the hidden states of the walk.
"""

from collections.abc import Iterable, Mapping
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from moejax.compress import cluster_core, moefy, profile_core, samples, sources, walker
from moejax.compress.align_core import hidden_units
from moejax.errors import UserError
from moejax.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
  """Settings of `profile`.

  expert_size: neurons of the experts that masses are told of. shares: of the experts, at which the
  loss is foreseen. threshold: a neuron is active if its activation is larger, in absolute value.
  """

  expert_size: int = 32
  shares: tuple[float, ...] = (0.1, 0.2, 0.3)
  threshold: float = 0.0
  seed: int = 0

  def __post_init__(self):
    if not all(0 < share <= 1 for share in self.shares):
      raise UserError(f'shares = {self.shares}: each in (0, 1]')
    if self.threshold < 0:
      raise UserError(f'threshold = {self.threshold}: at least 0')


class _Observer:
  """A `walker.Observer` that adds up what each layer's neurons do."""

  sees_logits = False

  def __init__(self, look: Look):
    self._look = look
    self.profiles: dict[str, profile_core.Profile] = {}

  def layer(self, path: str, acts: Any, experts: int) -> None:
    del path, experts
    self._act = acts.act

  def all_tokens(self, path, expert, weights_df, acts) -> None:
    """Splits the layer, before its tokens come."""
    del expert, acts
    rows_fd = np.asarray(weights_df.get('gate', weights_df['wi']), np.float32).T
    experts = moefy.expert_count(len(rows_fd), self._look.expert_size)
    labels = cluster_core.balanced_kmeans(
        cluster_core.normalised(rows_fd), experts, seed=self._look.seed
    )
    self.profiles[path] = profile_core.empty(len(rows_fd), self._look.threshold, labels)

  def expert(self, path, expert, weights_df, x_md, y_md, gate_m) -> None:
    del expert, y_md, gate_m
    hidden = hidden_units(weights_df, x_md, self._act)
    self.profiles[path] = profile_core.add(self.profiles[path], hidden)


def profile(
    model: Model | str | Path, batches: Iterable[Mapping[str, Any]],
    validation_batches: Iterable[Mapping[str, Any]] = (), look: Look = Look(), *,
    sentinel: int | None = None, progress: bool = False,
) -> dict[str, Any]:
  """What the layers of a dense model do with calibration batches.

  Args:
    model: a Model, or a moejax folder that is read layer by layer.
    batches, validation_batches, sentinel: as in `compress`; without validation no loss is foreseen.

  Returns:
    JSON values. 'layers': a row each with path, tokens, active (the mean share of the neurons),
    percentiles of it, hoyer (the effective share: the square-Hoyer index over the neurons), dead
    (neurons never active), zero_tokens, rates (of the neurons, 101 quantiles from the least active)
    and mass (what the best 1, 2, ... of `experts` hold). 'loss', and 'expected': the loss by share
    of the experts, chosen by their activation. 'smooth': whether activations are never 0.

  Raises:
    UserError: a model with experts, samples that do not fit, an expert size that does not divide.
  """
  source = sources.open_source(model)
  if source.config.moe is not None:
    raise UserError(f'{source.config.family} has experts already: profile looks at dense models')
  viewed = sources.as_one_expert(source)
  batches, validation = list(batches), list(validation_batches)
  alone = samples.collect(source.config, batches, (), sentinel=sentinel)
  observer = _Observer(look)
  walker.Walk(viewed, alone, observer=observer, progress=progress).run()
  rows = [_row(path, found) for path, found in observer.profiles.items()]
  result: dict[str, Any] = {
      'layers': rows, 'experts': len(rows[0]['mass']), 'expert_size': look.expert_size,
      'smooth': min(row['active'] for row in rows) > 0.99, 'loss': None, 'expected': {},
  }
  if validation:
    data = samples.collect(source.config, batches, validation, sentinel=sentinel)
    walked = walker.Walk(source, data.tail(), progress=progress)
    walked.run()
    result['loss'] = walked.loss
    for share in look.shares:
      step = moefy.moefy(
          expert_size=look.expert_size, choice='oracle', share=share, seed=look.seed
      )
      result['expected'][f'{share:g}'] = _loss(viewed, data, step, progress)
  return result


def _loss(viewed: Any, data: samples.Samples, step: moefy.Moefy, progress: bool) -> float | None:
  """The validation loss behind a step whose experts are not kept."""
  config = viewed.config
  targets = [f'{stack}/layers_{i}/ffn' for stack in config.stacks
             for i in config.sparse_layers(stack)]
  walked = walker.Walk(
      viewed, data, step=step, plan=step.foreseen(config), targets=targets, keep=False,
      progress=progress,
  )
  walked.run()
  return walked.loss


def _row(path: str, profile: profile_core.Profile) -> dict[str, Any]:
  found = profile_core.finish(profile)
  neurons = len(found.rate_f)
  assert found.best_e is not None
  return {
      'path': path, 'tokens': found.tokens, 'active': found.active,
      'percentiles': {str(k): v for k, v in found.percentiles.items()},
      'hoyer': found.hoyer / neurons, 'dead': int((found.rate_f == 0).sum()),
      'zero_tokens': found.zero_tokens,
      'rates': np.quantile(found.rate_f, np.linspace(0, 1, 101)).round(6).tolist(),
      'mass': found.best_e.round(6).tolist(),
  }


def table(result: Mapping[str, Any]) -> str:
  """The result of `profile` for a terminal."""
  lines = [f'{"layer":26}{"active":>8}{"hoyer":>8}{"dead":>7}{"10 %":>8}{"20 %":>8}{"30 %":>8}']
  experts = result['experts']
  for row in result['layers']:
    held = ''.join(
        f'{row["mass"][max(round(share * experts), 1) - 1]:8.1%}' for share in (0.1, 0.2, 0.3)
    )
    lines.append(
        f'{row["path"]:26}{row["active"]:8.1%}{row["hoyer"]:8.1%}{row["dead"]:7d}{held}'
    )
  lines.append('10 %, 20 %, 30 %: activation mass in the best experts of a token')
  if result['loss'] is not None:
    losses = ', '.join(f'{float(s):.0%} {x:.3f}' for s, x in result['expected'].items())
    lines.append(f'loss {result["loss"]:.3f}; with a share of the experts: {losses}')
  if result['smooth']:
    lines.append('activations are never 0: relufy and train the model first, or fill means in')
  return '\n'.join(lines)
