"""The quickstart notebook runs from top to bottom, small, as it is shipped."""

import importlib.util
import pathlib

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.once

_SPEC = importlib.util.spec_from_file_location(
    'demo_common', pathlib.Path(__file__).with_name('demo_common.py')
)
common = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(common)

NOTEBOOK = common.ROOT / 'experiments' / 'colab' / 'quickstart.ipynb'


def test_notebook_is_shipped_without_output():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbformat.validate(notebook)
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert 8 <= len(code) <= 14
  assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.long
def test_notebook_runs(tmp_path, monkeypatch):
  flags = common.make_checkpoint(tmp_path)
  for name, value in {
      **common.environment(), 'MOEJAX_QUICKSTART_SMALL': '1',
      'MOEJAX_QUICKSTART_CHECKPOINT': flags['checkpoint'],
      'MOEJAX_QUICKSTART_WORKDIR': str(tmp_path / 'run'),
  }.items():
    monkeypatch.setenv(name, value)
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  client = nbclient.NotebookClient(
      notebook, timeout=600, kernel_name='python3',
      resources={'metadata': {'path': str(NOTEBOOK.parent)}},
  )
  client.execute()
  printed = ''.join(
      output.get('text', '') for cell in notebook.cells if cell.cell_type == 'code'
      for output in cell.outputs
  )
  assert 'QMoE ternary + refit' in printed and 'agreement' in printed
  assert (tmp_path / 'run' / 'report.html').read_text().startswith('<!doctype html>')
