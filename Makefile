# make train    makes the environment and trains a small TNT on scikit-learn's digits
# make eval     evaluates the run of `make train`
# make test     makes the environment and runs ruff and the fast tests: 5 to 9 minutes on 2 cores
# make test-all installs torch, timm and libtpu, too, and runs all other tests: slow, soak, oracle
#               (compared with timm), tpu_compiler. Needs chromium
# make soak     of these: runs of many processes, resumed runs, the largest programs
# make oracle   of these: the comparison with torch and timm
# make docs     builds the documentation in .site; warnings are errors

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/digits
ARGS ?=

PIP = $(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS)
CONSTRAINTS = $(shell $(PYTHON) -c 'import sys; \
	print("constraints/python3.%d.txt" % min(max(sys.version_info.minor, 11), 12))')
SOURCES = requirements.txt pyproject.toml $(wildcard constraints/*.txt)
# JAX's CUDA plugin, for tests that compile for GPUs, in a folder apart: on the path, it complains
# wherever there is no GPU.
CUDA = jax-cuda13-plugin jax-cuda13-pjrt
JAX = $(shell $(VENV)/bin/python -c 'import importlib.metadata as m; print(m.version("jax"))')
RUN = $(VENV)/bin/python main.py --config=configs/digits.py --workdir=$(WORKDIR)

.PHONY: train eval test test-all soak oracle docs
.DELETE_ON_ERROR:

train: $(VENV)/run.stamp
	$(RUN) $(ARGS)
	@echo "See $(WORKDIR)/curves.png and $(WORKDIR)/predictions.png" >&2

eval: $(VENV)/run.stamp
	$(RUN) --mode=eval $(ARGS)

test: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile $(ARGS)

test-all: $(VENV)/test-all.stamp
	$(VENV)/bin/python -m pytest -m "slow or soak or oracle or tpu_compiler or gpu_compiler" \
		--numprocesses=2 --dist=worksteal $(ARGS)

soak: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -m soak --numprocesses=2 $(ARGS)

oracle: $(VENV)/test-all.stamp
	$(VENV)/bin/python -m pytest -m oracle $(ARGS)

docs: $(VENV)/docs.stamp
	$(VENV)/bin/python -m mkdocs build --strict

$(VENV)/run.stamp: $(SOURCES)
	@echo "Making the environment $(VENV) with $(CONSTRAINTS)" >&2
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[train,tfds]"
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps jax2onnx==0.17.1
	@touch $@

$(VENV)/docs.stamp: $(VENV)/run.stamp
	$(PIP) --editable ".[train,tfds,docs]"
	@touch $@

$(VENV)/test-all.stamp: $(VENV)/test.stamp
	$(PIP) --editable ".[test,oracle]"
	$(PIP) --no-deps --upgrade --target $(VENV)/cuda nvidia-cuda-nvcc $(CUDA:%=%==$(JAX))
	@touch $@
