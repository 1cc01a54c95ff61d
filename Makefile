# make demo | test | test-compile | check; see `make help`.  Another interpreter: make test PYTHON=python3.12 VENV=.venv312
PYTHON ?= python3
VENV ?= .venv
# A JAX release such as 0.11.2, or `newest`; empty: what is there, or the newest that fits.
JAX ?=
PYTEST_ARGS ?= -n 2
# Few programs to compile, and the same text each time.
DEMO_ARGS ?= --model demo --prompts-file jaxinfer/demo/prompts.jsonl --no-json --seed 3 \
  --temperature 0.6 --top-p 0.95 --max-batch-size 8 --max-num-tokens 32

COMMA := ,
BIN := $(VENV)/bin
EXPLICIT := $(if $(filter file,$(origin PYTHON)),,yes)
JAX_PIN := $(if $(filter newest,$(JAX)),--upgrade jax,$(if $(JAX),jax==$(JAX)))
# What is installed stands in stamps, so that it is done once: .core in .test in .dev.
STAMP := $(VENV)/.installed$(addprefix -jax-,$(JAX))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-compile compile-tests kernel-table check link versions interpreter clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

demo: $(STAMP).core  ## write some completions with the shipped model, and their speed
	$(BIN)/python -m jaxinfer generate $(DEMO_ARGS)

test: $(STAMP).test  ## run the tests (PYTEST_ARGS="-n 2")
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# In an environment of its own: where the compilers are installed, jax looks for their chips.
test-compile:  ## compile for TPUs and GPUs that are not here (Linux on x86-64; 1.4 GB of packages)
	@$(MAKE) --no-print-directory compile-tests VENV=$(VENV)-compile

compile-tests: $(STAMP).compile
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m compile

kernel-table: $(STAMP).test  ## write README's table of kernels from docs/kernels.json
	$(BIN)/python -m tests.kernel_record

check: $(STAMP).dev link  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

# Type checkers do not run jaxinfer/__init__.py, which maps kernels/ to jaxinfer.kernels: they look
# into this farm of links instead.  (Not in a folder with a dot: pyright checks no file in those.)
link:
	@mkdir -p build/link/jaxinfer
	@for name in jaxinfer/__init__.py kernels shardings configs; do \
	  ln -sfn "../../../$$name" "build/link/jaxinfer/$${name##*/}"; done

versions: $(STAMP).test
	@$(BIN)/python -c 'import platform, jax, numpy; \
	  print("Python", platform.python_version(), "JAX", jax.__version__, "NumPy", numpy.__version__)'

# $(call install,extras,stamps)
define install
	@rm -f $(VENV)/.installed*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.$(1)' $(JAX_PIN)
	@touch $(2)
endef

$(STAMP).core: pyproject.toml | interpreter
	$(call install,,$(STAMP).core)
$(STAMP).test: pyproject.toml | interpreter
	$(call install,[test],$(STAMP).core $(STAMP).test)
$(STAMP).compile: pyproject.toml | interpreter
	$(call install,[test$(COMMA)aot-tpu$(COMMA)aot-gpu],$(STAMP).core $(STAMP).test $(STAMP).compile)
$(STAMP).dev: pyproject.toml | interpreter
	$(call install,[dev],$(STAMP).core $(STAMP).test $(STAMP).dev)

# Makes the virtual environment if there is none, and refuses one of another Python than asked for.
interpreter:
	@[ -x $(BIN)/python ] || command -v $(PYTHON) >/dev/null || { \
	  echo "jaxinfer needs Python 3.11 or newer, but there is no '$(PYTHON)':" \
	    "make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	  "jaxinfer needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + \
	  ": make $(MAKECMDGOALS) PYTHON=/path/to/python3.11")'
	@[ -x $(BIN)/python ] || { rm -f $(VENV)/.installed*; $(PYTHON) -m venv $(VENV); }
	@[ -z "$(EXPLICIT)" ] || { \
	  wanted=$$($(PYTHON) -c 'import sys; print(*sys.version_info[:2], sep=".")'); \
	  $(BIN)/python -c "import sys; '%d.%d' % sys.version_info[:2] == '$$wanted' or sys.exit( \
	    '$(VENV) has another Python than $(PYTHON), which is $$wanted: name another VENV=...')"; }

clean:  ## remove the virtual environment and what tools left behind
	rm -rf $(VENV) $(VENV)-compile build/link build/lib build/bdist.* dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
	find jaxinfer kernels shardings configs tests -name __pycache__ -type d -prune -exec rm -rf {} +
