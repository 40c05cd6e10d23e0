import pytest
import torch

import prime_kernels
from prime_kernels import dispatch, linear_logprob, linear_policy_loss, linear_prm_loss, prime_advantage

N, H, V = 6, 4, 9


def head():
    return {"hidden": torch.zeros(N, H), "weight": torch.zeros(V, H), "targets": torch.zeros(N).long()}


def policy():
    per_token = ("old_logprob", "advantage", "token_weight")
    return head() | {name: torch.zeros(N) for name in per_token}


def prm():
    rows = {"outcome": torch.zeros(2), "cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32)}
    return head() | {"ref_logprob": torch.zeros(N)} | rows


def advantage():
    return {k: v for k, v in prm().items() if k not in head()} | {
        "prm_logprob": torch.zeros(N),
        "group": torch.zeros(2).long(),
    }


OPS = {
    "linear_logprob": (linear_logprob, head),
    "linear_policy_loss": (linear_policy_loss, policy),
    "linear_prm_loss": (linear_prm_loss, prm),
    "prime_advantage": (prime_advantage, advantage),
}


class FakeDTensor(torch.Tensor):
    def full_tensor(self):
        raise NotImplementedError


HEAD_ERRORS = [
    ({"hidden": torch.zeros(2, 3, H)}, r"hidden has shape \(2, 3, 4\), needs \(any, any\): select the response tokens"),
    ({"hidden": torch.zeros(N, H).int()}, "hidden is torch.int32, needs torch.float64 or"),
    ({"hidden": torch.zeros(N, H).bfloat16()}, r"weight is torch.float32, needs torch.bfloat16: pass weight.to"),
    ({"weight": torch.zeros(V, H + 1)}, r"weight has shape \(9, 5\), needs \(any, 4\)"),
    ({"weight": torch.zeros(0)}, "under ZeRO-3 call inside its module"),
    ({"weight": torch.zeros(V, H).as_subclass(FakeDTensor)}, "weight is a DTensor, .* weight.full_tensor()"),
    ({"weight": torch.zeros(V, H, device="meta")}, "weight is on meta, the other arguments on cpu: move it"),
    ({"targets": torch.zeros(N)}, "targets is torch.float32, needs torch.int64"),
    ({"targets": torch.zeros(N + 1).long()}, r"targets has shape \(7\), needs \(6\): one token id for each row"),
    ({"targets": [0] * N}, r"targets is a list, needs a torch.Tensor of shape \(6\)"),
    ({"bias": torch.zeros(V - 1)}, r"bias has shape \(8\), needs \(9\): one entry for each row of weight"),
    ({"bias": torch.zeros(V).double()}, "bias is torch.float64, needs torch.float32"),
    ({"softcap": 0.0}, "softcap is 0.0, needs a number above 0"),
]


@pytest.mark.parametrize("op", [name for name in OPS if name != "prime_advantage"])
@pytest.mark.parametrize(("change", "message"), HEAD_ERRORS)
def test_head_arguments(op, change, message):
    function, arguments = OPS[op]
    with pytest.raises(ValueError, match=message):
        function(**arguments() | change)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("linear_logprob", {"temperature": 0}, "temperature is 0, needs a number above 0"),
        ("linear_logprob", {"temperature": float("nan")}, "temperature is nan"),
        ("linear_policy_loss", {"advantage": torch.zeros(N - 1)}, r"advantage has shape \(5\), needs \(6\): one value"),
        ("linear_policy_loss", {"advantage": None}, "advantage is a NoneType, needs a torch.Tensor"),
        ("linear_policy_loss", {"token_weight": torch.ones(N).bool()}, "token_weight is torch.bool"),
        ("linear_policy_loss", {"old_logprob": torch.zeros(N).half()}, "old_logprob is torch.float16"),
        ("linear_policy_loss", {"kl_coef": 0.1}, "ref_logprob is None with kl_coef 0.1: pass"),
        ("linear_policy_loss", {"ref_logprob": torch.zeros(1)}, r"ref_logprob has shape \(1\)"),
        ("linear_policy_loss", {"clip_low": 1.2}, "clip_low is 1.2, needs 0 <= clip_low <= 1"),
        ("linear_policy_loss", {"clip_high": -0.2}, "clip_high is -0.2"),
        ("linear_prm_loss", {"outcome": torch.zeros(3)}, r"cu_seqlens has shape \(3\), needs \(4\)"),
        ("linear_prm_loss", {"outcome": torch.zeros(2).long()}, "outcome is torch.int64"),
        ("linear_prm_loss", {"cu_seqlens": torch.tensor([0, 0, 6])}, "row 0 has no token"),
        ("linear_prm_loss", {"cu_seqlens": torch.tensor([0, 2, 7])}, "from 0 to 7, needs 0 to 6"),
        ("linear_prm_loss", {"row_weight": torch.zeros(3)}, r"row_weight has shape \(3\), needs \(2\)"),
        ("linear_prm_loss", {"intercept": torch.zeros(3)}, r"intercept has shape \(3\), needs \(2\): one value"),
        ("linear_prm_loss", {"intercept": torch.zeros(2).long()}, "intercept is torch.int64"),
        ("linear_prm_loss", {"ref_logprob": torch.zeros(5)}, r"ref_logprob has shape \(5\), needs \(6\)"),
        ("linear_prm_loss", {"beta": -1.0}, "beta is -1.0, needs a number above 0"),
    ],
)
def test_arguments(op, change, message):
    function, arguments = OPS[op]
    with pytest.raises(ValueError, match=message):
        function(**arguments() | change)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    "offsets",
    [[0, 2, 5], [0, 2, 9], [0, 7, 6], [1, 2, 6], [0, 6, 6], [0, -2, 6], [-6, -3, 6], [0, 2, -1], [0, 2**32 + 2, 6]],
)
def test_bad_offsets_of_the_prm_loss(backend, offsets):
    with pytest.raises(ValueError, match="cu_seqlens|no token"):
        linear_prm_loss(**prm() | {"cu_seqlens": torch.tensor(offsets)}, backend=backend)


def test_offsets_whose_differences_overflow():
    offsets = torch.tensor([0, 2**31 - 1, -5, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens falls after row 1"):
        linear_prm_loss(**prm() | {"cu_seqlens": offsets, "outcome": torch.zeros(3)})


@pytest.mark.parametrize("target", [-100, V])
def test_targets_are_range_checked_on_request(monkeypatch, target):
    monkeypatch.setenv("PRIME_KERNELS_CHECK", "1")
    targets = torch.tensor([0, 1, target, 3, 4, 5])
    with pytest.raises(ValueError, match=rf"targets\[2\] is {target}, needs 0 <= id < 9"):
        linear_logprob(**head() | {"targets": targets})


@pytest.mark.parametrize("op", OPS)
def test_every_op_takes_the_torch_backend_and_refuses_the_unbuilt(op):
    function, arguments = OPS[op]
    function(**arguments(), backend="torch")
    for backend, status in prime_kernels.backends()[op].items():
        if status != "ok":
            with pytest.raises(RuntimeError, match=f"{op}: back-end '{backend}' cannot run: .*use 'torch'"):
                function(**arguments(), backend=backend)
    with pytest.raises(ValueError, match=f"{op}: there is no back-end 'jax'; use one of cuda, triton, cpu, torch"):
        function(**arguments(), backend="jax")


def test_backends_covers_every_op_and_backend():
    table = prime_kernels.backends()
    assert set(table) == set(OPS)
    assert all(set(row) == {"cuda", "triton", "cpu", "torch"} and row["torch"] == "ok" for row in table.values())


def test_the_fastest_registered_backend_is_the_default(monkeypatch):
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS["prime_advantage"], "cpu", "a faster one")
    monkeypatch.setitem(dispatch.MACHINE, "cpu", lambda: None)
    single, double = torch.zeros(1), torch.zeros(1).double()
    assert dispatch.resolve("prime_advantage", None, [single]) == "a faster one"
    assert dispatch.resolve("prime_advantage", "torch", [single]) != "a faster one"
    assert dispatch.resolve("prime_advantage", None, [single, double]) != "a faster one"
    monkeypatch.setitem(dispatch.MACHINE, "cpu", lambda: "no compiler was here: install one")
    assert dispatch.resolve("prime_advantage", None, [single]) != "a faster one"
    with pytest.raises(RuntimeError, match="back-end 'cpu' cannot run: no compiler was here: install one"):
        dispatch.resolve("prime_advantage", "cpu", [single])


@pytest.mark.parametrize("op", [name for name in OPS if name != "prime_advantage"])
def test_a_backend_refuses_float64_and_other_devices(op):
    function, arguments = OPS[op]
    double = {k: v.double() if v.is_floating_point() else v for k, v in arguments().items()}
    with pytest.raises(RuntimeError, match=f"{op}: back-end 'cpu' cannot run: it has no float64: pass float32"):
        function(**double, backend="cpu")
    function(**double)
