"""Worker: the same forward pass by transformers on PyTorch, two threads."""

from typing import Any

import torch
import transformers

from experiments.bench import timing


def main() -> None:
  torch.manual_seed(0)
  torch.set_num_threads(2)
  sizes: dict[str, Any] = dict(
      vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_layers=12,
      num_decoder_layers=12, num_sparse_encoder_layers=6, num_sparse_decoder_layers=6,
      num_experts=8, expert_capacity=64, decoder_start_token_id=0,
  )
  config = transformers.SwitchTransformersConfig(**sizes)
  model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
  tokens = torch.randint(2, config.vocab_size, (2, 512))

  def fn():
    with torch.inference_mode():
      model(input_ids=tokens, decoder_input_ids=tokens, use_cache=False)

  timing.emit([{
      'bench': 'switch-base-8 forward',
      'implementation': f'transformers {transformers.__version__}, torch {torch.__version__}',
      **timing.median_ms(fn),
  }])


if __name__ == '__main__':
  main()
