"""ALM: an update against plain PyTorch, each of its pieces against its definition, its arms, probes, blocks, resume."""

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import probes
from dynarep import activations
from dynarep.agents.alm import ALM
from dynarep.agents.latents import Gaussian, gaussian, kl, kl_parts, lambda_returns
from dynarep.configs.alm import ALMConfig
from dynarep.replay import Replay
from dynarep.sequences import Sequences
from dynarep.streams import stream

OBS, ACTION, BATCH = 5, 2, 32
SMALL = {"width": 16, "model_width": 24, "latent": 6, "batch_size": BATCH, "std_initial": 0.5, "std_final": 0.5}
ARMS = {
    "ALM": {},
    "R": {"reward_target": "normalised"},
    "S": {"reward_scale": True},
    "I": {"normalise_inputs": True},
    "K": {"kl_balance": 1.0},
    "I+S": {"normalise_inputs": True, "reward_scale": True},
    "D-": {"latent_target": "residual"},
    "O": {"encoder": "none"},
    "noM": {"model_free": True},
}


def arms(*quick: str) -> list:
    """All arms, those that are not named here in the slow tests."""
    return [arm if arm in quick else pytest.param(arm, marks=pytest.mark.slow) for arm in ARMS]


def build(seeds=(0,), obs=OBS, action=ACTION, **changes) -> ALM:
    return ALM(ALMConfig(**(SMALL | changes)), obs, action, seeds)


def generators(seeds, purpose="test") -> list[np.random.Generator]:
    return [stream(seed, purpose) for seed in seeds]


def filled(seeds=(0,), episodes=(20,) * 10, obs=OBS, action=ACTION, seed_of=None, ending=True, unit=1.0) -> Replay:
    """Episodes one after the other; every second one terminates. What a seed sees depends on the seed alone."""
    fields = {"obs": (obs,), "action": (action,), "reward": (), "next_obs": (obs,), "mask": ()}
    replay = Replay(fields, len(seeds), sum(episodes))
    sources = generators(seeds, "episodes")
    for number, steps in enumerate(episodes):
        parts = []
        for g in sources:
            states = (3.0 + np.arange(obs)) * g.standard_normal((steps + 1, obs)) + np.arange(obs)
            part = {"obs": states[:-1], "next_obs": states[1:], "action": g.uniform(-1, 1, (steps, action))}
            part |= {"reward": unit * (0.3 + 0.2 * g.standard_normal(steps)), "mask": np.ones(steps)}
            part["mask"][-1] = not (ending and number % 2)
            parts.append(part)
        replay.add({name: np.stack([part[name] for part in parts]) for name in fields})
    return replay


def stirred(agent: ALM) -> ALM:
    """Give biases, norms and targets values of their own; either critic is the smaller one on some rows."""
    for i, net in enumerate(agent._nets().values()):
        g = torch.Generator().manual_seed(i)
        net.flat.add_(0.1 * torch.randn(net.flat.shape[1], generator=g))
    for net in (agent.critic, agent.target):
        head = net.parameter("/2.kernel")
        head[:, 0, ::2], head[:, 0, 1::2] = head[:, 0, ::2].abs(), -head[:, 0, 1::2].abs()
        head[:, 1] = -head[:, 0]
    return agent


# -- an update, beside plain PyTorch -----------------------------------------------------------------------------------


def module(net, branch, member, trunk) -> nn.Sequential:
    """The layers that `extensions` A2 lists, with the weights of the first seed."""
    layers = []
    for i in range(3):
        kernel = net.parameter(f"{branch}/{i}.kernel")[0, member]
        linear = nn.Linear(*kernel.shape)
        linear.weight.data, linear.bias.data = kernel.T.clone(), net.parameter(f"{branch}/{i}.bias")[0, member].clone()
        layers.append(linear)
        if i == 0 and trunk:
            norm = nn.LayerNorm(kernel.shape[1])
            norm.weight.data = net.parameter(f"{branch}/0.scale")[0, member].clone()
            norm.bias.data = net.parameter(f"{branch}/0.shift")[0, member].clone()
            layers += [norm, nn.Tanh()]
        elif i < 2:
            layers.append(nn.ELU())
    return nn.Sequential(*layers)


class Plain:
    """ALM of one seed from the words of `extensions` A2 and A3, the arms from those of A8; nothing is shared."""

    def __init__(self, agent: ALM) -> None:
        c = self.c = agent.config
        self.encoder, self.target_encoder = (module(n, "", 0, False) for n in (agent.encoder, agent.target_encoder))
        self.model, self.actor = module(agent.model, "", 0, False), module(agent.actor, "", 0, False)
        self.reward = module(agent.judge, "reward", 0, True)
        self.classifier = module(agent.judge, "classifier", 0, True)
        self.critics = nn.ModuleList(module(agent.critic, "", j, True) for j in range(2))
        self.targets = nn.ModuleList(module(agent.target, "", j, True) for j in range(2))
        self.mu_s, self.sigma_s = agent.input_mean[0].clone(), agent.input_std[0].clone()
        self.mu_r, self.sigma_r = agent.reward_mean[0].clone(), agent.reward_std[0].clone()
        self.mean_kl = None
        learned = [] if c.encoder == "none" else [self.encoder]
        if c.model_free:
            groups = {"critics": [self.encoder, self.critics], "actor": [self.actor]}
        else:
            groups = {"representation": [*learned, self.model], "judge": [self.reward, self.classifier]}
            groups |= {"critics": [self.critics], "actor": [self.actor]}
        self.groups = {name: [p for net in nets for p in net.parameters()] for name, nets in groups.items()}
        self.moments = {p: (0.0, 0.0) for group in self.groups.values() for p in group}
        self.count = dict.fromkeys(groups, 0)

    def squash(self, out):
        mean, raw = out.chunk(2, -1)
        u = self.c.std_ceiling - F.softplus(self.c.std_ceiling - raw)
        return 30 * torch.tanh(mean / 30), self.c.std_floor + F.softplus(u - self.c.std_floor)

    def e(self, net, s):
        if self.c.normalise_inputs or self.c.encoder == "none":
            s = ((s - self.mu_s) / self.sigma_s).clamp(-10, 10)
        return (s, torch.full_like(s, 0.1)) if self.c.encoder == "none" else self.squash(net(s))

    def m(self, z, a):
        mean, std = self.squash(self.model(torch.cat([z, a], -1)))
        return (z + mean if self.c.latent_target == "residual" else mean), std

    def r(self, z, a):
        out = self.reward(torch.cat([z, a], -1))[:, 0]
        return self.mu_r + self.sigma_r * out if self.c.reward_target == "normalised" else out

    def pi(self, z, eps, std):
        x = torch.tanh(self.actor(z)) + (std * eps).clamp(-0.3, 0.3)
        return x + (x.clamp(-1, 1) - x).detach()

    def least(self, critics, z, a):
        return torch.min(*(critic(torch.cat([z, a], -1))[:, 0] for critic in critics))

    def step(self, name, loss):
        for group in self.groups.values():
            for p in group:
                p.grad = None
        loss.backward()
        self.norms[name] = nn.utils.clip_grad_norm_(self.groups[name], self.c.clip)
        self.count[name] += 1
        with torch.no_grad():
            for p in self.groups[name]:  # Adam in its own words; torch.optim takes seconds to import
                m, v = self.moments[p]
                m, v = self.moments[p] = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
                m, v = m / (1 - 0.9 ** self.count[name]), v / (1 - 0.999 ** self.count[name])
                p -= self.c.lr * m / (v.sqrt() + 1e-8)

    def update(self, sequences, singles, noise, std):
        c, self.norms, steps = self.c, {}, self.c.horizon
        scale = self.sigma_r if c.reward_scale else 1.0
        r = singles["reward"] / scale
        if not c.model_free:
            z, loss, kls = None, 0.0, []
            mean, deviation = self.e(self.encoder, sequences["obs"][0])
            z = mean + deviation * noise.latents[0]
            for t in range(steps):
                a = sequences["action"][t]
                mean, deviation = self.m(z, a)
                with torch.no_grad():
                    other, wide = self.e(self.target_encoder, sequences["obs"][t + 1])
                each = torch.log(wide / deviation) + (deviation**2 + (mean - other) ** 2) / (2 * wide**2) - 0.5
                kls.append(each.sum(-1).mean())
                loss = loss - self.r(z, a).mean()
                z = mean + deviation * noise.latents[t + 1]
            now = torch.stack(kls).mean().item()
            self.mean_kl = now if self.mean_kl is None else 0.99 * self.mean_kl + 0.01 * now
            weight = 1.0 if c.kl_balance is None else c.kl_balance * z.shape[-1] / self.mean_kl
            with torch.no_grad():
                a = self.pi(z, noise.action, std)
            self.step("representation", weight * sum(kls) + loss - self.least(self.critics, z, a).mean())

        with torch.no_grad():
            z, next_z = (self.e(self.target_encoder, singles[name]) for name in ("obs", "next_obs"))
        draw = lambda which, eps: which[0] + which[1] * eps  # noqa: E731
        if not c.model_free:
            with torch.no_grad():
                start, real = draw(z, noise.judged[0]), draw(next_z, noise.judged[1])
                invented = draw(self.m(start, singles["action"]), noise.judged[2])
            end, label = real.clone(), torch.ones(len(r), dtype=torch.long)
            for i in range(len(r)):
                if noise.invented[i]:
                    end[i], label[i] = invented[i], 0
            predicted = self.reward(torch.cat([start, singles["action"]], -1))[:, 0]
            y = (r - self.mu_r) / self.sigma_r if c.reward_target == "normalised" else r
            logits = self.classifier(torch.cat([start, singles["action"], end], -1))
            self.step("judge", F.mse_loss(predicted, y) + F.cross_entropy(logits, label))

        with torch.no_grad():
            after = draw(next_z, noise.valued[1])
            y = r + c.discount * singles["mask"] * self.least(
                self.targets, after, self.pi(after, noise.next_action, std)
            )
        start = draw(self.e(self.encoder, singles["obs"]) if c.model_free else z, noise.valued[0])
        both = [critic(torch.cat([start, singles["action"]], -1))[:, 0] for critic in self.critics]
        self.step("critics", (F.mse_loss(both[0], y) + F.mse_loss(both[1], y)) / 2)

        z, total = draw(z, noise.imagined[0]), 0.0
        if c.model_free:
            total = self.least(self.critics, z, self.pi(z, noise.chosen[0], std)).mean()
        else:
            rewards, values, a = [], [], self.pi(z, noise.chosen[0], std)
            for t in range(steps):
                mean, deviation = self.m(z, a)
                following = mean + deviation * noise.imagined[t + 1]
                logits = self.classifier(torch.cat([z, a, following.detach()], -1))
                rewards.append(self.r(z, a) + c.classifier_weight * (logits[:, 1] - logits[:, 0]))
                z, a = following, self.pi(following.detach(), noise.chosen[t + 1], std)
                values.append(self.least(self.critics, z, a.detach()))
            g = values[-1]
            for t in reversed(range(steps)):
                g = rewards[t] + c.discount * ((1 - c.trace) * values[t] + c.trace * g)
                total = total + c.discount**t * g.mean() / steps
        self.step("actor", -total)
        with torch.no_grad():
            pairs = [(self.target_encoder, self.encoder), *zip(self.targets, self.critics, strict=True)]
            for target, online in pairs:
                for old, new in zip(target.parameters(), online.parameters(), strict=True):
                    old.copy_(0.995 * old + 0.005 * new)

    def parameters(self):
        nets = {
            "encoder": self.encoder,
            "target_encoder": self.target_encoder,
            "model": self.model,
            "actor": self.actor,
        }
        nets |= {"reward": self.reward, "classifier": self.classifier}
        for j in range(2):
            nets |= {f"critic {j}": self.critics[j], f"target {j}": self.targets[j]}
        return nets


@pytest.fixture
def doubles(monkeypatch):
    monkeypatch.setattr(activations, "_constants", {})
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("arm", arms("ALM", "O"))
@pytest.mark.usefixtures("doubles")
def test_two_updates_are_those_of_plain_pytorch(arm):
    agent, replay = stirred(build([3], lr=3e-3, clip=2.0, **ARMS[arm])), filled([3], unit=0.1)
    agent.fit_normalisers(replay)
    plain, g = Plain(agent), generators([3])
    clipped = 0
    for _ in range(2):
        sequences = {k: v.double() for k, v in agent.sequences(replay, g, BATCH).items()}
        singles = {k: v.double() for k, v in replay.rows(torch.arange(BATCH).unsqueeze(0) * 5 + 4).items()}
        noise = agent.noise(g)
        noise = noise._replace(**{k: v.double() for k, v in noise._asdict().items() if k != "invented"})
        terms = agent.update(sequences, singles, noise, 0.4)
        plain.update(*({k: v[0] for k, v in rows.items()} for rows in (sequences, singles)),
                     type(noise)(*(x[0] for x in noise)), 0.4)  # fmt: skip
        names = {
            "actor": "actor_grad_norm",
            "critics": "critic_grad_norm",
            "representation": "representation_grad_norm",
        }
        for name, norm in plain.norms.items():
            if name in names:
                assert terms[names[name]].item() == pytest.approx(norm.item(), rel=1e-7)  # PyTorch clips to 2 - 1e-6
                clipped += norm.item() > agent.config.clip
    assert clipped or arm == "noM"
    for name, net in plain.parameters().items():
        word, *member = name.split()
        ours, branch = (agent.judge, word) if word in ("reward", "classifier") else (getattr(agent, word), "")
        trunk, again = word in ("reward", "classifier", "critic", "target"), None
        again = module(ours, branch, int(member[0]) if member else 0, trunk)
        for (slot, one), other in zip(again.named_parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-8, msg=f"{name} {slot}")


# -- latents -----------------------------------------------------------------------------------------------------------


def test_deviation_of_nothing_is_0744_and_all_lie_between_floor_and_ceiling():
    out = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4]).repeat(1, 1, 2)
    mean, std = gaussian(out, 30.0, 0.1, 10.0)
    assert std[0, 0, 2].item() == pytest.approx(0.744, abs=5e-4)
    torch.testing.assert_close(std[0, 0, [0, 4]], torch.tensor([0.1, 10.0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(mean[0, 0], 30 * torch.tanh(out[0, 0, :5] / 30))


@pytest.mark.usefixtures("doubles")
def test_heads_are_the_two_softplus_in_value_and_derivative():
    out = torch.linspace(-40, 40, 2002).reshape(1, 77, 26)
    upstream, found = torch.randn(2, 1, 77, 13), []
    for head in (lambda x: gaussian(x, 30.0, 0.1, 10.0), lambda x: Plain.squash(HEADS, x)):
        leaf = out.clone().requires_grad_()
        both = torch.stack(list(head(leaf)))
        both.backward(upstream)
        found.append((both, leaf.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


class HEADS:
    c = ALMConfig()


def test_kl_in_closed_form_is_what_samples_say_and_the_sum_of_its_parts():
    g = torch.Generator().manual_seed(0)
    p, q = (Gaussian(torch.randn(1, 4, 3, generator=g), torch.rand(1, 4, 3, generator=g) + 0.5) for _ in range(2))
    draws = p.mean + p.std * torch.randn(200_000, 1, 4, 3, generator=g)
    logs = [-0.5 * ((draws - d.mean) / d.std).square() - d.std.log() for d in (p, q)]
    torch.testing.assert_close(kl(p, q), (logs[0] - logs[1]).sum(-1).mean(0), rtol=0.02, atol=0.01)
    means, deviations = kl_parts(p, q)
    torch.testing.assert_close(means + deviations, kl(p, q))
    assert not kl_parts(p, Gaussian(p.mean, q.std))[0].any()
    assert not kl_parts(p, Gaussian(q.mean, p.std))[1].any()


@pytest.mark.parametrize("trace", [0.0, 1.0, 0.95])
def test_lambda_returns_are_those_of_a_loop_over_all_lengths(trace):
    g = torch.Generator().manual_seed(0)
    r, v = torch.randn(2, 2, 3, 4, generator=g)
    returns = lambda_returns(r, v, 0.9, trace)
    for t in range(3):
        left = 3 - t
        by_length = [  # n rewards, then the value
            sum(0.9**k * r[:, t + k] for k in range(n)) + 0.9**n * v[:, t + n - 1] for n in range(1, left + 1)
        ]
        expected = sum((1 - trace) * trace ** (n - 1) * by_length[n - 1] for n in range(1, left))
        torch.testing.assert_close(returns[:, t], expected + trace ** (left - 1) * by_length[-1])


@pytest.mark.slow
def test_logit_difference_is_the_log_ratio_of_two_known_densities():
    """Real latents are normal (1, .5), the model's (-.2, .9): the classifier learns the logarithm of their ratio."""
    agent = build(latent=1, width=32, lr=5e-3, batch_size=256)
    agent.model.flat.zero_()
    raw = math.log(math.expm1(0.9 - 0.1)) + 0.1  # softplus(raw - .1) = .8; the ceiling is far
    agent.model.parameter("/2.bias").copy_(torch.tensor([30 * math.atanh(-0.2 / 30), raw]))
    start = Gaussian(torch.zeros(1, 256, 1), torch.zeros(1, 256, 1))
    real = Gaussian(torch.full((1, 256, 1), 1.0), torch.full((1, 256, 1), 0.5))
    rows = {"action": torch.zeros(1, 256, ACTION), "reward": torch.zeros(1, 256)}
    for step in range(400):
        noise = agent.noise(generators([0], f"step {step}"))
        agent._update_judge(rows, start, real, noise)
        if step == 300:
            agent._optimisers["judge"].lr /= 10
    at = torch.linspace(-0.8, 1.7, 26).view(1, 26, 1)
    nothing = torch.zeros(1, 26, 1)
    ours = agent.logit_difference(nothing, torch.zeros(1, 26, ACTION), at)[0]
    logs = [-0.5 * ((at - m) / s).square() - math.log(s) for m, s in ((1.0, 0.5), (-0.2, 0.9))]
    torch.testing.assert_close(ours, (logs[0] - logs[1])[0, :, 0], rtol=0.1, atol=0.25)


# -- who learns from what ----------------------------------------------------------------------------------------------


def data(agent, replay, purpose="test"):
    g = generators(agent.seeds, purpose)
    sequences, size = agent.sequences(replay, g, agent.config.batch_size), agent.config.batch_size
    return sequences, replay.rows((torch.arange(size) * 5 + 4).repeat(len(agent.seeds), 1)), agent.noise(g)


def test_representation_loss_reaches_encoder_and_model_alone():
    agent = stirred(build())
    sequences, _, noise = data(agent, filled())
    terms = agent.representation(sequences, noise, 0.5)
    for term in terms.values():
        term.sum().backward(retain_graph=True)
        assert agent.model.flat.grad.any()
        assert agent.encoder.flat.grad.any()
        for net in (agent.judge, agent.critic, agent.actor):
            assert not net.flat.grad.any()
        agent.model.flat.grad.zero_()
        agent.encoder.flat.grad.zero_()
    assert agent.target_encoder.flat.grad is None


STEPS = {
    "representation": ({"encoder", "model"}, {}),
    "judge": ({"judge"}, {}),
    "critic": ({"critic"}, {}),
    "actor": ({"actor"}, {}),
    "critic of noM": ({"critic", "encoder"}, ARMS["noM"]),
    "representation of O": ({"model"}, ARMS["O"]),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_changes_its_own_networks_and_leaves_no_gradient_behind(step):
    changed, arm = STEPS[step]
    agent = stirred(build(**arm))
    sequences, rows, noise = data(agent, filled())
    before = {name: net.flat.clone() for name, net in agent._nets().items()}
    z, next_z = (agent.encode(rows[name], target=True) for name in ("obs", "next_obs"))
    {
        "representation": lambda: agent._update_representation(sequences, noise, 0.5),
        "judge": lambda: agent._update_judge(rows, z, next_z, noise),
        "critic": lambda: agent._update_critic(rows, z, next_z, noise, 0.5),
        "actor": lambda: agent._update_actor(z, noise, 0.5),
    }[step.split()[0]]()
    assert {name for name, net in agent._nets().items() if not torch.equal(net.flat, before[name])} == changed
    assert not any(net.flat.grad.any() for net in agent._nets().values() if net.flat.grad is not None)


def test_with_one_step_and_no_trace_the_actor_climbs_reward_and_value(monkeypatch):
    agent = stirred(build(horizon=1, trace=0.0, classifier_weight=0.0))
    _, rows, noise = data(agent, filled())
    here = agent.encode(rows["obs"], target=True)
    monkeypatch.setattr(agent._optimisers["actor"], "step", lambda: None)
    agent._update_actor(here, noise, 0.5)
    found = agent.actor.flat.grad.clone()
    agent.actor.flat.grad.zero_()
    z = here.sample(noise.imagined[:, 0])
    action = agent._choose(z, noise.chosen[:, 0], 0.5)
    after = agent._predict(z, action, frozen=True).sample(noise.imagined[:, 1])
    later = agent.critic((after, agent._choose(after.detach(), noise.chosen[:, 1], 0.5).detach()), frozen=True)
    reward = agent.judge((z, action), "reward", frozen=True)[..., 0]
    (-(reward + 0.99 * later[..., 0].amin(1)).mean(1)).sum().backward()
    assert found.any()
    torch.testing.assert_close(found, agent.actor.flat.grad, rtol=1e-4, atol=1e-7)


def test_policy_noise_is_cut_in_updates_and_the_clamp_passes_gradients_on():
    agent = stirred(build())
    z, noise = torch.randn(1, BATCH, 6), 10 * torch.randn(1, BATCH, ACTION)
    mean = agent.policy(z)
    action = agent._choose(z, noise, 1.0)
    torch.testing.assert_close(action.detach(), (mean + noise.clamp(-0.3, 0.3)).clamp(-1, 1), rtol=0, atol=1e-6)
    agent.actor.parameter("/2.bias").fill_(1.5)  # means of .9: two clamped of three
    action = agent._choose(z, noise, 1.0)
    assert 0 < (action.abs() == 1).float().mean() < 1
    slopes = []
    for chosen in (action, agent.actor(z).tanh()):
        chosen.sum().backward()
        slopes.append(agent.actor.flat.grad.clone())
        agent.actor.flat.grad.zero_()
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)


def test_gradient_shares_are_those_of_the_loss_and_change_nothing():
    agent, replay = stirred(build([0, 1])), filled([0, 1])
    agent.learn(replay, 0)
    sequences, before = data(agent, replay)[0], agent.state()
    shares = agent.gradient_shares(sequences, 7)
    again = agent.gradient_shares(sequences, 7)
    assert all(torch.equal(shares[name], again[name]) for name in shares)
    after = agent.state()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not agent.encoder.flat.grad.any()
    parts = torch.stack([shares[name] for name in ("kl", "reward", "value")])
    assert (parts > 0).all()
    assert (shares["total"] <= parts.sum(0)).all()
    assert (shares["total"] >= parts[0] - parts[1] - parts[2]).all()
    heavy = stirred(build([0, 1], kl_balance=1.0))
    heavy.load(before)
    heavier = heavy.gradient_shares(sequences, 7)
    torch.testing.assert_close(heavier["kl"] / shares["kl"], 6 / before["kl_mean"])
    torch.testing.assert_close(heavier["value"], shares["value"])


# -- arms --------------------------------------------------------------------------------------------------------------


def test_arms_start_with_the_same_weights_and_meet_the_same_data_and_noise():
    agents = {arm: build([2], **settings) for arm, settings in ARMS.items() if arm != "O"}
    plain = agents["ALM"]
    for arm, agent in agents.items():
        for name, net in agent._nets().items():
            assert torch.equal(net.flat, plain._nets()[name].flat), (arm, name)
        ours, theirs = data(agent, filled([2])), data(plain, filled([2]))
        assert all(torch.equal(*pair) for pair in zip(ours[2], theirs[2], strict=True))
        assert torch.equal(ours[0]["obs"], theirs[0]["obs"])
    assert len({agent.config.label() for agent in agents.values()}) == len(agents)
    assert build(**ARMS["O"]).config.label() == "alm-O"
    assert agents["I+S"].config.arms() == ["S", "I"]


def learned(replay, updates=3, arm="ALM", **settings):
    agent = build(**ARMS[arm] | settings)
    for step in range(updates):
        terms = agent.learn(replay, step)
    return agent, terms


def changed(one, other) -> set[str]:
    return {name for name, net in one._nets().items() if not torch.equal(net.flat, other._nets()[name].flat)}


def scaled(replay, **factors):
    for name, factor in factors.items():
        replay.data[name] *= factor
    return replay


@pytest.mark.parametrize(("arm", "same"), [("S", True), ("I+S", True), ("ALM", False), ("R", False)])
def test_with_scaled_rewards_learning_is_the_same_whatever_their_unit(arm, same):
    agent, terms = learned(filled(), arm=arm)
    other, seen = learned(scaled(filled(), reward=2.0**-7), arm=arm)
    assert bool(changed(agent, other)) is not same
    if same:
        for name, value in terms.items():
            assert torch.equal(seen[name], value * (2.0**-7 if name in ("q1", "reward") else 1.0)), name
        rows = filled().rows(torch.arange(45).unsqueeze(0))
        assert torch.equal(other.q(rows["obs"], rows["action"]), 2.0**-7 * agent.q(rows["obs"], rows["action"]))
        z = agent.encode(rows["obs"]).mean
        assert torch.equal(other.reward(z, rows["action"]), 2.0**-7 * agent.reward(z, rows["action"]))


@pytest.mark.parametrize(("arm", "same"), [("I", True), ("O", True), ("ALM", False)])
def test_with_normalised_inputs_learning_is_the_same_whatever_their_units(arm, same):
    units = 2.0 ** torch.tensor([-6.0, 0.0, 3.0, 5.0, 1.0])
    agent, terms = learned(filled(), arm=arm)
    other, seen = learned(scaled(filled(), obs=units, next_obs=units), arm=arm)
    assert bool(changed(agent, other)) is not same
    assert torch.equal(terms["kl"], seen["kl"]) is same


def test_a_shift_of_inputs_changes_nothing_but_last_bits_where_they_are_normalised():
    found = []
    for shift in (0.0, 100.0):
        replay = filled()
        for name in ("obs", "next_obs"):
            replay.data[name] += shift
        found.append(learned(replay, arm="I")[1])
    torch.testing.assert_close(found[0]["kl"], found[1]["kl"], rtol=1e-3, atol=0)
    torch.testing.assert_close(found[0]["critic_loss"], found[1]["critic_loss"], rtol=1e-3, atol=0)


def test_normalised_inputs_are_clipped_and_what_never_varies_is_left_in_its_unit():
    agent, replay = build(**ARMS["O"]), filled()
    replay.data["obs"][..., 1] = 7.0
    agent.fit_normalisers(replay)
    obs = torch.full((1, BATCH, OBS), 1e4)
    obs[..., 1] = 7.5
    mean, std = agent.encode(obs)
    assert mean[0, 0].tolist() == [10.0, 0.5, 10.0, 10.0, 10.0]
    assert (std == torch.tensor(0.1)).all()
    plain = replay.data["obs"][:, :BATCH]
    expected = (plain - replay.data["obs"].mean(1)) / replay.data["obs"].std(1, correction=0).clamp(min=1e-6)
    torch.testing.assert_close(agent.encode(plain).mean[..., [0, 2, 3]], expected[..., [0, 2, 3]])


def test_a_normalised_reward_target_is_denormalised_wherever_it_is_used():
    replay = filled(unit=3.0)
    agent = build(**ARMS["R"])
    agent.fit_normalisers(replay)
    agent.judge.flat.zero_()
    z, action = torch.zeros(1, 40, 6), torch.zeros(1, 40, ACTION)
    mean, std = replay.data["reward"].mean(), replay.data["reward"].std(correction=0)
    torch.testing.assert_close(agent.reward(z, action), mean.expand(1, 40))
    sequences, rows, noise = data(agent, replay)
    torch.testing.assert_close(agent.representation(sequences, noise, 0.5)["reward"], mean.view(1))
    here = agent.encode(rows["obs"], target=True)
    torch.testing.assert_close(agent._update_actor(here, noise, 0.5)["imagined_reward"], mean.view(1))
    loss = agent._update_judge(rows, here, here, noise)["reward_loss"]
    torch.testing.assert_close(loss, ((rows["reward"] - mean) / std).square().mean(1))


def test_a_normalised_reward_target_leaves_the_critics_target_as_it_is():
    assert changed(learned(filled(), 1)[0], learned(filled(), 1, arm="R")[0]) >= {"judge", "encoder", "model"}
    agents = [build(**ARMS[arm]) for arm in ("ALM", "R")]
    losses = []
    for agent in agents:
        _, rows, noise = data(agent, filled())
        agent.fit_normalisers(filled())
        z, next_z = (agent.encode(rows[name], target=True) for name in ("obs", "next_obs"))
        losses.append(agent._update_critic(rows, z, next_z, noise, 0.5)["critic_loss"])
    assert torch.equal(*losses)


def test_moments_are_frozen_between_refits_that_count_from_the_first_step():
    agent, replay, seen = build(refit_every=3, **ARMS["I+S"]), filled(), []
    for step in range(40, 46):
        agent.learn(replay, step)
        seen.append((agent.input_mean.clone(), agent.reward_std.clone()))
        replay.data["obs"] += 1.0
        replay.data["reward"] *= 2.0
    mean, std = filled().data["obs"].mean(1), filled().data["reward"].std(1, correction=0)
    for i, (found_mean, found_std) in enumerate(seen):
        torch.testing.assert_close(found_mean, mean + 3 * (i // 3))
        torch.testing.assert_close(found_std, std * 8 ** (i // 3))


def test_a_balanced_kl_counts_as_many_nats_as_wanted_by_its_running_mean():
    agent, replay, history = build([0, 1], kl_balance=2.0, kl_rate=0.25), filled([0, 1]), []
    mean = None
    for step in range(4):
        terms = agent.learn(replay, step)
        history.append(terms["kl"])
        mean = terms["kl"] if mean is None else 0.75 * mean + 0.25 * terms["kl"]
        torch.testing.assert_close(terms["balance"] * mean, torch.full((2,), 12.0))  # of six dimensions
        expected = 3 * (terms["balance"] * terms["kl"] - terms["model_reward"]) - terms["value"]
        torch.testing.assert_close(terms["representation_loss"], expected)
    assert (learned(filled())[1]["balance"] == 1).all()


def test_a_residual_model_starts_from_the_latent():
    direct, residual = stirred(build()), stirred(build(**ARMS["D-"]))
    z, action = torch.randn(1, 40, 6), torch.randn(1, 40, ACTION)
    torch.testing.assert_close(residual.predict(z, action).mean, z + direct.predict(z, action).mean)
    assert torch.equal(residual.predict(z, action).std, direct.predict(z, action).std)


def test_without_a_model_neither_it_nor_the_judges_learn_and_the_target_encoder_follows():
    start, (agent, terms) = build(), learned(filled(), arm="noM")
    assert changed(start, agent) == {"encoder", "critic", "actor", "target_encoder", "target"}
    assert "kl" not in terms


@pytest.mark.parametrize(
    ("settings", "word"), [({"std_floor": 10.0}, "std_floor"), (ARMS["noM"] | ARMS["O"], "encoder")]
)
def test_settings_that_do_not_go_together_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        ALMConfig(**settings)


def test_no_random_number_of_an_update_is_used_twice_and_half_the_rows_have_the_models_end():
    noise = build([0, 1]).noise(generators([0, 1]))
    drawn = torch.cat([x.flatten() for name, x in noise._asdict().items() if name != "invented"])
    assert len(drawn) == 2 * BATCH * (13 * 6 + 6 * ACTION)
    assert len(drawn.unique()) > 0.999 * len(drawn)
    assert noise.invented.sum(1).tolist() == [BATCH // 2] * 2
    assert not torch.equal(*noise.invented)


# -- acting ------------------------------------------------------------------------------------------------------------


def test_the_noise_decays_linearly_from_the_first_step_of_learning():
    agent = build(std_initial=1.0, std_final=0.1, std_steps=10)
    agent.explore(torch.zeros(1, OBS), 40)
    assert [agent.std(step) for step in (40, 45, 50, 90)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert agent.learn(filled(), 45)["kl"].isfinite().all()
    assert agent.std(40) == 1.0


def test_exploration_samples_latent_and_action_by_step_and_seed_and_is_not_cut():
    agent = stirred(build([3, 5], std_initial=1.0, std_final=1.0))
    obs = torch.randn(2, OBS)
    first, second = agent.explore(obs, 7), agent.explore(obs, 8)
    assert first.shape == (2, ACTION)
    assert torch.equal(first, agent.explore(obs, 7))
    assert (first != second).any(1).all()
    drawn = [stream(s, "explore", 7) for s in (3, 5)]
    latent, noise = (
        torch.from_numpy(np.stack([g.standard_normal((1, n), dtype=np.float32) for g in drawn])) for n in (6, ACTION)
    )
    mean, std = agent.encode(obs.unsqueeze(1))
    expected = (agent.policy(mean + std * latent) + noise).clamp(-1, 1)
    torch.testing.assert_close(first, expected.squeeze(1))


def test_what_others_ask_for_takes_any_number_of_rows():
    agent, rows = stirred(build([0, 1])), filled([0, 1]).rows(torch.arange(64).repeat(2, 1))
    z, action = agent.encode(rows["obs"]).mean, rows["action"]
    asked = {
        "act": lambda n: agent.act(rows["obs"][:, :n]),
        "encode": lambda n: agent.encode(rows["obs"][:, :n]).std,
        "target": lambda n: agent.encode(rows["obs"][:, :n], target=True).mean,
        "predict": lambda n: agent.predict(z[:, :n], action[:, :n]).mean,
        "reward": lambda n: agent.reward(z[:, :n], action[:, :n]),
        "logit": lambda n: agent.logit_difference(z[:, :n], action[:, :n], z[:, :n]),
        "q": lambda n: agent.q(rows["obs"][:, :n], action[:, :n]),
    }
    for name, ask in asked.items():
        torch.testing.assert_close(ask(45), ask(64)[:, :45], msg=name)
    assert not torch.equal(asked["encode"](64), agent.encode(rows["obs"], target=True).std)
    least = agent.values(agent.encode(rows["obs"], target=True).mean, action)
    assert 0 < least.argmin(1).sum() < least[:, 0].numel()
    assert torch.equal(asked["q"](64), least.amin(1))


# -- sequences ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(2, 4), st.integers(0, 5), st.data())
@settings(max_examples=15, deadline=None)
def test_sequences_do_not_cross_an_end_and_all_that_do_not_can_be_drawn(episodes, length, missing, choice):
    """With a ring buffer that has forgotten its oldest rows, looked at after any number of rows."""
    steps = [(e, t) for e, n in enumerate(episodes) for t in range(n)]
    capacity = max(length, len(steps) - missing)
    replay = Replay({"obs": (2,), "action": (1,), "reward": (), "next_obs": (2,), "mask": ()}, 1, capacity)
    sequences, drawn, unseen = Sequences(replay, length), None, 0
    looks = choice.draw(st.sets(st.integers(0, len(steps) - 1)))
    for i, (e, t) in enumerate(steps):
        last = t == episodes[e] - 1
        row = {
            "obs": [e, t],
            "action": [0],
            "reward": 0,
            "next_obs": [e, t + 1],
            "mask": 0.0 if last and e % 2 else 1.0,
        }
        replay.add({name: np.array([[value]], np.float32) for name, value in row.items()})
        unseen += 1
        if (i in looks or i == len(steps) - 1 or unseen == capacity - 1) and replay.size >= length:
            drawn, unseen = sequences.draw([np.random.default_rng(0)], 512)[0], 0
    if drawn is None:
        return
    obs = replay.data["obs"][0].tolist()
    stored = range(replay.size - length + 1)
    whole = {i for i in stored if all(obs[i + k] == [obs[i][0], obs[i][1] + k] for k in range(length))}
    share = len(whole) / len(stored)
    if share >= 0.5:  # where hardly any place is whole, see `Sequences.draw`
        assert set(drawn.tolist()) <= whole
        assert len(whole) > 40 or set(drawn.tolist()) == whole


def test_a_sequence_does_not_go_on_after_a_termination_that_begins_where_it_ended():
    replay = Replay({"obs": (1,), "action": (1,), "reward": (), "next_obs": (1,), "mask": ()}, 1, 60)
    rows = {name: np.zeros((1, 60, 1), np.float32) for name in ("obs", "action", "next_obs")}
    mask = np.array([[(i + 1) % 6 != 0 for i in range(60)]], np.float32)
    replay.add({**rows, "reward": np.zeros((1, 60), np.float32), "mask": mask})
    starts = Sequences(replay, 3).draw([np.random.default_rng(0)], 500)[0]
    assert set((starts % 6).tolist()) == {0, 1, 2, 3}


def test_fewer_rows_than_a_sequence_are_an_error():
    with pytest.raises(ValueError, match="2 transitions are fewer than the 3"):
        build().learn(filled(episodes=(2,)), 0)


# -- probes ------------------------------------------------------------------------------------------------------------

DISCOUNT = 0.8
PROBES = probes.CONTINUING


def walks(size=1024, steps=16) -> Replay:
    """Random actions in every probe, one a seed, in episodes of `steps`."""
    replay = Replay(probes.FIELDS, len(PROBES), size)
    for episode in range(size // steps):
        parts = []
        for i, probe in enumerate(PROBES):
            rng, rows = stream(0, "walk", i, episode), []
            obs = probes.states(probe, 1, rng)
            for _ in range(steps):
                action = torch.from_numpy(rng.uniform(-1, 1, (1, probes.ACTION))).float()
                row = {"obs": obs, "action": action, "reward": probe.reward(obs[:, 0], obs[:, 1], action[:, 0])}
                rows.append(row | {"next_obs": probe.next_obs(obs, action), "mask": probe.mask(obs)})
                obs = rows[-1]["next_obs"]
            parts.append({name: torch.cat([row[name] for row in rows]) for name in probes.FIELDS})
        replay.add({name: torch.stack([part[name] for part in parts]) for name in probes.FIELDS})
    return replay


def walked(**changes) -> ALM:
    """Return an agent whose seed i has learned probe i."""
    torch.set_num_threads(1)
    settings = {"width": 32, "model_width": 32, "latent": 8, "batch_size": 32, "target_rate": 0.05}
    settings |= {"discount": DISCOUNT, "std_initial": 0.1, "std_final": 0.1}
    agent, replay = ALM(ALMConfig(**settings | changes), probes.OBS, probes.ACTION, range(len(PROBES))), walks()
    for step in range(600):
        agent.learn(replay, step)
    return agent


@pytest.fixture(scope="module")
def on_states() -> ALM:
    return walked(encoder="none", lr=2e-3)


@pytest.fixture(scope="module")
def on_latents() -> ALM:
    return walked(lr=1e-3, std_initial=0.3, std_final=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("i", range(len(PROBES)), ids=lambda i: PROBES[i].name)
def test_probe_is_learned_in_value_and_action_through_the_model(on_states, i):
    """On states themselves: nothing keeps a learned latent from growing until the actor's tanh is stuck at an end."""
    probe, rows = PROBES[i], probes.transitions(PROBES, 256, seed=1)
    obs, action = rows["obs"][i], rows["action"][i]
    # Values are up to 5. The policy's noise costs .04 of them, the latent's deviation and the smaller critic more.
    values = on_states.q(rows["obs"], rows["action"])[i]
    torch.testing.assert_close(values, probe.value(obs, action, DISCOUNT), rtol=0, atol=0.35)
    if probe.best is not None:
        where = probe.cares(obs)
        assert where.any()
        chosen = on_states.act(rows["obs"])[i, where, 0]
        torch.testing.assert_close(chosen, probe.best(obs[where, 0]), rtol=0, atol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("i", range(3), ids=lambda i: PROBES[i].name)
def test_value_and_reward_are_learned_on_latents(on_latents, i):
    probe, rows = PROBES[i], probes.transitions(PROBES, 256, seed=1)
    values = on_latents.q(rows["obs"], rows["action"])[i]
    expected = probe.value(rows["obs"][i], rows["action"][i], DISCOUNT)
    torch.testing.assert_close(values, expected, rtol=0, atol=0.35)
    z = on_latents.encode(rows["obs"], target=True).mean
    torch.testing.assert_close(on_latents.reward(z, rows["action"])[i], rows["reward"][i], rtol=0, atol=0.1)


# -- blocks, checkpoints, divergence, cost -----------------------------------------------------------------------------


def same(ours, theirs, row, of) -> list[str]:
    """Return the names of those tensors of which a seed's part differs: number `row` of `of` against the only one."""
    found = []
    for name, tensor in theirs.items():
        whole = ours[name]
        part = whole.view(of, -1)[row] if whole.dim() else whole
        if not torch.equal(part.flatten(), tensor.flatten()):
            found.append(name)
    return found


@pytest.mark.parametrize("arm", arms("ALM", "I+S"))
def test_a_seed_learns_the_same_bytes_in_every_block(arm):
    sizes = {"latent": 5, "width": 24, "model_width": 40, "refit_every": 2}
    agents = [build(seeds, obs=7, action=3, **ARMS[arm] | sizes) for seeds in ([4, 0, 9], [0])]
    for agent in agents:
        replay = filled(agent.seeds, obs=7, action=3)
        for step in range(4):
            agent.explore(replay.data["obs"][:, step], step)
            agent.learn(replay, step)
    together, alone = (agent.state() for agent in agents)
    assert same(together, alone, 1, 3) == []
    obs = filled([4, 0, 9], obs=7).data["obs"][:, :45]
    assert torch.equal(agents[0].act(obs)[1], agents[1].act(obs[1:2])[0])
    assert torch.equal(agents[0].explore(obs[:, 0], 5)[1], agents[1].explore(obs[1:2, 0], 5)[0])


@pytest.mark.parametrize("arm", arms("K"))
def test_a_run_that_is_taken_up_again_goes_on_with_the_same_bytes(arm):
    def fresh():
        return build([0, 2], **ARMS[arm] | {"refit_every": 3, "std_initial": 1.0, "std_steps": 20})

    whole, replay = fresh(), filled([0, 2])
    for step in range(30, 37):
        if step == 34:
            file = io.BytesIO()
            torch.save(whole.state(), file)
        whole.learn(replay, step)
    part = fresh()
    part.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for step in range(34, 37):
        part.learn(replay, step)
    ours, theirs = whole.state(), part.state()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert part.std(36) == whole.std(36) < 1.0


def test_divergence_stays_in_its_seed_and_is_returned():
    replays = [filled([0, 1, 2]), filled([0, 1, 2])]
    replays[1].data["reward"][1] = float("inf")
    agents = [build([0, 1, 2]), build([0, 1, 2])]
    for agent, replay in zip(agents, replays, strict=True):
        for step in range(3):
            terms = agent.learn(replay, step)
    assert not terms["critic_loss"][1].isfinite()
    healthy, sick = ({k: v for k, v in agent.state().items() if v.dim()} for agent in agents)
    assert not sick["actor"].view(3, -1)[1].isfinite().all()
    for name in healthy:
        for seed in (0, 2):
            assert torch.equal(*(state[name].view(3, -1)[seed] for state in (healthy, sick))), name


def test_networks_have_the_sizes_of_the_specification():
    """About 3.1 M trainable numbers at humanoid's sizes (`extensions` A2), by the formula that small networks obey."""
    agent = build(obs=67, action=21)
    trained = (agent.encoder, agent.model, agent.judge, agent.critic, agent.actor)
    kernels = sum(
        math.prod(shape) * net.members for net in trained for slot, shape in net.slots().items() if "kernel" in slot
    )
    assert kernels == sum(agent.config._multiply_adds(67, 21).values())
    config = ALMConfig()
    assert sum(config._multiply_adds(67, 21).values()) == pytest.approx(3.1e6, rel=0.01)
    targets = sum(config._multiply_adds(67, 21)[name] for name in ("encoder", "critic"))
    assert config.parameters(67, 21) == sum(config._multiply_adds(67, 21).values()) + targets


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["ALM", "O", "noM"])
def test_operations_are_those_that_pytorch_counts(arm):
    agent, replay = build(width=64, model_width=128, obs=17, action=6, **ARMS[arm]), filled(obs=17, action=6)
    agent.learn(replay, 0)
    with FlopCounterMode(display=False) as counter:
        agent.learn(replay, 1)
    assert counter.get_total_flops() == pytest.approx(agent.config.update_flops(17, 6), rel=0.1)
