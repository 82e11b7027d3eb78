"""Worker: the same by transformers on PyTorch, with its default experts implementation."""

from typing import Any

import torch
import transformers

from experiments.bench import decoder_problem as problem
from experiments.bench import timing


def load(folder: str) -> Any:
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def who() -> str:
  return f'transformers {transformers.__version__}'


def forward_rows(model: Any, quick: bool) -> list[dict[str, Any]]:
  batch, length = problem.text_shape(quick)
  tokens = torch.tensor(problem.tokens(quick, batch, length)).long()
  rows = []
  for dtype in problem.DTYPES:
    model = model.to(getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def call(model=model):
      return model(input_ids=tokens, use_cache=False).logits

    work = {'mean_logit_size': float(call().abs().mean())} if dtype == 'float32' else {}
    samples = timing.measure({'forward': call}, repeats=7)['forward']
    rows.append(timing.row(
        f'{dtype}, {batch} x {length} tokens', 'forward pass', who(), samples, ours=False,
        work=work,
    ))
  return rows


def training_rows(model: Any, quick: bool) -> list[dict[str, Any]]:
  """AdamW in float32; bfloat16 by autocast, so that the weights stay float32 as in ours."""
  batch, length = problem.text_shape(quick)
  tokens = torch.tensor(problem.tokens(quick, batch, length)).long()
  model = model.train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
  rows = []
  for dtype in problem.dtypes_where_slow(quick):

    def call(dtype=dtype):
      with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
      loss.backward()
      optimizer.step()
      optimizer.zero_grad(set_to_none=True)

    samples = timing.measure({'step': call}, repeats=7)['step']
    rows.append(timing.row(
        f'{dtype}, {batch} x {length} tokens', 'training step', who(), samples, ours=False,
    ))
  return rows


def decoding_rows(model: Any, quick: bool) -> list[dict[str, Any]]:
  rows = []
  for dtype in problem.dtypes_where_slow(quick):
    model = model.to(getattr(torch, dtype)).eval()
    for batch in (1, 8):
      prompts = torch.tensor(problem.tokens(quick, batch, problem.PROMPT)).long()

      @torch.inference_mode()
      def call(model=model, prompts=prompts):
        return model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0,
            min_new_tokens=problem.NEW, max_new_tokens=problem.NEW, eos_token_id=None,
        )[:, problem.PROMPT:]

      work = {'sum_of_tokens': float(call().sum())} if dtype == 'float32' else {}
      samples = timing.measure({'decode': call}, repeats=5)['decode']
      rows.append(timing.row(
          f'{dtype}, batch {batch}', f'{problem.NEW} tokens after {problem.PROMPT}, greedy', who(),
          samples, ours=False, work=work,
      ))
  return rows


def main(quick: bool) -> list[dict[str, Any]]:
  torch.set_num_threads(timing.cpus())
  rows = []
  for part in (forward_rows, decoding_rows, training_rows):
    with problem.folder(quick) as folder:
      rows += part(load(folder), quick)
  return rows


if __name__ == '__main__':
  timing.run(main)
