"""search_shares(model, ...): how many experts each split layer runs, for the least loss.

A model that `moefy` split runs the same share in all layers; some can do with less. Nothing is
fitted anew: routers stay, only their number of choices changes.
"""

from collections.abc import Iterable, Mapping
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from moejax import files
from moejax import progress as progress_lib
from moejax.compress import fewer, samples, shares_core, sources, walker
from moejax.config import ModelConfig
from moejax.errors import UserError
from moejax.model import Model

# Part of the measurements that the predictor is judged by.
_HELD_OUT = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
  """Settings of `search_shares`."""

  budget: float = 0.2
  measured: int = 64
  drawn: int = 10_000
  finalists: int = 8
  seed: int = 0

  def __post_init__(self):
    if not 0 < self.budget <= 1:
      raise UserError(f'budget = {self.budget}: a share of all experts, in (0, 1]')
    for name, least in (('measured', 10), ('drawn', 1), ('finalists', 1)):
      if getattr(self, name) < least:
        raise UserError(f'{name} = {getattr(self, name)}: at least {least}')


def search_shares(
    model: Model | str | Path, batches: Iterable[Mapping[str, Any]],
    how: Shares = Shares(), out_folder: str | Path | None = None, *,
    sentinel: int | None = None, progress: bool = False,
) -> tuple[Model | None, dict[str, Any]]:
  """The model with a number of experts for each layer, within a budget of FLOPs.

  Experts of a layer are alike, so that a budget of experts is one of FLOPs. `measured` random
  allocations between half and twice the budget are run, a predictor is fitted to their losses
  (`shares_core`), and the best it tells of, and the uniform one, are run for the choice.

  Args:
    model: split by `moefy` with rule 'top', or its folder.
    batches: whose loss is measured, as `compress`'s validation_batches.
    out_folder: where the model goes; None returns it. What was measured is kept beside it until
      then, so that a killed run goes on.

  Returns:
    (the model or None, {'choices' of each layer, 'loss', 'uniform': its 'choices' and 'loss',
    'explained': R^2 on measurements the predictor has not seen, 'measured'}).

  Raises:
    UserError: layers that are not split, or whose number of experts depends on the token; a budget
      below one expert a layer; no batch with a loss.
  """
  source = sources.open_source(model)
  config = source.config
  if config.moe is None or config.moe.selection is None or config.moe.selection.rule != 'top':
    raise UserError(
        f"this {config.family} has no layers split by moefy with rule 'top': there is no number of "
        'experts to search for'
    )
  experts = [n for n in fewer.experts_held(config).values() if n > 1]
  held = list(fewer.experts_held(config).values())
  budget = round(how.budget * sum(experts))
  if not experts or budget < len(experts):
    raise UserError(
        f'budget = {how.budget} of {sum(experts)} experts in {len(experts)} split layers: each '
        'runs at least one; raise it'
    )
  batches = list(batches)
  data = samples.collect(config, batches, batches, sentinel=sentinel)
  measure = _Measure(source, data.tail(), held, how, out_folder)
  rng = np.random.default_rng(how.seed)
  uniform = shares_core.uniform(experts, budget)
  some = np.concatenate([
      shares_core.drawn(experts, min(max(round(f * budget), len(experts)), sum(experts)), 1, rng)
      for f in np.exp2(rng.uniform(-1, 1, how.measured))
  ])
  bar = progress_lib.bar(some, label='shares', unit='run', show=progress)
  losses = np.array([measure(row) for row in bar])
  count = max(round(len(some) * _HELD_OUT), 2)
  shares = some / np.array(experts)
  early = shares_core.fit(shares[count:], losses[count:])
  predictor = shares_core.fit(shares, losses)
  others = shares_core.drawn(experts, budget, how.drawn, rng)
  order = np.argsort(predictor(others / np.array(experts)), kind='stable')
  wanted = [shares_core.best(predictor, experts, budget), uniform, *others[order]]
  finalists = list(dict.fromkeys(tuple(map(int, row)) for row in wanted))[: how.finalists + 2]
  final = {row: measure(np.array(row)) for row in finalists}
  chosen = min(final, key=final.__getitem__)
  report = {
      'choices': measure.whole(np.array(chosen)), 'loss': final[chosen],
      'uniform': {'choices': measure.whole(uniform), 'loss': final[tuple(map(int, uniform))]},
      'explained': shares_core.explained(early, shares[:count], losses[:count]),
      'measured': len(some) + len(final),
  }
  made = sources.reconfigured(
      source, measure.config(np.array(chosen)), out_folder,
      {'transform': 'shares', **dataclasses.asdict(how)},
      origin='memory' if isinstance(model, Model) else str(model),
  )
  measure.forget()
  return made, report


class _Measure:
  """The loss of allocations, each once, kept in a file beside the folder to come."""

  def __init__(self, source, data, held, how: Shares, out_folder):
    self._source, self._data, self._held = source, data, held
    self._file = None
    self._known: dict[str, float] = {}
    if out_folder is not None:
      out = Path(out_folder).absolute()
      files.require_target(out)
      self._file = out.with_name(f'.{out.name}.measured.json')
      job = f'{source.fingerprint()} {data.fingerprint()} {how}'
      found = files.read_json(self._file) if self._file.is_file() else {}
      self._known = found['losses'] if found.get('job') == job else {}
      self._job = job

  def whole(self, choices: np.ndarray) -> list[int]:
    """The number of each layer, those that are not split among them."""
    rest = iter(choices.tolist())
    return [next(rest) if held > 1 else 1 for held in self._held]

  def config(self, choices: np.ndarray) -> ModelConfig:
    """The model's config with so many experts in each split layer."""
    config, whole = self._source.config, tuple(self.whole(choices))
    moe: Any = config.moe
    selection = dataclasses.replace(moe.selection, choices=whole)
    return dataclasses.replace(
        config, moe=dataclasses.replace(moe, selection=selection, top_k=max(whole))
    )

  def __call__(self, choices: np.ndarray) -> float:
    key = ' '.join(map(str, choices.tolist()))
    if key not in self._known:
      walked = walker.Walk(sources.Changed(self._source, self.config(choices)), self._data)
      walked.run()
      if walked.loss is None:
        raise UserError('the batches have no weighted target: there is no loss to search by')
      self._known[key] = walked.loss
      if self._file is not None:
        files.write_json(self._file, {'job': self._job, 'losses': self._known})
    return self._known[key]

  def forget(self) -> None:
    """Removes the file."""
    if self._file is not None:
      self._file.unlink(missing_ok=True)
