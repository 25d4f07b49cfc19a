"""Table 2 of the paper (arXiv 2604.25917): end-to-end seconds and overall tokens of both arms, as printed.

Knows nothing of this package.
"""

from typing import NamedTuple


class Printed(NamedTuple):
    """What is printed of one benchmark and number of rounds: of Recursive-TextMAS, and of RecursiveMAS."""

    text_seconds: int
    text_tokens: int
    latent_seconds: int
    latent_tokens: int


SYSTEMS = ("sequential_light", "sequential_scaled")
BENCHMARKS = ("MATH500", "AIME25", "AIME26", "GPQA-D", "MedQA", "Code")
ROUNDS = (1, 2, 3)
SPEEDUP = {1: 1.2, 2: 1.9, 3: 2.4}
"""As printed in the last column. No one formula gives all three; ratios of sums are 1.19, 1.79 and 2.27."""
TOKEN_REDUCTION = {1: 0.346, 2: 0.655, 3: 0.756}
"""As printed in the last column: one less the ratio of the sums over all twelve columns."""

_ROWS = {
    # text seconds, text tokens, latent seconds, latent tokens; each Light and Scaled of every benchmark in turn
    1: (
        "1368 2401 2380 8462 2216 9376 1056 2190 1555 1522 976 8867",
        "1185 1471 2993 9397 2754 8854 2084 3693 2382 1427 1146 3154",
        "825 1701 1829 7784 1788 8134 586 1965 1194 1348 449 7908",
        "523 816 1622 6338 1576 7021 829 2675 1369 964 577 2198",
    ),
    2: (
        "2204 3958 4247 14380 3960 14110 1825 4207 3097 2745 1847 14792",
        "2117 2794 5318 16372 4982 16213 3708 6128 4436 2609 1998 5369",
        "1096 1974 2367 8178 2263 8965 752 2342 1427 1664 627 8329",
        "495 953 1614 5314 1552 6657 813 2521 1383 1008 531 2020",
    ),
    3: (
        "2952 6010 6183 19304 5907 19678 3322 7537 4684 3922 2310 22036",
        "3059 4100 8645 23651 7813 22915 5820 8091 6307 3731 2676 7078",
        "1360 2320 2727 8981 2629 9623 861 2638 1704 1912 805 10186",
        "519 893 1586 5342 1537 6860 786 2524 1378 1056 595 2247",
    ),
}


def printed() -> dict[tuple[str, str, int], Printed]:
    """Every cell, by system, benchmark and rounds."""
    found = {}
    for rounds, lines in _ROWS.items():
        columns = zip(*(map(int, line.split()) for line in lines), strict=True)
        for number, column in enumerate(columns):
            found[SYSTEMS[number % 2], BENCHMARKS[number // 2], rounds] = Printed(*column)
    return found
