"""A small GRIN and its rivals: equal active parameters and data.

  python -m experiments.train --config configs/grin_tiny.py:grin --workdir runs/grin

`python -m experiments.study` trains and compares all of them; a run is sized for about eight
minutes on two CPU cores, in float32, whose step took less than bfloat16's there. Variants, after a
colon, on the State of the Union speeches; with -mix after the name on speeches, essays and manuals
in equal parts (`python -m experiments.study.texts` fetches these):
  dense        no experts; a token meets the same FFN width as elsewhere
  switch       top-1 of 8 experts
  gshard       top-2 with its random second expert
  grin         SparseMixer-v2 top-2, global balance loss
  grin_local   the same with a local one
"""

from moejax import config
from moejax.errors import UserError, did_you_mean

SPEECHES = 'experiments/data/sotu.tar.xz::sotu/'
TRAIN = tuple(f'{SPEECHES}???{digit}_*.txt' for digit in '12346789')
VALID = (f'{SPEECHES}???5_*.txt',)

D_FF = 512


def moe(router: str, top_k: int, **kwargs) -> config.DecoderMoeConfig:
  return config.DecoderMoeConfig(
      num_experts=8, top_k=top_k, router=router, d_ff=D_FF * 2 // top_k, jitter_eps=0.1,
      router_aux_loss_coef=0.01, **kwargs,
  )


VARIANTS = {
    'dense': None,
    'switch': moe('switch', 1),
    'gshard': moe('gshard', 2),
    'grin': moe('sparsemixer_v2', 2),
    'grin_local': moe('sparsemixer_v2', 2, balance='local', balance_groups=8),
}


TEXTS = 'runs/study/texts'
CORPORA = {
    'speeches': config.DataConfig(train_files=TRAIN, valid_files=VALID, sequence_length=256),
    'mix': config.DataConfig(
        train_files=(f'{SPEECHES}???[12346789]_*.txt', f'{TEXTS}/essays/train',
                     f'{TEXTS}/manuals/train'),
        train_weights=(1.0, 1.0, 1.0),
        valid_files=(*VALID, f'{TEXTS}/essays/valid', f'{TEXTS}/manuals/valid'),
        sequence_length=256,
    ),
}


def get_config(variant: str = 'grin') -> config.Experiment:
  name, _, corpus = variant.partition('-')
  for given, known in ((name, VARIANTS), (corpus or 'speeches', CORPORA)):
    if given not in known:
      raise UserError(f'no variant {variant!r}{did_you_mean(given, known)}')
  return config.Experiment(
      model=config.DecoderConfig(
          family='grin', vocab_size=2048, d_model=256, d_head=64, d_ff=2 * D_FF, num_heads=4,
          num_kv_heads=2, num_layers=4, max_positions=256, norm='layer', eos_ids=(1,),
          moe=VARIANTS[name],
      ),
      data=CORPORA[corpus or 'speeches'],
      optim=config.OptimConfig(learning_rate=2e-3, schedule='wsd', warmup_steps=40,
                               decay_steps=100, weight_decay=0.1, b2=0.95),
      train=config.TrainConfig(
          steps=400, batch_size=8, eval_every=50, eval_batches=16, checkpoint_every=200,
          log_every=10,
      ),
  )
