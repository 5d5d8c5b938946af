"""The notebook in examples/: that it runs, and that what it shows without running was kept."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

TOUR = Path(__file__).parent.parent / "examples" / "tour.ipynb"


def outputs(notebook, kind):
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in found if kind in output.get("data", {}) or output.output_type == kind]


def test_the_tour_runs(tmp_path, monkeypatch):
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(TOUR, 4)
    (seconds,) = (cell for cell in notebook.cells if cell.source == "SECONDS = 60")
    seconds.source = "SECONDS = 2"
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type == "markdown" else cell.update(outputs=[])
    resources = {"metadata": {"path": str(TOUR.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert len(outputs(notebook, "image/jpeg")) == 5
    said = "".join(output.text for output in outputs(notebook, "stream") if output.name == "stdout")
    assert "aged to 75" in said
    assert "'space', 'tour']" in said


def test_what_the_tour_shows_was_kept_and_is_small():
    notebook = nbformat.read(TOUR, 4)
    assert len(outputs(notebook, "image/jpeg")) == 5
    assert not [output for output in outputs(notebook, "stream") if output.name == "stderr"]
    assert TOUR.stat().st_size < 500_000
    assert "/tmp/" not in TOUR.read_text()
