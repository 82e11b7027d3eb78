"""Two neighbours of MoEfication, shown: cheap answers with a full model behind, and an ensemble.

ARI (arXiv 2408.14528): the first hidden word of a text, by a cheap model where it is sure and by
the full one elsewhere; the margin comes from one half of the texts, figures from the other. Pairs:
a Switch Transformer and its ternary form, a dense T5 and one that runs a tenth of its neurons.
E^3 (arXiv 2110.03360): the Switch Transformer read as an ensemble of disjoint halves of its
experts, as it is and after a short training for it, and after the same training without.

Example:
  python -m experiments.adaptive --dense runs/t5/model
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import os
import pathlib
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from configs import sotu_switch16
from experiments import flags as common
from experiments import pages
from experiments.bench import suites
from experiments.fewer import problems
from moejax import config as config_lib
from moejax import errors, evaluate, files, sharding, store
from moejax.compress import compress
from moejax.compress.moefy import moefy
from moejax.compress.quantize import qmoe
from moejax.data import layout, text
from moejax.data import tokenizer as tokenizer_lib
from moejax.evaluate import adaptive
from moejax.evaluate.ensemble import ensemble
from moejax.model import Model
from moejax.train import optim
from moejax.train import state as state_lib
from moejax.train import step as step_lib

_SPARSE = flags.DEFINE_string(
    'sparse', 'experiments/checkpoints/sotu-switch-16', 'Folder of a Switch Transformer.'
)
_DENSE = flags.DEFINE_string('dense', 'runs/t5/model', 'Folder of a dense encoder-decoder.')
_TRAIN = flags.DEFINE_multi_string(
    'calibration', list(sotu_switch16.TRAIN), 'Text that compression and training see.'
)
_TEST = flags.DEFINE_multi_string('test', list(sotu_switch16.TEST), 'Text that is measured.')
_SAMPLES = flags.DEFINE_integer('samples', 256, 'For calibration.', lower_bound=1)
_TESTS = flags.DEFINE_integer('test_samples', 1024, 'Texts of --test.', lower_bound=4)
_STEPS = flags.DEFINE_integer('steps', 200, 'Of the training for E^3.', lower_bound=1)
_SHARE = flags.DEFINE_float('share', 0.1, 'Of the neurons that the cheap dense model runs.')
_OUT = flags.DEFINE_string('out', 'experiments/evidence/adaptive.json', 'Where figures go.')
_PAGE = flags.DEFINE_string('page', 'experiments/RESULTS_ADAPTIVE.md', 'Where the page goes.')
# Of the margins of answers that change; 100 changes none of the texts it is found on.
PERCENTILES = (100, 99, 95, 80)
_ROWS = 32


def first_words(model: Model, batches: Sequence[Mapping[str, Any]]) -> np.ndarray:
  """Scores of the first hidden word of each text, float32 [n, v]: what follows its sentinel."""
  out = []
  for start in range(0, len(batches), _ROWS):
    some = batches[start : start + _ROWS]
    rows = {k: np.concatenate([b[k] for b in some]) for k in ('encoder_tokens', 'decoder_tokens')}
    fill = _ROWS - len(some)
    rows = {k: np.pad(a, ((0, fill), (0, 0)), mode='edge') for k, a in rows.items()}
    scores = _scores(model.config, model.params, **rows)
    out.append(np.asarray(scores)[: len(some)])
  return np.concatenate(out)


@functools.partial(jax.jit, static_argnames=('config',))
def _scores(config, params, encoder_tokens, decoder_tokens):
  output = Model(config, params).apply(
      encoder_tokens, decoder_tokens[:, :2], encoder_mask=encoder_tokens != config.pad_id
  )
  return output.logits_btv[:, 1].astype(jnp.float32)


def ari(problem: problems.Problem, step: Any, work: str) -> dict[str, Any]:
  """A model and what a step makes of it, one behind the other.

  work: the part of a report that says what the cheap model saves.
  """
  made = compress(
      problem.folder, step, problem.calibration(_SAMPLES.value, 0), sentinel=problem.sentinel
  )
  cost = made.report['after'][work] / made.report['before'][work]
  full = first_words(Model.load(problem.folder), problem.validation)
  cheap = first_words(made.model, problem.validation)
  half = len(full) // 2
  rows = {}
  for percentile in PERCENTILES:
    threshold = adaptive.calibrate(cheap[:half], full[:half], percentile=percentile)
    rows[str(percentile)] = dataclasses.asdict(
        adaptive.account(cheap[half:], full[half:], threshold, cost=cost)
    )
  return {'cost': cost, 'work': work, 'texts': len(full) - half, 'rows': rows}


def ensemble_loss(model: Model, batches: Sequence[Mapping[str, Any]], members: int) -> float:
  """Cross-entropy over the targets, in nats; of the members' mean probabilities."""
  run, total, weight = ensemble(model, members), 0.0, 0.0
  predict = jax.jit(lambda x, y: run(x, y, encoder_mask=x != model.config.pad_id))
  for batch in batches:
    log_probs = np.asarray(predict(batch['encoder_tokens'], batch['decoder_tokens']))
    own = np.take_along_axis(log_probs, batch['targets'][..., None], -1)[..., 0]
    total -= float((own * batch['weights']).sum())
    weight += float(batch['weights'].sum())
  return total / weight


def trained(folder: pathlib.Path, members: int) -> Model:
  """The model after --steps, for an ensemble of so many members."""
  model, data = Model.load(folder), evaluate.data_config(folder)
  tokenizer = tokenizer_lib.load(str(folder))
  batches = layout.make_batches(
      model.config, data, text.documents(list(_TRAIN.value)), tokenizer, batch_size=16
  )
  experiment = config_lib.Experiment(
      model=model.config, data=data, mesh=config_lib.MeshConfig(data=1),
      optim=config_lib.OptimConfig(learning_rate=1e-4, warmup_steps=10, schedule='constant'),
      train=config_lib.TrainConfig(steps=_STEPS.value, batch_size=16, members=members),
  )
  mesh = sharding.make_mesh(experiment.mesh)
  optimizer = optim.make_optimizer(
      experiment.optim, _STEPS.value, state_lib.abstract_params(experiment)
  )
  places = state_lib.shardings(state_lib.abstract(experiment, optimizer), mesh)
  step = step_lib.jit_train_step(experiment, optimizer, mesh, places)
  state = state_lib.init(experiment, optimizer, mesh, model.params)
  for i in range(_STEPS.value):
    state, _ = step(state, jax.device_put(batches.batch(i), sharding.batch_sharding(mesh)))
  return Model(model.config, jax.device_get(state.params))


def of_experts(problem: problems.Problem) -> dict[str, Any]:
  """Losses of the Switch Transformer: alone, in two and in four, before and after training."""
  batches = [
      {name: np.concatenate([b[name] for b in problem.validation[i : i + 16]])
       for name in problem.validation[0]}
      for i in range(0, min(len(problem.validation), 256), 16)
  ]
  found: dict[str, Any] = {}
  before = Model.load(problem.folder)
  for words, model in (
      ('before', before), ('trained as it is', trained(problem.folder, 1)),
      ('trained in two', trained(problem.folder, 2)),
  ):
    found[words] = {str(n): ensemble_loss(model, batches, n) for n in (1, 2, 4)}
  return found


def page(result: Mapping[str, Any]) -> str:
  """The page, without what is written by hand."""
  machine, parts = result['machine'], []
  for title, own in result['ari'].items():
    lines = ['| percentile | margin | run again | same answer | without: | work saved |',
             '|---|---|---|---|---|---|']
    lines += [
        f'| {p} | {row["threshold"]:.3f} | {row["rerun"]:.1%} | {row["agreement"]:.1%} | '
        f'{1 - row["changed"]:.1%} | {row["saved"]:.1%} |'
        for p, row in own['rows'].items()
    ]
    parts.append(
        f'## {title}\n\nThe cheap model takes {own["cost"]:.0%} of the full one\'s '
        f'{own["work"].replace("_", " ")}; {own["texts"]} texts.\n\n' + '\n'.join(lines) + '\n'
    )
  e3 = result['ensemble']
  lines = ['| | one | two members | four members |', '|---|---|---|---|']
  lines += [f'| {words} | ' + ' | '.join(f'{x:.3f}' for x in own.values()) + ' |'
            for words, own in e3.items()]
  return (
      '# A cheap model with a full one behind it, and an ensemble of experts\n\n'
      f'Written by `python -m experiments.adaptive` on {machine["cpu"]}, {machine["cores"]} cores, '
      f'jax {result["jax"]}.\nThe answer is the first hidden word of a text. The margin below '
      'which the full model is asked is that percentile\nof the margins of answers that change, on '
      'other texts. "Without" is the cheap model alone.\n\n' + '\n'.join(parts)
      + f'\n## E^3\n\nLoss in nats a target; the training is {result["steps"]} steps.\n\n'
      + '\n'.join(lines) + '\n'
  )


def main() -> None:
  out, path = pathlib.Path(_OUT.value), pathlib.Path(_PAGE.value)
  for place in (out, path):
    files.require_writable(place)
  sources = {}
  for name, flag in (('sparse', _SPARSE), ('dense', _DENSE)):
    folder = files.require_folder(flag.value)
    config = store.Source(folder).config
    if config.stacks != ('encoder', 'decoder') or (config.moe is None) == (name == 'sparse'):
      raise errors.UserError(f'--{name} {folder}: a {config.family} is no such model; see --help')
    sources[name] = problems.of_texts(folder, _TRAIN.value, _TEST.value, _TESTS.value, 1)
  result = {
      'machine': suites.machine(), 'jax': jax.__version__, 'sparse': _SPARSE.value,
      'dense': _DENSE.value, 'samples': _SAMPLES.value, 'steps': _STEPS.value,
      'ari': {
          'Ternary experts, the model before behind': ari(
              sources['sparse'], qmoe(), 'stored_bytes'
          ),
          f'{_SHARE.value:.0%} of the neurons, the dense model behind': ari(
              sources['dense'], moefy(expert_size=32, share=_SHARE.value, calibrate=True),
              'flops_per_token',
          ),
      },
      'ensemble': of_experts(sources['sparse']),
  }
  files.write_json(out, result)
  pages.write(path, page(result))
  print(os.path.relpath(path))


if __name__ == '__main__':
  common.run(main, __doc__)
