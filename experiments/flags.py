"""What every command shares: --config and --set, one-line errors, exit code 2."""

from collections.abc import Callable, Sequence
import contextlib
import importlib.util
import inspect
import os
import pathlib
import re
import signal
import sys
import threading

from absl import app, flags, logging

from moejax import config as config_lib
from moejax import errors, files


def define_config_flags() -> None:
  """Defines --config and --set."""
  flags.DEFINE_string('config', None, 'File with get_config(), as FILE.py or FILE.py:VARIANT.')
  flags.DEFINE_multi_string('set', [], 'Override one field: path.to.field=value. Can be repeated.')


def load_config(spec: str, overrides: Sequence[str] = ()) -> config_lib.Experiment:
  """Runs get_config() of FILE.py, or get_config(VARIANT) of FILE.py:VARIANT, and overrides fields.

  Raises:
    UserError: no such file, no get_config, an unknown field (with the nearest one) or a bad value.
  """
  name, _, variant = spec.partition(':')
  path = pathlib.Path(name)
  if not path.is_file():
    known = [str(p) for p in (path.parent.glob('*.py') if path.parent.is_dir() else ())]
    raise errors.UserError(f'no config file {name}{errors.did_you_mean(name, known)}')
  module_spec = importlib.util.spec_from_file_location(path.stem, path)
  assert module_spec is not None and module_spec.loader is not None
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
  except (SyntaxError, ImportError, NameError) as error:
    raise errors.UserError(f'{name} cannot be run: {error}') from error
  get_config = getattr(module, 'get_config', None)
  if get_config is None:
    raise errors.UserError(f'{name} has no function get_config()')
  if variant and not inspect.signature(get_config).parameters:
    raise errors.UserError(f'{name} has no variants; leave out :{variant}')
  try:
    config = get_config(variant) if variant else get_config()
  except TypeError as error:
    raise errors.UserError(f'{name}: get_config() failed: {error}') from error
  return config_lib.apply_overrides(config, overrides) if overrides else config


def require(*names: str) -> None:
  """Raises UserError for the first flag of these without a value."""
  for name in names:
    if getattr(flags.FLAGS, name) is None:
      raise errors.UserError(f'--{name} is missing; see --help')


def parse_flags(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Parses flags; a wrong one raises UserError with the nearest name."""
  try:
    rest = values(list(argv))
  except flags.UnrecognizedFlagError as error:
    hint = errors.did_you_mean(error.flagname, list(values))
    raise errors.UserError(f'unknown flag --{error.flagname}{hint}') from error
  except flags.Error as error:
    raise errors.UserError(re.sub(r'\s+', ' ', str(error))) from error
  if len(rest) > 1:
    raise errors.UserError(f'unexpected argument {rest[1]!r}; flags start with --')
  return rest


def run(main: Callable[[], None], usage: str | None = None) -> None:
  """Runs a command: `error: ...` and exit code 2 for a UserError or a full disk, no other error.

  Args:
    main: called without arguments once the flags are parsed.
    usage: what --help prints above the flags.
  """

  def guarded(_):
    logging.set_verbosity(logging.FATAL)  # checkpointing libraries talk a lot
    try:
      main()
      sys.stdout.flush()
    except errors.UserError as error:
      fail(error)
    except OSError as error:
      full = files.no_room(error.filename or 'the output', error)
      if full is None:
        raise
      fail(full)

  def parse(argv):
    try:
      return parse_flags(argv)
    except errors.UserError as error:
      return fail(error)

  sys.unraisablehook = _unraisable
  sys.modules['__main__'].__doc__ = usage or sys.modules['__main__'].__doc__
  app.run(guarded, flags_parser=parse)


def _unraisable(event) -> None:
  """Python's own, without what tensorstore says to a checkpoint's event loop that failed before."""
  if not (isinstance(event.exc_value, RuntimeError) and 'loop is closed' in str(event.exc_value)):
    sys.__unraisablehook__(event)


def fail(error: errors.UserError):
  """Prints the error on one line and leaves with exit code 2."""
  line = ' '.join(str(error).split())
  print(f'error: {line}', file=sys.stderr, flush=True)
  with contextlib.suppress(OSError):
    sys.stdout.flush()
  # Background threads (checkpoint writers, prefetch) must not delay or change the exit code.
  os._exit(2) if threading.active_count() > 1 else sys.exit(2)


def stop_on_signals() -> Callable[[], bool]:
  """Turns the first SIGTERM or Ctrl-C into a True answer; the second one kills."""
  asked = threading.Event()

  def handle(number, _):
    print('stopping after this step; once more to stop at once', file=sys.stderr, flush=True)
    asked.set()
    signal.signal(number, signal.SIG_DFL)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, handle)
  return asked.is_set
