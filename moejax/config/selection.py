"""How tokens choose among the experts that a dense FFN was split into (MoEfication, 2110.01786)."""

from collections.abc import Mapping
import dataclasses
from typing import ClassVar, Self

from moejax.errors import UserError, did_you_mean
from moejax.settings import Checked

SCORES = ('linear', 'unit_linear', 'mlp', 'norm', 'swiglu', 'oracle', 'random')
RULES = ('top', 'within', 'cumulative', 'above')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionConfig(Checked):
  """Router 'selection': experts that are chosen are added up as they are, without gates.

  score: 'linear' in the token, 'unit_linear' in the token at length 1 (similarity), 'mlp'
    (MoEfication), 'norm' (D2DMoE, arXiv 2310.04361), 'swiglu' (CMoE, arXiv 2502.04416), 'oracle',
    by the experts' own activations, and 'random': the two ends that others are measured against.
  rule: the 'top' scores, as many as choices says; those 'within' a share tau of the largest;
    the fewest whose 'cumulative' share of the sum reaches tau; those 'above' tau.
  choices, tau: of each sparse layer, or one for all. choices bounds the other rules too.
  width: hidden units of scores 'mlp' and 'norm'. bias: 'linear' scores have one.
  fill: an expert that is not chosen gives a constant, its mean output (G-MoEfication).
  """

  section: ClassVar[str] = 'moe.selection.'
  least: ClassVar[Mapping[str, float]] = {'width': 0}
  score: str = 'unit_linear'
  rule: str = 'top'
  choices: tuple[int, ...] = (1,)
  tau: tuple[float, ...] = (0.0,)
  width: int = 0
  bias: bool = False
  fill: bool = False

  def __post_init__(self):
    super().__post_init__()
    for name, known in (('score', SCORES), ('rule', RULES)):
      value = getattr(self, name)
      if value not in known:
        raise UserError(
            f'{self.section}{name} = {value!r}: one of {known}{did_you_mean(value, known)}'
        )
    if not self.choices or min(self.choices) < 1:
      raise UserError(
          f'{self.section}choices = {self.choices}: one number or more, each at least 1'
      )
    if not self.tau:
      raise UserError(f'{self.section}tau = {self.tau}: one number or more')
    if self.rule in ('within', 'cumulative') and not all(0 <= t <= 1 for t in self.tau):
      raise UserError(f'{self.section}tau = {self.tau}: each in [0, 1] for rule {self.rule!r}')
    if self.score in ('mlp', 'norm') and not self.width:
      raise UserError(f'{self.section}width = 0: score {self.score!r} has hidden units')

  def of_layer(self, place: int) -> Self:
    """The settings of the sparse layer that is `place`-th of the model."""
    own = lambda values: (values[place if len(values) > 1 else 0],)
    return dataclasses.replace(self, choices=own(self.choices), tau=own(self.tau))
