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
# What tests/cuda_driver runs on.
CUDA := build/cuda_headers build/cuda_packages
INSTALL := $(BIN)/pip install --disable-pip-version-check --no-input --quiet

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
test: $(VENV)/ready $(HEADERS) $(CUDA)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

test-quick: $(VENV)/ready $(HEADERS) $(CUDA)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m "not slow"

lint: $(VENV)/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/ready
	$(BIN)/mypy

# NVIDIA's Apache-2.0 headers of TensorRT, which tests build the plugin with where none are installed.
$(HEADERS): | $(VENV)/ready
	$(INSTALL) --no-deps --target $@ $(HEADERS_PACKAGE)

# NVIDIA's headers of the CUDA driver, for one that tests compile and that needs no GPU.
build/cuda_headers: | $(VENV)/ready
	$(INSTALL) --no-deps --target $@ 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-profiler-api==13.0.*'

# PyCUDA, which has no wheels, and cuda-bindings, which run on that driver; a minute of one core. PyCUDA links to an
# empty library, since the driver is found when it runs. Where it cannot be built, the tests that need it are skipped.
build/cuda_packages: | build/cuda_headers
	@rm -rf $@.made && mkdir -p $@.made
	-@test -f "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
		|| { echo "Python.h is missing, which a package like python3-dev has: PyCUDA is not built"; exit 1; } \
	&& $(BIN)/pip download --disable-pip-version-check --no-input --quiet --no-deps --no-build-isolation \
		--no-binary pycuda --dest $@.made pycuda==2026.1 \
	&& tar --extract --gzip --strip-components 1 --directory $@.made --file $@.made/pycuda-2026.1.tar.gz \
	&& gcc -shared -Wl,-soname,libcuda.so.1 -o $@.made/libcuda.so -x c /dev/null \
	&& printf '%s\n' 'CUDA_INC_DIR = ["$(abspath build/cuda_headers/nvidia/cu13/include)"]' 'CUDA_ENABLE_CURAND = False' \
		'CXXFLAGS = ["-O0", "-w"]' 'LDFLAGS = ["-Wl,--no-as-needed", "-L.", "-lcuda"]' > $@.made/siteconf.py \
	&& $(INSTALL) --no-build-isolation --no-warn-conflicts --target $@.made/installed ./$@.made 'cuda-bindings==13.*' \
	&& mv $@.made/installed $@
	@rm -rf $@.made

# NVIDIA's Python modules of TensorRT, 1 MB each, without the libraries: whose calls ours are held against. Tests of a
# version that there is none of for this Python are skipped.
BINDINGS := 10.3.0 10.13.3.9.post1 10.14.1.48.post1 11.4.0.106

test test-quick: build/tensorrt_bindings

build/tensorrt_bindings: | $(VENV)/ready
	@rm -rf $@.made && mkdir -p $@.made
	-@for version in $(BINDINGS); do \
		$(BIN)/pip install --disable-pip-version-check --no-input --quiet --no-deps \
			--target "$@.made/$$(echo $$version | cut -d . -f 1,2)" tensorrt-cu12-bindings==$$version; \
	done
	@mv $@.made $@

# The plugin library, for the GPU at hand or, say, ARCH=87.
plugin: $(VENV)/ready
	$(BIN)/monoedge plugin $(if $(ARCH),--arch $(ARCH))

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
