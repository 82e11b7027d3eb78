"""Worker: the same forward pass by transformers on PyTorch."""

from typing import Any

import torch
import transformers

from experiments.bench import timing

BASE = dict(
    vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_heads=12, num_layers=12,
    num_decoder_layers=12, num_sparse_encoder_layers=6, num_sparse_decoder_layers=6,
)
SMALL = dict(
    vocab_size=96, d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=2, num_decoder_layers=2,
    num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
)


def expert_loads(model: Any, call) -> list[int]:
  """Tokens that each expert of each layer processes in call(), from the routers' masks."""
  loads: list[int] = []
  routers = [m for m in model.modules() if type(m).__name__ == 'SwitchTransformersTop1Router']
  hooks = [
      r.register_forward_hook(lambda _, __, out: loads.extend(out[0].sum((0, 1)).tolist()))
      for r in routers
  ]
  call()
  for hook in hooks:
    hook.remove()
  return loads


def main(quick: bool) -> list[dict[str, Any]]:
  batch, length = (2, 16) if quick else (2, 512)
  torch.manual_seed(0)
  torch.set_num_threads(timing.cpus())
  sizes: dict[str, Any] = dict(
      SMALL if quick else BASE, num_experts=8, expert_capacity=length, decoder_start_token_id=0
  )
  config = transformers.SwitchTransformersConfig(**sizes)
  model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
  tokens = torch.randint(2, config.vocab_size, (batch, length))

  @torch.inference_mode()
  def call():
    return model(input_ids=tokens, decoder_input_ids=tokens, use_cache=False).logits

  loads = expert_loads(model, call)
  work = {
      'parameters': sum(p.numel() for p in model.parameters()),
      'logits': call().numel(),
      'tokens_through_experts': sum(loads),
  }
  samples = timing.measure({'forward': call}, repeats=7)['forward']
  case = f'{batch} x {length} encoder and decoder tokens'
  return [timing.row(
      case, 'forward pass', f'transformers {transformers.__version__}', samples, ours=False,
      work=work, busiest_expert=max(loads), threads=torch.get_num_threads(),
      attention=model.config._attn_implementation,
  )]


if __name__ == '__main__':
  timing.run(main)
