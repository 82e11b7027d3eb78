"""What every command shares: --config and --set, one-line errors, exit code 2."""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import importlib.util
import inspect
import os
import pathlib
import re
import signal
import sys
import threading
from typing import Any

from absl import app, flags, logging

from experiments import config_errors
from moejax import errors, files, settings


def define_config_flags() -> None:
  """Defines --config and --set, and has --help of the running command list them."""
  config = flags.DEFINE_string(
      'config', None, 'File with get_config(), as FILE.py or FILE.py:VARIANT.'
  )
  changes = flags.DEFINE_multi_string(
      'set', [], 'Change one field: path.to.field=value, a value being JSON or a plain string. '
      'Parts of the path may be left out where the rest names one field (steps=10); steps of a '
      'chain are numbered (0.bits=2). Can be repeated.'
  )
  for holder in (config, changes):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])


def load_config(spec: str, overrides: Sequence[str] = ()) -> Any:
  """Runs get_config() of FILE.py, or get_config(VARIANT) of FILE.py:VARIANT, and overrides fields.

  Returns what the file returns: a `config.Experiment`, a Transform or a chain of Transforms.

  Raises:
    UserError: no such file, no get_config, whatever goes wrong in it (with its line), an unknown
      field (with the nearest one) or a bad value.
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
    get_config = getattr(module, 'get_config', None)
    if get_config is None:
      raise errors.UserError(f'{name} has no function get_config()')
    if variant and not inspect.signature(get_config).parameters:
      raise errors.UserError(f'{name} has no variants; leave out :{variant}')
    config = get_config(variant) if variant else get_config()
  except Exception as error:  # the file is the user's, and so is what goes wrong in it
    raise config_errors.explain(error, path, name) from error
  if overrides and not dataclasses.is_dataclass(config):
    raise errors.UserError(f'{name} returns a {type(config).__name__}, which --set cannot change')
  return settings.apply_overrides(config, overrides) if overrides else config


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

  A reader of the output who goes away ends it with 141, as a shell says it of a closed pipe.

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
    except BrokenPipeError:
      # Whoever read the output has enough (`| head`); nothing more can be said to them.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      sys.exit(141)
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
