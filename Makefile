PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint notebooks site clean

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,docs,notebooks]"
	touch $@

demo: $(STAMP)
	$(BIN)/python -m attacks.dlg --batch 1 --out runs/demo-dlg
	$(BIN)/python -m fltoolkit train --data digits --clients 1437 --fraction 0.1 --epochs 1 --batch inf --lr 0.3 \
		--rounds 100 --attack dlg --attack-every 25 --out runs/demo-train
	@echo
	@echo "Pictures and reports of this demo:"
	@ls runs/demo-dlg/*.png runs/demo-dlg/*.json runs/demo-train/*.png runs/demo-train/*.json

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile

notebooks: $(STAMP)
	$(BIN)/python notebooks/run.py

site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv runs build *.egg-info
