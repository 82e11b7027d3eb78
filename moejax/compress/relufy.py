"""relufy(model, kind, ...): a dense model whose FFNs have zeros to leave out.

MoEfication (arXiv 2110.01786) rests on ReLU. A model with a smooth activation gets one and is then
trained for a while (`configs/relufy.py`), or its small activations are cut to 0 as they are, behind
thresholds that calibration finds. Weights stay, only the config changes.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.compress import samples, sizes_core, sources, walker
from moejax.compress.align_core import hidden_units
from moejax.config import Activation, CutsConfig, EncoderConfig, ModelConfig
from moejax.config.moe import require_known
from moejax.errors import UserError
from moejax.model import Model
from moejax.ops import ffn
from moejax.ops.linear import linear

# What the activation becomes, if it changes, and the cut that is calibrated.
KINDS: dict[str, tuple[str | None, str | None]] = {
    'relu': ('relu', None), 'shifted': ('relu', None), 'drelu': ('drelu', None),
    'fat': ('relu', 'cut'), 'cats': (None, 'cut'), 'teal': (None, 'hidden_cut'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relufy:
  """Settings of `relufy`."""

  kind: str = 'teal'
  sparsity: float = 0.5
  shift: float = 0.0

  def __post_init__(self):
    require_known(self.kind, 'kind', tuple(KINDS))
    if not 0 <= self.sparsity < 1:
      raise UserError(f'sparsity = {self.sparsity}: a share of the hidden units, in [0, 1)')
    if self.shift and self.kind != 'shifted':
      raise UserError(f"shift = {self.shift} is for kind = 'shifted', not {self.kind!r}")


def reconfigured(config: ModelConfig, how: Relufy) -> ModelConfig:
  """The config with the kind's activation, nothing calibrated yet; cuts that there are stay.

  A shift is of one activation and goes with it. 'fat' leaves both ReLUs of a 'drelu'.

  Raises:
    UserError: 'drelu' without a gate.
  """
  name, field = KINDS[how.kind]
  if field is not None and (name is None or config.activation == 'drelu'):
    name = config.activation
  cuts = config.cuts or CutsConfig()
  if name != config.activation or how.kind in ('relu', 'shifted', 'drelu'):
    cuts = dataclasses.replace(cuts, shift=(how.shift,))
  head: Any = {}
  if isinstance(config, EncoderConfig) and config.head == 'mlm' and name != config.activation:
    head['head_activation'] = config.words_activation
  return dataclasses.replace(
      config, activation=name or config.activation,
      cuts=None if cuts == CutsConfig() else cuts, **head,
  )


def relufy(
    model: Model | str | Path, kind: str = 'relu',
    batches: Iterable[Mapping[str, Any]] = (), out_folder: str | Path | None = None, *,
    sparsity: float = 0.5, shift: float = 0.0, sentinel: int | None = None,
    progress: bool = False,
) -> Model | None:
  """A model with another activation, or with small activations cut to 0.

  Args:
    model: a Model, or a moejax folder that is read layer by layer.
    kind: 'relu'; 'shifted', relu(x - shift), 'drelu', ReLU on both branches of a gated FFN (arXiv
      2406.05955): to be trained. With a threshold for each FFN, at which `sparsity` of its units
      are 0 on the batches: 'fat', ReLU with small values cut too (FATReLU, 2402.13516); 'cats',
      the same of the activation as it is (2404.08763); 'teal', of what wo multiplies (2408.14690).
    batches, sentinel: calibration, as in `compress`, for the last three.
    out_folder: where the model goes; None returns it.

  Raises:
    UserError: experts or no calibration where thresholds are wanted, 'drelu' without a gate.
  """
  how = Relufy(kind=kind, sparsity=sparsity, shift=shift)
  source = sources.open_source(model)
  config = reconfigured(source.config, how)
  _, field = KINDS[kind]
  if field is not None:
    found = thresholds(source, batches, how, sentinel=sentinel, progress=progress)
    before = config.cuts or CutsConfig()
    cuts: Any = {field: tuple(found.values())}
    config = dataclasses.replace(config, cuts=dataclasses.replace(before, **cuts))
  return sources.reconfigured(
      source, config, out_folder, {'transform': 'relufy', **dataclasses.asdict(how)},
      origin='memory' if isinstance(model, Model) else str(model),
  )


def thresholds(
    model: Any, batches: Iterable[Mapping[str, Any]], how: Relufy, *,
    sentinel: int | None = None, progress: bool = False,
) -> dict[str, float]:
  """The cut of each FFN, by path, at which `sparsity` of its units are 0; of a source of leaves.

  All are measured on the model with nothing cut, as published, also where it has cuts already.

  Raises:
    UserError: the model has experts, no batches, or activations that are not finite.
  """
  if model.config.moe is not None:
    raise UserError(
        f'{model.config.family} has experts: {how.kind} measures the FFNs of dense models'
    )
  config = reconfigured(model.config, how)
  if config.cuts is not None:
    config = dataclasses.replace(config, cuts=CutsConfig(shift=config.cuts.shift))
  observer = _Observer(config, KINDS[how.kind][1])
  viewed = sources.as_one_expert(sources.Changed(model, observer.config))
  data = samples.collect(model.config, list(batches), (), sentinel=sentinel)
  walker.Walk(viewed, data, observer=observer, progress=progress).run()
  return {path: sizes_core.cut(c, how.sparsity) for path, c in observer.counts.items()}


class _Observer:
  """A `walker.Observer` that counts sizes."""

  sees_logits = False

  def __init__(self, config: ModelConfig, field: str | None):
    self.config, self._field = config, field
    self.counts: dict[str, np.ndarray] = {}
    self._act = Activation(config.activation)

  def layer(self, path: str, acts: Any, experts: int) -> None:
    del experts
    self.counts[path], self._act = sizes_core.empty(), acts.act

  def all_tokens(self, path, expert, weights_df, acts) -> None:
    del path, expert, weights_df, acts

  def expert(self, path, expert, weights_df, x_md, y_md, gate_m) -> None:
    del expert, y_md, gate_m
    if self._field == 'hidden_cut':
      values = hidden_units(weights_df, x_md, self._act)
    else:
      values = _activations(dict(weights_df), x_md, self._act)
    self.counts[path] = sizes_core.add(self.counts[path], values)


@functools.partial(jax.jit, static_argnames=('act',))
def _activations(weights_df, x_md, act):
  """Values of the activation before a gate."""
  name = 'gate' if 'gate' in weights_df else 'wi'
  y = linear(x_md, weights_df[name])
  y = y + weights_df[f'{name}_bias'][None] if f'{name}_bias' in weights_df else y
  return ffn.hidden_units(act, y)


def table(config: ModelConfig) -> dict[str, Any]:
  """The activation and cuts of a config, for a terminal."""
  return {
      'activation': config.activation,
      'cuts': None if config.cuts is None else dataclasses.asdict(config.cuts),
  }
