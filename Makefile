# make install | demo | test | sanitize | bench | gpu-check | lint | format | clean.  Everything happens inside
# .venv (gpu-check also without one).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RANKS ?= 2

.PHONY: install demo test sanitize bench gpu-check lint format clean

# The slow part (downloads) runs again only when what it depends on changed; the in-place build of the
# extension always runs and takes a second when nothing changed.
install: $(STAMP)
	@$(BIN)/python setup.py -q build_ext --inplace

$(STAMP): constraints.txt pyproject.toml setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --constraint constraints.txt pip setuptools wheel ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# The paper's comparison in small: RS-SAM and its baseline, same data, same steps, measured on unseen scenes;
# then a map of a scene that is larger than any tile. An interrupted demo goes on where it stopped.
# One thread a rank, as torchrun does by default, but without its warning. A model this small is copied to every
# rank: sharding it costs more than a third of a step (measured), and both train the same. (The log level keeps DDP
# from warning that all parameters were used.)
DEMO_PARALLEL := $(if $(filter-out 1,$(RANKS)),--parallel ddp)
DEMO_TRAIN := OMP_NUM_THREADS=1 TORCH_CPP_LOG_LEVEL=ERROR $(BIN)/torchrun --nproc-per-node=$(RANKS) train.py --config rsmodels/recipes/demo.yaml --resume auto $(DEMO_PARALLEL)

demo: install
	$(DEMO_TRAIN) --method rs-sam --run-dir runs/demo
	$(DEMO_TRAIN) --method sam-lora --run-dir runs/demo-sam-lora
	$(BIN)/python -m rsmodels.data.synthetic runs/demo/scene.tif --size 2048
	$(BIN)/rsmodels predict runs/demo/scene.tif --model runs/demo/best --output runs/demo/scene_classes.tif
	@echo
	@grep -H -m1 mean_iou runs/demo/report/metrics.json runs/demo-sam-lora/report/metrics.json
	@echo "Look at  runs/demo/report/index.html  (curves, classes, best and worst tiles)"
	@echo "and at   runs/demo/scene_classes.tif  (any GIS opens it over runs/demo/scene.tif)"

# Two processes of one thread each: faster than one of two, and the same everywhere.
test: install
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope $(ARGS)

# The C++ tests at every instruction set and the operators' Python tests under AddressSanitizer and UBSan, in
# build/sanitize: what `make test` uses stays as it is.
sanitize: export PATH := $(CURDIR)/$(BIN):$(PATH)
sanitize: install
	@command -v cmake >/dev/null || { echo "make sanitize: no cmake; install one, or run: $(BIN)/python -m pip install cmake" >&2; exit 1; }
	@cmake -S . -B build/sanitize -G Ninja --log-level=WARNING -DSANITIZE=ON -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python
	@cmake --build build/sanitize
	@ctest --test-dir build/sanitize --output-on-failure --no-tests=error

bench: install
	@$(BIN)/python -m benchmarks.report

# On a machine with a GPU; ARGS="--dry-run" shows on any machine that it is ready for one. No install: machines
# with GPUs come with a torch of their own.
gpu-check:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py $(ARGS)

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')

clean:
	rm -rf build dist *.egg-info rskernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
