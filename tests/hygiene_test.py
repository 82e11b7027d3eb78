"""The house rules that a machine can hold: import direction, sizes, flags, words."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LIBRARY = ('moejax', 'kernels_pallas', 'configs', 'experiments')

# Lower may not import higher; names on one level may not import each other unless allowed below.
LEVELS = [
    {
        'errors', 'settings', 'config', 'presets', 'tree', 'codec', 'files', 'progress',
        'safetensors_io',
    },
    {'weights', 'sharding'},
    {'store', 'routing', 'ops'},
    {'nn'},
    {'model'},
    {'data', 'account'},
    {'train'},
    {'compress', 'convert', 'generate', 'evaluate'},
    {'report'},
    {'configs'},
    {'experiments'},
]
SAME_LEVEL = {
    ('settings', 'errors'), ('config', 'settings'), ('config', 'errors'), ('presets', 'config'),
    ('presets', 'errors'), ('tree', 'errors'), ('codec', 'errors'), ('files', 'errors'),
    ('safetensors_io', 'errors'), ('safetensors_io', 'files'), ('ops', 'routing'),
}


def library_files():
  return sorted(p for top in LIBRARY for p in (ROOT / top).rglob('*.py'))


def unit_of(module: str) -> str | None:
  parts = module.split('.')
  if parts[0] == 'moejax':
    return parts[1] if len(parts) > 1 else None
  return parts[0] if parts[0] in ('kernels_pallas', 'configs', 'experiments') else None


def imports_of(path: pathlib.Path):
  """Yields (module, line, inside_function) for every import of a file."""
  tree = ast.parse(path.read_text())
  functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
  inner = {id(c) for f in functions for c in ast.walk(f)}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, node.lineno, id(node) in inner
    elif isinstance(node, ast.ImportFrom) and node.module:
      package = node.module.split('.')[0]
      if node.module in ('moejax', 'configs', 'experiments') or package == 'kernels_pallas':
        for alias in node.names:
          yield f'{node.module}.{alias.name}', node.lineno, id(node) in inner
      else:
        yield node.module, node.lineno, id(node) in inner


def level_of(unit: str) -> int:
  for i, names in enumerate(LEVELS):
    if unit in names:
      return i
  raise AssertionError(f'{unit} has no level in the import rule; add it to LEVELS')


def rule_violations(path: pathlib.Path) -> list[str]:
  relative = path.relative_to(ROOT)
  unit = unit_of('.'.join(relative.with_suffix('').parts))
  found = []
  for module, line, inner in imports_of(path):
    where = f'{relative}:{line} imports {module}'
    top = module.split('.')[0]
    if top in ('torch', 'transformers') and not (
        unit == 'experiments' or (unit == 'convert' and inner)
    ):
      found.append(f'{where}: only convert may import torch, inside functions')
    if top == 'absl' and unit != 'experiments':
      found.append(f'{where}: only experiments read flags')
    target = unit_of(module)
    if target is None or unit is None or target == unit:
      continue
    if target == 'kernels_pallas':
      layout = module.split('.')[2:3] == ['layout']
      if unit not in ('ops', 'experiments') and not (unit == 'weights' and layout):
        found.append(f'{where}: only ops imports kernels, and weights their layouts')
    elif unit == 'kernels_pallas':
      found.append(f'{where}: kernels know nothing of moejax')
    else:
      here, there = level_of(unit), level_of(target)
      if there > here or (there == here and (unit, target) not in SAME_LEVEL):
        found.append(f'{where}: {unit} is below or beside {target}')
  return found


@pytest.mark.parametrize('path', library_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_import_rule(path):
  assert rule_violations(path) == []


def test_import_rule_catches_a_violation(tmp_path, monkeypatch):
  bad = tmp_path / 'moejax' / 'tree.py'
  bad.parent.mkdir()
  bad.write_text('from moejax import model\nimport absl.flags\n')
  monkeypatch.setattr(sys.modules[__name__], 'ROOT', tmp_path)
  assert len(rule_violations(bad)) == 2


@pytest.mark.parametrize('path', library_files() + sorted((ROOT / 'tests').rglob('*.py')),
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_size_guards(path):
  source = path.read_text()
  assert source.count('\n') <= 500, f'{path.name} has more than 500 lines'
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      lines = node.end_lineno - node.lineno + 1
      assert lines <= 80, f'{path.name}:{node.lineno} {node.name} has {lines} lines'


@pytest.mark.parametrize(
    'path', [p for end in ('cc', 'h') for p in sorted((ROOT / 'kernels_pallas').rglob(f'*.{end}'))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_size_guards_of_cpp(path):
  lines = path.read_text().splitlines()
  assert len(lines) <= 500 and max(map(len, lines)) <= 100


def test_importing_moejax_does_no_jax_work():
  code = "import sys, moejax; assert 'jax' not in sys.modules and 'flax' not in sys.modules"
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


def test_every_public_name_exists():
  import moejax
  for name in moejax.__all__:
    assert getattr(moejax, name) is not None


def test_no_todo_markers():
  words = re.compile(r'\b(TODO|FIXME|XXX)\b')
  for path in library_files():
    assert not words.search(path.read_text()), path
