"""Worker: a Phi-MoE's forward pass, training step and greedy decoding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import decoder_problem as problem
from experiments.bench import timing, train_call
from moejax import convert, generate, tree
from moejax.model import Model


def forward_rows(model: Model, quick: bool) -> list[dict[str, Any]]:
  batch, length = problem.text_shape(quick)
  tokens = jnp.asarray(problem.tokens(quick, batch, length))
  rows = []
  for dtype in problem.DTYPES:
    params = tree.cast_floats(model.params, jnp.dtype(dtype))
    own = Model(model.config, params)
    call = lambda own=own, dtype=dtype: jax.block_until_ready(
        own.apply(tokens, dtype=jnp.dtype(dtype)).logits_btv
    )
    work = {'mean_logit_size': float(jnp.abs(call()).mean())} if dtype == 'float32' else {}
    samples = timing.measure({'forward': call}, repeats=7)['forward']
    rows.append(timing.row(
        f'{dtype}, {batch} x {length} tokens', 'forward pass', 'moejax', samples, ours=True,
        work=work,
    ))
  return rows


def training_rows(model: Model, quick: bool) -> list[dict[str, Any]]:
  batch, length = problem.text_shape(quick)
  data = train_call.batch_of(quick, batch, length)
  rows = []
  for dtype in problem.dtypes_where_slow(quick):
    call = train_call.training_step(
        train_call.experiment(model.config, batch, dtype), data, model.params
    )
    samples = timing.measure({'step': call}, repeats=7)['step']
    rows.append(timing.row(
        f'{dtype}, {batch} x {length} tokens', 'training step', 'moejax', samples, ours=True,
    ))
    del call
  return rows


def decoding_rows(model: Model, quick: bool) -> list[dict[str, Any]]:
  rows = []
  for dtype in problem.dtypes_where_slow(quick):
    own = dataclasses.replace(model, params=tree.cast_floats(model.params, jnp.dtype(dtype)))
    for batch in (1, 8):
      prompts = problem.tokens(quick, batch, problem.PROMPT).tolist()
      call = lambda own=own, prompts=prompts, dtype=dtype: generate.generate(
          own, prompts, max_new_tokens=problem.NEW, stop_ids=(), dtype=dtype
      )
      work = {'sum_of_tokens': float(call().tokens.sum())} if dtype == 'float32' else {}
      samples = timing.measure({'decode': call}, repeats=5)['decode']
      rows.append(timing.row(
          f'{dtype}, batch {batch}', f'{problem.NEW} tokens after {problem.PROMPT}, greedy',
          'moejax', samples, ours=True, work=work,
      ))
  return rows


def main(quick: bool) -> list[dict[str, Any]]:
  with problem.folder(quick) as folder:
    model = convert.load(folder)
  return forward_rows(model, quick) + decoding_rows(model, quick) + training_rows(model, quick)


if __name__ == '__main__':
  timing.run(main)
