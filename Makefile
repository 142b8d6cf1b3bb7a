# make run    installs hipquant into its own environment; the demo model writes a story on the CPU
# make test   installs what the tests need; lint, types, tests
# make bench  measures the kernels and the models against the read ceiling (and llama.cpp, where LLAMA_BENCH names it)
# make wheel  a wheel with every code object: all GPUs, all machines
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml tools/build_hook.py $(shell find src -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.hip' -o -name '*.gguf')
PROMPT ?= Once upon a time
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test lint bench wheel clean

run: $(VENV)/installed
	@$(BIN)/hipquant run -p "$(PROMPT)"

test: $(VENV)-test/installed
	$(VENV)-test/bin/ruff check .
	$(VENV)-test/bin/ruff format --check .
	$(VENV)-test/bin/mypy
	$(VENV)-test/bin/pytest -n 2

bench: $(VENV)-test/installed
	$(VENV)-test/bin/python benchmarks/kernels.py
	$(VENV)-test/bin/python benchmarks/models.py

wheel:
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/pip install -q build
	HIPQUANT_TARGETS=all $(VENV)-wheel/bin/python -m build -q --sdist --wheel

# The compiler is installed, not only borrowed for the build: `hipquant build` needs it too.
$(VENV)/installed: $(SOURCES)
	@echo "installing hipquant into $(VENV); the first time this takes a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q hatchling ziglang==0.17.1
	@$(BIN)/pip install -q --no-build-isolation .
	@touch $@

# Editable, with the build tools in the environment, so that the tests can compile.
$(VENV)-test/installed: pyproject.toml tools/build_hook.py
	test -x $(VENV)-test/bin/python || $(PYTHON) -m venv $(VENV)-test
	$(VENV)-test/bin/pip install -q hatchling editables ziglang==0.17.1
	$(VENV)-test/bin/pip install -q --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-test $(VENV)-wheel build dist
	cd src/hipquant/codeobjects && rm -rf .parts *.so *.hsaco *.ptx *.json
