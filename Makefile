# make quickstart   everything, from nothing to a report (about 20 minutes on 2 cores)
# make test         lint and the whole test suite (under 9 minutes on 2 cores)
# make docs         the docs site in build/site
# make setup        only the environment in .venv

MUJOCO_GL ?= egl
export MUJOCO_GL
# Nothing here needs a model hub; without this, libraries look for one first and wait for time-outs.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

PY := .venv/bin/python
READY := .venv/.burnish-ready
RECIPE := recipes/tabletop/quickstart.yaml
UPGRADE ?=

.PHONY: quickstart test docs setup lint results constraints
.DELETE_ON_ERROR:

quickstart: $(READY)
	.venv/bin/burnish run $(RECIPE)

# Tiny models run fastest on one thread; training in the quickstart uses every core. Which tests stay together, and in
# which order they run, is in tests/conftest.py.
test: export OMP_NUM_THREADS = 1
test: $(READY) lint
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# A link, an anchor or a name that leads nowhere fails it.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

setup: $(READY)

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh
	@touch $@

# Style, imports (they go down the rooms, no circles), types of the rooms that promise them.
lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/mypy

# Fill the tables of README and docs from results/*.json.
results: $(READY)
	.venv/bin/burnish report results

# Names and versions of everything that the package and its extras pull in.
constraints: $(READY)
	scripts/constraints.sh $(if $(UPGRADE),--upgrade)
