"""Several sources as one, each with its share of the rows, by index."""

from collections.abc import Mapping, Sequence
import dataclasses
from fractions import Fraction
import functools

import jax

from moejax.config import run as run_config
from moejax.data.batches import Batch, Batches, stack_rows


def shares(weights: Sequence[float]) -> tuple[tuple[int, int], ...]:
  """Of the rows that the sources before it leave over, the part that each source takes.

  Exact fractions as (numerator, denominator); the weights need not sum to 1.
  """
  exact = [Fraction(w) for w in weights]
  rest = sum(exact)
  parts = []
  for weight in exact:
    part = weight / rest if rest else Fraction(0)
    parts.append((part.numerator, part.denominator))
    rest -= weight
  return tuple(parts)


def pick(index: int, parts: tuple[tuple[int, int], ...]) -> tuple[int, int]:
  """The source of a row, and how many of the rows before it came from that source.

  A source that takes the part p of some rows takes those numbers i where p * i + 1/2 passes a whole
  number: of any m rows in a line it has m * p, give or take less than one. The rest are numbered
  anew and meet the next source. So in any run of rows each of n sources is within n - 1 rows of its
  share, and within one if there are two.

  Args:
    parts: see `shares`.
  """
  for source, (part, whole) in enumerate(parts):
    before = (2 * part * index + whole) // (2 * whole)
    if (2 * part * (index + 1) + whole) // (2 * whole) > before:
      return source, before
    index -= before
  raise ValueError('no source takes what is left: the last part must be 1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """Batches whose rows come from several sources in fixed proportions, spread evenly.

  Row `index` is row `place` of one source, both pure functions of the index (`pick`), so each
  source has epochs of its own and goes round as often as its share asks for.

  Attributes:
    sources: batches of one layout, without end. Their own batch sizes are all the same.
    weights: shares of the rows relative to each other; 0 leaves a source out.

  Raises:
    UserError: not one weight a source, a negative one, or none above 0.
  """

  sources: tuple[Batches, ...]
  weights: tuple[float, ...]

  def __post_init__(self):
    run_config.require_weights(self.weights, len(self.sources), 'data.train_weights')
    if any(source.spec != self.sources[0].spec for source in self.sources):
      raise ValueError('the sources of a mixture must have one layout')

  @functools.cached_property
  def _parts(self) -> tuple[tuple[int, int], ...]:
    return shares(self.weights)

  @property
  def batch_size(self) -> int:
    """Rows of a batch."""
    return self.sources[0].batch_size

  @property
  def num_samples(self) -> int:
    """Rows of an epoch of each source together."""
    return sum(source.num_samples for source in self.sources)

  @property
  def num_batches(self) -> int:
    """Batches with as many rows as all sources together."""
    return -(-self.num_samples // self.batch_size)

  @property
  def num_tokens(self) -> int:
    """Tokens of all sources."""
    return sum(source.num_tokens for source in self.sources)

  @property
  def num_documents(self) -> int:
    """Documents of all sources."""
    return sum(source.num_documents for source in self.sources)

  @property
  def spec(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of a batch."""
    return self.sources[0].spec

  def row(self, index: int) -> Batch:
    """Row `index`, unbatched."""
    source, place = pick(index, self._parts)
    return self.sources[source].row(place)

  def batch(self, index: int, rows: slice = slice(None)) -> Batch:
    """Rows (default all) of batch `index`, as NumPy arrays."""
    return stack_rows(self, index, rows)

  def epoch_of(self, index: int) -> float:
    """Rows before batch `index` over those of an epoch of each source together."""
    return index * self.batch_size / self.num_samples
