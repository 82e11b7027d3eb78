"""Where metrics go: the terminal, JSON lines, TensorBoard. Each is a hook called with a record."""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any, TextIO

import numpy as np

from moejax import files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """Metrics of a moment: kind 'train' or 'eval', scalars as floats and per-expert loads as [e]."""

  kind: str
  step: int
  total_steps: int
  metrics: dict[str, Any]


Hook = Callable[[Record], None]


def clock(seconds: float) -> str:
  """1h02m, 3m20s or 12s."""
  seconds = int(max(seconds, 0))
  hours, minutes = seconds // 3600, seconds // 60 % 60
  if hours:
    return f'{hours}h{minutes:02}m'
  return f'{minutes}m{seconds % 60:02}s' if minutes else f'{seconds}s'


class Terminal:
  """One line a record, with a bar and the time left."""

  _TRAIN = (
      ('loss', 'loss {:.4f}'), ('cross_entropy', 'xent {:.4f}'), ('accuracy', 'acc {:.3f}'),
      ('load_entropy', 'load entropy {:.2f}'), ('dropped', 'dropped {:.1%}'),
      ('grad_norm', 'grad {:.2f}'), ('learning_rate', 'lr {:.2e}'),
      ('tokens_per_second', '{:,.0f} tok/s'), ('model_flops_utilisation', 'mfu {:.1%}'),
  )
  _EVAL = (
      ('loss', 'loss {:.4f}'), ('accuracy', 'acc {:.3f}'), ('content_loss', 'content loss {:.4f}'),
      ('content_accuracy', 'content acc {:.3f}'), ('load_entropy', 'load entropy {:.2f}'),
  )

  def __init__(self, stream: TextIO | None = None):
    self._stream = stream or sys.stderr
    self._first: tuple[int, float] | None = None

  def __call__(self, record: Record) -> None:
    now = time.monotonic()
    shown = self._TRAIN if record.kind == 'train' else self._EVAL
    parts = [text.format(record.metrics[n]) for n, text in shown if n in record.metrics]
    done = record.step / max(record.total_steps, 1)
    bar = '█' * round(12 * done) + '·' * (12 - round(12 * done))
    line = f'{bar} {record.kind:5} {record.step}/{record.total_steps}  ' + '  '.join(parts)
    if self._first is not None and record.step > self._first[0]:
      speed = (now - self._first[1]) / (record.step - self._first[0])
      line += f'  left {clock(speed * (record.total_steps - record.step))}'
    if self._first is None:
      self._first = (record.step, now)
    print(line, file=self._stream, flush=True)


class JsonLines:
  """Appends records to a file; on resume, lines past the resumed step are dropped first."""

  def __init__(self, path: str | os.PathLike, resumed_step: int = 0):
    self._path = pathlib.Path(path)
    try:
      if self._path.exists():
        kept = [line for line in self._path.read_text().splitlines() if _upto(line, resumed_step)]
        partial = self._path.with_name(self._path.name + '.partial')
        partial.write_text(''.join(line + '\n' for line in kept))
        partial.replace(self._path)
      self._file = open(self._path, 'a')  # noqa: SIM115 - open as long as the run
    except OSError as error:
      raise files.os_error(self._path, error) from error

  def __call__(self, record: Record) -> None:
    row = {'kind': record.kind, 'step': record.step}
    for name, value in record.metrics.items():
      row[name] = [round(float(v), 5) for v in value] if np.ndim(value) else float(value)
    try:
      self._file.write(json.dumps(row) + '\n')
      self._file.flush()
    except OSError as error:
      raise files.os_error(self._path, error) from error

  def close(self) -> None:
    self._file.close()


def _upto(line: str, step: int) -> bool:
  try:
    return json.loads(line)['step'] <= step
  except (ValueError, KeyError):
    return False  # cut off by a kill


class TensorBoard:
  """Scalars as 'train/loss'; the load of each layer as its largest and smallest share."""

  def __init__(self, folder: str | os.PathLike, resumed_step: int = 0):
    import tensorboardX

    self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=resumed_step + 1)

  def __call__(self, record: Record) -> None:
    for name, value in record.metrics.items():
      tag = f'{record.kind}/{name}'
      if np.ndim(value):
        self._writer.add_scalar(f'{tag}/largest', float(np.max(value)), record.step)
        self._writer.add_scalar(f'{tag}/smallest', float(np.min(value)), record.step)
      else:
        self._writer.add_scalar(tag, float(value), record.step)
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()
