"""Worker: the published batched GPTQ in PyTorch: the same grid, block size and damping."""

from typing import Any

import torch

from experiments.bench import gptq_problem, timing


def factor(h_ecc: torch.Tensor) -> torch.Tensor:
  """Upper Cholesky factor of the inverse of each damped Hessian, expert by expert."""
  u_ecc = torch.empty_like(h_ecc)
  for u, h in zip(u_ecc, h_ecc):
    damped = h.clone()
    damped.diagonal().add_((gptq_problem.DAMPING * h.diagonal().mean()).clamp(min=1e-6))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    torch.linalg.cholesky(inverse, upper=True, out=u)
  return u_ecc


def sweep(w_erc: torch.Tensor, u_ecc: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  """Quantized weights and losses, columns in blocks.

  A column's error goes to the rest of its block at once, to later blocks when the block is done.
  """
  w, columns = w_erc.clone(), w_erc.shape[2]
  low, high = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
  quantized, losses, zero = torch.zeros_like(w), torch.zeros_like(w), torch.zeros(())
  for start in range(0, columns, gptq_problem.BLOCK):
    end = min(start + gptq_problem.BLOCK, columns)
    block, u = w[:, :, start:end].clone(), u_ecc[:, start:end, start:end]
    errors = torch.zeros_like(block)
    for i in range(end - start):
      x, pivot = block[:, :, i], u[:, i, i, None]
      q = torch.where(x > high / 2, high, torch.where(x < low / 2, low, zero))
      quantized[:, :, start + i] = q
      losses[:, :, start + i] = (x - q) ** 2 / pivot**2
      error = (x - q) / pivot
      block[:, :, i:] -= error.unsqueeze(2).matmul(u[:, i, i:].unsqueeze(1))
      errors[:, :, i] = error
    w[:, :, end:] -= errors.matmul(u_ecc[:, start:end, end:])
  return quantized, losses


def shape_rows(experts: int, shape: tuple[int, int]) -> list[dict[str, Any]]:
  w, h = (torch.from_numpy(a) for a in gptq_problem.problem(experts, *shape))
  u = factor(h)
  quantized, losses = sweep(w, u)
  work = {
      'damped_error': float(losses.sum(dtype=torch.float64)),
      'zero_share': float((quantized == 0).float().mean()),
  }
  return gptq_problem.rows(
      shape, experts, f'torch {torch.__version__}', lambda: factor(h), lambda: sweep(w, u), work,
      ours=False,
  )


@torch.inference_mode()
def main(quick: bool) -> list[dict[str, Any]]:
  torch.set_num_threads(timing.cpus())
  experts, shapes = gptq_problem.sizes(quick)
  return [row for shape in shapes for row in shape_rows(experts, shape)]


if __name__ == '__main__':
  timing.run(main)
