"""Reading texts, and what is said about files that are none; the tokenizer's layout."""

import tarfile
import zipfile

import numpy as np
import pytest

from moejax import errors
from moejax.data import batches, text, tokenizer


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'b.txt').write_text('Second file.\n\nWith a blank line.\n')
  (tmp_path / 'a.txt').write_text('First file, with an accent: é.\n')
  return tmp_path


def test_one_file_is_one_document_in_sorted_order(folder):
  want = ['First file, with an accent: é.\n', 'Second file.\n\nWith a blank line.\n']
  assert list(text.documents([f'{folder}/*.txt'])) == want
  assert list(text.documents([f'{folder}/b.txt', f'{folder}/a.txt'])) == want[::-1]


def test_a_folder_is_all_texts_below_it_in_sorted_order(folder):
  below = folder / 'below' / 'deep'
  below.mkdir(parents=True)
  (folder / '.git').mkdir()
  for name in (
      'below/c.md', 'below/deep/d.TEXT', 'below/deep/plain', 'z', '.hidden', '.git/x.txt',
      'data.json', 'archive.tar',
  ):
    (folder / name).write_text(f'{name} ')
  read = list(text.documents([str(folder)]))
  assert [line[:5] for line in read] == ['First', 'Secon', 'below', 'below', 'below', 'z ']
  assert read[2:] == ['below/c.md ', 'below/deep/d.TEXT ', 'below/deep/plain ', 'z ']
  assert list(text.documents([f'{below}/', f'{folder}/z'])) == read[3:]


def test_a_folder_without_text_is_one_line(folder):
  empty = folder / 'empty'
  empty.mkdir()
  with pytest.raises(errors.UserError, match=r'--data: no file below .*/empty ends in ') as error:
    list(text.documents([str(empty)], '--data'))
  assert '\n' not in str(error.value)
  (empty / 'a.rst').write_text('text')
  with pytest.raises(errors.UserError, match=r'nothing, but \.rst; .*empty/\*\*/\*\.rst$'):
    list(text.documents([str(empty)]))
  assert list(text.documents([f'{empty}/**/*.rst'])) == ['text']


def test_a_binary_file_in_a_folder_is_named(folder):
  (folder / 'program').write_bytes(b'\x7fELF\0\0')
  with pytest.raises(errors.UserError, match=r'/program is a binary file'):
    list(text.documents([str(folder)]))


def test_archive_members_match_a_glob(folder):
  tar, archive = folder / 'x.tgz', folder / 'x.zip'
  with tarfile.open(tar, 'w:gz') as out:
    for name in ('b.txt', 'a.txt'):
      out.add(folder / name, f'data/{name}')
  with zipfile.ZipFile(archive, 'w') as out:
    for name in ('b.txt', 'a.txt'):
      out.write(folder / name, f'data/{name}')
  want = list(text.documents([f'{folder}/*.txt']))
  assert list(text.documents([f'{tar}::data/*.txt'])) == want
  assert list(text.documents([f'{archive}::data/*.txt'])) == want
  assert list(text.documents([f'{tar}::data/[b]*'])) == want[1:]
  with pytest.raises(errors.UserError, match=r"no member of .*x\.tgz matches 'data/\*\.md'"):
    list(text.documents([f'{tar}::data/*.md']))


def archive(folder, ending):
  """An archive of one long member, by the way its name ends."""
  file = folder / f'x{ending}'
  long = np.random.default_rng(0).integers(97, 123, 50_000, dtype=np.uint8).tobytes()
  (folder / 'long').write_bytes(long)
  if ending == '.zip':
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as out:
      out.write(folder / 'long', 'data/a.txt')
  else:
    with tarfile.open(file, f'w:{ending.rpartition(".")[2].replace("tgz", "gz")}') as out:
      out.add(folder / 'long', 'data/a.txt')
  return file


@pytest.mark.parametrize('ending', ['.tgz', '.tar.xz', '.tar.bz2', '.zip'])
@pytest.mark.parametrize('damage', [
    lambda data: data[:60], lambda data: data[: len(data) // 2], lambda data: b'hello',
    lambda data: data[:9000] + bytes(99) + data[9099:],
], ids=['beginning', 'half', 'no archive', 'zeros inside'])
def test_a_broken_archive_is_named(folder, ending, damage):
  file = archive(folder, ending)
  assert len(list(text.documents([f'{file}::data/*.txt']))) == 1
  file.write_bytes(damage(file.read_bytes()))
  with pytest.raises(errors.UserError, match=rf'x\{ending} is not a whole, plain archive') as error:
    list(text.documents([f'{file}::data/*.txt']))
  assert '\n' not in str(error.value)


def test_an_archive_with_a_password_is_named(folder):
  file = archive(folder, '.zip')
  data = bytearray(file.read_bytes())
  data[6] |= 1  # the flags of the member and of its entry in the directory
  data[data.index(b'PK\x01\x02') + 8] |= 1
  file.write_bytes(data)
  with pytest.raises(errors.UserError, match=r'x\.zip is not a whole, plain archive .*password'):
    list(text.documents([f'{file}::*']))


@pytest.mark.parametrize(
    'content, reason',
    [
        (b'', 'is empty'), (b' \n\n', 'is empty'), (b'\x7fELF\0\0', 'is a binary file'),
        (b'caf\xe9 noir et blanc', 'is not UTF-8 text \\(byte 3\\)'),
    ],
)
def test_bad_files_are_named(folder, content, reason):
  (folder / 'bad.txt').write_bytes(content)
  with pytest.raises(errors.UserError, match=rf'bad\.txt {reason}'):
    list(text.documents([f'{folder}/*.txt']))


@pytest.mark.parametrize(
    'content, reason',
    [
        (b'caf\xe9 noir et blanc', r'is not UTF-8 text \(byte 2097152\)'),
        (b'\0\0', 'is a binary file'),
    ],
)
def test_bad_bytes_far_into_a_file_name_it(folder, content, reason):
  prose = b'Plain words. ' * (2 ** 21 // 13 + 1)
  (folder / 'b.txt').write_bytes(prose[: 2 ** 21 - 3] + content)
  (folder / 'c.txt').write_bytes(prose)
  read = text.documents([f'{folder}/*.txt'])
  assert next(read).startswith('First file')
  with pytest.raises(errors.UserError, match=rf'/b\.txt {reason}') as error:
    list(read)
  assert '\n' not in str(error.value)


def test_a_missing_file_suggests_the_nearest(folder):
  with pytest.raises(errors.UserError, match=r"valid_files: no file .*did you mean 'a\.txt'"):
    list(text.documents([f'{folder}/aa.txt'], 'data.valid_files'))
  with pytest.raises(errors.UserError, match=r'data\.train_files is empty'):
    list(text.documents([]))


def test_a_character_cut_by_the_probe_is_no_error():
  text.check_text('é'.encode() * 10 + b'\xc3', 'x', whole=False)
  with pytest.raises(errors.UserError):
    text.check_text('é'.encode() * 10 + b'\xc3', 'x', whole=True)


@pytest.fixture(scope='module')
def trained():
  words = 'the people of the united states and their congress met in session '
  return tokenizer.train([words * 20, words.upper() * 5], 400, 20)


def test_the_layout_is_t5s(trained):
  assert trained.vocab_size == 400 and trained.num_sentinels == 20
  assert trained.decode([0, 1, 2], skip_special=False) == '<pad></s><unk>'
  assert trained.decode([399, 380], skip_special=False) == '<extra_id_0><extra_id_19>'
  assert trained.decode([379], skip_special=False) != '<extra_id_20>'


def test_a_tokenizer_without_sentinels(tmp_path):
  made = tokenizer.train(['the people of the united states'], 300, 0)
  assert (made.vocab_size, made.num_sentinels, made.eos_id) == (300, 0, tokenizer.EOS_ID)
  made.save(tmp_path)
  again = tokenizer.load(tmp_path)
  assert (again.vocab_size, again.num_sentinels) == (300, 0)
  assert again.decode(again.encode('the people')) == 'the people'


def test_the_end_of_text_of_other_tokenizers():
  import tokenizers

  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  assert tokenizer.Tokenizer(backend).eos_id is None
  backend.add_special_tokens(['<|endoftext|>'])
  assert tokenizer.Tokenizer(backend).eos_id == 0


@pytest.mark.parametrize('line', ['the people', ' \t\n two  spaces ', 'é 漢字 🙂 \x07', ''])
def test_any_text_comes_back(trained, line):
  ids = trained.encode(line)
  assert ids.dtype == np.int32 and (ids >= 3).all() and (ids < 380).all()
  assert trained.decode(ids) == line


def test_saving_and_loading(trained, tmp_path):
  path = trained.save(tmp_path)
  again = tokenizer.load(tmp_path)
  assert again.to_bytes() == trained.to_bytes() == path.read_bytes()
  path.write_text('{"version"')
  with pytest.raises(errors.UserError, match=r'tokenizer\.json is not a tokenizer'):
    tokenizer.load(path)
  with pytest.raises(errors.UserError, match='no tokenizer at .* put the one that came with'):
    tokenizer.load(tmp_path / 'none')


def test_a_small_vocabulary_says_how_small(trained):
  with pytest.raises(errors.UserError, match='needs at least 279'):
    tokenizer.train(['x'], 270, 20)


def test_a_text_shorter_than_a_sample_names_the_setting(trained):
  with pytest.raises(errors.UserError, match=r'data\.valid_files: a text of 0 tokens; one sample'):
    batches.tokenize(['x'], trained, 'data.valid_files')
  texts, total = ['the people'] * 5, 5 * len(trained.encode('the people'))
  message = f'--calibration: a text of {total} tokens; one sample has {total + 1}: give a longer'
  with pytest.raises(errors.UserError, match=message):
    batches.tokenize(texts, trained, '--calibration', sample_tokens=total + 1)
  message = f'a text of {total} tokens; one sample has {total + 1}: .* samples .sequence_length'
  with pytest.raises(errors.UserError, match=message):
    batches.tokenize(
        texts, trained, 'x', sample_tokens=total + 1, length_field='sequence_length'
    )
  # Several short documents are fine, though none of them fills a sample.
  assert batches.tokenize(texts, trained, 'x', sample_tokens=total).num_documents == 5
  for shortest, kept in ((1, 2), (2, 1)):
    made = batches.tokenize(['', 'x', 'xy'], trained, 'x', shortest=shortest)
    assert made.num_documents == kept


def test_names_with_pattern_characters_are_names(tmp_path):
  odd = tmp_path / 'speech[1].txt'
  odd.write_text('one odd name')
  assert list(text.documents([str(odd)])) == ['one odd name']
