# make demo: the whole path on the embedded data set. make test: lint, types, tests. Both install into .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
SOURCES := edgeft export kernels tests benchmarks

.PHONY: demo test lint package cross tables clean

demo: $(STAMP)
	$(BIN)/edgeft train-quantize --method lpft --out runs/demo --resume
	$(BIN)/edgeft export runs/demo --target onnx --target trt
	$(BIN)/edgeft verify runs/demo --n 200
	$(BIN)/edgeft show runs/demo

test: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# Wheel and sdist, built and imported away from the checkout.
package: $(STAMP)
	$(BIN)/python -m pytest -m slow tests/test_packaging.py

# C bundles on AArch64 and Cortex-M, played by QEMU; what is not installed is skipped, and said so.
cross: $(STAMP)
	$(BIN)/python -m pytest -m slow tests/unit/test_c_cross.py

tables: $(STAMP)
	$(BIN)/python -m benchmarks.tables

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
