"""Settings of encoder-decoders: Switch Transformers and T5."""

from collections.abc import Mapping
import dataclasses
from typing import ClassVar

from moejax.config.activation import (
  ACTIVATIONS,
  Activation,
  CutsConfig,
  activation_of,
  check_activation,
)
from moejax.config.moe import MoeConfig, check_layers, require, require_known
from moejax.settings import Checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncDecMoeConfig(MoeConfig):
  """Sparse layers of a Switch Transformer (arXiv 2101.03961); see `MoeConfig`.

  A sparse step of n makes layer i sparse when i % n == 1; 1 makes every layer sparse, 0 none.
  """

  least: ClassVar[Mapping[str, float]] = {
      **MoeConfig.least, 'encoder_sparse_step': 0, 'decoder_sparse_step': 0,
  }
  encoder_sparse_step: int = 2
  decoder_sparse_step: int = 2
  router_jitter_noise: float = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncDecConfig(Checked):
  """One encoder-decoder: Switch Transformer, T5 v1.0 (ReLU) or T5 v1.1 (gated GELU)."""

  section: ClassVar[str] = 'model.'
  families: ClassVar[tuple[str, ...]] = ('switch', 't5')
  stacks: ClassVar[tuple[str, ...]] = ('encoder', 'decoder')
  post_norm: ClassVar[bool] = False
  least: ClassVar[Mapping[str, float]] = {
      'vocab_size': 1, 'd_model': 1, 'd_kv': 1, 'd_ff': 1, 'num_heads': 1, 'num_layers': 1,
      'num_decoder_layers': 1, 'norm_eps': 0, 'relative_attention_max_distance': 1,
      'initializer_factor': 0, 'pad_id': 0, 'eos_id': 0, 'decoder_start_id': 0,
  }
  most: ClassVar[Mapping[str, float]] = {'num_layers': 4096, 'num_decoder_layers': 4096}
  family: str = 'switch'
  vocab_size: int
  d_model: int
  d_kv: int
  d_ff: int
  num_heads: int
  num_layers: int
  num_decoder_layers: int
  activation: str = 'relu'
  gated: bool = False
  tie_embeddings: bool = True
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  norm_eps: float = 1e-6
  dropout_rate: float = 0.1
  initializer_factor: float = 1.0
  pad_id: int = 0
  eos_id: int = 1
  decoder_start_id: int = 0
  cuts: CutsConfig | None = None
  moe: EncDecMoeConfig | None = None

  def __post_init__(self):
    super().__post_init__()
    require_known(self.family, 'model.family', self.families)
    require_known(self.activation, 'model.activation', ACTIVATIONS)
    require(
        self.relative_attention_num_buckets >= 4 and self.relative_attention_num_buckets % 2 == 0,
        'model.relative_attention_num_buckets', self.relative_attention_num_buckets,
        'an even number, at least 4',
    )
    buckets, reach = self.relative_attention_num_buckets, self.relative_attention_max_distance
    require(
        reach > buckets // 2, 'model.relative_attention_max_distance', reach,
        f'over half of model.relative_attention_num_buckets = {buckets}',
    )
    for name in ('pad_id', 'eos_id', 'decoder_start_id'):
      require(
          getattr(self, name) < self.vocab_size, f'model.{name}', getattr(self, name),
          f'under model.vocab_size = {self.vocab_size}',
      )
    require(0.0 <= self.dropout_rate < 1.0, 'model.dropout_rate', self.dropout_rate, 'in [0, 1)')
    require(
        self.family == 'switch' or self.moe is None or self.moe.router == 'selection',
        'model.moe', self.moe, "must be null for family 't5', or have router 'selection'",
    )
    check_activation(
        self.activation, self.gated, self.cuts, self.num_layers + self.num_decoder_layers
    )
    check_layers(
        self.moe, sum(len(self.sparse_layers(stack)) for stack in ('encoder', 'decoder')), self.d_ff
    )

  def layers_of(self, stack: str) -> int:
    """Layers of 'encoder' or 'decoder'."""
    return self.num_layers if stack == 'encoder' else self.num_decoder_layers

  def sparse_layers(self, stack: str) -> tuple[int, ...]:
    """Indices of the sparse layers of 'encoder' or 'decoder'."""
    if self.moe is None:
      return ()
    step = self.moe.encoder_sparse_step if stack == 'encoder' else self.moe.decoder_sparse_step
    if step == 0:
      return ()
    return tuple(i for i in range(self.layers_of(stack)) if step == 1 or i % step == 1)

  def of_layer(self, stack: str, index: int) -> 'EncDecConfig':
    """The config of one layer: the same, but for its cuts and the number of experts it holds."""
    if self.cuts is not None:
      place = index + (self.num_layers if stack == 'decoder' else 0)
      self = dataclasses.replace(self, cuts=self.cuts.of_layer(place))
    if self.moe is None or index not in self.sparse_layers(stack):
      return self
    place = self.sparse_layers(stack).index(index)
    if stack == 'decoder':
      place += len(self.sparse_layers('encoder'))
    return dataclasses.replace(self, moe=self.moe.of_layer(place))

  @property
  def act(self) -> Activation:
    """What makes hidden units, of the config of one layer."""
    return activation_of(self.activation, self.cuts)

  def init_std(self, inputs: int) -> float:
    """Standard deviation of a fresh weight with so many inputs (T5's)."""
    return self.initializer_factor * inputs**-0.5
