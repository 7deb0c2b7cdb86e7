"""Right answers of hw3 that are written in other ways; the first of a question is what its mistakes are made of."""
# ruff: noqa: F821 (the names are those of the scripts)


@right("1", "preprocess", "filled in by a mask")
def preprocess_plain(x):
    p = 10.0
    size, sign = torch.full_like(x, -1.0), math.exp(p) * x
    big = x.abs() >= math.exp(-p)
    size[big] = x[big].abs().log() / p
    sign[big] = x[big].sign()
    return size, sign


@right("2a", "LSTMCell.forward", "gates one by one, the derivative by autograd of the same steps")
def cell_plain__forward(ctx, inputs, h, c, weight_ih, weight_hh, bias):
    ctx.save_for_backward(inputs, h, c, weight_ih, weight_hh, bias)
    H = h.shape[1]
    z = weight_ih @ inputs + weight_hh @ h + bias[:, None]
    i, f, o = z[:, :H].sigmoid(), z[:, H : 2 * H].sigmoid(), z[:, 3 * H :].sigmoid()
    g = z[:, 2 * H : 3 * H].tanh()
    new_c = f * c + i * g
    return o * new_c.tanh(), new_c


@right("2a", "LSTMCell.backward", "gates one by one, the derivative by autograd of the same steps")
def cell_plain__backward(ctx, grad_h, grad_c):
    with torch.enable_grad():
        given = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        inputs, h, c, weight_ih, weight_hh, bias = given
        z = weight_ih @ inputs + weight_hh @ h + bias[:, None]
        i, f, g, o = z.chunk(4, dim=1)
        end_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        end_h = o.sigmoid() * end_c.tanh()
        wanted = given if ctx.needs_input_grad[0] else given[1:]
        found = torch.autograd.grad([end_h, end_c], wanted, [grad_h, grad_c])
    return found if len(found) == 6 else (None, *found)


@right("2b", "MetaLSTM.forward", "one gate after the other")
def gates_plain(self, theta, grad, loss, state):
    of_h, memory = self.read(grad, loss, state.memory, self.gate_weight)
    w_f, w_i = self.gate_weight
    b_f, b_i = self.gate_bias
    f = torch.sigmoid(of_h[:, 0] + theta * w_f[-2] + state.forget * w_f[-1] + b_f)
    i = torch.sigmoid(of_h[:, 1] + theta * w_i[-2] + state.input * w_i[-1] + b_i)
    new = f * theta - i * grad
    return new, State(memory, f, i)


@right("3", "train_learner", "batches by index, one epoch after the other")
def adapt_plain(rule, learner, support, labels, inner, second_order=False, dtype=torch.float32, watch=None, start=()):
    B, n = labels.shape
    N = learner.num_classes
    K = n // N
    theta, state = start if start else rule.start(B, dtype)
    statistics = learner.fresh_statistics(theta)
    order = [c * K + k for k in range(K) for c in range(N)]
    graph = second_order and torch.is_grad_enabled()
    for _epoch in range(inner.epochs):
        for begin in range(0, n, inner.batch):
            batch = order[begin : begin + inner.batch]
            with torch.enable_grad():
                here = theta if graph else theta.detach().clone().requires_grad_(True)
                scores = learner(here, support[:, batch], statistics, inner.momentum, dtype)
                losses = torch.stack(
                    [nn.functional.cross_entropy(s, y) for s, y in zip(scores, labels[:, batch], strict=True)]
                )
                gradient = torch.autograd.grad(losses.sum(), here, create_graph=graph)[0]
            if not graph:
                losses = losses.detach()
            theta, state = rule(theta, gradient, losses, state)
            if watch:
                watch(losses, state)
    return theta, statistics


@right("4", "query_losses", "one task after the other behind the training")
def queries_plain(rule, learner, tasks, inner, second_order=False, dtype=torch.float32, query_norm="batch", start=()):
    support, labels, query, query_labels = tasks
    theta, _ = train_learner(rule, learner, support, labels, inner, second_order, dtype, None, start)
    if query_norm == "support":
        together = torch.cat([support, query], dim=1)
        scores = learner(theta, together, dtype=dtype, num_support=support.shape[1])[:, support.shape[1] :]
    else:
        scores = learner(theta, query, dtype=dtype)
    losses = [nn.functional.cross_entropy(s, y) for s, y in zip(scores, query_labels, strict=True)]
    right = (scores.argmax(dim=2) == query_labels).double().mean(dim=1)
    return torch.stack(losses), right
