# make check | test | test-trust | test-mutations | test-slurm | test-versions | test-newest
# make lint | types | format | clean
# make run | compare | docs-pictures
# Options for a run: make run ARGS="--layout tp --steps 50"; for tests: make check PYTEST_ARGS="-k zclip"
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.ONESHELL:
.PHONY: install run compare docs-pictures check test test-trust test-mutations test-slurm test-versions test-newest
.PHONY: lint format types wheel clean

PYTHON ?= python3
NPROC ?= 2
ARGS ?=
PYTEST_ARGS ?=
PY := .venv/bin/python
export OMP_NUM_THREADS ?= 1
# The type checker comes from constraints.txt; it should not talk about newer ones.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
STAMP := .venv/.installed

install: $(STAMP)

# DeepSpeed is built here, and its build imports torch; DS_BUILD_OPS=0: nothing is compiled.
$(STAMP): pyproject.toml constraints.txt tests/peers.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	DS_BUILD_OPS=0 $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt deepspeed
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r tests/peers.txt
	touch $@

run: $(STAMP)
	$(PY) -m launch.run --standalone --nproc-per-node=$(NPROC) -m launch.train --out runs/main $(ARGS)

compare: $(STAMP)
	$(PY) -m launch.compare --out runs/compare $(ARGS)
	$(PY) -m launch.compare --out runs/spikes --seed 1 --ranks 1 --lr 2e-2 --setting="$(SPIKES)" \
		--policies none "clip-norm --policy.max-norm 0.5" zclip "skip-spike --clip 0.5"

SPIKES := --model gpt --width 64 --depth 2 --context 64 --batch 8 --warmup 20 --corrupt 0.03

# The pictures of docs/monitoring.md: three small trainings, half a minute.
docs-pictures: $(STAMP)
	$(PY) examples/gradient_flow.py runs/gradient_flow
	for run in vanishing exploding repaired; do
		$(PY) -m distclip.cli report runs/gradient_flow/$$run
		$(PY) -c "$$IN_FEW_COLORS" runs/gradient_flow/$$run/report.png docs/$$run.png
	done

define IN_FEW_COLORS
import sys
from PIL import Image
source, target = sys.argv[1:]
Image.open(source).convert("RGB").quantize(256).save(target, optimize=True)
endef
export IN_FEW_COLORS

# Before a commit: what needs one process.
check: lint types
	$(PY) -m pytest -n 2 -m "not ranks and not slow" $(PYTEST_ARGS)

# Before a push: everything, as CI does. Three workers for two cores: many tests wait for processes.
test: lint types wheel
	$(PY) -m pytest -n 3 --ignore=tests/slurm $(PYTEST_ARGS)
	$(PY) -m pytest tests/slurm -m "not cluster_slow"

# Faults in the gradients of one rank, 20,000 of them; then, at length, the other tests of
# docs/reliability.md: the state machine, misbehaving ranks, kills, long runs, hostile files. Hours.
# TRUST="--cases 1000 --seed 7": other cases; TRUST="--only 12345": one of them.
TRUST ?= --cases 20000 --seed 0
test-trust: $(STAMP)
	$(PY) -m tests.faults $(TRUST)
	DISTCLIP_TRUST=1 $(PY) -m pytest tests/faults --ignore=tests/faults/test_matrix.py --timeout=7200

# Do the tests see that the code was changed? 300 small changes, one at a time: hours.
# MUTATIONS="--num 100 --seed 1": others. A run that was ended goes on where it was.
MUTATIONS ?= --num 300 --seed 0
test-mutations: $(STAMP)
	$(PY) -m tests.mutations $(MUTATIONS)

# Crashes, cables, time limits on the SLURM cluster: ten minutes. Needs root, and the packages that
# .ci/run installs.
test-slurm: $(STAMP)
	$(PY) -m pytest tests/slurm -m "cluster_slow or not cluster_slow" --durations=0

# The core of the suite on other versions of torch and Python, each in a venv that is deleted after it:
# over an hour. VERSIONS="--quick": a part on the oldest and the newest torch; VERSIONS="--torch 2.9.1": one of them.
VERSIONS ?=
test-versions: $(STAMP)
	$(PY) -m tests.versions $(VERSIONS)

# The newest release of each framework, for example once a week; NAMES="transformers triton": of these.
NAMES ?=
test-newest: $(STAMP)
	$(PY) -m tests.versions.newest $(NAMES)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(STAMP)
	$(PY) -m pyright

# The built wheel in a venv of its own, away from the source. The .pth line lends it torch and nothing
# else: the .pth file of the editable install lies in the lent folder, and Python does not read those.
wheel: $(STAMP)
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT
	$(PY) -m build --wheel --no-isolation --outdir "$$tmp" . > "$$tmp/log" 2>&1 || { cat "$$tmp/log"; exit 1; }
	$(PY) -m venv --without-pip "$$tmp/venv"
	$(PY) -m pip --python "$$tmp/venv/bin/python" install --quiet --no-deps "$$tmp"/*.whl
	lent=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	echo "$$lent" > "$$("$$tmp/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"
	cd "$$tmp" && venv/bin/python -I -c "$$CHECK_WHEEL"

define CHECK_WHEEL
import sys, pathlib, importlib.metadata as metadata
import torch, distclip
files = [str(path) for path in metadata.files("distclip")]
assert pathlib.Path(distclip.__file__).is_relative_to(sys.prefix), distclip.__file__
assert "distclip/py.typed" in files, files
assert {path.split("/")[0].split("-")[0] for path in files} == {"distclip", ".."}, files
assert [path for path in files if path.startswith("..")] == ["../../../bin/distclip"], files
assert "distclip/monitoring/page/page.html.jinja" in files, files
assert [need for need in metadata.requires("distclip") if "extra ==" not in need] == ["torch>=2.9"]
weight = torch.nn.Parameter(torch.zeros(3))
weight.grad = torch.tensor([10.0, 20.0, 30.0])
norm = distclip.clip_grad_norm_([weight], 15.0)
torch.testing.assert_close(norm, torch.tensor(1400.0).sqrt())
torch.testing.assert_close(weight.grad, torch.tensor([10.0, 20.0, 30.0]) * 15 / 1400**0.5)
print(f"wheel: {metadata.version('distclip')}, {len(files)} files; [10, 20, 30] -> {weight.grad.tolist()}")
endef
export CHECK_WHEEL

clean:
	rm -rf runs dist build .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
