"""Right answers of hw4 that are written in other ways; the first of a question is what its mistakes are made of."""
# ruff: noqa: F821 (the names are those of the scripts)


@right("1a", "sample_tasks", "another order of random draws, torch.distributions")
def tasks_plain(B, K, Q, device=None, dtype=torch.float32):
    uniform = lambda low, high, *shape: torch.distributions.Uniform(low, high).sample(shape).to(device, dtype)
    x = uniform(0.0, 2 * math.pi, B, K, 1)
    bias = uniform(-0.3, 0.3, B, 1, 1)
    phase = uniform(0.0, 2 * math.pi, B, 1, 1)
    amplitude = uniform(0.5, 1.0, B, 1, 1)
    query_x = torch.linspace(0.0, 2 * math.pi, Q, device=device, dtype=dtype).reshape(1, Q, 1).repeat(B, 1, 1)
    y = amplitude * torch.sin(x + phase) + bias
    query_y = amplitude * torch.sin(query_x + phase) + bias
    return x, y, query_x, query_y


@right("1b", "inner_step", "autograd, one task after the other")
def step_plain(layers, x, y, rate, second_order=True):
    keep = second_order and torch.is_grad_enabled()
    tasks = []
    for g in range(len(x)):
        mine = [p[g] if p.dim() == 3 else p for layer in layers for p in layer]
        with torch.enable_grad():
            here = mine if keep else [p.detach().requires_grad_() for p in mine]
            a = x[g]
            for k in range(0, len(here) - 2, 2):
                a = (a @ here[k] + here[k + 1]).clamp(min=0)
            loss = (a @ here[-2] + here[-1] - y[g]).square().mean()
            gradients = torch.autograd.grad(loss, here, create_graph=keep)
        tasks.append([p - rate * d for p, d in zip(mine, gradients, strict=True)])
    stacked = [torch.stack(parts) for parts in zip(*tasks, strict=True)]
    return list(zip(stacked[::2], stacked[1::2], strict=True))


@right("2", "es_gradient", "one pair after the other")
def es_plain(model, tasks, rate, steps, at_once, perturbations, sigma):
    theta, B = model.theta, len(tasks[0])
    pairs = perturbations // 2
    gradient, total = torch.zeros_like(theta), 0.0
    block = 500
    for begin in range(0, pairs, block):
        count = min(block, pairs - begin)
        noise = torch.randn(count, theta.numel(), dtype=theta.dtype)
        chosen = torch.arange(begin, begin + count) % B
        x, y, query_x, query_y = (t[chosen] for t in tasks)
        reached = []
        for sign in (1.0, -1.0):
            layers = [(W.clone(), b.clone()) for W, b in model(theta + sign * sigma * noise)]
            for _ in range(steps):
                inner_step_in_place(layers, x, y, rate)
            reached.append(mse(layers, query_x, query_y))
        slope = (reached[0] - reached[1]) / (2 * sigma)
        gradient = gradient + (slope[:, None] * noise).sum(dim=0) / pairs
        total = total + (reached[0] + reached[1]).sum() / (2 * pairs)
    theta.grad = gradient
    return total


@right("3a", "fit", "the normal equations written out")
def fit_plain(sweep, x, y):
    power = sweep == "hidden_dim"
    u, v = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    if power:
        u, v = u.log(), v.log()
    du, dv = u - u.mean(), v - v.mean()
    slope = (du @ dv) / (du @ du)
    intercept = v.mean() - slope * u.mean()
    left = v - intercept - slope * u
    r2 = 1.0 - float(left @ left) / max(float(dv @ dv), 1e-300) if float(dv.abs().max()) > 0 else 1.0
    a = math.exp(intercept) if power else float(intercept)
    return {"form": "power" if power else "line", "a": a, "b": float(slope), "r2": r2}


@right("3b", "cost_figure", "plain plots, panel by panel")
def figure_plain(rows, engine, summary):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7))
    sweeps = [sweep for sweep in SWEEPS if any(row["sweep"] == sweep for row in rows)]
    for column, sweep in enumerate(sweeps):
        for place, name, unit in ((0, "seconds", 1e3), (1, "peak_bytes", 1e-6)):
            ax = figure.add_subplot(2, len(sweeps), place * len(sweeps) + column + 1)
            for method in COST_TITLES:
                curve = [r for r in rows if r["sweep"] == sweep and r["method"] == method and r["engine"] == engine]
                if curve:
                    ax.plot([r[sweep] for r in curve], [r[name] * unit for r in curve], "o-", label=COST_TITLES[method])
            if sweep == "hidden_dim":
                ax.loglog()
            else:
                ax.set_ylim(bottom=0)
            ax.set_xlabel(SWEEPS[sweep])
            ax.set_ylabel("Runtime (ms)" if place == 0 else "Peak memory (MB)")
            ax.legend()
    return figure
