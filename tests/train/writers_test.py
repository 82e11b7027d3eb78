"""Where metrics go: JSON lines, TensorBoard's own bytes, a full disk, the clock."""

import contextlib
import json
import resource

import numpy as np
import pytest
import tensorboardX
from tensorboardX.proto import event_pb2

from moejax import errors
from moejax.train import writers


def record(step, **metrics):
  return writers.Record(kind='train', step=step, total_steps=9, metrics=metrics)


@contextlib.contextmanager
def full_disk(size):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def events(folder):
  """Every record of the folder's only event file, frames checked byte by byte."""
  (file,) = folder.iterdir()
  data, out = file.read_bytes(), []
  while data:
    length = int.from_bytes(data[:8], 'little')
    out.append(event_pb2.Event.FromString(data[12 : 12 + length]))
    assert len(data) >= 16 + length
    data = data[16 + length :]
  return out


def test_json_lines_forget_what_is_past_the_checkpoint(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  file.write_bytes(b'{"step": 1}\n[]\n\xff\xfe\n{"step": 5}\n7\n{"step": 6}\n{"ste')
  log = writers.JsonLines(file, resumed_step=5)
  log(record(6, loss=np.float32(0.1), load=np.array([0.25, 0.75])))
  log(record(7, loss=float('nan')))
  log.close()
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  assert [row['step'] for row in rows] == [1, 5, 6, 7]
  assert rows[2] == {
      'kind': 'train', 'step': 6, 'loss': float(np.float32(0.1)), 'load': [0.25, 0.75]
  }
  assert rows[3]['loss'] is None and 'NaN' not in file.read_text()


def test_tensorboard_events_are_those_of_tensorboardx(tmp_path):
  ours = writers.TensorBoard(tmp_path / 'ours', resumed_step=4)
  ours(record(5, loss=0.5, load=np.array([0.1, 0.9])))
  ours.close()
  theirs = tensorboardX.SummaryWriter(str(tmp_path / 'theirs'), purge_step=5)
  for tag, value in (
      ('train/loss', 0.5), ('train/load/largest', 0.9), ('train/load/smallest', 0.1)
  ):
    theirs.add_scalar(tag, value, 5)
  theirs.close()
  got, want = events(tmp_path / 'ours'), events(tmp_path / 'theirs')
  versions = [e for e in want if e.file_version]  # theirs says it twice
  want = [e for e in want if not e.file_version]
  assert got[0].file_version == versions[0].file_version
  for a, b in zip(got[1:], want, strict=True):
    a.wall_time = b.wall_time = 0.0
    assert a == b


def test_tensorboard_frames_are_those_of_tensorboardx(tmp_path):
  writer = tensorboardX.RecordWriter(str(tmp_path / 'one'))
  for data in (b'', b'abc', bytes(range(256)) * 9):
    writer.write(data)
  writer.close()
  ours = b''.join(writers._framed(data) for data in (b'', b'abc', bytes(range(256)) * 9))
  assert (tmp_path / 'one').read_bytes() == ours


@pytest.mark.parametrize('make', [
    lambda folder: writers.JsonLines(folder / 'metrics.jsonl'),
    lambda folder: writers.TensorBoard(folder / 'board'),
])
def test_a_full_disk_leaves_whole_records(make, tmp_path):
  hook = make(tmp_path)
  hook(record(1, loss=1.0))
  (file,) = [p for p in tmp_path.rglob('*') if p.is_file()]
  before = file.read_bytes()
  with full_disk(len(before) + 50):
    with pytest.raises(errors.UserError, match=f'cannot write {file}: ') as error:
      hook(record(2, **{f'metric_{i}': float(i) for i in range(9)}))
  assert '\n' not in str(error.value) and file.read_bytes() == before
  hook(record(3, loss=3.0))
  hook.close()
  assert file.read_bytes().startswith(before) and file.stat().st_size > len(before)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / 'file').write_text('x')
  for make in (writers.JsonLines, writers.TensorBoard):
    with pytest.raises(errors.UserError, match=f'cannot write {tmp_path / "file" / "x"}'):
      make(tmp_path / 'file' / 'x')
