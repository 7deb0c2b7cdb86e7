"""Right answers of hw9 that are written in other ways; the first of a question is what its mistakes are made of."""
# ruff: noqa: F821 (the names are those of the scripts)


@right("1a", "fourier_features", "one feature after the other")
def features_plain(x, d):
    columns = [torch.ones_like(x)]
    k = 1
    while len(columns) < d:
        columns.append(math.sqrt(2) * torch.sin(k * math.pi * x))
        columns.append(math.sqrt(2) * torch.cos(k * math.pi * x))
        k += 1
    return torch.stack(columns[:d], dim=-1)


@right("1b", "alias_solution", "by the pseudo-inverse")
def solution_plain(c):
    return torch.linalg.pinv(c.unsqueeze(-2)).squeeze(-1)


@right("1c", "alias_gradient", "by autograd on the loss written out")
def gradient_plain(c):
    c = c.detach().requires_grad_()
    beta = c / (c**2).sum(dim=-1, keepdim=True)
    loss = (1 - c[..., 0] * beta[..., 0]) ** 2 + (c[..., 1] * beta[..., 1]) ** 2
    return torch.autograd.grad(loss.sum(), c)[0]


@right("2", "min_norm", "the pseudo-inverse of A A^T, hermitian")
def norm_gram(A, y):
    if A.shape[-2] <= A.shape[-1]:
        return A.mT @ (torch.linalg.pinv(A @ A.mT, rtol=1e-12, hermitian=True) @ y)
    return torch.linalg.pinv(A.mT @ A, rtol=1e-12, hermitian=True) @ (A.mT @ y)


@right("2", "min_norm", "singular values")
def norm_plain(A, y):
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    keep = S > 1e-10 * S.amax(dim=-1, keepdim=True)
    inverse = torch.where(keep, 1 / torch.where(keep, S, 1.0), 0.0)
    return Vh.mT @ (inverse.unsqueeze(-1) * (U.mT @ y))


@right("3", "meta_loss", "one point of the fresh ones after the other")
def loss_plain(c, alpha, x, fresh, args):
    S, n, d = alpha.shape[-2], x.shape[-1], c.shape[0]
    phi = fourier_features(x, d)
    y = labels(phi[..., :S] @ alpha, args.part)
    learned = adapt(c, phi, y, torch.tensor(float(n), dtype=torch.float64), args)
    total = 0.0
    for point in fresh:
        features = fourier_features(point, d)
        prediction = torch.einsum("d,...dt->...t", features, learned)
        truth = labels(torch.einsum("s,...st->...t", features[:S], alpha), args.part)
        if args.part == "logistic":
            total = total + torch.log1p(torch.exp(-truth * prediction)).mean()
        else:
            total = total + ((prediction - truth) ** 2).mean()
    return total / len(fresh)


@right("4", "regression_steps", "einsum, the error first")
def regression_plain(A, y, n, steps, lr):
    beta = torch.zeros(A.shape[-1], y.shape[-1], dtype=A.dtype)
    for _ in range(steps):
        error = A @ beta - y
        gradient = 2 * torch.einsum("...nd,...nt->...dt", A, error) / n
        beta = beta - lr * gradient
    return beta


@right("5", "logistic_steps", "einsum, the pull of every point first")
def logistic_plain(A, y, n, steps, lr):
    beta = torch.zeros(A.shape[-1], y.shape[-1], dtype=A.dtype)
    for _ in range(steps):
        margin = y * (A @ beta)
        pull = y / (1 + torch.exp(margin))
        gradient = -torch.einsum("...nd,...nt->...dt", A, pull) / n
        beta = beta - lr * gradient
    return beta
