"""A merged, pruned or split model trained for a while, held to the model it was made from.

  python -m experiments.train --config configs/recover.py:full@STUDENT --workdir runs/recovered

STUDENT is the folder of the model to train, its weights not quantized; the routers of a split one,
whose choices pass no gradient, stay as they are. Its texts and its teacher come from its manifest:
what it was trained on, and the folder it was made from.
Others: --set distill.teacher=DIR, --set 'data.train_files=["FILE"]'. Variants, before the @:
  full       all weights; cross-entropy and KL a token, weight 1, temperature 2
  router     only the routers, KL alone at temperature 1 (Router-KD, arXiv 2603.02217)
  published  as MC-SMoE (arXiv 2310.01334): weight 0.2, summed KL, routers frozen, no router losses
  task       all weights, no teacher
  lora       routers, and a low rank of 8 beside every expert matrix (arXiv 2106.09685), folded in
             at the end; cross-entropy and KL as in full
  outputs    only the experts' output matrices, as MoEfication has it (arXiv 2110.01786)
  moebert    all weights; cross-entropy, symmetric KL and the difference of all hidden states, as
             MoEBERT (arXiv 2204.07675), whose weight of both is --set distill.weight=... and
             --set distill.hidden_weight=..., 1 to 5 there
  losparse   MC-SMoE's second half: as published, with experts as a low rank of 32 and a tenth of
             the outputs of the rest (arXiv 2306.11222); the model that is left is that small

Sharded and resumable as all training is. Steps, rate and batch are those of a small model: set
--set train.steps=... --set optim.learning_rate=... for others; of the rank and what is kept,
--set low_rank.rank=... --set low_rank.kept=...
"""

import dataclasses
import pathlib
from typing import Any

from moejax import config, evaluate, files, store
from moejax.errors import UserError, did_you_mean

VARIANTS = ('full', 'router', 'published', 'task', 'lora', 'outputs', 'moebert', 'losparse')
ROUTERS = r'.*/router/.*'
EXPERTS = r'.*/experts/(wi|gate|wo)'
OUTPUTS = r'.*/experts/wo'


def get_config(variant: str = '') -> config.Experiment:
  kind, found, folder = variant.partition('@')
  if kind not in VARIANTS or not found:
    raise UserError(
        f'configs/recover.py:{variant}: say VARIANT@FOLDER, a variant of {", ".join(VARIANTS)}'
        f'{did_you_mean(kind, VARIANTS)} and the folder of the model to train'
    )
  source = store.Source(files.require_folder(folder))
  if source.config.moe is None:
    raise UserError(f'{folder} has no experts')
  moe: Any = source.config.moe
  split = moe.selection is not None
  if split and kind == 'router':
    raise UserError(
        f'{folder} was split from a dense model: its routers choose without gates and learn '
        'nothing here; moefy fits them'
    )
  low_rank = config.LowRankConfig()
  optim = config.OptimConfig(
      learning_rate=1e-3 if kind in ('router', 'lora') else 1e-4, warmup_steps=16,
      schedule='linear', weight_decay=0.01,
  )
  distill = config.DistillConfig(teacher=_teacher(source), weight=1.0)
  if kind == 'router':
    optim = dataclasses.replace(optim, learning_rate_rules=((ROUTERS, 1.0), ('.*', 0.0)))
    distill = dataclasses.replace(distill, task_weight=0.0, temperature=1.0)
  elif kind in ('published', 'losparse'):
    optim = dataclasses.replace(
        optim, eps=1e-6, end_fraction=0.0,
        learning_rate_rules=((ROUTERS, 0.0), ('.*', 1.0)),
        weight_decay_rules=((r'.*relative_bias', 0.0), ('.*', 1.0)), clip_norm=0.0,
    )
    distill = dataclasses.replace(distill, weight=0.2, reduction='published')
  elif kind == 'lora':
    rules = ((ROUTERS, 1.0), (r'.*/(left|right)', 1.0), ('.*', 0.0))
    optim = dataclasses.replace(optim, learning_rate_rules=rules)
    low_rank = config.LowRankConfig(matrices=EXPERTS, rank=8, start='zeros', alpha=16.0)
  elif kind == 'task':
    distill = config.DistillConfig()
  elif kind == 'outputs':
    rules = ((OUTPUTS, 1.0), ('.*', 0.0))
    optim = dataclasses.replace(optim, learning_rate_rules=rules)
  elif kind == 'moebert':
    distill = dataclasses.replace(
        distill, temperature=1.0, symmetric=True, hidden_weight=1.0, hidden_form='layers'
    )
  if split:
    rules = tuple(rule for rule in optim.learning_rate_rules if rule[0] != ROUTERS)
    optim = dataclasses.replace(optim, learning_rate_rules=((ROUTERS, 0.0), *rules))
  if kind == 'losparse':
    low_rank = config.LowRankConfig(
        matrices=EXPERTS, kept=0.1, warmup_steps=8, settle_steps=32
    )
  if kind != 'task':
    moe = dataclasses.replace(moe, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
  return config.Experiment(
      model=dataclasses.replace(source.config, moe=moe), data=evaluate.data_config(folder),
      optim=optim, distill=distill, low_rank=low_rank, init_from=folder,
      train=config.TrainConfig(
          steps=200, batch_size=32, eval_every=100, checkpoint_every=100, log_every=10,
      ),
  )


def _teacher(source: store.Source) -> str:
  """The folder that the model was made from, or the teacher it had, if it is still there."""
  provenance = source.manifest.get('provenance') or {}
  for _ in range(16):  # What a split model was made from, not one that was split already.
    place = str(provenance.get('source', ''))
    if not place or not (pathlib.Path(place) / store.MANIFEST).is_file():
      break
    before = store.Source(place)
    if before.config.moe is None or before.config.moe.selection is None:
      break
    provenance = before.manifest.get('provenance') or {}
  trained = provenance.get('trained', {}).get('experiment', {})
  made_from = str(provenance.get('source', '') or trained.get('distill', {}).get('teacher', ''))
  return made_from if made_from and (pathlib.Path(made_from) / store.MANIFEST).is_file() else ''
