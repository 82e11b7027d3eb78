"""Whether NVIDIA cards get kernels by Mosaic GPU: the environment variable MOEJAX_GPU=mosaic.

They are lowered and interpreted in tests and have not been timed on a card, so that XLA serves
where nobody asks for them.
"""

import os


def unasked() -> str:
  """'' where kernels by Mosaic GPU are asked for, or why they do not serve.

  Raises:
    ValueError: MOEJAX_GPU is none of its values.
  """
  asked = os.environ.get('MOEJAX_GPU', '')
  if asked not in ('', 'xla', 'mosaic'):
    raise ValueError(f'MOEJAX_GPU={asked} is none of xla, mosaic')
  return '' if asked == 'mosaic' else 'MOEJAX_GPU=mosaic asks for kernels by Mosaic GPU'
