"""The network against the authors' outputs, gradients and file layouts."""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import pickletools
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import types
import zipfile
import zlib
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import model
from data import read_image, write_image
from model import SwinIR, load, load_weights, portable, restore
from train import load_config

TINY = {
    "img_size": 16,
    "window_size": 8,
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "mlp_ratio": 2,
    "upscale": 1,
}
HEADS = [
    ("", 1),
    ("pixelshuffle", 2),
    ("pixelshuffle", 3),
    ("pixelshuffle", 4),
    ("pixelshuffledirect", 3),
]
HEADS += [("nearest+conv", 2), ("nearest+conv", 4)]
GOLDEN = Path(__file__).parent / "golden"
CASES = sorted((GOLDEN / "model").glob("*.npz"))
PUBLISHED = json.loads((GOLDEN / "published_networks.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read(path):
    return read_image(path, alpha=True)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, pixels)


def golden_network(path, **overrides):
    z = np.load(path)
    net = SwinIR(**json.loads(str(z["config"])) | overrides)
    net.load_state_dict(
        {k[6:]: torch.from_numpy(z[k]) for k in z.files if k.startswith("param/")}, strict=True
    )
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
    assert [(k, list(v.shape)) for k, v in net.state_dict().items()] == [
        (k, list(s)) for k, s in want["state_dict"].items()
    ]


def test_the_residual_stream_is_float32_with_autocast():
    """Rounded to bfloat16 it would lose what many blocks add."""
    net, seen = lively(SwinIR(**TINY)), []
    for layer in net.layers:
        layer.register_forward_hook(lambda layer, x, y: seen.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        net(torch.rand(1, 3, 16, 16))
    assert seen == [torch.float32] * 2
    with torch.no_grad():
        assert net.bfloat16()(torch.rand(1, 3, 16, 16).bfloat16()).dtype == torch.bfloat16


def two_routes(route: str, window: int = 8, **arguments: object) -> tuple[SwinIR, SwinIR]:
    """The reference and `route`, from the same file, with weights that hide nothing."""
    arguments = {
        "embed_dim": 20,
        "depths": (2,),
        "num_heads": (2,),
        "window_size": window,
    } | arguments
    options = arguments | {"img_size": 2 * window, "drop_path_rate": 0.0}
    torch.manual_seed(0)
    reference, other = SwinIR(**options), SwinIR(**options, attention=route)
    for parameter in reference.parameters():
        torch.nn.init.trunc_normal_(parameter, std=0.2)
    other.load_state_dict(reference.state_dict(), strict=True)
    assert other.arguments == reference.arguments  # files don't tell
    return reference, other


ROUTES = sorted(set(model.ATTENTION) - {"math"})


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("arguments", [{}, {"window": 7, "qkv_bias": False}, {"embed_dim": 16}])
def test_each_attention_is_the_reference(route, arguments):
    reference, other = (net.double() for net in two_routes(route, **arguments))
    x = torch.rand(2, 3, 33, 25, dtype=torch.float64)  # several windows: shifted ones are masked
    outputs = [reference(x), other(x)]
    weights = torch.rand_like(outputs[0])
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
    for output in outputs:
        output.backward(weights)
    for a, b in zip(reference.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6 * a.grad.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(reference(x), other(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(reference(x), outputs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("route", model.ATTENTION)
def test_each_attention_compiles_in_one_piece(route):
    _, net = two_routes(route)
    want = net(torch.ones(1, 3, 16, 16))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(1, 3, 16, 16)), want)
    torch.compiler.reset()


def test_attention_drops_weights_in_training_only():
    for route in ROUTES:
        _, net = two_routes(route, attn_drop_rate=0.5)
        x = torch.rand(1, 3, 16, 16)
        assert not torch.equal(net(x), net(x))
        net.eval()
        assert torch.equal(net(x), net(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, for the kernel's choice")
@pytest.mark.parametrize("arguments", [{}, {"window": 7}, {"embed_dim": 60}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sdpa_takes_the_efficient_kernel_on_a_gpu(arguments, dtype):
    _, net = two_routes("sdpa", **arguments)
    x = torch.rand(2, 3, 48, 48, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            net.cuda()(x).sum().backward()
        with torch.no_grad():
            net(x)
    counts = {event.key: event.count for event in record.key_averages()}
    blocks = sum(net.arguments["depths"])
    assert counts["aten::_scaled_dot_product_efficient_attention"] == 2 * blocks
    assert counts["aten::_scaled_dot_product_efficient_attention_backward"] == blocks
    assert "aten::_scaled_dot_product_attention_math" not in counts


def test_checkpointed_gradients_agree():
    z, net = golden_network(CASES[0], drop_path_rate=0.3)
    torch.manual_seed(0)
    _, plain = gradients(net.train(), z)
    z, net = golden_network(CASES[0], drop_path_rate=0.3, use_checkpoint=True)
    torch.manual_seed(0)
    _, saved = gradients(net.train(), z)
    for k in plain:
        assert torch.allclose(plain[k], saved[k], rtol=1e-5, atol=1e-7), k


# ---- weights ----


def lively(net, seed=0):
    """Random weights that make every part matter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return net.eval()


def identity(**overrides):
    net = SwinIR(**TINY | overrides).eval()
    torch.nn.init.zeros_(net.conv_last.weight)
    torch.nn.init.zeros_(net.conv_last.bias)
    return net


def saved(path, net, **extra):
    torch.save({"params_ema": portable(net.state_dict()), "arguments": net.arguments} | extra, path)
    return path


@pytest.mark.parametrize("upsampler, upscale", HEADS)
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"in_chans": 1, "window_size": 7, "img_size": 21, "img_range": 255.0, "mlp_ratio": 2.7},
        {
            "resi_connection": "3conv",
            "qkv_bias": False,
            "patch_norm": False,
            "depths": (1, 3, 2),
            "num_heads": (2, 3, 4),
        },
        {"ape": True, "img_size": 24},
    ],
)
def test_arguments_are_read_off_the_shapes(tmp_path, upsampler, upscale, extra):
    net = lively(SwinIR(**TINY | {"upsampler": upsampler, "upscale": upscale} | extra))
    x = torch.rand(1, net.conv_first.in_channels, 19, 26)
    want = net(x).detach()
    foreign = {f"module._orig_mod.{k}": v for k, v in net.state_dict().items()}
    for wrapped in (
        foreign,
        {"params": foreign},
        {"state_dict": foreign, "iter": 1},
        {"params-ema": foreign},
    ):
        torch.save(wrapped, tmp_path / "net.pth")
        got = load(tmp_path / "net.pth")
        assert not got.training
        assert torch.equal(got(x), want)
    if "depths" not in extra:  # where layers have no second block, nothing tells the training size
        assert got.arguments | {"mlp_ratio": 0} == net.arguments | {"mlp_ratio": 0}
    assert torch.equal(load(saved(tmp_path / "ours.pth", net))(x), want)
    assert load(tmp_path / "ours.pth").arguments == net.arguments


def test_param_key_chooses_the_weights(tmp_path):
    a, b = lively(SwinIR(**TINY), 1), lively(SwinIR(**TINY), 2)
    saved(tmp_path / "n.pth", a, params=portable(b.state_dict()))
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(load(tmp_path / "n.pth")(x), a(x))
    assert torch.equal(load(tmp_path / "n.pth", "params")(x), b(x))
    with pytest.raises(ValueError):
        load(tmp_path / "n.pth", "params_foo")


def test_files_are_small_and_copies(tmp_path):
    small = {
        "img_size": 40,
        "window_size": 8,
        "embed_dim": 48,
        "depths": (2, 2, 2),
        "num_heads": (3, 3, 3),
        "mlp_ratio": 2,
    }
    net = SwinIR(**small, upscale=1)
    net.compile()
    shared = {}
    both = {k: portable(net.state_dict(), shared) for k in ("params", "params_ema")}
    torch.save(both, tmp_path / "net.pth")
    bytes_ = 2 * 4 * sum(p.numel() for p in net.parameters())
    assert (
        tmp_path / "net.pth"
    ).stat().st_size <= 1.2 * bytes_  # masks are float16: spandrel refuses int8
    before = both["params"]["norm.weight"].clone()
    with torch.no_grad():
        net.norm.weight.add_(1)
    assert torch.equal(both["params"]["norm.weight"], before)
    back = torch.load(tmp_path / "net.pth")["params"]
    for k, v in net.state_dict().items():
        assert back[k].is_contiguous()
        if k.endswith(model.BUFFERS):
            assert torch.equal(back[k].to(v.dtype), v)


def test_files_of_other_sizes_and_without_buffers_load():
    a, b = lively(SwinIR(**TINY)), SwinIR(**TINY | {"img_size": 48}).eval()
    bare = {k: v for k, v in a.state_dict().items() if not k.endswith(model.BUFFERS)}
    for weights in (a.state_dict(), bare, portable(a.state_dict())):
        b.load_state_dict(weights, strict=True)
        assert b.state_dict()["layers.0.residual_group.blocks.1.attn_mask"].shape[0] == 36
    x = torch.rand(1, 3, 30, 20)
    assert torch.equal(a(x), b(x))
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        b.load_state_dict({k: v for k, v in bare.items() if k != "norm.weight"})


def test_fine_tuning_says_what_was_taken(tmp_path):
    x2 = lively(SwinIR(**TINY | {"upsampler": "pixelshuffledirect", "upscale": 2}))
    net = SwinIR(**TINY | {"upsampler": "pixelshuffledirect", "upscale": 3, "in_chans": 1})
    path = saved(tmp_path / "x2.pth", x2)
    n = len(list(net.parameters()))
    said = load_weights(net, path, strict=False)
    left = "conv_first.weight, upsample.0.weight, upsample.0.bias"
    assert (
        said
        == f"{path}: {n - 3} of {n} tensors taken; not taken: {left}; its in_chans is 3; its upscale is 2"
    )
    assert torch.equal(net.norm.weight, x2.norm.weight)
    said = rf"x2\.pth: these tensors do not fit: conv_first\.weight.*strict_load=False takes {n - 3} .*in_chans is 3"
    with pytest.raises(ValueError, match=said):
        load_weights(net, path)
    assert load_weights(SwinIR(**x2.arguments), path) == f"{path}: {n} of {n} tensors taken"
    said = load_weights(SwinIR(**x2.arguments | {"img_range": 255.0}), path)  # no shape tells of it
    assert said == f"{path}: {n} of {n} tensors taken; its img_range is 1.0"
    torch.save({k: torch.zeros(3) for k in net.state_dict()}, path)
    with pytest.raises(ValueError, match="none of its tensors fits"):
        load_weights(net, path, strict=False)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def hostile_checkpoints(folder):
    good = saved(folder / "good.pth", SwinIR(**TINY)).read_bytes()
    (folder / "short.pth").write_bytes(good[: len(good) // 2])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("<html>not found</html>")
    (folder / "folder.pth").mkdir()
    torch.save({"params": Trap()}, folder / "code.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save({"params": {"a": torch.zeros(1)}}, folder / "other.pth")
    state = SwinIR(**TINY).state_dict()
    torch.save(state | {"conv_first.weight": torch.zeros(5)}, folder / "shape.pth")
    torch.save(
        {"params": state, "arguments": {"embed_dim": 10**9, "foo": 1}}, folder / "arguments.pth"
    )
    torch.save(
        {"params": {k: v for k, v in state.items() if "table" not in k}}, folder / "missing.pth"
    )
    torch.save({"params": {"conv_first.weight": torch.zeros(4, 3, 3, 3)}}, folder / "lone.pth")
    return [p for p in sorted(folder.glob("*.pth")) if p.name != "good.pth"] + [folder / "none.pth"]


def test_what_is_no_checkpoint_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in hostile_checkpoints(tmp_path):
        with pytest.raises(ValueError) as e:
            load(path)
        assert str(e.value).startswith(f"{path}: "), path
        assert "\n" not in str(e.value)
    assert not Path("trapped").exists()


# ---- what other programs write ----


def safetensors(path, tensors, metadata=None):
    """Writes float32 tensors in the format, without its package."""
    header, body = {"__metadata__": metadata or {}}, b""
    for key, value in tensors.items():
        content = value.float().contiguous().numpy().tobytes()
        offsets = [len(body), len(body) + len(content)]
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
        body += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def parameters(net, prefix=""):
    return {prefix + key: value.detach() for key, value in net.named_parameters()}


def same(net, path, *param_key):
    """Whether `load` and `load_weights` find the weights of `net` in the file."""
    fresh = lively(SwinIR(**TINY), 99)
    load_weights(fresh, path, *param_key)
    for other in (load(path, *param_key), fresh):
        got = parameters(other)
        for key, value in parameters(net).items():
            if not torch.equal(got[key], value):
                return False
    return True


@pytest.mark.parametrize("name", ["net.safetensors", "net.pth"])
def test_safetensors_are_known_by_their_content(tmp_path, name):
    pytest.importorskip("safetensors")
    net = lively(SwinIR(**TINY))
    path = safetensors(tmp_path / name, parameters(net), {"format": "pt"})
    assert same(net, path) and same(net, path, "params")
    with pytest.raises(model.UserError, match=r"no 'foo', but weights without a name .param_key"):
        load(path, "foo")
    both = parameters(lively(SwinIR(**TINY), 1), "params.") | parameters(net, "params_ema.")
    assert same(net, safetensors(path, both))
    assert not same(net, path, "params")
    with pytest.raises(model.UserError, match=r"no 'foo', but 'params', 'params_ema' .param_key"):
        load(path, "foo")


def test_a_checkpoint_of_torch_is_read_under_any_suffix(tmp_path):
    net = lively(SwinIR(**TINY))
    for name in ("net.safetensors", "net.ckpt", "net"):
        assert same(net, saved(tmp_path / name, net))


def test_safetensors_without_the_package_or_damaged_are_refused(tmp_path, monkeypatch):
    path = safetensors(tmp_path / "net.safetensors", parameters(SwinIR(**TINY)))
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        patch.delitem(sys.modules, "safetensors.torch", raising=False)
        said = r"net\.safetensors: it is a safetensors file: pip install safetensors$"
        with pytest.raises(model.UserError, match=said):
            load(path)
    pytest.importorskip("safetensors")
    for end in (30, 1000, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(model.UserError, match=r"net\.safetensors: it is damaged: .* again"):
            load(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_keep_their_values(tmp_path, dtype):
    net = lively(SwinIR(**TINY)).to(dtype)
    torch.save({"params": net.state_dict()}, tmp_path / "net.pth")
    files = [tmp_path / "net.pth"]
    if find_spec("safetensors"):
        from safetensors.torch import save_file

        files.append(tmp_path / "net.safetensors")
        save_file(parameters(net), files[-1])
    for path in files:
        assert same(net.float(), path)
        assert {p.dtype for p in load(path).parameters()} == {torch.float32}


PREFIXES = ["module.", "_orig_mod.", "generator.", "model.", "net_g.", "netG.", "a.b.module.model."]
PREFIXES += ["module.module.", "net_g._orig_mod.", "module.net_g."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_stands_before_all_keys_is_left_out(tmp_path, prefix):
    net, path = lively(SwinIR(**TINY)), tmp_path / "net.pth"
    weights = {prefix + key: value for key, value in net.state_dict().items()}
    for content in (weights, {"state_dict": weights, "epoch": 3, "callbacks": {"best": 1.0}}):
        torch.save(content, path)
        assert same(net, path)
    others = {"discriminator.conv0.weight": torch.zeros(3), "loss.vgg.mean": torch.zeros(3)}
    others |= {"log_sigma": torch.zeros(()), "n_averaged": torch.tensor(7)}
    if prefix not in ("module.", "_orig_mod.", "module.module."):  # others would have these, too
        torch.save({"state_dict": weights | others}, path)
        assert same(net, path)


def test_of_several_networks_param_key_names_one(tmp_path):
    net, other = lively(SwinIR(**TINY), 1), lively(SwinIR(**TINY), 2)
    weights = parameters(net, "net_g_ema.") | parameters(other, "net_g.")
    path = tmp_path / "net.ckpt"
    for content in (weights, {"state_dict": weights, "hyper_parameters": {"lr": 1.0}}):
        torch.save(content, path)
        assert same(net, path, "net_g_ema") and same(other, path, "net_g")
        said = r"net\.ckpt: .*several networks: name one of 'net_g_ema', 'net_g' .param_key"
        for use in (load, lambda path: load_weights(SwinIR(**TINY), path)):
            with pytest.raises(model.UserError, match=said):
                use(path)
        with pytest.raises(model.UserError, match=r"no 'foo', but .*'net_g_ema', 'net_g' .param"):
            load(path, "foo")
    torch.save({"model": parameters(net), "optimizer": {"state": {}}}, path)
    assert same(net, path) and same(net, path, "model")
    torch.save({"net_g": parameters(net), "net_d": {"a": torch.zeros(1)}, "lr": {"a": 1}}, path)
    assert same(net, path, "net_g")
    with pytest.raises(model.UserError, match=r"no 'params_ema', but 'net_g', 'net_d' .param_key"):
        load(path)
    torch.save({"epoch": 3, "optimizer": {"state": {}}}, path)
    with pytest.raises(model.UserError, match=r"net\.ckpt: it holds no weights"):
        load(path)


def test_the_command_takes_param_key(tmp_path):
    net, image = saved(tmp_path / "net.pth", identity()), tmp_path / "a.png"
    write(image, np.zeros((9, 9, 3), np.uint8))
    arguments = (net, image, tmp_path / "b.png", "--device=cpu")
    assert run(*arguments, "--param_key=params_ema").returncode == 0
    done = run(*arguments, "--param_key=params")
    assert done.returncode == 1 and "no 'params', but 'params_ema'" in done.stderr


def test_an_averaged_or_compiled_model_is_read(tmp_path):
    net, path = lively(SwinIR(**TINY)), tmp_path / "net.pth"
    average = torch.optim.swa_utils.AveragedModel(net)
    torch.save(average.state_dict(), path)
    assert "n_averaged" in torch.load(path) and same(net, path)
    layers = {}
    for key, value in net.state_dict().items():
        layers[key.replace("layers.0.", "layers.0._orig_mod.")] = value
    torch.save(layers, path)
    assert same(net, path)
    torch.save(layers | {"module.norm.weight": torch.zeros(12)}, path)
    with pytest.raises(model.UserError, match=r"net\.pth: two of its tensors are 'norm\.weight'"):
        load(path)


class TwoStages(torch.nn.Module):
    """A network that is not SwinIR, although keys of it look so."""

    def __init__(self, in_chans=3):
        super().__init__()
        self.arguments = {"in_chans": in_chans}
        for name in ("first", "second"):
            stage = torch.nn.Sequential()
            stage.add_module("conv_first", torch.nn.Conv2d(in_chans, in_chans, 3, padding=1))
            stage.add_module("norm", torch.nn.BatchNorm2d(in_chans))
            self.add_module(name, stage)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_other_networks_keep_their_keys_below_a_wrapper(tmp_path, monkeypatch, prefix):
    monkeypatch.setitem(model.NETWORKS, "two", TwoStages)
    net, fresh, path = TwoStages(), TwoStages(), tmp_path / "net.pth"
    net.second.norm.running_mean.fill_(5)
    weights = {prefix + key: value for key, value in net.state_dict().items()}
    torch.save({"params": weights, "arguments": net.arguments, "network": "two"}, path)
    got = load(path).state_dict()
    assert all(torch.equal(got[key], value) for key, value in net.state_dict().items())
    torch.save(weights, path)  # nothing says which network it is
    n = len(weights)
    assert load_weights(fresh, path) == f"{path}: {n} of {n} tensors taken"
    got = fresh.state_dict()
    assert all(torch.equal(got[key], value) for key, value in net.state_dict().items())


def test_odd_names_in_a_file_stay_on_one_line(tmp_path):
    path, state = tmp_path / "net.pth", parameters(lively(SwinIR(**TINY)))
    odd = {f"a{i}\n\x1b[1m": torch.zeros(1) for i in range(20)}
    torch.save(state | odd, path)
    with pytest.raises(model.UserError) as refused:
        load_weights(SwinIR(**TINY), path)
    assert str(refused.value).isprintable() and "and 11 more" in str(refused.value)
    torch.save({key: {"a": torch.zeros(1)} for key in odd}, path)
    with pytest.raises(model.UserError, match=r"no 'params_ema', but .* and 11 more") as refused:
        load(path)
    assert str(refused.value).isprintable()


def test_a_network_that_is_not_here_is_named(tmp_path):
    path = saved(tmp_path / "net.pth", SwinIR(**TINY), network="cnn")
    with pytest.raises(model.UserError, match=r"net\.pth: its network is 'cnn'; known here: swin"):
        load(path)
    foreign = {"network": parameters(net := lively(SwinIR(**TINY))), "arguments": "--lr 1"}
    torch.save(foreign, path)  # here these words mean something else
    assert same(net, path)


def tar_of_files(path):
    with tarfile.open(path, "w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())


def zip_of_files(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("net.pth", b"content")


def program(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def with_objects(path, **options):
    held = {"params": {"a": torch.zeros(1)}, "options": argparse.Namespace(lr=1)}
    torch.save(held, path, **options)


def half_a_checkpoint(path):
    saved(path, SwinIR(**TINY))
    path.write_bytes(path.read_bytes()[:5000])


MISTAKEN = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty: .* download it again"),
    "lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a"),
        "it is a Git LFS pointer, .*: run git lfs pull",
    ),
    "html": (
        lambda path: path.write_text("\ufeff\n<!DOCTYPE html>\n<html>"),
        "it is a web page: download",
    ),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x")), "it is compressed: .*gunzip"),
    "image": (lambda path: Image.new("L", (4, 4)).save(path, "png"), "it is an image"),
    "tar": (tar_of_files, "it is a tar archive: .*PyTorch 0.1 .*weights_only=False"),
    "zip": (zip_of_files, "it is a zip archive without weights: unpack it"),
    "jit": (program, r"it is a TorchScript program: .*torch\.jit\.load .*state dict"),
    "object": (
        with_objects,
        r"it holds Python objects \(argparse\.Namespace\), .*weights_only=False.*its state dict",
    ),
    "old": (
        lambda path: with_objects(path, _use_new_zipfile_serialization=False),
        r"it holds Python objects \(argparse\.Namespace\), .*weights_only=False.*its state dict",
    ),
    "module": (
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
        r"it holds Python objects \(torch\.nn\.modules\.linear\.Linear",
    ),
    "short": (half_a_checkpoint, "it is cut short: .* download it again"),
    "list": (lambda path: torch.save([1, 2], path), "it holds a list, not a dict of tensors"),
    "tensor": (lambda path: torch.save(torch.zeros(2), path), "it holds a Tensor, not a dict"),
    "none": (lambda path: None, "No such file"),
}


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("kind", MISTAKEN)
def test_what_is_taken_for_a_checkpoint_is_named_with_the_remedy(tmp_path, kind):
    make, said = MISTAKEN[kind]
    path = tmp_path / "net.pth"
    make(path)
    for use in (load, lambda path: load_weights(SwinIR(**TINY), path)):
        with pytest.raises(model.UserError) as refused:
            use(path)
        message = str(refused.value)
        assert message.startswith(f"{path}: ") and message.isprintable()
        assert re.match(f"{re.escape(str(path))}: {said}", message), message


def test_torch_loads_own_remedy_is_passed_on(tmp_path, monkeypatch):
    """Here a file with distributed tensors would do; torch's sentence is what matters."""
    path = saved(tmp_path / "net.pth", SwinIR(**TINY))
    said = (
        "Weights only load failed. ...\nWeightsUnpickler error: ``torch.nested`` must be imported"
    )
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=RuntimeError(said)))
    with pytest.raises(model.UserError, match=r"net\.pth: ``torch\.nested`` must be imported$"):
        load(path)


# ---- the same through other programs: SWINIR_PATH, BASICSR_PATH name clones; spandrel if installed ----


def peer(name, monkeypatch):
    if name == "spandrel":
        if find_spec("spandrel") is None or find_spec("torchvision") is None:
            pytest.skip("needs spandrel, which needs torchvision")
        from spandrel.architectures.SwinIR import SwinIR as Theirs

        return Theirs
    folder = os.environ.get({"official": "SWINIR_PATH", "BasicSR": "BASICSR_PATH"}[name])
    if not folder:
        pytest.skip(f"no clone of {name} named")
    file = {"official": "models/network_swinir.py", "BasicSR": "basicsr/archs/swinir_arch.py"}[name]
    source = (Path(folder) / file).read_text()
    helpers = "to_2tuple = lambda x: x if isinstance(x, (tuple, list)) else (x, x)\n"
    helpers += "from torch import nn\nfrom torch.nn.init import trunc_normal_\nDropPath = lambda p: nn.Identity()\n"
    helpers += "class ARCH_REGISTRY:\n    register = staticmethod(lambda: lambda c: c)\n"
    lines = [
        s
        for s in source.splitlines()
        if not s.startswith(("from timm", "from basicsr", "from .arch_util"))
    ]
    space = {"__name__": "peer"}
    exec(helpers + "\n".join(lines), space)
    return space["SwinIR"]


@pytest.mark.parametrize("upsampler, upscale", HEADS)
@pytest.mark.parametrize("name", ["official", "BasicSR", "spandrel"])
def test_files_go_both_ways(name, upsampler, upscale, monkeypatch, tmp_path):
    Theirs = peer(name, monkeypatch)
    if (upsampler, upscale) == ("nearest+conv", 2) and name != "spandrel":
        pytest.skip("only ours")
    arguments = TINY | {"upsampler": upsampler, "upscale": upscale, "img_size": 48}
    ours, theirs = lively(SwinIR(**arguments)), lively(Theirs(**arguments), 1).eval()
    path = saved(tmp_path / "ours.pth", ours)
    theirs_file = tmp_path / "theirs.pth"
    torch.save({"params": theirs.state_dict()}, theirs_file)
    loaded = load(theirs_file)
    assert loaded.arguments["img_size"] == 48
    wide = SwinIR(**arguments | {"img_size": 64}).eval()
    wide.load_state_dict(theirs.state_dict(), strict=True)
    reloaded = Theirs(**arguments)
    reloaded.load_state_dict(torch.load(path)["params_ema"], strict=True)
    reloaded.eval()
    if name == "spandrel":
        from spandrel import ModelLoader

        reloaded = ModelLoader().load_from_file(path).model.eval()
    with torch.inference_mode():
        for size in ((5, 5), (8, 8), (16, 24), (37, 61), (200, 133)):
            if name == "BasicSR":  # takes multiples of the window only
                size = tuple(-(-n // 8) * 8 for n in size)
            x = torch.rand(1, 3, *size)
            for a, b in ((loaded, theirs), (wide, theirs), (ours, reloaded)):
                want = b(
                    x
                )  # random weights give values up to 6, so float32 itself rounds by nearly 1e-5
                assert (a(x) - want).abs().max() < 1e-5 * max(1, want.abs().max()), size
        x = torch.rand(1, 3, 40, 24).double()
        for a, b in ((loaded, theirs), (wide, theirs), (ours, reloaded)):
            assert (a.double()(x) - b.double()(x)).abs().max() < 1e-11


@pytest.mark.parametrize(
    ("window_size", "img_range", "wanted"),
    [(7, 1.0, 255), (8, 255.0, 1), (4, 2.0, 1), (7, 255.0, None), (8, 1.0, None)],
)
def test_training_saves_only_the_range_that_other_programs_assume(window_size, img_range, wanted):
    options = [f"--window_size={window_size}", f"--img_range={img_range}"]
    options.append(f"--gt_size={4 * window_size}")
    assert load_config([*options, "--eval_only=True"]).img_range == img_range  # nothing is saved
    if wanted is None:
        assert load_config(options).img_range == img_range
        return
    said = rf"img_range={img_range} .* must be {wanted} with window_size={window_size}: ComfyUI"
    with pytest.raises(SystemExit, match=said):
        load_config(options)


# ---- restoring ----


@pytest.mark.parametrize("upsampler, upscale", HEADS)
def test_one_pixel_is_enough(upsampler, upscale):
    net = lively(SwinIR(**TINY | {"upsampler": upsampler, "upscale": upscale}))
    for size in ((1, 1), (1, 9), (7, 3)):
        assert restore(net, torch.rand(1, 3, *size)).shape[2:] == (
            size[0] * upscale,
            size[1] * upscale,
        )


def test_identity_is_exact_for_every_size_tile_and_overlap():
    for in_chans in (1, 3):
        net = identity(in_chans=in_chans)
        for size in ((1, 1), (7, 40), (33, 29)):
            x = torch.randint(256, (1, in_chans, *size)) / 255
            for tile in (None, 8, 20, 40):
                for overlap in (0, 9, 1000):
                    y = restore(net, x, tile, overlap)
                    assert torch.allclose(y, x, rtol=0, atol=1e-6) and y.shape == x.shape
                    assert in_chans == 3 or torch.equal(y, x)
            assert torch.allclose(restore(net, x, 16, 8, ensemble=True), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("upsampler, upscale", [("", 1), ("pixelshuffledirect", 2)])
def test_tiles_are_the_whole_where_overlap_covers_the_receptive_field(upsampler, upscale):
    net = lively(
        SwinIR(
            **TINY | {"depths": (2,), "num_heads": (2,), "upsampler": upsampler, "upscale": upscale}
        )
    )
    x = torch.rand(2, 3, 150, 131)  # two blocks see 7 pixels each, the convolutions another 5
    whole = restore(net, x)
    assert torch.equal(whole, net(x).detach())
    for tile, overlap in ((80, 40), (96, 48), (200, 32), (104, 40)):
        assert (restore(net, x, tile, overlap) - whole).abs().max() < 1e-5
    y, x = torch.meshgrid(torch.linspace(0, 6, 150), torch.linspace(0, 5, 131), indexing="ij")
    x = (0.5 + 0.2 * torch.stack([y.sin(), x.cos(), (x * y).sin()]))[None]
    tiled, whole = restore(net, x, 48, 8), restore(net, x)
    for dim in (2, 3):
        at = [
            i
            for i in range(1, x.shape[dim] * upscale)
            if i >= 40 * upscale and i % (40 * upscale) <= 8 * upscale
        ]
        step, usual = (
            v.diff(dim=dim).abs().amax([d for d in range(4) if d != dim]) for v in (tiled, whole)
        )
        at = torch.tensor(at) - 1
        assert step[at].max() <= 1.05 * usual[at].max()


def test_ensemble_is_the_mean_over_symmetries():
    net, x = lively(SwinIR(**TINY)), torch.rand(1, 3, 20, 31)
    want = torch.zeros_like(x)
    with torch.no_grad():
        for k in range(4):
            want += net(x.rot90(k, (2, 3))).rot90(-k, (2, 3)) / 8
            want += net(x.flip(3).rot90(k, (2, 3))).rot90(-k, (2, 3)).flip(3) / 8
    assert torch.allclose(restore(net, x, ensemble=True), want, atol=1e-6)


def no_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("fail", "error"),
    [(no_gpu_memory, torch.OutOfMemoryError), (lambda: torch.empty(2**60), RuntimeError)],
    ids=["GPU", "CPU"],
)
def test_out_of_memory_halves_the_tile_and_says_so(fail, error):
    class Small(SwinIR):
        most = 24 * 24

        def forward(self, x):
            return super().forward(x) if x.shape[2] * x.shape[3] <= self.most else fail()

    net, plain = Small(**TINY).eval(), SwinIR(**TINY).eval()
    plain.load_state_dict(net.state_dict())
    x = torch.rand(1, 3, 60, 50)
    with pytest.warns(UserWarning, match="tiles of 16 pixels"):
        y = restore(net, x, overlap=8)
    assert torch.equal(y, restore(plain, x, 16, 8))
    net.most = 0
    with pytest.warns(UserWarning), pytest.raises(error, match="memory"):
        restore(net, x)


def test_a_tile_of_0_is_the_whole_and_nonsense_does_no_harm():
    x, sizes = torch.rand(1, 3, 20, 20), []
    net = identity()
    net.register_forward_hook(lambda net, args, y: sizes.append(tuple(args[0].shape[2:])))
    for tile, overlap in ((0, 8), (-8, 8), (16, -1)):
        assert torch.allclose(restore(net, x, tile, overlap), x, atol=1e-6)
    assert sizes == [(20, 20), (20, 20), (16, 16), (16, 4), (4, 16), (4, 4)]


def test_training_after_restoring_and_some_windows_at_a_time_agree():
    net, x = lively(SwinIR(**TINY)), torch.rand(2, 3, 72, 88)
    y = restore(net, x)  # under inference mode, with the geometry cached
    net.train()
    assert (net(x) - y).abs().mean().backward() is None
    net.eval()
    assert torch.allclose(net(x).detach(), y, atol=1e-6)


# ---- image files and the command ----


def run(*arguments):
    """The command, in this process: starting one takes seconds."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["model.py", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            told = model.main()
            code = 1 if told else 0
            if isinstance(told, str):
                print(told, file=err)
        except SystemExit as stop:
            code = stop.code
        except (ValueError, RuntimeError, OSError) as error:
            code = 1
            print(f"error: {error}", file=err)
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def pictures(folder):
    """Images of every kind, and what each must come out as through an identity network."""
    rng, want = np.random.default_rng(0), {}
    folder.mkdir(parents=True, exist_ok=True)
    for c in (1, 2, 3, 4):
        for dtype in (np.uint8, np.uint16):
            if dtype is np.uint16 and (c == 2 or (c > 2 and find_spec("cv2") is None)):
                continue  # 16-bit gray with alpha is refused, 16-bit colour needs OpenCV
            pixels = rng.integers(0, np.iinfo(dtype).max, (13, 21, c), dtype, endpoint=True)
            write(folder / f"{c}x{dtype.__name__}.png", pixels)
            want[f"{c}x{dtype.__name__}.png"] = pixels
    rgb = Image.fromarray(want["3xuint8.png"])
    for name, im, options in (
        ("one.png", Image.fromarray(want["1xuint8.png"][..., 0]).convert("1"), {}),
        ("palette.png", rgb.quantize(64), {}),
        ("cmyk.tif", rgb.convert("CMYK"), {}),
        ("gray.bmp", Image.fromarray(want["1xuint8.png"][..., 0]), {}),
        ("clear.png", rgb.quantize(16), {"transparency": 3}),
        ("photo.webp", rgb, {"lossless": True}),
    ):
        im.save(folder / name, **options)
        mode = {"1": "L", "L": "L"}.get(im.mode, "RGBA" if options.get("transparency") else "RGB")
        pixels = np.asarray(Image.open(folder / name).convert(mode))
        want[name] = pixels if pixels.ndim == 3 else pixels[..., None]
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        rgb.save(folder / f"turn{turn}.png", exif=exif)
    p = want["3xuint8.png"]
    turned = [p, p[:, ::-1], p[::-1, ::-1], p[::-1], p.transpose(1, 0, 2), np.rot90(p, -1)]
    turned += [np.rot90(p, 2).transpose(1, 0, 2), np.rot90(p)]
    return want | {f"turn{i + 1}.png": t for i, t in enumerate(turned)}


def test_deep_tiff_is_read_or_refused(tmp_path):
    cv2 = pytest.importorskip("cv2")
    for compression in (1, 5):
        for c in (1, 3, 4):
            pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, c), np.uint16)
            bgr = pixels[..., [2, 1, 0, 3][:c]] if c > 1 else pixels
            cv2.imwrite(str(tmp_path / "x.tif"), bgr, [cv2.IMWRITE_TIFF_COMPRESSION, compression])
            assert np.array_equal(read(tmp_path / "x.tif"), pixels), (compression, c)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match=r"f\.tif can't be read .*float"):
        read(tmp_path / "f.tif")


@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_kind_of_image_comes_through_unchanged(tmp_path, in_chans):
    want = pictures(tmp_path / "in" / "deep")
    net = saved(tmp_path / "net.pth", identity(in_chans=in_chans))
    done = run(net, tmp_path / "in", "--tile=8", tmp_path / "out", "--device=cpu")
    assert done.returncode == 0, done.stderr
    for name, pixels in want.items():
        got = read((tmp_path / "out" / "deep" / name).with_suffix(".png"))
        assert got.dtype == pixels.dtype and np.array_equal(got, pixels), name
    assert len(list((tmp_path / "out").rglob("*.*"))) == len(want)


def test_alpha_is_resized(tmp_path):
    net = lively(SwinIR(**TINY | {"upsampler": "pixelshuffledirect", "upscale": 2}))
    pixels = np.full((6, 9, 4), 200, np.uint8)
    got = model.restore_pixels(net, pixels)
    assert got.shape == (12, 18, 4) and (got[..., 3] == 200).all()
    assert model.restore_pixels(net, pixels[..., :1]).shape == (12, 18, 1)


def test_the_command_needs_data_py_and_nothing_else(tmp_path):
    shutil.copy(model.__file__, tmp_path)
    write(tmp_path / "a.png", np.full((9, 9, 3), 7, np.uint8))
    saved(tmp_path / "net.pth", identity())
    command = [
        sys.executable,
        "model.py",
        "net.pth",
        "a.png",
        "b.png",
        "--ensemble",
        "--bf16",
        "--device=cpu",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "error: the command needs data.py beside" in done.stderr
    shutil.copy(Path(model.__file__).with_name("data.py"), tmp_path)
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    assert (read(tmp_path / "b.png") == 7).all()


def run_of_training(folder, net, **options):
    """What train.py leaves of a run, as far as model.py reads it."""
    (folder / "models").mkdir(parents=True)
    config = {"degradation": "noise", "sigma": 25.0, "quality": 40, "batch_size": 8, "gt_size": 16}
    config |= {"dataroot_gt": None, "dataroot_lq": None, "pretrain_network": None}
    (folder / "config.json").write_text(json.dumps(config | options))
    for number in (9, 10):
        saved(folder / "models" / f"net_g_{number}.pth", net, iter=number, network="swinir")
    return folder


def test_of_a_runs_folder_the_best_or_else_the_newest_network_is_taken(tmp_path):
    folder = run_of_training(tmp_path / "mine", identity())
    models = folder / "models"
    saved(models / "net_g_best_before_99.pth", identity())
    image = tmp_path / "a.png"
    write(image, np.full((9, 9, 3), 7, np.uint8))
    done = run(folder, image, "--device=cpu")
    assert done.stdout.startswith(f"network: {models / 'net_g_10.pth'}\n"), done.stderr
    shutil.copy(models / "net_g_9.pth", models / "net_g_best.pth")
    done = run(folder, image, "--device=cpu", "--overwrite")
    assert done.stdout.startswith(f"network: {models / 'net_g_best.pth'}\n")
    assert load(folder).arguments == load(models / "net_g_best.pth").arguments
    assert done.stdout.endswith(f"publish it: python model.py {folder} --export mine.safetensors\n")
    shutil.rmtree(models)
    done = run(folder, image)
    said = "the folder of a run, or train longer: a network comes with the first validation or"
    assert done.returncode == 1 and said in done.stderr


def test_without_an_output_it_lies_beside_the_input(tmp_path, monkeypatch):
    net = saved(tmp_path / "net.pth", identity())
    write(tmp_path / "photos" / "a.v1.png", np.full((9, 8, 3), 7, np.uint8))
    write(tmp_path / "photos" / "b" / "c.png", np.full((9, 8, 1), 7, np.uint8))
    done = run(net, tmp_path / "photos" / "a.v1.png", "--device=cpu")
    want = tmp_path / "photos" / "a.v1_restored.png"
    assert re.fullmatch(rf"{want}: 8 x 9 pixels, \d+\.\d s\n", done.stdout), done.stderr
    assert (read(want) == 7).all()
    want.unlink()
    monkeypatch.chdir(tmp_path / "photos")
    for source, suffix in ((tmp_path / "photos", ".png"), (Path("."), ".webp")):
        done = run(net, source, f"--format={suffix[1:]}", "--device=cpu")
        assert done.stdout == f"2 images restored to {tmp_path / 'photos_restored'}/\n", done.stderr
        for name in ("a.v1", "b/c"):
            assert (read(tmp_path / "photos_restored" / f"{name}{suffix}") == 7).all()


def test_the_suffix_or_the_format_decides_what_is_written(tmp_path):
    net = saved(tmp_path / "net.pth", identity())
    source = tmp_path / "in"
    write(source / "a.png", np.full((16, 16, 4), 200, np.uint8))
    write(source / "b.png", np.full((16, 16, 1), 51_400, np.uint16))  # 200 of 8 bits
    for suffix, kind in ((".jpg", "JPEG"), (".webp", "WEBP"), (".tif", "TIFF"), (".PNG", "PNG")):
        done = run(net, source / "a.png", tmp_path / f"a{suffix}", "--device=cpu")
        assert done.returncode == 0, done.stderr
        with Image.open(tmp_path / f"a{suffix}") as image:
            assert image.format == kind
        lost = f"note: {source / 'a.png'}: dropped: its transparency\n"
        assert done.stderr == (lost if kind == "JPEG" else "")
    done = run(net, source, tmp_path / "out", "--format=jpeg", "--quality=80", "--device=cpu")
    assert f"note: {source / 'b.png'}: dropped: 8 of its 16 bits\n" in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.jpeg", "b.jpeg"]
    assert read(tmp_path / "out" / "b.jpeg").tolist() == np.full((16, 16, 1), 200).tolist()


def test_what_is_there_already_is_skipped(tmp_path):
    net, source, target = saved(tmp_path / "net.pth", identity()), tmp_path / "in", tmp_path / "out"
    for name in "abc":
        write(source / f"{name}.png", np.full((9, 9, 3), 7, np.uint8))
    arguments = (net, source, target, "--device=cpu")
    (target).mkdir()
    (target / "b.png").write_text("before")
    done = run(*arguments)
    assert done.returncode == 0 and (target / "b.png").read_text() == "before"
    said = f"2 images restored to {target}/; 1 was there already (--overwrite restores it, too)\n"
    assert done.stdout == said
    said = (
        f"0 images restored to {target}/; 3 were there already (--overwrite restores them, too)\n"
    )
    assert run(*arguments).stdout == said
    done = run(*arguments, "--overwrite")
    assert done.stdout == f"3 images restored to {target}/\n"
    assert (read(target / "b.png") == 7).all()
    (target / "b.png").write_text("before")
    done = run(net, source / "b.png", target / "b.png")
    assert done.stdout == f"{target / 'b.png'} is there already (--overwrite restores it again)\n"
    assert done.returncode == 0 and (target / "b.png").read_text() == "before"
    (source / "b.png").write_bytes(b"broken")
    done = run(net, source / "b.png", target / "b.png", "--overwrite")
    assert done.returncode == 1 and (target / "b.png").read_text() == "before"
    assert done.stderr.startswith(f"error: {source / 'b.png'}: ") and done.stderr.count("\n") == 1


def header_of(path):
    """(JSON header, bytes of the tensors) of a safetensors file, by its specification."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.mark.parametrize("upsampler, upscale", [HEADS[0], HEADS[2], HEADS[-1]])
def test_an_exported_file_is_as_good_as_ours(tmp_path, upsampler, upscale):
    pytest.importorskip("safetensors")
    # What the shapes of the tensors don't tell: the range, and the size without masks
    extra = {"upsampler": upsampler, "upscale": upscale, "img_range": 2.0, "img_size": (8, 16)}
    net = lively(SwinIR(**TINY | extra))
    options = {"degradation": "jpeg", "quality": [10, 40], "dataroot_gt": "/secret/DIV2K/,b/x.npy"}
    folder = run_of_training(tmp_path / "mine", net, **options)
    path = tmp_path / "published" / "my net.safetensors"
    done = run(folder, "--export", path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert f"{path}: {len(net.state_dict())} tensors, equal" in done.stdout
    assert [p.name for p in path.parent.iterdir()] == [path.name]

    again = load(path)
    assert again.arguments == net.arguments
    image = torch.rand(1, 3, 21, 13)
    assert torch.equal(restore(again, image), restore(net, image))
    assert load_weights(SwinIR(**TINY | extra), path).count("its ") == 0  # no other argument
    header, tensors = header_of(path)
    metadata = header.pop("__metadata__")
    assert header.keys() == net.state_dict().keys()
    floats = {key for key in header if header[key]["dtype"] == "F32"}
    assert floats == {name for name, _ in net.named_parameters()}
    assert metadata.pop("modelspec.hash_sha256") == f"0x{hashlib.sha256(tensors).hexdigest()}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", metadata.pop("modelspec.date"))
    description = (
        f"Scale {upscale}, colour images; 10 iterations; dataset: DIV2K, x.npy; "
        "degradation: jpeg, quality=[10, 40]"
    )
    assert json.loads(metadata.pop("arguments")) == net.arguments
    assert metadata == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "swinir",
        "modelspec.implementation": "https://github.com/JingyunLiang/SwinIR",
        "modelspec.title": "my net",
        "modelspec.description": description,
        "network": "swinir",
        "scale": str(upscale),
        "iterations": "10",
        "dataset": "DIV2K, x.npy",
        "degradation": "jpeg",
        "degradation_options": '{"quality": [10, 40]}',
        "batch_size": "8",
        "gt_size": "16",
    }

    # An export of the export says the same.
    done = run(path, "--export", tmp_path / "copy.safetensors")
    assert f"its metadata: {description}\n" in done.stdout, done.stderr
    copied, tensors_copied = header_of(tmp_path / "copy.safetensors")
    assert tensors_copied == tensors and copied["__metadata__"]["iterations"] == "10"
    before = path.read_bytes()
    done = run(path, "--export", path)
    assert "that is the network itself" in done.stderr and path.read_bytes() == before


def test_pairs_and_the_weights_that_were_the_start_are_described(tmp_path):
    options = {"dataroot_gt": "high", "dataroot_lq": "low", "pretrain_network": "a/start.pth"}
    folder = run_of_training(tmp_path / "mine", identity(), **options)
    path = folder / "models" / "net_g_9.pth"
    _, about = model.read_weights(path, "params_ema")
    facts = model.training_facts(path, about)
    entry = model.openmodeldb_entry(load(path), "swinir", facts, [path])
    assert entry["trainingOTF"] is False and entry["tags"] == ["restoration"]
    assert entry["pretrainedModelG"] == "start"
    assert facts == {
        "iterations": "9",
        "dataset": "high",
        "degradation": "pairs",
        "batch_size": "8",
        "gt_size": "16",
        "pretrain_network": "start",
    }
    (folder / "config.json").write_text("{")
    done = run(folder, "--export", tmp_path / "x.safetensors")
    assert done.returncode == 1 and "config.json can't be read" in done.stderr
    assert "copy the network to another folder" in done.stderr


def test_an_export_that_differs_replaces_nothing(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    path = tmp_path / "net.safetensors"
    path.write_text("before")
    monkeypatch.setattr(model, "load", lambda path: lively(identity()))
    with pytest.raises(
        model.UserError, match=r"net\.safetensors: not written, because its .* differs"
    ):
        model.export_safetensors(identity(), path)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "before"


def test_metadata_of_others_and_damaged_ones_are_told_apart(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    net = identity()
    tensors = {key: value.clone() for key, value in net.state_dict().items()}
    path = tmp_path / "net.safetensors"
    save_file(tensors, path, {"format": "pt", "network": "not ours", "iterations": "many"})
    assert load(path).arguments["embed_dim"] == 12
    save_file(tensors, path, {"network": "swinir", "arguments": "{"})
    with pytest.raises(model.UserError, match=r"net\.safetensors: it is damaged: copy or download"):
        load(path)
    save_file(tensors, path, {"network": "unet", "arguments": "{}"})
    with pytest.raises(model.UserError, match="its network is 'unet'; known here: swinir"):
        load(path)


def test_the_entry_for_openmodeldb_has_the_files_sizes_and_checksums(tmp_path):
    pytest.importorskip("safetensors")
    net = lively(SwinIR(**TINY | {"upsampler": "pixelshuffledirect", "upscale": 2}))
    folder = run_of_training(tmp_path / "mine", net, degradation="bicubic", dataroot_gt="DIV2K")
    exported, entry = tmp_path / "2x-mine.safetensors", tmp_path / "2x-mine.json"
    done = run(folder, "--export", exported, "--openmodeldb", entry)
    assert done.returncode == 0 and "2x-mine.json: fill in author, license and urls" in done.stdout
    got = json.loads(entry.read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", got.pop("date"))
    assert got == {
        "name": "2x-mine",
        "author": "",
        "license": None,
        "tags": ["general-upscaler"],
        "description": "Scale 2, colour images; 10 iterations; dataset: DIV2K; degradation: bicubic",
        "architecture": "swinir",
        "size": ["small", "s16w8", "12dim", "1conv"],
        "scale": 2,
        "inputChannels": 3,
        "outputChannels": 3,
        "resources": [
            {
                "platform": "pytorch",
                "type": "safetensors",
                "size": exported.stat().st_size,
                "sha256": hashlib.sha256(exported.read_bytes()).hexdigest(),
                "urls": [],
            }
        ],
        "trainingIterations": 10,
        "trainingBatchSize": 8,
        "trainingHRSize": 16,
        "trainingOTF": True,
        "dataset": "DIV2K",
        "images": [],
    }


def test_spandrel_loads_an_exported_file(tmp_path):
    if find_spec("spandrel") is None or find_spec("torchvision") is None:
        pytest.skip("needs spandrel, which needs torchvision")
    pytest.importorskip("safetensors")
    from spandrel import ModelLoader

    for upsampler, upscale in HEADS:
        net = lively(SwinIR(**TINY | {"upsampler": upsampler, "upscale": upscale}))
        path = tmp_path / "net.safetensors"
        model.export_safetensors(net, path, {"network": "swinir"})
        theirs = ModelLoader().load_from_file(path)
        assert theirs.architecture.id == "SwinIR" and theirs.scale == upscale
        assert {"s16w8", "12dim", "small"} <= set(theirs.tags)
        x = torch.rand(1, 3, 24, 32)
        with torch.inference_mode():
            want = net(x).clamp(0, 1)
            assert torch.allclose(theirs(x), want, atol=1e-5), (upsampler, upscale)


def bomb(path):
    """A PNG that claims 60,000 x 60,000 pixels."""
    data = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">2I5B", 60000, 60000, 8, 2, 0, 0, 0)
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        data += (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )
    path.write_bytes(data)


def test_broken_images_are_named_and_the_rest_goes_on(tmp_path):
    folder = tmp_path / "in"
    write(folder / "a" / "good.png", np.full((9, 9, 3), 7, np.uint8))
    Image.new("L", (5, 4), 9).save(folder / "a" / "good.bmp")
    write(folder / ".hidden" / "h.png", np.zeros((2, 2, 1), np.uint8))
    bomb(folder / "bomb.png")
    (folder / "x.png").mkdir()
    (folder / "zero.jpg").write_bytes(b"")
    short = (folder / "a" / "good.png").read_bytes()
    (folder / "short.png").write_bytes(short[: len(short) // 2])
    (folder / "notes.txt").write_text("no image")
    done = run(saved(tmp_path / "net.pth", identity()), folder, tmp_path / "out", "--device=cpu")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: 3 of 5 images failed: " in done.stderr  # a folder is none
    assert done.stdout == f"2 images restored to {tmp_path / 'out'}/\n"
    for name in ("bomb.png", "zero.jpg", "short.png"):
        assert len([s for s in done.stderr.splitlines() if f"in/{name}: " in s]) == 1, done.stderr
    found = sorted(
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    )
    assert found == ["a/good.bmp.png", "a/good.png.png"]


@pytest.mark.skipif(not find_spec("safetensors"), reason="needs safetensors")
def test_a_users_mistakes_are_said_in_a_sentence(tmp_path):
    net, image = saved(tmp_path / "net.pth", identity()), tmp_path / "a" / "a.png"
    write(image, np.zeros((9, 9, 3), np.uint8))
    before = image.read_bytes()
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ((net, tmp_path / "a", tmp_path / "a"), "nor in it"),
        ((net, tmp_path / "a", tmp_path / "a" / "out"), "nor in it"),
        ((net, image, image), "must be neither"),
        ((net, image, tmp_path / "a"), "nor its folder"),
        ((net, tmp_path / "empty", tmp_path / "out"), "holds no images"),
        ((net, tmp_path / "none.png", tmp_path / "out"), "none.png"),
        ((tmp_path / "none.pth", image, tmp_path / "out"), "none.pth: No such file"),
        ((net, tmp_path / "none.png", tmp_path / "b.png"), "none.png does not exist"),
        ((image, image, tmp_path / "out"), "a.png: "),
        ((net, image, tmp_path / "out", "--device=cuda:77"), ""),
        ((net, image, tmp_path / "out", "--device=nonsense"), ""),
        ((net,), "give an image or a folder after NET, or --export=FILE"),
        ((), "the following arguments are required: NET"),
        ((net, image, tmp_path / "out.bmp"), "out.bmp: give it a suffix of .png, .jpg"),
        ((net, image, tmp_path / "out.png", "--format=jpg"), "--format=jpg is another format"),
        ((net, image, "--format=bmp"), "--format: invalid choice: 'bmp'"),
        ((net, image, "--quality=50"), "--quality is for JPEG and WebP, not for .png"),
        ((net, image, "--quality=0", "--format=jpg"), "--quality=0 must be from 1 to 100"),
        ((net, tmp_path / "a", tmp_path / "out.png"), "give a folder for it, too"),
        ((net, tmp_path / "a", tmp_path / "out.jpg"), "give a folder for it, too"),
        ((tmp_path / "a", image), "a folder without models/net_g_best.pth"),
        ((net, image, "--export=x.onnx"), "restores nothing: leave INPUT out"),
        ((net, image, "--openmodeldb=x.json"), "give --export=FILE, too"),
        ((net, f"--export={tmp_path / 'x.pth'}"), "ends in .safetensors or .onnx"),
        ((net, f"--export={image / 'x.safetensors'}"), "x.safetensors can't be written"),
    ):
        done = run(*arguments)
        assert done.returncode in (1, 2) and said in done.stderr, (arguments, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") <= 1, done.stderr
    assert image.read_bytes() == before


@pytest.mark.skipif(
    find_spec("onnx") is None or find_spec("onnxruntime") is None, reason="needs onnx, onnxruntime"
)
@pytest.mark.parametrize("upsampler, upscale", [*HEADS[:2], *HEADS[-3:]])
def test_onnx_is_the_network_at_any_size(tmp_path, upsampler, upscale):
    import onnxruntime

    net = lively(SwinIR(**TINY | {"upsampler": upsampler, "upscale": upscale}))
    assert "of PyTorch at 5 sizes" in model.export_onnx(net, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    narrow = ((1, 3, 1, 1), (2, 3, 1, 17), (1, 3, 40, 1), (1, 3, 2, 1))
    for shape in ((1, 3, 8, 8), (1, 3, 5, 70), (3, 3, 41, 33), *narrow):
        x = torch.rand(shape)
        assert abs(session.run(None, {"x": x.numpy()})[0] - net(x).detach().numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("channels", "dtype"), [((1,), "float32"), ((), "float32"), ((3,), "uint8")]
)
def test_restore_refuses_what_it_would_spoil(channels, dtype):
    with pytest.raises(ValueError, match=rf"give \(B, 3, H, W\) floats, not torch\.{dtype}"):
        restore(identity(), torch.zeros(3, *channels, 8, 8, dtype=getattr(torch, dtype)))


@pytest.mark.skipif(
    find_spec("onnx") is None or find_spec("onnxruntime") is None, reason="needs onnx, onnxruntime"
)
def test_onnx_by_command(tmp_path):
    done = run(
        net := saved(tmp_path / "net.pth", identity()), "--onnx", net
    )  # not over the checkpoint
    assert load(net) and (tmp_path / "net.onnx").exists()
    assert done.returncode == 0 and "opset 18" in done.stdout, done.stderr
    assert len(done.stderr.splitlines()) == 0, done.stderr


@pytest.mark.skipif(
    find_spec("onnx") is None or find_spec("onnxruntime") is None, reason="needs onnx, onnxruntime"
)
def test_an_onnx_file_has_the_metadata_of_the_others(tmp_path):
    import onnxruntime

    folder = run_of_training(tmp_path / "mine", identity())
    exported, entry = tmp_path / "den.onnx", tmp_path / "den.json"
    safetensors = tmp_path / "den.safetensors"
    done = run(folder, "--export", safetensors, "--export", exported, "--openmodeldb", entry)
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(exported)
    metadata = session.get_modelmeta().custom_metadata_map
    want = header_of(safetensors)[0]["__metadata__"]
    del want["modelspec.hash_sha256"]
    assert metadata == want and metadata["degradation_options"] == '{"sigma": 25.0}'
    resources = json.loads(entry.read_text())["resources"]
    assert [(r["platform"], r["type"]) for r in resources] == [
        ("pytorch", "safetensors"),
        ("onnx", "onnx"),
    ]
    assert resources[1]["sha256"] == hashlib.sha256(exported.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("den.v1.2", "den.v1.2.onnx"),
        ("den", "den.onnx"),
        ("den.onnx", "den.onnx"),
        ("den.pth", "den.onnx"),
        ("new/den.safetensors", "new/den.onnx"),
    ],
)
def test_onnx_keeps_the_whole_name(tmp_path, monkeypatch, name, written):
    monkeypatch.setattr(model, "trace_onnx", lambda net, path, _: path.write_text("network"))
    monkeypatch.setattr(model, "onnx_difference", lambda *_: 0.0)
    done = run(saved(tmp_path / "net.pth", identity()), "--onnx", tmp_path / name)
    assert done.returncode == 0 and done.stdout.startswith(f"{tmp_path / written}: "), done.stderr
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(
        [tmp_path / "net.pth", tmp_path / written]
    )


@pytest.mark.parametrize("difference", [1.0, float("nan")])
def test_an_onnx_network_that_differs_replaces_nothing(tmp_path, monkeypatch, difference):
    (tmp_path / "net.onnx").write_text("before")
    monkeypatch.setattr(model, "trace_onnx", lambda net, path, _: path.write_text("network"))
    monkeypatch.setattr(model, "onnx_difference", lambda *_: difference)
    with pytest.raises(model.UserError, match=r"net\.onnx: not written, because ONNX and"):
        model.export_onnx(identity(), tmp_path / "net.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_text() == "before"


def test_onnx_without_its_packages_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="onnx"):
        model.export_onnx(identity(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_masked_tokens_get_no_weight_and_files_the_published_mask():
    net = SwinIR(img_size=24, window_size=8, embed_dim=12, depths=(2,), num_heads=(2,))
    mask = net.state_dict()["layers.0.residual_group.blocks.1.attn_mask"]  # (9, 64, 64)
    assert 0 < (mask < 0).float().mean() < 1 and set(mask.unique().tolist()) == {0.0, -100.0}
    # Attention with unit vectors as values returns the weights.
    regions = model.window_regions(24, 24, 4)
    regions = model.window_partition(regions[None, :, :, None], 8)[0, :, :, 0]
    q, k = torch.randn(2, 1, 9, 1, 64, 64) / 4
    weights = model.window_attention(
        q, k, torch.eye(64).expand(1, 9, 1, 64, 64), torch.zeros(1, 64, 64), regions
    )
    assert torch.equal(
        weights[0, :, 0] > 0, mask == 0
    )  # not even a denormal number, which would be slow


def test_init_std_sets_the_linear_layers_first_weights_and_stays_out_of_files():
    torch.manual_seed(0)
    plain, wide = (
        SwinIR(embed_dim=60, window_size=8),
        SwinIR(embed_dim=60, window_size=8, init_std=0.1),
    )
    for net, std in ((plain, 0.02), (wide, 0.1)):
        weights = [m.weight for m in net.modules() if isinstance(m, torch.nn.Linear)]
        assert torch.cat([w.flatten() for w in weights]).std().item() == pytest.approx(
            std, rel=0.01
        )
        assert (
            net.layers[0].residual_group["blocks"][0].attn.relative_position_bias_table.std() < 0.03
        )
    assert plain.arguments == wide.arguments


SAFE = {  # what spandrel, and so ComfyUI and chaiNNer, allows in a file
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in ("BFloat16", "Float", "Half", "Int", "Long", "Double")),
}


def test_files_hold_only_what_spandrel_allows(tmp_path):
    shared = {}
    state = SwinIR(**TINY).state_dict()
    content = {"params": portable(state, shared), "params_ema": portable(state, shared)}
    torch.save(content | {"arguments": SwinIR(**TINY).arguments, "iter": 1}, tmp_path / "n.pth")
    with zipfile.ZipFile(tmp_path / "n.pth") as file:
        pickled = file.read("n/data.pkl")
    names = [argument for op, argument, _ in pickletools.genops(pickled) if op.name == "GLOBAL"]
    assert names and set(names) <= SAFE


def test_heads_of_any_width_are_padded_without_a_trace():
    """The reference computes attention of one window by hand, in float64."""
    for dim, heads in ((12, 2), (48, 1), (20, 4), (32, 2)):
        attn = model.WindowAttention(dim, 4, heads, True, None, 0.0, 0.0, "math").double()
        x = torch.randn(1, 3, 16, dim, dtype=torch.float64)
        regions = torch.randint(0, 2, (3, 16), dtype=torch.uint8)
        q, k, v = attn.qkv(x).view(3, 16, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * (dim // heads) ** -0.5 + attn.bias()
        scores = scores.masked_fill((regions[:, :, None] != regions[:, None])[:, None], -torch.inf)
        want = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(1, 3, 16, dim))
        assert torch.allclose(attn(x, regions), want, atol=1e-12)


def test_some_windows_at_a_time_never_write_over_their_input():
    """An image that is one window wide: there the windows are a view of the image."""
    for patch_norm in (True, False):
        net = lively(SwinIR(**TINY | {"patch_norm": patch_norm}))
        for size in ((8, 8), (24, 8), (8, 24), (5, 3)):
            x = torch.rand(1, 3, *size)
            with torch.no_grad():
                parts = net(x)
            assert torch.allclose(parts, net(x).detach(), atol=1e-5), size


def test_the_size_of_training_must_be_whole_windows():
    with pytest.raises(model.UserError, match="img_size 64x64 must be a multiple of window_size=7"):
        SwinIR(embed_dim=8, depths=(2,), num_heads=(2,))


def test_a_network_smaller_than_its_window_takes_any_size():
    net = lively(SwinIR(**TINY | {"img_size": 6}))
    assert net(torch.rand(1, 3, 6, 6)).shape == (1, 3, 6, 6) == net(torch.rand(1, 3, 6, 6)).shape
    assert net(torch.rand(1, 3, 9, 13)).shape == (1, 3, 9, 13)


def test_a_wrong_param_key_lists_those_that_are_there(tmp_path):
    path = saved(tmp_path / "n.pth", SwinIR(**TINY))
    with pytest.raises(model.UserError, match=r"n\.pth: it has no 'params', but 'params_ema'"):
        load(path, "params")


def test_restored_files_keep_profile_and_exif_and_what_is_left_out_is_said(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x0110] = "Camera"
    icc = bytes(16) + b"RGB " + bytes(108)
    (tmp_path / "in").mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
    image.save(tmp_path / "in" / "x.png", exif=exif, icc_profile=icc)
    (tmp_path / "in" / "y.heic").write_bytes(b"x")
    net = saved(tmp_path / "net.pth", identity())
    done = run(net, tmp_path / "in", tmp_path / "out", "--device=cpu")
    assert done.returncode == 0 and "left out: 1 .heic (convert to JPEG or PNG)" in done.stderr
    with Image.open(tmp_path / "out" / "x.png") as restored:
        assert restored.size == (16, 24) and restored.info["icc_profile"] == icc
        assert dict(restored.getexif()) == {0x0110: "Camera"}


def test_the_discriminator_has_the_published_keys_and_normalises():
    net = model.UNetDiscriminator(3, 8)
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    want = {"conv0.weight": (8, 3, 3, 3), "conv0.bias": (8,)}
    widths = [8, 16, 32, 64, 32, 16, 8, 8, 8]
    for i, (before, after) in enumerate(pairwise(widths), 1):
        side = 4 if i <= 3 else 3
        want[f"conv{i}.weight_orig"] = (after, before, side, side)
        want[f"conv{i}.weight_u"] = (after,)
        want[f"conv{i}.weight_v"] = (before * side * side,)
    want |= {"conv9.weight": (1, 8, 3, 3), "conv9.bias": (1,)}
    assert shapes == want
    x = torch.rand(2, 3, 24, 16)
    with torch.no_grad():
        for _ in range(100):
            y = net.train()(x)
        assert y.shape == (2, 1, 24, 16)
        weight = net.conv3.weight.flatten(1)
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=1e-3)
        u = net.conv3.weight_u.clone()
        assert torch.allclose(net.eval()(x), y, atol=1e-4) and torch.equal(net.conv3.weight_u, u)


def test_spoilt_weights_and_optimizers_are_named(tmp_path):
    net = identity()
    with torch.no_grad():
        net.conv_first.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="output isn't finite: its weights may contain NaN"):
        model.restore_pixels(net, np.zeros((8, 8, 3), np.uint8))
    optimizer = torch.optim.Adam(net.parameters())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pth")
    with pytest.raises(ValueError, match="it is an optimizer's state: give the network's file"):
        load(tmp_path / "optimizer.pth")
    path = saved(tmp_path / "net.pth", identity())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="it is damaged: copy or download it again"):
        load(path)
    path.write_bytes(bytes(5000))
    with pytest.raises(ValueError, match="it is damaged, all zeros"):
        load(path)


def test_weights_of_a_run_are_found_by_its_folder(tmp_path):
    net, fresh = lively(SwinIR(**TINY), 1), SwinIR(**TINY)
    (tmp_path / "run/models").mkdir(parents=True)
    path = saved(tmp_path / "run/models/net_g_best.pth", net)
    assert load_weights(fresh, tmp_path / "run").startswith(f"{path}: ")
    assert all(torch.equal(fresh.state_dict()[key], v) for key, v in net.state_dict().items())


def test_weights_beside_a_counter_are_found(tmp_path):
    net = SwinIR(**TINY)
    torch.save({"model": net.state_dict(), "step": torch.tensor(5)}, tmp_path / "a.pth")
    loaded = load(tmp_path / "a.pth").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in net.state_dict().items())


def test_a_file_of_another_network_is_not_offered_for_its_parts(tmp_path):
    torch.save({"params": {"a.weight": torch.zeros(3)}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="none of its tensors fits") as error:
        model.load_weights(SwinIR(**TINY), tmp_path / "a.pth")
    assert "strict_load" not in str(error.value)


@pytest.mark.parametrize("ensemble", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_restore_takes_any_float_type(dtype, ensemble):
    net = SwinIR(**TINY).eval()
    image = torch.rand(1, 3, 19, 17)
    output = restore(net, image.to(dtype), ensemble=ensemble)
    assert output.dtype == dtype
    want = restore(net, image.to(dtype).float(), ensemble=ensemble)
    assert (output.float() - want).abs().max() < 2e-3
