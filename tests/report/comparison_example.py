"""A made-up comparison with every part a report can have."""

import math
from typing import Any


def sizes(expert_bits: float) -> dict[str, Any]:
  expert = int(16.8e6 * expert_bits / 8)
  parts = {
      'experts': expert, 'embedding': 2097152, 'attention': 1572864, 'dense_ffn': 2097152,
      'router': 16384, 'norms_and_biases': 4096,
  }
  return {
      'stored_bytes': sum(parts.values()), 'expert_bytes': expert, 'bytes_by_part': parts,
      'parameters': 19_700_000, 'active_parameters_per_token': 4_000_000,
      'flops_per_token': 6.1e6, 'expert_bits_per_weight': expert_bits, 'loss': 3.9,
  }


def layers(error: float, zeros: float) -> list[dict[str, Any]]:
  return [
      {'path': f'{stack}/layers_1/ffn/experts/{name}', 'expert': e, 'transform': 'quantize',
       'bits_per_weight': 0.8, 'zeros': zeros - 0.02 * (name == 'wo'),
       'relative_output_error': error * (1 + 0.4 * (stack == 'decoder') + 0.01 * e),
       'fallback': 'no tokens: rounded' if (stack, e) == ('decoder', 3) else ''}
      for stack in ('encoder', 'decoder') for name in ('wi', 'wo') for e in range(16)
  ]


def routing(shift: float) -> dict[str, Any]:
  result = {}
  for k, path in enumerate(('encoder/layers_1/ffn', 'decoder/layers_1/ffn')):
    raw = [1 + 0.6 * math.sin(1.7 * e + k) + shift * math.cos(2.3 * e) for e in range(16)]
    load = [x / sum(raw) for x in raw]
    result[path] = {'load': load, 'entropy': 2.7, 'dropped': 0.0}
  return result


def variant(key, name, bits, loss, agreement, error, zeros, seconds) -> dict[str, Any]:
  row: dict[str, Any] = {
      'key': key, 'name': name, 'note': f'what {name} is', 'after': sizes(bits),
      'steps': [{'transform': 'quantize', 'seconds': seconds, 'peak_host_bytes': 10**9}],
      'layers': layers(error, zeros) if error else [],
      'evaluation': {
          'content_loss': loss, 'content_accuracy': 0.33 - 0.05 * (loss - 3.9),
          'routing': routing(0.1 if error else 0.0),
      },
  }
  if error:
    row['evaluation']['agreement'] = {'top1': agreement, 'kl': 0.1}
  return row


def comparison() -> dict[str, Any]:
  variants = [
      variant('bf16', 'bf16', 16.0, 3.912, 1.0, 0, 0, 0),
      variant('rtn', 'RTN ternary', 0.86, 4.61, 0.42, 0.62, 0.91, 9),
      variant('gptq', 'QMoE ternary', 0.93, 4.13, 0.66, 0.31, 0.86, 60),
      variant('refit', 'QMoE ternary + refit', 0.93, 4.05, 0.71, 0.24, 0.86, 60),
      variant('search', 'QMoE searched grid', 0.99, 4.01, 0.75, 0.2, 0.84, 90),
      variant('two', 'QMoE 2-bit', 2.13, 3.95, 0.86, 0.09, 0.7, 60),
  ]
  head = variants[4]
  piece = lambda text, hidden=False: {'text': text, 'hidden': hidden}
  return {
      'title': 'A Switch Transformer below one bit a weight',
      'source': 'experiments/checkpoints/sotu-switch-16',
      'headline': 'search', 'variants': variants, 'steps': head['steps'],
      'before': variants[0]['after'], 'after': head['after'], 'layers': head['layers'],
      'baselines': {'bigram_content_loss': 4.22, 'zeroed_experts_content_loss': 4.9},
      'facts': {'experts': 16, 'machine': '2 cores', 'test_words': '12,345'},
      'training': {
          'seconds': 120, 'curve': [[6000 + i, 3.2 + 0.3 * math.sin(i) - i / 500]
                                    for i in range(0, 200, 4)],
      },
      'samples': [{
          'text': [piece('We hold '), piece('these truths', True), piece(' to be <self>-evident.')],
          'guesses': [
              {'name': 'bf16', 'pieces': [{'text': 'these', 'right': True},
                                          {'text': 'truths', 'right': True}]},
              {'name': 'ternary', 'pieces': [{'text': 'these', 'right': True},
                                             {'text': 'men', 'right': False}]},
          ],
      }],
  }
