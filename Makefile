# Two commands: `make run` quantizes the embedded model, `make test` runs the tests. Both set up what they need, once.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready

.PHONY: run test clean

run: $(READY)
	$(VENV)/bin/python run.py

test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# The constraints also hold for the build's own environment.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
		{ echo "cbq needs Python 3.11 or 3.12: make PYTHON=python3.12 ..." >&2; exit 2; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .ruff_cache
