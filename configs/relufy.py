"""A dense model trained until its FFNs are sparse: ReLU in place of a smooth activation.

  python -m experiments.train --config configs/relufy.py:relu@DIR --workdir runs/relufied

DIR is the folder of a dense model; it starts from its weights, on the texts that its manifest
names. Others: --set 'data.train_files=["FILE"]'. An encoder without a head learns the hidden states
of the model it came from. Variants, before the @:
  relu       ReLU (arXiv 2310.04564)
  shifted    relu(x - 0.1); --set 'model.cuts.shift=[0.5]'
  drelu      ReLU on both branches of a gated FFN (arXiv 2406.05955)
  prosparse  ReLU and an L1 loss, its weight raised in stages (arXiv 2402.13516)
  hoyer      ReLU and a square-Hoyer loss (arXiv 2310.04361)
  above      the activation stays; its inputs are pushed far below 0 (arXiv 2310.04361)

How hard it is pushed: --set 'activity.weights=[...]' and --set 'activity.stages=[...]'. Held to the
model it came from: --set distill.teacher=DIR. Steps, rate and batch are those of a small model.
Afterwards: configs/cut.py:fat for what is nearly 0, configs/profile.py to look, configs/moefy.py.
"""

import dataclasses

from moejax import config, evaluate, files, store
from moejax.compress.relufy import Relufy, reconfigured
from moejax.errors import UserError, did_you_mean

VARIANTS = {
    'relu': 'relu', 'shifted': 'shifted', 'drelu': 'drelu', 'prosparse': 'relu', 'hoyer': 'relu',
    'above': None,
}
STEPS = 400


def get_config(variant: str = '') -> config.Experiment:
  kind, found, folder = variant.partition('@')
  if kind not in VARIANTS or not found:
    raise UserError(
        f'configs/relufy.py:{variant}: say VARIANT@FOLDER, a variant of {", ".join(VARIANTS)}'
        f'{did_you_mean(kind, VARIANTS)} and the folder of a dense model'
    )
  source = store.Source(files.require_folder(folder))
  if source.config.moe is not None:
    raise UserError(f'{folder} has experts: relufy a dense model, then split it')
  own = VARIANTS[kind]
  model = source.config if own is None else reconfigured(
      source.config, Relufy(kind=own, shift=0.1 if own == 'shifted' else 0.0)
  )
  activity = {
      'prosparse': config.ActivityConfig(
          form='l1', weights=(0.0, 1.0, 3.0), stages=(STEPS // 4, STEPS // 4, STEPS // 4)
      ),
      'hoyer': config.ActivityConfig(form='hoyer', weights=(1.0,)),
      'above': config.ActivityConfig(form='above', weights=(0.1,)),
  }
  distill = config.DistillConfig()
  if getattr(model, 'head', '') == 'none':
    distill = config.DistillConfig(
        teacher=folder, task_weight=0.0, weight=0.0, hidden_weight=1.0
    )
  return config.Experiment(
      model=dataclasses.replace(model, dropout_rate=0.0), data=evaluate.data_config(folder),
      distill=distill,
      optim=config.OptimConfig(
          learning_rate=3e-4, warmup_steps=STEPS // 20, schedule='linear', weight_decay=0.01
      ),
      activity=activity.get(kind, config.ActivityConfig()), init_from=folder,
      train=config.TrainConfig(
          steps=STEPS, batch_size=16, eval_every=100, checkpoint_every=100, log_every=20
      ),
  )
