# The two commands: `make book` and `make test`. Both make the environment first if it is missing.
PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed

# Threads that spin for long while they wait slow everything down as soon as the machine is shared.
export GOMP_SPINCOUNT ?= 2000

.PHONY: book test env lint unit notebooks dry-runs portable benchmarks lock clean

book: env
	@$(BIN)/leantrain run --all; ran=$$?; $(BIN)/leantrain book && exit $$ran

# Side by side, because each alone leaves a core half idle; where make can, it prints each when it is through.
test: env lint
	@$(MAKE) --no-print-directory --keep-going --jobs 2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) \
	  unit notebooks dry-runs

env: $(INSTALLED)

# --no-deps: the lock is complete, so nothing that it does not name can come in; `pip check` proves it.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"error: Python 3.11 is needed, $(PYTHON) is {v[0]}.{v[1]}; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip --disable-pip-version-check check
	@touch $@

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: env
	$(BIN)/python -m pytest tests lib --doctest-modules --ignore tests/test_dry_runs.py

dry-runs: env
	$(BIN)/python -m pytest tests/test_dry_runs.py

notebooks: env
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=300 notebooks/*.ipynb

# Nothing that is checked may depend on the processor: one thread, no AVX-512, and no run kept from an earlier time.
portable: env
	@kept=$$(mktemp -d); trap 'rm -rf "$$kept"' EXIT; \
	LEANTRAIN_BUILD="$$kept" OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1 \
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=600 notebooks/*.ipynb

benchmarks: env
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# Resolves pyproject.toml for Python 3.11 on Linux and macOS, keeping the versions that still fit (`rm requirements.lock`
# first for the newest); needs `uv` on the path. The `# via` comments say what brought a package in: a chapter's
# freshness depends on the packages that it reaches.
lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-header --annotation-style line --quiet \
	  --output-file requirements.lock
	sed -E -e "/python_full_version >= '3.1[2-9]'/d" -e "s/ +# via/ # via/" -e "s/ ; python_full_version < '3.1[2-9]'( #|$$)/\1/" \
	  requirements.lock > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf _build .venv
