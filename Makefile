# Two commands do everything on a fresh machine with Python 3.11–3.13:
#   make demo   set up, export the example checkpoint, answer questions about a picture
#   make test   set up, pass the tests
# make test-quick passes those that take no more than a few seconds, for a look between two changes.
# PYTHON chooses the interpreter. Without a GPU, the CPU build of torch spares gigabytes: point pip at it in the
# usual way (pip config, PIP_INDEX_URL) before the first call.

PYTHON ?= python3
JOBS ?= 2
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell grep -o 'torch==[0-9.]*' pyproject.toml)
SOURCES := export plugins_trt runtime calibration tests benchmarks examples

DEMO_BUNDLE := build/shapes
DEMO_PICTURE := examples/shapes/pictures/p001.png
HEADERS := build/tensorrt_headers
HEADERS_PACKAGE := $(shell grep -o 'kernel-lens==[0-9.]*' plugins_trt/build.py)

.PHONY: demo test test-quick lint types plugin clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
# torch first and alone: what depends on it must not choose another build.
	$(BIN)/pip install --disable-pip-version-check --no-input $(TORCH)
	$(BIN)/pip install --disable-pip-version-check --no-input --editable '.[cpu,export,calibration,rtx,dev]'
	touch $@

$(DEMO_BUNDLE)/manifest.json: $(VENV)/ready $(shell find export plugins_trt -name "*.py") examples/shapes/checkpoint/model.safetensors
	$(BIN)/python -m export.onnx --ckpt examples/shapes/checkpoint -o $(DEMO_BUNDLE) --overwrite

demo: $(DEMO_BUNDLE)/manifest.json
	@printf '\n%s\n' 'The picture: $(DEMO_PICTURE)'
	@for question in 'How many shapes are there?' 'What color is the star?' 'Describe the image.'; do \
		printf '\n> %s\n' "$$question"; \
		$(BIN)/python -m runtime.chat --bundle $(DEMO_BUNDLE) --image $(DEMO_PICTURE) "$$question" || exit; \
	done

# On two cores at least; each process needs about 1.5 GB.
test: $(VENV)/ready $(HEADERS)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

test-quick: $(VENV)/ready $(HEADERS)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m "not slow"

lint: $(VENV)/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/ready
	$(BIN)/mypy

# NVIDIA's Apache-2.0 headers of TensorRT, which tests build the plugin with where none are installed.
$(HEADERS): | $(VENV)/ready
	$(BIN)/pip install --disable-pip-version-check --no-input --quiet --no-deps --target $@ $(HEADERS_PACKAGE)

# The plugin library, for the GPU at hand or, say, ARCH=87.
plugin: $(VENV)/ready
	$(BIN)/monoedge plugin $(if $(ARCH),--arch $(ARCH))

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
