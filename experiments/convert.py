"""Converts a model folder between Hugging Face and moejax, tensor by tensor.

Example:
  python -m experiments.convert --source google-switch-base-8 --out switch-base-8
  python -m experiments.convert --source switch-base-8 --out for-transformers --format hf
"""

from absl import flags

from experiments import flags as flags_lib
from moejax import progress
from moejax.convert import folder

_SOURCE = flags.DEFINE_string('source', None, 'Folder to read: Hugging Face or moejax.')
_OUT = flags.DEFINE_string('out', None, 'Folder to write; nothing half-written is ever left there.')
_FORMAT = flags.DEFINE_enum(
    'format', None, folder.FORMATS, 'What to write; the default is the one that --source is not.'
)
_DTYPE = flags.DEFINE_enum(
    'dtype', None, tuple(folder.DTYPES), 'Cast the plain weights; the default keeps what is stored.'
)


def main() -> None:
  flags_lib.require('source', 'out')
  config = folder.convert_folder(
      str(_SOURCE.value), str(_OUT.value), format=_FORMAT.value, dtype=_DTYPE.value,
      progress=lambda items, total: progress.bar(
          items, label='convert', total=total, unit='tensor'
      ),
  )
  layers = ' + '.join(str(config.layers_of(stack)) for stack in config.stacks)
  print(f'{_OUT.value}: {config.family}, {layers} layers')


if __name__ == '__main__':
  flags_lib.run(main, __doc__)
