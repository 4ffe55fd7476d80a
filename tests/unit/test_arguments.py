"""Arguments: what the public functions refuse, with what was given, what is allowed and what to do."""

import inspect

import numpy as np
import pytest
import torch
from fgattn import (
    InvalidArgument,
    Settings,
    TokenLayout,
    Unsupported,
    attend,
    build_plan,
    plan_from_mask,
    sparse_attention,
)
from torch._subclasses.fake_tensor import FakeTensorMode

LAYOUT = TokenLayout((2, 4, 8))
Q = torch.randn(3, 1, 2, 64, 64, generator=torch.Generator().manual_seed(0))[0]
MASK = torch.ones(1, 4, dtype=torch.bool)
GOOD = {
    attend: lambda: {"q": Q, "k": Q, "v": Q, "plan": plan_from_mask(MASK, 64, 16)},
    build_plan: lambda: {"q": Q, "k": Q, "settings": Settings(), "layout": LAYOUT},
    sparse_attention: lambda: {"q": Q, "k": Q, "v": Q, "settings": Settings(), "layout": LAYOUT},
    plan_from_mask: lambda: {"mask": MASK, "tile_queries": 64, "tile_keys": 16},
    TokenLayout: lambda: {"grid": (2, 4, 8), "front": 2},
}
BAD = (None, [1.5], "x", float("nan"), object())
MAY_BE_NONE = {"out", "scale", "impl", "query_length", "key_length", "query_start", "key_valid"}


@pytest.mark.parametrize("bad", BAD, ids=["None", "list", "str", "NaN", "object"])
@pytest.mark.parametrize(
    ("function", "name"),
    [(f, name) for f in GOOD for name in inspect.signature(f).parameters],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_nonsense_is_refused(function, name, bad):
    """Any argument of any public function: an error of ours that names it, never one from deep inside."""
    arguments = GOOD[function]() | {name: bad}
    if bad is None and (name in MAY_BE_NONE or (function, name) == (plan_from_mask, "layout")):
        function(**arguments)
        return
    with pytest.raises(
        InvalidArgument, match=rf"^.*{name if function is not TokenLayout else 'layout'}.*: got "
    ):
        function(**arguments)


@pytest.mark.parametrize(
    "scale", [float("inf"), -float("inf"), 10**400, True, 1j, torch.tensor(0.1)], ids=lambda x: str(x)[:9]
)
@pytest.mark.parametrize("function", [build_plan, sparse_attention, plan_from_mask])
def test_a_scale_is_a_finite_number(function, scale):
    """It would come out as a picture of NaN."""
    with pytest.raises(InvalidArgument, match=r"^scale: got .*; allowed: a finite number\. None is"):
        function(**GOOD[function](), scale=scale)


def test_heads_of_size_zero():
    """D**-0.5 is no number."""
    q = torch.zeros(1, 2, 64, 0)
    for function in (build_plan, sparse_attention, attend):
        arguments = GOOD[function]()
        arguments |= {name: q for name in ("q", "k", "v") if name in arguments}
        with pytest.raises(InvalidArgument, match=r"^D, the head size: got 0; allowed: at least 1"):
            function(**arguments)


def test_numbers_of_a_layout():
    """Booleans, floats and texts are no places of tokens, whatever they are equal to; lists are taken."""
    for start in (0.0, "", False):
        with pytest.raises(InvalidArgument, match=r"layout: got .*query_start"):
            TokenLayout((2, 4, 8), query_start=start)
    for absent in ((1.0,), (True,), ("1",), range(2), {1}, (7,)):
        with pytest.raises(InvalidArgument, match=r"^layout\.absent: got"):
            TokenLayout((2, 4, 8), front=3, absent=absent)
    assert TokenLayout((2, 4, 8), front=3, absent=[0, 2]).absent == (0, 2)


@pytest.mark.parametrize("name", ["query_length", "key_length"])
@pytest.mark.parametrize("length", [-3, 64.0, True])
def test_lengths_of_a_mask_are_whole_numbers(name, length):
    """A negative length would fail in NumPy."""
    with pytest.raises(InvalidArgument, match=f"^{name}: got {length}; allowed: a whole number"):
        plan_from_mask(MASK, 64, 16, **{name: length})


def test_a_plan_of_another_device():
    """Kernels would read the memory of another GPU."""
    plan = plan_from_mask(MASK.to("meta"), 64, 16)
    with pytest.raises(InvalidArgument, match=r"^device of the plan: got 'meta'; allowed: cpu, where q, k"):
        attend(Q, Q, Q, plan)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (function, name)
        for function in GOOD
        for name in inspect.signature(function).parameters
        if name in ("q", "k", "v", "mask", "out", "key_valid")
    ],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_an_element_in_each_place(function, name):
    """Sparse and nested tensors have no memory that a kernel could be given."""
    good = {"mask": MASK, "key_valid": torch.ones(1, 66, dtype=torch.bool)}.get(name, Q)
    for odd in (good.to_sparse(), torch.nested.nested_tensor([good.float()])):
        with pytest.raises(InvalidArgument, match=rf"{name}: got .*; allowed: a dense tensor\. Convert"):
            function(**GOOD[function]() | {name: odd})


@pytest.mark.parametrize("function", [attend, build_plan, sparse_attention])
@pytest.mark.parametrize("impl", [np.array(["torch", "triton"]), 0, True, ["torch"]], ids=repr)
def test_a_backend_is_named_by_text(function, impl):
    """What compares with a text element by element, too."""
    with pytest.raises(InvalidArgument, match=r"^impl: got .*; allowed: hopper, triton, torch, reference"):
        function(**GOOD[function](), impl=impl)


@pytest.mark.parametrize("number", [2**31, 10**30, 10**5000], ids=["2**31", "10**30", "10**5000"])
def test_more_tokens_than_can_be_counted(number):
    """Kernels count tokens in 32 bits."""
    for name in ("front", "back", "query_start"):
        with pytest.raises(InvalidArgument, match=r"^layout: got "):
            TokenLayout((2, 4, 8), **{name: number})
    with pytest.raises(InvalidArgument, match=r"^layout: got "):
        TokenLayout((number, 1, 1))
    with pytest.raises(InvalidArgument, match=r"^layout\.length: got 4294967296; allowed: at most"):
        TokenLayout((2**16, 2**16, 1))
    for name in ("query_length", "key_length"):
        with pytest.raises(InvalidArgument, match=rf"^{name}: got .*; allowed: a whole number from 0 to"):
            plan_from_mask(MASK, 64, 16, **{name: number})


def test_valid_keys_without_values():
    """They decide what is computed."""
    layout = TokenLayout((2, 4, 8), key_valid=torch.ones(1, 64, dtype=torch.bool, device="meta"))
    with pytest.raises(InvalidArgument, match=r"^layout\.key_valid: got 'a tensor on meta'; allowed: values"):
        build_plan(Q, Q, Settings(), layout)


@pytest.mark.parametrize("impl", [None, "torch", "reference", "triton"])
def test_tensors_without_values(impl):
    """Which keys are kept depends on values: such a call is left to dense attention, with the reason."""

    def check(q):
        for function in (build_plan, sparse_attention):
            arguments = GOOD[function]()
            arguments |= {name: q for name in ("q", "k", "v") if name in arguments}
            with pytest.raises(Unsupported, match=r"values that are not in memory.*Run this call dense\."):
                function(**arguments, impl=impl)

    check(Q.to("meta"))
    with FakeTensorMode():
        check(torch.empty(1, 2, 64, 64))


@pytest.mark.parametrize("impl", [None, "torch", "reference", "triton", "hopper"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_are_refused(name, impl):
    """A kernel would lose them without a word; where none are recorded, the tensors are as good as others."""
    for function in (build_plan, sparse_attention, attend):
        arguments = GOOD[function]()
        if name in arguments:
            arguments[name] = Q.clone().requires_grad_()
            with pytest.raises(
                Unsupported, match=r"^q, k, v: got 'gradients.* Call it under torch\.no_grad\("
            ):
                function(**arguments, impl=impl)
            if impl not in ("triton", "hopper"):
                for mode in (torch.no_grad, torch.inference_mode):
                    with mode():
                        function(**arguments, impl=impl)
