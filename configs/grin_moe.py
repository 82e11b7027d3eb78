"""GRIN-MoE 16x3.8B (42B parameters, arXiv 2409.12136) on slices of a TPU pod.

  python -m experiments.train --config configs/grin_moe.py:v5p-64 --workdir gs://BUCKET/grin \
    --set 'data.train_files=["/data/*.txt"]' --set data.tokenizer=/data/tokenizer.json

A variant is a slice: the chips and how they are divided. `python -m experiments.pods` compiles
each and says what it asks of a chip; experiments/evidence/pods.md has those that were compiled.
`experiments/launch/tpu_vm.sh` starts it on every host. Nobody has run the whole of it yet. The
recipe is the paper's (section 3): experts are split by their hidden units over `tensor`, and no
token is dropped.
"""

from moejax import config
from moejax.errors import UserError, did_you_mean
from moejax.presets import preset

# Mesh, and sequences of 4,096 tokens in a step.
SLICES = {
    'v5p-64': (config.MeshConfig(data=8, tensor=8), 64),
    'v5p-64-fsdp': (config.MeshConfig(data=16, tensor=4), 64),
    'v5p-64-expert': (config.MeshConfig(data=4, expert=16), 64),
    'v6e-256': (config.MeshConfig(data=32, tensor=8), 256),
    'v6e-256-fsdp': (config.MeshConfig(data=64, tensor=4), 256),
    'v6e-256-expert': (config.MeshConfig(data=16, expert=16), 256),
}


def get_config(variant: str = 'v5p-64') -> config.Experiment:
  if variant not in SLICES:
    raise UserError(f'no slice {variant!r}{did_you_mean(variant, SLICES)}')
  mesh, sequences = SLICES[variant]
  return config.Experiment(
      model=preset('grin-moe'),
      mesh=mesh,
      data=config.DataConfig(sequence_length=4096),
      optim=config.OptimConfig(
          learning_rate=4e-4, schedule='cosine', warmup_steps=2000, weight_decay=0.1, b2=0.95
      ),
      train=config.TrainConfig(
          steps=200_000, batch_size=sequences, compute_dtype='bfloat16', remat=True,
          scan_layers=True, log_every=10, eval_every=1000, checkpoint_every=500,
      ),
  )
