# make demo    pretrain the demo recipe            make lint       ruff and mypy
# make test    run the tests                       make test-fast  without those that are marked slow
# make bench   time operations, step and loader    make coverage   the tests, and the lines that none of them runs
# make clean   remove .venv
#
# Each is complete on a machine with Python >= 3.10 and make; PYTHON=/path/to/python chooses another interpreter
# and TORCH='torch==2.11.*' another torch; run make clean before it.
# Everything is installed into .venv, in the versions of constraints.txt; an active environment is left alone.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DALI := $(VENV)/.dali
CONSTRAINTS := $(VENV)/constraints.txt

# Neither an active environment nor a PYTHONPATH may leak into ours.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_VIRTUALENV

.PHONY: demo test test-fast coverage lint bench install clean

demo: $(STAMP)
	$(BIN)/vjepa-fast train

# Where there is a compiler, an extension that is not there is a failure, not a reason to skip. Two processes, as tests use
# one thread each; the tests of a file stay together, with what they share.
PYTEST = VJEPA_FAST_REQUIRE_EXT=$$(command -v $(CXX) >/dev/null && echo 1) $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

test: $(STAMP) $(DALI)
	$(PYTEST) --durations=20

test-fast: $(STAMP)
	$(PYTEST) -m "not slow"

coverage: $(STAMP) $(DALI)
	$(PYTEST) --cov=vjepa_fast --cov-report=term-missing:skip-covered

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vjepa_fast

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks

install: $(STAMP)

clean:
	rm -rf $(VENV)

# torch comes first and alone: an index that offers a CPU build then decides the build, before anything asks for CUDA,
# and the extension (csrc/) is built for it. Another torch than the pinned one brings its own triton,
# and setuptools as old as it asks for (torch 2.11: before 82).
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@command -v "$(PYTHON)" >/dev/null || { echo "error: $(PYTHON) not found; install Python >= 3.10 or run make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $$("$(PYTHON)" --version) is too old; Python >= 3.10 is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv "$(VENV)" || { echo "error: cannot make $(VENV); on Debian and Ubuntu install python3-venv first" >&2; exit 1; }
	@grep -v $(if $(filter torch==2.13.0,$(TORCH)),'^#','^torch==\|^triton==\|^setuptools==') constraints.txt >$(CONSTRAINTS)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS) '$(TORCH)'
	$(BIN)/python -m pip install --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $(STAMP)

# The tests of DALI's CPU decoders need no GPU. The demo does without DALI and what it brings, 620 MB on disk.
$(DALI): $(STAMP)
	case "$$(uname)" in Linux) $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt nvidia-dali-cuda130;; esac
	@touch $(DALI)
