"""What `auto` takes, and torch.compile."""

import pytest
import torch

from lora_kernels.ops import _ext
from lora_kernels.ops._op import OPS
from lora_kernels.ops.small_linalg.op import cholesky_solve, eigh, sylvester
from lora_kernels.ops.small_linalg.spectrum import factor_spectrum
from tests.ops.linalg_cases import positive

pytestmark = pytest.mark.skipif(_ext.load()[0] is None, reason="extension not built")

CASES = [  # op, float64?, batch, order, expected
    ("eigh", False, (224,), 16, "cpp"),
    ("eigh", True, (), 32, "cpp"),
    ("eigh", True, (), 33, "torch"),
    ("eigh", False, (4,), 64, "cpp"),
    ("eigh", False, (4,), 65, "torch"),
    ("eigh", False, (224,), 128, "cpp"),
    ("eigh", False, (224,), 129, "torch"),
    ("cholesky", False, (1,), 128, "cpp"),
    ("cholesky", False, (1,), 129, "torch"),
    ("cholesky_solve", True, (1,), 128, "cpp"),
    ("sylvester", False, (1,), 32, "cpp"),
    ("sylvester", False, (1,), 33, "torch"),
    ("sylvester", False, (2, 4), 96, "cpp"),
    ("sylvester", False, (2, 4), 97, "torch"),
    ("factor_spectrum", False, (), 24, "cpp"),
    ("factor_spectrum", False, (), 25, "torch"),
    ("factor_spectrum", True, (2,), 8, "cpp"),
    ("factor_spectrum", True, (2,), 9, "torch"),
]


@pytest.mark.parametrize("op, wide, batch, n, expected", CASES)
def test_auto_takes_what_is_faster(op, wide, batch, n, expected):
    square = torch.empty(*batch, n, n, dtype=torch.float64 if wide else torch.float32)
    factors = square.new_empty(*batch, n, 40), square.new_empty(*batch, 50, n)
    inputs = {
        "eigh": (None, square),
        "cholesky": (square,),
        "cholesky_solve": (square, square),
        "sylvester": (square[..., :2, :2], square, square[..., :2, :]),
        "factor_spectrum": (*factors, 1.0),
    }[op]
    found = OPS[op].choose("auto", None, *inputs)
    assert found == expected


def test_a_compiled_graph_is_whole():
    def together(a, rhs):
        values, vectors = eigh(a)
        between = sylvester(a, a, cholesky_solve(a, rhs))
        return values, vectors, between, factor_spectrum(rhs, a, 0.5)

    a, rhs = positive((3,), 6, torch.float64), torch.randn(3, 6, 6, dtype=torch.float64)
    found = torch.compile(together, fullgraph=True, backend="eager")(a, rhs)
    for mine, theirs in zip(found, together(a, rhs), strict=True):
        torch.testing.assert_close(mine, theirs)
