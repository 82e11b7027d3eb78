"""Statistics of a model's experts over calibration tokens: measured once, kept in a file.

The model is walked a piece of the tokens at a time, so memory does not grow with their number. A
layer of e experts, d wide, with f hidden units, keeps float64 sums (`stats_core` names them):

  routing      e^2 + 3 e      who is chosen, with what gates, and the Gram matrix of the logits;
                              of top-2 routers also 4,096 counts of a second gate over the first
  inputs       3 e d + d      moments of what each expert is given
  outputs      2 e d + 3 e    moments and norms of what each gives to the tokens that chose it
  all_outputs  e d            the mean of what each would give to any token (HC-SMoE), all evaluated
  hidden       e f            sums of squares of each expert's hidden units

and as many again while a piece is added.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import hashlib
import io
import json
from pathlib import Path
from typing import Any
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from moejax import files, settings
from moejax.compress import activations, align_core, samples, sources, stats_core, walker
from moejax.config import Activation, ModelConfig
from moejax.errors import UserError, did_you_mean
from moejax.model import Model, apply_fn

KINDS = ('routing', 'inputs', 'outputs', 'all_outputs', 'hidden')
CHUNK_TOKENS = 65_536
_ROWS = 2048
_ABOUT = 'about.json'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
  """Sums by FFN path ('encoder/layers_1/ffn') and name; float64 on the host.

  kinds: what was measured, of KINDS. tokens: positions looked at by stack. model: `identity` of
  the model.
  """

  layers: Mapping[str, stats_core.Sums]
  kinds: tuple[str, ...]
  tokens: Mapping[str, int]
  model: str

  def of(self, path: str) -> stats_core.Sums:
    """The sums of a layer.

    Raises:
      UserError: there is no such layer, or they are not finite.
    """
    if path not in self.layers:
      raise UserError(f'the statistics have no layer {path!r}; they have {sorted(self.layers)}')
    for name, value in self.layers[path].items():
      if not np.isfinite(value).all():
        bad = np.flatnonzero(~np.isfinite(value).reshape(len(value), -1).all(1))
        raise UserError(
            f'statistics of {path}: {name} is not finite for experts {bad.tolist()}; the model '
            'overflows on the calibration tokens, or its weights are damaged'
        )
    return self.layers[path]

  def fingerprint(self) -> str:
    """SHA-256 over every sum."""
    digest = hashlib.sha256(self.model.encode())
    for path, sums in sorted(self.layers.items()):
      for name, value in sorted(sums.items()):
        digest.update(f'{path}:{name}{value.shape}'.encode())
        digest.update(np.ascontiguousarray(value, np.float64).tobytes())
    return digest.hexdigest()

  def check(self, source: Any, kinds: Iterable[str], step: str) -> None:
    """Raises UserError unless they are of this model and have all `kinds` that a step wants."""
    if self.model != identity(source):
      raise UserError(
          'the statistics are of another model: measure them on the one that is compressed'
      )
    if missing := sorted(set(kinds) - set(self.kinds)):
      raise UserError(f'{step} needs statistics of kind {missing}; these have {list(self.kinds)}')

  def save(self, file: Path | str) -> None:
    """Writes one .npz file, whole or not at all."""
    arrays = {f'{path}:{name}': np.asarray(value)
              for path, sums in self.layers.items() for name, value in sums.items()}
    about = {'kinds': list(self.kinds), 'tokens': dict(self.tokens), 'model': self.model}
    buffer = io.BytesIO()
    np.savez(buffer, **{_ABOUT: np.array(json.dumps(about))}, **arrays)  # type: ignore[arg-type]
    files.write_whole(file, buffer.getvalue())

  @classmethod
  def load(cls, file: Path | str, only: str = '') -> 'Statistics':
    """What `save` wrote; of the arrays those whose name begins with `only`.

    Raises:
      UserError: no such file, or not one of these.
    """
    try:
      with np.load(file, allow_pickle=False) as held:
        about = json.loads(str(held[_ABOUT]))
        layers: dict[str, stats_core.Sums] = {}
        for name in held.files:
          path, found, sum_name = name.rpartition(':')
          if found and name.startswith(only):
            layers.setdefault(path, {})[sum_name] = held[name]
      return cls(
          layers=layers, kinds=tuple(about['kinds']), tokens=about['tokens'], model=about['model']
      )
    except FileNotFoundError as error:
      raise UserError(f'{file} does not exist') from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
      raise UserError(f'{file} holds no statistics: measure them again') from error


def identity(source: Any) -> str:
  """SHA-256 of a model's config and router kernels: alike for a folder and for params in memory.

  Of the config what is not at its default, so that a new field changes nothing.
  """
  digest = hashlib.sha256(json.dumps(settings.chosen(source.config), sort_keys=True).encode())
  for path in sorted(p for p in source.paths() if '/ffn/router/' in p or p.endswith('/expert_map')):
    digest.update(np.ascontiguousarray(source.read(path)).tobytes())
  return digest.hexdigest()


def both(a: Statistics, b: Statistics) -> Statistics:
  """The sums of two passes over one model."""
  return Statistics(
      layers={path: {**sums, **b.layers[path]} for path, sums in a.layers.items()},
      kinds=(*a.kinds, *b.kinds), tokens={**b.tokens, **a.tokens}, model=a.model,
  )


def read_gradients(
    file: Path | str, path: str, source: Any, name: str
) -> dict[str, np.ndarray]:
  """Means over micro-batches of a layer's weight gradients, or of their squares, [e, ...].

  Args:
    file: of `moejax.compress.gradients`. path: of the FFN. name: 'gradient' or 'square'.

  Raises:
    UserError: no such file, or of another model.
  """
  held = Statistics.load(file, only=f'{path}:{name}/')
  held.check(source, ('gradients',), 'this step')
  sums = held.of(path)
  return {sum_name.rpartition('/')[2]: value for sum_name, value in sums.items()}


def measure(
    model: Model | str | Path, batches: Iterable[Mapping[str, Any]],
    kinds: Iterable[str] = ('routing', 'outputs'), *, chunk_tokens: int = CHUNK_TOKENS,
    compat: str = '', sentinel: int | None = None, work: Path | None = None,
    progress: bool = False,
) -> Statistics:
  """Statistics over every real token of `batches` (see `samples.collect`); no capacity drops any.

  Args:
    model: a Model, or a moejax folder that is read layer by layer.
    kinds: of KINDS.
    chunk_tokens: positions walked through the model together; they bound the memory.
    compat: 'mcsmoe' counts as MC-SMoE's code does, over the padded batches as they are: padding
      counts, and choices that capacity drops count for expert 0. Kind 'routing' alone, and the
      whole model in memory.
    sentinel: the least special token id, see `samples.collect`.
    work: a file that keeps the sums of the pieces that are done; the same call resumes from it.
    progress: show a progress bar.

  Raises:
    UserError: an unknown kind, a model without experts, or batches that do not fit it.
  """
  kinds = _checked(kinds)
  if compat not in ('', 'mcsmoe'):
    raise UserError(f"compat = {compat!r}: '' or 'mcsmoe'")
  source = sources.open_source(model)
  if source.config.moe is None:
    raise UserError(f'the model has no experts ({source.config.family}): nothing to measure')
  if compat:
    return _as_published(model, source, batches, kinds)
  data = samples.collect(source.config, batches, sentinel=sentinel)
  return of_samples(source, data, kinds, chunk_tokens=chunk_tokens, work=work, progress=progress)


def of_samples(
    source: Any, data: samples.Samples, kinds: Iterable[str], *, chunk_tokens: int = CHUNK_TOKENS,
    work: Path | None = None, progress: bool = False,
) -> Statistics:
  """`measure` for samples that are taken apart already; validation samples are left out."""
  kinds, model = _checked(kinds), identity(source)
  pieces = list(_pieces(data, chunk_tokens))
  job = hashlib.sha256(
      repr((model, data.fingerprint(), kinds, chunk_tokens)).encode()
  ).hexdigest()
  done, found = _resume(work, job)
  stacks = source.config.stacks
  tokens = {stack: data.calibration_tokens(stack) for stack in stacks}
  make = lambda layers: Statistics(layers=layers, kinds=kinds, tokens=tokens, model=model)
  for place, piece in enumerate(pieces):
    if place < done:
      continue
    observer = Observer(kinds, source)
    walker.Walk(source, piece, observer=observer, progress=progress).run()
    for path, sums in observer.layers.items():
      found[path] = stats_core.add(found.get(path, {}), sums)
    if work is not None and place + 1 < len(pieces):
      dataclasses.replace(make(found), model=f'{job} {place + 1}').save(work)
  result = make(found)
  if work is not None:
    dataclasses.replace(result, model=f'{job} {len(pieces)}').save(work)
  return result


def _resume(work: Path | None, job: str) -> tuple[int, dict[str, stats_core.Sums]]:
  """How many pieces of a job are done, and their sums."""
  if work is not None and Path(work).is_file():
    held = Statistics.load(work)
    its_job, _, pieces = held.model.partition(' ')
    if its_job == job:
      return int(pieces), {path: dict(sums) for path, sums in held.layers.items()}
  return 0, {}


def _pieces(data: samples.Samples, chunk_tokens: int) -> Iterable[samples.Samples]:
  """Calibration samples in runs of about chunk_tokens positions."""
  piece: list[samples.Sample] = []
  held = 0
  for sample in data.samples[: len(data.samples) - data.validation]:
    size = max(len(t) for t in sample.tokens.values())
    if piece and held + size > chunk_tokens:
      yield samples.Samples(samples=tuple(piece), validation=0)
      piece, held = [], 0
    piece.append(sample)
    held += size
  yield samples.Samples(samples=tuple(piece), validation=0)


def _checked(kinds: Iterable[str]) -> tuple[str, ...]:
  wanted = set(kinds)
  for kind in sorted(wanted):
    if kind not in KINDS:
      raise UserError(f'kind {kind!r}: one of {KINDS}{did_you_mean(kind, KINDS)}')
  return tuple(kind for kind in KINDS if kind in wanted)


class Observer:
  """Sums what a walk computes in each sparse layer; see `walker.Walk`."""

  def __init__(self, kinds: tuple[str, ...], source: Any):
    self.kinds, self.source = kinds, source
    self.layers: dict[str, stats_core.Sums] = {}
    self._held, self._act = 0, Activation('relu')

  @property
  def sees_logits(self) -> bool:
    return 'routing' in self.kinds

  def layer(self, path: str, acts: activations.Activations, experts: int) -> None:
    """A layer whose tokens are routed and whose experts have not run; it holds so many."""
    routed, self._held, self._act = acts.routing, experts, acts.act
    sums = self.layers.setdefault(path, {})
    sums['tokens'] = np.zeros(experts)
    if 'routing' in self.kinds:
      for start in range(0, len(routed.choice), _ROWS):
        piece = slice(start, start + _ROWS)
        choice = np.where(routed.keep[piece], routed.choice[piece], -1)
        sums.update(stats_core.add(sums, _routing(
            _rows(routed.logits[piece]), _rows(choice), _rows(routed.gate[piece]),
            np.arange(_ROWS) < len(choice), held=experts,
        )))
      if routed.gate.shape[1] == 2:
        sums.update(stats_core.add(sums, {'gate_ratio': stats_core.gate_ratios(
            routed.gate[routed.keep.all(1)]
        )}))
    else:
      kept = routed.choice[routed.keep]
      sums['tokens'] += np.bincount(kept, minlength=experts)

  def expert(
      self, path: str, expert: int, weights_df: Mapping[str, np.ndarray],
      x_md: np.ndarray, y_md: np.ndarray, gate_m: np.ndarray,
  ) -> None:
    """A piece of an expert's work."""
    sums, own = self.layers[path], dict[str, Any]()
    if 'inputs' in self.kinds:
      own |= _input_moments(_rows(x_md))
    if 'outputs' in self.kinds:
      own |= _output_moments(_rows(y_md), _rows(gate_m))
    if 'hidden' in self.kinds:
      h = align_core.hidden_units(weights_df, x_md, self._act)
      own['hidden_square'] = np.square(np.asarray(h, np.float64)).sum(0)
    for name, value in own.items():
      value = np.asarray(value, np.float64)
      total = sums.setdefault(name, np.zeros((self._held, *value.shape)))
      total[expert] += value

  def all_tokens(
      self, path: str, expert: int, weights_df: Mapping[str, np.ndarray],
      acts: activations.Activations,
  ) -> None:
    """An expert on every token, whoever chose it."""
    if 'all_outputs' not in self.kinds:
      return
    sums = self.layers[path]
    y_d = acts.output_sum(weights_df)
    sums.setdefault('output_all', np.zeros((self._held, len(y_d))))[expert] += y_d
    sums['tokens_all'] = np.full(self._held, float(len(acts.buffer)))


def _rows(a: np.ndarray) -> np.ndarray:
  """Padded to one shape, so that one program serves all pieces."""
  return np.pad(a, ((0, _ROWS - len(a)), *((0, 0),) * (a.ndim - 1)))


@jax.jit
def _input_moments(x_md):
  return {'input': x_md.sum(0), 'input_abs': jnp.abs(x_md).sum(0), 'input_square': (x_md**2).sum(0)}


@jax.jit
def _output_moments(y_md, gate_m):
  sums = stats_core.output_sums(
      y_md, jnp.zeros(len(y_md), jnp.int32), gate_m, jnp.ones(len(y_md)), 1
  )
  return {name: value[0] for name, value in sums.items()}


def _routing(logits_me, choice_mk, gate_mk, mask_m, held):
  """Sums of one piece; choices are among the experts held, logits the router's."""
  experts = logits_me.shape[1]
  sums = dict(stats_core.routing_sums(logits_me, choice_mk, gate_mk, mask_m))
  # Merged experts are fewer than the router's choices.
  return {name: value[:held] if name in ('tokens', 'gate') and held < experts else value
          for name, value in sums.items()}


def _as_published(model, source, batches, kinds) -> Statistics:
  """MC-SMoE's counts, from whole forward passes."""
  if set(kinds) - {'routing'}:
    raise UserError("compat = 'mcsmoe' counts kind 'routing' alone")
  model = model if isinstance(model, Model) else Model.load(model)
  apply = _published_pass(source.config)
  layers: dict[str, stats_core.Sums] = {}
  tokens = dict.fromkeys(source.config.stacks, 0)
  one = len(source.config.stacks) == 1
  names = ('tokens',) if one else ('encoder_tokens', 'decoder_tokens')
  for batch in batches:
    inputs = [jnp.asarray(batch[name], jnp.int32) for name in names]
    for stack, ids in zip(source.config.stacks, inputs):
      tokens[stack] += ids.size
    mask = {} if one else {'encoder_mask': inputs[0] != source.config.pad_id}
    for path, sums in apply(model.params, inputs, mask).items():
      layers[path] = stats_core.add(layers.get(path, {}), sums)
  return Statistics(layers=layers, kinds=kinds, tokens=tokens, model=identity(source))


def _published_pass(config: ModelConfig):
  """Routing sums by layer of a padded batch, nothing masked but attention."""

  def run(params, inputs, mask):
    output = apply_fn(config, params, *inputs, **mask)
    return {
        path: stats_core.routing_sums(
            r.logits_me, r.choice_mk, r.gate_mk, jnp.ones(len(r.choice_mk)), r.keep_mk, True
        )
        for path, r in output.routings.items()
    }

  return jax.jit(run)
