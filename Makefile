# make demo: age the faces of a real photo and a short video, and say where the pictures are
# make test: lint, type-check, test
# make chaos: kill 25 runs at random moments, go on with them, and compare
# All set up .venv first; they need Python 3.11 or newer, and PyPI once.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test chaos clean

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "faceage needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev,train]'
	touch $@

demo: .venv/installed
	$(BIN)/python examples/demo_clip.py out/demo
	$(BIN)/faceage images out/demo/portrait.png -o out --age 70 --overwrite
	$(BIN)/faceage video out/demo/clip.mp4 -o out/clip_70.mp4 --age 70 --overwrite
	$(BIN)/faceage sheet out/demo/portrait.png -o out/sheet.png --ages 10,20,30,40,50,60,70,80 --overwrite
	$(BIN)/python examples/before_after.py out/demo/clip.mp4 out/clip_70.mp4 out/before_after.mp4
	@echo
	@echo "The faces, aged:"
	@echo "  out/portrait.png      the photo at 70 (before: out/demo/portrait.png)"
	@echo "  out/clip_70.mp4       the video at 70 (before: out/demo/clip.mp4)"
	@echo "  out/before_after.mp4  both videos side by side"
	@echo "  out/sheet.png         one face at eight ages"

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

chaos: .venv/installed
	FACEAGE_CHAOS=25 $(BIN)/python -m pytest -q -o faulthandler_timeout=0 tests/test_chaos.py

clean:
	rm -rf .venv out build dist *.egg-info
