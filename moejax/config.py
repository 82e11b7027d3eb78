"""Every setting of the library as frozen, validated dataclasses, to and from JSON."""

from collections.abc import Iterable, Mapping
import dataclasses
import json
import types
import typing
from typing import Any, TypeVar

from moejax.errors import UserError, did_you_mean

ACTIVATIONS = ('relu', 'gelu', 'gelu_new', 'silu')
FAMILIES = ('switch', 't5')

T = TypeVar('T')


def _require(condition: bool, field: str, value: Any, rule: str) -> None:
  if not condition:
    raise UserError(f'{field} = {value!r}: {rule}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
  """Sparse layers of a Switch Transformer (arXiv 2101.03961).

  A sparse step of n makes layer i sparse when i % n == 1; 1 makes every layer sparse, 0 none.
  `expert_capacity` counts tokens an expert takes from one sequence; None drops no token. With
  `router_ignore_padding_tokens` padding goes to no expert and counts in no loss.
  """

  num_experts: int
  encoder_sparse_step: int = 2
  decoder_sparse_step: int = 2
  router_bias: bool = False
  router_jitter_noise: float = 0.01
  expert_capacity: int | None = None
  router_z_loss_coef: float = 0.001
  router_aux_loss_coef: float = 0.001
  router_ignore_padding_tokens: bool = False

  def __post_init__(self):
    _require(self.num_experts >= 1, 'moe.num_experts', self.num_experts, 'at least 1')
    for name in ('encoder_sparse_step', 'decoder_sparse_step'):
      _require(getattr(self, name) >= 0, f'moe.{name}', getattr(self, name), '0 or more')
    _require(
        self.expert_capacity is None or self.expert_capacity >= 1,
        'moe.expert_capacity', self.expert_capacity, 'null or at least 1',
    )
    _require(
        0.0 <= self.router_jitter_noise < 1.0,
        'moe.router_jitter_noise', self.router_jitter_noise, 'in [0, 1)',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """One encoder-decoder: Switch Transformer, T5 v1.0 (ReLU) or T5 v1.1 (gated GELU)."""

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
  moe: MoeConfig | None = None

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise UserError(
          f'model.family = {self.family!r}: one of {FAMILIES}{did_you_mean(self.family, FAMILIES)}'
      )
    if self.activation not in ACTIVATIONS:
      raise UserError(
          f'model.activation = {self.activation!r}: one of {ACTIVATIONS}'
          f'{did_you_mean(self.activation, ACTIVATIONS)}'
      )
    for name in ('vocab_size', 'd_model', 'd_kv', 'd_ff', 'num_heads', 'num_layers'):
      _require(getattr(self, name) >= 1, f'model.{name}', getattr(self, name), 'at least 1')
    _require(
        self.num_decoder_layers >= 1, 'model.num_decoder_layers', self.num_decoder_layers,
        'at least 1',
    )
    _require(
        self.relative_attention_num_buckets >= 4 and self.relative_attention_num_buckets % 2 == 0,
        'model.relative_attention_num_buckets', self.relative_attention_num_buckets,
        'an even number, at least 4',
    )
    _require(
        0.0 <= self.dropout_rate < 1.0, 'model.dropout_rate', self.dropout_rate, 'in [0, 1)'
    )
    _require(
        self.family == 'switch' or self.moe is None, 'model.moe', self.moe,
        "must be null for family 't5'",
    )

  def sparse_layers(self, stack: str) -> tuple[int, ...]:
    """Indices of the sparse layers of 'encoder' or 'decoder'."""
    layers = self.num_layers if stack == 'encoder' else self.num_decoder_layers
    if self.moe is None:
      return ()
    step = self.moe.encoder_sparse_step if stack == 'encoder' else self.moe.decoder_sparse_step
    if step == 0:
      return ()
    return tuple(i for i in range(layers) if step == 1 or i % step == 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Text to span-corrupted samples (T5, arXiv 1910.10683, 3.1.4). Lengths are in tokens.

  Files are paths, globs or 'archive.tgz::glob'; an empty `tokenizer` trains one on train_files.
  """

  train_files: tuple[str, ...] = ()
  valid_files: tuple[str, ...] = ()
  tokenizer: str = ''
  num_sentinels: int = 100
  encoder_length: int = 512
  noise_density: float = 0.15
  mean_span: float = 3.0
  seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
  """An optax chain: clip, optimizer, schedule, weight decay and rates by path rules.

  Schedules after the warm-up: 'constant', 'cosine', 'linear', 'rsqrt' (T5's), and 'wsd', constant
  and then linear over the last `decay_steps`. `scale_by_param_rms` makes rates relative to each
  parameter's size, as Adafactor does (arXiv 1804.04235, section 8). Rules are (path regex, factor),
  first match wins.
  """

  optimizer: str = 'adamw'
  learning_rate: float = 1e-3
  schedule: str = 'cosine'
  warmup_steps: int = 1000
  decay_steps: int = 0
  end_fraction: float = 0.1
  b1: float = 0.9
  b2: float = 0.98
  eps: float = 1e-8
  weight_decay: float = 0.01
  clip_norm: float = 1.0
  scale_by_param_rms: bool = False
  weight_decay_rules: tuple[tuple[str, float], ...] = (
      (r'.*(norm|final_norm|relative_bias|bias)', 0.0),
      (r'.*', 1.0),
  )
  learning_rate_rules: tuple[tuple[str, float], ...] = ((r'.*', 1.0),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each mesh axis; a `data` of -1 takes all that are left."""

  data: int = -1
  expert: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """The training loop. Intervals are in optimizer steps; an interval of 0 means never.

  `max_seconds` over 0 ends a run early, with a checkpoint. `aligned_start`: see `nn.aligned`.
  `peak_flops_per_second` of 0 is measured by a matmul at the start; it is what utilisation is a
  share of.
  """

  steps: int = 1000
  batch_size: int = 32
  accumulate: int = 1
  compute_dtype: str = 'float32'
  remat: bool = False
  seed: int = 0
  log_every: int = 20
  eval_every: int = 200
  eval_batches: int = 16
  checkpoint_every: int = 200
  keep_checkpoints: int = 2
  max_seconds: float = 0.0
  aligned_start: bool = False
  save_dtype: str = 'float32'
  peak_flops_per_second: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """Everything a run needs; one file in configs/ returns one of these."""

  model: ModelConfig
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  mesh: MeshConfig = MeshConfig()
  train: TrainConfig = TrainConfig()
  init_from: str = ''


def to_json(config: Any) -> Any:
  """Turns a config into plain JSON values."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(cls: type[T], values: Mapping[str, Any], where: str = '') -> T:
  """Builds a config from JSON values; an unknown or ill-typed field raises UserError."""
  if not isinstance(values, Mapping):
    raise UserError(f'{where or cls.__name__}: expected an object, found {values!r}')
  fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
  hints = typing.get_type_hints(cls)
  kwargs = {}
  for name, value in values.items():
    path = f'{where}.{name}' if where else name
    if name not in fields:
      raise UserError(f'unknown field {path!r}{did_you_mean(name, fields)}')
    kwargs[name] = _convert(hints[name], value, path)
  for name, field in fields.items():
    if (
        name not in kwargs
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ):
      raise UserError(f'missing field {(where + "." if where else "") + name!r}')
  return cls(**kwargs)


def _convert(hint: Any, value: Any, path: str) -> Any:
  origin = typing.get_origin(hint)
  if origin in (types.UnionType, typing.Union):
    options = typing.get_args(hint)
    if value is None and type(None) in options:
      return None
    return _convert(next(o for o in options if o is not type(None)), value, path)
  if dataclasses.is_dataclass(hint):
    return from_json(hint, value, path)  # type: ignore[arg-type]
  if origin is tuple:
    if isinstance(value, str) or not isinstance(value, Iterable):
      raise UserError(f'{path}: expected a list, found {value!r}')
    args = typing.get_args(hint)
    if len(args) == 2 and args[1] is Ellipsis:
      return tuple(_convert(args[0], v, path) for v in value)
    values = tuple(value)
    if len(values) != len(args):
      raise UserError(f'{path}: expected {len(args)} values, found {len(values)}')
    return tuple(_convert(a, v, path) for a, v in zip(args, values, strict=True))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if hint in (int, float, str, bool) and type(value) is not hint:
    raise UserError(f'{path}: expected {hint.__name__}, found {value!r}')
  return value


def apply_overrides(config: T, overrides: Iterable[str]) -> T:
  """Applies 'path.to.field=value' settings; values are JSON, or plain strings."""
  values = to_json(config)
  for override in overrides:
    path, equals, text = override.partition('=')
    if not equals:
      raise UserError(f'--set {override!r}: expected path.to.field=value')
    try:
      value = json.loads(text)
    except json.JSONDecodeError:
      value = text
    node = values
    *parents, last = path.split('.')
    for i, part in enumerate([*parents, last]):
      if not isinstance(node, dict) or part not in node:
        known = node if isinstance(node, dict) else ()
        raise UserError(
            f'unknown field {".".join([*parents, last][: i + 1])!r}{did_you_mean(part, known)}'
        )
      if i < len(parents):
        node = node[part]
    node[last] = value
  return from_json(type(config), values)
