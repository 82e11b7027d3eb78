"""Settings of encoder-only models: BERT."""

from collections.abc import Mapping
import dataclasses
from typing import ClassVar

from moejax.config.activation import ACTIVATIONS
from moejax.config.decoder import StackConfig
from moejax.config.moe import require, require_known

HEADS = ('none', 'mlm', 'labels')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(StackConfig):
  """One encoder-only transformer, post-norm: BERT (arXiv 1810.04805); see `StackConfig`.

  head: what logits are of: 'mlm', the masked words; 'labels', as many as there are of a text, told
    by its first token; 'none', no logits.
  token_types: kinds of tokens (sentence A and B), each with an embedding.
  head_activation: of head 'mlm'; empty for that of the FFNs.
  pooler: head 'none' has BERT's pooler, tanh of a product of the first token; 'labels' always has.
  mask_id: the id that stands for masked words; None where nobody trains on them.
  """

  families: ClassVar[tuple[str, ...]] = ('bert',)
  stacks: ClassVar[tuple[str, ...]] = ('encoder',)
  causal: ClassVar[bool] = False
  post_norm: ClassVar[bool] = True
  least: ClassVar[Mapping[str, float]] = {
      **StackConfig.least, 'labels': 0, 'token_types': 1, 'mask_id': 0,
  }
  family: str = 'bert'
  head: str = 'mlm'
  head_activation: str = ''
  labels: int = 0
  token_types: int = 2
  pooler: bool = False
  mask_id: int | None = None
  pad_id: int | None = 0
  max_positions: int = 512
  activation: str = 'gelu'
  gated: bool = False
  norm: str = 'layer'
  norm_eps: float = 1e-12
  rope: None = None
  attention_bias: bool = True
  attention_out_bias: bool = True
  ffn_bias: bool = True
  tie_embeddings: bool = True
  dropout_rate: float = 0.1

  def __post_init__(self):
    super().__post_init__()
    require_known(self.head, 'model.head', HEADS)
    require_known(self.head_activation, 'model.head_activation', ('', *ACTIVATIONS))
    require(
        (self.head == 'labels') == (self.labels > 0), 'model.labels', self.labels,
        "their number, for head 'labels' alone",
    )
    require(
        self.mask_id is None or self.mask_id < self.vocab_size, 'model.mask_id', self.mask_id,
        f'under model.vocab_size = {self.vocab_size}',
    )
    require(self.tie_embeddings, 'model.tie_embeddings', False, 'words are told by their embedding')
    for name, fixed in (('norm', 'layer'), ('head_bias', False), ('position_offset', 0)):
      value = getattr(self, name)
      require(value == fixed, f'model.{name}', value, f'an encoder has {fixed!r}')
    require(self.moe is None or self.moe.router == 'selection', 'model.moe', self.moe,
            "must be null, or have router 'selection'")

  @property
  def words_activation(self) -> str:
    """The activation of head 'mlm'."""
    return self.head_activation or self.activation

  @property
  def pools(self) -> bool:
    """Whether there is a pooler."""
    return self.head == 'labels' or (self.head == 'none' and self.pooler)
