"""Objectives: the published code's values and gradients, an independent reference, and what they refuse."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from raybd.objectives import Loss, Rows, combined, image_ssl, mmcl, nt_xent, siglip, siglip_mean, ssl, text_ssl
from raybd.terms import TERMS

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "losses.json"
NAMES = ("image", "text", "image_view", "text_view")
unhurried = settings(deadline=None, max_examples=60)  # a busy machine is no failure

# One case of the published losses, with weights (1, 4): raw rows, loss, and gradients.
_ROWS = {
    "image": """
        0.6613521715704522 0.2669240982925188 0.061677258237348306
        0.6213173286854216 -0.45190596470388295 -0.16613023453557194
        -1.5227684840130555 0.38168390241818895 -1.0276085758313882
        -0.5630527986537884 -0.8922905087810341 -0.05825017908369636
    """,
    "text": """
        -0.19550957739962468 -0.9656359311683427 0.42241532118215536
        0.26731699794736563 -0.4211951567546136 -0.5106999992831965
        -1.5726652135630592 -0.1232477576203296 3.586989310317374
        -1.8312901364228844 1.5987003148762056 -1.27700703480527
    """,
    "image_view": """
        0.3255015423575558 -0.4791449162197852 1.3790082614212824
        2.5285573053756747 0.410741663681376 -0.9880071189627424
        -0.9080733658350204 0.5422736524582134 0.11025489388946501
        -2.2590096035659903 0.606699569795185 -0.13830966086820726
    """,
    "text_view": """
        0.8310162778424094 -0.24770745425186805 -0.8029409423009273
        0.23657467679582778 0.28569275962606083 0.6898148786602563
        -0.6330540337361602 0.8794753194080119 -0.6841781812800289
        0.45329080155723456 0.29115795189262866 -0.8317165688933763
    """,
}
_GRADIENTS = {
    "image": """
        -0.04907138683245371 4.129457204827048 -17.345099363456754
        -0.0005904405362704363 -0.0038548887173143103 0.00827782054076643
        1.1636588761449953 -0.16383948131573312 -1.785230289509985
        3.2539878543071032 -2.3813925442656814 5.025340717949272
    """,
    "text": """
        -6.323579950682065 4.325441380631017 6.961113918074761
        0.2013755405263744 4.812055246569878 -3.8632920730498217
        2.77167898293372 -1.0881985263789735 1.1778136832607236
        -0.6972488632303224 0.5160061867131369 1.6458830388218049
    """,
    "image_view": """
        -4.395466654205576 -2.2502754182451663 0.25563526951989984
        0.30552445896266844 0.6298778772382546 1.043771011464572
        0.979554240682972 0.9077383770739065 3.603146283382854
        0.12049322754680336 0.15364469094346622 -1.294046917421928
    """,
    "text_view": """
        -1.2149755591030331 2.8357705702981537 -2.1322937782945486
        -12.383749986738087 -7.02392876921906 7.156075342583625
        2.069529420985912 -1.5113504983931176 -3.857649194928481
        5.666187143815004 -3.761079880519641 1.7714714992835614
    """,
}
_LOG_SCALE, _LOSS, _LOG_SCALE_GRADIENT = 2.6592600369327783, 40.48594932554997, 39.927105117468436


def _table(text: str) -> list[list[float]]:
    return [[float(number) for number in line.split()] for line in text.strip().splitlines()]


def _embedded() -> tuple[dict[str, Any], dict[str, Any]]:
    inputs = {"logit_scale_log": _LOG_SCALE, "inputs": {name: _table(text) for name, text in _ROWS.items()}}
    gradients = {name: _table(text) for name, text in _GRADIENTS.items()} | {"logit_scale": _LOG_SCALE_GRADIENT}
    return inputs, {"loss_weights": {"mmcl": 1, "ssl": 4}, "loss": _LOSS, "grad": gradients}


def _check(inputs: dict[str, Any], case: dict[str, Any]) -> None:
    """Compare loss and gradients of raw rows and of the logarithm of the scale, in float64."""
    raw = {name: torch.tensor(inputs["inputs"][name], dtype=torch.float64, requires_grad=True) for name in NAMES}
    log_scale = torch.tensor(inputs["logit_scale_log"], dtype=torch.float64, requires_grad=True)
    rows = {name: F.normalize(found, dim=-1) for name, found in raw.items()}
    weights = case["loss_weights"]
    found = combined(
        rows["image"],
        rows["text"],
        log_scale.exp(),
        image_view_BD=rows["image_view"],
        text_view_BD=rows["text_view"],
        weights=weights,
    )
    assert found.total.item() == pytest.approx(case["loss"], rel=1e-9, abs=1e-9)
    found.total.backward()
    for name in NAMES:
        own = raw[name].grad
        np.testing.assert_allclose(
            np.zeros_like(raw[name].detach()) if own is None else own.numpy(),
            np.array(case["grad"][name]),
            rtol=1e-9,
            atol=1e-9,
            err_msg=name,
        )
    assert log_scale.grad is not None
    assert log_scale.grad.item() == pytest.approx(case["grad"]["logit_scale"], rel=1e-9, abs=1e-9)


def test_one_published_case_embedded_here() -> None:
    _check(*_embedded())


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"no golden losses at {GOLDEN}: only the embedded case is checked")
@pytest.mark.parametrize("name", ["mmcl", "ssl", "cleanclip", "mmcl+4ssl", "siglip_mean_no_bias"])
@pytest.mark.parametrize("number", [0, 1])
def test_published_losses_and_gradients(number: int, name: str) -> None:
    inputs = json.loads(GOLDEN.read_text())["sets"][number]
    assert len(inputs["inputs"]["image"]) == inputs["N"]
    case = inputs["cases"][name]
    _check(inputs, {**case, "loss_weights": {"siglip_mean": 1.0}} if name == "siglip_mean_no_bias" else case)


def _cross_entropy(rows_ND: NDArray[np.float64], others_ND: NDArray[np.float64], scale: float) -> float:
    """Mean over i of log sum_j exp(s r_i.o_j) - s r_i.o_i, one number at a time."""
    total = 0.0
    for i in range(len(rows_ND)):
        logits = [scale * sum(a * b for a, b in zip(rows_ND[i], other, strict=True)) for other in others_ND]
        top = max(logits)
        total += top + math.log(sum(math.exp(logit - top) for logit in logits)) - logits[i]
    return total / len(rows_ND)


def _nt_xent(rows_ND: NDArray[np.float64], views_ND: NDArray[np.float64], scale: float) -> float:
    """Mean over the 2N anchors of log sum over all others of exp(s a.b), less the logit of the anchor's other view.

    Source: arXiv 2002.05709, equation 1 and the mean in algorithm 1.
    """
    both, total = [*rows_ND, *views_ND], 0.0
    for i, anchor in enumerate(both):
        logits = {j: scale * float(np.dot(anchor, other)) for j, other in enumerate(both) if j != i}
        top = max(logits.values())
        positive = logits[(i + len(rows_ND)) % len(both)]
        total += top + math.log(sum(math.exp(logit - top) for logit in logits.values())) - positive
    return total / len(both)


def _sigmoids(image_ND: NDArray[np.float64], text_ND: NDArray[np.float64], scale: float, bias: float) -> float:
    """Sum over all i and j of log(1 + exp(-z_ij (s x_i.t_j + b))). Source: arXiv 2303.15343, equation 1."""
    total = 0.0
    for i, x in enumerate(image_ND):
        for j, t in enumerate(text_ND):
            total += float(np.logaddexp(0.0, (-1 if i == j else 1) * (scale * float(np.dot(x, t)) + bias)))
    return total


def reference(rows: dict[str, NDArray[np.float64]], scale: float, bias: float = 0.0) -> dict[str, float]:
    """Return each term from its formula, in plain loops.

    L_MMCL = 1/2 [CE(s X T') + CE(s T X')], L_SSL = 1/2 [CE(s X X~') + CE(s T T~')].

    Source: arXiv 2303.03323 and arXiv 2311.14948; the published code is
    vsahil/attack-cleanclip@3d4bd74 src/train.py get_loss.
    """
    image, text, image_view, text_view = (rows[name] for name in NAMES)
    image_term, text_term = _cross_entropy(image, image_view, scale), _cross_entropy(text, text_view, scale)
    count = len(image)
    return {
        "mmcl": (_cross_entropy(image, text, scale) + _cross_entropy(text, image, scale)) / 2,
        "ssl": (image_term + text_term) / 2,
        "image_ssl": image_term,
        "text_ssl": text_term,
        "nt_xent": (_nt_xent(image, image_view, scale) + _nt_xent(text, text_view, scale)) / 2,
        "siglip": _sigmoids(image, text, scale, bias) / count,
        "siglip_mean": _sigmoids(image, text, scale, 0.0) / count**2,
    }


def _draw(count: int, width: int, seed: int) -> dict[str, NDArray[np.float64]]:
    draw = np.random.default_rng(seed)
    raw = {name: draw.standard_normal((count, width)) for name in NAMES}
    return {name: found / np.linalg.norm(found, axis=1, keepdims=True) for name, found in raw.items()}


_weights = st.dictionaries(st.sampled_from(TERMS), st.sampled_from([0.0, 0.25, 1.0, 4.0])).filter(
    lambda weights: any(weights.values())
)
_sizes = st.tuples(st.integers(1, 6), st.integers(2, 5), st.integers(0, 2**32 - 1))


@unhurried
@given(_sizes, st.floats(0.01, 100.0), st.floats(-12.0, 3.0), _weights)
@example((3, 4, 1), 20.0, -10.0, dict.fromkeys(TERMS, 1.0))
def test_agrees_with_an_independent_reference(
    sizes: tuple[int, int, int], scale: float, bias: float, weights: dict[str, float]
) -> None:
    rows = _draw(*sizes)
    expected = reference(rows, scale, bias)
    assert set(expected) == set(TERMS)
    tensors = {name: torch.from_numpy(found) for name, found in rows.items()}
    found = combined(
        tensors["image"],
        tensors["text"],
        torch.tensor(scale, dtype=torch.float64),
        image_view_BD=tensors["image_view"],
        text_view_BD=tensors["text_view"],
        logit_bias=torch.tensor(bias, dtype=torch.float64),
        weights=weights,
    )
    assert set(found.terms) == {name for name, weight in weights.items() if weight}
    for name, term in found.terms.items():
        assert term.item() == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name
    total = sum(weight * expected[name] for name, weight in weights.items())
    assert found.total.item() == pytest.approx(total, rel=1e-9, abs=1e-12)


@unhurried
@given(_sizes)
def test_the_order_of_the_pairs_does_not_matter(sizes: tuple[int, int, int]) -> None:
    tensors = {name: torch.from_numpy(found) for name, found in _draw(*sizes).items()}
    order = torch.randperm(sizes[0], generator=torch.Generator().manual_seed(sizes[2]))
    scale = torch.tensor(14.0, dtype=torch.float64)
    mixed = {name: found[order] for name, found in tensors.items()}
    for loss, names in ((mmcl, ("image", "text")), (ssl, ("image", "image_view", "text", "text_view"))):
        one, other = (loss(*(found[name] for name in names), scale) for found in (tensors, mixed))
        assert one.item() == pytest.approx(other.item(), rel=1e-12, abs=1e-12)


def test_a_perfect_pairing_and_a_uniform_one() -> None:
    """Where all rows are equal the loss is ln N, whatever the scale; N = 1 has nothing to tell apart."""
    same = torch.ones(5, 2, dtype=torch.float64) / math.sqrt(2)
    scale = torch.tensor(30.0, dtype=torch.float64)
    assert mmcl(same, same, scale).item() == pytest.approx(math.log(5), rel=1e-12)
    assert ssl(same, same, same, same, scale).item() == pytest.approx(math.log(5), rel=1e-12)
    assert mmcl(same[:1], same[:1], scale).item() == 0.0
    apart = torch.eye(4, dtype=torch.float64)
    assert mmcl(apart, apart, scale).item() == pytest.approx(math.log1p(3 * math.exp(-30)), rel=1e-9)


def test_ssl_goes_from_originals_to_views_only() -> None:
    """Views as queries give another value: the loss is not symmetric, and not NT-Xent."""
    tensors = {name: torch.from_numpy(found) for name, found in _draw(4, 3, 5).items()}
    image, text, image_view, text_view = (tensors[name] for name in NAMES)
    scale = torch.tensor(10.0, dtype=torch.float64)
    forth, back = ssl(image, image_view, text, text_view, scale), ssl(image_view, image, text_view, text, scale)
    assert abs(forth.item() - back.item()) > 1e-3


def test_nt_xent_goes_both_ways_and_has_negatives_of_the_same_view() -> None:
    tensors = {name: torch.from_numpy(found) for name, found in _draw(4, 3, 5).items()}
    rows, views, scale = tensors["image"], tensors["image_view"], torch.tensor(10.0, dtype=torch.float64)
    assert nt_xent(rows, views, scale).item() == pytest.approx(nt_xent(views, rows, scale).item(), rel=1e-12)
    # With all rows equal: an anchor has 2N - 1 others, of which one is right; a pair alone has no negative.
    same = torch.ones(5, 2, dtype=torch.float64) / math.sqrt(2)
    assert nt_xent(same, same, scale).item() == pytest.approx(math.log(9), rel=1e-12)
    assert image_ssl(same, same, scale).item() == pytest.approx(math.log(5), rel=1e-12)
    assert nt_xent(rows[:1], views[:1], scale).item() == 0.0


def test_sigmoid_losses_are_sum_over_n_and_mean_over_all() -> None:
    tensors = {name: torch.from_numpy(found) for name, found in _draw(4, 3, 5).items()}
    image, text, scale = tensors["image"], tensors["text"], torch.tensor(10.0, dtype=torch.float64)
    unbiased = siglip(image, text, scale, torch.tensor(0.0, dtype=torch.float64))
    assert unbiased.item() == pytest.approx(4 * siglip_mean(image, text, scale).item(), rel=1e-12)
    # At the start, scale and bias make an unrelated pair of N^2 - N all but sure to be told apart.
    none = torch.zeros(4, 3, dtype=torch.float64)
    at_start = siglip(none, none, scale, torch.tensor(-10.0, dtype=torch.float64)).item()
    assert at_start == pytest.approx(math.log1p(math.exp(10)) + 3 * math.log1p(math.exp(-10)), rel=1e-12)


def test_ssl_is_the_mean_of_its_halves() -> None:
    tensors = {name: torch.from_numpy(found) for name, found in _draw(5, 3, 2).items()}
    image, text, image_view, text_view = (tensors[name] for name in NAMES)
    scale = torch.tensor(10.0, dtype=torch.float64)
    halves = image_ssl(image, image_view, scale), text_ssl(text, text_view, scale)
    assert ssl(image, image_view, text, text_view, scale).item() == pytest.approx(float(sum(halves)) / 2, rel=1e-12)


_ALONE = [{name: 1.0} for name in TERMS]


@pytest.mark.parametrize("weights", [*_ALONE, {"mmcl": 1.0, "ssl": 4.0}, {"siglip": 1.0, "nt_xent": 0.5}], ids=str)
def test_gradients_agree_with_differences(weights: dict[str, float]) -> None:
    def loss(
        image: Tensor, text: Tensor, image_view: Tensor, text_view: Tensor, log_scale: Tensor, bias: Tensor
    ) -> Tensor:
        rows = [F.normalize(found, dim=-1) for found in (image, text, image_view, text_view)]
        return combined(
            rows[0],
            rows[1],
            log_scale.exp(),
            image_view_BD=rows[2],
            text_view_BD=rows[3],
            logit_bias=bias,
            weights=weights,
        ).total

    generator = torch.Generator().manual_seed(3)
    raw = [torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(4)]
    numbers = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (1.5, -0.7)]
    assert torch.autograd.gradcheck(loss, (*raw, *numbers))


@pytest.mark.parametrize(
    ("term", "given_view", "missing"),
    [
        ("ssl", None, "image view"),
        ("ssl", "image_view_BD", "text view"),
        ("ssl", "text_view_BD", "image view"),
        ("image_ssl", "text_view_BD", "image view"),
        ("text_ssl", "image_view_BD", "text view"),
        ("nt_xent", "image_view_BD", "text view"),
        ("siglip", None, "logit_bias"),
    ],
)
def test_what_a_term_lacks_is_named(term: str, given_view: str | None, missing: str) -> None:
    rows, views = torch.eye(3), {given_view: torch.eye(3)} if given_view else {}
    with pytest.raises(ValueError, match=f"with a weight above 0 needs {missing}"):
        combined(rows, rows, torch.tensor(1.0), **views, weights={"mmcl": 1.0, term: 0.5})


def test_weights_of_zero_are_refused() -> None:
    rows = torch.eye(3)
    with pytest.raises(ValueError, match="all weights are 0: nothing would be learnt"):
        combined(rows, rows, torch.tensor(1.0), weights=dict.fromkeys(TERMS, 0.0))


class Second:
    """The second of two processes, of which the first has its rows and its share of the loss on record."""

    def __init__(self, whole: dict[int, Tensor]) -> None:
        self.whole, self.asked, self.others = whole, list[int](), torch.zeros(())

    def gather(self, rows_BD: Tensor) -> Rows:
        self.asked.append(id(rows_BD))
        whole_ND = self.whole[id(rows_BD)]
        return Rows(rows_BD, whole_ND, len(whole_ND) - len(rows_BD))

    def add(self, shares: Tensor) -> Tensor:
        return shares + self.others


class First(Second):
    def gather(self, rows_BD: Tensor) -> Rows:
        return replace(super().gather(rows_BD), start=0)

    def add(self, shares: Tensor) -> Tensor:
        self.shares = shares
        return shares


def test_each_tensor_is_gathered_once_and_the_shares_of_the_processes_add_up() -> None:
    tensors = {name: torch.from_numpy(found) for name, found in _draw(5, 3, 8).items()}
    whole, own = dict[int, Tensor](), [dict[str, Tensor]() for _ in range(2)]
    for name, rows in tensors.items():
        for part, mine in zip(rows.split([2, 3]), own, strict=True):
            mine[name], whole[id(part)] = part, rows

    def of(mine: dict[str, Tensor], ranks: Second) -> Loss:
        return combined(
            mine["image"],
            mine["text"],
            torch.tensor(9.0, dtype=torch.float64),
            image_view_BD=mine["image_view"],
            text_view_BD=mine["text_view"],
            logit_bias=torch.tensor(-1.0, dtype=torch.float64),
            weights={name: 1.0 + number for number, name in enumerate(TERMS)},
            ranks=ranks,
        )

    first, second = First(whole), Second(whole)
    of(own[0], first)
    second.others = first.shares
    found = of(own[1], second)
    for ranks, mine in ((first, own[0]), (second, own[1])):
        assert sorted(ranks.asked) == sorted(id(rows) for rows in mine.values())
    expected = reference({name: rows.numpy() for name, rows in tensors.items()}, 9.0, -1.0)
    for name, term in found.terms.items():
        assert term.item() == pytest.approx(expected[name], rel=1e-12), name
    total = sum((1.0 + number) * expected[name] for number, name in enumerate(TERMS))
    assert found.total.item() == pytest.approx(total, rel=1e-12)
