"""Which student layer is aligned with which teacher layer.

Student layers are numbered by the output of block 0, 1, ..., L - 1, as `Policy.capture` has them; teacher layers by
their place among the teacher's outputs. There is no -1: in the released code it means the input of the last block
in one trainer and the normed output in another.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from burnish.core.errors import BurnishError

Pairs = list[tuple[int, int]]
SINGLE = {18: 12}
"""Blocks of a student and which one Spatial Forcing (arXiv 2510.12276) aligns, where not that at three quarters: pi."""
STRATEGIES = ("depth", "single", "e2m_last1", "uniform-K", "shallow", "middle", "deep")


def uniform(count: int, num_layers: int) -> list[int]:
    """`count` of `num_layers` layers by the released code's rule: strides that end at the last layer.

    All of them where count >= num_layers; a plain stride where it divides; otherwise evenly spaced ones are dropped,
    or (n - 1) - i n / k is rounded half up.
    """
    if count >= num_layers:
        return list(range(num_layers))
    if num_layers % count == 0:
        stride = num_layers // count
        return list(range(stride - 1, num_layers, stride))
    dropped = num_layers - count
    if num_layers % dropped == 0:
        return [i for i in range(num_layers) if i % (num_layers // dropped)]
    # floor(x + 1/2) in whole numbers: (2 n k - 2 k - 2 i n + k) / (2 k)
    places = [(2 * (num_layers - 1) * count - 2 * i * num_layers + count) // (2 * count) for i in range(count)]
    return sorted(places)


def early_to_middle_and_last(count: int, num_student: int, num_teacher: int, *, released: bool = False) -> Pairs:
    """E2M-Last1, the paper's default: a stride over early and middle layers, and the last one.

    OpenVLA (32 blocks, 24 teacher layers, 10 pairs): outputs of blocks 2, 4, ..., 18 counted from 1, and the last, with
    teacher layers 2, 4, ..., 18 and the last. pi0 (18 blocks): 2, 3, ..., 10 and the last.

    Args:
        count: pairs wanted; fewer where a network is too shallow.
        released: the student's "last" is the output of the block before the last one, as the code has it.
    """
    count = max(1, min(count, num_student - 1, num_teacher - 1))
    early = count - 1
    if early == 0:
        return [(num_student - 1 - released, num_teacher - 1)]
    student_stride = max(1, num_student * 9 // (16 * early))
    teacher_stride = max(1, num_teacher * 3 // (4 * early))
    last = num_student - 1 - released
    pairs = [(1 + i * student_stride, 2 + i * teacher_stride) for i in range(early)]
    pairs = [(s, t) for s, t in pairs if s < last and t < num_teacher - 1]
    return [*pairs, (last, num_teacher - 1)]


def by_depth(student: Sequence[int], num_student: int, num_teacher: int) -> Pairs:
    """Each student layer with the teacher layer at the same share of the depth."""
    return [(s, min(num_teacher - 1, max(0, round((s + 1) / num_student * num_teacher) - 1))) for s in student]


def thirds(name: str, num_layers: int) -> list[int]:
    """The layers of the shallow, middle or deep third."""
    third = {"shallow": 0, "middle": 1, "deep": 2}[name]
    return list(range(num_layers * third // 3, max(num_layers * (third + 1) // 3, num_layers * third // 3 + 1)))


def choose_pairs(select: str, count: int, num_student: int, num_teacher: int, *, released: bool = False) -> Pairs:
    """The pairs of a named strategy.

    Args:
        select: "depth" every layer but the last, whose output the actions of SmolVLA and pi do not read, with teacher
            layers spread evenly up to the last; where these are more than `count`, as many of them, evenly spread;
            "single" Spatial Forcing's layer (block 24 of 32, 12 of 18, else that at three quarters of the depth) with
            the teacher's last; "e2m_last1"; "uniform-K"; "shallow", "middle", "deep" thirds.
        count: pairs of "e2m_last1", and most of "depth" (0: no limit).
    """
    if select == "depth":
        read = max(1, num_student - 1)
        return by_depth(uniform(count or read, read), read, num_teacher)
    if select == "single":
        block = SINGLE.get(num_student, num_student * 3 // 4)
        return [(max(0, block - 1), num_teacher - 1)]
    if select == "e2m_last1":
        return early_to_middle_and_last(count, num_student, num_teacher, released=released)
    if select in ("shallow", "middle", "deep"):
        return by_depth(thirds(select, num_student), num_student, num_teacher)
    if match := re.fullmatch(r"uniform-(\d{1,4})", select):
        wanted = min(int(match[1]), num_student, num_teacher)
        if wanted > 0:
            return list(zip(uniform(wanted, num_student), uniform(wanted, num_teacher), strict=True))
    raise BurnishError(f"align: select is '{select}'", f"one of {', '.join(STRATEGIES)}, or pairs: [[0, 1], ...]")


def check_pairs(pairs: Sequence[Sequence[int]], num_student: int, num_teacher: int) -> Pairs:
    """Pairs as (student, teacher), both ascending; raises BurnishError that names a layer which does not exist."""
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(type(layer) is int for layer in pair):
            raise BurnishError(f"align: {pair!r} among the pairs"[:200],
                               "[student layer, teacher layer] in whole numbers")  # fmt: skip
        for layer, count, who in ((pair[0], num_student, "student"), (pair[1], num_teacher, "teacher")):
            if not 0 <= layer < count:
                raise BurnishError(f"align: {who} layer {layer}",
                                   f"0 to {count - 1}, the outputs of its {count} layers")  # fmt: skip
    if not pairs:
        raise BurnishError("align: no pairs", "at least one [student layer, teacher layer]")
    students = [s for s, _ in pairs]
    if students != sorted(students):
        raise BurnishError(f"align: student layers {students}", "ascending ones: widths grow with depth")
    return [(int(s), int(t)) for s, t in pairs]


def similar_layers(similarity: Sequence[float], count: int, *, top: bool) -> list[int]:
    """Sim-w-Top and Sim-w-Last: the `count` layers most (or least) similar to the one w blocks later.

    Args:
        similarity: mean cosine of layer i and layer i + w, for each i.
    """
    order = np.argsort(np.asarray(similarity), kind="stable")
    return sorted(int(i) for i in (order[::-1] if top else order)[:count])


def match_by_cka(matrix: np.ndarray, count: int) -> Pairs:
    """The `count` pairs of largest CKA among the best one-to-one matching of all layers (Hungarian assignment)."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(matrix, maximize=True)
    best = sorted(zip(rows, columns, strict=True), key=lambda rc: -matrix[rc])[:count]
    return sorted((int(r), int(c)) for r, c in best)


class StreamingCka:
    """Linear CKA between all student and teacher layers from batches, without keeping the features.

    CKA(X, Y) = |X'Y|^2 / (|X'X| |Y'Y|) on centred features. Only sums of products are kept, in float64.
    """

    def __init__(self, student_widths: Sequence[int], teacher_widths: Sequence[int]):
        self.widths = [*student_widths, *teacher_widths]
        self.split, self.rows = len(student_widths), 0
        self.sums = [torch.zeros(d, dtype=torch.float64) for d in self.widths]
        self.products: dict[tuple[int, int], Tensor] = {}

    def add(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        """One batch: [n, D] tokens for each layer, the same n throughout."""
        both = [x.detach().double().cpu() for x in [*student, *teacher]]
        self.rows += len(both[0])
        for i, x in enumerate(both):
            self.sums[i] += x.sum(0)
            others = [i, *range(self.split, len(both))] if i < self.split else [i]
            for j in others:
                product = x.T @ both[j]
                self.products[i, j] = self.products[i, j] + product if (i, j) in self.products else product

    def _centred(self, i: int, j: int) -> Tensor:
        return self.products[i, j] - self.sums[i][:, None] * self.sums[j] / self.rows

    def matrix(self) -> np.ndarray:
        """[student layers, teacher layers] CKA."""
        norms = [self._centred(i, i).norm().clamp_min(1e-300) for i in range(len(self.widths))]
        return np.array([
            [float(self._centred(i, j).square().sum() / (norms[i] * norms[j]))
             for j in range(self.split, len(self.widths))]
            for i in range(self.split)
        ])  # fmt: skip
