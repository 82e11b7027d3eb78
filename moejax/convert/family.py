"""What conversion knows of a model family: its config fields and its rules."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

from moejax.convert.hf_config import Fields
from moejax.convert.rules import Rule


class Files(NamedTuple):
  """A Hugging Face folder as far as rules depend on it: config.json, and its tensors' names."""

  values: Mapping[str, Any]
  names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """One family of moejax and the Hugging Face architecture that it is.

  model_types: of config.json; the first is written. read_config, write_config: our config from
  fields and back to JSON values. rules(config, files): files is None for what we write. sizes: axis
  letters; layers: the layer sets of rules. ignored: regexes of tensors that files may hold
  beside those of the rules.
  """

  name: str
  model_types: tuple[str, ...]
  architecture: str
  read_config: Callable[[Fields], Any]
  write_config: Callable[[Any], dict[str, Any]]
  rules: Callable[[Any, Files | None], list[Rule]]
  sizes: Callable[[Any], dict[str, int]]
  layers: Callable[[Any], dict[str, Sequence[int]]]
  ignored: tuple[str, ...] = ()
