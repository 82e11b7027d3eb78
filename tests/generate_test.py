"""Generation: the same tokens as a full forward at every step, and as Hugging Face."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import generate as gen
from moejax import weights
from moejax.compress.quantize import quantize
from moejax.config import DecoderConfig, DecoderMoeConfig, EncDecConfig, EncDecMoeConfig
from moejax.errors import UserError
from moejax.model import Model

DECODER = DecoderConfig(
    family='mixtral', vocab_size=61, d_model=32, d_head=8, d_ff=48, num_heads=4, num_kv_heads=2,
    num_layers=2, max_positions=64, initializer_std=0.3, eos_ids=(2,), pad_id=0,
    moe=DecoderMoeConfig(num_experts=4, router='topk', normalize_gates=True),
)
SWITCH = EncDecConfig(
    vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, num_decoder_layers=2,
    moe=EncDecMoeConfig(num_experts=3),
)
MODELS = {
    'mixtral': DECODER,
    'window': dataclasses.replace(DECODER, sliding_window=5, norm='layer'),
    'learned_positions': dataclasses.replace(
        DECODER, family='opt', rope=None, position_offset=2, moe=None, gated=False
    ),
    'switch': SWITCH,
    'untied': dataclasses.replace(SWITCH, tie_embeddings=False, moe=None, family='t5'),
}
PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]


@pytest.fixture(scope='module', params=MODELS)
def model(request):
  made = Model.init(MODELS[request.param], jax.random.key(3))
  if isinstance(made.config, EncDecConfig):  # fresh T5s repeat one token
    made = dataclasses.replace(made, params=jax.tree.map(lambda a: a * 1.7, made.params))
  return made


def greedy(model, prompts, count, stops):
  """One full forward a token, on texts padded to one length."""
  decoder = isinstance(model.config, DecoderConfig)
  pad = lambda row, width: np.pad(row, (0, width - len(row)))[None]

  @jax.jit
  def logits(params, ids, mask, out):
    own = Model(model.config, params)
    if decoder:
      return own.apply(ids).logits_btv[0]
    return own.apply(ids, out, encoder_mask=mask).logits_btv[0]

  rows = []
  for prompt in prompts:
    out = []
    while len(out) < count and not (out and out[-1] in stops):
      ids = [*prompt, *out] if decoder else prompt
      mask = pad(np.ones(len(ids), bool), 32)
      found = logits(model.params, pad(ids, 32), mask, pad([0, *out], count + 1))
      out.append(int(jnp.argmax(found[len(ids) - 1 if decoder else len(out)])))
    rows.append(out)
  return rows


@pytest.mark.long(but=('switch', 'mixtral'))
def test_greedy_is_a_full_forward_at_every_step(model):
  made = gen.generate(model, PROMPTS, max_new_tokens=9)
  stops = gen.stop_ids_of(model.config)
  want = greedy(model, PROMPTS, 9, stops)
  assert made.rows() == want
  assert len({tuple(row) for row in want}) > 1  # prompts matter
  assert made.stopped.tolist() == [row[-1] in stops for row in want]


def test_streaming_gives_the_same_tokens(model):
  whole = gen.generate(model, PROMPTS, max_new_tokens=7, stop_ids=())
  pieces = []
  streamed = gen.generate(
      model, PROMPTS, max_new_tokens=7, stop_ids=(), on_tokens=pieces.append, every=2
  )
  assert [p.shape[1] for p in pieces] == [1, 2, 2, 2]
  np.testing.assert_array_equal(whole.tokens, streamed.tokens)
  assert whole.lengths.tolist() == [7, 7, 7]


def test_rows_stop_on_their_own(model):
  free = gen.generate(model, PROMPTS, max_new_tokens=8, stop_ids=())
  stop = int(free.tokens[0, 2])
  made = gen.generate(model, PROMPTS, max_new_tokens=8, stop_ids=(stop,))
  for row, whole in zip(made.rows(), free.rows()):
    end = whole.index(stop) + 1 if stop in whole else 8
    assert row == whole[:end]
  assert (made.tokens[np.arange(8)[None] >= made.lengths[:, None]] == 0).all()


@pytest.mark.long(but=('mixtral',))
@pytest.mark.parametrize('name', ['mixtral', 'switch'])
def test_sampling_follows_the_key_and_the_logits(name):
  model = Model.init(MODELS[name], jax.random.key(3))
  draw = lambda seed, **kw: gen.generate(
      model, PROMPTS, max_new_tokens=6, stop_ids=(), key=jax.random.key(seed),
      sampling=gen.Sampling(temperature=2.0, **kw),
  ).tokens
  np.testing.assert_array_equal(draw(0), draw(0))
  assert (draw(0) != draw(1)).any()
  greedy_tokens = gen.generate(model, PROMPTS, max_new_tokens=6, stop_ids=()).tokens
  np.testing.assert_array_equal(draw(0, top_k=1), greedy_tokens)
  np.testing.assert_array_equal(draw(0, top_p=1e-6), greedy_tokens)


def test_filters_by_hand():
  logits = jnp.log(jnp.array([[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.7, 0.1]]))
  kept = lambda **kw: jnp.isfinite(
      gen.filter_logits(logits, gen.Sampling(temperature=1.0, **kw))
  ).astype(int).tolist()
  assert kept() == [[1, 1, 1, 1], [1, 1, 1, 1]]
  assert kept(top_k=1) == [[1, 0, 0, 0], [0, 0, 1, 0]]
  # 0.5 alone does not reach 0.6; 0.5 + 0.2 does. 0.7 does alone.
  assert kept(top_p=0.6) == [[1, 1, 0, 0], [0, 0, 1, 0]]
  assert kept(top_p=0.95) == [[1, 1, 1, 1], [1, 1, 1, 1]]
  cooled = gen.filter_logits(logits, gen.Sampling(temperature=0.5))
  np.testing.assert_allclose(cooled, 2 * logits, rtol=1e-6)


def test_draws_have_the_filtered_distribution():
  logits = jnp.broadcast_to(jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])), (4000, 4))
  drawn = gen.pick(logits, gen.Sampling(temperature=1.0, top_k=3), jax.random.key(0))
  share = np.bincount(np.asarray(drawn), minlength=4) / 4000
  np.testing.assert_allclose(share, np.array([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.04)
  assert share[3] == 0


@pytest.mark.long
@pytest.mark.parametrize('bits, recode', [
    ('ternary', weights.two_bit), ('ternary', weights.sub_bit), (4, None),
], ids=['ternary', 'sub_bit', '4'])
def test_compressed_experts_generate_unchanged(bits, recode):
  """The tokens of codes are those of the same weights expanded."""
  model = Model.init(SWITCH, jax.random.key(3))
  from moejax.compress import compress
  rng = np.random.default_rng(0)
  tokens = rng.integers(2, 61, (2, 12))
  batch = {'encoder_tokens': tokens, 'decoder_tokens': tokens, 'targets': tokens,
           'weights': np.ones((2, 12), np.float32)}
  small = compress(model, quantize(bits), [batch]).model
  is_node = lambda x: isinstance(x, weights.WeightNode)
  assert any(map(is_node, jax.tree.leaves(small.params, is_leaf=is_node)))
  dense = dataclasses.replace(small, params=jax.tree.map(
      lambda x: x.dense(jnp.float32) if is_node(x) else x, small.params, is_leaf=is_node
  ))
  for prompts in (PROMPTS, PROMPTS[:1]):
    made = gen.generate(small, prompts, max_new_tokens=6, stop_ids=())
    if recode:
      other = dataclasses.replace(small, params=recode(small.params))
      again = gen.generate(other, prompts, max_new_tokens=6, stop_ids=())
      np.testing.assert_array_equal(again.tokens, made.tokens)
    want = gen.generate(dense, prompts, max_new_tokens=6, stop_ids=())
    np.testing.assert_array_equal(made.tokens, want.tokens)


def test_other_numbers_need_no_other_program():
  model = Model.init(DECODER, jax.random.key(3))
  def run(new, temperature, top_k, top_p, stop_ids, every):
    sampling = gen.Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    list(gen.stream(model, PROMPTS, max_new_tokens=new, sampling=sampling, stop_ids=stop_ids,
                    every=every))
  run(9, 1.0, 3, 0.8, (2,), 8)
  compiled = gen._start_decoder._cache_size(), gen._go_on._cache_size()
  run(7, 0.5, 0, 0.9, (3, 4), 2)
  assert (gen._start_decoder._cache_size(), gen._go_on._cache_size()) == compiled


@pytest.mark.long(but=('switch', 'untied'))
def test_bfloat16_cache_runs(model):
  made = gen.generate(model, PROMPTS, max_new_tokens=3, dtype=jnp.bfloat16)
  assert made.tokens.dtype == np.int32


def test_text_comes_in_whole_characters():
  raw = 'aé€b'.encode()
  decode = lambda ids: bytes(ids).decode(errors='replace')
  pieces = list(gen.text_pieces(([i] for i in raw), decode))
  assert ''.join(pieces) == 'aé€b' and '\ufffd' not in ''.join(pieces)


@pytest.mark.parametrize('call, message', [
    (dict(prompts=[]), 'at least one token'),
    (dict(prompts=[[1], []]), 'at least one token'),
    (dict(prompts=[[1, 61]]), r'span 1\.\.61, the model knows 0\.\.60'),
    (dict(prompts=[[1]], max_new_tokens=0), 'max_new_tokens = 0'),
    (dict(prompts=[[1] * 60], max_new_tokens=5), r'60 tokens.*context of 64'),
])
def test_bad_calls(call, message):
  with pytest.raises(UserError, match=message):
    gen.generate(Model(DECODER, {}), **call)


@pytest.mark.parametrize('values, message', [
    (dict(temperature=-1.0), 'temperature'), (dict(top_k=-1), 'top_k'), (dict(top_p=0.0), 'top_p'),
    (dict(temperature=float('nan')), 'temperature'),
])
def test_bad_sampling(values, message):
  with pytest.raises(UserError, match=message):
    gen.Sampling(**values)
