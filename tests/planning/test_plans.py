"""What a plan knows of the ranks that it did not choose."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lowrank_jax as lr
from lowrank_jax.planning.plans import DenseKernel, FactoredKernel

IMAGES = jax.ShapeDtypeStruct((6, 9, 9, 8), jnp.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 5), strides=2, name="conv")(x)
        x = nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(x)
        return nn.DenseGeneral((4, 5), axis=(-2, -1), name="head")(x)


def plan_of(**settings):
    return {kernel.name: kernel for kernel in lr.plan(Net(), IMAGES, [lr.Rule(".*", **settings)]).kernels}


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_choice_costs_what_a_rule_for_it_would_plan(rank):
    plans = {scheme: plan_of(rank=rank, scheme=scheme) for scheme in ("channel", "spatial")}
    for first, second in (("channel", "spatial"), ("spatial", "channel")):
        taken, other = plans[first]["conv/kernel"], plans[second]["conv/kernel"]
        assert isinstance(taken, FactoredKernel) and isinstance(other, FactoredKernel)
        assert taken.choices == (taken.choice, other.choice)
        assert taken.choices[1].macs(rank) == other.planned_macs
        assert taken.choices[1].params(rank) == other.planned_params
    head = plans["spatial"]["head/kernel"]
    assert isinstance(head, FactoredKernel) and head.choices == (head.choice,)  # a dense layer is a matrix already


def test_a_kernel_that_this_rank_does_not_pay_for_keeps_its_choices_and_one_that_is_kept_dense_has_none():
    for settings in ({"rank": 80}, {"scale": 1.0}):
        kernel = plan_of(**settings)["conv/kernel"]
        assert isinstance(kernel, DenseKernel) and len(kernel.choices) == 2
        smaller = plan_of(rank=2)["conv/kernel"]
        assert kernel.choices == smaller.choices and kernel.choices[0].macs(2) == smaller.planned_macs
    assert plan_of()["conv/kernel"].choices == plan_of(rank=2)["depthwise/kernel"].choices == ()


def test_plans_with_the_same_lines_are_one_key():
    rules = [lr.Rule(".*", rank=2)]
    assert (
        len({lr.plan(Net(), IMAGES, rules), lr.plan(Net(), IMAGES, rules), lr.plan(Net(), IMAGES, [lr.Rule(".*", rank=3)])})
        == 2
    )


def test_a_plan_is_shown_as_its_table():
    plan = lr.plan(Net(), IMAGES, [lr.Rule("(?P<x>.*)", rank=2, activation=jnp.tanh)])
    assert repr(plan) == str(plan)
    assert all(kernel.name in repr(plan) for kernel in plan.kernels)
    assert all(f"<td>{kernel.name}</td>" in plan._repr_html_() for kernel in plan.kernels)
