"""The one exception that stands for a mistake a user can mend."""

from collections.abc import Iterable
import difflib


class UserError(ValueError):
  """A one-line message that names the file, field or shape and says what to do."""


def nearest(name: str, known: Iterable[str]) -> str | None:
  """The known name that is most like a name, or None if none is."""
  return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns ' (did you mean X?)' for the nearest known name, else ''."""
  close = nearest(name, known)
  return f' (did you mean {close!r}?)' if close else ''
