"""Seed-batched layers: a seed's bytes do not depend on its block, and each piece equals its plain counterpart."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dynarep.activations import ACTIVE, mish, simnorm
from dynarep.agents.mad_td import MadTD
from dynarep.configs.mad_td import MadTDConfig
from dynarep.histogram import HLGauss
from dynarep.initialisers import uniform_fan_in
from dynarep.nets import ONE_NODE, Net, Spec
from dynarep.optimisers import Adam
from dynarep.streams import stream


def test_mish_equals_pytorchs_in_value_and_gradient_over_the_whole_range():
    x = torch.cat([torch.linspace(-90, 90, 4001), torch.randn(2000)]).requires_grad_()
    reference = x.detach().double().requires_grad_()
    F.mish(reference).sum().backward()
    mish(x).sum().backward()
    torch.testing.assert_close(mish(x).double(), F.mish(reference), rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(x.grad.double(), reference.grad, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVE, ids=lambda f: f.__name__)
def test_an_activation_that_is_written_out_has_the_same_value_and_the_right_derivative(activation):
    x = torch.cat([torch.linspace(-90, 90, 4001), torch.zeros(3), torch.randn(2000)])
    reference = x.double().requires_grad_()
    exact = getattr(F, activation.__name__)(reference)
    upstream = torch.randn(x.shape)
    exact.backward(upstream.double())
    written = ACTIVE[activation]
    y, kept = written.forward(x.clone(), True)
    torch.testing.assert_close(y.double(), exact, rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(written.forward(x.clone(), False)[0], y, rtol=3e-7, atol=1e-30)
    torch.testing.assert_close(activation(x), y, rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(written.back(upstream.clone(), kept).double(), reference.grad, rtol=1e-5, atol=1e-5)


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


def in_doubles(net: Net, x: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same network by PyTorch's own differentiable pieces; x (S, E, B, in)."""
    (spec,) = net.branches.values()
    last = len(spec.sizes) - 2
    for i in range(last + 1):
        kernel, bias = parameters[f"/{i}.kernel"], parameters[f"/{i}.bias"].unsqueeze(-2)
        x = x @ kernel + bias
        if f"/{i}.scale" in parameters:
            x = F.layer_norm(x, x.shape[-1:], eps=spec.layer_norm)
            x = x * parameters[f"/{i}.scale"].unsqueeze(-2) + parameters[f"/{i}.shift"].unsqueeze(-2)
        if i < last:
            x = torch.tanh(x) if spec.trunk and i == 0 else getattr(F, spec.activation.__name__)(x)
    return x


def somewhere(spec: Spec, members: int) -> Net:
    """A network of two seeds whose biases, scales and shifts are not those it starts with."""
    net = Net("n", {"": spec}, [0, 1], uniform_fan_in, members)
    net.flat.add_(0.2 * torch.randn(net.flat.shape, generator=torch.Generator().manual_seed(1)))
    return net


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize(
    ("out", "norm", "norm_output"),
    [(1, 1e-6, False), (21, 1e-6, False), (16, 1e-6, True), (1, None, False), (21, None, False)],
)
@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_the_written_out_backward_pass_is_the_derivative(members, out, norm, norm_output, wanted):
    """By all parameters, and by those parts of the input that need it: of 5, 3 and 1 columns."""
    net = somewhere(Spec((9, 16, 16, out), mish, norm, norm_output), members)
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 32, n, generator=g) for n in (5, 3, 1)]
    for k in wanted:
        parts[k].requires_grad_()
    ours = net(parts)
    upstream = torch.randn(ours.shape, generator=g)
    ours.backward(upstream)

    exact = {slot: net.parameter(slot).double().requires_grad_() for slot in net.slots()}
    inputs = [part.detach().double().requires_grad_() for part in parts]
    theirs = in_doubles(net, torch.cat(inputs, -1).unsqueeze(1).expand(-1, members, -1, -1), exact)
    theirs = theirs if members > 1 else theirs.squeeze(1)
    theirs.backward(upstream.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    for slot, (start, shape) in net._slots.items():
        found = net.flat.grad[:, start : start + exact[slot][0, 0].numel()].view(2, members, *shape)
        torch.testing.assert_close(found.double(), exact[slot].grad, rtol=1e-4, atol=1e-4, msg=slot)
    for k, (part, reference) in enumerate(zip(parts, inputs, strict=True)):
        if k in wanted:
            torch.testing.assert_close(part.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)
        else:
            assert part.grad is None


@pytest.mark.parametrize("activation", ACTIVE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize(
    ("out", "norm", "trunk"), [(1, None, False), (4, None, False), (4, 1e-6, False), (4, 1e-6, True)]
)
def test_forward_and_backward_alone_are_value_and_derivative_for_every_activation(
    activation, members, out, norm, trunk
):
    net = somewhere(Spec((9, 16, 16, out), activation, norm, trunk=trunk), members)
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 32, n, generator=g) for n in (6, 3)]
    ours, tape = net.forward(parts)
    torch.testing.assert_close(net.forward(parts, keep=False)[0], ours, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(ours.shape, generator=g)
    slope = net.backward(upstream.clone(), tape, columns=slice(6, 9))

    exact = {slot: net.parameter(slot).double().requires_grad_() for slot in net.slots()}
    inputs = torch.cat(parts, -1).double().unsqueeze(1).repeat(1, members, 1, 1).requires_grad_()
    theirs = in_doubles(net, inputs, exact)
    theirs.backward(upstream.double().view(theirs.shape))
    torch.testing.assert_close(ours.double().view(theirs.shape), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope.double().view(2, members, 32, 3), inputs.grad[..., 6:], rtol=1e-4, atol=1e-5)
    for slot, (start, shape) in net._slots.items():
        found = net.flat.grad[:, start : start + exact[slot][0, 0].numel()].view(2, members, *shape)
        torch.testing.assert_close(found.double(), exact[slot].grad, rtol=1e-4, atol=1e-4, msg=slot)


def test_the_tape_of_the_last_rows_is_that_of_a_pass_of_them_alone():
    net, x = somewhere(Spec((9, 16, 16, 4), torch.relu), 1), torch.randn(2, 96, 9)
    slope, found = torch.randn(2, 32, 4), []
    for tape in (net.forward((x,))[1].last(32), net.forward((x[:, 64:],))[1]):
        net.backward(slope.clone(), tape)
        found.append(net.flat.grad.clone())
        net.flat.grad.zero_()
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert found[0].any()


@pytest.mark.parametrize("activation", ONE_NODE, ids=lambda f: f.__name__)
def test_a_network_of_one_node_is_that_of_many(activation):
    """Of ELU and Mish; with the trunk's norm and tanh."""
    net = somewhere(Spec((9, 16, 16, 4), activation, 1e-6, trunk=True), 2)
    x, found = torch.randn(2, 32, 9), []
    for apply in (net, lambda leaf: net._by_seed(net._plain(net._rows((leaf,)), "", False))):
        leaf = x.clone().requires_grad_()
        out = apply(leaf)
        out.square().sum().backward()
        found.append((out, leaf.grad, net.flat.grad.clone()))
        net.flat.grad.zero_()
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)
    assert found[0][2].any()


def test_a_frozen_network_passes_the_gradient_on_and_keeps_none():
    net = somewhere(Spec((9, 16, 4), mish, 1e-6), 2)
    x = torch.randn(2, 32, 9)
    found = []
    for frozen in (False, True):
        leaf = x.clone().requires_grad_()
        net(leaf, frozen=frozen).square().sum().backward()
        found.append(leaf.grad)
        assert bool(net.flat.grad.any()) is not frozen
        net.flat.grad.zero_()
    assert torch.equal(*found)


def test_gradients_of_two_passes_add_up_until_adam_takes_them():
    net = somewhere(Spec((9, 16, 4), mish, 1e-6), 1)
    batches = torch.randn(2, 2, 32, 9)
    alone = []
    for x in batches:
        net(x).sum().backward()
        alone.append(net.flat.grad.clone())
        net.flat.grad.zero_()
    for x in batches:
        net(x).sum().backward()
    torch.testing.assert_close(net.flat.grad, alone[0] + alone[1], rtol=1e-5, atol=1e-5)
    Adam(net, 1e-3).step()
    assert not net.flat.grad.any()


def test_rows_of_their_own_for_every_member_are_differentiated_one_by_one():
    net = somewhere(Spec((9, 16, 4), mish, 1e-6), 2)
    shared = torch.randn(2, 32, 9, requires_grad=True)
    own = shared.detach().unsqueeze(1).repeat(1, 2, 1, 1).requires_grad_()
    net(shared).square().sum().backward()
    net(own).square().sum().backward()
    assert own.grad.shape == (2, 2, 32, 9)
    torch.testing.assert_close(own.grad.sum(1), shared.grad)


def test_the_derivative_by_one_column_is_the_same_bytes_in_every_block():
    """A matrix product of width 1 is not: of a single seed it is another kernel's."""
    slopes = []
    for seeds in ([0], [0, 1, 2]):
        net = Net("n", {"": Spec((17, 64, 64, 4), mish, 1e-6)}, seeds, uniform_fan_in)
        rest, one = (
            torch.from_numpy(np.stack([stream(s, "x").standard_normal((32, n)) for s in seeds])) for n in (16, 1)
        )
        one = one.float().requires_grad_()
        net((rest.float(), one)).square().sum().backward()
        slopes.append(one.grad[0])
    assert torch.equal(*slopes)


def test_what_a_written_out_pass_cannot_do_is_refused():
    """Not answered with a wrong number: a second derivative, and a derivative at parameters that are gone."""
    net = somewhere(Spec((9, 16, 4), mish, 1e-6), 1)
    x = torch.randn(2, 32, 9, requires_grad=True)
    (slope,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
    loss = net(x).sum()
    Adam(net, 1e-3).step()
    with pytest.raises(RuntimeError, match="n: the parameters have changed since the forward pass"):
        loss.backward()


def test_the_histograms_slopes_are_the_derivatives_of_expectation_and_cross_entropy():
    values, g = HLGauss(151, -300.0, 300.0, 0.75, 17.0), torch.Generator().manual_seed(0)
    output = (5 * torch.randn(2, 2, 32, 151, generator=g)).requires_grad_()
    y = 200 * torch.randn(2, 32, generator=g)
    expected, slope = values.expect_slope(output.detach())
    mean = values.expect(output)
    assert torch.equal(expected, mean.detach())
    (reference,) = torch.autograd.grad(mean.sum(), output)
    torch.testing.assert_close(slope, reference, rtol=1e-5, atol=1e-4)
    loss = -(values.encode(y).unsqueeze(1) * values.log_probabilities(output)).mean(-1)
    (reference,) = torch.autograd.grad(loss.sum(), output)
    torch.testing.assert_close(values.cross_entropy_slope(y, output.detach()), reference, rtol=1e-4, atol=1e-8)


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
        norms = ours.norm()
        ours.step()
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


def _learn(seeds, obs, act, width, batch, clip, fraction, **settings):
    """Three agent steps at UTD 4 on each seed's own data; everything that a seed ends with."""
    config = MadTDConfig(width=width, batch_size=batch, model_fraction=fraction, clip=clip, **settings)
    agent = MadTD(config, obs, act, seeds)
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


@pytest.mark.parametrize(
    "settings",
    [{"layer_norm_on": False}, {"slow_model": False}, {"model_width": 16}, {"model_free": True}, {"slow_actor": True}],
    ids=str,
)
def test_a_seeds_learning_is_the_same_bytes_in_every_block_of_a_variant(settings):
    fraction = 0.0 if "model_free" in settings else 0.05
    alone = _learn([0], 17, 3, 32, 64, 0.05, fraction, **settings)[0]
    together = _learn([3, 0, 1, 2, 4], 17, 3, 32, 64, 0.05, fraction, **settings)[0]
    assert [key for key in alone if not torch.equal(alone[key], together[key])] == []
