PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench docs

demo: .venv/ready
	$(BIN)/python bench/demo.py

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --target build/lint .
	$(BIN)/mypy build/lint/adavipro_fast
	MYPYPATH=build/lint $(BIN)/mypy bench

bench: .venv/ready
	$(BIN)/python bench/latency.py --quick
	$(BIN)/python bench/throughput.py --quick
	$(BIN)/python bench/training.py --quick
	$(BIN)/python bench/fused.py

docs: .venv/docs
	$(BIN)/mkdocs build --quiet --strict --config-file docs/mkdocs.yml

.venv/docs: .venv/ready
	$(BIN)/pip install -qq --editable '.[docs]'
	touch $@

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install -qq --editable '.[dev]'
	touch $@
