"""LoRA-Pro by the book, one pair at a time, with dense inverses in float64; and what the tests train."""

import torch

import lora_kernels as lk

SHAPES = [(13, 17, 4), (13, 17, 4), (29, 7, 4), (5, 31, 1), (24, 24, 7)]  # m, n, r


def factors(shapes=SHAPES, dtype=torch.float32, b_scale=0.3, seed=0, device="cpu"):
    """Pairs `(A, B)`; with `b_scale` zero, B = 0."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for m, n, r in shapes:
        a = torch.randn(r, n, generator=generator, dtype=torch.float64) / n**0.5
        b = torch.randn(m, r, generator=generator, dtype=torch.float64) * b_scale
        made.append(tuple(torch.nn.Parameter(each.to(device, dtype)) for each in (a, b)))
    return made


def full_gradients(step, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(m, n, generator=generator, dtype=torch.float64) for m, n, _ in shapes]


def set_gradients(pairs, scaling, step, shapes=SHAPES):
    """Gradients that the chain rule gives, for given gradients of the full weights."""
    scalings = scaling if isinstance(scaling, list) else [scaling] * len(pairs)
    for (a, b), g, s in zip(pairs, full_gradients(step, shapes), scalings, strict=True):
        a.grad = (s * b.detach().double().T @ g).to(a.dtype)
        b.grad = (s * g @ a.detach().double().T).to(b.dtype)


def inverse(gram, damping):
    return torch.linalg.inv(gram + damping * torch.eye(len(gram), dtype=gram.dtype))


def sylvester(p, q, rhs):
    """P X + X Q = R as one dense linear system."""
    r, k = rhs.shape
    eye = torch.eye
    dense = torch.kron(p, eye(k, dtype=p.dtype)) + torch.kron(eye(r, dtype=p.dtype), q.T.contiguous())
    return torch.linalg.solve(dense, rhs.reshape(-1)).reshape(r, k)


def adjusted(a, b, grad_a, grad_b, s, damping=1e-8, cross=True):
    """METHODS.md, line by line."""
    a, b, grad_a, grad_b = (each.detach().double() for each in (a, b, grad_a, grad_b))
    t_inverse = inverse(a @ a.T, damping)
    if not b.any():
        return grad_a, grad_b @ t_inverse / s**2
    s_inverse = inverse(b.T @ b, damping)
    projector = torch.eye(len(b), dtype=b.dtype) - b @ s_inverse @ b.T
    d_a, d_b = s_inverse @ grad_a / s**2, projector @ grad_b @ t_inverse / s**2
    if cross:
        x = sylvester(b.T @ b, a @ a.T, -(s_inverse @ grad_a @ a.T) / s**2)
        d_a, d_b = d_a + x @ a, d_b - b @ x
    return d_a, d_b


class ByTheBook:
    """Either mode on float64 copies of pairs."""

    def __init__(self, pairs, scaling, lr, mode, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, damping=1e-8):
        self.pairs = [tuple(each.detach().double().clone() for each in pair) for pair in pairs]
        self.scalings = scaling if isinstance(scaling, list) else [scaling] * len(pairs)
        self.lr, self.mode, self.betas, self.eps = lr, mode, betas, eps
        self.weight_decay, self.damping = weight_decay, damping
        self.moments, self.count = {}, 0

    def _direction(self, key, value):
        first, second = self.moments.get(key, (torch.zeros_like(value), torch.zeros_like(value)))
        first = self.betas[0] * first + (1 - self.betas[0]) * value
        second = self.betas[1] * second + (1 - self.betas[1]) * value**2
        self.moments[key] = first, second
        corrected = second / (1 - self.betas[1] ** self.count)
        return first / (1 - self.betas[0] ** self.count) / (corrected.sqrt() + self.eps)

    def step(self, full):
        """With gradients of the full weights."""
        self.count += 1
        for index, ((a, b), g, s) in enumerate(zip(self.pairs, full, self.scalings, strict=True)):
            grads = s * b.T @ g, s * g @ a.T
            if self.mode == "efficient":
                moves = [
                    self._direction((index, k), each) for k, each in enumerate(adjusted(a, b, *grads, s, self.damping))
                ]
            else:
                d_a, d_b = adjusted(a, b, *grads, s, self.damping, cross=False)
                h = self._direction(index, s * (b @ d_a + d_b @ a))
                moves = adjusted(a, b, s * b.T @ h, s * h @ a.T, s, self.damping)
            for parameter, move in zip((a, b), moves, strict=True):
                parameter.mul_(1 - self.lr * self.weight_decay).sub_(move, alpha=self.lr)


def optimizer_for(pairs, scaling=1.5, lr=0.02, **options):
    return lk.training.LoraPro([{"pairs": pairs, "scaling": scaling}], lr=lr, **options)
