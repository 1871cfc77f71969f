# make demo       train and evaluate plain, DCN and DCNv2 detectors on generated data, with a report;
#                 ARGS=--quick for a look in 3 minutes
# make test       the whole suite, on the CPU
# make benchmark  the operator and whole detectors against their peers: docs/benchmarks/cpu.md
# make test-torch TORCH=2.10.0   operators and layers, from the wheel, under another torch
# make fuzz SECONDS=600   random problems, malformed calls and damaged checkpoints, a third each
# make sanitize   the CPU operators under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
# make mutants    small faults planted in the kernels, each of which the tests must find
# make evidence   deformable layers against plain ones on transformed digits: docs/evidence.md
# make zoo        every deformable config of mmdet against mmcv's kernels: docs/zoo.md
# make lint       ruff and clang-format
# make docs       the documentation as a site: build/docs/index.html
# make release-check   audits of the source distribution and the wheel, which it leaves in dist/
# make wheel      dist/mmdcn-*.whl, with the CUDA library where nvcc is found
#
# Each sets up all that it needs in $(VENV). TOOLBOX=onedl uses the maintained fork of the toolbox.

PYTHON ?= python3
TOOLBOX ?= openmmlab
VENV ?= $(if $(filter openmmlab,$(TOOLBOX)),.venv,.venv-$(TOOLBOX))
ARGS ?=
# Of the whole suite: a test file is one worker's, so that what it builds is built once.
WORKERS ?= 2

# Idle OpenMP threads that spin for long slow down whoever else uses the cores.
export GOMP_SPINCOUNT ?= 3000

ENVIRONMENT := $(VENV)/.environment-$(TOOLBOX)
INSTALLED := $(VENV)/.mmdcn-installed
RUN := $(VENV)/bin/python
CXX_SOURCES := $(shell find mmdcn tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

MEASURED := work_dirs/benchmark

.PHONY: demo test test-slow test-torch benchmark evidence fuzz sanitize mutants zoo lint format docs \
    wheel release-check \
    check environment clean

environment: $(INSTALLED)

$(ENVIRONMENT): $(wildcard tools/environment/*)
	@tools/environment/setup.sh "$(VENV)" "$(PYTHON)" "$(TOOLBOX)"
	@touch $@

# An editable installation, so that changes to Python files take effect at once.
$(INSTALLED): $(ENVIRONMENT) setup.py pyproject.toml mmdcn/version.py $(shell find mmdcn/csrc -type f)
	@printf '\n==> compiling mmdcn\n'
	@MMDCN_WERROR=1 $(RUN) setup.py --quiet build_ext --inplace
	@MMDCN_WERROR=1 $(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED)
	@$(RUN) tools/demo.py $(ARGS)

test: $(INSTALLED)
	@$(RUN) -m pytest -m "not slow and not cuda" \
	    $(if $(ARGS),$(ARGS),--numprocesses $(WORKERS) --dist loadfile \
	        --no-loadscope-reorder)

test-slow: $(INSTALLED)
	@$(RUN) -m pytest -m slow $(ARGS)

test-torch: $(if $(TORCH),wheel)
	@tools/environment/test_torch.sh ".venv-torch-$(TORCH)" "$(PYTHON)" "$(TORCH)" \
	    "$$(ls -t dist/mmdcn-*.whl | head -1)" $(ARGS)

# So few seconds for each call, because some peers take several for one.
benchmark: $(INSTALLED)
	@$(RUN) tools/benchmark.py ops --shapes design --versions v1,v2 --layouts nchw,channels_last \
	    --scaling --passes 3 --seconds 1 --json $(MEASURED)/design.json
	@$(RUN) tools/benchmark.py ops --shapes variants --layouts nchw,channels_last \
	    --seconds 0.3 --json $(MEASURED)/variants.json
	@$(RUN) tools/benchmark.py ops --dtype bfloat16 --layouts nchw,channels_last --peers dense \
	    --seconds 0.5 --json $(MEASURED)/bfloat16.json
	@$(RUN) tools/benchmark.py ops --dtype float16 --layouts nchw,channels_last --peers none \
	    --seconds 0.5 --json $(MEASURED)/float16.json
	@$(RUN) tools/benchmark.py family --seconds 0.5 --json $(MEASURED)/family.json
	@$(RUN) tools/benchmark.py detector --seconds 5 --json $(MEASURED)/detectors.json --configs \
	    configs/faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py \
	    configs/dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py \
	    configs/dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py
	@for depth in 18 50; do for threads in 1 2; do \
	    $(RUN) tools/benchmark.py detector --batch 1 --threads $$threads --kernels mmdcn --no-memory \
	    --seconds 5 --json $(MEASURED)/small-$$depth-$$threads.json --configs \
	    configs/faster_rcnn/faster-rcnn_r$${depth}_fpn_1x_coco.py \
	    configs/dcn/faster-rcnn_r$$depth-dconv-c3-c5_fpn_1x_coco.py \
	    configs/dcnv2/faster-rcnn_r$$depth-mdconv-c3-c5_fpn_1x_coco.py || exit 1; done; done
	@$(RUN) tools/benchmark.py report --out docs/benchmarks/cpu --readme README.md \
	    $(addprefix $(MEASURED)/,design.json variants.json bfloat16.json float16.json family.json \
	    detectors.json small-18-1.json small-18-2.json small-50-1.json small-50-2.json)

SECONDS ?= 60
fuzz: $(INSTALLED)
	@for kind in operators malformed checkpoints; do OMP_NUM_THREADS=1 \
	    $(RUN) tools/fuzz.py $$kind --seconds $$(($(SECONDS) / 3)) $(ARGS) || exit 1; done

# SANITIZERS=address or thread, and MMDCN_CPU_CAPABILITY, select a part.
sanitize: $(INSTALLED)
	@$(RUN) -m tests.sanitizers

mutants: $(INSTALLED)
	@$(RUN) -m tests.mutants $(ARGS)

evidence: $(INSTALLED)
	@$(RUN) tools/evidence.py $(ARGS)

zoo: $(INSTALLED)
	@$(RUN) tools/check_zoo.py --out docs/zoo.md $(ARGS)

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

.venv-docs/.installed: tools/environment/docs.txt
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# Warnings are errors: a broken link, a page that no menu shows, a reference to nothing.
docs: .venv-docs/.installed
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "docs: build/docs/index.html"

release-check: $(INSTALLED)
	@MMDCN_WERROR=1 tools/environment/release_check.sh "$(VENV)" .venv-release

wheel: $(ENVIRONMENT)
	@MMDCN_WERROR=1 $(RUN) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist

clean:
	rm -rf build dist mmdcn/*.so *.egg-info
