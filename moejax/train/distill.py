"""Distillation from a teacher: losses on logits and hidden states (MC-SMoE, 2310.01334, 3.1)."""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp

from moejax.errors import UserError, did_you_mean

REDUCTIONS = ('token', 'published')
FORMS = ('mse', 'cosine', 'layers')


def logit_loss(
    student_btv: jax.Array, teacher_btv: jax.Array, weights_bt: jax.Array | None = None, *,
    temperature: float = 2.0, reduction: str = 'token', symmetric: bool = False,
) -> jax.Array:
  """KL(softmax(teacher / T) | softmax(student / T)), a float32 scalar in nats.

  Args:
    weights_bt: of positions, 0 for padding; None for ones.
    reduction: 'token', a weighted mean over positions times T^2, so that neither the length of a
      text nor T changes how much the loss counts; 'published', the sum over all positions, padding
      too, over the batch size and without T^2, so that it grows with the length.
    symmetric: the mean of KL in both directions (MoEBERT, arXiv 2204.07675).

  Raises:
    UserError: an unknown reduction, or a temperature that is not positive.
  """
  if reduction not in REDUCTIONS:
    raise UserError(
        f'reduction = {reduction!r}: one of {REDUCTIONS}{did_you_mean(reduction, REDUCTIONS)}'
    )
  if not temperature > 0:
    raise UserError(f'temperature = {temperature}: above 0')
  student, teacher = (
      jax.nn.log_softmax(a.astype(jnp.float32) / temperature, axis=-1)
      for a in (student_btv, teacher_btv)
  )
  apart = teacher - student
  kl_bt = jnp.sum(jnp.exp(teacher) * apart, axis=-1)
  if symmetric:
    kl_bt = (kl_bt - jnp.sum(jnp.exp(student) * apart, axis=-1)) / 2
  if reduction == 'published':
    return kl_bt.sum() / kl_bt.shape[0]
  weights = jnp.ones_like(kl_bt) if weights_bt is None else weights_bt.astype(jnp.float32)
  return temperature**2 * jnp.sum(kl_bt * weights) / jnp.maximum(jnp.sum(weights), 1e-9)


def hidden_loss(
    student: Sequence[jax.Array], teacher: Sequence[jax.Array], form: str = 'mse'
) -> jax.Array:
  """How far hidden states are apart, as published.

  Args:
    student, teacher: a stack's states [..., t, d] each; layers may be stacked in front.
    form: 'mse', the natural logarithm of the mean squared difference, a mean over stacks inside of
      it; 'cosine', (1 - cos) / 2, a mean over stacks; 'layers', the mean squared difference of
      each layer, added up over all layers of all stacks (MoEBERT, arXiv 2204.07675).

  Raises:
    UserError: an unknown form, or stacks that do not match.
  """
  if form not in FORMS:
    raise UserError(f'form = {form!r}: one of {FORMS}{did_you_mean(form, FORMS)}')
  if [s.shape for s in student] != [t.shape for t in teacher]:
    raise UserError(
        f'hidden states {[s.shape for s in student]} of the student do not match '
        f'{[t.shape for t in teacher]} of the teacher'
    )
  if form == 'layers':
    return sum((
        jnp.mean(jnp.square(s.astype(jnp.float32) - t.astype(jnp.float32)).reshape(-1, n), -1).sum()
        for s, t in zip(student, teacher) for n in [math.prod(s.shape[-3:])]
    ), jnp.float32(0))
  distance = _mse if form == 'mse' else _cosine
  mean = jnp.mean(jnp.stack([
      distance(s.astype(jnp.float32), t.astype(jnp.float32)) for s, t in zip(student, teacher)
  ]))
  # Of equal states the logarithm has no value, and no gradient.
  return jnp.log(jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)) if form == 'mse' else mean


def _mse(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.mean((a - b) ** 2)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return (1 - jnp.mean(jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-8))) / 2
