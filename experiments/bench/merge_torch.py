"""Worker: usage and router similarity as loops over tokens and pairs of experts, in PyTorch.

That is how MC-SMoE's published code counts them: a step of Python a token, a cosine a pair, on the
logits of all tokens, which are kept.
"""

from typing import Any

import numpy as np
import torch

from experiments.bench import timing


def looped(logits_me: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  experts = logits_me.shape[1]
  usage, similarity = torch.zeros(experts), torch.eye(experts)
  for choice in logits_me.argmax(1):
    usage[choice] += 1
  for i in range(experts):
    for j in range(i + 1, experts):
      cosine = torch.nn.functional.cosine_similarity(logits_me[:, i], logits_me[:, j], dim=0)
      similarity[i, j] = similarity[j, i] = (cosine + 1) / 2
  return usage / usage.sum(), similarity


def main(quick: bool) -> list[dict[str, Any]]:
  torch.set_num_threads(timing.cpus())
  tokens, experts = 20_000 if quick else 1_000_000, 32
  logits = torch.from_numpy(
      np.random.default_rng(0).standard_normal((tokens, experts), np.float32)
  )
  found: list[tuple[torch.Tensor, torch.Tensor]] = []
  seconds = timing.measure(
      {'loops in PyTorch': lambda: found.append(looped(logits))}, repeats=1, warmup=0
  )
  usage, similarity = found[0]
  return [timing.row(
      f'{tokens:,} tokens, {experts} experts', 'usage and router similarity', name, samples,
      ours=False,
      work={'usage': float((usage**2).sum()), 'similarity': float(similarity.sum())},
  ) for name, samples in seconds.items()]


if __name__ == '__main__':
  timing.run(main)
