"""Dataclasses of settings: checked when made, to and from JSON, changed by 'path=value'."""

from collections.abc import Iterable, Mapping
import dataclasses
import json
import types
import typing
from typing import Any, ClassVar, TypeVar

from moejax.errors import UserError, did_you_mean, nearest

T = TypeVar('T')
FieldPath = tuple[str, ...]


class Checked:
  """Base of settings whose types, and least numbers, are checked when they are made.

  section: what messages put before a field's name. least, most: bounds of numeric fields.
  """

  section: ClassVar[str] = ''
  least: ClassVar[Mapping[str, float]] = {}
  most: ClassVar[Mapping[str, float]] = {}

  def __post_init__(self):
    hints = typing.get_type_hints(type(self))
    for field in dataclasses.fields(self):  # type: ignore[arg-type]
      name, value = f'{self.section}{field.name}', getattr(self, field.name)
      if dataclasses.is_dataclass(value):
        if not isinstance(value, _dataclasses_in(hints[field.name])):
          raise UserError(f'{name}: a {type(value).__name__} has no place here')
        continue
      value = _convert(hints[field.name], value, name)
      least = self.least.get(field.name)
      if least is not None and value is not None and not value >= least:
        raise UserError(f'{name} = {value!r}: at least {least}')
      most = self.most.get(field.name)
      if most is not None and value is not None and not value <= most:
        raise UserError(f'{name} = {value!r}: at most {most}')
      object.__setattr__(self, field.name, value)


def to_json(config: Any) -> Any:
  """Turns a config into plain JSON values."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def chosen(config: Any) -> dict[str, Any]:
  """The fields of a config that are not at their defaults, as JSON values, in those within too."""
  found: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      found[field.name] = chosen(value)
    elif value != field.default:
      found[field.name] = json.loads(json.dumps(value))
  return found


def from_json(cls: type[T], values: Mapping[str, Any], where: str = '') -> T:
  """Builds a config from JSON values; an unknown or ill-typed field raises UserError.

  Of a union of dataclasses it is the one that has the values' 'family' among its `families`.
  """
  if not isinstance(values, Mapping):
    name = getattr(cls, '__name__', 'settings')
    raise UserError(f'{where or name}: expected an object, found {values!r}')
  cls = _of_family(_dataclasses_in(cls), values.get('family'), where)
  fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
  hints = typing.get_type_hints(cls)
  kwargs = {}
  for name, value in values.items():
    path = f'{where}.{name}' if where else name
    if name not in fields:
      raise UserError(f'unknown field {path!r}{did_you_mean(name, fields)}')
    kwargs[name] = _convert(hints[name], value, path)
  for name, field in fields.items():
    if (
        name not in kwargs
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ):
      raise UserError(f'missing field {(where + "." if where else "") + name!r}')
  return cls(**kwargs)


def _of_family(options: tuple[Any, ...], family: Any, where: str) -> Any:
  """The one dataclass of several that knows a family; without a family, the first."""
  if len(options) == 1 or family is None:
    return options[0]
  known = {name: option for option in options for name in option.families}
  if not isinstance(family, str) or family not in known:
    raise UserError(
        f'{where + "." if where else ""}family = {family!r}: one of {tuple(known)}'
        f'{did_you_mean(str(family), known)}'
    )
  return known[family]


def _convert(hint: Any, value: Any, path: str) -> Any:
  origin = typing.get_origin(hint)
  if origin in (types.UnionType, typing.Union):
    options = typing.get_args(hint)
    if value is None and type(None) in options:
      return None
    if _dataclasses_in(hint):
      return from_json(hint, value, path)
    return _convert(next(o for o in options if o is not type(None)), value, path)
  if dataclasses.is_dataclass(hint):
    return from_json(hint, value, path)  # type: ignore[arg-type]
  if origin is tuple:
    if isinstance(value, str) or not isinstance(value, Iterable):
      raise UserError(f'{path}: expected a list, found {value!r}')
    args = typing.get_args(hint)
    if len(args) == 2 and args[1] is Ellipsis:
      return tuple(_convert(args[0], v, path) for v in value)
    values = tuple(value)
    if len(values) != len(args):
      raise UserError(f'{path}: expected {len(args)} values, found {len(values)}')
    return tuple(_convert(a, v, path) for a, v in zip(args, values, strict=True))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if hint in (int, float, str, bool) and type(value) is not hint:
    raise UserError(f'{path}: expected {hint.__name__}, found {value!r}')
  return value


def apply_overrides(config: T, overrides: Iterable[str]) -> T:
  """Applies 'path.to.field=value' settings together; values are JSON, or plain strings.

  Parts of a path may be left out as long as the rest names one field: 'steps=10' for
  'train.steps=10'. Entries of a list of settings go by their place: '0.bits=2' for the first step
  of a chain.

  Raises:
    UserError: no such field (with the nearest one), several such fields, or a bad value.
  """
  known = list(_paths(type(config), config))
  changes: dict[FieldPath, Any] = {}
  for override in overrides:
    name, equals, text = override.partition('=')
    if not equals:
      raise UserError(f'--set {override!r}: expected path.to.field=value')
    path = _resolve(tuple(name.split('.')), known)
    changes = {p: v for p, v in changes.items() if p[: len(path)] != path}
    try:
      changes[path] = json.loads(text, parse_constant=_no_constant)
    except ValueError:
      changes[path] = text
  return _replaced(config, changes, ())


def _no_constant(name: str) -> Any:
  raise ValueError(f'{name} is no JSON')


def _dataclasses_in(hint: Any) -> tuple[Any, ...]:
  """The dataclasses that a field may hold."""
  found = [t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)]
  # One that is of no family by itself stands for those made from it.
  return tuple(
      own for t in found
      for own in (t.__subclasses__() if getattr(t, 'families', None) == () else (t,))
  )


def _paths(kind: Any, node: Any) -> Iterable[FieldPath]:
  """The path of every field of a dataclass and of those in it; `node` may be None."""
  hints = typing.get_type_hints(kind)
  for field in dataclasses.fields(kind):
    yield (field.name,)
    value = getattr(node, field.name, None)
    entries: list[tuple[FieldPath, Any, Any]] = []
    if isinstance(value, tuple):
      entries = [((str(i),), type(entry), entry) for i, entry in enumerate(value)]
    elif dataclasses.is_dataclass(value):
      entries = [((), type(value), value)]
    elif value is None:
      entries = [((), inner, None) for inner in _dataclasses_in(hints[field.name])]
    for place, inner, entry in entries:
      if dataclasses.is_dataclass(inner):
        yield from ((field.name, *place, *rest) for rest in _paths(inner, entry))


def _resolve(parts: FieldPath, known: list[FieldPath]) -> FieldPath:
  """The one path that is `parts`, or holds them in order and ends as they do."""
  if parts in known:
    return parts
  found = []
  for path in known:
    rest = iter(path)
    if path[-1] == parts[-1] and all(part in rest for part in parts):
      found.append(path)
  if len(found) == 1:
    return found[0]
  name = '.'.join(parts)
  if found:
    raise UserError(
        f'{name!r} is the name of several fields: {", ".join(".".join(p) for p in found)}'
    )
  begins = lambda n: any(path[:n] == parts[:n] for path in known)
  matched = next(n for n in range(len(parts)) if not begins(n + 1))
  beside = {p[matched] for p in known if len(p) > matched and p[:matched] == parts[:matched]}
  hint = did_you_mean(parts[matched], beside)
  if not hint:
    last = {p[-1]: '.'.join(p) for p in known}
    near = nearest(parts[-1], last)
    hint = f' (did you mean {last[near]!r}?)' if near else ''
  raise UserError(f'unknown field {name!r}{hint}')


def _replaced(node: Any, changes: Mapping[FieldPath, Any], where: FieldPath) -> Any:
  """A dataclass with the fields at these paths changed, all at once, so that they may depend."""
  hints, new = typing.get_type_hints(type(node)), {}
  for name in dict.fromkeys(path[0] for path in changes):
    path = (*where, name)
    value = getattr(node, name)
    if (name,) in changes:
      value = _convert(hints[name], changes[name,], '.'.join(path))
    below = {p[1:]: v for p, v in changes.items() if p[0] == name and len(p) > 1}
    if below and isinstance(value, tuple):
      value = tuple(
          _replaced(entry, mine, (*path, str(i))) if mine else entry
          for i, entry in enumerate(value)
          for mine in [{p[1:]: v for p, v in below.items() if p[0] == str(i)}]
      )
    elif below and value is None:
      value = from_json(hints[name], _nested(below), '.'.join(path))
    elif below:
      value = _replaced(value, below, path)
    new[name] = value
  return dataclasses.replace(node, **new)


def _nested(flat: Mapping[FieldPath, Any]) -> dict[str, Any]:
  out: dict[str, Any] = {}
  for path, value in flat.items():
    node = out
    for part in path[:-1]:
      node = node.setdefault(part, {})
    node[path[-1]] = value
  return out
