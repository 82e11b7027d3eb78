"""The report's sentences, with the run's numbers in them, for readers who never read a paper."""

import math

from moejax.report.charts import megabytes
from moejax.report.data import Fate, Report, Variant


def _of(report: Report, fact: str, default: str) -> str:
  return str(report.facts.get(fact) or report.model.get(fact) or default)


def fewer_bits(report: Report, variant: Variant) -> bool:
  """Whether a variant stores an expert weight in fewer bits than before."""
  return bool(variant.bits) and float(variant.bits or 0) < 0.95 * (report.before.bits or 16)


def headline(report: Report) -> str:
  """One sentence under the title."""
  best, before = report.headline, report.before
  first = 'This model was compressed'
  if fewer_bits(report, best):
    first = (
        f'The experts of this model went from <b>{before.bits or 16:.3g} bits</b> to '
        f'<b>{best.bits:.3f} bits</b> for each weight'
    )
  elif report.neurons_run:
    share = math.fsum(report.neurons_run.values()) / len(report.neurons_run)
    first = (
        f'A word now runs <b>{share:.0%}</b> of the neurons in {len(report.neurons_run)} '
        'feed-forward layers of this model'
    )
  elif report.fates:
    at_first = {fate.path: held(fate) for fate in reversed(report.fates)}
    at_last = {fate.path: len(fate.groups) for fate in report.fates}
    first = (
        f'<b>{sum(at_first.values())} experts</b> of this model became '
        f'<b>{sum(at_last.values())}</b>'
    )
  parts = [
      first,
      f'the whole model from <b>{megabytes(before.stored_bytes)}</b> to '
      f'<b>{megabytes(best.stored_bytes)}</b>',
  ]
  text = ', '.join(parts)
  if best.agreement is not None:
    text += (
        f'. Asked for a {report.target}, the small model gives the same first answer as the large '
        f'one <b>{best.agreement:.0%}</b> of the time'
    )
  return text + '.'


def loss_caption(report: Report) -> str:
  """Under the first picture."""
  best, before = report.headline, report.before
  text = 'Left is smaller, down is better. '
  if best.loss is not None and before.loss is not None:
    text += (
        f'“{best.name}” stands at {best.loss:.2f}, the uncompressed model at {before.loss:.2f}.'
    )
  return text


def layer_caption(report: Report) -> str:
  """Under the picture of errors and zeros."""
  fallbacks = sum(row.fallbacks for v in report.compressed for row in v.layers)
  text = (
      'How much of what an expert layer says was lost, and how many of its numbers became zero. '
      'Zeros cost almost nothing to store.'
  )
  if fallbacks:
    text += (
        f' {fallbacks} matri{"x" if fallbacks == 1 else "ces"} saw too few words to be fitted and '
        f'{"was" if fallbacks == 1 else "were"} rounded instead.'
    )
  return text


def load_caption(report: Report) -> str:
  """Under the picture of expert loads."""
  return (
      f'Which expert each word of the test text is sent to. Bars: “{report.headline.name}”. '
      'Thin marks: before compression. Dashed: all experts equally busy.'
  )


def bytes_caption(report: Report) -> str:
  """Under the picture of bytes."""
  sizes = report.before.sizes
  share = sizes.get('expert_bytes', 0) / max(sizes['stored_bytes'], 1)
  return f'Only the experts are compressed; before, they are {share:.0%} of the file.'


# Method -> what it keeps experts by.
_WHY = {
    'reap': 'the mean of gate times size of the output over its tokens (REAP)',
    'ean': 'the summed size of its outputs', 'man': 'the mean size of its outputs',
    'msan': 'the mean squared size of its outputs', 'frequency': 'how many tokens chose it',
    'soft_frequency': 'the summed gates of its tokens',
    'aimer': 'how unevenly large its weights are (AIMER)', 'random': 'chance',
    'task_specific': 'its share of the tokens of the task',
    'naee': 'how little the layer changes without the others (NAEE)',
}


def held(found: Fate) -> int:
  """Experts of a layer before."""
  return sum(map(len, found.groups)) + len(found.dropped)


def fate(found: Fate) -> str:
  """One sentence on what happened to a layer's experts, and by what they were chosen."""
  before = held(found)
  left = len(found.groups)
  if found.method:
    why = _WHY.get(found.method, found.method)
    return (
        f'{left} of {before} experts stayed; the last ones, crossed out, went, and tokens choose '
        f'among those that are left. An expert counted by {why}.'
    )
  return (
      f'{before} experts became {left}. Those in one box were made one; the first is the one that '
      'the others joined.'
  )


def explanation(report: Report) -> list[tuple[str, str]]:
  """(question, answer) pairs."""
  best, before = report.headline, report.before
  answers = [
      _kind(report),
      *((_ternary(),) if any(v.bits and v.bits < 1.6 for v in report.compressed) else ()),
      *((_rounding(),) if any(fewer_bits(report, v) for v in report.compressed) else ()),
      *((_fewer(),) if report.fates else ()),
      *((_split(),) if report.neurons_run else ()),
  ]
  if before.loss is not None:
    answers.append((
        'What does “loss” mean?',
        f'{_asked(report)} Loss is how surprised it is by the truth. A loss of {before.loss:.2f} '
        f'means it is as unsure as somebody choosing among {math.exp(before.loss):,.0f} equally '
        'likely word pieces; lower is better.'))
  base = report.baselines.get('bigram_content_loss')
  if base is not None and before.loss is not None:
    verdict = 'better than' if before.loss < base else 'not yet as good as'
    answers.append((
        'Is the model any good?',
        f'The test is a simple table that guesses each word from the one before it (loss '
        f'{base:.2f}, given the true word before). The uncompressed model is {verdict} that: '
        f'{before.loss:.2f}.'
        + _experts_matter(report)))
  if best.agreement is not None:
    answers.append((
        'What is “agreement”?',
        f'For every {report.target}, both the compressed and the original model name their first '
        'guess. Agreement is how often the two are the same. It says whether the model still '
        'behaves as it did, which loss alone can hide.'))
  return answers


# Of families whose name is no word.
_FAMILIES = {
    'switch': 'Switch Transformer', 'olmoe': 'OLMoE', 'qwen2_moe': 'Qwen2-MoE',
    'qwen3_moe': 'Qwen3-MoE', 'phimoe': 'Phi-MoE',
}


def _kind(report: Report) -> tuple[str, str]:
  if report.neurons_run:
    return (
        'What kind of model is this?',
        'A language model in which every word used to meet every number of every layer. Between '
        'the layers that look at other words stand so-called feed-forward layers, wide rows of '
        'neurons, and these are what was changed.',
    )
  family = str(report.model.get('family', 'switch'))
  experts, choices = _of(report, 'experts', 'several'), int(report.model.get('choices', 1))
  return (
      'What kind of model is this?',
      f'A language model of the {_FAMILIES.get(family, family.title())} kind. In some of its '
      f'layers stands not one network but {experts} of them, called experts, and a small router '
      f'sends each word to just {"one" if choices == 1 else choices}. So the model can know much '
      'while each word costs little work. The price is memory: all experts must be kept, whether '
      'a word needs them or not.',
  )


def _asked(report: Report) -> str:
  if report.model.get('decoder'):
    return 'At each place of the test text the model says how likely it holds each next word.'
  return (
      'Words of the test text are hidden, and the model says how likely it holds each word at the '
      'gap; only these words count, since the marks between them are almost free to guess.'
  )


def _ternary() -> tuple[str, str]:
  return (
      'What was done to it?',
      'Every number in an expert was replaced by one of three: zero, or one of two values shared '
      'by its row (“ternary”). Most become zero, and runs of zeros pack tightly: about one bit for '
      'each number, or less, where the original takes sixteen.',
  )


def _rounding() -> tuple[str, str]:
  return (
      'Why not just round?',
      'Rounding each number to the nearest one allowed ruins the model, because the errors add '
      'up. The QMoE method (Frantar and Alistarh, 2023) looks at real text instead: it rounds one '
      'column of numbers, sees what error that makes on the text, and corrects the columns not '
      'yet rounded. “Refit” then moves the two values of every row to where they fit best; that '
      'costs no storage at all. The “searched grid” also tries wider and narrower values first.',
  )


def _fewer() -> tuple[str, str]:
  return (
      'Where did the experts go?',
      'Experts that do alike work can be made one, or the least needed left out. A token still '
      'meets as many experts as before, so the work stays and the memory shrinks. What is lost '
      'this way can in part be trained back, held to the model before.',
  )


def _split() -> tuple[str, str]:
  return (
      'What was done to its layers?',
      'In a layer that was whole before, many neurons stay silent for any one word. Neurons that '
      'are alike were put into groups of equal size, the experts, and a small router guesses from '
      'the word which groups matter; only these are computed (MoEfication, Zhang and others, '
      '2021). No neuron was removed.',
  )


def _experts_matter(report: Report) -> str:
  zeroed = report.baselines.get('zeroed_experts_content_loss')
  if zeroed is None or report.before.loss is None:
    return ''
  cost = zeroed - report.before.loss
  return (
      f' And the experts do real work: with all of them switched off, the loss is {zeroed:.2f}, '
      f'{cost:.2f} more. Compressing experts that carry nothing would prove nothing.'
  )
