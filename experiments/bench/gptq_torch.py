"""Worker: the published batched GPTQ in PyTorch: same grid, block size, damping, two threads."""

import statistics
import time

import torch

from experiments.bench import gptq_jax, timing

BLOCK = 128


def factor(h_ecc: torch.Tensor, damping: float) -> torch.Tensor:
  """Upper Cholesky factor of the inverse of the damped Hessian."""
  h = h_ecc.clone()
  diagonal = h.diagonal(dim1=1, dim2=2)
  diagonal.add_(damping * diagonal.mean(-1, keepdim=True))
  return torch.linalg.cholesky(
      torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True
  )


def sweep(w_erc: torch.Tensor, u_ecc: torch.Tensor) -> torch.Tensor:
  """Columns in blocks; errors go to the rest of the block at once, further at its end."""
  w, columns = w_erc.clone(), w_erc.shape[2]
  low, high = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
  quantized, losses = torch.zeros_like(w), torch.zeros_like(w)
  for start in range(0, columns, BLOCK):
    end = min(start + BLOCK, columns)
    block, u = w[:, :, start:end].clone(), u_ecc[:, start:end, start:end]
    errors = torch.zeros_like(block)
    for i in range(end - start):
      x, pivot = block[:, :, i], u[:, i, i, None]
      q = torch.where(x > high / 2, high, torch.where(x < low / 2, low, torch.zeros_like(x)))
      quantized[:, :, start + i] = q
      losses[:, :, start + i] = (x - q) ** 2 / pivot**2 / 2
      error = (x - q) / pivot
      block[:, :, i:] -= error.unsqueeze(2).matmul(u[:, i, i:].unsqueeze(1))
      errors[:, :, i] = error
    w[:, :, end:] -= errors.matmul(u_ecc[:, start:end, end:])
  return quantized


def main() -> None:
  torch.set_num_threads(2)
  rows = []
  with torch.inference_mode():
    for outputs, inputs in gptq_jax.SHAPES:
      w, h = (torch.from_numpy(a) for a in gptq_jax.problem(outputs, inputs))
      times = []
      for _ in range(gptq_jax.REPEATS):
        start = time.perf_counter()
        u = factor(h, 0.1)
        middle = time.perf_counter()
        sweep(w, u)
        times.append((middle - start, time.perf_counter() - middle))
      factor_ms, sweep_ms = (statistics.median(t) * 1e3 for t in zip(*times))
      rows.append({
          'bench': f'GPTQ ternary, 16 experts, {outputs}x{inputs} (rows x columns)',
          'implementation': f'published algorithm, torch {torch.__version__}',
          'median_ms': factor_ms + sweep_ms, 'factorisation_ms': factor_ms,
          'outside_factorisation_ms': sweep_ms,
      })
  timing.emit(rows)


if __name__ == '__main__':
  main()
