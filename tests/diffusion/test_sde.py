"""Samplers: mean, std and log-density of each step against the published equations, and the rollouts' distribution."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from bpgo_video.diffusion.sde import SAMPLERS, SOLVERS, Step, flow_shift, shifted_sigmas, steps_of

ETAS = {"ode": 0.0, "flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.7, "sage": 0.7, "truncated": 1.0}
STOCHASTIC = [name for name in SAMPLERS if name != "ode"]
DATA_VARIANCE = 0.25


def latents_of(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def written_out(name, t, next_t, t_g, eta):
    """Coefficients (of x, of v) of the mean, and the std, from each sampler's published equation in plain floats."""
    d = t - next_t
    if name == "cps":  # (1 - t')(x - t v) + sqrt(t'^2 - s^2)(x + (1 - t) v)
        s = next_t * math.sin(eta * math.pi / 2)
        kept = math.sqrt(next_t**2 - s**2)
        return (1 - next_t) + kept, -(1 - next_t) * t + kept * (1 - t), s
    if name == "sage":  # mu = x - v D - S (x + (1-t) v)/(2t)
        first = t_g != t
        s2 = eta**2 * (d * t / (1 - next_t) if first else math.log((1 - next_t) / (1 - t)) - d)
        return 1 - s2 / (2 * t), -d - s2 * (1 - t) / (2 * t), math.sqrt(s2)
    g = {"ode": 0.0, "dance_sde": eta}.get(name, eta * math.sqrt(t / (1 - t_g)))
    if name == "truncated":
        g = min(g * math.sqrt(d), 0.45) / math.sqrt(d)
    # mu = x (1 - g^2 D/(2t)) - v (1 + g^2 (1-t)/(2t)) D
    return 1 - g**2 * d / (2 * t), -(1 + g**2 * (1 - t) / (2 * t)) * d, g * math.sqrt(d)


def exact_velocity(latents, sigma):
    """E[noise - data | latents] for data ~ N(0, DATA_VARIANCE): linear in the latents."""
    t, variance = sigma, DATA_VARIANCE
    return latents * (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)


def recursion(name, sigmas, eta):
    """Variance of a rollout on Gaussian data: Var' = a^2 Var + s^2, written out in plain floats."""
    levels = [float(sigma) for sigma in sigmas]
    variance = levels[0] ** 2 + (1 - levels[0]) ** 2 * DATA_VARIANCE
    for i, (t, next_t) in enumerate(pairwise(levels)):
        of_x, of_v, std = written_out(name, t, next_t, next_t if i == 0 else t, eta)
        variance = (of_x + of_v * exact_velocity(1.0, t)) ** 2 * variance + std**2
    return variance


def rollout_variance(name, sigmas, eta):
    """The variance of the sampler's rollout, exact because for latents of 1 the mean equals the coefficient a."""
    variance, one = 1.0, torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    for step in steps_of(sigmas):
        transition = SAMPLERS[name](exact_velocity(one, step.sigma), one, step, eta)
        variance = transition.mean.item() ** 2 * variance + transition.std.item() ** 2
    return variance


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sigmas", [shifted_sigmas(8, 3.0), torch.tensor([0.9997, 0.8, 0.45, 0.1, 0.0])])
def test_each_step_has_the_mean_and_std_of_the_published_equation(name, sigmas):
    latents, velocity = (latents_of(3, 2, 1, 2, 2, seed=s, dtype=torch.float64) for s in (1, 2))
    for step in steps_of(sigmas):
        transition = SAMPLERS[name](velocity, latents, step, ETAS[name])
        of_x, of_v, std = written_out(
            name, *(v.item() for v in (step.sigma, step.next_sigma, step.sigma_g)), ETAS[name]
        )
        torch.testing.assert_close(transition.mean, of_x * latents + of_v * velocity, rtol=1e-12, atol=1e-13)
        assert transition.std.item() == pytest.approx(std, rel=1e-9)


def test_flow_sde_equals_values_computed_by_hand():
    # t = .5, t' = .3, eta = .7: g^2 = .49 * .5/.5 = .49, dt = -.2, s = .7 sqrt(.2) = .31304952
    # x = 1, v = 2: drift = 2 + .49/(2*.5) * (1 + .5*2) = 2.98; mean = 1 - .2*2.98 = .404
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    transition = SAMPLERS["flow_sde"](
        2 * one, one, steps_of(torch.tensor([0.9, 0.5, 0.3], dtype=torch.float64))[1], 0.7
    )
    assert transition.mean.item() == pytest.approx(0.404, abs=1e-12)
    assert transition.std.item() == pytest.approx(0.3130495168, abs=1e-9)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_moments_on_gaussian_data_equal_the_discrete_recursion(name):
    samples, sigmas, rng = 100_000, shifted_sigmas(8, 3.0), torch.Generator().manual_seed(3)
    latents = torch.randn(samples, 1, 1, 1, 1, generator=rng)
    for step in steps_of(sigmas):
        transition = SAMPLERS[name](exact_velocity(latents, step.sigma), latents, step, ETAS[name])
        latents = transition.sample(torch.randn(latents.shape, generator=rng))
    expected = recursion(name, sigmas, ETAS[name])
    assert latents.var().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / samples))
    assert abs(latents.mean().item()) < 4 * math.sqrt(expected / samples)


@pytest.mark.parametrize("name", ["ode", "flow_sde", "dance_sde", "sage", "truncated"])
def test_many_steps_reach_the_data_distribution(name):
    assert rollout_variance(name, torch.linspace(1, 0, 1001), ETAS[name]) == pytest.approx(DATA_VARIANCE, rel=0.01)


def test_few_steps_lose_variance_as_documented():
    kept = [rollout_variance("flow_sde", shifted_sigmas(n, 3.0), 0.7) / DATA_VARIANCE for n in (8, 20, 1000)]
    assert kept == pytest.approx([0.671, 0.840, 0.999], abs=0.001)
    kept = [rollout_variance("cps", shifted_sigmas(n, 3.0), 0.7) / DATA_VARIANCE for n in (8, 20, 1000)]
    assert kept == pytest.approx([0.348, 0.537, 0.715], abs=0.001)


def test_cps_reproduces_a_single_data_point_exactly():
    # data = c: v = (x - c)/t; x ~ N((1-t) c, t^2) must become N((1-t') c, t'^2) at every step, whatever eta.
    data, variance = 0.8, 1.0
    for step in steps_of(torch.linspace(1, 0, 9, dtype=torch.float64)):
        at = torch.full((1, 1, 1, 1, 1), (1 - step.sigma.item()) * data, dtype=torch.float64)
        low, high = (SAMPLERS["cps"]((x - data) / step.sigma, x, step, 0.7) for x in (at, at + 1))
        assert low.mean.item() == pytest.approx((1 - step.next_sigma.item()) * data, abs=1e-12)
        variance = (high.mean - low.mean).item() ** 2 * variance + low.std.item() ** 2
        assert variance == pytest.approx(step.next_sigma.item() ** 2, abs=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_eta_is_the_euler_step(name):
    latents, velocity = latents_of(2, 3, 2, 4, 4, seed=4), latents_of(2, 3, 2, 4, 4, seed=5)
    for step in steps_of(shifted_sigmas(5, 5.0)):
        transition = SAMPLERS[name](velocity, latents, step, 0.0)
        torch.testing.assert_close(transition.mean, latents + velocity * step.dt, rtol=1e-6, atol=1e-6)
        assert transition.std == 0


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigmas", [[1.0, 0.0], [1.0, 0.5, 0.0], [0.9999, 0.9, 1e-3, 0.0]])
def test_steps_are_finite_at_both_ends_and_at_least_fp32(name, dtype, sigmas):
    latents, velocity = latents_of(2, 1, 1, 2, 2, dtype=dtype), latents_of(2, 1, 1, 2, 2, seed=6, dtype=dtype)
    for step in steps_of(torch.tensor(sigmas)):
        transition = SAMPLERS[name](velocity, latents, step, ETAS[name])
        assert transition.mean.dtype == torch.float32
        assert transition.mean.isfinite().all()
        assert 0 <= transition.std < 3


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 8, 50])
def test_ode_rollout_equals_diffusers(shift, num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    sigmas = shifted_sigmas(num_steps, shift)
    assert torch.equal(sigmas, scheduler.sigmas)
    ours = theirs = latents_of(2, 3, 2, 4, 4)
    for step, timestep in zip(steps_of(sigmas), scheduler.timesteps, strict=True):
        velocity = torch.sin(3 * ours) + step.sigma
        ours = SAMPLERS["ode"](velocity, ours, step, 0.0).mean
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_is_the_mean_of_the_normal_log_density(name, dtype):
    latents, velocity, noise = (latents_of(4, 3, 2, 4, 4, seed=seed, dtype=dtype) for seed in (7, 8, 9))
    for step in steps_of(shifted_sigmas(6, 3.0))[:-1]:
        transition = SAMPLERS[name](velocity, latents, step, ETAS[name])
        sample = transition.sample(noise)
        normal = torch.distributions.Normal(transition.mean, transition.std.to(dtype))
        log_prob = transition.log_prob(sample)
        assert log_prob.dtype == dtype
        torch.testing.assert_close(log_prob, normal.log_prob(sample).mean(dim=(1, 2, 3, 4)), rtol=1e-5, atol=1e-6)


def test_a_deterministic_step_has_no_density():
    latents = latents_of(1, 1, 1, 2, 2)
    transition = SAMPLERS["ode"](latents, latents, steps_of(torch.tensor([1.0, 0.5, 0.0]))[0], 0.0)
    with pytest.raises(ValueError, match="train stochastic steps only"):
        transition.log_prob(latents)


def test_only_the_first_step_uses_the_next_noise_level_in_g():
    steps = steps_of(torch.tensor([0.9997, 0.6, 0.2, 0.0]))
    assert [step.sigma_g == step.next_sigma for step in steps] == [True, False, False]
    assert [step.sigma_g == step.sigma for step in steps] == [False, True, True]


@pytest.mark.parametrize("sigmas", [[1.0], [0.5, 0.5, 0.0], [0.2, 0.6], [1.1, 0.0], [1.0, -0.1], [1.0, math.nan]])
def test_a_schedule_must_decrease_from_one_to_zero(sigmas):
    with pytest.raises(ValueError, match="schedule"):
        steps_of(torch.tensor(sigmas))


def test_flow_shift_equals_values_computed_by_hand():
    # 3 * .5 / (1 + 2 * .5) = .75; both ends are unchanged
    torch.testing.assert_close(flow_shift(torch.tensor([1.0, 0.5, 0.0]), 3.0), torch.tensor([1.0, 0.75, 0.0]))


def test_cps_refuses_an_angle_above_a_quarter_turn():
    latents, half = latents_of(1, 1, 1, 2, 2), torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"eta=1\.5"):
        SAMPLERS["cps"](latents, latents, Step(half * 2, half, half), 1.5)


def gaussian_ode_error(solver, num_steps, spread=0.5):
    """|x(0) - spread x(1)| along the ODE of data N(0, spread^2), whose velocity is known."""
    latents, previous = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), None
    for step in steps_of(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)):
        clean = (1 - step.sigma) * spread**2
        velocity = latents * (step.sigma - clean) / ((1 - step.sigma) * clean + step.sigma**2)
        latents, previous = SOLVERS[solver](velocity, latents, step, previous), (velocity, step)
    return abs(latents.item() - spread)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("adams_bashforth", 2)])
def test_each_solver_converges_at_its_order(solver, order):
    errors = [gaussian_ode_error(solver, num_steps) for num_steps in (100, 200)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_a_second_order_solver_needs_fewer_steps():
    assert gaussian_ode_error("adams_bashforth", 16) < gaussian_ode_error("euler", 64)
