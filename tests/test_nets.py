"""Seed-batched layers: a seed's bytes do not depend on its block, and each piece equals its plain counterpart."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dynarep.agents.mad_td import MadTD
from dynarep.configs.mad_td import MadTDConfig
from dynarep.nets import Adam, Net, Spec, mish, simnorm, uniform_fan_in
from dynarep.streams import stream


def test_mish_equals_pytorchs_in_value_and_gradient_over_the_whole_range():
    x = torch.cat([torch.linspace(-90, 90, 4001), torch.randn(2000)]).requires_grad_()
    reference = x.detach().double().requires_grad_()
    F.mish(reference).sum().backward()
    mish(x).sum().backward()
    torch.testing.assert_close(mish(x).double(), F.mish(reference), rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=3e-6, atol=1e-6)


def test_simnorm_groups_sum_to_one():
    y = simnorm(torch.randn(3, 5, 24), group=8)
    torch.testing.assert_close(y.unflatten(-1, (3, 8)).sum(-1), torch.ones(3, 5, 3))


@pytest.mark.parametrize("out", [1, 7])
def test_a_batched_network_equals_separate_torch_modules(out):
    spec = Spec((5, 16, 16, out), mish, layer_norm=1e-6)
    net = Net("n", {"": spec}, seeds=[3, 8], init=uniform_fan_in, members=2)
    x = torch.randn(2, 2, 32, 5)
    ours = net(x)
    for s in range(2):
        for e in range(2):
            h = x[s, e]
            for i in range(3):
                h = h @ net.parameter(f"/{i}.kernel")[s, e] + net.parameter(f"/{i}.bias")[s, e]
                if i < 2:
                    h = F.mish(
                        F.layer_norm(
                            h, (16,), net.parameter(f"/{i}.scale")[s, e], net.parameter(f"/{i}.shift")[s, e], 1e-6
                        )
                    )
            torch.testing.assert_close(ours[s, e], h, rtol=1e-5, atol=1e-6)


def test_initial_weights_have_the_stated_variance_and_belong_to_the_seed():
    spec = Spec((64, 256, 3), mish)
    net = Net("n", {"": spec}, seeds=[0, 1], init=uniform_fan_in, members=2)
    kernel = net.parameter("/0.kernel")
    assert kernel.var().item() == pytest.approx(0.3333 / 64, rel=0.02)
    assert not torch.equal(kernel[0, 0], kernel[0, 1])
    assert not torch.equal(kernel[0, 0], kernel[1, 0])
    assert torch.equal(
        Net("n", {"": spec}, [1], uniform_fan_in, 2).parameter("/1.kernel")[0], net.parameter("/1.kernel")[1]
    )
    assert not net.parameter("/0.bias").any()


def test_adam_with_clipping_equals_torchs_adam_on_the_clipped_gradient_of_each_seed():
    torch.manual_seed(0)
    spec = Spec((4, 8, 2), torch.tanh)
    net = Net("n", {"": spec}, seeds=[0, 1, 2], init=uniform_fan_in)
    plain = [{k: net.parameter(k)[s, 0].clone().requires_grad_() for k in net.slots()} for s in range(3)]
    adams = [torch.optim.Adam(p.values(), lr=1e-2, eps=1e-8) for p in plain]
    ours = Adam(net, 1e-2, clip=0.5)
    for _ in range(4):
        x, y = torch.randn(3, 16, 4), torch.randn(3, 16, 2) * torch.tensor([0.1, 1.0, 30.0])[:, None, None]
        (net(x) - y).square().mean((1, 2)).sum().backward()
        norms = ours.step()
        for s, (p, adam) in enumerate(zip(plain, adams, strict=True)):
            adam.zero_grad()
            h = torch.tanh(x[s] @ p["/0.kernel"] + p["/0.bias"]) @ p["/1.kernel"] + p["/1.bias"]
            (h - y[s]).square().mean().backward()
            norm = torch.sqrt(sum(v.grad.square().sum() for v in p.values()))
            assert norms[s].item() == pytest.approx(norm.item(), rel=1e-4)
            for v in p.values():
                v.grad *= min(1.0, 0.5 / norm.item())
            adam.step()
    for s, p in enumerate(plain):
        for key, value in p.items():
            torch.testing.assert_close(net.parameter(key)[s, 0], value.detach(), rtol=1e-4, atol=1e-6)


def test_a_target_network_moves_by_the_rate_and_is_never_trained():
    net = Net("n", {"": Spec((3, 8, 2), mish)}, [0], uniform_fan_in)
    target = net.target()
    before = target.flat.clone()
    net.flat.data += 1.0
    target.follow(net, 0.25)
    torch.testing.assert_close(target.flat, before + 0.25)
    out = target(torch.randn(1, 4, 3, requires_grad=True), frozen=True)
    out.sum().backward()
    assert target.flat.grad is None


def _learn(seeds, obs, act, width, batch, clip, fraction):
    """Three agent steps at UTD 4 on each seed's own data; everything that a seed ends with."""
    agent = MadTD(MadTDConfig(width=width, batch_size=batch, model_fraction=fraction, clip=clip), obs, act, seeds)
    rows = []
    for seed in seeds:
        g = stream(seed, "test data")
        rows.append(
            {
                "obs": g.standard_normal((4, batch, obs)),
                "action": np.tanh(g.standard_normal((4, batch, act))),
                "reward": g.standard_normal((4, batch)),
                "next_obs": g.standard_normal((4, batch, obs)),
                "mask": (g.random((4, batch)) > 0.1) * 1.0,
            }
        )
    data = {key: torch.from_numpy(np.stack([r[key] for r in rows]).astype(np.float32)) for key in rows[0]}
    for _ in range(3):
        losses = agent.update(data)
    state = {k: v for k, v in (agent.state() | losses).items() if v.dim() > 0}
    return {seed: {k: v.reshape(len(seeds), -1)[i] for k, v in state.items()} for i, seed in enumerate(seeds)}


@pytest.mark.parametrize(
    ("obs", "act", "width", "batch", "clip", "fraction"),
    [
        (24, 6, 64, 32, 10, 0.05),
        (223, 38, 64, 32, 0.01, 0.5),
        (67, 21, 128, 128, 0.01, 0.05),
        (5, 1, 8, 32, 0.01, 0.25),
    ],
)
def test_a_seeds_learning_is_the_same_bytes_in_every_block(obs, act, width, batch, clip, fraction):
    alone = _learn([0], obs, act, width, batch, clip, fraction)[0]
    for block in ([0, 1], [3, 0, 1], list(range(10))):
        together = _learn(block, obs, act, width, batch, clip, fraction)[0]
        assert [key for key in alone if not torch.equal(alone[key], together[key])] == []
