"""Every script in models/ runs from top to bottom at a tiny size."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
FOLDER = Path(__file__).parent.parent / "models"
REFERENCES = set(FOLDER.glob("*_reference.py"))  # long runs of another library
MODELS = sorted(set(FOLDER.glob("*.py")) - REFERENCES)
OPTIONS = {
    "vae_frey_faces": "--data digits",
    "glow_images": "--data digits --classes --dequantizer variational",
}
RUNS = [(path, []) for path in MODELS] + [
    (path, OPTIONS[path.stem].split()) for path in MODELS if path.stem in OPTIONS
]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # ArviZ 0.x announces ArviZ 1
@pytest.mark.parametrize(
    ("path", "options"), RUNS, ids=["_".join([p.stem, *options[1:]]) for p, options in RUNS]
)
def test_runs_in_smoke_mode(path, options, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = tmp_path / "picture.png"
    rows = module.main(module.parse(["--smoke", "--out", str(out), *options]))
    printed = capsys.readouterr().out
    assert all(name in printed for name, _ in rows)
    assert out.stat().st_size > 1000
