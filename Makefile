# make demo    train and evaluate plain, DCN and DCNv2 detectors on generated data, with a report
# make test    the whole suite, on the CPU
# make lint    ruff and clang-format
# make wheel   dist/mmdcn-*.whl, with the CUDA library where nvcc is found
#
# Each sets up all that it needs in $(VENV). TOOLBOX=onedl uses the maintained fork of the toolbox.

PYTHON ?= python3
TOOLBOX ?= openmmlab
VENV ?= $(if $(filter openmmlab,$(TOOLBOX)),.venv,.venv-$(TOOLBOX))
ARGS ?=

# Idle OpenMP threads that spin for long slow down whoever else uses the cores.
export GOMP_SPINCOUNT ?= 3000

ENVIRONMENT := $(VENV)/.environment-$(TOOLBOX)
INSTALLED := $(VENV)/.mmdcn-installed
RUN := $(VENV)/bin/python
CXX_SOURCES := $(shell find mmdcn tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-slow lint format wheel check environment clean

environment: $(INSTALLED)

$(ENVIRONMENT): $(wildcard tools/environment/*)
	@tools/environment/setup.sh "$(VENV)" "$(PYTHON)" "$(TOOLBOX)"
	@touch $@

# An editable installation, so that changes to Python files take effect at once.
$(INSTALLED): $(ENVIRONMENT) setup.py pyproject.toml mmdcn/version.py $(shell find mmdcn/csrc -type f)
	@printf '\n==> compiling mmdcn\n'
	@MMDCN_WERROR=1 $(RUN) setup.py --quiet build_ext --inplace
	@$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED)
	@$(RUN) tools/demo.py --work-dir work_dirs/demo $(ARGS)

test: $(INSTALLED)
	@$(RUN) -m pytest -m "not slow and not cuda" $(ARGS)

test-slow: $(INSTALLED)
	@$(RUN) -m pytest -m slow $(ARGS)

check: $(INSTALLED)
	@$(RUN) -m mmdcn.check

lint: $(ENVIRONMENT)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)
	@echo "lint: clean"

format: $(ENVIRONMENT)
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/clang-format -i $(CXX_SOURCES)

wheel: $(ENVIRONMENT)
	@MMDCN_WERROR=1 $(RUN) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist

clean:
	rm -rf build dist mmdcn/*.so *.egg-info
