"""The report's sentences, with the run's numbers in them, for readers who never read a paper."""

import math

from moejax.report.charts import megabytes
from moejax.report.data import Report


def _of(report: Report, fact: str, default: str) -> str:
  return str(report.facts.get(fact, default))


def headline(report: Report) -> str:
  """One sentence under the title."""
  best, before = report.headline, report.before
  parts = [
      f'The experts of this model went from <b>{before.bits or 16:.3g} bits</b> to '
      f'<b>{best.bits:.3f} bits</b> for each weight' if best.bits else 'This model was compressed',
      f'the whole model from <b>{megabytes(before.stored_bytes)}</b> to '
      f'<b>{megabytes(best.stored_bytes)}</b>',
  ]
  text = ', '.join(parts)
  if best.agreement is not None:
    text += (
        f'. Asked for a hidden word, the small model gives the same first answer as the large one '
        f'<b>{best.agreement:.0%}</b> of the time'
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


def explanation(report: Report) -> list[tuple[str, str]]:
  """(question, answer) pairs."""
  best, before = report.headline, report.before
  experts = _of(report, 'experts', 'several')
  answers = [
      ('What kind of model is this?',
       f'A language model of the Switch Transformer kind. In some of its layers stands not one '
       f'network but {experts} of them, called experts, and a small router sends each word to just '
       'one. So the model can know much while each word costs little work. The price is memory: '
       'all experts must be kept, whether a word needs them or not.'),
      *((_ternary(),) if any(v.bits and v.bits < 1.6 for v in report.compressed) else ()),
      ('Why not just round?',
       'Rounding each number to the nearest one allowed ruins the model, because the errors add '
       'up. The QMoE method (Frantar and Alistarh, 2023) looks at real text instead: it rounds one '
       'column of numbers, sees what error that makes on the text, and corrects the columns not '
       'yet rounded. “Refit” then moves the two values of every row to where they fit best; that '
       'costs no storage at all. The “searched grid” also tries wider and narrower values first.'),
  ]
  if before.loss is not None:
    answers.append((
        'What does “loss” mean?',
        'Words of the test speeches are hidden, and the model says how likely it holds each word '
        f'at the gap. Loss is how surprised it is by the truth. A loss of {before.loss:.2f} means '
        f'it is as unsure as somebody choosing among {math.exp(before.loss):,.0f} equally likely '
        'word pieces; lower is better. Only the hidden words count, since the marks between them '
        'are almost free to guess.'))
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
        'For every hidden word, both the compressed and the original model name their first guess. '
        'Agreement is how often the two are the same. It says whether the model still behaves as '
        'it did, which loss alone can hide.'))
  return answers


def _ternary() -> tuple[str, str]:
  return (
      'What was done to it?',
      'Every number in an expert was replaced by one of three: zero, or one of two values shared '
      'by its row (“ternary”). Most become zero, and runs of zeros pack tightly: about one bit for '
      'each number, or less, where the original takes sixteen.',
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
