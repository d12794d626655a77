"""What a user's editor knows: mypy in strict mode over a small script that uses the package."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

PROJECT = Path(__file__).parent.parent
# The user's own script is held to the strict rules; what it imports is only read.
SETTINGS = """
[mypy]
strict = true
[mypy-pyroflows.*,pyro.*]
follow_imports = silent
ignore_missing_imports = true
"""
RIGHT = """
import torch
import pyroflows as pf


def train(x: torch.Tensor) -> torch.Tensor:
    flow = pf.maf(2, hidden=(8, 8), family="spline")
    history: pf.History = pf.fit(flow, x, max_epochs=1, progress=False)
    student = pf.student_of(flow, hidden=(16, 16))
    draws, log_prob = student.rsample_and_log_prob((5,))
    q = flow()
    print(history.train, q.log_prob(draws), flow.dtype, flow.device, flow.fast, len(flow.parts))
    chain = pf.Chain([pf.transforms.LULinear(2), pf.transforms.LULinear(2).inv])
    pf.fit(pf.quantized(flow, 8), x.long(), lr=1e-2, dropout=None)
    pf.initialize(pf.quantized(flow, 8), x.long())
    pf.fit(pf.pixelcnn((1, 4, 4)), x.long(), fabric={"devices": 1})
    pf.fit(flow, x, checkpoint=pf.Checkpoint("run", every=0.5, resume=True))
    return pf.Flow(chain, shape=2).sample(3) + log_prob.sum()


class Double(pf.FlowTransform):
    fast = "both"

    def forward_and_log_det(
        self, x: torch.Tensor, context: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * x, x.new_full(x.shape[:-1], 0.69)


@pf.flows.builder
def doubled(features: int, context: int = 0) -> pf.Flow:
    return pf.Flow(Double(), shape=features, context=context)


print(doubled(3, context=2)(torch.zeros(2)).sample())
"""
REVEALED = """
import torch
import pyroflows as pf

flow = pf.maf(2)
reveal_type(pf.maf)
reveal_type(flow())
reveal_type(flow.sample())
reveal_type(flow().rsample_and_log_prob())
reveal_type(pf.pixelcnn((1, 4, 4)))
reveal_type(pf.fit(flow, torch.zeros(3, 2)))
reveal_type(pf.student_of(flow))
reveal_type(pf.glow((1, 4, 4)))
"""
WRONG = {
    "pf.maf(2, hiden=(8,))": '"hiden"',
    "pf.nsf(2, bins='eight')": 'Argument "bins"',
    "pf.maf(2)(validate=True)": '"validate"',
    "pf.maf(2, family=3)": 'Argument "family"',
    "pf.fit(pf.maf(2), [[1.0, 2.0]], lrr=0.1)": '"lrr"',
    "pf.distill(pf.maf(2), pf.maf(2), clip='one')": 'Argument "clip"',
}


def checked(script, folder):
    """What mypy says of a script, line by line."""
    (folder / "script.py").write_text(script)
    (folder / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "script.py"]
    result = subprocess.run(
        command,
        cwd=folder,
        env={"MYPYPATH": str(PROJECT), "MYPY_CACHE_DIR": str(PROJECT / ".mypy_cache" / "user")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not result.stderr, result.stderr
    return result.stdout.splitlines()


def test_a_right_script_has_no_errors(tmp_path):
    assert checked(RIGHT, tmp_path) == ["Success: no issues found in 1 source file"]


def test_types_are_known(tmp_path):
    found = [line.partition("Revealed type is ")[2] for line in checked(REVEALED, tmp_path)]
    maf, call, draw, both, pixels, history, student, glow, _ = found
    for argument in ("features: int", "hidden: typing.Sequence[int]", "linear: str"):
        assert argument in maf.replace("builtins.", "").replace("collections.abc", "typing")
    assert maf.endswith('-> pyroflows.distributions.flow.Flow"')
    assert call == '"pyroflows.distributions.flow_distribution.FlowDistribution"'
    assert draw == '"torch._tensor.Tensor"'
    assert both == '"tuple[torch._tensor.Tensor, torch._tensor.Tensor]"'
    assert pixels == '"pyroflows.discrete.pixel_model.PixelCNN"'
    assert history == '"pyroflows.training.history.History"'
    assert student == glow == '"pyroflows.distributions.flow.Flow"'


def test_mistakes_are_seen(tmp_path):
    script = "import pyroflows as pf\n" + "\n".join(WRONG)
    errors = checked(script, tmp_path)
    for line, message in enumerate(WRONG.values(), start=2):
        here = [e for e in errors if e.startswith(f"script.py:{line}: error:")]
        assert any(message in e for e in here), errors
