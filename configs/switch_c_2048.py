"""Switch-C (2,048 experts, 1.6T parameters, arXiv 2101.03961, table 9) on slices of a TPU pod.

  python -m experiments.train --config configs/switch_c_2048.py:v5p-512 --workdir gs://B/switch \
    --set 'data.train_files=["/data/*.txt"]' --set data.tokenizer=/data/tokenizer.json

A variant is a slice: the chips and how they are divided. All have been compiled and fit
(`python -m experiments.pods --only switch_c`); none has been run. Tokens go to their experts by
all-to-all in buffers of twice the even share, on v6e within one of the four slices; Adafactor
without momentum keeps two vectors a matrix, as the paper trained it.
"""

import dataclasses

from moejax import config
from moejax.errors import UserError, did_you_mean
from moejax.presets import preset

# Mesh, and samples of 512 tokens in a step (the paper's 2^20 tokens are 2,048).
SLICES = {
    'v5p-512': (config.MeshConfig(data=1, expert=512), 2048),
    'v5p-512-data': (config.MeshConfig(data=4, expert=128), 2048),
    'v5p-512-tensor': (config.MeshConfig(data=1, expert=128, tensor=4), 2048),
    'v6e-1024': (config.MeshConfig(data=4, expert=256), 2048),
    'v6e-1024-data': (config.MeshConfig(data=8, expert=128), 2048),
    'v6e-1024-tensor': (config.MeshConfig(data=4, expert=64, tensor=4), 2048),
}


def get_config(variant: str = 'v5p-512') -> config.Experiment:
  if variant not in SLICES:
    raise UserError(f'no slice {variant!r}{did_you_mean(variant, SLICES)}')
  mesh, samples = SLICES[variant]
  model = preset('switch-c-2048')
  assert isinstance(model, config.EncDecConfig) and model.moe is not None
  moe = dataclasses.replace(model.moe, exchange_factor=2.0)
  return config.Experiment(
      model=dataclasses.replace(model, moe=moe),
      mesh=mesh,
      data=config.DataConfig(encoder_length=512),
      optim=config.OptimConfig(
          optimizer='adafactor', learning_rate=0.01, schedule='rsqrt', warmup_steps=10_000,
          weight_decay=0.0,
      ),
      train=config.TrainConfig(
          steps=500_000, batch_size=samples, compute_dtype='bfloat16', remat=True, scan_layers=True,
          log_every=10, eval_every=1000, checkpoint_every=500,
      ),
  )
