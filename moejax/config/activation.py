"""What an FFN's hidden units are made of: an activation, and what is cut from it to make zeros."""

import dataclasses
from typing import ClassVar, Self

from moejax.errors import UserError
from moejax.settings import Checked

ACTIVATIONS = ('relu', 'gelu', 'gelu_new', 'silu', 'drelu')


@dataclasses.dataclass(frozen=True)
class Activation:
  """One layer's activation; see `ops.ffn.hidden_units`. Sizes at most a cut become 0."""

  name: str
  shift: float = 0.0
  cut: float = 0.0
  hidden_cut: float = 0.0


# A name where nothing is cut.
Act = str | Activation


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutsConfig(Checked):
  """What is taken off hidden units, of each FFN in model order or one number for all.

  shift: the activation is of x - shift (shifted ReLU, arXiv 2310.04564). cut: activations of a size
  up to this are 0: FATReLU (2402.13516) with 'relu', CATS (2404.08763) with 'silu'. hidden_cut:
  the same of what wo multiplies, gated or not (TEAL, 2408.14690).
  """

  section: ClassVar[str] = 'model.cuts.'
  shift: tuple[float, ...] = (0.0,)
  cut: tuple[float, ...] = (0.0,)
  hidden_cut: tuple[float, ...] = (0.0,)

  def __post_init__(self):
    super().__post_init__()
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not value:
        raise UserError(f'{self.section}{field.name} = {value}: one number or more')
      if field.name != 'shift' and min(value) < 0:
        raise UserError(f'{self.section}{field.name} = {value}: each at least 0')

  def of_layer(self, place: int) -> Self:
    """The cuts of the FFN that is `place`-th of the model."""
    own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return dataclasses.replace(
        self, **{name: (v[place if len(v) > 1 else 0],) for name, v in own.items()}
    )


def check_activation(
    activation: str, gated: bool, cuts: CutsConfig | None, ffns: int
) -> None:
  """Raises UserError for an activation without its gate, or cuts of another number of FFNs."""
  if activation == 'drelu' and not gated:
    raise UserError("model.activation = 'drelu': both branches of a gated FFN; set model.gated")
  for field in () if cuts is None else dataclasses.fields(cuts):
    count = len(getattr(cuts, field.name))
    if count not in (1, ffns):
      raise UserError(
          f'model.cuts.{field.name} has {count} numbers: one for all, or one for each FFN ({ffns})'
      )


def activation_of(activation: str, cuts: CutsConfig | None) -> Activation:
  """The activation of one layer's config."""
  if cuts is None:
    return Activation(activation)
  if any(len(getattr(cuts, f.name)) > 1 for f in dataclasses.fields(cuts)):
    raise ValueError('cuts differ from layer to layer: take the config of a layer (of_layer)')
  return Activation(activation, cuts.shift[0], cuts.cut[0], cuts.hidden_cut[0])
