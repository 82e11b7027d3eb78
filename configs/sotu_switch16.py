"""A small Switch Transformer (16 experts, 19.7M parameters) on the State of the Union speeches.

The demo's checkpoint. Two phases, since two cores have to do: half of all tokens masked first, so
that each step teaches the decoder four times as much, then T5's 15 % until the rate reaches zero.

  python -m experiments.train --config configs/sotu_switch16.py:warm --workdir runs/sotu_warm
  python -m experiments.train --config configs/sotu_switch16.py --workdir runs/sotu \
      --set init_from=runs/sotu_warm/model --set data.tokenizer=runs/sotu_warm/model

Embeddings are untied: with T5's unit-variance tied ones every token at first predicts itself, and
the same loss took three times as many steps. Hardware, time and result are in
experiments/checkpoints/sotu-switch-16/README.md.
"""

from moejax import config

SPEECHES = 'experiments/data/sotu.tar.xz::sotu/'
TRAIN = tuple(f'{SPEECHES}???{digit}_*.txt' for digit in '12346789')
VALID = (f'{SPEECHES}???5_*.txt',)
TEST = (f'{SPEECHES}???0_*.txt',)

MODEL = config.ModelConfig(
    family='switch', vocab_size=2048, d_model=256, d_kv=32, d_ff=1024, num_heads=4,
    num_layers=2, num_decoder_layers=2, tie_embeddings=False, dropout_rate=0.0,
    moe=config.MoeConfig(
        num_experts=16, router_aux_loss_coef=0.04, router_ignore_padding_tokens=True
    ),
)


def get_config(variant: str = '') -> config.Experiment:
  """The second phase; 'warm' is the first."""
  warm = variant == 'warm'
  return config.Experiment(
      model=MODEL,
      data=config.DataConfig(
          train_files=TRAIN, valid_files=VALID, encoder_length=128,
          noise_density=0.5 if warm else 0.15,
      ),
      optim=config.OptimConfig(
          learning_rate=2e-3 if warm else 1.5e-3, schedule='constant' if warm else 'cosine',
          warmup_steps=200, end_fraction=0.0, weight_decay=0.01,
      ),
      train=config.TrainConfig(
          steps=6000, batch_size=16 if warm else 32, compute_dtype='bfloat16', eval_every=500,
          checkpoint_every=500, log_every=50, save_dtype='float32' if warm else 'bfloat16',
      ),
  )
