"""A server's life: 100,000 random calls, each number checked, and no memory added."""

import copy
import gc
import io
import os
import pickle
import random
import time

import pytest
import torch

import pyroflows as pf

CALLS = 100_000
FLOWS = {
    "nice": lambda: pf.nice(2, layers=2, hidden=(4,)),
    "realnvp": lambda: pf.realnvp(2, 1, layers=1, hidden=(4,)),
    "maf": lambda: pf.maf(2, layers=1, hidden=(4,)),
    "iaf": lambda: pf.iaf(2, 1, layers=1, hidden=(4,)),
    "nsf": lambda: pf.nsf(2, layers=1, hidden=(4,), bins=4),
}


def resident():
    """MiB of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def check(found, expected, tolerance):
    worst = (found.detach() - expected.detach()).abs().max().item()
    assert worst <= tolerance * (1 + expected.detach().abs().max().item()), worst


class Life:
    """One flow through all that is done to it, beside what its numbers have to be."""

    def __init__(self, kind, folder, chance):
        self.flow, self.folder, self.chance = FLOWS[kind]().double(), folder, chance
        self.context = torch.randn(8, 1).double() if self.flow.context_shape else None
        self.shape = () if self.flow.context_shape else (8,)
        self.kept = []  # distributions and their draws, alive for a while
        self.move()

    def move(self):
        """Weights change; a twin that has never been called says what comes out of them."""
        for parameter in self.flow.parameters():
            parameter.grad = None
        optimiser = torch.optim.Adam(self.flow.parameters(), lr=1e-3)
        x = self.flow.sample(self.shape, self.context)
        (-self.flow.log_prob(x, self.context).mean() + 1e-2 * x.square().mean()).backward()
        optimiser.step()
        twin = copy.deepcopy(self.flow).eval()
        self.x = torch.randn(8, 2).double()
        with torch.no_grad():
            self.scores = twin.log_prob(self.x, self.context)
            torch.manual_seed(7)
            self.draws = twin.sample(self.shape, self.context)

    def score(self):
        scores = self.flow.log_prob(self.x, self.context)
        check(scores, self.scores, 1e-12)

    def score_row_by_row(self):
        row = self.chance.randrange(8)
        context = None if self.context is None else self.context[row]
        score = self.flow.log_prob(self.x[row], context).detach()
        check(score, self.scores[row], 1e-10)

    def sample(self):
        torch.manual_seed(7)
        draws = self.flow.sample(self.shape, self.context)
        check(draws, self.draws, 1e-12)
        torch.manual_seed(self.chance.randrange(2**31))

    def draw_and_score(self):
        """From the memo and as new: one density."""
        distribution = self.flow(self.context)
        draws = distribution.rsample(self.shape)
        memo = distribution.log_prob(draws)
        self.kept = [*self.kept[-3:], (distribution, draws)]
        check(memo, self.flow.log_prob(draws.detach().clone(), self.context), 1e-8)

    def score_an_old_draw(self):
        if self.kept:
            distribution, draws = self.chance.choice(self.kept)
            memo = distribution.log_prob(draws)
            check(memo, distribution.log_prob(draws.detach().clone()), 1e-8)

    def draw_with_score(self):
        draws, scores = self.flow.rsample_and_log_prob(self.shape, self.context)
        new = self.flow.log_prob(draws.detach(), self.context)
        check(scores, new, 1e-8)

    def gradient(self):
        x = self.x.clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.flow.log_prob(x, self.context).sum(), x)
        assert slope.isfinite().all()

    def go_on_as_saved(self):
        if self.chance.random() < 0.5:
            self.flow = pf.load(pf.save(self.flow, self.folder))
        elif self.chance.random() < 0.5:
            self.flow = pickle.loads(pickle.dumps(self.flow))
        else:
            buffer = io.BytesIO()
            torch.save(self.flow.state_dict(), buffer)
            buffer.seek(0)
            self.flow.load_state_dict(torch.load(buffer))

    def switch(self):
        """Modes: of training, of gradients, of another dtype and back."""
        mode = self.chance.randrange(4)
        if mode == 0:
            self.flow.train(self.chance.random() < 0.5)
        elif mode == 1:
            self.flow.requires_grad_(False)
            self.score()
            self.flow.requires_grad_(True)
        elif mode == 2:
            single = copy.deepcopy(self.flow).float()
            context = None if self.context is None else self.context.float()
            scores = single.log_prob(self.x.float(), context).detach().double()
            check(scores, self.scores, 1e-3)
        else:
            self.flow = copy.deepcopy(self.flow)


# What is called, and how often.
CHANCES = {
    Life.score: 35,
    Life.score_row_by_row: 10,
    Life.sample: 25,
    Life.draw_and_score: 7,
    Life.score_an_old_draw: 3,
    Life.draw_with_score: 5,
    Life.gradient: 6,
    Life.switch: 5,
    Life.go_on_as_saved: 2,
    Life.move: 2,
}


def live(calls, folder):
    """So many calls; the memory after each twentieth of them."""
    chance = random.Random(0)
    lives = [Life(kind, folder / kind, chance) for kind in FLOWS]
    actions, weights = list(CHANCES), list(CHANCES.values())
    seen = []
    for call in range(calls):
        (action,) = chance.choices(actions, weights)
        with torch.set_grad_enabled(action is Life.move or chance.random() < 0.5):
            action(chance.choice(lives))
        if (call + 1) % (calls // 20) == 0:
            gc.collect()
            seen.append(resident())
    return seen


def test_five_hundred_random_calls(tmp_path):
    live(500, tmp_path)


@pytest.mark.slow
def test_a_hundred_thousand_random_calls(tmp_path):
    begin = time.process_time()
    seen = live(CALLS, tmp_path)
    print(
        f"{CALLS} calls in {time.process_time() - begin:.0f} s of one core: {seen[4]:.1f} MiB "
        f"after a quarter, {seen[-1]:.1f} MiB at the end"
    )
    # The first calls fill caches; from then on nothing is added.
    assert seen[-1] - seen[4] < 8, [f"{mib:.1f}" for mib in seen]
