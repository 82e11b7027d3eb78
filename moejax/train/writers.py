"""Where metrics go: the terminal, JSON lines, TensorBoard. Each is a hook called with a record."""

from collections.abc import Callable, Iterable
import dataclasses
import json
import os
import pathlib
import socket
import struct
import sys
import time
from typing import Any, TextIO

import numpy as np

from moejax import files, progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """Metrics of a moment: kind 'train' or 'eval', scalars as floats and per-expert loads as [e]."""

  kind: str
  step: int
  total_steps: int
  metrics: dict[str, Any]


Hook = Callable[[Record], None]


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
    place = f'{record.kind:5} {record.step}/{record.total_steps}'
    line = '  '.join([f'{progress.blocks(done)} {place}', *parts])
    if self._first is not None and record.step > self._first[0]:
      speed = (now - self._first[1]) / (record.step - self._first[0])
      line += f'  left {progress.clock(speed * (record.total_steps - record.step))}'
    if self._first is None:
      self._first = (record.step, now)
    print(line, file=self._stream, flush=True)


class JsonLines:
  """Appends records to a file; on resume, lines past the resumed step are dropped first."""

  def __init__(self, path: str | os.PathLike, resumed_step: int = 0):
    path = pathlib.Path(path)
    if path.exists():
      lines = path.read_text(errors='replace').splitlines()
      kept = [line for line in lines if _upto(line, resumed_step)]
      files.write_whole(path, ''.join(line + '\n' for line in kept))
    self._file = files.Appender(path)

  def __call__(self, record: Record) -> None:
    row = {'kind': record.kind, 'step': record.step}
    for name, value in record.metrics.items():
      row[name] = [round(float(v), 5) for v in value] if np.ndim(value) else float(value)
    self._file.append((files.json_text(row) + '\n').encode())

  def close(self) -> None:
    self._file.close()


def _upto(line: str, step: int) -> bool:
  try:
    return json.loads(line)['step'] <= step
  except (ValueError, KeyError, TypeError):
    return False  # cut off by a kill


class TensorBoard:
  """Scalars as 'train/loss'; the load of each layer as its largest and smallest share.

  tensorboardX has the messages; its own writer loses a full disk in a thread and then waits for it.
  """

  def __init__(self, folder: str | os.PathLike, resumed_step: int = 0):
    from tensorboardX.proto import event_pb2

    folder = pathlib.Path(folder)
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise files.os_error(folder, error) from error
    name = f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}'
    self._file = files.Appender(folder / name)
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write([
        event_pb2.Event(wall_time=time.time(), file_version='brain.Event:2'),
        event_pb2.Event(wall_time=time.time(), step=resumed_step + 1, session_log=start),
    ])

  def __call__(self, record: Record) -> None:
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2

    scalars: dict[str, float] = {}
    for name, value in record.metrics.items():
      tag = f'{record.kind}/{name}'
      if np.ndim(value):
        scalars |= {f'{tag}/largest': np.max(value), f'{tag}/smallest': np.min(value)}
      else:
        scalars[tag] = value
    self._write([
        event_pb2.Event(
            wall_time=time.time(), step=record.step, summary=summary.scalar(tag, float(value))
        )
        for tag, value in scalars.items()
    ])

  def _write(self, events: Iterable[Any]) -> None:
    self._file.append(b''.join(_framed(event.SerializeToString()) for event in events))

  def close(self) -> None:
    self._file.close()


def _framed(data: bytes) -> bytes:
  """A TFRecord: length, its checksum, the data, their checksum."""
  from tensorboardX.record_writer import masked_crc32c

  length = struct.pack('<Q', len(data))
  check = lambda part: struct.pack('<I', masked_crc32c(part))
  return length + check(length) + data + check(data)
