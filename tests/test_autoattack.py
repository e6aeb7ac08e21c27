"""`autoattack` against `pyautoattack.AutoAttack` itself, and its manners."""

import sys
import threading
from itertools import pairwise

import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn

from ferdlib.attacks import autoattack
from ferdlib.attacks.autoattack import VERSIONS, _attacks

STANDARD = ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.fixture
def unspoiled():
    """The official suite reseeds torch and stops tracing; keep that from the other tests."""
    random, trace, tracing = torch.get_rng_state(), sys.gettrace(), threading.gettrace()
    yield
    torch.set_rng_state(random)
    threading.settrace(tracing)
    sys.settrace(trace)


def problem(make, num_classes, n=12):
    """A model and images of which it calls all but the first two right."""
    model = make(num_classes=num_classes, in_channels=1, width=6, seed=2)
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    y[:2] = (y[:2] + 1) % num_classes
    return model, x, y


def official(model, x, y, *, num_classes, eps, attacks, batch_size, seed):
    """The suite's own evaluation with the settings of its standard version."""
    suite = AutoAttack(model, eps=eps, version="standard", seed=seed)
    suite.version, suite.attacks_to_run = "custom", attacks
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = min(9, num_classes - 1)
    flags, x_adv = {}, x
    for last in range(len(attacks) + 1):
        suite.attacks_to_run = attacks[:last] or ["apgd-ce"]
    x_adv, y_adv = suite.run_standard_evaluation(x, y, batch_size=batch_size)
    return x_adv, y_adv == y, flags


@pytest.mark.usefixtures("unspoiled")
def test_probe(tiny_model):
    import time
    for k, epss in ((10, (.01,.02, .04, .06)), (3, (.02,.05, .1)), (2, (.02,.05, .1))):
        for eps in epss:
            model, x, y = problem(tiny_model, k)
            t = time.time()
            r = autoattack(model, x, y, num_classes=k, eps=eps, batch_size=5, seed=3)
            print(k, eps, {a: int(v.sum()) for a, v in r.per_attack.items()}, time.time() - t)
    assert 0
