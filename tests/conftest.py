"""Eight CPU devices and quick compilation for every test; CI fails where a test is skipped."""

import gc
import importlib.metadata
import importlib.util
import os
import tempfile

# Tests spend their time compiling: nothing is optimized, and code comes from the quickest emitters
# that a version of XLA has (it ends a process that names a flag it does not know).
_QUICK = {
    '0.10': [('--xla_cpu_use_fusion_emitters', 'false')],
    '0.12': [('--xla_cpu_use_new_xtile_lowering', 'false')],
}
_version = '.'.join(importlib.metadata.version('jaxlib').split('.')[:2])
_flags = os.environ.get('XLA_FLAGS', '').split()
for _name, _value in (
    ('--xla_force_host_platform_device_count', 8), ('--xla_backend_optimization_level', 0),
    ('--xla_cpu_parallel_codegen_split_count', 1), *_QUICK.get(_version, ()),
):
  if not any(flag.startswith(_name + '=') for flag in _flags):
    _flags.append(f'{_name}={_value}')
os.environ['XLA_FLAGS'] = ' '.join(_flags)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Workers and the commands that tests start share what they compile; it goes when the run ends.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _programs = tempfile.TemporaryDirectory(prefix='moejax_tests_', ignore_cleanup_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _programs.name
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('HF_DATASETS_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')

# Tracing makes objects by the million, and nearly all live on: collecting took 7 % of the time.
gc.set_threshold(100_000, 50, 100)

_HAS_TORCH = importlib.util.find_spec('torch') is not None


_MANY_MAPS = 20_000


@pytest.fixture(scope='module', autouse=True)
def _bounded_memory_maps():
  """XLA's programs take memory maps, and Linux ends a process that has 65,530 of them."""
  yield
  try:
    with open('/proc/self/maps') as f:
      maps = sum(1 for _ in f)
  except OSError:
    return
  if maps > _MANY_MAPS:
    jax.clear_caches()


def pytest_addoption(parser):
  parser.addoption(
      '--tier', choices=('all', 'quick', 'long'), default='all',
      help='quick: what every change must pass; long: the tests marked long'
  )
  parser.addoption(
      '--first-cases', action='store_true',
      help='of a function with parameters only the first case that the other choices leave'
  )
  parser.addoption('--update-golden', action='store_true', help='rewrite golden files')


def pytest_configure(config):
  config.addinivalue_line('markers', 'torch: needs torch and transformers')
  config.addinivalue_line(
      'markers', 'long(but=ids): a whole command or one of many cases, whose parts have quick '
      'tests; of a function with parameters the cases `but` stay quick'
  )
  config.addinivalue_line(
      'markers', 'once: long, and no version of JAX changes what it shows: on one Python is enough'
  )


# Files that take longest go first, so that no worker is left alone with one at the end.
_LONG = (
    'demo_test', 'processes_test', 'decoder_mesh_test', 'loop_test', 'compress/memory_test',
    'bench_test', 'driver_test', 'notebook_test', 'generate_test', 'step_test', 'model_test',
    'decoder_test', 'compressed_mesh_test', 'convert/memory_test', 'wheel_test',
)


def _is_long(item) -> bool:
  mark = item.get_closest_marker('long')
  return mark is not None and (
      not hasattr(item, 'callspec') or item.callspec.id not in mark.kwargs.get('but', ())
  )


def _keep_tier(config, items):
  """Leaves the tests of the tier; a case that a mark names and nobody has is an error."""
  tier = config.getoption('--tier')
  if tier == 'all':
    return
  named = {
      f'{item.path.name}::{item.originalname}[{case}]' for item in items
      for mark in item.iter_markers('long') for case in mark.kwargs.get('but', ())
  }
  missing = named - {f'{item.path.name}::{item.name}' for item in items}
  if missing:
    raise pytest.UsageError(f'cases that stay quick, but do not exist: {sorted(missing)}')
  gone = [item for item in items if _is_long(item) != (tier == 'long')]
  config.hook.pytest_deselected(items=gone)
  items[:] = [item for item in items if _is_long(item) == (tier == 'long')]


def _keep_first_cases(config, items):
  seen, kept, gone = set(), [], []
  for item in items:
    function = item.nodeid.split('[')[0]
    (gone if function in seen else kept).append(item)
    seen.add(function)
  config.hook.pytest_deselected(items=gone)
  items[:] = kept


@pytest.hookimpl(trylast=True)  # After -m and -k, so that a function keeps one of their cases.
def pytest_collection_modifyitems(config, items):
  _keep_tier(config, items)
  if config.getoption('--first-cases'):
    _keep_first_cases(config, items)
  rank = {name: i for i, name in enumerate(_LONG)}

  def place(item):
    path = item.path.with_suffix('')
    names = (path.name, f'{path.parent.name}/{path.name}')
    return min(rank.get(name, len(_LONG)) for name in names)

  items.sort(key=place)
  if _HAS_TORCH:
    return
  for item in items:
    if 'torch' in item.keywords:
      item.add_marker(pytest.mark.skip(reason='torch is not installed'))


def pytest_sessionfinish(session, exitstatus):
  """Under MOEJAX_FORBID_SKIPS=1 a skipped test fails the run."""
  reporter = session.config.pluginmanager.get_plugin('terminalreporter')
  skipped = reporter.stats.get('skipped', []) if reporter else []
  if os.environ.get('MOEJAX_FORBID_SKIPS') == '1' and skipped and exitstatus == 0:
    session.exitstatus = 1
    reporter.write_line(f'{len(skipped)} tests were skipped that must run here', red=True)
