"""The network against the authors' outputs, gradients and file layouts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model import SwinIR

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted((GOLDEN / "model").glob("*.npz"))
PUBLISHED = json.loads((GOLDEN / "published_networks.json").read_text())


def golden_network(path, **overrides):
    z = np.load(path)
    net = SwinIR(**json.loads(str(z["config"])) | overrides)
    net.load_state_dict({k[6:]: torch.from_numpy(z[k]) for k in z.files if k.startswith("param/")}, strict=True)
    return z, net


def gradients(net, z):
    net.zero_grad()
    loss = (net(torch.from_numpy(z["in"])) - torch.from_numpy(z["target"])).abs().mean()
    loss.backward()
    return loss.item(), {k: p.grad for k, p in net.named_parameters()}


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_output_and_gradients_are_the_authors(path):
    z, net = golden_network(path)
    net.eval()
    loss, grads = gradients(net, z)
    with torch.no_grad():
        out = net(torch.from_numpy(z["in"]))
    assert abs(out.double().numpy() - z["out64"]).max() < 1e-5
    assert loss == pytest.approx(float(z["l1"]), abs=1e-6)
    assert grads.keys() == {k[5:] for k in z.files if k.startswith("grad/")}
    for k, g in grads.items():
        want = torch.from_numpy(z["grad/" + k])
        assert (g - want).norm() <= 1e-4 * want.norm(), k


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_is_the_published_one(name):
    want = PUBLISHED[name]
    with torch.device("meta"):
        net = SwinIR(**want["config"])
    assert sum(p.numel() for p in net.parameters()) == want["parameters"]
    assert [(k, list(v.shape)) for k, v in net.state_dict().items()] == [(k, list(s)) for k, s in want["state_dict"].items()]


def test_checkpointed_gradients_agree():
    z, net = golden_network(CASES[0], drop_path_rate=0.3)
    torch.manual_seed(0)
    _, plain = gradients(net.train(), z)
    z, net = golden_network(CASES[0], drop_path_rate=0.3, use_checkpoint=True)
    torch.manual_seed(0)
    _, saved = gradients(net.train(), z)
    for k in plain:
        assert torch.allclose(plain[k], saved[k], rtol=1e-5, atol=1e-7), k
