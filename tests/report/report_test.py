"""The report page: every part is there, nothing outside it is, and the numbers are the run's."""

import html.parser
import importlib.util
import itertools
import json
import pathlib
import re

import pytest

from moejax import report
from moejax.errors import UserError
from moejax.report import charts, data, svg

_SPEC = importlib.util.spec_from_file_location(
    'comparison_example', pathlib.Path(__file__).with_name('comparison_example.py')
)
common = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(common)


class Checker(html.parser.HTMLParser):
  """Collects tags left open, attributes that fetch something, and the text."""

  VOID = ('meta', 'br', 'img', 'link', 'hr')

  def __init__(self):
    super().__init__()
    self.open, self.fetches, self.text, self.pictures = [], [], [], 0

  def handle_starttag(self, tag, attrs):
    self.pictures += tag == 'svg'
    if tag not in self.VOID:
      self.open.append(tag)
    self.fetches += [v for k, v in attrs if k in ('src', 'href', 'srcset', 'xlink:href', 'data')]

  def handle_endtag(self, tag):
    assert self.open and self.open[-1] == tag, (self.open[-3:], tag)
    self.open.pop()

  def handle_data(self, data):
    self.text.append(data)


def check(page: str) -> Checker:
  checker = Checker()
  checker.feed(page)
  assert checker.open == []
  return checker


def test_the_page_is_whole_and_self_contained():
  page = report.render(report.parse(common.comparison()))
  checker = check(page)
  assert checker.fetches == []
  assert not re.search(r'https?:|url\(|@import|<script', page)
  assert 'prefers-color-scheme: dark' in page
  assert 'width=device-width' in page
  assert checker.pictures == 5
  text = ' '.join(checker.text)
  for part in (
      'Smaller against worse', 'Where the bytes are', 'What each layer lost',
      'Do the words still find their experts?', 'Learning, live', 'The numbers',
      'See for yourself', 'What am I looking at?', 'How it was measured',
  ):
    assert part in text, part
  assert text.index('Smaller against worse') < text.index('The numbers')
  assert text.index('The numbers') < text.index('What am I looking at?')


def test_the_numbers_are_the_runs():
  page = report.render(report.parse(common.comparison()))
  for row in common.comparison()['variants']:
    assert row['name'] in page
    assert f'{row["evaluation"]["content_loss"]:.3f}' in page
    assert charts.megabytes(row['after']['stored_bytes']) in page
  assert '+0.098' in page and '75.0%' in page
  assert 'loss is 4.90, 0.99 more' in page
  assert '10 matrices' in page  # two weights of expert 3 in five variants


def test_text_from_the_run_cannot_become_markup():
  values = common.comparison()
  values['variants'][1]['name'] = '<b onmouseover=x>'
  values['facts']['machine'] = '<script>alert(1)</script>'
  page = report.render(report.parse(values))
  assert '<b onmouseover' not in page and '<script' not in page
  assert '&lt;self&gt;' in page
  check(page)


def test_a_single_compression_by_the_contract_alone():
  values = common.comparison()
  single = {k: values[k] for k in ('source', 'steps', 'before', 'after', 'layers')}
  parsed = report.parse(single)
  assert [v.name for v in parsed.variants] == ['Uncompressed', 'quantize']
  assert parsed.headline.seconds == 90
  page = report.render(parsed)
  checker = check(page)
  assert 'find their experts' not in page and checker.pictures == 3


def test_a_decoder_with_several_choices_is_told_as_one():
  values = common.comparison()
  single = {k: values[k] for k in ('source', 'steps', 'before', 'after', 'layers')}
  single['model'] = {'family': 'olmoe', 'decoder': True, 'experts': 64, 'choices': 8}
  page = report.render(report.parse(single))
  text = ' '.join(check(page).text)
  assert 'of the OLMoE kind' in text and 'one network but 64 of them' in text
  assert 'each word to just 8.' in text and 'loss on next words' in text
  assert 'hidden word' not in text and 'Switch' not in text


def test_a_split_model_tells_what_share_is_run():
  values = common.comparison()
  single = {k: values[k] for k in ('source', 'steps', 'before', 'after')}
  single['after'] = single['before']
  rows = [{'path': p, 'neurons_run': share, 'bits_per_weight': 16.0, 'relative_output_error': 0.1}
          for p, share in (('a/experts', 0.1), ('b/experts', 0.3))]
  page = report.render(report.parse({**single, 'layers': rows}))
  text = re.sub(r'\s+', ' ', ' '.join(check(page).text))
  assert re.search('A word now runs 20% of the neurons in 2 feed-forward layers', text)
  assert 'No neuron was removed' in text and 'not one network' not in text


def test_layers_are_means_over_experts():
  rows = [
      {'path': 'p', 'bits_per_weight': 1.0, 'zeros': 0.5, 'relative_output_error': 0.1},
      {'path': 'p', 'bits_per_weight': 2.0, 'zeros': 0.7, 'relative_output_error': 0.3,
       'fallback': 'no tokens: rounded'},
      {'path': 'q', 'bits_per_weight': 4.0, 'zeros': 0.0, 'relative_output_error': 0.0},
  ]
  merged = data.merge_layers(rows)
  assert [row.path for row in merged] == ['p', 'q']
  assert merged[0].bits_per_weight == pytest.approx(1.5)
  assert merged[0].zeros == pytest.approx(0.6)
  assert merged[0].relative_output_error == pytest.approx(0.2)
  assert (merged[0].fallbacks, merged[0].experts) == (1, 2)


def test_write_puts_both_files_and_replaces_old_ones(tmp_path):
  path = report.write(common.comparison(), tmp_path / 'runs' / 'demo')
  assert path.read_text().startswith('<!doctype html>')
  again = json.loads((path.parent / 'report.json').read_text())
  assert {'source', 'steps', 'before', 'after', 'layers'} <= set(again)
  assert report.parse(again) == report.parse(common.comparison())
  report.write(common.comparison(), path.parent)
  assert sorted(p.name for p in path.parent.iterdir()) == ['report.html', 'report.json']


@pytest.mark.parametrize('broken, message', [
    ({'source': 'x'}, "'before' is missing"),
    ({'before': {'stored_bytes': 1}, 'after': {}}, "'after' is missing"),
    ({**common.comparison(), 'headline': 'nobody'}, "headline 'nobody'"),
])
def test_a_broken_report_is_refused(broken, message):
  with pytest.raises(UserError, match=message):
    report.parse(broken)


def test_an_unwritable_folder_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot write'):
    report.write(common.comparison(), tmp_path / 'file' / 'folder')


def test_spread_labels_keeps_order_gap_and_bounds():
  wanted = [50.0, 10.0, 12.0, 11.0, 49.0]
  placed = svg.spread_labels(wanted, 10.0, 5.0, 55.0)
  by_wanted = [p for _, p in sorted(zip(wanted, placed))]
  assert all(b - a >= 10.0 - 1e-9 for a, b in itertools.pairwise(by_wanted))
  assert min(placed) >= 5.0 - 1e-9 and max(placed) <= 55.0 + 1e-9
  assert svg.spread_labels([20.0, 40.0], 10.0, 0.0, 60.0) == [20.0, 40.0]


@pytest.mark.parametrize('low, high', [(0.0, 1.0), (3.85, 4.97), (0.0, 0.031), (6000.0, 6196.0)])
def test_ticks_are_round_and_inside(low, high):
  found = svg.ticks(low, high, 5)
  assert 2 <= len(found) <= 11
  assert low - 1e-9 <= found[0] and found[-1] <= high + 1e-9


def test_byte_parts_account_for_every_byte():
  sizes = common.sizes(0.9)
  assert sum(charts.byte_parts(sizes).values()) == sizes['stored_bytes']
  bare = {'stored_bytes': 100, 'expert_bytes': 60}
  assert charts.byte_parts(bare) == {'experts': 60.0, 'other': 40.0}


def fewer_experts(rows):
  sizes = {'stored_bytes': 200, 'expert_bytes': 100, 'expert_bits_per_weight': 16.0}
  return report.parse({
      'source': 'm', 'steps': [{'transform': 'x'}], 'before': {**sizes, 'expert_bytes': 150},
      'after': sizes, 'layers': rows,
  })


def test_who_was_merged_and_who_went():
  parsed = fewer_experts([
      {'path': 'a/experts', 'transform': 'merge', 'expert': 0, 'members': [0, 2, 3], 'dominant': 2,
       'usage': 0.75, 'relative_output_error': 0.5, 'bits_per_weight': 16.0},
      {'path': 'a/experts', 'transform': 'merge', 'expert': 1, 'members': [1], 'dominant': 1,
       'usage': 0.25, 'relative_output_error': None, 'bits_per_weight': 16.0},
      {'path': 'b/experts', 'transform': 'prune', 'method': 'reap', 'kept': [0, 3],
       'dropped': [1, 2], 'scores': [4.0, 0.5, 0.25, 3.0], 'bits_per_weight': 16.0},
  ])
  merged, pruned = parsed.fates
  assert merged.groups == ((2, 0, 3), (1,))
  assert merged.notes == ('75.0% of the choices, output off by 50%', '25.0% of the choices')
  assert (pruned.groups, pruned.dropped) == (((0,), (3,)), (1, 2))
  assert pruned.notes == ('score 4', 'score 3')
  page = report.render(parsed)
  text = ' '.join(check(page).text)
  assert '8 experts of this model became 4' in re.sub(r'\s+', ' ', re.sub('<[^>]+>', '', page))
  assert '4 experts became 2' in text and '2 of 4 experts stayed' in text and '(REAP)' in text
  assert 'Smaller against worse' not in text and 'find their experts' not in text
  assert fewer_experts([{'path': 'a', 'bits_per_weight': 1.0}]).fates == ()


def test_a_chain_counts_from_the_first_step_to_the_last():
  row = lambda group, members: {
      'path': 'a/experts', 'transform': 'merge', 'expert': group, 'members': members,
      'dominant': members[0], 'bits_per_weight': 16.0,
  }
  parsed = fewer_experts([
      {'path': 'a/experts', 'transform': 'prune', 'method': 'ean', 'kept': [0, 1, 2, 4],
       'dropped': [3, 5], 'bits_per_weight': 16.0},
      row(0, [0, 1]), row(1, [3]), row(2, [2]), row(0, [0, 2]), row(1, [1]),
  ])
  assert [len(fate.groups) for fate in parsed.fates] == [4, 3, 2]
  page = re.sub('<[^>]+>', '', report.render(parsed))
  assert '6 experts of this model became 2' in re.sub(r'\s+', ' ', page)


def test_every_method_of_pruning_says_why():
  from moejax.compress import prune
  from moejax.report import words

  for method in prune.METHODS:
    one = data.Fate(path='a', method=method, groups=((0,),), notes=('',))
    assert words.fate(one).split('counted by ')[1] != f'{method}.'
