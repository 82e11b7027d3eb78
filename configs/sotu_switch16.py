"""A small Switch Transformer (16 experts, 18.9M parameters) on the State of the Union speeches.

The demo's checkpoint, in 45 minutes on two CPU cores.

  python -m experiments.train --config configs/sotu_switch16.py --workdir runs/sotu

Hours on two cores have to do, so three choices differ from T5's. Embeddings are untied: with
unit-variance tied ones every token at first predicts itself. Rates are relative to each parameter's
size, and the start is aligned (`moejax.nn.aligned`): with plain AdamW from T5's start the decoder
learned its bigrams and nothing else while the encoder collapsed to a constant. The vocabulary has
512 ids (2.1 bytes a token), since a step teaches about 1,000 tokens. Hardware, time and result:
experiments/checkpoints/sotu-switch-16/README.md.
"""

from moejax import config

SPEECHES = 'experiments/data/sotu.tar.xz::sotu/'
TRAIN = tuple(f'{SPEECHES}???{digit}_*.txt' for digit in '12346789')
VALID = (f'{SPEECHES}???5_*.txt',)
TEST = (f'{SPEECHES}???0_*.txt',)

MODEL = config.EncDecConfig(
    family='switch', vocab_size=512, d_model=256, d_kv=32, d_ff=1024, num_heads=4,
    num_layers=2, num_decoder_layers=2, tie_embeddings=False, dropout_rate=0.0,
    moe=config.EncDecMoeConfig(
        num_experts=16, router_aux_loss_coef=0.02, router_ignore_padding_tokens=True
    ),
)


def get_config() -> config.Experiment:
  return config.Experiment(
      model=MODEL,
      data=config.DataConfig(
          train_files=TRAIN, valid_files=VALID, encoder_length=64, num_sentinels=64
      ),
      optim=config.OptimConfig(
          learning_rate=2e-2, scale_by_param_rms=True, schedule='wsd', warmup_steps=100,
          decay_steps=1500, weight_decay=0.01,
      ),
      train=config.TrainConfig(
          steps=6000, batch_size=64, compute_dtype='bfloat16', aligned_start=True,
          eval_every=250, checkpoint_every=250, log_every=50, save_dtype='bfloat16',
      ),
  )
