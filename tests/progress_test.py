"""Bars and clocks: quiet for short work, honest about shares."""

from moejax import progress


def test_short_work_says_nothing(capfd):
  assert list(progress.bar(range(3), label='short')) == [0, 1, 2]
  hidden = progress.bar(total=2, label='hidden', show=False)
  hidden.update()
  hidden.close()
  assert capfd.readouterr() == ('', '')


def test_long_work_says_how_far_it_is(capfd, monkeypatch):
  monkeypatch.setattr(progress, '_SECONDS', (0.0, 0.0))
  for _ in progress.bar(range(3), label='long', unit='layer'):
    pass
  out, err = capfd.readouterr()
  assert out == '' and 'long: 100%' in err and '3/3' in err


def test_blocks_and_clock():
  assert progress.blocks(0.5, 4) == '██··'
  assert progress.blocks(7.0, 2) == '██' and progress.blocks(-1.0, 2) == '··'
  assert [progress.clock(s) for s in (5, 65, 3725)] == ['5s', '1m05s', '1h02m']
