"""What went wrong inside a config file, as one line with its place and the nearest right name."""

from collections.abc import Iterator, Mapping
import inspect
import pathlib
import re
import traceback
import types
from typing import Any

from moejax import errors

_UNKNOWN = re.compile(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'")
_MISSING = re.compile(r'(\w+)(?:\.__init__)?\(\) missing \d+ required .*arguments?: (.*)')


def explain(error: Exception, path: pathlib.Path, name: str) -> errors.UserError:
  """The UserError for an exception that running a config file ended in.

  Args:
    error: the exception, as caught.
    path: the file.
    name: what to call it.
  """
  line, values = _place(error, path)
  if isinstance(error, errors.UserError) and name in str(error):
    return error
  where = f'{name}, line {line}' if line else name
  return errors.UserError(f'{where}: {_reason(error, values)}')


def _place(error: Exception, path: pathlib.Path) -> tuple[int | None, Mapping[str, Any]]:
  """The deepest line of the file that the error came through, and the names seen there."""
  own = lambda file: file is not None and pathlib.Path(file).resolve() == path.resolve()
  line, values = None, {}
  if isinstance(error, SyntaxError) and own(error.filename):
    return error.lineno, {}
  for frame, number in traceback.walk_tb(error.__traceback__):
    if own(frame.f_code.co_filename):
      line, values = number, {**frame.f_globals, **frame.f_locals}
  return line, values


def _reason(error: Exception, values: Mapping[str, Any]) -> str:
  text = str(error) or type(error).__name__
  if isinstance(error, errors.UserError):
    return text
  if isinstance(error, SyntaxError):
    return f'{error.msg}'
  if unknown := _UNKNOWN.search(text):
    known = [p for f in _callables(unknown[1], values) for p in inspect.signature(f).parameters]
    hint = errors.did_you_mean(unknown[2], known)
    return f'{unknown[1]} has no field {unknown[2]!r}{hint}'
  if missing := _MISSING.search(text):
    return f'{missing[1]} lacks {missing[2]}'
  if isinstance(error, NameError) and error.name:
    return f'no name {error.name!r}{errors.did_you_mean(error.name, values)}'
  if isinstance(error, AttributeError) and error.name:
    return f'{text}{errors.did_you_mean(error.name, dir(error.obj))}'
  return text if isinstance(error, ImportError) else f'{type(error).__name__}: {text}'


def _callables(name: str, values: Mapping[str, Any]) -> Iterator[Any]:
  """Functions and classes of a name, among values and in the modules among them."""
  for value in values.values():
    found = getattr(value, name, None) if isinstance(value, types.ModuleType) else value
    if callable(found) and getattr(found, '__name__', None) == name:
      yield found
