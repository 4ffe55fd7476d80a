# make demo   one video, dense and with FG-Attn, without ComfyUI; options: make demo ARGS="--threshold 0.7"
# make test   the tests, in the tiers of tests/tiers.py; needs Node.js and Triton
# make lint   ruff, as linter and as formatter
# make types  mypy
# make tested   what tests ran with (tests/tested.json, ROWS of other machines) into README.md and docs/compatibility.md
# make format   the formatter, on all files
# make browser   the pack on ComfyUI's real page; needs Chromium, downloads 90 MB of Playwright and frontends
# make compat   kernels compiled and interpreted with newer Tritons; downloads about 200 MB for each
# make newest   the newest of these Tritons, for the tier of that name
# make sanitize   NVIDIA's compute-sanitizer on the kernels: memory of all, races of the portable ones
# Everything runs in .venv, which is made on first use from PYTHON. A torch that PYTHON already has is used, not replaced.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/ready

.PHONY: demo test lint types tested format environment browser compat newest sanitize clean

# Passive: on a busy CPU, threads that spin while they wait slow the demo down.
demo: $(READY)
	OMP_WAIT_POLICY=passive $(RUN) -m fgattn.demo $(ARGS)

test: $(READY)
	$(RUN) tests/tiers.py unit web compile interpret browser comfy gpu

lint types: $(READY)
	$(RUN) tests/tiers.py $@

tested: $(READY)
	$(RUN) tests/record.py $(ROWS)

format: $(READY)
	$(RUN) -m ruff check --select I --fix .
	$(RUN) -m ruff format .

environment: $(READY)

# Both frontends have one package name, so that each has a folder of its own.
FRONTENDS := 1.30.6 1.58.1
browser: $(READY)
	$(RUN) -m pip install --disable-pip-version-check --quiet playwright==1.65.2 aiohttp==3.14.5
	@for version in $(FRONTENDS); do \
		test -d $(VENV)/frontends/$$version || \
		$(RUN) -m pip install --disable-pip-version-check --quiet --no-deps \
			--target $(VENV)/frontends/$$version comfyui-frontend-package==$$version || exit 1; \
	done
	$(RUN) tests/tiers.py --must-run browser

# Triton alone, without the torch that it came with, in a folder each. tests/tiers.py runs the newest in CI.
NEWEST := 3.9.0
TRITONS := 3.7.1 3.8.0 $(NEWEST)
compat: $(TRITONS:%=$(VENV)/triton/%/ready)
	@red=0; for version in $(TRITONS); do \
		echo; echo "=== Triton $$version ==="; \
		PYTHONPATH=$(CURDIR)/$(VENV)/triton/$$version $(RUN) tests/tiers.py compile interpret || red=1; \
	done; exit $$red

newest: $(VENV)/triton/$(NEWEST)/ready

$(VENV)/triton/%/ready: $(READY)
	rm -rf $(@D)
	$(RUN) -m pip install --disable-pip-version-check --quiet --no-deps --target $(@D) triton==$*
	touch $@

# Memory: without PyTorch's pool every tensor is an allocation, with padding none touches the next one.
# Races: our kernels alone, whose names are not mangled; not the Hopper one, see benchmarks/NOTES.md.
SANITIZER ?= compute-sanitizer
sanitize: $(READY)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --padding 1024 --error-exitcode 9 \
		$(RUN) -m tests.gpu.sanitize
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool racecheck --error-exitcode 9 \
		--kernel-name 'regex=^[a-z]+_kernel$$' $(RUN) -m tests.gpu.sanitize triton

clean:
	rm -rf $(VENV) demo_out .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The .pth file lets a PYTHON that lives in a virtual environment share its packages, too.
# torch comes first and alone; its own Triton, where it has one, is the one that fits.
$(READY): requirements-dev.txt
	rm -rf $(VENV)
	@if $(PYTHON) -c "import torch" 2>/dev/null; then \
		echo "Making $(VENV) with the torch of $(PYTHON)"; \
		$(PYTHON) -m venv --system-site-packages $(VENV) && \
		site=$$($(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
		$(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$site/shared.pth"; \
	else \
		echo "Making $(VENV) with a torch of its own (a large download)"; \
		$(PYTHON) -m venv $(VENV) && \
		$(RUN) -m pip install --disable-pip-version-check "$$(grep '^torch==' requirements-dev.txt)"; \
	fi
	@have=torch; if $(RUN) -c "import triton" 2>/dev/null; then have="torch|triton"; fi; \
	grep -vE "^($$have)==" requirements-dev.txt > $(VENV)/rest.txt
	$(RUN) -m pip install --disable-pip-version-check --quiet -r $(VENV)/rest.txt
	touch $@
