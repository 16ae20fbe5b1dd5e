# Everything a newcomer needs: `make demo`, `make test`.
# The first Python >= 3.12 that really starts: a pyenv shim may stand on PATH without its version being active.
PYTHON := $(shell for p in python3.12 python3.13 python3.14 python3 $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3; do \
	"$$p" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p" && break; done)
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-heavy lint bench clean

demo: $(VENV)/installed-tests
	$(RUN) -m examples.demo.run

test: $(VENV)/installed-tests $(VENV)/h100-compiler
	$(RUN) -m pytest -q -n 2 --dist loadfile

test-heavy: $(VENV)/installed-tests
	$(RUN) -m pytest -q -m heavy

lint: $(VENV)/installed-tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/installed-tests
	$(RUN) -m benchmarks.cpu_speed
	$(RUN) -m benchmarks.compile_time

$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "dsparse needs Python 3.12 or newer with venv; none found on PATH or under pyenv"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-tests: $(VENV)/installed
	$(RUN) -m pip install --quiet --editable '.[tests]'
	touch $@

# Compiles kernels for the H100 without a GPU. Apart from the environment, which would take it for a broken GPU;
# where the registry has no compiler for this version of jax, those tests are skipped and say so.
$(VENV)/h100-compiler: $(VENV)/installed-tests
	version=$$($(RUN) -c 'import jax; print(jax.__version__)') && rm -rf $@ && \
	$(RUN) -m pip install --quiet --target $@ "jax-cuda13-plugin==$$version" 'nvidia-cuda-nvcc==13.*' || mkdir -p $@

clean:
	rm -rf build dist *.egg-info runs
