"""Settings of sparse layers that every architecture shares: experts, router, losses."""

from collections.abc import Mapping
import dataclasses
import re
from typing import Any, ClassVar, Self

from moejax.config.selection import SelectionConfig
from moejax.errors import UserError, did_you_mean
from moejax.settings import Checked

# Each is a function in moejax.routing; see moejax.routing.route.
ROUTERS = (
    'switch', 'gshard', 'topk', 'sparsemixer_v1', 'sparsemixer_v2', 'sparsemixer_v2_star',
    'sampled_gating', 'straight_through', 'reinmax', 'reinforce', 'densemixer', 'threshold', 'hash',
    'selection',
)
VARIANTS = ('reference', 'paper')
BALANCES = ('global', 'local', 'pooled')


def require(condition: bool, field: str, value: Any, rule: str) -> None:
  """Raises UserError('field = value: rule') unless the condition holds."""
  if not condition:
    raise UserError(f'{field} = {value!r}: {rule}')


def require_known(value: str, field: str, known: tuple[str, ...]) -> None:
  """Raises UserError with the nearest name unless the value is among the known ones."""
  require(value in known, field, value, f'one of {known}{did_you_mean(value, known)}')


def require_pattern(pattern: str, field: str = 'layers') -> None:
  """Raises UserError unless a setting is a regular expression."""
  try:
    re.compile(pattern)
  except re.error as error:
    raise UserError(f'{field} = {pattern!r} is no regular expression: {error}') from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(Checked):
  """What a token's way to its experts depends on.

  num_experts, top_k: experts of a layer, and how many of them a token meets; `threshold` and the
    dense estimators meet as many as their rule says.
  d_ff: hidden width of an expert; None for the model's.
  router: one of ROUTERS. normalize_gates: the gates of a token's choices are made to sum to 1.
  jitter_eps: SparseMixer's candidates are the experts whose logits are this near to the largest
    (GRIN, arXiv 2409.12136, eq. 2). variant: 'reference' is the released code, 'paper' the text,
    where the two differ. euler_on_argmax: SparseMixer's first-order rule for the top expert.
  threshold: the probability that the chosen experts reach together, for router 'threshold'.
  router_jitter_noise: in training the router's input is multiplied by noise in 1 +- this;
    input_jitter_noise: the experts' input with it.
  expert_dropout_rate: of the experts' hidden units in training.
  exchange_factor: how tokens travel to experts on other devices: None gathers them all; a number
    is an all-to-all with buffers of that many times the even share, 0 for buffers that hold any
    routing.
  expert_capacity: tokens an expert takes from one sequence, or capacity_factor times its even
    share; None for both drops no token.
  balance: what the load-balancing loss takes its counts over: 'global', all tokens of a step;
    'local', each of `balance_groups` parts of them alone (0: each device's part); 'pooled', all
    layers as one, as Hugging Face does.
  router_ignore_padding_tokens: padding goes to no expert and counts in no loss.
  layer_experts: experts that each sparse layer holds, in the model's order, where compression left
    other numbers of them; one number holds for all layers, none for num_experts in every one.
  merged: the router still chooses among num_experts, and a layer's `expert_map` says to which of
    the fewer experts that it holds a choice leads. sum_groups: it chooses among those instead, each
    by the summed probabilities of all that lead to it.
  selection: how router 'selection' chooses among the experts of a layer that was dense; each is as
    wide as the layer was, over their number.
  members: rows of a batch take turns among so many equal sets of experts, see `nn.members`.
  skip: of each sparse layer, or one for all: a token's second expert is left out where its gate is
    below this share of the first's, which takes over its gate (NAEE, arXiv 2402.14800, 3.3).
  """

  section: ClassVar[str] = 'moe.'
  least: ClassVar[Mapping[str, float]] = {
      'num_experts': 1, 'top_k': 1, 'd_ff': 1, 'expert_capacity': 1, 'router_z_loss_coef': 0,
      'router_aux_loss_coef': 0, 'jitter_eps': 0, 'balance_groups': 0, 'exchange_factor': 0,
      'members': 1,
  }
  num_experts: int
  top_k: int = 1
  d_ff: int | None = None
  router: str = 'switch'
  normalize_gates: bool = False
  jitter_eps: float = 0.01
  variant: str = 'reference'
  euler_on_argmax: bool = True
  threshold: float = 0.9
  router_bias: bool = False
  router_jitter_noise: float = 0.0
  input_jitter_noise: float = 0.0
  expert_dropout_rate: float = 0.0
  expert_capacity: int | None = None
  capacity_factor: float | None = None
  exchange_factor: float | None = None
  router_z_loss_coef: float = 0.001
  router_aux_loss_coef: float = 0.001
  balance: str = 'global'
  balance_groups: int = 0
  router_ignore_padding_tokens: bool = False
  layer_experts: tuple[int, ...] = ()
  merged: bool = False
  sum_groups: bool = False
  skip: tuple[float, ...] = ()
  members: int = 1
  selection: SelectionConfig | None = None

  def __post_init__(self):
    super().__post_init__()
    require_known(self.router, 'moe.router', ROUTERS)
    require_known(self.variant, 'moe.variant', VARIANTS)
    require_known(self.balance, 'moe.balance', BALANCES)
    require(
        self.top_k <= self.num_experts, 'moe.top_k', self.top_k,
        f'at most moe.num_experts = {self.num_experts}',
    )
    selects = self.router == 'selection'
    require(
        selects == (self.selection is not None), 'moe.selection', self.selection,
        "settings for router 'selection', null for others",
    )
    require(
        not selects or (not self.merged and self.d_ff is None), 'moe.router', self.router,
        'its experts are not merged, and moe.d_ff is null',
    )
    least = 1 if self.merged or selects else self.top_k
    for held in self.layer_experts:
      require(
          least <= held <= self.num_experts, 'moe.layer_experts', self.layer_experts,
          f'each between {least} and moe.num_experts = {self.num_experts}',
      )
    require(
        bool(self.layer_experts) or not self.merged, 'moe.merged', True,
        'moe.layer_experts must say how many experts each layer holds',
    )
    require(
        self.merged or not self.sum_groups, 'moe.sum_groups', True,
        'moe.merged must be true: groups are those of an expert map',
    )
    require(
        not self.sum_groups or self.router in ('switch', 'topk'), 'moe.sum_groups', True,
        "routers 'switch' and 'topk' choose by probabilities that add up",
    )
    require(
        not self.sum_groups or self.top_k <= min(self.layer_experts), 'moe.top_k', self.top_k,
        f'at most the groups that each layer holds, {self.layer_experts}',
    )
    require(
        not self.skip or self.top_k == 2, 'moe.skip', self.skip,
        f'a second expert is skipped where there are two; moe.top_k = {self.top_k}',
    )
    require(
        all(0.0 <= value < 1.0 for value in self.skip), 'moe.skip', self.skip, 'each in [0, 1)'
    )
    single = ('switch', 'sparsemixer_v1')
    require(
        self.router not in single or self.top_k == 1, 'moe.top_k', self.top_k,
        f'router {self.router!r} chooses one expert: set moe.top_k = 1',
    )
    require(
        self.router != 'gshard' or self.top_k == 2, 'moe.top_k', self.top_k,
        "router 'gshard' chooses two experts: set moe.top_k = 2",
    )
    normalised = ('topk', 'densemixer', 'threshold', 'hash')
    require(
        not self.normalize_gates or self.router in normalised, 'moe.normalize_gates', True,
        f'the gates of router {self.router!r} carry its gradient as they are; only those of '
        f'{", ".join(normalised)} can be normalised',
    )
    for name in ('router_jitter_noise', 'input_jitter_noise', 'expert_dropout_rate'):
      value = getattr(self, name)
      require(0.0 <= value < 1.0, f'moe.{name}', value, 'in [0, 1)')
    self._check_members()
    require(0.0 < self.threshold <= 1.0, 'moe.threshold', self.threshold, 'in (0, 1]')
    require(
        self.expert_capacity is None or self.capacity_factor is None,
        'moe.capacity_factor', self.capacity_factor, 'give it or moe.expert_capacity, not both',
    )
    require(
        self.capacity_factor is None or self.capacity_factor > 0,
        'moe.capacity_factor', self.capacity_factor, 'above 0',
    )

  def _check_members(self) -> None:
    require(
        self.members == 1 or self.router in ('topk', 'switch'), 'moe.members', self.members,
        f"for routers 'topk' and 'switch', which take the most probable, not {self.router!r}",
    )
    require(
        self.num_experts % self.members == 0 and self.top_k <= self.num_experts // self.members,
        'moe.members', self.members,
        f'must divide moe.num_experts = {self.num_experts} and leave moe.top_k = {self.top_k} each',
    )
    require(
        self.members == 1 or not (self.layer_experts or self.merged), 'moe.members', self.members,
        'layers that hold other numbers of experts have no such sets',
    )

  @property
  def held(self) -> int:
    """Experts of this layer; of a layer's own config (`of_layer`)."""
    return self.layer_experts[0] if self.layer_experts else self.num_experts

  def width(self, d_ff: int) -> int:
    """Hidden units of an expert of this layer, where the model's FFNs have d_ff."""
    if self.selection is None:
      return self.d_ff or d_ff
    return (d_ff - getattr(self, 'shared_d_ff', 0)) // self.held

  def of_layer(self, place: int) -> Self:
    """The settings of the sparse layer that is `place`-th of the model."""
    own = lambda values: (values[place if len(values) > 1 else 0],)
    changes: dict[str, Any] = {'skip': own(self.skip)} if self.skip else {}
    if self.layer_experts:
      changes['layer_experts'] = held = own(self.layer_experts)
      changes['num_experts'] = self.num_experts if self.merged else held[0]
      changes['top_k'] = min(self.top_k, changes['num_experts'])
    if self.selection is not None:
      changes['selection'] = self.selection.of_layer(place)
      if self.layer_experts and held[0] == 1 and getattr(self, 'shared_d_ff', 0):
        changes['shared_d_ff'] = 0
    return dataclasses.replace(self, **changes) if changes else self


def check_layers(moe: MoeConfig | None, sparse_layers: int, d_ff: int) -> None:
  """Raises UserError unless the settings of single layers fit the sparse layers of a model."""
  if moe is None:
    return
  split = d_ff - getattr(moe, 'shared_d_ff', 0)
  for held in (moe.layer_experts or (moe.num_experts,)) if moe.selection is not None else ():
    fits = held == 1 or (split > 0 and split % held == 0)
    require(fits, 'moe.num_experts', held, f'must divide {split}')
  lists = {'layer_experts': moe.layer_experts, 'skip': moe.skip}
  if moe.selection is not None:
    lists |= {'selection.choices': moe.selection.choices, 'selection.tau': moe.selection.tau}
  for field, values in lists.items():
    require(
        len(values) in (0, 1, sparse_layers), f'moe.{field}', values,
        f'one number for all, or {sparse_layers}, one for each sparse layer',
    )
