# Two commands for newcomers: `make demo` and `make test`. Both create .venv when it is missing.
VENV := .venv
BIN := $(VENV)/bin
SHORT := --data python-topics --steps 8 --batch-size 1 --block-length 128 --selection-blocks 4 \
	--validation-blocks 8
DEMO := $(SHORT) --budget 0.45% --methods lora,mos,neuroada,sara,hut,peft:vera
ALL := $(SHORT) --methods all-adapt,peft:vera

.PHONY: demo test check docs picture gallery clean

demo: $(VENV)/installed
	$(BIN)/sparing compare smollm2-135m $(DEMO) --out runs/demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

check: $(VENV)/developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/developer
	$(BIN)/mkdocs build --strict

# Puts the demo's table and picture into README.md and docs/gallery.md, and renders the evidence.
picture: demo
	$(BIN)/python docs/render.py runs/demo

# The same, with all methods at two budgets: half an hour on two cores.
gallery: demo
	$(BIN)/sparing compare smollm2-135m $(ALL) --budget 0.25% --out runs/all-small
	$(BIN)/sparing compare smollm2-135m $(ALL) --budget 1% --out runs/all-large
	$(BIN)/python docs/render.py runs/demo runs/all-small runs/all-large

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/developer: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
