"""The notebooks: no outputs are kept, both languages have the same code, and it runs from top to bottom in little.

python -m pytest tests/test_notebook.py -m slow -n0      the run, about a minute
"""

from pathlib import Path

import pytest
from whole_run import TINY

nbformat = pytest.importorskip("nbformat", reason="needs the extra dev")
DOCS = Path(__file__).resolve().parent.parent / "docs"
ENGLISH, KOREAN = DOCS / "tinystories.ipynb", DOCS / "ko" / "tinystories.ipynb"
LITTLE = [t for t in TINY if t.startswith(("model.", "train."))]
LITTLE += ["model.vocab_size=384", "eval.sample_tokens=8", "data.val_fraction=0.05"]


def cells(path):
    return nbformat.read(path, as_version=4).cells


def code(path):
    return [cell.source for cell in cells(path) if cell.cell_type == "code"]


@pytest.mark.parametrize("path", [ENGLISH, KOREAN], ids=["en", "ko"])
def test_what_is_kept_has_never_run(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert all(not cell.outputs and cell.execution_count is None for cell in cells(path) if cell.cell_type == "code")


def test_both_languages_have_the_same_code():
    assert code(ENGLISH) == code(KOREAN) and len(code(ENGLISH)) >= 8
    text = "".join(cell.source for cell in cells(KOREAN) if cell.cell_type == "markdown")
    assert len([c for c in text if "가" <= c <= "힣"]) > 300


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(corpus, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra dev")
    pytest.importorskip("ipykernel", reason="needs the extra dev")
    notebook = nbformat.read(ENGLISH, as_version=4)
    for cell in notebook.cells:
        if "settings" in cell.metadata.get("tags", ()):
            words = [word for setting in LITTLE for word in ("--set", setting)]
            cell.source += f"\nRUNS = Path({str(tmp_path)!r})"
            cell.source += f"\nSETTINGS = {['--data', f'files:{corpus}/*.txt', *words]!r}"
        if "install" in cell.metadata.get("tags", ()):  # what runs the tests has it all
            assert cell.source.count('run("-m", "pip"') == 2
            cell.source = cell.source.replace('run("-m", "pip"', 'print("pip"')
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(DOCS)}})
    client.execute()
    said = ["".join(out.get("text", "") for out in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    assert (tmp_path / "tinystories" / "base" / "24" / "SHA256SUMS").exists()
    assert "pretrain   done in" in said[5] and "muon" in said[7] and "Once upon a time there was a robot who" in said[8]
    assert "pretrain   done (" in said[9] and "nothing to do" in said[9]
    looked = [out.data.keys() for out in notebook.cells[14].outputs]
    assert any("image/png" in keys for keys in looked) and any("text/markdown" in keys for keys in looked)
