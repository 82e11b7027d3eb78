"""Report -> one HTML page with nothing outside it: inline CSS and SVG, light and dark."""

from collections.abc import Mapping
import importlib.resources
from typing import Any

from moejax.report import charts, words
from moejax.report.data import Report, Variant
from moejax.report.svg import escape


def render(report: Report) -> str:
  """The whole page: pictures, table, explanation, how it was measured."""
  style = importlib.resources.files('moejax.report').joinpath('style.css').read_text()
  sections = [
      _header(report), _figures(report), _table(report), _fates(report), _samples(report),
      _explanation(report), _facts(report),
  ]
  return (
      '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
      '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
      f'<title>{escape(report.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n'
      + '\n'.join(section for section in sections if section)
      + '\n<footer>Written by moejax. All of this page is in the file itself; '
      'report.json beside it holds the numbers.</footer>\n</main>\n</body>\n</html>\n'
  )


def _header(report: Report) -> str:
  best, before = report.headline, report.before
  cells = [
      (f'{before.stored_bytes / max(best.stored_bytes, 1):.1f}×', 'smaller, the whole model'),
  ]
  if best.bits:
    experts = before.sizes.get('expert_bytes', 0) / max(best.sizes.get('expert_bytes', 1), 1)
    form = '.0f' if experts >= 10 else '.1f'
    cells.append((f'{experts:{form}}×', 'smaller, the experts'))
    if words.fewer_bits(report, best):
      cells.append((f'{best.bits:.3f}', 'bits for each expert weight, everything counted'))
  if best.agreement is not None:
    cells.append((f'{best.agreement:.0%}', 'same first answer as the uncompressed model'))
  elif best.loss is not None:
    cells.append((f'{best.loss:.2f}', f'loss (before: {_number(before.loss, ".2f")})'))
  numbers = ''.join(f'<div><strong>{a}</strong><span>{escape(b)}</span></div>' for a, b in cells)
  return (
      f'<header><p class="eyebrow">moejax report</p><h1>{escape(report.title)}</h1>'
      f'<p class="lead">{words.headline(report)}</p><div class="numbers">{numbers}</div></header>'
  )


def _legend(report: Report, variants: tuple[Variant, ...], style: str = 'legend') -> str:
  items = ''.join(
      f'<li><i class="{charts.colour(report, v)}"></i>{escape(v.name)}</li>' for v in variants
  )
  return f'<ul class="{style}">{items}</ul>'


def _figure(title: str, caption: str, picture: str, legend: str = '') -> str:
  return (
      f'<figure><figcaption><h3>{escape(title)}</h3><p>{escape(caption)}</p></figcaption>'
      f'{picture}{legend}</figure>'
  )


def _figures(report: Report) -> str:
  shown = tuple(v for v in report.compressed if v.layers)
  parts = ''.join(f'<li><i class="{s}"></i>{escape(label)}</li>' for _, label, s in charts.PARTS)
  load = (
      f'<ul class="legend"><li><i class="{charts.colour(report, report.headline)}"></i>after</li>'
      '<li><i class="tick-mark"></i>before</li></ul>'
  )
  rows = [row for v in shown for row in v.layers]
  figures = []
  if any(words.fewer_bits(report, v) for v in report.compressed):
    figures.append(_figure(
        'Smaller against worse', words.loss_caption(report), charts.loss_against_bits(report)
    ))
  figures.append(_figure(
      'Where the bytes are', words.bytes_caption(report), charts.bytes_by_part(report),
      f'<ul class="legend square">{parts}</ul>',
  ))
  if any(row.relative_output_error or row.zeros for row in rows):
    figures.append(_figure(
        'What each layer lost', words.layer_caption(report), charts.error_and_zeros(report),
        _legend(report, shown),
    ))
  if report.headline.routing:
    figures.append(_figure(
        'Do the words still find their experts?', words.load_caption(report),
        charts.expert_load(report), load,
    ))
  curve = charts.training_curve(report)
  if curve:
    seconds = report.training.get('seconds', 0)
    caption = (
        f'Before compression the model went on learning for {seconds / 60:.1f} minutes on this '
        'machine. Faint: the loss of each logged step; line: its running mean.'
    )
    figures.append(_figure('Learning, live', caption, curve).replace(
        '<figure>', '<figure class="wide">', 1))
  return f'<section class="figures">{"".join(figures)}</section>'


def _number(value: float | None, form: str, missing: str = '–') -> str:
  return missing if value is None else format(value, form)


def _table(report: Report) -> str:
  head = (
      'Model', 'stored', 'bits an expert weight', f'loss on {report.target}s', 'change',
      'right first guess', 'same first guess as uncompressed', 'seconds to make',
  )
  rows = []
  for v in report.variants:
    change = None if v.loss is None or report.before.loss is None else v.loss - report.before.loss
    note = f'<small>{escape(v.note)}</small>' if v.note else ''
    cells = (
        charts.megabytes(v.stored_bytes), _number(v.bits, '.3f'), _number(v.loss, '.3f'),
        '' if v is report.before else _number(change, '+.3f'), _number(v.accuracy, '.1%'),
        '' if v is report.before else _number(v.agreement, '.1%'), _number(v.seconds, '.0f'),
    )
    style = ' class="headline"' if v is report.headline else ''
    rows.append(
        f'<tr{style}><th scope="row">{escape(v.name)}{note}</th>'
        + ''.join(f'<td>{escape(c)}</td>' for c in cells) + '</tr>'
    )
  header = ''.join(f'<th scope="col">{escape(h)}</th>' for h in head)
  return (
      '<h2>The numbers</h2><div class="scroll"><table><thead><tr>' + header
      + '</tr></thead><tbody>' + ''.join(rows) + '</tbody></table></div>'
  )


def _fates(report: Report) -> str:
  """Who was merged with whom and who went, a block a layer."""
  if not report.fates:
    return ''
  blocks = ''.join(
      f'<section><h3>{escape(fate.path)}</h3><p>{escape(words.fate(fate))}</p><ul>'
      + ''.join(_group(group, note) for group, note in zip(fate.groups, fate.notes))
      + (f'<li class="gone" title="dropped">{_experts(fate.dropped)}</li>' if fate.dropped else '')
      + '</ul></section>'
      for fate in report.fates
  )
  return f'<h2>What became of the experts</h2><div class="fates">{blocks}</div>'


def _group(group: tuple[int, ...], note: str) -> str:
  small = f'<small>{escape(note)}</small>' if note else ''
  return f'<li>{_experts(group)}{small}</li>'


def _experts(experts: tuple[int, ...]) -> str:
  return ''.join(f'<b>{expert}</b>' for expert in experts)


def _samples(report: Report) -> str:
  if not report.samples:
    return ''
  blocks = []
  for sample in report.samples:
    text = ''.join(
        f'<span class="gap">{escape(piece["text"])}</span>' if piece.get('hidden')
        else escape(piece['text'])
        for piece in sample['text']
    )
    lines = ''.join(_guesses(guess) for guess in sample['guesses'])
    blocks.append(f'<div class="sample"><p>{text}</p>{lines}</div>')
  return (
      '<h2>See for yourself</h2><p>Sentences of the test speeches. The underlined words were '
      'hidden; below is what each model put there, piece by piece, the true pieces before being '
      'known.</p>'
      f'<div class="samples">{"".join(blocks)}</div>'
  )


def _guesses(guess: Mapping[str, Any]) -> str:
  words_html = ' '.join(
      f'<span class="{"right" if piece["right"] else "wrong"}">{escape(piece["text"])}</span>'
      for piece in guess['pieces']
  )
  return f'<p><span class="who">{escape(guess["name"])}</span>{words_html}</p>'


def _explanation(report: Report) -> str:
  sections = ''.join(
      f'<section><h3>{escape(question)}</h3><p>{escape(answer)}</p></section>'
      for question, answer in words.explanation(report)
  )
  return f'<h2>What am I looking at?</h2><div class="explain">{sections}</div>'


def _facts(report: Report) -> str:
  facts = {'source': report.source, **report.facts}
  rows = ''.join(
      f'<dt>{escape(str(name).replace("_", " "))}</dt><dd>{escape(value)}</dd>'
      for name, value in facts.items() if value not in ('', None)
  )
  return f'<h2>How it was measured</h2><dl>{rows}</dl>' if rows else ''
