"""Settings of models of one stack, and decoders: GRIN, Mixtral, OLMoE, Qwen MoEs, Llama, OPT."""

from collections.abc import Mapping
import dataclasses
from typing import ClassVar, Self

from moejax.config.activation import (
  ACTIVATIONS,
  Activation,
  CutsConfig,
  activation_of,
  check_activation,
)
from moejax.config.moe import MoeConfig, check_layers, require, require_known
from moejax.settings import Checked

NORMS = ('rms', 'layer')
QK_NORMS = ('', 'head', 'full')
ROPES = ('default', 'linear', 'llama3', 'yarn', 'longrope')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig(Checked):
  """Rotary positions (arXiv 2104.09864) and how they are stretched past the trained length.

  theta: base of the frequencies. share: of each head's width that rotates.
  kind: 'default'; 'linear' (positions over `factor`); 'llama3' and 'yarn' (arXiv 2309.00071:
    low frequencies over `factor`, between two bounds of wavelengths or rotations); 'longrope'
    (arXiv 2402.13753: each frequency over its own factor, the long ones past
    original_max_positions).
  attention_factor: on cos and sin of yarn; None: yarn's formula. short_mscale, long_mscale: the
    same of longrope; None: its formula from factor.
  """

  section: ClassVar[str] = 'model.rope.'
  least: ClassVar[Mapping[str, float]] = {'original_max_positions': 1}
  theta: float = 10000.0
  share: float = 1.0
  kind: str = 'default'
  factor: float = 1.0
  original_max_positions: int | None = None
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  short_factor: tuple[float, ...] = ()
  long_factor: tuple[float, ...] = ()
  short_mscale: float | None = None
  long_mscale: float | None = None

  def __post_init__(self):
    super().__post_init__()
    require_known(self.kind, 'model.rope.kind', ROPES)
    require(self.theta > 0, 'model.rope.theta', self.theta, 'above 0')
    require(0 < self.share <= 1, 'model.rope.share', self.share, 'in (0, 1]')
    require(self.factor >= 1, 'model.rope.factor', self.factor, 'at least 1')
    require(
        self.kind not in ('llama3', 'yarn', 'longrope') or self.original_max_positions is not None,
        'model.rope.original_max_positions', self.original_max_positions,
        f'rope of kind {self.kind!r} needs the length it was trained at',
    )
    require(
        self.kind != 'longrope' or len(self.short_factor) == len(self.long_factor) > 0,
        'model.rope.short_factor', f'{len(self.short_factor)} values',
        f'longrope needs as many short as long factors, and there are {len(self.long_factor)} long '
        'ones',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderMoeConfig(MoeConfig):
  """Sparse layers of a decoder; see `MoeConfig`.

  Layer i is sparse when (i + 1) % sparse_step == 0 and i is not in dense_layers.
  shared_d_ff: hidden width of the expert that every token meets beside its choices, 0 for none;
  shared_gate: its output is scaled by a sigmoid of the token (Qwen2).
  """

  least: ClassVar[Mapping[str, float]] = {
      **MoeConfig.least, 'sparse_step': 1, 'shared_d_ff': 0,
  }
  top_k: int = 2
  router: str = 'sparsemixer_v2'
  router_z_loss_coef: float = 0.0
  sparse_step: int = 1
  dense_layers: tuple[int, ...] = ()
  shared_d_ff: int = 0
  shared_gate: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig(Checked):
  """One transformer of a single stack of layers; its subclasses say which.

  causal: a token sees those before it only. post_norm: blocks norm what they give, not what they
  get, and the embeddings are normed.
  family: whose files these are; everything else says what is computed.
  d_model, d_head, d_ff: width, width of a head, hidden units of a dense FFN (and of an expert where
  moe.d_ff is not set). num_kv_heads: heads of keys and values, each for num_heads / num_kv_heads of
  queries (arXiv 2305.13245). max_positions: the context, prompt and new tokens together.
  activation, gated: act(gate x) * (wi x), or act(wi x). cuts: what of it is made 0.
  attention_bias: of queries, keys and values; attention_out_bias, ffn_bias and head_bias: of the
  products they name. eos_ids: ids that end a text, the first of which training puts there. moe:
  what its sparse layers are, or None.
  norm: 'rms', or 'layer' with bias. qk_norm: RMS norm of queries and keys, over each 'head' or the
  'full' width. clip_qkv: bound on queries, keys and values. rope: None for learned positions, of
  which there are max_positions (plus `position_offset` rows never used). sliding_window: a token
  sees that many tokens, itself included, but for the layers in full_attention_layers.
  """

  section: ClassVar[str] = 'model.'
  families: ClassVar[tuple[str, ...]] = ()
  stacks: ClassVar[tuple[str, ...]] = ()
  causal: ClassVar[bool] = True
  post_norm: ClassVar[bool] = False
  least: ClassVar[Mapping[str, float]] = {
      'vocab_size': 1, 'd_model': 1, 'd_head': 1, 'd_ff': 1, 'num_heads': 1, 'num_kv_heads': 1,
      'num_layers': 1, 'max_positions': 1, 'sliding_window': 1, 'norm_eps': 0,
      'initializer_std': 0, 'pad_id': 0, 'bos_id': 0, 'position_offset': 0,
  }
  most: ClassVar[Mapping[str, float]] = {'num_layers': 4096}
  family: str
  vocab_size: int
  d_model: int
  d_head: int
  d_ff: int
  num_heads: int
  num_kv_heads: int
  num_layers: int
  max_positions: int = 4096
  activation: str = 'silu'
  gated: bool = True
  norm: str = 'rms'
  norm_eps: float = 1e-5
  rope: RopeConfig | None = RopeConfig()
  position_offset: int = 0
  sliding_window: int | None = None
  full_attention_layers: tuple[int, ...] = ()
  attention_bias: bool = False
  attention_out_bias: bool = False
  qk_norm: str = ''
  clip_qkv: float | None = None
  ffn_bias: bool = False
  head_bias: bool = False
  tie_embeddings: bool = False
  dropout_rate: float = 0.0
  initializer_std: float = 0.02
  pad_id: int | None = None
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  cuts: CutsConfig | None = None
  moe: DecoderMoeConfig | None = None

  def __post_init__(self):
    super().__post_init__()
    require_known(self.family, 'model.family', self.families)
    require_known(self.activation, 'model.activation', ACTIVATIONS)
    require_known(self.norm, 'model.norm', NORMS)
    require_known(self.qk_norm, 'model.qk_norm', QK_NORMS)
    require(
        self.num_heads % self.num_kv_heads == 0, 'model.num_kv_heads', self.num_kv_heads,
        f'must divide model.num_heads = {self.num_heads}',
    )
    require(0.0 <= self.dropout_rate < 1.0, 'model.dropout_rate', self.dropout_rate, 'in [0, 1)')
    for name in ('pad_id', 'bos_id'):
      value = getattr(self, name)
      require(
          value is None or value < self.vocab_size, f'model.{name}', value,
          f'under model.vocab_size = {self.vocab_size}',
      )
    require(
        all(0 <= i < self.vocab_size for i in self.eos_ids), 'model.eos_ids', self.eos_ids,
        f'each under model.vocab_size = {self.vocab_size}',
    )
    if self.rope is not None:
      rotated = self.d_rotated
      require(
          rotated % 2 == 0 and rotated > 0, 'model.rope.share', self.rope.share,
          f'must leave an even part of model.d_head = {self.d_head}',
      )
      require(
          self.rope.kind != 'longrope' or len(self.rope.short_factor) == rotated // 2,
          'model.rope.short_factor', f'{len(self.rope.short_factor)} values',
          f'must be {rotated // 2}, one for each frequency',
      )
    check_activation(self.activation, self.gated, self.cuts, self.num_layers)
    check_layers(self.moe, len(self.sparse_layers()), self.d_ff)

  @property
  def d_rotated(self) -> int:
    """Width of a head that rotary positions turn."""
    return 0 if self.rope is None else int(self.d_head * self.rope.share)

  @property
  def stack(self) -> str:
    """The name of the one stack."""
    return self.stacks[0]

  def layers_of(self, stack: str) -> int:
    """Layers of the one stack."""
    del stack
    return self.num_layers

  def sparse_layers(self, stack: str = '') -> tuple[int, ...]:
    """Indices of the sparse layers."""
    del stack
    if self.moe is None:
      return ()
    return tuple(
        i for i in range(self.num_layers)
        if (i + 1) % self.moe.sparse_step == 0 and i not in self.moe.dense_layers
    )

  def of_layer(self, stack: str, index: int) -> Self:
    """The config of one layer: the same, but for its cuts and the number of experts it holds."""
    if self.cuts is not None:
      self = dataclasses.replace(self, cuts=self.cuts.of_layer(index))
    if self.moe is None or index not in self.sparse_layers(stack):
      return self
    return dataclasses.replace(self, moe=self.moe.of_layer(self.sparse_layers().index(index)))

  def window_of(self, layer: int) -> int | None:
    """How many tokens a token of this layer sees, itself included; None for all before it."""
    return None if layer in self.full_attention_layers else self.sliding_window

  @property
  def act(self) -> Activation:
    """What makes hidden units, of the config of one layer."""
    return activation_of(self.activation, self.cuts)

  def init_std(self, inputs: int) -> float:
    """Standard deviation of a fresh weight: one for all."""
    del inputs
    return self.initializer_std


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(StackConfig):
  """One decoder-only transformer, pre-norm; see `StackConfig`."""

  families: ClassVar[tuple[str, ...]] = (
      'grin', 'phimoe', 'mixtral', 'olmoe', 'qwen2_moe', 'qwen3_moe', 'llama', 'mistral', 'qwen2',
      'qwen3', 'opt',
  )
  stacks: ClassVar[tuple[str, ...]] = ('decoder',)
