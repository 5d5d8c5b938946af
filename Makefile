# make demo: age the faces of a real photo and a short video, and say where the pictures are
# make test: lint, type-check, test
# make lean: install the wheel alone in an environment of its own, measure it, age a photo and a video; the same from
#   source where there is Python and nothing else, which takes root (1 min)
# make chaos: kill 25 runs on a video and 3 on a folder of 3,000 photos at random moments, go on with them, and compare
# They need Python 3.11 or newer, and PyPI once: demo sets up .venv-lean (0.7 GB), the others .venv (7 GB).

PYTHON ?= python3
BIN := .venv/bin
LEAN := .venv-lean/bin

.PHONY: demo test lean pictures chaos clean

.venv/installed .venv-lean/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "faceage needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --editable $(if $(findstring lean,$@),.,'.[dev,train]')
	touch $@

demo: .venv-lean/installed
	$(LEAN)/python examples/demo_clip.py out/demo
	$(LEAN)/faceage images examples/portrait.jpg -o out --age 70 --overwrite
	$(LEAN)/faceage video out/demo/clip.mp4 -o out/clip_70.mp4 --age 70 --overwrite
	$(LEAN)/faceage sheet examples/portrait.jpg -o out/sheet.png --ages 10,20,30,40,50,60,70,80 --overwrite
	$(LEAN)/python examples/before_after.py out/demo/clip.mp4 out/clip_70.mp4 out/before_after.mp4
	@echo
	@echo "The faces, aged:"
	@echo "  out/portrait.jpg      the photo at 70 (before: examples/portrait.jpg)"
	@echo "  out/clip_70.mp4       the video at 70 (before: out/demo/clip.mp4)"
	@echo "  out/before_after.mp4  both videos side by side"
	@echo "  out/sheet.png         one face at eight ages"

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lean: .venv/installed
	FACEAGE_LEAN=1 $(BIN)/python -m pytest -q -s tests/test_lean.py

# After a change of the models: what examples/ shows of them.
pictures: .venv/installed
	$(BIN)/python examples/what_it_makes.py examples/what_it_makes.jpg
	$(BIN)/jupyter execute --inplace examples/tour.ipynb

chaos: .venv/installed
	FACEAGE_CHAOS=25 $(BIN)/python -m pytest -q -s -o faulthandler_timeout=0 tests/test_chaos.py

clean:
	rm -rf .venv .venv-lean out build dist *.egg-info
