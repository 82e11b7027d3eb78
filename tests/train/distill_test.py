"""Distillation losses against MC-SMoE's recorded ones, and what sets the sane reduction apart."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.train import distill
from moejax.train import step as step_lib

DATA = dict(np.load(Path(__file__).parents[1] / 'vectors' / 'mcsmoe' / 'kd_loss.npz'))
CASES = {  # temperature, weight of the logits', weight and form of the hidden states'
    'readme': (2.0, 0.2, 0.0, 'mse'), 'T1': (1.0, 1.0, 0.0, 'mse'),
    'hidden': (2.0, 0.2, 0.01, 'mse'), 'hidden_cos': (2.0, 0.2, 0.01, 'cosine'),
}


@pytest.mark.parametrize('case', CASES)
def test_recorded_losses(case):
  temperature, on_logits, on_hidden, form = CASES[case]
  student, teacher = jnp.asarray(DATA['student_logits']), jnp.asarray(DATA['teacher_logits'])
  logits = on_logits * distill.logit_loss(
      student, teacher, temperature=temperature, reduction='published'
  )
  np.testing.assert_allclose(logits, DATA[f'{case}/kd_loss'], rtol=1e-5)
  states = lambda who: [DATA[f'{who}_{stack}_hidden'] for stack in ('enc', 'dec')]
  hidden = on_hidden * distill.hidden_loss(states('student'), states('teacher'), form)
  np.testing.assert_allclose(hidden, DATA[f'{case}/hd_loss'], rtol=1e-5, atol=1e-8)
  labels = jnp.asarray(DATA['in/labels'], jnp.int32)
  each, _ = step_lib.cross_entropy(student, jnp.maximum(labels, 0))
  task = jnp.sum(each * (labels >= 0)) / jnp.sum(labels >= 0)
  np.testing.assert_allclose(task + logits + hidden, DATA[f'{case}/loss'], rtol=1e-5)


def test_by_token_neither_length_nor_padding_nor_a_small_temperature_step_counts():
  student, teacher = jnp.asarray(DATA['student_logits']), jnp.asarray(DATA['teacher_logits'])
  loss = distill.logit_loss(student, teacher)
  twice = [jnp.concatenate([a, a], 1) for a in (student, teacher)]
  np.testing.assert_allclose(distill.logit_loss(*twice), loss, rtol=1e-5)
  published = lambda *a: distill.logit_loss(*a, reduction='published')
  np.testing.assert_allclose(published(*twice), 2 * published(student, teacher), rtol=1e-5)
  weights = jnp.concatenate([jnp.ones((4, 6)), jnp.zeros((4, 6))], 1)
  padded = jnp.concatenate([student, 50 + student[:, ::-1] ** 2], 1)
  np.testing.assert_allclose(
      distill.logit_loss(padded, twice[1], weights), loss, rtol=1e-5
  )
  assert float(distill.logit_loss(student, teacher, jnp.zeros((4, 6)))) == 0
  # For logits close to each other T^2 takes out what T does to gradients.
  near = teacher + 1e-2 * (student - teacher)
  size = lambda t: jnp.linalg.norm(
      jax.grad(lambda s: distill.logit_loss(s, teacher, temperature=t))(near)
  )
  assert 0.5 < float(size(4.0) / size(8.0)) < 2


def test_moeberts_losses_are_those_of_its_formulas():
  student, teacher = (np.asarray(DATA[f'{who}_logits'], np.float64)
                      for who in ('student', 'teacher'))
  softmax = lambda a: np.exp(a) / np.exp(a).sum(-1, keepdims=True)
  p, q = softmax(student), softmax(teacher)
  want = 0.5 * ((p - q) * (np.log(p) - np.log(q))).sum(-1).mean()
  got = distill.logit_loss(student, teacher, temperature=1.0, symmetric=True)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  ours, theirs = ([draw(3, 2, 5, 4), draw(2, 2, 7, 4)] for _ in range(2))
  want = sum(float(((a - b) ** 2).mean()) for s, t in zip(ours, theirs) for a, b in zip(s, t))
  np.testing.assert_allclose(distill.hidden_loss(ours, theirs, 'layers'), want, rtol=1e-5)


def test_the_teacher_itself_has_no_loss():
  teacher = jnp.asarray(DATA['teacher_logits'])
  value, grad = jax.value_and_grad(distill.logit_loss)(teacher, teacher)
  assert abs(float(value)) < 1e-6
  np.testing.assert_allclose(grad, 0, atol=1e-6)


@pytest.mark.parametrize('call, message', [
    (lambda a: distill.logit_loss(a, a, reduction='tokens'), "did you mean 'token'"),
    (lambda a: distill.logit_loss(a, a, temperature=0.0), r'temperature = 0\.0: above 0'),
    (lambda a: distill.hidden_loss([a], [a], 'mle'), "did you mean 'mse'"),
    (lambda a: distill.hidden_loss([a], [a[:1]]), r'hidden states \[\(2, 3, 4\)\] of the student'),
])
def test_bad_values(call, message):
  with pytest.raises(UserError, match=message):
    call(jnp.ones((2, 3, 4)))


def test_equal_states_have_a_finite_loss_and_no_gradient():
  x = jnp.ones((2, 3, 4))
  for form in distill.FORMS:
    loss, grad = jax.value_and_grad(lambda a, form=form: distill.hidden_loss([a], [x], form))(x)
    assert np.isfinite(loss) and np.isfinite(np.asarray(grad)).all(), form
