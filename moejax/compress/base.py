"""What a compression is: a Transform makes new experts for one layer, a group at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any, Protocol

import numpy as np

from moejax import account, weights
from moejax.compress.parts import Group
from moejax.config import Activation, ModelConfig
from moejax.errors import UserError


class LeafSource(account.Source, Protocol):
  """Weights on demand: `store.Source`, or params in memory."""

  def read(self, path: str) -> Any: ...

  def read_expert(self, path: str, index: int) -> np.ndarray: ...


class LayerContext(Protocol):
  """One layer's view of the calibration, made from the layers already compressed."""

  config: ModelConfig
  num_experts: int
  act: Activation

  def inputs(self, experts: Sequence[int]) -> Iterable[np.ndarray]:
    """The normed inputs of each expert, float32 [m_e, d], made one by one, as often as asked.

    Tokens come in order, at most the cap of them, without validation and special tokens.
    """
    ...

  def gates(self, experts: Sequence[int]) -> Iterable[np.ndarray]:
    """The gates of the tokens of `inputs`, float32 [m_e]."""
    ...

  def sample(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Normed inputs [m, d] and router logits [m, e] of `count` calibration tokens, spread evenly.

    For a transform that `sees_logits`.
    """
    ...

  def logits(self) -> np.ndarray:
    """Router logits of all calibration tokens, [m, e], for a transform that `sees_logits`."""
    ...

  def group(self, experts: Sequence[int], make: Callable[[], Group]) -> Group:
    """`make()`, kept on disk; a run that was killed gets it from there."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
  """A compression in two pure steps. Subclasses are frozen dataclasses of JSON values."""

  @property
  def name(self) -> str:
    """The method's name in reports."""
    return type(self).__name__.lower()

  def describe(self) -> dict[str, Any]:
    """Name and settings as JSON values; equal settings make equal files."""
    return {'transform': self.name, **dataclasses.asdict(self)}

  @property
  def sees_logits(self) -> bool:
    """Whether the layer step asks its context for a `sample`."""
    return False

  @property
  def takes_split(self) -> bool:
    """Whether the experts may be parts of a dense layer, none of which can be left out."""
    return True

  def statistics(self) -> tuple[str, ...]:
    """Which `stats.KINDS` the plan is made from."""
    return ()

  def plan(
      self, config: ModelConfig, source: LeafSource, statistics: Any
  ) -> Mapping[str, Any]:
    """Decisions for the whole model, from it as it was: small JSON values.

    statistics: a `stats.Statistics` of the model with the kinds wanted, or None for none.
    """
    del config, source, statistics
    return {}

  def reconfigure(self, config: ModelConfig, plan: Mapping[str, Any]) -> ModelConfig:
    """The configuration of the model to come."""
    del plan
    return config

  def settle(self, config: ModelConfig, rows: Sequence[Mapping[str, Any]]) -> ModelConfig:
    """`reconfigure`'s configuration with what only the layers that are done, their rows, tell."""
    del rows
    return config

  def caution(self, rows: Sequence[Mapping[str, Any]]) -> str:
    """What a user should know of what was done, told by the rows of its report; '' for nothing."""
    del rows
    return ''

  def view(self, source: Any) -> Any:
    """The source as this transform reads it."""
    return source

  def takes(self, path: str) -> bool:
    """Whether this transform changes the FFN layer at `path` ('encoder/layers_1/ffn')."""
    del path
    return True

  def calibration(self) -> 'Calibration':
    """Which tokens the layer step sees."""
    return Calibration()

  def accepts(self, path: str, leaf: Any) -> None:
    """Raises UserError if an expert weight is in a form this transform cannot take."""
    raise NotImplementedError

  def predict(self, path: str, leaf: Any, zero_share: float | None) -> Any:
    """The expert weight `leaf` as it will be stored, of ShapeDtypeStructs, for a dry run.

    Args:
      path: of the weight. leaf: its shape and dtype. zero_share: of ternary weights to come;
        None leaves it to the transform's own guess.
    """
    raise UserError(f'{self.name} cannot tell the size of {path} before it has run')

  def foreseen(self, config: ModelConfig) -> Mapping[str, Any]:
    """What of a plan can be told from shapes, for `reconfigure` in a dry run."""
    del config
    return {}

  def predict_layer(
      self, config: ModelConfig, path: str, leaves: Mapping[str, Any],
      zero_share: Callable[[str], float | None],
  ) -> dict[str, Any]:
    """The FFN layer at `path` as it will be stored: {'experts/wi': ShapeDtypeStruct, ...}."""
    del config
    return {
        name: self.predict(f'{path}/{name}', leaf, zero_share(f'{path}/{name}'))
        if name.startswith('experts/') and not name.endswith('_bias') else leaf
        for name, leaf in leaves.items()
    }

  def layer(
      self, plan: Mapping[str, Any], path: str, source: LeafSource, context: LayerContext
  ) -> Iterator[Group]:
    """The new experts of the FFN layer at `path`, group by group, in order.

    A group is the unit of memory and of resume: make it through `context.group`. The first may
    bring leaves that change where tokens go. Experts stay as they are in a layer whose groups have
    no parts.
    """
    raise NotImplementedError


def require_array(path: str, leaf: Any, name: str, advice: str = '') -> None:
  """Raises UserError if an expert weight is compressed already, for a step that takes arrays."""
  if isinstance(leaf, weights.WeightNode):
    advice = advice or f'{name} first, then compress what is left'
    raise UserError(
        f'{path} is a {type(leaf).__name__} node: {name} takes uncompressed weights; {advice}'
    )


def target_layers(step: Transform, source: account.Source) -> list[str]:
  """The FFN layers that a step changes, in model order.

  Raises:
    UserError: the model has no experts, the step takes none of its layers, or not their form.
  """
  config = source.config
  if config.moe is None:
    raise UserError(f'the model has no experts ({config.family}): {step.name} has nothing to do')
  if config.moe.selection is not None and not step.takes_split:
    raise UserError(
        f'{step.name} changes how many experts there are, or how wide; those of a layer that was '
        'dense are all of it: run fewer of them instead'
    )
  if config.moe.selection is not None and config.moe.selection.score == 'oracle':
    raise UserError(
        'tokens of this model choose by what its experts give (oracle), which is a measure for '
        'others: split the dense model with another choice'
    )
  layers = [
      path for stack in config.stacks for i in config.sparse_layers(stack)
      if step.takes(path := f'{stack}/layers_{i}/ffn')
  ]
  if not layers:
    raise UserError(
        f"{step.name} takes no sparse layer of this model; their paths are like "
        f"'{config.stacks[0]}/layers_1/ffn': check its setting `layers`"
    )
  for path in layers:
    for leaf in expert_leaves(source, path):
      step.accepts(leaf, source.abstract(leaf))
  return layers


def expert_leaves(source: account.Source, layer: str, biases: bool = False) -> list[str]:
  """The paths of the expert weights of an FFN layer, and of their biases if these are wanted."""
  return [
      path for path in source.paths()
      if path.startswith(f'{layer}/experts/') and (biases or not path.endswith('_bias'))
  ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """Tokens for statistics (QMoE, arXiv 2310.16795, 3.2.2 and 3.2.4).

  mask_special: leave out sentinels (encoder) and positions that predict one (decoder).
  token_cap_factor: an expert gets at most int(factor * tokens / experts) of its tokens; 0: all.
  """

  mask_special: bool = True
  token_cap_factor: float = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
  """Transforms one after another, each in its own pass over the model the last one left."""

  steps: tuple[Transform, ...]


def chain(*steps: Transform | Chain) -> Chain:
  """Composes transforms; chains flatten."""
  flat: list[Transform] = []
  for step in steps:
    flat.extend(step.steps if isinstance(step, Chain) else (step,))
  if not flat:
    raise UserError('chain() needs at least one transform')
  return Chain(steps=tuple(flat))
