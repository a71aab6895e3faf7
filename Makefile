# `make demo` and `make test` each do all set-up alone.  PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
NEWEST := .venv-newest/bin
NEWEST_READY := .venv-newest/.ready
DOCS := .venv-docs/bin
DOCS_READY := .venv-docs/.ready

.PHONY: demo test test-gpu test-shipped test-newest check lint format docs lock dist clean

demo: $(READY)
	$(BIN)/python -m taskmoe.bench demo

# Numerics that are marked so run a second time with XLA's own settings, which the rest goes without.
test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -q
	TASKMOE_AS_SHIPPED=1 $(BIN)/python -m pytest -n 2 -q -m as_shipped -k "not mosaic" tests/kernels tests/moe

# The kernels' and the layer's numerics on a GPU, in a Python that has JAX for it: PYTHON=python3.
GPU_TESTS = $(addprefix tests/kernels/test_,gmm.py expert_ffn.py gating.py row_movement.py \
  moe_layer.py platforms.py transformations.py) $(addprefix tests/moe/test_,algorithm_1.py \
  routing.py losses.py extraction.py smaller_layers.py)
test-gpu:
	PYTHONPATH=.types JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest \
	XLA_PYTHON_CLIENT_PREALLOCATE=false TASKMOE_AS_SHIPPED=1 $(PYTHON) -m pytest -n auto \
	--dist worksteal -q -p no:benchmark -k "not mosaic or hopper" $(GPU_TESTS)

# All numerics with XLA's own settings.
test-shipped: $(READY)
	TASKMOE_AS_SHIPPED=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q tests/kernels tests/moe

# The tests on the newest versions that setup.py allows, in a virtual environment of their own.
test-newest: $(NEWEST_READY)
	$(NEWEST)/mypy
	$(NEWEST)/python -m pytest -n 2 --dist worksteal -q

check: $(READY)
	$(BIN)/python -m taskmoe.bench check

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): requirements.lock setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"taskmoe needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}: call make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# The sdist, and from it the wheel.  A build folder or egg-info left over would put old files in them.
dist: $(READY)
	rm -rf build dist taskmoe.egg-info
	$(BIN)/python -m build --no-isolation

# The documentation site, in site/; a warning or a broken link fails it, which --quiet would hide.
# Pages on ops are made from the sources, without importing them.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --strict
	@echo "site/index.html"

$(DOCS_READY): setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"taskmoe needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}: call make docs PYTHON=python3.12")'
	$(PYTHON) -m venv .venv-docs
	$(DOCS)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

# What is newest changes by the day: make clean first to resolve it anew.
$(NEWEST_READY): setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and f"the newest JAX needs Python 3.12 or newer; {sys.executable} is {sys.version.split()[0]}: call make test-newest PYTHON=python3.13")'
	$(PYTHON) -m venv .venv-newest
	$(NEWEST)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# Resolve the newest versions that setup.py allows and pin them.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check '.[dev]'
	.venv-lock/bin/python -m pip freeze --all --exclude pip --exclude taskmoe > requirements.lock.new
	sed -i 's/^libtpu==.*/&; sys_platform == "linux" and platform_machine == "x86_64"/' requirements.lock.new
	mv requirements.lock.new requirements.lock && rm -rf .venv-lock

clean:
	rm -rf .venv .venv-docs .venv-lock .venv-newest build site taskmoe.egg-info
