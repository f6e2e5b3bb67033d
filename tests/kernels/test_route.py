"""Which experts a mixture's router chooses, and their weights: both twins, every option."""

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashinfer import kernels

each_twin = pytest.mark.parametrize(
    "route", [twin["route"] for twin in kernels.TWINS.values()], ids=list(kernels.TWINS)
)
ODD = (np.nan, np.inf, -np.inf, 3e38, -3e38, -1e38, -100.0)


@st.composite
def calls(draw, odd=()):
    """The arguments of a call. Some experts have the same logits and bias; some values are odd."""
    groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kept, experts = draw(st.integers(1, groups)), groups * size
    random = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    like = random.integers(0, experts, experts)
    values = random.standard_normal((1 + draw(st.integers(0, 3)), experts)).astype(np.float32)
    if odd:
        where = random.random(values.shape) < draw(st.sampled_from([0.1, 0.5, 0.9]))
        values[where] = random.choice(np.array(odd, dtype=np.float32), np.count_nonzero(where))
    values = np.ascontiguousarray(values[:, like])
    return {
        "logits": values[1:],
        "per_token": draw(st.integers(1, kept * size)),
        "normalised": draw(st.booleans()),
        "scoring": draw(st.sampled_from(["softmax", "sigmoid"])),
        "choice_bias": values[0] if draw(st.booleans()) else None,
        "groups": groups,
        "groups_kept": kept,
        "scale": draw(st.sampled_from([1.0, 2.5, -0.5, 0])),
        "group_by": draw(st.sampled_from(["top2", "max"])),
    }


def best(values, n):
    """The ids of the n largest, of equal ones the lowest; ascending."""
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:n])


def by_definition(call, logits):
    """(experts, weights) of one token in float64, and what decided: (values, scores of groups)."""
    logits = logits.astype(np.float64)
    if call["scoring"] == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
    values = scores if call["choice_bias"] is None else scores + call["choice_bias"]
    of_groups = np.sort(values.reshape(call["groups"], -1), axis=1)
    of_groups = of_groups[:, -1 if call["group_by"] == "max" else -2 :].sum(axis=1)
    kept = best(of_groups, call["groups_kept"])
    size = len(logits) // call["groups"]
    available = [e for e in range(len(logits)) if e // size in kept]
    chosen = [available[i] for i in best(values[available], call["per_token"])]
    weights = scores[chosen] / (scores[chosen].sum() if call["normalised"] else 1)
    return (chosen, weights * call["scale"]), (values, of_groups)


@each_twin
@settings(deadline=None, max_examples=400)
@given(call=calls())
def test_route_is_its_definition(route, call):
    chosen, weights = route(**call)
    assert chosen.shape == weights.shape == (len(call["logits"]), call["per_token"])
    assert chosen.dtype == np.int32 and weights.dtype == np.float32
    for token, logits in enumerate(call["logits"]):
        (experts, expected), decided = by_definition(call, logits)
        if all(np.diff(np.unique(v)).min(initial=1) > 1e-6 for v in decided):  # else they may round
            assert chosen[token].tolist() == experts
            np.testing.assert_allclose(weights[token], expected, rtol=1e-5, atol=1e-7)


@each_twin
@settings(deadline=None, max_examples=400)
@given(call=calls(odd=ODD))
def test_nan_is_below_all_numbers(route, call):
    """Whatever the biases are, and within the groups that are kept."""
    groups, logits = call["groups"], call["logits"]
    by_logits = call["scoring"] == "softmax" and call["choice_bias"] is None
    by_logits = by_logits and call["groups_kept"] == groups
    chosen, weights = route(**call)
    assert (np.diff(chosen, axis=1) > 0).all()
    assert chosen.min(initial=0) >= 0 and chosen.max(initial=0) < logits.shape[1]
    for token, experts in enumerate(chosen):
        # Of logits themselves -inf is the least, which a softmax counts like NaN.
        numbers = logits[token] > -np.inf if by_logits else ~np.isnan(logits[token])
        is_chosen = np.isin(np.arange(logits.shape[1]), experts).reshape(groups, -1)
        numbers = numbers.reshape(groups, -1)
        used = is_chosen.any(axis=1)
        assert np.count_nonzero(used) <= call["groups_kept"]
        if (is_chosen & ~numbers).any():
            assert not (numbers & ~is_chosen)[used].any()
        if (used & ~numbers.any(axis=1)).any():  # a group without a number
            assert np.count_nonzero(numbers.any(axis=1)) < call["groups_kept"]
        if call["scoring"] == "sigmoid":
            assert (weights[token][~numbers.reshape(-1)[experts]] == 0).all()
            assert np.isfinite(weights[token]).all()


@each_twin
@settings(deadline=None)
@given(call=calls(odd=ODD))
def test_tokens_do_not_touch_each_other(route, call):
    together = route(**call)
    apart = [route(**{**call, "logits": row[None]}) for row in call["logits"]]
    for i, values in enumerate(together):
        for row, alone in zip(values, apart, strict=True):
            np.testing.assert_array_equal(row, alone[i][0])


@each_twin
@pytest.mark.parametrize("normalised", [False, True])
def test_options_that_change_nothing_change_no_bit(route, normalised):
    logits = np.random.default_rng(1).standard_normal((9, 60)).astype(np.float32)
    chosen, weights = route(logits, 7, normalised)
    zeros = np.zeros(60, dtype=np.float32)
    for options in ({"groups": 6, "groups_kept": 6}, {"scale": 1}, {"choice_bias": zeros},
                    {"groups": 60, "groups_kept": 60, "group_by": "max"}):  # fmt: skip
        found, its_weights = route(logits, 7, normalised, **options)
        assert np.array_equal(found, chosen) and np.array_equal(its_weights, weights)


@each_twin
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalised", [False, True])
def test_a_bias_chooses_and_does_not_weigh(route, scoring, normalised):
    random = np.random.default_rng(2)
    logits, bias = random.standard_normal((4, 12)), random.standard_normal(12)
    logits, bias = logits.astype(np.float32), bias.astype(np.float32)
    without = route(logits, 12, normalised, scoring)
    for expected, found in zip(without, route(logits, 12, normalised, scoring, bias), strict=True):
        assert np.array_equal(expected, found)
    only = np.full(12, -1, dtype=np.float32)
    only[5] = 1
    chosen, weights = route(logits, 1, normalised, scoring, only)
    scores = route(logits, 12, False, scoring)[1]
    assert (chosen == 5).all()
    assert np.array_equal(weights[:, 0], np.ones(4) if normalised else scores[:, 5])


@each_twin
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_experts_that_count_nothing_can_be_chosen(route, scoring):
    """By a bias; dividing by the sum of their scores, which is 0, gives no NaN."""
    logits = np.array([[90, -200, -300]], dtype=np.float32)
    bias = np.array([-5, 1, 1], dtype=np.float32)
    chosen, weights = route(logits, 2, True, scoring, bias)
    assert chosen.tolist() == [[1, 2]] and weights.tolist() == [[0, 0]]


@each_twin
def test_wrong_arguments_are_named(route):
    logits = np.zeros((2, 300), dtype=np.float32)
    wrong = (
        ({"scoring": "tanh"}, "scoring is 'tanh', not one of softmax, sigmoid"),
        ({"scoring": None}, "scoring is None"),
        ({"group_by": "mean"}, "group_by is 'mean', not one of top2, max"),
        ({"groups": 7}, "300 experts do not make 7 equal groups"),
        ({"groups": np.int8(7)}, "300 experts do not make 7 equal groups"),
        ({"groups": 0}, "groups is 0, not a whole number from 1 to 300"),
        ({"groups": 301}, "groups is 301"),
        ({"groups": 2.0}, "groups is 2.0"),
        ({"groups": 30, "groups_kept": 31}, "groups_kept is 31, not a whole number from 1 to 30"),
        ({"groups_kept": 2}, "groups_kept is 2"),
        ({"groups": 100, "groups_kept": 2}, "per_token is 8, and 2 of 100 groups have 6 experts"),
        ({"groups": np.int8(100), "groups_kept": np.int8(2)}, "have 6 experts"),
        ({"choice_bias": np.zeros(299, np.float32)}, "choice_bias has 299 values, not 300"),
        ({"choice_bias": np.zeros(300)}, "choice_bias must be a contiguous array of float32"),
        ({"choice_bias": np.zeros((1, 300), np.float32)}, "choice_bias must be"),
        ({"choice_bias": np.zeros(600, np.float32)[::2]}, "choice_bias must be"),
        ({"scale": np.nan}, "scale is nan, not a number"),
        ({"scale": -np.inf}, "scale is -inf, not a number"),
        ({"scale": 1e39}, "scale is 1e[+]39, not a number"),
        ({"scale": "1"}, "scale is 1, not a number"),
        ({"per_token": 0}, "per_token is 0"),
        ({"per_token": 301}, "per_token is 301"),
    )
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            route(**{"logits": logits, "per_token": 8, "normalised": True, **options})
    narrow = {"groups": np.int8(100), "groups_kept": np.int8(3), "per_token": np.int8(9)}
    chosen, _ = route(logits, normalised=True, **narrow)
    assert chosen.tolist() == [list(range(9))] * 2


# {transformers' router: (its model, what is set in its config, the same for route)}
DEEPSEEK = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
GROUPS = {"groups": 4, "groups_kept": 2, "scale": 2.5}
SIGMOID = {"scoring": "sigmoid", **GROUPS}
THEIRS = {
    "DeepseekV3TopkRouter": (
        ("deepseek_v3", {**DEEPSEEK, "norm_topk_prob": True}, {"normalised": True, **SIGMOID}),
        ("deepseek_v3", {**DEEPSEEK, "norm_topk_prob": False}, {"normalised": False, **SIGMOID}),
    ),
    "Glm4MoeTopkRouter": (
        ("glm4_moe", {**DEEPSEEK, "norm_topk_prob": True}, {"normalised": True, **SIGMOID}),
    ),
    "Dots1TopkRouter": (
        ("dots1", {**DEEPSEEK, "norm_topk_prob": True}, {"normalised": True, **SIGMOID}),
    ),
    "DeepseekV2TopkRouter": (
        ("deepseek_v2", {**DEEPSEEK, "topk_method": "group_limited_greedy"},
         {"normalised": False, "group_by": "max", **GROUPS}),
        ("deepseek_v2", {**DEEPSEEK, "topk_method": "greedy"},
         {"normalised": False, "scale": 2.5}),
    ),
    "Ernie4_5_MoeTopKRouter": (("ernie4_5_moe", {}, {"normalised": True}),),
}  # fmt: skip
ROUTERS = [(name, *case) for name, cases in THEIRS.items() for case in cases]


@each_twin
@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name, model, options, ours", ROUTERS)
def test_transformers_routers(route, name, model, options, ours):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    experts, random = 32, np.random.default_rng(3)
    config = transformers.AutoConfig.for_model(model, hidden_size=experts, **options)
    for field in ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"):
        setattr(config, field, experts)
    config.num_experts_per_tok = config.moe_k = 6
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    router = getattr(module, name)(config)
    logits = (3 * random.standard_normal((50, experts))).astype(np.float32)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))  # so that the logits are what it is given
        biases = [tensor for part, tensor in router.state_dict().items() if "bias" in part]
        for bias in biases:
            bias.copy_(torch.from_numpy(random.uniform(-0.2, 0.2, bias.shape)))
            ours = {**ours, "choice_bias": bias.numpy().reshape(-1)}
        assert bool(biases) == (model != "deepseek_v2")
        _, expected, their_choice = router(torch.from_numpy(logits))
    order = their_choice.numpy().argsort(axis=1)
    chosen, weights = route(logits, 6, **ours)
    assert np.array_equal(chosen, np.take_along_axis(their_choice.numpy(), order, axis=1))
    expected = np.take_along_axis(expected.numpy(), order, axis=1)
    np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)
