"""Collectives of a compiled program, read from the text of its HLO."""

import re

KINDS = (
    'all-gather', 'all-reduce', 'all-to-all', 'ragged-all-to-all', 'reduce-scatter',
    'collective-permute',
)
_BYTES = {
    'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2,
    's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8,
}
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(')
_ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|body|branch_computations)=\{?([^,}]+(?:, %[^,}]+)*)')
_CONDITION = re.compile(r'condition=%?([\w.\-]+)')
_BOUND = re.compile(r'= s32\[\]\S* constant\((\d+)\)')


def largest_array_bytes(type_text: str) -> float:
  """Bytes of the largest array in the text of an instruction's type."""
  sizes = [0.0]
  for dtype, dims in _ARRAY.findall(type_text):
    size = _BYTES.get(dtype, 0)
    for dim in filter(None, dims.split(',')):
      size *= int(dim)
    sizes.append(size)
  return max(sizes)


def computations(text: str) -> tuple[str, dict[str, list[str]]]:
  """The entry's name, and the lines of each computation."""
  entry = name = ''
  bodies: dict[str, list[str]] = {}
  for line in text.splitlines():
    head = _COMPUTATION.match(line)
    if head:
      name = head.group(2)
      entry = name if head.group(1) else entry
      bodies[name] = []
    elif name:
      bodies[name].append(line)
  return entry, bodies


def trips(condition: list[str]) -> int:
  """How often a loop with this condition runs: its one constant bound, else 1."""
  bounds = [int(n) for line in condition for n in _BOUND.findall(line)]
  ordered = any('direction=LT' in line for line in condition)
  return bounds[0] if ordered and len(bounds) == 1 else 1


def collectives(text: str) -> dict[str, dict[str, float]]:
  """Kind -> how often a run executes it, and the bytes of its largest array times that.

  A loop with a constant bound counts as often as it runs, another once; of an operation in two
  halves the first counts.
  """
  entry, bodies = computations(text)
  totals = {kind: {'count': 0.0, 'bytes': 0.0} for kind in KINDS}
  stack = [(entry, 1)]
  while stack:
    name, times = stack.pop()
    for line in bodies.get(name, ()):
      instruction = _INSTRUCTION.match(line)
      if not instruction:
        continue
      kind = instruction.group(2).removesuffix('-start')
      if kind in KINDS:
        totals[kind]['count'] += times
        totals[kind]['bytes'] += times * largest_array_bytes(instruction.group(1))
      condition = _CONDITION.search(line)
      inner = times * (trips(bodies[condition.group(1)]) if condition else 1)
      for group in _CALLED.findall(line):
        stack += [(called.strip(' %'), inner) for called in group.split(',')]
  return {kind: total for kind, total in totals.items() if total['count']}
