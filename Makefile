# Each target sets itself up in a virtual environment of its own, and does so again only when what it depends on changed.
#   make quickstart    train a small model on the data in this repository, and show what was gained
#   make test          everything that has to hold
#   make test-slow     what takes longer
#   make sanitize      the native code on odd shapes, watched by the compiler's sanitizers
# PYTHON=python3.12 picks the interpreter. On Linux PyPI's torch brings several gigabytes for GPUs; without a GPU,
# TORCH_INDEX=https://download.pytorch.org/whl/cpu fetches the small build.

PYTHON = python3
TORCH_INDEX =

# Compiling every installed module would take longer than the whole installation; Python compiles what it imports.
PIP_INSTALL = $(@D)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test test-slow sanitize clean

quickstart:
	@begin=$$(date +%s) && $(MAKE) --no-print-directory .venv/ready && ready=$$(date +%s) \
	&& .venv/bin/smidgen train recipes/quickstart.yaml --overwrite && trained=$$(date +%s) \
	&& .venv/bin/smidgen evaluate runs/quickstart --few-shot 3 \
	&& echo "set-up $$((ready - begin)) s, training $$((trained - ready)) s, evaluation $$(($$(date +%s) - trained)) s"

test:
	@begin=$$(date +%s) && $(MAKE) --no-print-directory .venv-test/ready .venv-test/oldest/ready && ready=$$(date +%s) \
	&& .venv-test/bin/ruff check . && .venv-test/bin/ruff format --check . \
	&& .venv-test/bin/pyright --pythonpath .venv-test/bin/python && checked=$$(date +%s) \
	&& OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -n 2 -m "not slow" --quiet \
	&& echo "set-up $$((ready - begin)) s, checks $$((checked - ready)) s, tests $$(($$(date +%s) - checked)) s"

test-slow: .venv-test/ready .venv-test/oldest/ready
	OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -n 2 -m slow --quiet

sanitize: .venv-test/ready
	OMP_NUM_THREADS=2 .venv-test/bin/python tests/kernels/sanitize.py

.venv-test/ready: EXTRAS = [test,track]

.venv/ready .venv-test/ready: pyproject.toml constraints.txt
	@echo "setting up $(@D)"
	@$(PYTHON) -m venv $(@D)
	@# torch by itself, so that TORCH_INDEX, which holds nothing else, is asked for it alone.
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP_INSTALL) --editable '.$(EXTRAS)'
	@touch $@

# The oldest releases that may be installed, to be put before the others on Python's path; torch is the same.
.venv-test/oldest/ready: constraints-oldest.txt .venv-test/ready
	@echo "setting up $(@D)"
	@rm -rf $(@D)
	@.venv-test/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps --only-binary :all: \
		--target $(@D) --requirement constraints-oldest.txt
	@touch $@

clean:
	rm -rf .venv .venv-test
